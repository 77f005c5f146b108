# A busy partition is imaged while another one of the same disk is written to, right beside it.
#   DISK FILESYSTEM NEIGHBOUR...: each NEIGHBOUR is `files` or `raw`
. ./common.sh
disk=$1 type=$2
shift 2
part=$disk
[[ $disk == *[0-9] ]] && part=${disk}p
first=${part}1 second=${part}2
printf 'label: gpt\nsize=320MiB\nsize=60MiB\n' | sfdisk -q "$disk"
udevadm settle
mkdir -p /run/first /run/second /run/images /run/copy
mkfs."$type" -q "$first"
mkfs.ext4 -q -F "$second"
mkfs.ext4 -q -F /dev/vdb
mount "$first" /run/first
mount /dev/vdb /run/images

for neighbour in "$@"; do
    dir=/run/first/$neighbour journal=/dev/shm/journal-$neighbour
    busy "$dir" "$journal"
    case $neighbour in
        files)
            mount "$second" /run/second
            busy /run/second/files /dev/shm/other ;;
        raw)
            while dd if=/dev/zero of="$second" bs=4k count=500 oflag=direct status=none; do :; done &
            raw=$! ;;
    esac
    image=/run/images/$neighbour.still report=/dev/shm/$neighbour.json status=0
    backup $report /run/first -o "$image" --freeze track || status=$?
    calm
    case $neighbour in
        files) umount /run/second ;;
        raw) kill $raw; wait $raw || true ;;
    esac
    nothing_left
    case $status in
        0)
            freezes $report
            timeout $limit holdstill restore "$image" /dev/vdc --yes --quiet
            [ "$type" = xfs ] || sound "$type" /dev/vdc
            options=rw
            [ "$type" = ext4 ] || options=nouuid
            mount -o $options /dev/vdc /run/copy
            right "/run/copy/$neighbour" "$journal" "$(instant $report)"
            umount /run/copy
            sound "$type" /dev/vdc ;;
        3) [ ! -e "$image" ] || fail "an image in spite of the refusal"; exit 3 ;;
        *) fail "status $status" ;;
    esac
done
umount /run/first /run/images
