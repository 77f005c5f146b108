# Datasets of ZFS are imaged as streams and received in another pool: one with many files and changing, an
# encrypted one, a clone; and how that ends when it does not.
#   FILES: how many small files.
. ./snapshot-common.sh
. ./zfs.sh
files=$1
images /dev/vdc
zpool create -f -O mountpoint=none tank /dev/vdb
zpool create -f -O mountpoint=none other /dev/vdd

guid() { zfs get -H -p -o value guid "$1"; }
# sent NAME SOURCE: the image of a dataset, with a copy of its snapshot by other means.
sent() {
    zfs list -H -o name,type,userrefs -t all >/run/before
    timeout "$limit" holdstill backup "$2" -o "$image" --json --force >"$report" ||
        fail "$(tail -n 1 "$report")"
    zfs list -H -o name,type,userrefs -t all >/run/now
    diff /run/before /run/now || fail "datasets are not as before"
    nothing_left
    for field in '"freeze":"zfs"' '"grade":"frozen"' '"kind":"zfs-send"' "\"path\":\"$1\""; do
        tail -n 1 "$report" | grep -q "$field" || fail "no $field in $(tail -n 1 "$report")"
    done
    timeout "$limit" holdstill verify "$image" --quiet
}
# What the image says of the snapshot's guid.
said() { holdstill inspect "$image" --json | grep -o '"guid":"[0-9]*"' | grep -o '[0-9]*'; }
# received NAME: restored as other/NAME, unmounted; its snapshot has the guid that the image says.
received() {
    timeout "$limit" holdstill restore "$image" "other/$1" --quiet
    [ "$(zfs get -H -o value mounted "other/$1")" != yes ] || fail "it is mounted"
    snapshot=$(zfs list -H -o name -t snapshot "other/$1")
    [ "$(guid "$snapshot")" = "$(said)" ] || fail "guid $(guid "$snapshot"), not $(said)"
}

# mounted NAME FOLDER: a folder to mount it in may be enough to have it mounted.
mounted() {
    zfs set mountpoint="$2" "$1"
    zfs mount "$1" 2>/dev/null || mountpoint -q "$2"
}

echo "many files, one of which changes all the while"
zfs create -o mountpoint=/run/volume -o recordsize=1M -o compression=lz4 tank/files
(cd /run/volume && mkdir few many && seq "$files" | split -a 6 -d -l 1 - many/ &&
    head -c 20M /dev/urandom >few/large && cp /bin/bash few/)
zfs set snapdir=visible tank/files
while :; do date +%s.%N >>/run/volume/few/growing; done &
writer=$!
# The hook keeps what the snapshot shows of what changes.
cat >/dev/shm/oracle <<'HOOK'
rm -rf /run/images/kept
cp -a "$(echo /run/volume/.zfs/snapshot/holdstill.*/few)" /run/images/kept
HOOK
zfs list -H -o name,type,userrefs -t all >/run/before
ends 0 "stream 1: zfs-send of tank/files" holdstill backup /run/volume -o "$image" \
    --post-freeze "sh /dev/shm/oracle"
kill $writer
wait $writer 2>/dev/null || true
zfs list -H -o name,type,userrefs -t all >/run/now
diff /run/before /run/now
nothing_left
holdstill verify "$image"
received files
mounted other/files /run/copy
diff -r /run/images/kept /run/copy/few || fail "files are not those of the snapshot"
diff -r /run/volume/many /run/copy/many || fail "files are not those that never changed"
[ "$(ls /run/copy/many | wc -l)" = "$files" ] || fail "not all files"
zfs umount other/files
ends 3 "exists already" holdstill restore "$image" other/files
ends 2 "volumes" holdstill restore "$image" other/new --verify
ends 1 "no-pool" holdstill restore "$image" no-pool/new
zpool list -H -o name | grep -qx other

echo "an encrypted one, raw, without its key"
echo secret phrase >/run/key
zfs create -o encryption=on -o keyformat=passphrase -o keylocation=file:///run/key \
    -o mountpoint=/run/oracle tank/secret
head -c 5M /dev/urandom >/run/oracle/content
echo "plain words that must not be found" >/run/oracle/words
cp -a /run/oracle /run/images/secret
zfs umount tank/secret
zfs unload-key tank/secret
sent tank/secret zfs:tank/secret
! grep -q "plain words that must not" "$image" || fail "plain text in the image"
received secret
zfs load-key -L file:///run/key other/secret
mounted other/secret /run/oracle
diff -r /run/images/secret /run/oracle || fail "not what was encrypted"
zfs umount other/secret

echo "a clone, through pipes; and two in one image"
zfs snapshot tank/files@base
zfs clone -o mountpoint=none tank/files@base tank/clone
holdstill backup tank/clone -o - | holdstill restore - other/clone --quiet
[ "$(zfs list -H -o name -t snapshot other/clone | wc -l)" = 1 ] || fail "no clone"
sent tank/clone tank/clone
holdstill inspect "$image" --json | grep -q '"origin":"tank/files@base"' || fail "no origin"
head -c 3M /dev/urandom >/run/images/disk
holdstill backup tank/clone tank/secret /run/images/disk -o "$image" --force --quiet
ends 2 "holds 3" holdstill restore "$image" other/one
holdstill restore "$image" --map 1=/run/images/copy --map 3=other/second --map 2=other/first --quiet
cmp /run/images/disk /run/images/copy
zfs list other/first other/second >/dev/null
zfs destroy -r other/first
zfs destroy -r other/second

