# Busy mappings of the device mapper are imaged by a snapshot slid under them, restored and judged.
#   KIND:FILESYSTEM:STORE...: KIND as in dm-common.sh; what is overwritten is kept by default in a
#   file, or on the device STORE.
. ./dm-common.sh
images /dev/vdc

# So that the hook finds what it needs: a copy of the snapshot, made while it exists.
cat >/dev/shm/oracle <<'HOOK'
dd if="$(sh /dev/shm/snapshot)" of=/run/images/oracle bs=1M iflag=direct conv=sparse status=none
dmsetup ls --tree >/run/tree
HOOK

for case in "$@"; do
    IFS=: read -r kind type store <<<"$case"
    mapping "$kind"
    mkfs."$type" -q $volume
    mount $volume /run/volume
    options=(--freeze dm)
    [ -z "$store" ] || options+=(--cow-device "$store")
    picture >/run/before
    busy_backup "$type" dm /run/volume "${options[@]}"
    grep -q holdstill /run/tree || fail "what was read? $(cat /run/tree)"
    no_mapping
    [ -z "$store" ] || [ -z "$(wipefs "$store")" ] || fail "the store looks like something"
done
umount /run/images
