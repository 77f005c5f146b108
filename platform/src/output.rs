//! Where an image is written: appended to, and never visible under its name before it is whole.
//!
//! A regular file is born without a name (`O_TMPFILE`) where the filesystem can do that, else as an
//! exclusive part file beside its name; [`Output::publish`] flushes it, gives it its name and flushes
//! the folder. Dropped before that, nothing stays. The folder is looked up once, in a [`Slot`], and held:
//! whoever puts another one in its place meanwhile changes nothing. Anything else that exists (a pipe, a character
//! device, standard output) is a stream: written in order, never renamed, removed or read back.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::extents_below::Extents;
use crate::located::{Folder, Located, id_of};
use crate::node::{FileId, Kind as NodeKind};
use crate::os;
use crate::stream::Writer;

/// Alignment of the writes that go past the page cache, in bytes.
const DIRECT_ALIGN: usize = 4096;

/// Space asked for ahead of the writes, in bytes: extending a file by direct writes alone would
/// change its size, and so its metadata, with every write.
const AHEAD: u64 = 64 << 20;

/// Characters of a file's name that the name of its part file repeats: that must not become too long.
const REPEATED: usize = 50;

/// Where an output will be: looked up once, and nothing is made yet.
#[derive(Debug)]
pub struct Slot {
    located: Located,
    part: OsString,
}

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
    folder: Folder,
    /// The name it will have.
    name: OsString,
    /// The part file's name; `None` while the file has no name at all.
    part: Option<OsString>,
    /// The name of a part file to be, should one be needed.
    spare: OsString,
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

    /// Begins the output at `path`: a [`Slot`] that is used at once.
    ///
    /// # Errors
    /// As [`Slot::of`] and [`Slot::create`].
    pub fn create(path: &Path, replace: bool) -> Result<Self> {
        Slot::of(path)?.create(replace)
    }

    /// Where it goes, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file the part file is, if the output has a name before it is whole.
    ///
    /// # Errors
    /// What `fstat(2)` says.
    pub fn part_file(&self) -> Result<Option<FileId>> {
        match &self.kind {
            Kind::Image(image) if image.part.is_some() => id_of(&image.plain)
                .map(Some)
                .map_err(|source| Error::new("cannot examine", &self.path, source)),
            _ => Ok(None),
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
        let (folder, name) = (&self.folder, &self.name);
        match self.part.take() {
            None if !self.replace => folder.link(&self.plain, name)?,
            part => {
                let part = match part {
                    Some(part) => part,
                    // linkat(2) cannot replace a file: the nameless one gets a part name, then that is
                    // renamed.
                    None => {
                        folder.link(&self.plain, &self.spare)?;
                        self.spare.clone()
                    }
                };
                let named = if self.replace {
                    folder.rename(&part, name)
                } else {
                    folder.rename_new(&part, name)
                };
                if named.is_err() {
                    self.remove(&part);
                }
                named?;
            }
        }
        match folder.sync() {
            // Some network filesystems cannot flush a folder.
            Err(error) if is_not_flushable(&error) => {}
            other => other?,
        }
        let now = Located::of(path).is_ok_and(|now| now.is_in(folder, name));
        match (now, folder.path()) {
            (true, _) => Ok(()),
            (false, Ok(elsewhere)) => Err(io::Error::other(format!(
                "its folder was replaced meanwhile, and the image is complete in {}",
                elsewhere.join(name).display()
            ))),
            (false, Err(error)) => Err(error.source),
        }
    }

    /// Removes a part file, unless its name is somebody else's by now.
    fn remove(&self, part: &OsStr) {
        let removed =
            id_of(&self.plain).and_then(|own| self.folder.remove(part, |found| found == own));
        if let Err(error) = removed {
            log::warn!("cannot remove {}: {error}", part.display());
        }
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        if let Some(part) = self.part.take() {
            self.remove(&part);
        }
    }
}

impl Slot {
    /// Looks up where an output would go.
    ///
    /// # Errors
    /// `InvalidInput` for a block device, a folder, and what is missing among devices; else as
    /// [`Located::of`].
    pub fn of(path: &Path) -> Result<Self> {
        let located = Located::of(path)?;
        match located.node().map(|node| node.kind) {
            None => located.refuse_among_devices()?,
            Some(NodeKind::Directory | NodeKind::Block(_)) => {
                let why =
                    "an image is written to a file or a pipe, not to a folder or a block device";
                let source = io::Error::new(io::ErrorKind::InvalidInput, why);
                return Err(Error::new("cannot create", path, source));
            }
            Some(_) => {}
        }
        let part = part_name(located.name());
        Ok(Self { located, part })
    }

    /// Whether a regular file is there, which would be replaced.
    pub fn exists(&self) -> bool {
        let node = self.located.node();
        node.is_some_and(|node| node.kind == NodeKind::Regular)
    }

    /// Whether the output becomes a regular file, not a stream.
    pub fn is_file(&self) -> bool {
        let node = self.located.node();
        node.is_none_or(|node| node.kind == NodeKind::Regular)
    }

