//! Devices and raw files: geometry, and positioned I/O past the page cache.
//!
//! A [`Disk`] is a block device or a regular file that holds a raw disk. Reads and writes go by
//! `O_DIRECT` wherever offset, length and memory are aligned to what the device asks for; the odd
//! rest (the last partial unit of a file, a superblock at byte 1024) goes through an aligned bounce
//! buffer when reading, and through a second, buffered descriptor when writing. Where the
//! filesystem refuses `O_DIRECT`, all goes buffered, and read pages are dropped from the cache again. On
//! macOS a disk's character device and `F_NOCACHE` do the same.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::buffer::Buffer;
use crate::error::{Context, Error, Result};
use crate::located::{Located, id_of};
use crate::node::FileId;
use crate::os;

/// Largest piece read through a bounce buffer at once, in bytes.
const BOUNCE: usize = 1 << 20;

/// Alignment assumed for direct I/O on a regular file whose filesystem does not say, in bytes.
const FILE_ALIGN: u32 = 4096;

/// Size and sectors of a device or raw file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes.
    pub size: u64,
    /// Smallest unit the device can address, in bytes; 512 for a regular file.
    pub logical_sector: u32,
    /// Unit it writes without reading first, in bytes; 512 for a regular file.
    pub physical_sector: u32,
    /// Whether it is a block device, not a regular file.
    pub is_block_device: bool,
    /// Whether the device refuses to be written (`blockdev --setro`, a write-protected medium).
    pub read_only: bool,
}

/// What a [`Disk`] is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// An open block device or raw file.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    plain: File,
    /// A second descriptor with `O_DIRECT`, where the filesystem grants it.
    direct: Option<File>,
    align: u32,
    geometry: Geometry,
    /// Sectors that were read past the page cache, a lower bound.
    read: AtomicU64,
}

