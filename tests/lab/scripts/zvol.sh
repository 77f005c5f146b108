# Busy zvols are imaged by a snapshot, restored and judged; how runs over them end.
#   KILLS FILESYSTEM:SOURCE...: SOURCE is how the volume is named, @ being a slash.
. ./snapshot-common.sh
. ./zfs.sh
kills=$1
shift
images /dev/vdc
zpool create -f -O mountpoint=none tank /dev/vdb

# All datasets and snapshots, and the property.
picture() {
    zfs list -H -o name,type,userrefs -t all
    zfs get -H -o name,value,source snapdev
}
# So that the hook finds what it needs: a copy of what the snapshot shows, by a device of its own.
cat >/dev/shm/oracle <<'HOOK'
snapshot=$(zfs list -H -o name -t snapshot | grep @holdstill)
zfs clone -o snapdev=hidden "$snapshot" tank/oracle
udevadm settle
dd if=/dev/zvol/tank/oracle of=/run/images/oracle bs=1M iflag=direct conv=sparse status=none
zfs destroy tank/oracle
HOOK

for case in "$@"; do
    IFS=: read -r type source <<<"$case"
    zfs create -V 320M tank/volume
    udevadm settle
    mkfs."$type" -q /dev/zvol/tank/volume
    mount /dev/zvol/tank/volume /run/volume
    # Set on the volume itself, it has to be set back; else it is inherited again.
    [ "$type" = ext4 ] || zfs set snapdev=hidden tank/volume
    picture >/run/before
    busy_backup "$type" zfs "${source//@//}"
    zfs destroy -r tank/volume
done

zfs create -V 200M tank/volume
udevadm settle
mkfs.ext4 -q /dev/zvol/tank/volume
mount /dev/zvol/tank/volume /run/volume
head -c 100M /dev/urandom >/run/volume/content
sync
picture >/run/before

echo "killed at any moment"
for round in $(seq "$kills"); do
    holdstill backup tank/volume -o $image --freeze zfs --rate 30M --quiet &
    run=$!
    sleep "$((RANDOM % 9)).$((RANDOM % 10))"
    kill -KILL $run 2>/dev/null || true
    wait $run 2>/dev/null || true
    guard_done
    touch /run/volume/still-writable
    unchanged
    rm -f $image
    holdstill cleanup >/dev/shm/cleanup
    nothing_left
    echo "round $round"
done

echo "killed with its guard"
holdstill backup tank/volume -o $image --freeze zfs --rate 4M --quiet &
run=$!
for _ in $(seq 300); do
    zfs list -H -o userrefs -t snapshot | grep -q 1 && break
    sleep 0.1
done
sleep 2
kill -KILL $(pgrep holdstill-guard)
kill -KILL $run
wait $run 2>/dev/null || true
# Not ours, whatever they look like.
zfs snapshot tank/volume@holdstill.0123
zfs snapshot -o holdstill:run=0123 tank/volume@other
[ "$(zfs list -H -o name -t snapshot | wc -l)" = 3 ] || fail "who has removed it?"
holdstill cleanup
[ "$(zfs list -H -o name -t snapshot | xargs)" = "tank/volume@holdstill.0123 tank/volume@other" ] ||
    fail "not what was to be left: $(zfs list -t all)"
zfs destroy tank/volume@holdstill.0123
zfs destroy tank/volume@other
unchanged
nothing_left

echo "output on the volume itself, output without room, a hook that fails"
ends 3 "output lies on the source" holdstill backup tank/volume -o /run/volume/image.still
head -c 560M /dev/zero >/run/images/filler
ends 1 "space" holdstill backup tank/volume -o $image --freeze zfs --compress none
rm /run/images/filler
ends 1 "nothing is frozen" holdstill backup tank/volume -o $image --freeze zfs --pre-freeze "exit 3"
[ ! -e $image ] || fail "an image in spite of that"
unchanged
nothing_left

echo "a volume whose user nobody can make pause: all blocks, as after a power cut"
umount /run/volume
exec 9<>/dev/zvol/tank/volume
ends 0 "crash" holdstill backup zfs:tank/volume -o $image
holdstill restore $image /run/images/volume --quiet
cmp /dev/zvol/tank/volume /run/images/volume
exec 9>&-
rm $image /run/images/volume
ends 0 "offline" holdstill inspect tank/volume

echo "names that are none"
zfs create tank/files
ends 3 "stream" holdstill clone tank/files /run/images/copy
ends 3 "zfs" holdstill backup tank/files -o $image --freeze track
ends 1 "no such volume" holdstill inspect zfs:tank/nothing
ends 1 "tank/nothing" holdstill inspect tank/nothing
umount /run/images
zpool export tank
