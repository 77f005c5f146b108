//! Block devices: requests of `include/uapi/linux/fs.h`, direct I/O by `O_DIRECT`.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::linux_only;
use crate::device::Geometry;
use crate::node::{BlockDevice, DeviceNumber, read_number};

mod ioctl {
    nix::ioctl_read!(blkgetsize64, 0x12, 114, libc::size_t);
    nix::ioctl_read_bad!(blkssz_get, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(
        blkpbsz_get,
        nix::request_code_none!(0x12, 123),
        libc::c_uint
    );
    nix::ioctl_read_bad!(blkro_get, nix::request_code_none!(0x12, 94), libc::c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
    nix::ioctl_none_bad!(blkrrpart, nix::request_code_none!(0x12, 95));
}

/// The node to open for the device at `path`.
pub(crate) fn node_to_open(path: &Path) -> &Path {
    path
}

/// Whether a node of this kind is a device with blocks.
pub(crate) fn is_device(kind: FileType) -> bool {
    kind.is_block_device()
}

/// The same once more with `O_DIRECT`, where that is granted: by the descriptor, for the name may lead
/// elsewhere by now.
pub(crate) fn open_direct(plain: &File, _: &Path, options: &mut OpenOptions) -> Option<File> {
    let own = super::located::node_of(plain);
    options.custom_flags(libc::O_DIRECT).open(own).ok()
}

/// Writes what is not aligned: buffered.
pub(crate) fn write_odd(file: &File, _align: u32, buf: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(buf, offset)
}

/// Brings everything written to stable storage.
pub(crate) fn sync(file: &File, _is_device: bool) -> io::Result<()> {
    file.sync_all()
}

/// Asks the kernel to read the partition table again. Fails while a partition is in use.
pub(crate) fn reread_table(file: &File) -> io::Result<()> {
    // SAFETY: takes no argument; the descriptor is open.
    unsafe { ioctl::blkrrpart(file.as_raw_fd()) }?;
    Ok(())
}

/// Drops the pages a buffered read left: imaging a disk must not push out everybody's cache.
pub(crate) fn forget_cached(file: &File, offset: u64, len: u64) {
    if let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) {
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        // Only a hint: whether it is taken changes nothing for us.
        let _ = nix::fcntl::posix_fadvise(file, offset, len, advice);
    }
}

/// Size and sectors of a block device, as the kernel says them.
pub(crate) fn geometry(file: &File) -> io::Result<Geometry> {
    let fd = file.as_raw_fd();
    let (mut size, mut logical, mut physical, mut read_only) = (0, 0, 0, 0);
    // SAFETY: each call fills one integer of the type that its request is defined with.
    unsafe {
        ioctl::blkgetsize64(fd, &raw mut size)
            .and_then(|_| ioctl::blkssz_get(fd, &raw mut logical))
            .and_then(|_| ioctl::blkpbsz_get(fd, &raw mut physical))
            .and_then(|_| ioctl::blkro_get(fd, &raw mut read_only))
    }?;
    Ok(Geometry {
        size: size as u64,
        logical_sector: u32::try_from(logical).unwrap_or(0),
        physical_sector: physical,
        is_block_device: true,
        read_only: read_only != 0,
    })
}

/// What the filesystem asks of direct I/O on this file (`STATX_DIOALIGN`, Linux 6.1), in bytes.
pub(crate) fn file_dio_align(file: &File) -> Option<u32> {
    // SAFETY: all-zero is a valid `statx`, which is plain numbers.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, which AT_EMPTY_PATH takes as "the descriptor itself",
    // and `answer` outlives the call.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    let align = answer.stx_dio_offset_align.max(answer.stx_dio_mem_align);
    (done == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0 && align.is_power_of_two())
        .then_some(align)
}

/// Discards `[start, length]`, both in bytes.
pub(crate) fn discard(file: &File, range: [u64; 2]) -> io::Result<()> {
    // SAFETY: the request reads two u64: start and length in bytes.
    unsafe { ioctl::blkdiscard(file.as_raw_fd(), &raw const range) }?;
    Ok(())
}

/// Whether the device takes discards (Documentation/ABI/stable/sysfs-block). One that does not say may.
pub(crate) fn can_discard(file: &File) -> bool {
    let most = || {
        let number = DeviceNumber::from_raw(file.metadata().ok()?.rdev());
        let folder = BlockDevice::of(number).ok()?.disk_sysfs().to_owned();
        read_number::<u64>(&folder.join("queue/discard_max_bytes")).ok()
    };
    most().is_none_or(|most| most > 0)
}

/// Writes zeros to `[start, length]`, both in bytes.
pub(crate) fn zero_out(file: &File, range: [u64; 2]) -> io::Result<()> {
    // SAFETY: the request reads two u64: start and length in bytes.
    unsafe { ioctl::blkzeroout(file.as_raw_fd(), &raw const range) }?;
    Ok(())
}

/// Makes a range of a file read as zeros.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    Ok(linux_only::punch_hole(file, offset, len)?)
}
