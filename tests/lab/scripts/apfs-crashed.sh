# Judges copies of crashed containers by the driver that wrote them, and by what its user knows.
#   NUMBER of pairs: of /dev/vdb, the second is a copy, written by live-writer with $SHARE/journal-1; and so on
set -euo pipefail
. ./apfs.sh
cp live-writer /dev/shm/
mkdir -p /run/volume
disks=(/dev/vd[b-z])

# listed DEVICE: all that is in its volume, with a digest of all content.
listed() {
    mount -t apfs -o ro "$1" /run/volume
    (
        cd /run/volume
        find . -printf '%P %i %y %m %s %n %T@ %l\n' | sort
        find . -type f -print0 | sort -z | xargs -0 sha256sum
    )
    umount /run/volume
}

for n in $(seq "$1"); do
    crash=${disks[2 * n - 2]} copy=${disks[2 * n - 1]}
    listed "$crash" >/dev/shm/crash
    listed "$copy" >/dev/shm/copy
    diff /dev/shm/crash /dev/shm/copy || { echo "WRONG: $n: the copy is not what crashed"; exit 1; }
    mount -t apfs -o ro "$copy" /run/volume
    # All that was durable at any time that the journal knows of.
    /dev/shm/live-writer check /run/volume/files --journal "$SHARE/journal-$n" --crash \
        --frozen-begin 18446744073709551615
    umount /run/volume
done