    /// The bytes that are there.
    ///
    /// # Errors
    /// As [`Extents::of_node`].
    pub fn extents(&self) -> Result<Extents> {
        let node = self.located.node();
        node.map_or(Ok(Extents::default()), Extents::of_node)
    }

    /// The folder it is in.
    pub fn folder(&self) -> &Folder {
        self.located.folder()
    }

    /// The name of the part file that the output will have from its start, if any: beside it, where the
    /// filesystem has no files without a name. To be written down before it is made. Nobody can guess it.
    pub fn part_file(&self) -> Option<&OsStr> {
        let is_stream = !self.exists() && self.located.node().is_some();
        let needs_one = !is_stream && self.folder().create_nameless().is_err();
        needs_one.then_some(&self.part)
    }

    /// Begins the output. With `replace`, an existing regular file makes place when the new one is whole,
    /// not before.
    ///
    /// # Errors
    /// `AlreadyExists` for an existing regular file without `replace`; `WouldBlock` for a pipe that nobody
    /// reads yet; else what the kernel says.
    pub fn create(&self, replace: bool) -> Result<Output> {
        let path = self.located.path();
        let fail = |source| Error::new("cannot create", path, source);
        if self.exists() && !replace {
            return Err(fail(io::ErrorKind::AlreadyExists.into()));
        }
        if !self.exists() && self.located.node().is_some() {
            return Ok(Output::stream(path.to_owned(), Writer::at(&self.located)?));
        }
        let (plain, part) = self.new_file().map_err(fail)?;
        let image = ImageFile {
            direct: os::output::reopen_direct(&plain),
            plain,
            folder: self.folder().try_clone().map_err(fail)?,
            name: self.located.name().to_owned(),
            part,
            spare: self.part.clone(),
            replace,
            allocated: 0,
            can_allocate: true,
        };
        Ok(Output {
            path: path.to_owned(),
            kind: Kind::Image(image),
            written: 0,
        })
    }

    /// A new file without a name, or else an exclusive part file.
    fn new_file(&self) -> io::Result<(File, Option<OsString>)> {
        match self.folder().create_nameless() {
            Ok(file) => Ok((file, None)),
            // Old kernels answer EISDIR, filesystems without it EOPNOTSUPP (FAT, NFS, some FUSE).
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)
                ) =>
            {
                let file = self.folder().create(&self.part)?;
                Ok((file, Some(self.part.clone())))
            }
            Err(error) => Err(error),
        }
    }
}

/// `.NAME.RANDOM.part`: by a name that can be foreseen, somebody else's file could be taken for ours.
fn part_name(name: &OsStr) -> OsString {
    let name: String = name.to_string_lossy().chars().take(REPEATED).collect();
    let random = RandomState::new().build_hasher().finish();
    format!(".{name}.{random:016x}.part").into()
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
    fn a_part_file_replaces_nobody_and_is_removed_only_while_it_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let slot = Slot::of(&path).unwrap();
        let folder = slot.folder();
        let file = folder.create(&slot.part).unwrap();
        std::fs::write(&path, "taken").unwrap();
        assert!(folder.rename_new(&slot.part, OsStr::new("image")).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"taken");
        let part = dir.path().join(&slot.part);
        std::fs::remove_file(&part).unwrap();
        std::fs::write(&part, "somebody else's").unwrap();
        let own = id_of(&file).unwrap();
        assert!(!folder.remove(&slot.part, |found| found == own).unwrap());
        assert!(part.exists());
    }

    /// Also where there are no files without a name.
    #[test]
    fn the_image_goes_to_the_folder_that_was_looked_up() {
        for (has_name, replace) in [(false, false), (false, true), (true, false), (true, true)] {
            let dir = tempfile::tempdir().unwrap();
            let [folder, moved, other] = ["folder", "moved", "other"].map(|n| dir.path().join(n));
            std::fs::create_dir(&folder).unwrap();
            std::fs::create_dir(&other).unwrap();
            let path = folder.join("image");
            let slot = Slot::of(&path).unwrap();
            let mut output = slot.create(replace).unwrap();
            if let (Kind::Image(image), true) = (&mut output.kind, has_name) {
                image.plain = slot.folder().create(&slot.part).unwrap();
                image.direct = None;
                image.part = Some(slot.part.clone());
            }
            output.append_within(b"x", SOON).unwrap();
            std::fs::rename(&folder, &moved).unwrap();
            std::os::unix::fs::symlink(&other, &folder).unwrap();
            let error = output.publish().unwrap_err().to_string();
            assert!(error.contains("moved/image"), "{error}");
            assert_eq!(std::fs::read(moved.join("image")).unwrap(), b"x");
            assert_eq!(std::fs::read_dir(&moved).unwrap().count(), 1);
            assert_eq!(std::fs::read_dir(&other).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_full_device_says_so() {
        let mut output = Output::create(Path::new("/dev/full"), false).unwrap();
        assert!(output.is_stream());
        let error = output.append_within(b"x", SOON).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
    }
}
