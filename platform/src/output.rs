//! Where an image is written: appended to, and never visible under its name before it is whole.
//!
//! A regular file is born without a name (`O_TMPFILE`) where the filesystem can do that, else as an
//! exclusive part file beside its name; [`Output::publish`] flushes it, gives it its name and flushes
//! the folder. Dropped before that, nothing stays. Anything else that exists (a pipe, a character
//! device, standard output) is a stream: written in order, never renamed, removed or read back.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::node::Node;
use crate::os::{self, linux_only};
use crate::stream::Writer;

/// Alignment of the writes that go past the page cache, in bytes.
const DIRECT_ALIGN: usize = 4096;

/// Space asked for ahead of the writes, in bytes: extending a file by direct writes alone would
/// change its size, and so its metadata, with every write.
const AHEAD: u64 = 64 << 20;

/// Mode of everything made: an image holds all that its source held.
const MODE: u32 = 0o600;

/// An image being written.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    kind: Kind,
    written: u64,
}

#[derive(Debug)]
enum Kind {
    Stream(Writer),
    Image(ImageFile),
}

#[derive(Debug)]
struct ImageFile {
    plain: File,
    direct: Option<File>,
    /// The part file's name; `None` while the file has no name at all.
    part: Option<PathBuf>,
    replace: bool,
    allocated: u64,
    /// Whether the filesystem takes `fallocate`; off for good after the first refusal.
    can_allocate: bool,
}

impl Output {
    /// Standard output, as a stream.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated.
    pub fn stdout() -> Result<Self> {
        let path = PathBuf::from("(standard output)");
        Ok(Self::stream(path, Writer::stdout()?))
    }

    fn stream(path: PathBuf, writer: Writer) -> Self {
        Self {
            path,
            kind: Kind::Stream(writer),
            written: 0,
        }
    }

    /// Begins the output at `path`. With `replace`, an existing regular file makes place when the new
    /// one is whole, not before.
    ///
    /// # Errors
    /// `AlreadyExists` for an existing regular file without `replace`; `InvalidInput` for a block
    /// device or folder; `WouldBlock` for a pipe that nobody reads yet; else what the kernel says.
    pub fn create(path: &Path, replace: bool) -> Result<Self> {
        let fail = |source| Error::new("cannot create", path, source);
        // By its node: the character device of a macOS disk is one, too.
        let is_disk = || Node::of(path).is_ok_and(|node| node.block_device().is_some());
        match std::fs::metadata(path) {
            Ok(existing) if existing.is_file() => {
                if !replace {
                    return Err(fail(io::ErrorKind::AlreadyExists.into()));
                }
            }
            Ok(existing) if existing.is_dir() || is_disk() => {
                return Err(fail(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "an image is written to a file or a pipe, not to a folder or a block device",
                )));
            }
            Ok(_) => {
                return Ok(Self::stream(path.to_owned(), Writer::open(path)?));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail(error)),
        }
        // A symbolic link is followed, so that it is the file behind it that is replaced.
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let (plain, part) =
            new_file(&path).map_err(|source| Error::new("cannot create", &path, source))?;
        let direct = os::output::reopen_direct(&plain);
        Ok(Self {
            path,
            kind: Kind::Image(ImageFile {
                plain,
                direct,
                part,
                replace,
                allocated: 0,
                can_allocate: true,
            }),
            written: 0,
        })
    }

    /// Where it goes, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The part file, if the output has a name before it is whole.
    pub fn part_file(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Image(image) => image.part.as_deref(),
            Kind::Stream(_) => None,
        }
    }

    /// Whether it is written in order only and cannot be read back.
    pub fn is_stream(&self) -> bool {
        matches!(self.kind, Kind::Stream(_))
    }

    /// Bytes appended so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// The device that holds the output's bytes (`st_dev`), where it is a file.
    ///
    /// # Errors
    /// What `fstat(2)` says.
    pub fn containing_device(&self) -> Result<Option<u64>> {
        match &self.kind {
            Kind::Stream(_) => Ok(None),
            Kind::Image(image) => {
                let metadata = image.plain.metadata();
                metadata
                    .map(|metadata| Some(metadata.dev()))
                    .map_err(|source| Error::new("cannot examine", &self.path, source))
            }
        }
    }

    /// Appends the front of `buf`, and returns how much of it: all of it to a file, past the page
    /// cache when `buf` and the position are aligned; what there is room for to a stream, and nothing
    /// if there was no room within `patience`.
    ///
    /// # Errors
    /// What `write(2)` says: no space, a broken pipe, a size limit.
    pub fn append_within(&mut self, buf: &[u8], patience: Duration) -> Result<usize> {
        let count = match &mut self.kind {
            Kind::Stream(writer) => writer.write_within(buf, patience)?,
            Kind::Image(image) => {
                let done = image.write_at(buf, self.written);
                done.map_err(|source| Error::new("cannot write", &self.path, source))?;
                buf.len()
            }
        };
        self.written += count as u64;
        Ok(count)
    }

    /// Reads back what was appended, while the output is still being made.
    ///
    /// # Errors
    /// `Unsupported` for a stream, else what `pread(2)` says.
    pub fn read_back(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let fail = |source| Error::new("cannot read back", &self.path, source);
        match &self.kind {
            Kind::Stream(_) => Err(fail(io::ErrorKind::Unsupported.into())),
            Kind::Image(image) => image.plain.read_exact_at(buf, offset).map_err(fail),
        }
    }

    /// Flushes the whole output, gives it its name, and flushes the folder. A stream is flushed only.
    ///
    /// # Errors
    /// What the kernel says; `AlreadyExists` if somebody took the name meanwhile. The output then
    /// is gone, as if it had been dropped.
    pub fn publish(mut self) -> Result<()> {
        let path = self.path.clone();
        match &mut self.kind {
            Kind::Stream(writer) => match writer.sync() {
                // Pipes and most character devices have nothing to flush.
                Err(error) if is_not_flushable(&error) => Ok(()),
                other => other,
            },
            Kind::Image(image) => image.publish(&path, self.written),
        }
        .map_err(|source| Error::new("cannot complete", &path, source))
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Stream(writer) => writer.as_fd(),
            Kind::Image(image) => image.plain.as_fd(),
        }
    }
}

