# Busy volumes on stacks of devices are imaged by `track`, restored and judged.
#   KIND:FILESYSTEM...: KIND is one that stack-common.sh can build.
# Each is imaged twice. The first time writers go on through both freezes; their own check says whether
# the copy is exact. The second time they are stopped just before the last freeze, so that the device can
# be copied soon after it, frozen once more: a block may differ only if it was written to in between, as
# the kernel tells by the bios that it sent to the device itself.
. ./stack-common.sh
mount -t tracefs tracefs /sys/kernel/tracing
images /dev/vde

cat >/dev/shm/stop <<'HOOK'
for pid in $(cat /dev/shm/writers); do
    kill -STOP "$pid"
    # What a thread has begun, it ends first.
    while grep -hs '^State:' /proc/"$pid"/task/*/status | grep -qv 'T (stopped)'; do
        sleep 0.05
    done
done
HOOK
cat >/dev/shm/copy <<'HOOK'
. /dev/shm/variables
fsfreeze --freeze /run/volume
dd if="$top" of=/run/images/oracle bs=1M iflag=direct conv=sparse status=none
cat $trace/trace >/run/images/trace
counted >/run/counted
fsfreeze --unfreeze /run/volume
kill -CONT $(cat /dev/shm/writers)
HOOK
cat >/dev/shm/functions <<'FUNCTIONS'
trace=/sys/kernel/tracing/instances/measure
# What the device has counted, in sectors.
counted() { awk '{ print $7 + $14 }' "$place/stat"; }
# Every bio that is sent to it, with its time in seconds since the boot.
begin_sums() {
    mkdir $trace
    echo 16384 >$trace/buffer_size_kb
    echo mono >$trace/trace_clock
    # Of a partition they name the disk.
    local disk=$number range=''
    if [ -e "$place/start" ]; then
        disk=$(cat "$place/../dev")
        range=" && sector >= $start && sector < $((start + $(cat "$place/size")))"
    fi
    echo "dev == $((${disk%:*} << 20 | ${disk#*:})) && !(rwbs ~ \"R*\")$range" \
        >$trace/events/block/block_bio_queue/filter
    counted >/run/counted-before
    echo 1 >$trace/events/block/block_bio_queue/enable
}
FUNCTIONS
. /dev/shm/functions
# bios: time, first sector and sectors of each.
bios() {
    sed -nE 's/.* ([0-9]+\.[0-9]+): block_bio_queue: [0-9,]+ [A-Z]+ ([0-9]+) \+ ([0-9]+) .*/\1 \2 \3/p' \
        /run/images/trace
}
# booted_at: when the clock of the trace was 0, in nanoseconds since 1970.
booted_at() {
    local now
    now=$(date +%s%N)
    echo $((now - $(sed -n 's/^now at \([0-9]*\) nsecs$/\1/p' /proc/timer_list)))
}

# free_blocks FILE: numbers of the blocks that its filesystem does not use, sorted as text. Frozen, all
# that says so is where it belongs.
free_blocks() {
    if [ "$type" = ext4 ]; then
        dumpe2fs "$1" 2>/dev/null | sed -n 's/^  Free blocks: //p' | tr -s ', ' '\n' | sed '/^$/d' |
            awk -F - '{ for (block = $1; block <= ($2 == "" ? $1 : $2); block++) print block }'
    else
        local each
        each=$(xfs_db -r -f -c "sb 0" -c "print agblocks" "$1" | sed 's/.*= //')
        xfs_db -r -f -c "freesp -d" "$1" | awk -v "each=$each" \
            '/^ *[0-9]+ +[0-9]+ +[0-9]+ *$/ { for (at = 0; at < $3; at++) print $1 * each + $2 + at }'
    fi | sort -u
}

