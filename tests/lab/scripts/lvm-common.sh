# What the scripts share that use LVM: `. ./lvm-common.sh` first. One volume group, `lab`, on /dev/vdb.
. ./snapshot-common.sh
export LVM_SUPPRESS_FD_WARNINGS=1
pvcreate -q /dev/vdb >/dev/null
vgcreate -q lab /dev/vdb >/dev/null

# volume thick|thin [SIZE]: makes lab/volume, a thin one in a pool of $pool.
volume() {
    local size=${2:-320M}
    case $1 in
        thick) lvcreate -q -y -Wn -L "$size" -n volume lab ;;
        thin) lvcreate -q -y -Wn -Zn -L ${pool:-600M} -T lab/pool &&
            lvcreate -q -y -V "$size" -T lab/pool -n volume ;;
    esac >/dev/null 2>&1
}
no_volume() { lvremove -q -q -f lab >/dev/null; }

# All volumes and mappings.
picture() {
    lvs -a --noheadings -o vg_name,lv_name,lv_attr,lv_size,origin,lv_tags
    dmsetup table | sort
}
# The path of the snapshot of ours that there is now.
snapshot() { lvs --noheadings -o lv_path -S 'lv_tags={holdstill}' | tr -d ' '; }