impl ImageFile {
    fn write_at(&mut self, buf: &[u8], at: u64) -> io::Result<()> {
        self.allocate(at + buf.len() as u64)?;
        let aligned = at.is_multiple_of(DIRECT_ALIGN as u64)
            && buf.len().is_multiple_of(DIRECT_ALIGN)
            && (buf.as_ptr() as usize).is_multiple_of(DIRECT_ALIGN);
        match &self.direct {
            Some(direct) if aligned => direct.write_all_at(buf, at),
            _ => self.plain.write_all_at(buf, at),
        }
    }

    /// Asks for space up to `end` and some more, without changing the size. A full disk is left for
    /// the write itself to report: it may still have room for just the last bytes.
    fn allocate(&mut self, end: u64) -> io::Result<()> {
        if end <= self.allocated || !self.can_allocate {
            return Ok(());
        }
        let (Ok(from), Ok(len)) = (
            i64::try_from(self.allocated),
            i64::try_from(end - self.allocated + AHEAD),
        ) else {
            return Err(io::ErrorKind::FileTooLarge.into());
        };
        match os::output::allocate(&self.plain, from, len) {
            Ok(()) => self.allocated = end + AHEAD,
            Err(_) => self.can_allocate = false,
        }
        Ok(())
    }

    fn publish(&mut self, path: &Path, written: u64) -> io::Result<()> {
        // Cuts off what was allocated ahead.
        self.plain.set_len(written)?;
        os::output::sync(&self.plain)?;
        let part = match self.part.take() {
            Some(part) => part,
            None if !self.replace => {
                link_nameless(&self.plain, path)?;
                return sync_folder(path);
            }
            // linkat(2) cannot replace a file: the nameless one gets a part name, then that is renamed.
            None => {
                let part = part_name(path);
                link_nameless(&self.plain, &part)?;
                part
            }
        };
        let named = if self.replace {
            std::fs::rename(&part, path)
        } else {
            rename_new(&part, path)
        };
        if named.is_err() {
            let _ = std::fs::remove_file(&part);
        }
        named?;
        sync_folder(path)
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        if let Some(part) = &self.part
            && let Err(error) = std::fs::remove_file(part)
        {
            log::warn!("cannot remove {}: {error}", part.display());
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// A new file without a name in the folder of `path`, or else an exclusive part file.
fn new_file(path: &Path) -> io::Result<(File, Option<PathBuf>)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(MODE);
    match linux_only::open_nameless(&options, folder_of(path)) {
        Ok(file) => Ok((file, None)),
        // Old kernels answer EISDIR, filesystems without it EOPNOTSUPP (FAT, NFS, some FUSE).
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)
            ) && folder_of(path).is_dir() =>
        {
            let part = part_name(path);
            let file = options.create_new(true).open(&part)?;
            Ok((file, Some(part)))
        }
        Err(error) => Err(error),
    }
}

