# What the scripts share about stacks of devices: `. ./stack-common.sh` first. They are built on /dev/vdb
# and /dev/vdc; each becomes $top. A disk for images is given by `images DEVICE`; restored is to /dev/vdd.
. ./snapshot-common.sh
export LVM_SUPPRESS_FD_WARNINGS=1
modprobe -a dm-crypt raid1
# Many tools are silent about their failures.
set -E
trap 'echo "failed: $BASH_COMMAND (line $LINENO)"' ERR
echo "not a secret" >/dev/shm/key

# part DISK [SIZE]: one partition, of all or of the size.
part() {
    printf 'label: gpt\nstart=2048%s\n' "${2:+, size=$2}" | sfdisk -q -w always "$1"
    udevadm settle
}
# luks DEVICE NAME [OPTION]...: LUKS2 with its key in the keyring.
luks() {
    cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$1" /dev/shm/key
    cryptsetup open --key-file /dev/shm/key "${@:3}" "$1" "$2"
    dmsetup table "$2" | grep -q ':64:logon:' || fail "no key in the keyring: $(dmsetup table "$2")"
}
# mirror LEVEL-OPTION...: an array, in sync.
mirror() {
    echo 1000000 >/proc/sys/dev/raid/speed_limit_min
    mdadm --create /dev/md0 --quiet --run --metadata=1.2 --level=1 --raid-devices=2 "$@"
    mdadm --wait --quiet /dev/md0 || true
    for _ in $(seq 100); do
        [ "$(cat /sys/block/md0/md/sync_action)" != idle ] || break
        sleep 0.1
    done
}
# group DEVICE...: a volume group `lab`.
group() {
    vgcreate -q -q "$@" >/dev/null
}
# two_segments SIZE MORE: lab/volume in two segments, with lab/other between them, and no room left.
two_segments() {
    lvcreate -q -y -Wn -Zn -L "$1" -n volume lab >/dev/null
    lvcreate -q -y -Wn -Zn -L 48M -n other lab >/dev/null
    lvextend -q -q -L "+$2" lab/volume >/dev/null
    lvcreate -q -y -Wn -Zn -l 100%FREE -n filler lab >/dev/null
    [ "$(dmsetup table lab-volume | wc -l)" = 2 ] || fail "not two segments"
}

# stack KIND: builds it; sets $top, and $beside to what is written to all the while, if anything.
stack() {
    beside=''
    case $1 in
        luks)
            part /dev/vdb 336MiB
            luks /dev/vdb1 secret
            top=/dev/mapper/secret ;;
        lvm-luks)
            part /dev/vdb
            luks /dev/vdb1 secret
            group lab /dev/mapper/secret
            two_segments 120M 200M
            top=/dev/lab/volume beside=/dev/lab/other ;;
        striped)
            dmsetup create striped --table "0 $((320 << 11)) striped 2 128 /dev/vdb 2048 /dev/vdc 4096"
            top=/dev/mapper/striped ;;
        md)
            mirror --size=320M /dev/vdb /dev/vdc
            top=/dev/md0 ;;
        md-part)
            # A partition of an array with a bitmap, on partitions.
            part /dev/vdb
            part /dev/vdc
            mirror --bitmap=internal /dev/vdb1 /dev/vdc1
            printf 'label: gpt\nsize=320MiB\nsize=60MiB\n' | sfdisk -q -w always /dev/md0
            udevadm settle
            top=/dev/md0p1 beside=/dev/md0p2 ;;
        raid1)
            group lab /dev/vdb /dev/vdc
            lvcreate -q -y -Wn --type raid1 -m1 -L 320M -n volume lab >/dev/null
            lvcreate -q -y -Wn -Zn -L 48M -n other lab >/dev/null
            for _ in $(seq 600); do
                dmsetup status lab-volume | grep -q 'AA .* idle ' && break
                sleep 0.1
            done
            top=/dev/lab/volume beside=/dev/lab/other ;;
        high)
            # A volume of two segments on LUKS on a mirror of partitions.
            part /dev/vdb
            part /dev/vdc
            mirror /dev/vdb1 /dev/vdc1
            luks /dev/md0 secret
            group lab /dev/mapper/secret
            two_segments 160M 160M
            top=/dev/lab/volume beside=/dev/lab/other ;;
        nvme)
            # Trimmed all the while: requests of many places, of which the trace tells the first.
            group lab /dev/nvme0n1
            lvcreate -q -y -Wn -Zn -L 120M -n volume lab >/dev/null
            lvcreate -q -y -Wn -Zn -L 48M -n other lab >/dev/null
            lvextend -q -q -L +200M lab/volume >/dev/null
            luks /dev/lab/volume secret --allow-discards
            top=/dev/mapper/secret ;;
        delay)
            modprobe dm-delay
            dmsetup create slow --table "0 $((320 << 11)) delay /dev/vdb 2048 0 /dev/vdb 2048 5"
            top=/dev/mapper/slow ;;
        origin)
            group lab /dev/vdb
            lvcreate -q -y -Wn -Zn -L 320M -n volume lab >/dev/null
            lvcreate -q -y -s -L 60M -n old lab/volume >/dev/null
            top=/dev/lab/volume ;;
        *) fail "which stack is $1?" ;;
    esac
    udevadm settle
}
no_stack() {
    local name
    # A volume group may lie on `secret`, or below it: what is open does not close.
    vgchange -q -q -an lab >/dev/null 2>&1 || true
    for name in secret striped slow; do
        [ ! -e /dev/mapper/$name ] || dmsetup remove --retry $name
    done
    udevadm settle
    ! vgs lab >/dev/null 2>&1 || vgremove -q -q -f lab >/dev/null
    udevadm settle
    [ ! -e /dev/md0 ] || mdadm --stop --quiet /dev/md0
    local disk
    for disk in /dev/vdb /dev/vdc /dev/nvme0n1; do
        [ ! -e $disk ] || blank $disk
    done
    udevadm settle
}
# blank DISK: as new. What the next one finds there are zeros.
blank() {
    # udev may still look at it.
    for _ in $(seq 50); do
        sfdisk -q --delete "$1" >/dev/null 2>&1 || true
        wipefs -q -a -f "$1" >/dev/null 2>&1 && blkdiscard -f "$1" 2>/dev/null && return
        sleep 0.1
    done
    fail "$1 is still in use"
}

# All layers.
picture() {
    dmsetup table | sort
    grep -v '^unused\|check' /proc/mdstat || true
    lvs -a --noheadings -o vg_name,lv_name,lv_layout,lv_size,origin,devices 2>/dev/null
}
