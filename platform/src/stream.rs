//! Pipes, sockets and terminals, whose other end may keep us waiting for ever.
//!
//! A `read(2)` or `write(2)` that waits is simply started again after a signal, so a run that waits
//! would never see that it was asked to stop. Here waiting is `poll(2)` with a limit, and the call
//! itself does not wait.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Context, Error, Result};
use crate::located::Located;
use crate::node::Kind;

/// Bytes that a pipe or socket with any room at all takes at once (`PIPE_BUF`, pipe(7)).
const ANY_ROOM: usize = libc::PIPE_BUF;

/// Waits until something can be read, or written; `false` if that was not so within `patience`.
fn is_ready(fd: BorrowedFd<'_>, events: PollFlags, patience: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd, events)], timeout) {
        Ok(count) => Ok(count > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// "Not now" is no failure.
fn some(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        },
    }
}

/// Something that is read in order: a stream or a file.
#[derive(Debug)]
pub struct Reader(File);

impl Reader {
    /// Standard input.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated.
    pub fn stdin() -> Result<Self> {
        let fd = io::stdin().as_fd().try_clone_to_owned();
        let fd = fd.context("cannot read", "(standard input)")?;
        Ok(Self(File::from(fd)))
    }

    /// What is open already.
    pub(crate) fn of(file: File) -> Self {
        Self(file)
    }

    /// Opens a file or pipe, without waiting for a writer.
    ///
    /// # Errors
    /// What `open(2)` says.
    pub fn open(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .context("cannot open", path)?;
        Ok(Self(file))
    }

    /// Reads what is there; 0 bytes at the end. `None` if nothing came within `patience`.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn read_within(&mut self, buf: &mut [u8], patience: Duration) -> io::Result<Option<usize>> {
        if !is_ready(self.0.as_fd(), PollFlags::POLLIN, patience)? {
            return Ok(None);
        }
        some(self.0.read(buf))
    }
}

/// A stream that is written in order.
#[derive(Debug)]
pub struct Writer {
    file: File,
    path: PathBuf,
    /// Most bytes of one write that does not wait once there is room at all.
    turn: usize,
}

impl Writer {
    /// Standard output.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated or examined.
    pub fn stdout() -> Result<Self> {
        let path = PathBuf::from("(standard output)");
        let fd = io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot write to", &path)?;
        let file = File::from(fd);
        let kind = file
            .metadata()
            .context("cannot examine", &path)?
            .file_type();
        if !kind.is_fifo() {
            // A tape takes each write as one record: those are not cut.
            let turn = if kind.is_socket() {
                ANY_ROOM
            } else {
                usize::MAX
            };
            return Ok(Self { file, path, turn });
        }
        // O_NONBLOCK belongs to the open file, which others may share; this makes one of our own.
        let own = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(match own {
            Ok(own) => Self {
                file: own,
                path,
                turn: usize::MAX,
            },
            Err(_) => Self {
                file,
                path,
                turn: ANY_ROOM,
            },
        })
    }

    /// Opens a pipe or character device. A pipe that nobody reads yet is not waited for.
    ///
    /// # Errors
    /// `WouldBlock` for a pipe that nobody reads (yet); else what `open(2)` says.
    pub fn open(path: &Path) -> Result<Self> {
        Self::at(&Located::of(path)?)
    }

    /// The same for what was looked up before.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn at(located: &Located) -> Result<Self> {
        let path = located.path();
        let mut options = OpenOptions::new();
        options.write(true);
        if located.node().is_some_and(|node| node.kind == Kind::Fifo) {
            options.custom_flags(libc::O_NONBLOCK);
        }
        let file = located.open(&options).map_err(|error| match error.errno() {
            Some(libc::ENXIO) => Error::new("cannot open", path, io::ErrorKind::WouldBlock),
            _ => error,
        });
        Ok(Self {
            file: file?,
            path: path.to_owned(),
            turn: usize::MAX,
        })
    }

    /// Writes what there is room for; 0 bytes if there was none within `patience`.
    ///
    /// # Errors
    /// What `write(2)` says: a broken pipe, no space.
    pub fn write_within(&mut self, buf: &[u8], patience: Duration) -> Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let fail = |source| Error::new("cannot write", &self.path, source);
        if !is_ready(self.file.as_fd(), PollFlags::POLLOUT, patience).map_err(fail)? {
            return Ok(0);
        }
        let turn = buf.len().min(self.turn);
        match some(self.file.write(&buf[..turn])).map_err(fail)? {
            Some(0) => Err(fail(io::ErrorKind::WriteZero.into())),
            Some(count) => Ok(count),
            None => Ok(0),
        }
    }

    /// Brings what was written to stable storage, where the stream has any.
    ///
    /// # Errors
    /// What `fsync(2)` says.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl AsFd for Writer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{run, scratch};

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn neither_end_of_a_pipe_waits_for_the_other() {
        let dir = scratch();
        let path = dir.path().join("pipe");
        run("mkfifo", [&path]);
        let error = Writer::open(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let mut reader = Reader::open(&path).unwrap();
        let mut buf = [0; 8];
        // Nobody has opened it for writing yet: not its end.
        assert_eq!(reader.read_within(&mut buf, SHORT).unwrap(), None);
        let mut writer = Writer::open(&path).unwrap();
        assert_eq!(reader.read_within(&mut buf, SHORT).unwrap(), None);
        assert_eq!(writer.write_within(b"abc", SHORT).unwrap(), 3);
        assert_eq!(reader.read_within(&mut buf, SHORT).unwrap(), Some(3));
        assert_eq!(&buf[..3], b"abc");
        // More than there is room for goes as far as it can.
        let many = vec![7; 1 << 20];
        let mut written = 0;
        loop {
            match writer.write_within(&many, SHORT).unwrap() {
                0 => break,
                count => written += count,
            }
        }
        assert!(written >= 4096 && written < many.len(), "{written}");
        drop(writer);
        let mut read = 0;
        let mut buf = vec![0; 1 << 16];
        loop {
            match reader.read_within(&mut buf, SHORT).unwrap() {
                Some(0) => break,
                Some(count) => read += count,
                None => panic!("it has ended"),
            }
        }
        assert_eq!(read, written);
    }

    #[test]
    fn a_reader_that_went_away_is_a_broken_pipe() {
        let dir = scratch();
        let path = dir.path().join("pipe");
        run("mkfifo", [&path]);
        let reader = Reader::open(&path).unwrap();
        let mut writer = Writer::open(&path).unwrap();
        drop(reader);
        let error = writer.write_within(b"x", SHORT).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn files_and_devices_never_wait() {
        let dir = scratch();
        let path = dir.path().join("file");
        std::fs::write(&path, "content").unwrap();
        let mut reader = Reader::open(&path).unwrap();
        let mut buf = [0; 16];
        assert_eq!(reader.read_within(&mut buf, SHORT).unwrap(), Some(7));
        assert_eq!(reader.read_within(&mut buf, SHORT).unwrap(), Some(0));
        let mut null = Writer::open(Path::new("/dev/null")).unwrap();
        assert_eq!(null.write_within(&[0; 100_000], SHORT).unwrap(), 100_000);
        let mut full = Writer::open(Path::new("/dev/full")).unwrap();
        let error = full.write_within(b"x", SHORT).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
