# Writes to a new container of APFS on /dev/vdb until the guest is killed. What live-writer does is told in
# $SHARE/journal, by writes that reach the host before they return; `running` is printed once it writes.
set -euo pipefail
. ./apfs.sh
cp live-writer /dev/shm/
mkdir -p /run/volume
mkapfs /dev/vdb
mount -t apfs -o readwrite /dev/vdb /run/volume
mkdir /run/volume/changes

# changes DIR: makes, renames, links, cuts and deletes; what this driver cannot do, live-writer is not asked for.
changes() {
    local number=0 this
    while true; do
        number=$((number + 1)) this=$1/$((number % 50))
        head -c $((number * 7919 % 60000 + 1)) /dev/urandom >"$this"
        ln -sf "target $number" "$this.link"
        mv -f "$1/$((number * 3 % 50))" "$1/moved-$((number % 7))" 2>/dev/null || true
        rm -f "$1/$((number * 5 % 50)).link"
        [ -s "$this" ] && truncate -s $((number % 9000)) "$this"
        mkdir -p "$1/folder-$((number % 11))/in"
        rmdir "$1/folder-$((number * 3 % 11))/in" 2>/dev/null || true
        [ $((number % 5)) != 0 ] || sync -f "$1"
        sleep 0.05
    done
}
changes /run/volume/changes &
/dev/shm/live-writer run /run/volume/files --journal "$SHARE/journal" --light --budget 8 \
    --direct 0 --mmap 0 --churn 0 --sqlite 0
