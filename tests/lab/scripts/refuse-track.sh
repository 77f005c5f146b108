# What cannot be tracked is refused by name (status 3), leaves no image, and nothing frozen.
. ./common.sh
mkdir -p /run/source /run/images /run/copy
mkfs.ext4 -q -F /dev/vdc
mount /dev/vdc /run/images
image=/run/images/image.still
# refused WORDS MOUNT-POINT
refused() {
    ends 3 "$1" holdstill backup "$2" -o $image --freeze track
    [ ! -e $image ] || fail "an image in spite of the refusal"
    touch "$2/still-writable"
    rm "$2/still-writable"
}

echo "on device-mapper hold works"
sfdisk -q /dev/vdb <<'PARTITIONS'
label: gpt
size=64MiB
size=64MiB
size=64MiB
PARTITIONS
udevadm settle
export LVM_SUPPRESS_FD_WARNINGS=1
vgcreate -q lab /dev/vdb1 >/dev/null
lvcreate -q -l 100%FREE -n volume -Zn -Wn lab >/dev/null 2>&1
mkfs.ext4 -q -F /dev/lab/volume
mount /dev/lab/volume /run/source
head -c 8M /dev/urandom >/run/source/content
sync
holdstill backup /run/source -o $image --freeze hold --json >/dev/shm/hold.json
freezes /dev/shm/hold.json
holdstill restore $image /dev/vdb3 --yes --quiet
sound ext4 /dev/vdb3
mount /dev/vdb3 /run/copy
cmp /run/source/content /run/copy/content
umount /run/copy /run/source
rm $image

echo "swap space on the source: a file is refused for hold, through a loop device for track too"
mkfs.ext4 -q -F /dev/vdb2
mount /dev/vdb2 /run/source
head -c 8M /dev/zero >/run/source/swap
chmod 600 /run/source/swap
mkswap -q /run/source/swap
swapon /run/source/swap
ends 3 "swap" holdstill backup /run/source -o $image --freeze hold
ends 0 "" holdstill backup /run/source -o $image --freeze track
rm $image
swapoff /run/source/swap
modprobe loop
loop=$(losetup --find --show /run/source/swap)
mkswap -q "$loop"
swapon "$loop"
refused "swap" /run/source
swapoff "$loop"
losetup --detach "$loop"

echo "tracefs mounted by nobody, and hidden: it is mounted privately"
ends 0 "" holdstill backup /run/source -o $image --freeze track
rm $image
ends 0 "" unshare --mount sh -c "mount -t tmpfs none /sys/kernel/tracing &&
    exec holdstill backup /run/source -o $image --freeze track"
rm $image
umount /run/source

echo "a mounted FAT"
mkfs.vfat /dev/vdb3 >/dev/null
mount /dev/vdb3 /run/source
refused "vfat" /run/source
ends 3 "vfat" holdstill backup /run/source -o $image
[ ! -e $image ]

echo "an image on FAT: a part file, removed when the run is killed"
# A source that is not in use.
head -c 8M /dev/urandom >/run/images/disk
holdstill backup /run/images/disk -o /run/source/slow.still --rate 1M --quiet &
run=$!
for _ in $(seq 300); do
    ls -A /run/source | grep -q part && break
    sleep 0.1
done
ls -A /run/source | grep part || fail "no part file"
[ ! -e /run/source/slow.still ] || fail "the image has its name before it is whole"
kill -KILL $run
wait $run || true
# By its guard, or else by cleanup.
for _ in $(seq 50); do
    ls -A /run/source | grep -q part || break
    sleep 0.1
done
ls -A /run/source | grep part || echo "the guard removed it"
holdstill cleanup >/dev/null
[ -z "$(ls -A /run/source)" ] || fail "left: $(ls -A /run/source)"
holdstill backup /run/images/disk -o /run/source/whole.still --quiet
holdstill verify /run/source/whole.still --quiet
rm /run/source/whole.still

echo "a FAT that runs full"
head -c 58M /dev/zero >/run/source/filler
ends 1 "space" holdstill backup /run/images/disk -o /run/source/image.still
[ "$(ls -A /run/source)" = filler ] || fail "left: $(ls -A /run/source)"
umount /run/source

echo "a kernel locked down"
mount /dev/vdb2 /run/source
mount -t securityfs securityfs /sys/kernel/security
echo confidentiality >/sys/kernel/security/lockdown
refused "trac|lockdown" /run/source
cat /dev/shm/said
nothing_left
