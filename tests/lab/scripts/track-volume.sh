# Busy volumes are imaged, restored and judged; what was counted and traced of them is added up.
#   DISK:FILESYSTEM:NEIGHBOUR...: a NEIGHBOUR is `none` (the volume is the whole disk), or what is
#   written all the while to another partition, right beside the volume: `files` or `raw`.
#   A FILESYSTEM is ext4, xfs, or xfs-v4. A DISK may come again, with another one.
. ./common.sh
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /run/volume /run/second /run/images /run/copy
mkfs.ext4 -q -F /dev/vdb
mount /dev/vdb /run/images

# What the volume has counted, in sectors.
counted() { awk '{ print $7 + $14 }' "/sys/class/block/${volume#/dev/}/stat"; }
# What is traced of the volume, by an instance of our own.
trace=/sys/kernel/tracing/instances/measure
start_trace() {
    local start=0 place=/sys/class/block/${volume#/dev/}
    [ ! -e "$place/start" ] || start=$(cat "$place/start")
    local end=$((start + $(cat "$place/size")))
    local number=$((0x$(stat -c %t "$disk") << 20 | 0x$(stat -c %T "$disk")))
    mkdir $trace
    echo 16384 >$trace/buffer_size_kb
    echo "dev == $number && sector >= $start && sector < $end && !(rwbs ~ \"R*\")" \
        >$trace/events/block/block_rq_complete/filter
    echo 1 >$trace/events/block/block_rq_complete/enable
}
traced() { sed -n 's/.*block_rq_complete:.* [0-9]* + \([0-9]*\) .*/\1/p' $trace/trace | awk '{ sum += $1 } END { print sum + 0 }'; }
# Both sums begin and end in a freeze, for the kernel writes to an idle ext4, too: a new one's inode
# tables.
begin_sums() { counted; start_trace; }
end_sums() { echo "$(counted) $(traced)"; }
frozen() {
    fsfreeze --freeze /run/volume
    "$@"
    fsfreeze --unfreeze /run/volume
}

for case in "$@"; do
    IFS=: read -r disk type neighbour <<<"$case"
    name=${disk#/dev/}-$type options=()
    case $type in
        xfs-v4) type=xfs options=(-m crc=0) ;;
    esac
    volume=$disk
    if [ "$neighbour" != none ]; then
        part=$disk
        [[ $disk != *[0-9] ]] || part=${disk}p
        volume=${part}1 second=${part}2
        printf 'label: gpt\nsize=320MiB\nsize=60MiB\n' | sfdisk -q "$disk"
        udevadm settle
    fi
    wipefs -q -a "$volume"
    mkfs."$type" -q "${options[@]}" "$volume"
    mount "$volume" /run/volume
    before=$(frozen begin_sums)

    journal=/dev/shm/journal-$name
    busy /run/volume/files "$journal"
    case $neighbour in
        files)
            mkfs.ext4 -q -F "$second"
            mount "$second" /run/second
            busy /run/second/files /dev/shm/other ;;
        raw)
            while dd if=/dev/zero of="$second" bs=4k count=500 oflag=direct status=none; do :; done &
            raw=$! ;;
    esac
    image=/run/images/$name.still report=/dev/shm/$name.json status=0
    backup "$report" /run/volume -o "$image" --freeze track || status=$?
    calm
    case $neighbour in
        files) umount /run/second ;;
        raw) kill $raw; wait $raw || true ;;
    esac
    read -r after traced <<<"$(frozen end_sums)"
    counted=$((after - before))
    rmdir $trace
    umount /run/volume
    nothing_left
    [ "$status" = 0 ] || fail "status $status"
    freezes "$report"
    echo "conserved: $name: $counted sectors counted, $traced traced"
    [ "$counted" = "$traced" ] || fail "not all that was counted was traced"

    timeout $limit holdstill restore "$image" /dev/vdc --yes --quiet
    rm "$image"
    [ "$type" = xfs ] || sound "$type" /dev/vdc
    options=rw
    [ "$type" = ext4 ] || options=nouuid
    mount -o $options /dev/vdc /run/copy
    right /run/copy/files "$journal" "$(instant "$report")"
    umount /run/copy
    sound "$type" /dev/vdc
done
umount /run/images
