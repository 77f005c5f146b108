# How runs over logical volumes end: room that runs out, kills, refusals, and what cleanup removes.
#   ROUNDS: how often a run is killed.
. ./lvm-common.sh
rounds=$1
mount -t tmpfs -o size=500M tmpfs /run/images

# ready KIND [SIZE]: a mounted volume with 120 MB in it.
ready() {
    volume "$@"
    mkfs.ext4 -q -F /dev/lab/volume
    mount /dev/lab/volume /run/volume
    head -c 120M /dev/urandom >/run/volume/content
    sync
    picture >/run/before
}
until_snapshot() {
    for _ in $(seq 300); do
        [ -z "$(snapshot)" ] || break
        sleep 0.1
    done
    sleep 1
}
done_with() {
    umount /run/volume
    no_volume
}
# unmade STATUS WORDS ARGUMENT...: the backup fails so, and leaves nothing.
unmade() {
    ends "$1" "$2" holdstill backup "${@:3}" -o $image --freeze lvm
    tail -n 2 /dev/shm/said
    [ ! -e $image ] || fail "an image in spite of that"
    unchanged
    nothing_left
}
# Soon after the snapshot is there: new content where the old one was, as fast as it goes.
overwrite='(sleep 1; exec dd if=/dev/zero of=/run/volume/content bs=1M count=110 conv=notrunc oflag=direct) >/dev/null 2>&1 &'
# The same, slowly.
cat >/dev/shm/slowly <<'WRITER'
for at in $(seq 0 2 100); do
    dd if=/dev/zero of=/run/volume/content bs=1M seek=$at count=2 conv=notrunc oflag=direct
    sleep 0.4
done
WRITER
# A copy of the snapshot.
oracle='dd if="$(lvs --noheadings -o lv_path -S "lv_tags={holdstill}" | tr -d " ")" of=/run/images/oracle bs=1M iflag=direct conv=sparse status=none'

ready thick
echo "a snapshot that overflows, or nearly"
unmade 1 "snapshot was given up" lab/volume --cow-size 16M --rate 12M --post-freeze "$overwrite"
unmade 1 "snapshot was given up" lab/volume --cow-size 8M --rate 12M --on-read-error zero \
    --post-freeze "$overwrite"

echo "one that is extended before it does"
# So much is left that half of it is not enough.
lvcreate -q -y -Wn -l "$(($(vgs --noheadings -o vg_free_count lab) - 30))" -n filler lab >/dev/null
picture >/run/before
ends 0 "" holdstill backup lab/volume -o $image --freeze lvm --rate 4M \
    --post-freeze "$oracle; bash /dev/shm/slowly >/run/slowly 2>&1 &"
unchanged
nothing_left
holdstill verify $image --against /run/images/oracle --quiet
rm $image /run/images/oracle

echo "no room, and a device that is not LVM's"
lvresize -q -q -l +100%FREE lab/filler >/dev/null
picture >/run/before
unmade 3 "0 free extents" lab/volume
ends 3 "free extents.*|track" holdstill backup lab/volume -o $image --freeze lvm
lvremove -q -q -f lab/filler >/dev/null
picture >/run/before
unmade 1 "vdc" lab/volume --cow-device /dev/vdc
unmade 3 "extents" lab/volume --cow-size 10G

echo "output without room, SIGINT, and a hook that fails"
head -c 120M /dev/urandom >/run/volume/content
sync
head -c 250M /dev/zero >/run/images/filler
mount -o remount,size=320M /run/images
unmade 1 "space" lab/volume --compress none
rm /run/images/filler
# A job in the background ignores SIGINT otherwise.
env --default-signal=INT holdstill backup lab/volume -o $image --freeze lvm --rate 4M --json >/dev/shm/said &
run=$!
until_snapshot
kill -INT $run
status=0
wait $run || status=$?
[ $status = 130 ] || fail "status $status after SIGINT"
unchanged
nothing_left
unmade 1 "nothing is frozen" lab/volume --pre-freeze "exit 3"

echo "killed at any moment"
for round in $(seq "$rounds"); do
    holdstill backup lab/volume -o $image --freeze lvm --rate 30M --quiet &
    run=$!
    sleep "$((RANDOM % 12)).$((RANDOM % 10))"
    kill -KILL $run 2>/dev/null || true
    wait $run 2>/dev/null || true
    guard_done
    unchanged
    rm -f $image
    holdstill cleanup >/dev/shm/cleanup
    nothing_left
    echo "round $round"
done

