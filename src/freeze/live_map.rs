//! Which blocks a mounted filesystem uses right now, by the kernel's own map.

use std::path::Path;
use std::sync::Arc;

use holdstill_platform::freeze::MountPoint;
use holdstill_platform::fsmap::{FsMap, FsMapError, UsedRange};
use holdstill_platform::node::DeviceNumber;

use crate::error::{Error, Kind, Result};
use crate::units::ByteLen;

/// Room for ranges at first.
const ROOM: usize = 64 << 10;

/// And always for so many more than at the last look, beside half as many again.
const MORE_ROOM: usize = 4096;

/// The map of a mounted filesystem, as of the last look.
#[derive(Debug)]
pub(super) struct LiveMap {
    fsmap: FsMap,
    point: Arc<MountPoint>,
    device: DeviceNumber,
    size: ByteLen,
    /// Everything counts as in use.
    all_blocks: bool,
    used: Vec<UsedRange>,
}

impl LiveMap {
    /// For the filesystem at `point` on `device`, of `size` bytes. With `all_blocks` it says that
    /// everything is in use.
    pub(super) fn new(
        point: Arc<MountPoint>,
        device: DeviceNumber,
        size: ByteLen,
        all_blocks: bool,
    ) -> Self {
        Self {
            fsmap: FsMap::new(),
            point,
            device,
            size,
            all_blocks,
            used: Vec::with_capacity(ROOM),
        }
    }

    /// From the next look on, everything is in use.
    pub(super) fn distrust(&mut self) {
        self.all_blocks = true;
    }

    /// What was in use at the last look: ascending.
    pub(super) fn used(&self) -> &[UsedRange] {
        &self.used
    }

    /// A look that may take its time and its memory.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if the filesystem has no such map, or lies on other devices too.
    pub(super) fn look(&mut self, name: &Path) -> Result<()> {
        loop {
            match self.try_look() {
                Err(FsMapError::TooManyRanges { needed }) => {
                    self.used.clear();
                    self.used.reserve_exact(needed + needed / 2);
                }
                other => return other.map_err(|error| explain(&error, name)),
            }
        }
    }

    /// A look that allocates nothing: for while the filesystem is frozen. There must be
    /// [room](Self::make_room).
    ///
    /// # Errors
    /// As [`look`](Self::look), or if there are more ranges than room.
    pub(super) fn look_in_place(&mut self, name: &Path) -> Result<()> {
        self.try_look().map_err(|error| explain(&error, name))
    }

    /// Makes room for half as many ranges again as at the last look.
    pub(super) fn make_room(&mut self) {
        let wanted = self.used.len() + self.used.len() / 2 + MORE_ROOM;
        if self.used.capacity() < wanted {
            self.used.reserve_exact(wanted - self.used.len());
        }
    }

    fn try_look(&mut self) -> std::result::Result<(), FsMapError> {
        if self.all_blocks {
            self.used.clear();
            self.used.push(UsedRange {
                start: 0,
                len: self.size.0,
            });
            return Ok(());
        }
        self.fsmap
            .used(&self.point, self.device, self.size.0, &mut self.used)
    }
}

fn explain(error: &FsMapError, name: &Path) -> Error {
    let kind = match error {
        FsMapError::AnotherDevice(_) | FsMapError::Unsupported => Kind::NotApplicable,
        _ => Kind::Io,
    };
    Error::new(kind, "the filesystem's map cannot be had")
        .on(name)
        .because(error.to_string())
}
