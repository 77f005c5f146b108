# What the scripts share about snapshots: `. ./snapshot-common.sh` first. A disk for images is given by
# `images DEVICE`; restored is to /dev/vdd. Each script has a function `picture` of all that a run must
# leave as it was, in /run/before.
. ./common.sh
modprobe loop
mkdir -p /run/volume /run/images /run/copy /run/oracle
image=/run/images/image.still
report=/dev/shm/report

images() {
    mkfs.ext4 -q -F "$1"
    mount "$1" /run/images
}

unchanged() {
    picture >/run/now
    diff /run/before /run/now || fail "not all is as before"
}

# The guard does the rest when a run is killed.
guard_done() {
    for _ in $(seq 900); do
        pgrep holdstill-guard >/dev/null || return 0
        sleep 0.1
    done
    fail "the guard does not end"
}

# busy_backup TYPE STEP SOURCE [OPTION]...: images the busy filesystem at /run/volume, while a hook copies the
# snapshot to /run/images/oracle by /dev/shm/oracle; then judges image and copy.
number=0
busy_backup() {
    local type=$1 step=$2 source=$3 status=0 journal options read_only field
    number=$((number + 1))
    journal=/dev/shm/journal-$number
    busy /run/volume/files "$journal"
    backup "$report" "$source" "${@:4}" -o "$image" --post-freeze "sh /dev/shm/oracle" || status=$?
    unchanged
    calm
    umount /run/volume
    nothing_left
    [ "$status" = 0 ] || fail "status $status"
    freezes "$report"
    for field in "\"freeze\":\"$step\"" '"grade":"frozen"' '"warnings":\[\]'; do
        tail -n 1 "$report" | grep -q "$field" || fail "no $field in $(tail -n 1 "$report")"
    done

    timeout "$limit" holdstill verify "$image" --against /run/images/oracle --quiet ||
        fail "it is not the snapshot"
    timeout "$limit" holdstill restore "$image" /dev/vdd --yes --quiet
    rm "$image"
    [ "$type" = xfs ] || sound "$type" /dev/vdd
    options=rw read_only=ro,noload
    [ "$type" = ext4 ] || options=nouuid read_only=ro,norecovery,nouuid
    mount -o $options /dev/vdd /run/copy
    mount -o loop,$read_only /run/images/oracle /run/oracle
    diff -r /run/oracle/files /run/copy/files || fail "files are not those of the snapshot"
    umount /run/oracle
    right /run/copy/files "$journal" "$(instant "$report")"
    umount /run/copy
    sound "$type" /dev/vdd
    rm /run/images/oracle
}
