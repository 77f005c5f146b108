# Loads ZFS: `. ./zfs.sh`. It is unpacked over the guest's own files.
# Without this option tar would replace the link /lib by a folder.
tar -C / --keep-directory-symlink --no-same-owner -xf zfs.tar
modprobe -q zlib_deflate || true
while read -r module; do
    insmod "/run-zfs/$module"
done </run-zfs/order
ldconfig 2>/dev/null
udevadm control --reload
