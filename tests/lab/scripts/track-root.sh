# Images the busy root and restores it to another disk.
#   OUTPUT: `pipe` or `file`, on the second disk
. ./common.sh
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /run/second
mkfs.ext4 -q -F /dev/vdb
mount /dev/vdb /run/second
image=/run/second/image.still report=/dev/shm/report.json

busy /var/live /dev/shm/journal
case $1 in
    pipe)
        timeout $limit holdstill backup / -o - --freeze track --json 2>$report |
            cat >$image || { tail -n 1 $report; exit 1; } ;;
    file) backup $report / -o $image --freeze track ;;
esac
sleep 1
calm
freezes $report
instant $report >instant
cp /dev/shm/journal .
nothing_left
touch /written

case $1 in
    pipe) timeout $limit holdstill restore - /dev/vdc --yes --quiet <$image ;;
    file) timeout $limit holdstill restore $image /dev/vdc --yes --quiet ;;
esac
