# What the scripts share about --freeze dm: `. ./dm-common.sh` first. One mapping, /dev/mapper/volume,
# on /dev/vdb.
. ./snapshot-common.sh
volume=/dev/mapper/volume
size=320M
sectors=$((320 << 11))
head -c 32 /dev/urandom >/dev/shm/key
# With next to no hashing of a key that is random anyway.
luks() {
    cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
        --key-file /dev/shm/key "$1"
}

# mapping KIND [SIZE IN SECTORS]: makes it: `crypt`, with the key in its table; `linear`, of two pieces;
# `striped`.
mapping() {
    local sectors=${2:-$sectors}
    local half=$((sectors / 2))
    case $1 in
        crypt)
            luks /dev/vdb
            cryptsetup open --disable-keyring --key-file /dev/shm/key /dev/vdb volume
            cryptsetup resize --disable-keyring --key-file /dev/shm/key --size "$sectors" volume
            [ "$(blockdev --getsz $volume)" = "$sectors" ] || fail "of another size" ;;
        linear)
            dmsetup create volume <<TABLE
0 $half linear /dev/vdb $((half + 4096))
$half $half linear /dev/vdb 2048
TABLE
            ;;
        striped)
            dmsetup create volume --table "0 $sectors striped 2 128 /dev/vdb 0 /dev/vdb $((half + 2048))" ;;
    esac
    udevadm settle
    wipefs -q -a $volume
}
no_mapping() { dmsetup remove --retry volume; }

# All mappings with their keys, who is suspended, what loop devices there are, and what is mounted.
picture() {
    udevadm settle
    dmsetup table --showkeys | sort
    dmsetup info -c --noheadings -o name,uuid,suspended,tables_loaded,readonly | sort
    losetup --noheadings --list --output name,back-file | sort
    sort /proc/self/mounts
    find -L /dev/mapper /dev/disk/by-id /dev/disk/by-uuid -type b 2>/dev/null | sort
}

# The node of the snapshot of ours that there is now. No link leads to it.
cat >/dev/shm/snapshot <<'NODE'
grep -ls '^HOLDSTILL-.*-snapshot$' /sys/block/dm-*/dm/uuid | sed 's,/sys/block/\(dm-[0-9]*\)/.*,/dev/\1,'
NODE
snapshot() { sh /dev/shm/snapshot; }
