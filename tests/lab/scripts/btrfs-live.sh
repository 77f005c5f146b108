# Busy filesystems of btrfs are imaged while they are mounted, restored and judged.
#   CASE...: `one` is on one device, compressed, with its metadata twice; `two` is on two, with its
#   metadata on both and its data in stripes; `-crash` behind it: without a freeze
# The sources are /dev/vdb and /dev/vdc, restored is to /dev/vdd and /dev/vde; images are on /dev/vdf.
. ./common.sh
modprobe btrfs
mkdir -p /run/volume /run/images /run/copy
mkfs.ext4 -q -F /dev/vdf
mount /dev/vdf /run/images
image=/run/images/image.still report=/dev/shm/report.json

# field NAME FILE: a number of the report.
field() { tail -n 1 "$2" | sed -n "s/.*\"$1\":\([0-9.]*\).*/\1/p"; }
# checked DEVICE: `btrfs check` reads everything and finds nothing.
checked() {
    btrfs check --readonly --check-data-csum "$1" >/dev/shm/fsck 2>&1 &&
        grep -q 'no error found' /dev/shm/fsck || { cat /dev/shm/fsck; fail "check of $1"; }
}
# ours_gone DIR: no subvolume of ours is there, and none that is deleted.
ours_gone() {
    btrfs subvolume sync "$1" >/dev/null
    [ -z "$(btrfs subvolume list -d "$1")" ] || fail "deleted, but still there"
    btrfs subvolume list -a "$1" | grep '\.holdstill' && fail "a subvolume of ours is left"
    ls -A "$1" "$1/home" "$1/var" | grep '^\.holdstill' && fail "a name of ours is left"
    return 0
}
# blank DEVICE...: no filesystem there any more that could be taken for its twin.
blank() {
    local device
    for device in "$@"; do
        btrfs device scan --forget "$device" 2>/dev/null || true
        blkdiscard -f "$device" 2>/dev/null
    done
}
# ledger NAME DIR...: live-writer in folders.
ledger() {
    local name=$1
    shift
    mkfifo "/dev/shm/$name.announced"
    live-writer run "$@" --journal "/dev/shm/$name" --light --budget 8 --pair 2 >"/dev/shm/$name.announced" &
    writers+=($!)
    read -r line <"/dev/shm/$name.announced"
    [ "$line" = running ]
}
# changes DIR: shares, overwrites, deletes and makes durable, until it is told to stop.
changes() {
    local number=0
    mkdir -p "$1/changes" "$1/var/changes"
    while [ ! -e /dev/shm/enough ]; do
        number=$((number + 1))
        head -c $((number * 7919 % 60000 + 1)) /dev/urandom >"$1/changes/$((number % 20))"
        cp --reflink=always "$1/home/large" "$1/var/changes/$((number % 5))"
        printf changed | dd of="$1/var/changes/$((number % 5))" bs=4096 seek=$((number % 200)) \
            conv=notrunc status=none
        rm -f "$1/changes/$((number * 3 % 20))"
        fallocate -l 400K "$1/changes/room-$((number % 3))"
        # Without a freeze, a window has to fit between two commits.
        [ $((number % 4)) != 0 ] || [ $grade = crash ] || sync -f "$1/changes"
        sleep 0.1
    done
}
# sums DIR: of what nobody changes.
sums() { (cd "$1" && find snapshot static -type f -print0 | sort -z | xargs -0 sha256sum); }

