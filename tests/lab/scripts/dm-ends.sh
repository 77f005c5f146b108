# How runs with --freeze dm end: room that runs out, kills at any moment, refusals, what cleanup removes.
#   ROUNDS: how often a run is killed.
. ./dm-common.sh
rounds=$1
mount -t tmpfs -o size=500M tmpfs /run/images

# ready KIND: a mounted mapping with 120 MB in it.
ready() {
    mapping "$1"
    mkfs.ext4 -q -F $volume
    mount $volume /run/volume
    head -c 120M /dev/urandom >/run/volume/content
    sync
    picture >/run/before
}
writable() {
    timeout 60 sh -c 'date >/run/volume/date && sync -f /run/volume' || fail "the filesystem is stuck"
}
# all_as_before: what was frozen goes on, and nothing is left.
all_as_before() {
    writable
    unchanged
    nothing_left
}
# unmade STATUS WORDS ARGUMENT...: the backup fails so, and leaves nothing.
unmade() {
    ends "$1" "$2" holdstill backup "${@:3}" -o $image --freeze dm
    tail -n 2 /dev/shm/said
    [ ! -e $image ] || fail "an image in spite of that"
}
# start ARGUMENT...: a backup that takes long, in the background: $run.
start() {
    # A job in the background ignores SIGINT otherwise.
    env --default-signal=INT holdstill backup /run/volume -o $image --freeze dm --json "$@" >/dev/shm/said 2>&1 &
    run=$!
}
# Until there is a file, looked for without a pause: a thing of the kernel's, or what a hook has made.
until_there() {
    for _ in $(seq 1000000); do
        [ ! -e "$1" ] || return 0
        kill -0 $run 2>/dev/null || return 0
    done
    fail "$1 never came: $(cat /dev/shm/said)"
}
killed() {
    kill -KILL $run 2>/dev/null || true
    wait $run 2>/dev/null || true
    guard_done
    rm -f $image
    writable
    unchanged
    # All but its record was taken away by its guard.
    holdstill cleanup --json >/dev/shm/cleanup
    grep -q '"removed":\[\]' /dev/shm/cleanup || fail "cleanup had work: $(cat /dev/shm/cleanup)"
    nothing_left
}
# Soon after the snapshot is there: new content where the old one was, as fast as it goes.
overwrite='(sleep 1; exec dd if=/dev/zero of=/run/volume/content bs=1M count=110 conv=notrunc oflag=direct) >/dev/null 2>&1 &'

ready linear
echo "a store that overflows, or nearly"
unmade 1 "snapshot was given up" /run/volume --cow-size 16M --rate 12M --post-freeze "$overwrite"
all_as_before
head -c 120M /dev/urandom >/run/volume/content
sync
unmade 1 "snapshot was given up" $volume --cow-device /dev/vdc --rate 12M --on-read-error zero \
    --post-freeze "$overwrite"
all_as_before

echo "SIGINT, and hooks: before the freeze, one that fails, and one after it"
start --rate 4M --post-freeze ': >/run/after'
until_there /run/after
kill -INT $run
status=0
wait $run || status=$?
[ $status = 130 ] || fail "status $status after SIGINT: $(cat /dev/shm/said)"
all_as_before
unmade 1 "nothing is frozen" /run/volume --pre-freeze "exit 3"
all_as_before

echo "killed as soon as each thing is there"
# The copy of the table, the snapshot, the new table; right after the freeze.
for there in /sys/block/dm-1 /sys/block/dm-2 /sys/block/dm-0/slaves/dm-1 /run/after; do
    rm -f /run/after
    start --rate 30M --post-freeze ': >/run/after'
    until_there $there
    killed
    echo "at $there"
done
echo "and while it is undone"
start
until_there /sys/block/dm-0/slaves/dm-1
while [ -e /sys/block/dm-0/slaves/dm-1 ]; do :; done
killed

echo "killed at any moment"
for round in $(seq "$rounds"); do
    start --rate 30M
    sleep "$((RANDOM % 5)).$((RANDOM % 10))"
    killed
    echo "round $round"
done

echo "killed with its guard"
rm -f /run/after
start --rate 4M --post-freeze ': >/run/after'
until_there /run/after
kill -KILL $(pgrep holdstill-guard)
kill -KILL $run
wait $run 2>/dev/null || true
dmsetup table volume | grep -q snapshot-origin || fail "who has undone it?"
# Neither is ours, whatever they look like.
dmsetup create holdstill.0123.volume-real --table "0 8 zero"
dmsetup create --uuid HOLDSTILL-0123-254:0-real other --table "0 8 zero"
holdstill cleanup
dmsetup remove --retry other
dmsetup remove --retry holdstill.0123.volume-real
all_as_before
rm -f $image

echo "others suspend it and let it go on: nothing changes; they load another table: no image"
oracle='dd if="$(sh /dev/shm/snapshot)" of=/run/images/oracle bs=1M iflag=direct conv=sparse status=none'
ends 0 "" holdstill backup /run/volume -o $image --freeze dm \
    --post-freeze "$oracle; dmsetup suspend volume; dmsetup resume volume; date >/run/volume/date; sync -f /run/volume"
holdstill verify $image --against /run/images/oracle --quiet
rm $image /run/images/oracle
all_as_before
# It takes over early, with writers at work.
unmade 3 "another table" /run/volume --pre-freeze 'dmsetup suspend volume; dmsetup resume volume'
all_as_before
dmsetup table volume >/run/table
unmade 3 "another table" /run/volume --rate 12M \
    --post-freeze 'dmsetup load volume /run/table; dmsetup resume volume'