# imaged ARGUMENT...: a backup of /run/volume that holds.
imaged() {
    local status=0
    backup "$report" /run/volume -o "$image" --freeze track "$@" || status=$?
    unchanged
    [ "$status" = 0 ] || fail "status $status"
    tail -n 1 "$report" | grep -q '"grade":"frozen"' || fail "$(tail -n 1 "$report")"
    tail -n 1 "$report" | grep -q '"warnings":\[\]' || fail "$(tail -n 1 "$report")"
    freezes "$report"
}

for case in "$@"; do
    IFS=: read -r kind type <<<"$case"
    stack "$kind"
    wipefs -q -a "$top"
    options=(-b 4096)
    [ "$type" = ext4 ] || options=()
    mkfs."$type" -q "${options[@]}" "$top"
    mount "$top" /run/volume
    picture >/run/before
    number=$(stat -L -c '%Hr:%Lr' "$top")
    place=$(readlink -f "/sys/dev/block/$number")
    start=$(cat "$place/start" 2>/dev/null || echo 0)
    { declare -p top number place start; cat /dev/shm/functions; } >/dev/shm/variables
    fsfreeze --freeze /run/volume
    begin_sums
    fsfreeze --unfreeze /run/volume

    journal=/dev/shm/journal-$kind
    busy /run/volume/files "$journal"
    echo "${writers[@]}" >/dev/shm/writers
    neighbour=''
    if [ -n "$beside" ]; then
        while dd if=/dev/urandom of="$beside" bs=16k count=200 oflag=direct status=none; do
            sleep 0.2
        done &
        neighbour=$!
    fi
    imaged
    first=$(instant "$report")
    mv "$image" /run/images/live.still
    imaged --pre-freeze "bash /dev/shm/stop" --post-freeze "bash /dev/shm/copy"
    # Three milliseconds into the freeze: clocks are not read at once.
    second=$(($(instant "$report") - $(booted_at) + 3000000))
    calm
    [ -z "$neighbour" ] || { kill $neighbour; wait $neighbour || true; }
    rmdir $trace
    umount /run/volume
    nothing_left
    no_stack

    sent=$(bios | awk '{ sum += $3 } END { print sum + 0 }')
    sum=$(($(cat /run/counted) - $(cat /run/counted-before)))
    echo "conserved: $case: $sum sectors counted, $sent sent"
    # It counts twice, which is why it is not asked.
    [ "$kind" != raid1 ] || sent=$((2 * sent))
    [ "$sum" = "$sent" ] || fail "not all that was sent was counted"

    # Onto a copy of what the device was: what is not restored cannot differ there, what is must not. Only
    # of what is free may an earlier state be in the image, and nothing at the ends of the device.
    cp --sparse=always /run/images/oracle /run/images/copy
    timeout "$limit" holdstill restore "$image" /run/images/copy --yes --quiet
    { cmp -l /run/images/oracle /run/images/copy || true; } |
        awk '{ print int(($1 - 1) / 4096) }' | uniq | sort >/run/differing
    bios | awk -v "since=$second" -v "start=$start" '$1 * 1e9 > since + 0 {
        for (block = int(($2 - start) / 8); block * 8 < $2 - start + $3; block++) print block
    }' | sort -u >/run/written
    free_blocks /run/images/oracle >/run/free
    comm -23 /run/differing /run/written | comm -23 - /run/free >/run/unexplained
    echo "compared: $case: $(wc -l </run/differing) blocks differ, $(wc -l </run/unexplained) in use and not written since"
    [ ! -s /run/unexplained ] || fail "the copy differs from the device in $(xargs </run/unexplained)"
    rm "$image" /run/images/oracle /run/images/copy /run/images/trace

    wipefs -q -a /dev/vdd
    timeout "$limit" holdstill restore /run/images/live.still /dev/vdd --yes --quiet
    rm /run/images/live.still
    [ "$type" = xfs ] || sound "$type" /dev/vdd
    options=rw
    [ "$type" = ext4 ] || options=nouuid
    mount -o $options /dev/vdd /run/copy
    right /run/copy/files "$journal" "$first"
    umount /run/copy
    sound "$type" /dev/vdd
done
umount /run/images
