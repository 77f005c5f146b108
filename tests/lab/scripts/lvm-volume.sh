# Busy logical volumes are imaged by a snapshot, restored and judged.
#   KIND:FILESYSTEM:SOURCE...: KIND is thick or thin; SOURCE is how it is named, @ being a slash.
. ./lvm-common.sh
images /dev/vdc

# So that the hook finds what it needs: a copy of the snapshot, made while it exists.
cat >/dev/shm/oracle <<'HOOK'
dd if="$(lvs --noheadings -o lv_path -S 'lv_tags={holdstill}' | tr -d ' ')" \
    of=/run/images/oracle bs=1M iflag=direct conv=sparse status=none
HOOK

for case in "$@"; do
    IFS=: read -r kind type source <<<"$case"
    volume "$kind"
    wipefs -q -a /dev/lab/volume
    mkfs."$type" -q /dev/lab/volume
    mount /dev/lab/volume /run/volume
    picture >/run/before
    busy_backup "$type" lvm "${source//@//}"
    no_volume
done
umount /run/images
