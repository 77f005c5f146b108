# Busy volumes on stacks of devices are imaged by `track`, restored and judged.
#   KIND:FILESYSTEM[:live]...: KIND is one that stack-common.sh can build.
# The writers are stopped just before the last freeze, so that the device can be copied soon after it,
# frozen once more: a block in use may differ from the image only if it was written to in between, as the
# kernel tells by the bios that it sent to the device itself. With `live` there is a second image, for
# which they go on through both freezes; then their own check alone says whether it is exact.
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
# booted_at: when the clock of the trace was 0, in nanoseconds since 1970. Of several tries the best.
booted_at() {
    local best=0 took least=1000000000 before after line
    for _ in $(seq 20); do
        before=${EPOCHREALTIME/./}000
        while read -r line; do
            [[ $line != "now at "* ]] || break
        done </proc/timer_list
        after=${EPOCHREALTIME/./}000
        took=$((after - before))
        [ $took -lt $least ] || continue
        least=$took
        line=${line#now at }
        best=$(((before + after) / 2 - ${line% nsecs}))
    done
    echo $best
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

# restored_right NAME INSTANT: restores the image onto an empty disk, and judges it.
restored_right() {
    local options=rw
    blank /dev/vdd
    timeout "$limit" holdstill restore /run/images/"$1".still /dev/vdd --yes --quiet
    rm /run/images/"$1".still
    [ "$1" = live ] || as_the_device_was
    [ "$type" = xfs ] || sound "$type" /dev/vdd
    [ "$type" = ext4 ] || options=nouuid
    mount -o $options /dev/vdd /run/copy
    right /run/copy/files "$journal" "$2"
    umount /run/copy
    sound "$type" /dev/vdd
}
# as_the_device_was: every block in use is as it was in the freeze.
as_the_device_was() {
    perl -e 'open(A, "<", $ARGV[0]) && open(B, "<", $ARGV[1]) or die;
        for ($at = 0; read(A, $a, 4096); $at++) { read(B, $b, 4096); print "$at\n" if $a ne $b }' \
        /run/images/oracle /dev/vdd | sort >/run/differing
    bios | awk -v "since=$second" -v "start=$start" '$1 * 1e9 > since + 0 {
        for (block = int(($2 - start) / 8); block * 8 < $2 - start + $3; block++) print block
    }' | sort -u >/run/written
    free_blocks /run/images/oracle >/run/free
    comm -23 /run/differing /run/free >/run/in-use
    comm -23 /run/in-use /run/written >/run/unexplained
    echo "compared: $case: of $(($(stat -c %s /run/images/oracle) / 4096 - $(wc -l </run/free))) blocks in use" \
        "$(wc -l </run/in-use) differ, $(wc -l </run/unexplained) of them not written since"
    [ ! -s /run/unexplained ] || fail "the copy differs from the device in $(xargs </run/unexplained)"
    rm /run/images/oracle /run/images/trace
}

for case in "$@"; do
    IFS=: read -r kind type live <<<"$case"
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
    if [ "$kind" = nvme ]; then
        while fstrim /run/volume; do sleep 0.5; done &
        neighbour=$!
    elif [ -n "$beside" ]; then
        while dd if=/dev/urandom of="$beside" bs=16k count=200 oflag=direct status=none; do
            sleep 0.2
        done &
        neighbour=$!
    fi
    instants=()
    if [ "$live" = live ]; then
        imaged
        instants+=("$(instant "$report")")
        mv "$image" /run/images/live.still
    fi
    imaged --pre-freeze "bash /dev/shm/stop" --post-freeze "bash /dev/shm/copy"
    instants+=("$(instant "$report")")
    mv "$image" /run/images/stopped.still
    # The middle of the freeze: clocks are not read at once.
    half=$(freezes "$report" | sed -n 's/.*purpose:final.*read_ms:\([0-9]*\).*/\1/p')
    second=$(($(instant "$report") - $(booted_at) + ${half}000000 / 2))
    calm
    [ -z "$neighbour" ] || { kill $neighbour; wait $neighbour || true; }
    rmdir $trace
    umount /run/volume
    nothing_left
    no_stack

    sent=$(bios | awk '{ sum += $3 } END { print sum + 0 }')
    sum=$(($(cat /run/counted) - $(cat /run/counted-before)))
    echo "conserved: $case: $sum sectors counted, $sent sent"
    # Newer kernels count it twice, which is why it is not asked.
    [ "$kind" != raid1 ] || [ "$sum" != $((2 * sent)) ] || sent=$sum
    [ "$sum" = "$sent" ] || fail "not all that was sent was counted"

    [ "$live" != live ] || restored_right live "${instants[0]}"
    restored_right stopped "${instants[-1]}"
done
umount /run/images
