# Runs on the copy that track-root.sh made, as the root; the same copy, never mounted, is /dev/vdb.
# Both are what the root was at the instant.
. ./common.sh
right /var/live journal "$(cat instant)"
echo more >/var/live/more
sync

type=$(findmnt --noheadings --output FSTYPE /)
mkdir -p /run/copy
[ "$type" = xfs ] || sound "$type" /dev/vdb
options=rw
[ "$type" = ext4 ] || options=nouuid
mount -o $options /dev/vdb /run/copy
right /run/copy/var/live journal "$(cat instant)"
if [ -e /swap ]; then
    # The header was kept, and nothing else.
    size=$(($(stat -c %s /run/copy/swap) - 4096))
    cmp -i 4096:0 -n $size /run/copy/swap /dev/zero
    swapon /swap
    swapoff /swap
    echo "swapped: the copy's swap file works"
fi
umount /run/copy
sound "$type" /dev/vdb