impl Disk {
    /// Opens a block device or regular file. Nothing is created or locked.
    ///
    /// # Errors
    /// What `open(2)` says; `InvalidInput` if it is neither a block device nor a regular file.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let fail = |source| Error::new("cannot open", path, source);
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::ReadWrite);
        // O_NONBLOCK: opening a FIFO by mistake must not wait for a writer.
        let plain = options
            .custom_flags(libc::O_NONBLOCK)
            .open(os::device::node_to_open(path))
            .map_err(fail)?;
        let geometry = geometry(&plain, path)?;
        let direct = os::device::open_direct(&plain, path, &mut options);
        Ok(Self::opened(path, plain, direct, geometry))
    }

    /// Opens what was looked up before, whatever has its name now.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn at(located: &Located, access: Access) -> Result<Self> {
        let path = located.path();
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::ReadWrite);
        let plain = located.open(options.clone().custom_flags(libc::O_NONBLOCK))?;
        let geometry = geometry(&plain, path)?;
        let direct = os::device::open_direct(&plain, path, &mut options);
        Ok(Self::opened(path, plain, direct, geometry))
    }

    /// A regular file that is open for reading and writing.
    ///
    /// # Errors
    /// If it cannot be examined.
    pub fn of_file(file: File, path: &Path) -> Result<Self> {
        let geometry = geometry(&file, path)?;
        let mut options = OpenOptions::new();
        let direct = os::device::open_direct(&file, path, options.read(true).write(true));
        Ok(Self::opened(path, file, direct, geometry))
    }

    /// Which file is open.
    ///
    /// # Errors
    /// What `fstat(2)` says.
    pub fn file_id(&self) -> io::Result<FileId> {
        id_of(&self.plain)
    }

    /// Whether [`discard_all`](Self::discard_all) can work, found out without changing anything.
    pub fn can_discard(&self) -> bool {
        match self.geometry.is_block_device {
            true => os::device::can_discard(&self.plain),
            // Past the end there is nothing to lose.
            false => os::device::punch_hole(&self.plain, self.geometry.size, 1 << 16).is_ok(),
        }
    }

    /// From what is open already.
    pub(crate) fn opened(
        path: &Path,
        plain: File,
        direct: Option<File>,
        geometry: Geometry,
    ) -> Self {
        let align = if geometry.is_block_device {
            geometry.logical_sector
        } else {
            os::device::file_dio_align(&plain).unwrap_or(FILE_ALIGN)
        };
        Self {
            path: path.to_owned(),
            plain,
            direct,
            align,
            geometry,
            read: AtomicU64::new(0),
        }
    }

    /// The same once more, opened for the same.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn try_clone(&self) -> Result<Self> {
        let again = |file: &File| file.try_clone().context("cannot open", &self.path);
        Ok(Self {
            path: self.path.clone(),
            plain: again(&self.plain)?,
            direct: self.direct.as_ref().map(again).transpose()?,
            align: self.align,
            geometry: self.geometry,
            read: AtomicU64::new(0),
        })
    }

    /// Size and sectors when it was opened.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many sectors of 512 bytes were read from here past the page cache, at least: what the
    /// device's own counters must have grown by.
    pub fn sectors_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Whether reads and writes go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Fills `buf` from byte `offset`. Past the page cache if offset, length and address of `buf` are
    /// aligned; else through a bounce buffer, equally past the cache.
    ///
    /// # Errors
    /// `UnexpectedEof` if the device ends before, else what `pread(2)` says.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let fail = |source| Error::new("cannot read", &self.path, source);
        let Some(direct) = &self.direct else {
            self.plain.read_exact_at(buf, offset).map_err(fail)?;
            os::device::forget_cached(&self.plain, offset, buf.len() as u64);
            return Ok(());
        };
        if self.is_aligned(buf, offset) {
            direct.read_exact_at(buf, offset).map_err(fail)?;
            let sectors = buf.len() as u64 / 512;
            self.read.fetch_add(sectors, Ordering::Relaxed);
            return Ok(());
        }
        self.read_bounced(direct, buf, offset).map_err(fail)
    }

    fn read_bounced(&self, direct: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let align = u64::from(self.align);
        let mut bounce = Buffer::try_new((buf.len() + 2 * self.align as usize).min(BOUNCE))
            .map_err(|error| error.source)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let start = at - at % align;
            let skip = (at - start) as usize;
            let wanted = (skip + buf.len() - done)
                .next_multiple_of(self.align as usize)
                .min(bounce.len() - bounce.len() % self.align as usize);
            let got = read_some(direct, &mut bounce[..wanted], start)?;
            if got <= skip {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let take = (got - skip).min(buf.len() - done);
            buf[done..done + take].copy_from_slice(&bounce[skip..skip + take]);
            done += take;
        }
        Ok(())
    }

    /// Writes all of `buf` at byte `offset`; see the module's text for what goes direct.
    ///
    /// # Errors
    /// What `pwrite(2)` says; nothing is known about the range then.
    pub fn write_all_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let fail = |source| Error::new("cannot write", &self.path, source);
        let Some(direct) = &self.direct else {
            return self.plain.write_all_at(buf, offset).map_err(fail);
        };
        // The aligned front goes direct, the odd rest (or a misaligned whole) buffered.
        let unit = self.align as usize;
        let front = if self.is_aligned(&buf[..0], offset) {
            buf.len() - buf.len() % unit
        } else {
            0
        };
        let (aligned, rest) = buf.split_at(front);
        direct.write_all_at(aligned, offset).map_err(fail)?;
        let at = offset + front as u64;
        match self.geometry.is_block_device {
            true => os::device::write_odd(&self.plain, self.align, rest, at),
            false => self.plain.write_all_at(rest, at),
        }
        .map_err(fail)
    }

    /// Makes `[offset, offset + len)` read as zeros, really: by zero-out on a device (the kernel
    /// writes zeros where the device cannot do it by itself), by a hole in a file, or by writing.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn zero_range(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let done = if self.geometry.is_block_device {
            self.block_range(os::device::zero_out, offset, len)
        } else {
            os::device::punch_hole(&self.plain, offset, len)
        };
        match done {
            Err(error) if is_unsupported(&error) => self.write_zeros(offset, len),
            other => other.map_err(|source| Error::new("cannot write zeros", &self.path, source)),
        }
    }

    fn write_zeros(&self, offset: u64, len: u64) -> Result<()> {
        let zeros = Buffer::try_new(BOUNCE)?;
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(BOUNCE as u64);
            self.write_all_at(&zeros[..piece as usize], offset + done)?;
            done += piece;
        }
        Ok(())
    }

    /// Tells the device that nothing in it matters any more. What it reads as afterwards is undefined.
    ///
    /// # Errors
    /// What the kernel says; `Unsupported` if the device cannot discard.
    pub fn discard_all(&self) -> Result<()> {
        let done = if self.geometry.is_block_device {
            self.block_range(os::device::discard, 0, self.geometry.size)
        } else {
            os::device::punch_hole(&self.plain, 0, self.geometry.size)
        };
        done.map_err(|source| Error::new("cannot discard", &self.path, source))
    }

    fn block_range(
        &self,
        call: fn(&File, [u64; 2]) -> io::Result<()>,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        // The range must be whole sectors; an odd rest is refused by the kernel with EINVAL.
        let unit = u64::from(self.geometry.logical_sector);
        if !offset.is_multiple_of(unit) || !len.is_multiple_of(unit) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        call(&self.plain, [offset, len])
    }

    /// The first range of data at or behind `offset`, as `(start, end)`: what lies between is a hole
    /// and reads as zeros. A filesystem or device that cannot tell says that all is data.
    ///
    /// # Errors
    /// What `lseek(2)` says, but for "cannot tell".
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let size = self.geometry.size;
        if offset >= size {
            return Ok(None);
        }
        if self.geometry.is_block_device {
            return Ok(Some((offset, size)));
        }
        let fail = |source| Error::new("cannot look for holes", &self.path, source);
        let start = match seek(&self.plain, offset, libc::SEEK_DATA) {
            Ok(start) => start.min(size),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
            // macOS says ENOTTY where the filesystem cannot tell.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {
                return Ok(Some((offset, size)));
            }
            Err(error) => return Err(fail(error)),
        };
        if start >= size {
            return Ok(None);
        }
        let end = seek(&self.plain, start, libc::SEEK_HOLE).map_err(fail)?;
        Ok(Some((start, end.min(size))))
    }

    /// Brings everything written to stable storage.
    ///
    /// # Errors
    /// What `fsync(2)` says: the device then may have lost writes.
    pub fn sync(&self) -> Result<()> {
        os::device::sync(&self.plain, self.geometry.is_block_device)
            .map_err(|source| Error::new("cannot flush", &self.path, source))
    }

    /// Asks the kernel to read the partition table again. Fails while a partition is in use.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn reread_table(&self) -> Result<()> {
        os::device::reread_table(&self.plain)
            .map_err(|source| Error::new("cannot reread the partition table", &self.path, source))
    }

    fn is_aligned(&self, buf: &[u8], offset: u64) -> bool {
        let unit = u64::from(self.align);
        offset.is_multiple_of(unit)
            && (buf.len() as u64).is_multiple_of(unit)
            && (buf.as_ptr() as u64).is_multiple_of(unit)
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.plain.as_fd()
    }
}

