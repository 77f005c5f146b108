# A busy btrfs on a logical volume is imaged by a snapshot: its used blocks alone. It is not let back
# beside itself.
. ./lvm-common.sh
modprobe btrfs
images /dev/vdc
journal=/dev/shm/journal

volume thick
mkfs.btrfs -q /dev/lab/volume >/dev/null
mount /dev/lab/volume /run/volume
picture >/run/before
busy /run/volume/files "$journal"
backup "$report" lab/volume -o "$image" || fail "no image"
unchanged
calm
nothing_left
freezes "$report"
for field in '"freeze":"lvm"' '"grade":"frozen"' '"warnings":\[\]'; do
    tail -n 1 "$report" | grep -q "$field" || fail "no $field in $(tail -n 1 "$report")"
done
used=$(tail -n 1 "$report" | sed -n 's/.*"event":"result".*"used_bytes":\([0-9]*\).*/\1/p')
[ "$used" -lt $((200 << 20)) ] || fail "$used bytes are used"

timeout "$limit" holdstill verify "$image" --quiet
ends 3 'must not be there twice' holdstill restore "$image" /dev/vdd --yes
umount /run/volume
ends 3 'must not be there twice' holdstill restore "$image" /dev/vdd --yes
no_volume
timeout "$limit" holdstill restore "$image" /dev/vdd --yes --quiet
btrfs check --readonly --check-data-csum /dev/vdd >/dev/shm/fsck 2>&1 || { cat /dev/shm/fsck; fail "fsck"; }
mount /dev/vdd /run/copy
right /run/copy/files "$journal" "$(instant "$report")"
umount /run/copy /run/images
