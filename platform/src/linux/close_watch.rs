//! Being told of whoever had a file open for writing (inotify(7), `IN_CLOSE_WRITE`).
//!
//! Whoever writes to a file, also through a mapping, has it open for writing first. So between two
//! moments either somebody still has it open at the second one, which a search finds, or it was closed,
//! which is told here. Not told are accesses through overlayfs, which opens the file below without
//! telling anybody, and for files of sysfs those of another network namespace.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Watches files until it is dropped.
#[derive(Debug)]
pub(crate) struct CloseWatch(Inotify);

impl CloseWatch {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC;
        Ok(Self(Inotify::init(flags)?))
    }

    /// Watches one more file, by what is open: names can lead elsewhere meanwhile.
    pub(crate) fn add(&self, file: &File) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = AddWatchFlags::IN_CLOSE_WRITE;
        self.0.add_watch(path.as_str(), flags)?;
        Ok(())
    }

    /// Whether one of the files was closed since the last question by somebody who had it open for
    /// writing; also if so much happened that the kernel stopped counting.
    pub(crate) fn was_written(&self) -> io::Result<bool> {
        match self.0.read_events() {
            Ok(events) => Ok(!events.is_empty()),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}