number=0
for case in "$@"; do
    number=$((number + 1))
    options=(-m dup -d single) sources=(/dev/vdb) targets=(/dev/vdd) more=()
    case $case in
        one*) ;;
        two*) options=(-m raid1 -d raid0) sources+=(/dev/vdc) targets+=(/dev/vde) ;;
        *) fail "which case is $case?" ;;
    esac
    grade=frozen
    case $case in
        *-crash) grade=crash more=(--no-freeze) ;;
    esac
    mkfs.btrfs -q -f "${options[@]}" "${sources[@]}" >/dev/null
    btrfs device scan >/dev/null
    mount -o compress=zstd:1 /dev/vdb /run/volume
    for one in home home/nested var static; do
        btrfs subvolume create "/run/volume/$one" >/dev/null
    done
    cp -r /usr/share/bash-completion /usr/sbin /run/volume/static/
    head -c 2M /dev/urandom >/run/volume/home/large
    cp /usr/bin/[a-d]* /run/volume/home/
    btrfs subvolume snapshot -r /run/volume/home /run/volume/snapshot >/dev/null
    mkdir /run/volume/home/nested/inplace
    chattr +C /run/volume/home/nested/inplace
    sync -f /run/volume
    sums /run/volume >/dev/shm/sums

    rm -f /dev/shm/enough
    ledger "across-$number" /run/volume/home/ledger /run/volume/var/ledger
    # Without a freeze, what is overwritten in place may be newer than the commit: it is refused.
    [ $grade = crash ] || ledger "inplace-$number" /run/volume/home/nested/inplace
    changes /run/volume &
    changer=$!
    status=0 begin=$(date +%s%N)
    backup "$report" /run/volume -o "$image" --freeze btrfs "${more[@]}" || status=$?
    end=$(date +%s%N)
    touch /dev/shm/enough
    wait $changer
    calm
    nothing_left
    [ "$status" = 0 ] || fail "status $status"
    ours_gone /run/volume
    sums /run/volume | diff /dev/shm/sums - || fail "the source is not as it was"
    umount /run/volume
    # Without a freeze there are none.
    freezes "$report" || true
    generation=$(field generation "$report")
    echo "freeze: $case: window_ms $(field window_ms "$report"), freeze_ms $(field freeze_ms "$report")"
    for word in '"freeze":"btrfs"' "\"grade\":\"$grade\""; do
        tail -n 1 "$report" | grep -q "$word" || fail "no $word in $(tail -n 1 "$report")"
    done

    blank "${sources[@]}"
    maps=()
    for n in "${!sources[@]}"; do
        volume=$(tail -n 1 "$report" | grep -o "\"n\":[0-9]*,\"path\":\"${sources[n]}\"" | tr -dc '0-9,' | cut -d , -f 1)
        [ -n "$volume" ] || fail "no ${sources[n]} in $(tail -n 1 "$report")"
        maps+=(--map "$volume=${targets[n]}")
    done
    timeout "$limit" holdstill restore "$image" "${maps[@]}" --yes --quiet
    rm "$image"
    btrfs device scan >/dev/null
    checked /dev/vdd
    for target in "${targets[@]}"; do
        btrfs inspect-internal dump-super "$target" >/dev/shm/super
        grep -q "^generation[[:space:]]*$generation\$" /dev/shm/super || { cat /dev/shm/super; fail "not $generation"; }
    done
    mount /dev/vdd /run/copy
    btrfs scrub start -B /run/copy >/dev/shm/scrub
    grep -q 'no errors found' /dev/shm/scrub || { cat /dev/shm/scrub; fail "scrub"; }
    sums /run/copy | diff /dev/shm/sums - || fail "what nobody changed is not as it was"
    if [ $grade = frozen ]; then
        at=$(instant "$report")
        window=(--frozen-begin "$at" --frozen-end "$at" --exact)
        live-writer check /run/copy/home/nested/inplace --journal "/dev/shm/inplace-$number" --realtime "${window[@]}"
    else
        window=(--frozen-begin "$begin" --frozen-end "$end" --crash)
    fi
    live-writer check /run/copy/home/ledger /run/copy/var/ledger --journal "/dev/shm/across-$number" \
        --realtime "${window[@]}"
    ours_gone /run/copy
    for one in . home home/nested var; do
        echo new >"/run/copy/$one/new"
    done
    sync -f /run/copy
    umount /run/copy
    checked /dev/vdd
    blank "${targets[@]}"
done
umount /run/images