all_as_before

echo "a snapshot that somebody holds when it is to be removed"
ends 0 "could not be removed" holdstill backup /run/volume -o $image --freeze dm \
    --post-freeze 'sleep 1000 <"$(sh /dev/shm/snapshot)" >/dev/null 2>&1 & echo $! >/run/sleeper'
holdstill verify $image --quiet
diff /run/table <(dmsetup table volume) || fail "the table stays"
kill "$(cat /run/sleeper)"
[ -n "$(snapshot)" ] || fail "it was removed all the same"
holdstill cleanup
all_as_before
rm $image

echo "refused: where the store cannot be, what the run stands on, what is not as it should be"
unmade 3 "both lie on /dev/vdb" /run/volume --cow-device /dev/vdb
unmade 3 "both lie on" /run/volume --cow-device $volume
mkfs.ext4 -q -F /dev/vdc
mkdir -p /run/store
mount /dev/vdc /run/store
unmade 3 "in use" /run/volume --cow-device /dev/vdc
umount /run/store
wipefs -q -a /dev/vdc
unmade 3 "nowhere" /run/volume --cow-size 100G
unmade 2 "whole" /run/volume --cow-device /dev/vdc --cow-size 10M
ends 3 "output" holdstill backup /run/volume -o /run/volume/image.still --freeze dm
(cd /run/volume && ends 3 "folder" holdstill backup $volume -o $image --freeze dm)
ends 3 "no device of" holdstill backup /dev/vdc -o $image --freeze dm
dmsetup load volume --table "0 $sectors zero"
unmade 3 "another table" /run/volume
dmsetup clear volume
dmsetup suspend volume
unmade 3 "suspended" $volume
dmsetup resume volume
all_as_before

echo "one that nobody makes pause: all blocks, as after a power cut"
umount /run/volume
exec 9<>$volume
ends 0 "crash" holdstill backup $volume -o $image --freeze dm
holdstill restore $image /run/images/volume --quiet
cmp $volume /run/images/volume
exec 9>&-
rm $image /run/images/volume
no_mapping

echo "killed, and stopped, in the swap itself, which waits for reads that take long below"
dmsetup create slow --table "0 $sectors delay /dev/vdb 2048 0 /dev/vdb 2048 0"
dmsetup create volume --table "0 $sectors linear /dev/mapper/slow 0"
mkfs.ext4 -q -F $volume
mount $volume /run/volume
dd if=/dev/zero of=/run/volume/content bs=1M count=20 conv=fsync status=none
picture >/run/before
# reads MILLISECONDS: so long does each take.
reads() {
    dmsetup load slow --table "0 $sectors delay /dev/vdb 2048 $1 /dev/vdb 2048 0"
    dmsetup resume slow
}
for signal in KILL STOP; do
    reads 2000
    : >/run/reading
    readers=()
    for number in 1 2 3; do
        while [ -e /run/reading ]; do
            dd if=$volume of=/dev/null bs=4k count=1 skip=$((number * 1000)) iflag=direct status=none
        done &
        readers+=($!)
        sleep 0.7
    done
    start
    until grep -qs dm_suspend /proc/$run/task/*/stack; do
        kill -0 $run || fail "never seen in the swap: $(cat /dev/shm/said)"
    done
    kill -$signal $run
    rm /run/reading
    reads 0
    wait "${readers[@]}"
    if [ $signal = STOP ]; then
        # By its guard, after 10 s.
        writable
        kill -CONT $run
        status=0
        wait $run || status=$?
        [ $status = 3 ] || fail "status $status: $(cat /dev/shm/said)"
        tail -n 1 /dev/shm/said
    fi
    killed
done
umount /run/volume
no_mapping
dmsetup remove --retry slow

echo "what cannot be slid under: a key in the keyring, swap space, a logical volume, several paths"
luks /dev/vdb
cryptsetup open --key-file /dev/shm/key /dev/vdb volume
udevadm settle
unmade 3 "keyring" $volume
no_mapping
mapping linear 65536
mkswap -q $volume
swapon $volume
unmade 3 "swap" $volume
swapoff $volume
no_mapping
wipefs -q -a /dev/vdb
export LVM_SUPPRESS_FD_WARNINGS=1
vgcreate -q lab /dev/vdb >/dev/null
lvcreate -q -y -Wn -L 16M -n volume lab >/dev/null
unmade 3 "lvm" /dev/lab/volume
vgremove -q -q -f lab >/dev/null
modprobe -a dm-multipath dm-round-robin
dmsetup create volume --table "0 65536 multipath 0 0 1 1 round-robin 0 1 1 /dev/vdb 1000"
unmade 3 "multipath" $volume
no_mapping

echo "a key is never shown"
mapping crypt 65536
head -c 8M /dev/urandom >$volume
picture >/run/before
key=$(dmsetup table --showkeys volume | cut -d ' ' -f 5)
[ ${#key} = 128 ] || fail "no key: $key"
RUST_LOG=trace ends 0 "unknown" holdstill backup $volume -o $image --freeze dm \
    --post-freeze 'cp /var/lib/holdstill/*.json /run/record; cat /proc/*/cmdline >/run/arguments 2>/dev/null || true'
! grep -aiF -- "$key" /dev/shm/said $image /run/record /run/arguments || fail "there it is"
grep -q holdstill /run/record || fail "no record"
unchanged
nothing_left
holdstill restore $image /run/images/volume --quiet
cmp $volume /run/images/volume
no_mapping
