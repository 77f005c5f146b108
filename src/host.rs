//! Where the library meets the operating system's crate: its disks become [`ReadAt`], its errors ours.

use std::io;

use holdstill_platform as platform;
use holdstill_platform::device::Disk;
use holdstill_platform::output::Output;
use holdstill_platform::privilege;

use crate::error::{Error, Result};
use crate::fs::btrfs::format::Key;
use crate::read_at::ReadAt;
use crate::thread::FEWER;
use crate::units::{ByteLen, Offset};

impl ReadAt for Disk {
    fn len(&self) -> ByteLen {
        ByteLen(self.geometry().size)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        self.read_exact_at(buf, offset.0)
            .map_err(|error| Error::from(error).at(offset))
    }
}

/// What was written so far; streams cannot be read.
impl ReadAt for Output {
    fn len(&self) -> ByteLen {
        ByteLen(self.written())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        self.read_back(buf, offset.0)
            .map_err(|error| Error::from(error).at(offset))
    }
}

/// A key that the kernel gave, as in the tree it is of.
impl From<platform::btrfs::Key> for Key {
    fn from(key: platform::btrfs::Key) -> Self {
        Self::new(key.objectid, key.kind, key.offset)
    }
}

impl From<Key> for platform::btrfs::Key {
    fn from(key: Key) -> Self {
        Self::new(key.objectid, key.kind, key.offset)
    }
}

/// Who may do what was not permitted.
pub(crate) fn who_may() -> String {
    if !privilege::is_root() {
        return "it needs root: try again as root".to_owned();
    }
    match privilege::missing().as_slice() {
        [] => "even root may not: a security policy or the filesystem forbids it".to_owned(),
        missing => format!(
            "this root lacks {}, as in a container: give it that, or run outside",
            missing.join(", ")
        ),
    }
}

impl From<platform::error::Error> for Error {
    fn from(error: platform::error::Error) -> Self {
        let hint = match error.source.kind() {
            io::ErrorKind::PermissionDenied => Some(who_may()),
            io::ErrorKind::OutOfMemory => Some(FEWER.to_owned()),
            // Seldom do they say so themselves.
            _ if error.is_of_tool() && !privilege::is_root() => Some(who_may()),
            _ => None,
        };
        let ours = Self::io(error.op, error.source).on(error.what);
        match hint {
            Some(hint) => ours.hint(hint),
            None => ours,
        }
    }
}