echo "killed with its guard"
holdstill backup lab/volume -o $image --freeze lvm --rate 4M --quiet &
run=$!
until_snapshot
kill -KILL $(pgrep holdstill-guard)
kill -KILL $run
wait $run 2>/dev/null || true
[ -n "$(snapshot)" ] || fail "who has removed it?"
# Neither is ours, whatever they look like.
lvcreate -q -y -s -L 8M -n holdstill.0123.volume lab/volume >/dev/null
lvcreate -q -y -s -L 8M --addtag holdstill --addtag holdstill.run.0123 -n other lab/volume >/dev/null
holdstill cleanup
[ "$(lvs --noheadings -o lv_name -S 'origin=volume' | tr -d ' ' | sort | xargs)" = "holdstill.0123.volume other" ] ||
    fail "not what was to be left: $(lvs)"
lvremove -q -q -f lab/other lab/holdstill.0123.volume >/dev/null
unchanged
nothing_left

echo "a snapshot that somebody holds when it is to be removed"
ends 0 "could not be removed" holdstill backup lab/volume -o $image --freeze lvm --force \
    --post-freeze 'sleep 1000 <"$(lvs --noheadings -o lv_path -S "lv_tags={holdstill}" | tr -d " ")" >/dev/null 2>&1 & echo $! >/run/sleeper'
holdstill verify $image --quiet
kill "$(cat /run/sleeper)"
[ -n "$(snapshot)" ] || fail "it was removed all the same"
holdstill cleanup
unchanged
nothing_left
rm $image

echo "several at once, hooks around them all"
lvcreate -q -y -Wn -L 40M -n second lab >/dev/null
head -c 40M /dev/urandom >/dev/lab/second
picture >/run/before
ends 0 "" holdstill backup lab/volume lvm:lab/second -o $image --freeze lvm --force \
    --pre-freeze 'echo "pre $(lvs --noheadings -S "lv_tags={holdstill}" | wc -l)" >>/run/hooks' \
    --post-freeze 'echo "post $(lvs --noheadings -S "lv_tags={holdstill}" | wc -l)" >>/run/hooks'
[ "$(xargs </run/hooks)" = "pre 0 post 2" ] || fail "hooks: $(cat /run/hooks)"
unchanged
nothing_left
holdstill restore $image /run/images/second --volume 2 --quiet
cmp /dev/lab/second /run/images/second
rm $image /run/images/second

echo "a volume whose user nobody can make pause: all blocks, as after a power cut"
umount /run/volume
exec 9<>/dev/lab/volume
ends 0 "crash" holdstill backup lab/volume -o $image
grep -q "lvm" /dev/shm/said || fail "$(cat /dev/shm/said)"
holdstill restore $image /run/images/volume --quiet
cmp /dev/lab/volume /run/images/volume
exec 9>&-
rm $image /run/images/volume
mount /dev/lab/volume /run/volume

echo "names that are none, and one too many"
ends 1 "no such logical volume" holdstill inspect lvm:lab/nothing
ends 1 "vg/root" holdstill inspect lab/nothing
(mkdir -p /dev/shm/here/lab && cd /dev/shm/here && : >lab/volume &&
    ends 2 "lvm:lab/volume" holdstill inspect lab/volume)
lvchange -q -an lab/second
ends 1 "lvchange" holdstill inspect lab/second
ends 0 "lvm" holdstill inspect /run/volume
ends 0 "lvm" holdstill inspect /dev/mapper/lab-volume
done_with

echo "a pool that runs full: the snapshot goes, and writers go on"
pool=240M ready thin
unmade 1 "pool" lab/volume --rate 8M --post-freeze "$overwrite"
unmade 2 "cow-size" lab/volume --cow-size 8M
done_with

echo "thin: what the pool does not hold is not read"
volume thin 2G
head -c 5M /dev/urandom | dd of=/dev/lab/volume bs=1M seek=700 status=none
head -c 3M /dev/urandom | dd of=/dev/lab/volume bs=1M seek=1500 status=none
sync
picture >/run/before
ends 0 "" holdstill backup lab/volume -o $image --freeze lvm --json
used=$(grep -o '"used_bytes":[0-9]*' /dev/shm/said | head -n 1 | cut -d : -f 2)
[ "$used" -ge $((8 << 20)) ] && [ "$used" -le $((16 << 20)) ] || fail "$used bytes were read"
unchanged
nothing_left
holdstill restore $image /run/images/volume --quiet
cmp /dev/lab/volume /run/images/volume
rm $image /run/images/volume
no_volume
