# Images the busy root through a pipe to another disk, and restores it to a third.
. ./common.sh
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /run/second
mkfs.ext4 -q -F /dev/vdb
mount /dev/vdb /run/second

busy /var/live /dev/shm/journal
timeout $limit holdstill backup / -o - --freeze track --json 2>/dev/shm/pipe.json |
    cat >/run/second/pipe.still || { tail -n 1 /dev/shm/pipe.json; exit 1; }
sleep 1
calm
freezes /dev/shm/pipe.json
instant /dev/shm/pipe.json >pipe.instant
cp /dev/shm/journal .
nothing_left
touch /written

timeout $limit holdstill restore - /dev/vdc --yes --quiet </run/second/pipe.still