echo "a tree of datasets, a volume among them, at one instant; and to places of one's own"
zfs create -o mountpoint=none tank/tree
zfs create -o mountpoint=/run/tree tank/tree/one
zfs create -o mountpoint=/run/tree/two tank/tree/one/two
zfs create -V 8M tank/tree/volume
udevadm settle
head -c 4M /dev/urandom >/run/tree/first
cp /bin/bash /run/tree/two/second
head -c 8M /dev/urandom >/run/images/content
cp /run/images/content /dev/zvol/tank/tree/volume
sync
zfs list -H -o name,type,userrefs -t all >/run/before
ends 0 "is a volume: its copy is as after a power cut" holdstill backup -r tank/tree -o "$image" --force
# A dataset that is made meanwhile has no snapshot, and is in nobody's way.
zfs list -H -o name,type,userrefs -t all | diff /run/before - || fail "datasets are not as before"
nothing_left
ends 2 "for datasets" holdstill backup -r /run/images/disk -o /run/images/none.still
ends 0 "" holdstill verify "$image"
holdstill inspect "$image" --json | grep -o '"dataset":"[a-z/]*"' >/run/sent
printf '"dataset":"tank/tree%s"\n' "" /one /one/two /volume | diff - /run/sent
zfs create other/deep
holdstill restore "$image" other/deep/copy --quiet
for name in "" /one /one/two /volume; do
    [ "$(guid "$(zfs list -H -o name -t snapshot -d 1 "other/deep/copy$name")")" = \
        "$(holdstill inspect "$image" --json |
            grep -o "\"dataset\":\"tank/tree$name\",[^}]*\"guid\":\"[0-9]*\"" |
            grep -o '[0-9]*"$' | tr -d '"')" ] || fail "other guids of $name"
done
mounted other/deep/copy/one /run/copy
cmp /run/tree/first /run/copy/first
mounted other/deep/copy/one/two /run/copy/two
cmp /bin/bash /run/copy/two/second
udevadm settle
cmp -n $((8 << 20)) /run/images/content /dev/zvol/other/deep/copy/volume
zfs umount other/deep/copy/one/two
zfs umount other/deep/copy/one
zfs destroy -r other/deep/copy
cp "$image" /run/images/damaged
size=$(stat -c %s "$image")
printf '\xff\x00\xff' | dd of=/run/images/damaged bs=1 seek=$((size / 2)) conv=notrunc status=none
ends 4 "damaged" holdstill restore /run/images/damaged other/deep/bad
holdstill restore "$image" --map 3=other/deep/two --map 2=other/deep/two/one --quiet
[ "$(zfs list -H -o name -r other/deep | tr '\n' ' ')" = "other/deep other/deep/two other/deep/two/one " ] ||
    fail "$(zfs list -r other/deep)"
zfs destroy -r other/deep
holdstill backup -r tank/tree -o /run/images/killed.still --rate 2M --quiet &
run=$!
sleep 2
kill -KILL $run
wait $run 2>/dev/null || true
for _ in $(seq 40); do
    zfs list -H -o name -t snapshot | grep -q "tank/tree.*@holdstill" || break
    sleep 0.5
done
holdstill cleanup --quiet
zfs list -H -o name,type,userrefs -t all -r tank | diff <(grep ^tank /run/before) - ||
    fail "a killed run left something"
zfs destroy -r tank/tree

echo "a damaged image gives no dataset, nor does one that is cut off, or a restore that is killed"
sent tank/files tank/files
size=$(stat -c %s "$image")
zfs list -H -o name -t all >/run/before
cp "$image" /run/images/damaged
printf '\xff\x00\xff' | dd of=/run/images/damaged bs=1 seek=$((size - 3000)) conv=notrunc status=none
ends 4 "damaged" holdstill restore /run/images/damaged other/bad
for cut in 100 3000 $((size / 2)); do
    head -c $((size - cut)) "$image" >/run/images/damaged
    ends 4 "damaged|ends|cut|truncated" holdstill restore /run/images/damaged other/bad
    ends 4 "" holdstill restore - other/bad </run/images/damaged
done
zfs list -H -o name -t all | diff /run/before - || fail "something of it was taken"
holdstill restore "$image" other/bad --quiet --rate 4M &
run=$!
sleep 3
kill -KILL $run
wait $run 2>/dev/null || true
sleep 1
! zfs list -H -o name -t snapshot other/bad 2>/dev/null | grep . || fail "a snapshot of half a stream"
zfs receive -A other/bad 2>/dev/null || true
env --default-signal=INT holdstill restore "$image" other/bad --quiet --rate 4M &
run=$!
sleep 3
kill -INT $run
status=0
wait $run || status=$?
[ $status = 130 ] || fail "status $status after SIGINT"
zfs list -H -o name -t all | diff /run/before - || fail "something was left"

echo "no room where it is received, and where the image goes"
zfs create -o quota=3M other/small
ends 1 "space|quota" holdstill restore "$image" other/small/bad
zfs destroy -r other/small
head -c 690M /dev/zero >/run/images/filler 2>/dev/null || true
ends 1 "space" holdstill backup tank/files -o /run/images/second.still
rm -f /run/images/filler
zfs list -H -o name -t all | diff /run/before - || fail "something was left"
nothing_left
zpool export other
zpool export tank
