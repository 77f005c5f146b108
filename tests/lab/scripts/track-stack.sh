# Busy volumes on stacks of devices are imaged by `track`, restored and judged.
#   KIND:FILESYSTEM...: KIND is one that stack-common.sh can build.
# Each is imaged twice. The first time writers go on through both freezes; their own check says whether
# the copy is exact. The second time they are stopped just before the last freeze, so that the device can
# be copied soon after it, frozen once more: all that differs then is what the freezes write themselves.
. ./stack-common.sh
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
fsfreeze --freeze /run/volume
dd if="$(cat /dev/shm/top)" of=/run/images/oracle bs=1M iflag=direct conv=sparse status=none
fsfreeze --unfreeze /run/volume
for pid in $(cat /dev/shm/writers); do kill -CONT "$pid"; done
HOOK

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
    echo "$top" >/dev/shm/top
    options=()
    # Nothing is to be written by the kernel alone.
    [ "$type" = xfs ] || options=(-E lazy_itable_init=0,lazy_journal_init=0)
    wipefs -q -a "$top"
    mkfs."$type" -q "${options[@]}" "$top"
    mount "$top" /run/volume
    picture >/run/before
    number=$(stat -c '%Hr:%Lr' "$(readlink -f "$top")")
    counted() { awk '{ print $7 + $14 }' "/sys/dev/block/$number/stat"; }

    journal=/dev/shm/journal-$kind
    begin=$(counted)
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
    at=$(instant "$report")
    mv "$image" /run/images/live.still
    echo "second"
    imaged --pre-freeze "bash /dev/shm/stop" --post-freeze "bash /dev/shm/copy"
    echo "conserved: $case: $(($(counted) - begin)) sectors counted"
    calm
    [ -z "$neighbour" ] || { kill $neighbour; wait $neighbour || true; }
    umount /run/volume
    nothing_left
    no_stack

    # Onto a copy of what the device was: hardly anything may change.
    cp --sparse=always /run/images/oracle /run/images/copy
    timeout "$limit" holdstill restore "$image" /run/images/copy --yes --quiet
    differing=$({ cmp -l /run/images/oracle /run/images/copy || true; } |
        awk '{ print int(($1 - 1) / 4096) }' | uniq | xargs)
    rm "$image" /run/images/oracle /run/images/copy
    echo "differing: ${differing:-none}"
    [ "$(wc -w <<<"$differing")" -le 8 ] || fail "the copy differs from the device"

    wipefs -q -a /dev/vdd
    timeout "$limit" holdstill restore /run/images/live.still /dev/vdd --yes --quiet
    rm /run/images/live.still
    [ "$type" = xfs ] || sound "$type" /dev/vdd
    options=rw
    [ "$type" = ext4 ] || options=nouuid
    mount -o $options /dev/vdd /run/copy
    right /run/copy/files "$journal" "$at"
    umount /run/copy
    sound "$type" /dev/vdd
done
umount /run/images