/// The part file that an output at `path` will have from its start, if any: `.NAME.PID.part` beside
/// it, where the filesystem has no files without a name. To be written down before it is made.
pub fn part_file_of(path: &Path) -> Option<PathBuf> {
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return None;
    }
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut options = OpenOptions::new();
    options.write(true).mode(MODE);
    match linux_only::open_nameless(&options, folder_of(&path)) {
        Ok(_) => None,
        Err(_) => Some(part_name(&path)),
    }
}

/// How much of an output's name its part file has, in bytes: so it is no longer than the shortest limit of
/// a filesystem for names (143), whatever the output is called.
const PART_OF_NAME: usize = 100;

/// `.NAME.PID.part` beside `path`; of a long name only the beginning.
fn part_name(path: &Path) -> PathBuf {
    let whole = path.file_name().unwrap_or(OsStr::new("image")).as_bytes();
    let mut len = whole.len().min(PART_OF_NAME);
    // Not in the midst of a character of UTF-8: some filesystems take no half ones.
    while len > 1 && whole.get(len).is_some_and(|byte| byte & 0xc0 == 0x80) {
        len -= 1;
    }
    let mut name = OsString::from(".");
    name.push(OsStr::from_bytes(whole.get(..len).unwrap_or_default()));
    name.push(format!(".{}.part", std::process::id()));
    path.with_file_name(name)
}

fn link_nameless(file: &File, path: &Path) -> io::Result<()> {
    use nix::fcntl::{AT_FDCWD, AtFlags};
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    nix::unistd::linkat(
        AT_FDCWD,
        own.as_str(),
        AT_FDCWD,
        path,
        AtFlags::AT_SYMLINK_FOLLOW,
    )?;
    Ok(())
}

/// Renames without replacing. Where the filesystem cannot promise that, a hard link can.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match os::output::rename_new(from, to) {
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) => {
            // Nothing of that kind here (NFS, old FAT): the check before the rename leaves a gap of
            // microseconds, which a second writer of the same name would have to hit.
            if to.exists() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            std::fs::rename(from, to)
        }
        other => Ok(other?),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    match File::open(folder_of(path))?.sync_all() {
        // Some network filesystems cannot flush a folder.
        Err(error) if is_not_flushable(&error) => Ok(()),
        other => other,
    }
}

fn is_not_flushable(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EROFS | libc::EOPNOTSUPP)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Buffer;

    const SOON: Duration = Duration::from_secs(1);

    #[test]
    fn nothing_has_a_name_before_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut output = Output::create(&path, false).unwrap();
        let mut block = Buffer::new(8192);
        block.fill(7);
        output.append_within(&block, SOON).unwrap();
        output.append_within(b"tail", SOON).unwrap();
        let mut back = [0; 5];
        output.read_back(&mut back, 8191).unwrap();
        assert_eq!(&back, b"\x07tail");
        assert!(!path.exists());
        output.publish().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 8196);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_dropped_output_leaves_nothing_and_an_old_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "old").unwrap();
        let error = Output::create(&path, false).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AlreadyExists);
        let mut output = Output::create(&path, true).unwrap();
        output.append_within(b"new", SOON).unwrap();
        drop(output);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        let mut output = Output::create(&path, true).unwrap();
        output.append_within(b"new", SOON).unwrap();
        output.publish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_part_file_is_exclusive_and_goes_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let part = part_name(&path);
        std::fs::write(&part, "x").unwrap();
        std::fs::write(&path, "taken").unwrap();
        assert!(rename_new(&part, &path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"taken");
    }

    #[test]
    fn a_full_device_says_so() {
        let mut output = Output::create(Path::new("/dev/full"), false).unwrap();
        assert!(output.is_stream());
        let error = output.append_within(b"x", SOON).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
    }
}
