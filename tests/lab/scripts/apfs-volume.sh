# Containers of APFS, filled by a driver that is not ours, are imaged, restored over rubbish, and judged by
# that driver and by apfsck.
#   CASE:SOURCE:TARGET...: `plain` has no snapshot, and does not take up its disk; of `snapshot`, the
#   newest change is one; `later` has two, files after them, and many checkpoints. Targets are full of 0xA5.
# Images are on /dev/vdb.
#
# What this driver cannot do is not asked of it: in small containers more than a few transactions; changing
# what a snapshot holds; mappings that are written to, clones, holes made later, several volumes.
. ./snapshot-common.sh
. ./apfs.sh
images /dev/vdb

# snapshot NAME: of the volume at /run/volume, by APFS_IOC_TAKE_SNAPSHOT.
snapshot() {
    perl -e 'open my $dir, "<", "/run/volume" or die $!;
        ioctl $dir, 0x41004085, pack("a256", $ARGV[0]) or die $!' "$1"
}
# attribute FILE: an extended attribute; the driver knows no others. 188 is setxattr(2),
# and 191 getxattr(2).
attribute() {
    perl -e 'syscall(188, @ARGV, 5, 0) == 0 or die $!' "$1" osx.note noted
}
# random SIZE FILE
random() { head -c "$1" /dev/urandom >"$2"; }

# fill DIR: files of many sizes, also sparse and past 64 MiB, links, and names that are gone again.
fill() {
    local n
    mkdir -p "$1/sizes" "$1/gone" "$1/deep/er/still" "$1/ünïcode näme"
    for n in 0 1 4095 4096 4097 65536 1000003; do
        random $n "$1/sizes/$n"
    done
    for n in $(seq 80); do
        random $((n * 37)) "$1/gone/$n"
    done
    random 66M "$1/large"
    truncate -s 48M "$1/sparse"
    for n in 0 5000001 33554432 50331640; do
        echo "at $n" | dd of="$1/sparse" bs=1 seek=$n conv=notrunc status=none
    done
    head -c 3M /dev/zero >"$1/zeros"
    cp -r /usr/share/bash-completion "$1/deep/er/still/"
    ln "$1/sizes/4097" "$1/deep/hard"
    ln -s ../sizes/4097 "$1/deep/soft"
    ln -s "$(printf '%0200d' 0)" "$1/deep/dangling"
    mkfifo "$1/deep/fifo"
    attribute "$1/sizes/4096"
    chmod 640 "$1/sizes/1"
    touch -d '2001-02-03 04:05:06.789' "$1/sizes/1"
    truncate -s 2000 "$1/sizes/65536"
    printf changed | dd of="$1/large" bs=1 seek=40000000 conv=notrunc status=none
    mv "$1/sizes/1000003" "$1/ünïcode näme/"
    for n in $(seq 2 80); do
        rm "$1/gone/$n"
    done
}
# more DIR: new files and names, nothing that a snapshot holds; many checkpoints.
more() {
    local n
    mkdir "$1/more"
    mv "$1/sizes/4095" "$1/more/moved"
    chmod 600 "$1/sizes/1"
    for n in $(seq 150); do
        random $((n * 211)) "$1/more/$n"
        sync -f "$1"
    done
}

# listed DEVICE: everything in its volume and in each snapshot, with a digest of all content.
listed() {
    local name
    for name in "" "${names[@]}"; do
        echo "snapshot '$name'"
        mount -t apfs -o "ro${name:+,snap=$name}" "$1" /run/copy
        (
            cd /run/copy
            find . -printf '%P %i %y %m %s %n %T@ %l\n' | sort
            find . -type f -print0 | sort -z | xargs -0 sha256sum
            perl -e 'my $value = " " x 9; my $len = syscall(191, @ARGV, $value, 9);
                print "attribute $len $value\n"' sizes/4096 osx.note
        )
        # Of a snapshot the driver cannot tell.
        [ -n "$name" ] || stat -f -c 'blocks: %b of %S, free %f; files: %c, free %d' /run/copy
        umount /run/copy
    done
}
# checked DEVICE: what apfsck says.
checked() {
    local status=0
    apfsck -cuw "$1" 2>&1 || status=$?
    echo "apfsck: $status"
}

for case in "$@"; do
    IFS=: read -r kind source target <<<"$case"
    [[ $kind =~ ^(plain|snapshot|later)$ ]] || fail "which case is $kind?"
    names=() blocks=''
    # The last blocks are no container's.
    [ $kind != plain ] || blocks=$(($(blockdev --getsize64 "$source") / 4096 - 1000))
    # shellcheck disable=SC2086 # a number or none
    mkapfs -L "$kind" "$source" $blocks
    mount -t apfs -o readwrite "$source" /run/volume
    fill /run/volume
    if [ $kind != plain ]; then
        names=(first)
        snapshot first
    fi
    if [ $kind = later ]; then
        random 2M /run/volume/between
        names+=("second of two")
        snapshot "second of two"
        more /run/volume
    fi
    ends 3 "offline: mounted.*track: a mounted apfs" holdstill backup "$source" -o "$image"
    umount /run/volume
    checked "$source" >/dev/shm/fsck-source
    # After changes behind a snapshot it miscounts; else it has nothing to say.
    [ $kind = later ] || [ "$(cat /dev/shm/fsck-source)" = "apfsck: 0" ] ||
        { cat /dev/shm/fsck-source; fail "the driver has made no sound container"; }
    listed "$source" >"$kind.source"
    [ "$(grep -c '  ./large$' "$kind.source")" = $((1 + ${#names[@]})) ] || fail "not all was listed"

    backup "$report" "$source" -o "$image" --freeze offline
    tail -n 1 "$report" | grep -q '"grade":"clean"' || fail "not clean: $(tail -n 1 "$report")"
    used=$(tail -n 1 "$report" | sed -n 's/.*"used_bytes":\([0-9]*\).*/\1/p')
    size=$(blockdev --getsize64 "$source")
    [ "$used" -lt $((size / 2)) ] || fail "nearly all blocks are used: $used"
    holdstill inspect "$source" --json >"$report"
    for name in "$kind" "${names[@]}"; do
        tail -n 1 "$report" | grep -qF "\"name\":\"$name\"" || fail "no '$name' in $(tail -n 1 "$report")"
    done

    timeout "$limit" holdstill verify "$image" --against "$source" --quiet
    [ "$(od -An -tx8 -N 8 -j 1M "$target")" = " a5a5a5a5a5a5a5a5" ] || fail "$target was not prepared"
    timeout "$limit" holdstill restore "$image" "$target" --yes --quiet
    timeout "$limit" holdstill verify "$image" --quiet
    echo "compared: $kind: size $size, used $used," \
        "image $(stat -c %s "$image"), $(tail -n 1 /dev/shm/fsck-source)"
    rm "$image"

    checked "$target" | diff /dev/shm/fsck-source - || fail "apfsck finds more than in the source"
    listed "$target" >"$kind.target"
    diff "$kind.source" "$kind.target" || fail "the copy is not the source"
done
umount /run/images
