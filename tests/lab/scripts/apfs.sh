# Loads APFS: `. ./apfs.sh`. It is unpacked over the guest's own files.
# Without this option tar would replace a link such as /sbin by a folder.
tar -C / --keep-directory-symlink --no-same-owner -xf apfs.tar
modprobe libcrc32c
insmod /run-apfs/apfs.ko