/// Size and sectors of an open device or file.
pub(crate) fn geometry(file: &File, path: &Path) -> Result<Geometry> {
    let fail = |source| Error::new("cannot examine", path, source);
    let metadata = file.metadata().map_err(fail)?;
    if metadata.file_type().is_file() {
        return Ok(Geometry {
            size: metadata.len(),
            logical_sector: 512,
            physical_sector: 512,
            is_block_device: false,
            read_only: false,
        });
    }
    if !os::device::is_device(metadata.file_type()) {
        return Err(fail(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a block device nor a regular file",
        )));
    }
    let geometry = os::device::geometry(file).map_err(fail)?;
    if geometry.logical_sector == 0 || !geometry.logical_sector.is_power_of_two() {
        return Err(fail(io::Error::other("the device has no sane sector size")));
    }
    Ok(geometry)
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: moves only the descriptor's own position, which positioned I/O does not use.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

fn read_some(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buf, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn scratch(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        File::create(&path).unwrap().write_all(bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn odd_offsets_and_lengths_read_what_is_there() {
        let bytes: Vec<u8> = (0..70_001u32).map(|n| (n % 251) as u8).collect();
        let (_dir, path) = scratch(&bytes);
        let disk = Disk::open(&path, Access::Read).unwrap();
        assert_eq!(disk.geometry().size, 70_001);
        for (offset, len) in [
            (0, 70_001),
            (1, 70_000),
            (4095, 2),
            (69_999, 2),
            (1024, 1024),
            (65_536, 4465),
        ] {
            let mut buf = vec![0; len];
            disk.read_exact_at(&mut buf, offset as u64).unwrap();
            assert_eq!(buf, bytes[offset..offset + len], "{offset}+{len}");
        }
        let error = disk.read_exact_at(&mut [0; 2], 70_000).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn odd_writes_and_zeros_land_where_they_should() {
        let (_dir, path) = scratch(&[0xA5; 20_000]);
        let disk = Disk::open(&path, Access::ReadWrite).unwrap();
        let mut aligned = Buffer::new(8192);
        aligned.fill(1);
        disk.write_all_at(&aligned, 4096).unwrap();
        disk.write_all_at(&[2; 10], 19_990).unwrap();
        disk.zero_range(100, 5000).unwrap();
        disk.sync().unwrap();
        let mut expected = vec![0xA5; 20_000];
        expected[4096..12_288].fill(1);
        expected[19_990..].fill(2);
        expected[100..5100].fill(0);
        assert_eq!(std::fs::read(&path).unwrap(), expected);
    }

    #[test]
    fn holes_are_found() {
        let (_dir, path) = scratch(&[]);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 1 << 19).unwrap();
        let disk = Disk::open(&path, Access::Read).unwrap();
        let (start, end) = disk.next_data(0).unwrap().unwrap();
        assert!(start <= 1 << 19 && ((1 << 19) + 4096..=1 << 20).contains(&end));
        assert_eq!(disk.next_data(1 << 20).unwrap(), None);
    }

    #[test]
    fn a_folder_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Disk::open(dir.path(), Access::Read).is_err());
    }
}
