//! How full a mounted filesystem is (statvfs(3)).

use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::error::{Context, Result};

/// Bytes of a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// In use, without what the filesystem needs for itself.
    pub used: u64,
    /// Not in use, including what is set aside for the administrator.
    pub unused: u64,
    /// That this process may still write.
    pub free: u64,
}

impl Room {
    /// Of the filesystem that `path` lies on.
    ///
    /// # Errors
    /// What `statvfs(3)` says.
    pub fn at(path: &Path) -> Result<Self> {
        let found = statvfs(path).context("cannot examine", path)?;
        // The widths of all these differ between systems.
        #[allow(clippy::unnecessary_cast, clippy::cast_lossless)]
        let [unit, all, free, available] = [
            found.fragment_size() as u64,
            found.blocks() as u64,
            found.blocks_free() as u64,
            found.blocks_available() as u64,
        ];
        let bytes = |blocks: u64| blocks.saturating_mul(unit);
        Ok(Self {
            used: bytes(all.saturating_sub(free)),
            unused: bytes(free),
            free: bytes(available),
        })
    }
}
