# Stacks of devices that cannot be tracked are refused by name (status 3), and one that changes in
# mid-copy is discarded; nothing is left, nothing frozen.
. ./stack-common.sh
images /dev/vdd
modprobe -a dm-writecache brd raid456

# refused WORDS DEVICE [SIZE]: with a filesystem on it, mounted.
refused() {
    echo "refused: $1"
    mkfs.ext4 -q -F -E nodiscard "$2" "${3:-24M}"
    mount "$2" /run/volume
    ends 3 "$1" holdstill backup /run/volume -o $image --freeze track
    [ ! -e $image ] || fail "an image in spite of the refusal"
    touch /run/volume/still-writable
    umount /run/volume
}
small=$((40 << 11))
parts() {
    printf 'label: gpt\n%s\n' "$(printf 'size=40MiB\n%.0s' 1 2 3 4 5 6)" | sfdisk -q -w always "$1"
    udevadm settle
}
parts /dev/vdb

dmsetup create origin --table "0 $small linear /dev/vdb1 0"
dmsetup create cached --table "0 $small writecache s /dev/mapper/origin /dev/vdb2 4096 0"
refused "writecache" /dev/mapper/cached
dmsetup remove --retry cached
dmsetup remove --retry origin

dmsetup create memory --table "0 16384 linear /dev/ram0 0"
dmsetup create two --table "0 $small linear /dev/vdb1 0
$small 16384 linear /dev/mapper/memory 0"
refused "ram0" /dev/mapper/two
dmsetup remove --retry two
dmsetup remove --retry memory

cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
    --integrity hmac-sha256 --integrity-no-wipe --cipher aes-xts-plain64 /dev/vdb1 /dev/shm/key
cryptsetup open --key-file /dev/shm/key /dev/vdb1 secret
dd if=/dev/zero of=/dev/mapper/secret bs=1M count=8 oflag=direct status=none
refused "integrity" /dev/mapper/secret 8M
cryptsetup close secret
wipefs -q -a /dev/vdb1

array() { mdadm --create /dev/md0 --quiet --run --metadata=1.2 --assume-clean "$@"; udevadm settle; }
no_array() {
    mdadm --stop --quiet /dev/md0
    for disk in 1 2 3; do mdadm --zero-superblock --quiet /dev/vdb$disk || true; done
    udevadm settle
}
array --level=1 --raid-devices=2 --bitmap=internal /dev/vdb1 --write-mostly /dev/vdb2
refused "write_mostly" /dev/md0
no_array
array --level=5 --raid-devices=3 /dev/vdb1 /dev/vdb2 /dev/vdb3
refused "raid5" /dev/md0
no_array
array --level=1 --raid-devices=2 /dev/vdb1 /dev/vdb2
mdadm --fail --quiet /dev/md0 /dev/vdb2
refused "degraded" /dev/md0
no_array

vgcreate -q -q lab /dev/vdb4 /dev/vdb5 /dev/vdb6 >/dev/null
lvcreate -q -y -Wn -Zn -L 28M -T lab/pool >/dev/null 2>&1
lvcreate -q -y -V 26M -T lab/pool -n thin >/dev/null 2>&1
refused "\`thin\`" /dev/lab/thin
lvremove -q -q -f lab >/dev/null

echo "its layout changes in mid-copy"
lvcreate -q -y -Wn -Zn -L 60M -n volume lab >/dev/null
mkfs.ext4 -q -F /dev/lab/volume
mount /dev/lab/volume /run/volume
head -c 40M /dev/urandom >/run/volume/content
sync
(
    sleep 3
    lvextend -q -q -L +8M lab/volume
) >/dev/shm/extended 2>&1 &
ends 3 "layout changed" holdstill backup /run/volume -o $image --freeze track --rate 8M
wait
[ "$(dmsetup table lab-volume | wc -l)" = 2 ] || fail "it was not extended: $(cat /dev/shm/extended)"
[ ! -e $image ] || fail "an image in spite of that"
touch /run/volume/still-writable

echo "somebody writes to a layer below"
exec 9<>/dev/vdb4
ends 3 "vdb4.*open for writing" holdstill backup /run/volume -o $image --freeze track
exec 9>&-

echo "without room for a snapshot it is what auto takes"
lvcreate -q -y -Wn -Zn -l 100%FREE -n filler lab >/dev/null
ends 0 "" holdstill inspect /run/volume
cat /dev/shm/said
holdstill backup /run/volume -o $image --json >$report
tail -n 1 $report | grep -q '"freeze":"track"' || fail "$(tail -n 1 $report)"
holdstill restore $image /run/images/copy --quiet
mkdir -p /run/copy
mount -o loop /run/images/copy /run/copy
cmp /run/volume/content /run/copy/content
umount /run/copy /run/volume
nothing_left
