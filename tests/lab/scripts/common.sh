# What the scripts share that use holdstill: `. ./common.sh` first.
set -euo pipefail
# Started from memory: nothing they need may lie on a frozen root.
cp holdstill live-writer /dev/shm/
PATH=/dev/shm:$PATH
limit=900

fail() { echo "WRONG: $*"; exit 1; }

# busy DIR JOURNAL: writers at work there until `calm`.
writers=()
busy() {
    mkfifo "$2.announced"
    live-writer run "$1" --journal "$2" --light --budget 8 >"$2.announced" &
    writers+=($!)
    read -r line <"$2.announced"
    [ "$line" = running ]
}
calm() {
    kill -TERM "${writers[@]}"
    wait "${writers[@]}"
    writers=()
}

# backup REPORT ARGUMENT...: a backup with its report; if it fails, says why.
backup() {
    local report=$1 status=0
    shift
    timeout "$limit" holdstill backup "$@" --json >"$report" || status=$?
    [ "$status" = 0 ] || tail -n 1 "$report"
    return "$status"
}

# instant REPORT: of a backup, in nanoseconds since 1970.
instant() {
    local at
    at=$(tail -n 1 "$1" | sed -n 's/.*"event":"result".*"instant":"\([^"]*\)".*/\1/p')
    [ -n "$at" ] || fail "no instant in $(cat "$1")"
    date -d "$at" +%s%N
}
# freezes REPORT: how long its freezes were.
freezes() { tail -n 1 "$1" | grep -o '{[^{}]*"purpose":"[^}]*}' | tr -d '{}"' | sed 's/^/freeze: /'; }

# right DIR JOURNAL NANOSECONDS: the copy shows the instant, and all of it.
right() {
    live-writer check "$1" --journal "$2" --realtime --frozen-begin "$3" --frozen-end "$3" --exact
}

# sound FILESYSTEM DEVICE: fsck has nothing to say. Of XFS that holds only after a first mount.
sound() {
    case $1 in
        ext4) e2fsck -fn "$2" ;;
        xfs) xfs_repair -n "$2" ;;
    esac >/dev/shm/fsck 2>&1 || { cat /dev/shm/fsck; fail "fsck of $2"; }
}

# ends STATUS WORDS COMMAND...: the command ends so and says so.
ends() {
    local expected=$1 words=$2 status=0
    shift 2
    timeout "$limit" "$@" >/dev/shm/said 2>&1 || status=$?
    [ "$status" = "$expected" ] && grep -qiE -- "$words" /dev/shm/said && return
    cat /dev/shm/said
    fail "status $status, not $expected with '$words': $*"
}

# nothing_left: no trace goes on, no run is on record, nothing is frozen.
nothing_left() {
    holdstill cleanup --json >/dev/shm/cleanup
    tail -n 1 /dev/shm/cleanup | grep -q '"dead_runs":\[\].*"removed":\[\]\|"removed":\[\].*"dead_runs":\[\]' ||
        fail "cleanup had work: $(cat /dev/shm/cleanup)"
    ! ls /sys/kernel/tracing/instances 2>/dev/null | grep . || fail "a trace goes on"
}
