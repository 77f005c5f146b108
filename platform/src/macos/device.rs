//! Disks: requests of `bsd/sys/disk.h`, and I/O past the cache.
//!
//! A disk is read and written through its character device, which takes whole sectors only and goes
//! straight to the driver; memory may lie anywhere. A file passes the cache by `F_NOCACHE`.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

pub(crate) use super::sectors::write_odd;
use super::{names, output};
use crate::device::Geometry;

mod ioctl {
    nix::ioctl_none!(dkiocsynchronizecache, b'd', 22);
    nix::ioctl_read!(dkiocgetblocksize, b'd', 24, u32);
    nix::ioctl_read!(dkiocgetblockcount, b'd', 25, u64);
    nix::ioctl_read!(dkiociswritable, b'd', 29, u32);
    nix::ioctl_write_ptr!(dkiocunmap, b'd', 31, super::Unmap);
    nix::ioctl_read!(dkiocgetphysicalblocksize, b'd', 77, u32);
}

/// `dk_unmap_t`.
#[repr(C)]
pub(super) struct Unmap {
    extents: *const [u64; 2],
    count: u32,
    options: u32,
}

const _: () = assert!(size_of::<Unmap>() == 16);

/// The node to open for the device at `path`: of a disk its character device.
pub(crate) fn node_to_open(path: &Path) -> PathBuf {
    let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    match names::name_at(&resolved) {
        Some(name) => names::raw_node(name),
        None => path.to_owned(),
    }
}

/// Whether a node of this kind may be a device with blocks. What is none does not answer [`geometry`].
pub(crate) fn is_device(kind: FileType) -> bool {
    kind.is_block_device() || kind.is_char_device()
}

/// The same once more past the cache: a character device is that anyway, and while it is claimed it cannot
/// be opened again.
pub(crate) fn open_direct(plain: &File, path: &Path, options: &mut OpenOptions) -> Option<File> {
    if plain.metadata().ok()?.file_type().is_char_device() {
        return plain.try_clone().ok();
    }
    let direct = options.custom_flags(0).open(path).ok()?;
    let is_same = |one: &File, other: &File| {
        let [one, other] = [one.metadata().ok()?, other.metadata().ok()?];
        (one.dev() == other.dev() && one.ino() == other.ino()).then_some(())
    };
    is_same(plain, &direct)?;
    output::pass_cache(&direct).ok()?;
    Some(direct)
}

/// Brings everything written to stable storage.
pub(crate) fn sync(file: &File, is_device: bool) -> io::Result<()> {
    if !is_device {
        return output::sync(file);
    }
    nix::unistd::fsync(file)?;
    // SAFETY: takes no argument; the descriptor is open.
    match unsafe { ioctl::dkiocsynchronizecache(file.as_raw_fd()) } {
        // The device has no cache that it could empty.
        Err(Errno::ENOTSUP | Errno::ENOTTY) => Ok(()),
        done => Ok(done.map(drop)?),
    }
}

/// The kernel looks at a disk again by itself when its last writer closes it.
pub(crate) fn reread_table(_: &File) -> io::Result<()> {
    Ok(())
}

/// Nothing: what is read past the cache leaves nothing there, and there is no call that drops the rest.
pub(crate) fn forget_cached(_: &File, _offset: u64, _len: u64) {}

/// Size and sectors of a disk.
pub(crate) fn geometry(file: &File) -> io::Result<Geometry> {
    let fd = file.as_raw_fd();
    let (mut sector, mut count, mut writable, mut physical) = (0, 0, 0, 0);
    // SAFETY: each call fills one integer of the type that its request is defined with.
    unsafe {
        ioctl::dkiocgetblocksize(fd, &raw mut sector)?;
        ioctl::dkiocgetblockcount(fd, &raw mut count)?;
        ioctl::dkiociswritable(fd, &raw mut writable)?;
    }
    // SAFETY: as above.
    match unsafe { ioctl::dkiocgetphysicalblocksize(fd, &raw mut physical) } {
        Ok(_) => {}
        Err(Errno::ENOTSUP | Errno::ENOTTY) => physical = sector,
        Err(errno) => return Err(errno.into()),
    }
    let size = count.checked_mul(u64::from(sector));
    Ok(Geometry {
        size: size.ok_or(io::ErrorKind::FileTooLarge)?,
        logical_sector: sector,
        physical_sector: physical,
        is_block_device: true,
        read_only: writable == 0,
    })
}

/// No file says.
pub(crate) fn file_dio_align(_: &File) -> Option<u32> {
    None
}

/// Discards `[start, length]`, both in bytes.
pub(crate) fn discard(file: &File, range: [u64; 2]) -> io::Result<()> {
    let request = Unmap {
        extents: &raw const range,
        count: 1,
        options: 0,
    };
    // SAFETY: the request reads one struct, and through its pointer `count` pairs of offset and length
    // in bytes (`dk_extent_t`); both outlive the call.
    unsafe { ioctl::dkiocunmap(file.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// Nothing tells whether a device takes discards.
pub(crate) fn can_discard(_: &File) -> bool {
    true
}

/// No device can be told to write zeros by itself.
pub(crate) fn zero_out(_: &File, _range: [u64; 2]) -> io::Result<()> {
    Err(Errno::EOPNOTSUPP.into())
}

/// Makes a range of a file read as zeros (fcntl(2), `F_PUNCHHOLE`), where the filesystem can do that and the
/// range consists of whole blocks of it.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let hole = libc::fpunchhole_t {
        fp_flags: 0,
        reserved: 0,
        fp_offset: offset,
        fp_length: len,
    };
    // SAFETY: the request reads one struct, which outlives the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_PUNCHHOLE, &raw const hole) };
    match Errno::result(done).map_err(io::Error::from) {
        Err(error) if output::is_no_such_request(&error) => Err(Errno::EOPNOTSUPP.into()),
        other => other.map(drop),
    }
}
