# Images the busy root and restores it to another disk.
#   OUTPUT [swap]: OUTPUT is `pipe` or `file`, on the second disk; with `swap` the root has a swap
#   file, and the kernel swaps all the while
. ./common.sh
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /run/second
mkfs.ext4 -q -F /dev/vdb
mount /dev/vdb /run/second
image=/run/second/image.still report=/dev/shm/report.json

# vm NAME: one of the kernel's counters.
vm() { sed -n "s/^$1 //p" /proc/vmstat; }
hog=''
if [ "${2-}" = swap ]; then
    # Something to be told from zeros.
    dd if=/dev/urandom of=/swap bs=1M count=160 status=none
    chmod 600 /swap
    mkswap -q /swap
    swapon /swap
    # All but a little of what there is, and any page of it is in use now and then.
    size=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) - 64 }' /proc/meminfo)
    mkfifo /dev/shm/hogging
    # shellcheck disable=SC2016 # the variables are perl's
    perl -e '$| = 1; push @all, chr($_ % 251) x (1 << 20) for 1 .. shift; print "hogging\n";
        while (1) { substr($all[rand @all], 4096 * int(rand 256), 1) = "y"; select undef, undef, undef, 0.02 }' "$size" >/dev/shm/hogging &
    hog=$!
    read -r line </dev/shm/hogging
    [ "$line" = hogging ]
fi

busy /var/live /dev/shm/journal
before=$(vm pswpout)
case $1 in
    pipe)
        timeout $limit holdstill backup / -o - --freeze track --json 2>$report |
            cat >$image || { tail -n 1 $report; exit 1; } ;;
    file) backup $report / -o $image --freeze track ;;
esac
swapped=$(($(vm pswpout) - before))
if [ -n "$hog" ]; then
    kill $hog
    wait $hog || true
    echo "swapped: $swapped pages out meanwhile"
    [ $swapped -gt 1000 ] || fail "there was no swapping to speak of"
fi
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
