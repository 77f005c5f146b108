# XFS that is overwritten in place all the while: each step images it as frozen, by its used blocks, and
# all of those but the log and the superblock are what they are after the log was replayed. Then a disk
# that loses what a freeze writes: its log goes on, and is refused.
#   ROUNDS VERSION...: a VERSION is v4 or v5
. ./lvm-common.sh
images /dev/vdc
rounds=$1
shift

# overwriting: changes files in place until there is /dev/shm/stop.
overwriting() {
    local number=0
    while [ ! -e /dev/shm/stop ]; do
        number=$((number + 1))
        dd if=/dev/urandom of=/run/volume/file bs=4k count=1 seek=$((number % 256)) \
            conv=notrunc,fdatasync status=none
        sqlite3 /run/volume/database "INSERT OR REPLACE INTO t VALUES ($((number % 10)), $number)"
    done
}

# field NAME: of the superblock that was restored.
field() { xfs_db -r -c 'sb 0' -c "print $1" /dev/vdd | sed 's/.* = //'; }

# as_replayed: what was restored is the same after its log was replayed.
as_replayed() {
    local start shift end
    dd if=/dev/vdd of=/dev/vde bs=1M iflag=direct oflag=direct status=none
    mount -o nouuid /dev/vde /run/copy
    umount /run/copy
    sound xfs /dev/vde
    start=$(field logstart) shift=$(field agblklog)
    start=$((((start >> shift) * $(field agblocks) + (start & ((1 << shift) - 1))) * $(field blocksize)))
    end=$((start + $(field logblocks) * $(field blocksize)))
    cmp -i 512 -n $((start - 512)) /dev/vdd /dev/vde || fail "blocks before the log differ"
    cmp -i "$end" /dev/vdd /dev/vde || fail "blocks after the log differ"
    mount -o nouuid /dev/vde /run/copy
    [ "$(sqlite3 /run/copy/database 'PRAGMA integrity_check')" = ok ] || fail "the database is damaged"
    umount /run/copy
}

good=0
for version in "$@"; do
    options=()
    [ "$version" != v4 ] || options=(-m crc=0)
    volume thick
    wipefs -q -a /dev/lab/volume
    mkfs.xfs -q "${options[@]}" /dev/lab/volume
    mount /dev/lab/volume /run/volume
    head -c 8M /dev/urandom >/run/volume/file
    sqlite3 /run/volume/database 'PRAGMA journal_mode=WAL; CREATE TABLE t (id INTEGER PRIMARY KEY, value)' \
        >/dev/null
    # The log is covered; then it is overwritten only.
    fsfreeze --freeze /run/volume
    fsfreeze --unfreeze /run/volume
    picture >/run/before
    for round in $(seq "$rounds"); do
        for step in track lvm hold; do
            rm -f /dev/shm/stop
            overwriting &
            writer=$! status=0
            backup "$report" /run/volume -o "$image" --freeze $step \
                --pre-freeze 'touch /run/volume/file' || status=$?
            touch /dev/shm/stop
            wait $writer
            unchanged
            nothing_left
            [ "$status" = 0 ] || fail "$version $step: status $status"
            freezes "$report"
            for wanted in '"grade":"frozen"' '"warnings":\[\]'; do
                tail -n 1 "$report" | grep -q "$wanted" ||
                    fail "$version $step: no $wanted in $(tail -n 1 "$report")"
            done
            used=$(tail -n 1 "$report" | sed 's/.*"used_bytes":\([0-9]*\).*/\1/')
            [ "$used" -lt $((160 << 20)) ] || fail "$version $step: $used bytes copied"
            dd if=/dev/zero of=/dev/vdd bs=1M oflag=direct status=none 2>/dev/null || true
            timeout "$limit" holdstill restore "$image" /dev/vdd --yes --quiet
            rm "$image"
            as_replayed
            good=$((good + 1))
        done
    done
    umount /run/volume
    no_volume
done
echo "compared: $good images of XFS that was overwritten in place"

modprobe dm-flakey
sectors=$((320 << 11))
for type in xfs ext4; do
    wipefs -q -a /dev/vde
    dmsetup create lossy --table "0 $sectors linear /dev/vde 0"
    udevadm settle
    mkfs.$type -q /dev/mapper/lossy
    mount /dev/mapper/lossy /run/volume
    fsfreeze --freeze /run/volume
    fsfreeze --unfreeze /run/volume
    touch /run/volume/file
    # To the log, and not to its place.
    xfs_io -c fsync /run/volume/file
    dmsetup suspend --nolockfs lossy
    dmsetup load lossy --table "0 $sectors flakey /dev/vde 0 0 3600 1 drop_writes"
    dmsetup resume lossy
    ends 3 "though frozen, its log holds changes" holdstill backup /run/volume -o "$image" --freeze hold
    [ ! -e "$image" ] || fail "an image in spite of the refusal"
    nothing_left
    umount /run/volume
    dmsetup remove --retry lossy
done
umount /run/images
