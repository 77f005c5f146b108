//! The devices of a mounted btrfs, read past the page cache and past the filesystem itself.

use std::sync::Arc;

use holdstill_platform::btrfs::{Filesystem, Member};
use holdstill_platform::device::{Access, Disk};

use crate::error::{Error, Kind, Result};
use crate::fs::btrfs::chunks;
use crate::fs::btrfs::format::{self, SuperBlock};
use crate::fs::btrfs::superblock;
use crate::read_at::ReadAt;
use crate::source::{Medium, Source};
use crate::units::ByteLen;

/// All devices of a filesystem, by the number of their volume.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) disks: Vec<Arc<Disk>>,
    /// Their ids within the filesystem.
    pub(super) ids: Vec<u64>,
}

impl Devices {
    /// Opens the devices that are to be imaged, which must be all of the filesystem.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if they are not, or cannot be read past the page cache.
    pub(super) fn open(filesystem: &Filesystem, sources: &[&Source]) -> Result<Self> {
        let no = |source: &Source, why: &str| {
            Error::new(Kind::NotApplicable, why.to_owned()).on(&source.path)
        };
        let members = filesystem.devices()?;
        let mut devices = Self {
            disks: Vec::new(),
            ids: Vec::new(),
        };
        for source in sources {
            let is_it = |member: &&Member| matches!(&source.medium, Medium::Device(device) if device.number == member.number);
            let member = members.iter().find(is_it);
            let member =
                member.ok_or_else(|| no(source, "it is no device of its filesystem any more"))?;
            let disk = Disk::open(&source.path, Access::Read)?;
            if !disk.is_direct() {
                return Err(no(source, "it cannot be read past the page cache"));
            }
            devices.disks.push(Arc::new(disk));
            devices.ids.push(member.devid);
        }
        match sources {
            [first, ..] if members.len() != sources.len() => {
                Err(no(first, "not all devices of its filesystem are here"))
            }
            _ => Ok(devices),
        }
    }

    /// The devices by their ids.
    pub(super) fn by_id(&self) -> chunks::Devices<'_> {
        let mut devices = chunks::Devices::default();
        for (id, disk) in self.ids.iter().zip(&self.disks) {
            devices.add(*id, disk.as_ref());
        }
        devices
    }

    /// Whether the commit of these superblocks is still the newest one.
    ///
    /// # Errors
    /// As [`superblocks`](Self::superblocks).
    pub(super) fn are_still(&self, before: &[SuperBlock]) -> Result<bool> {
        let now = self.superblocks()?;
        Ok(now.is_some_and(|now| {
            let mut pairs = now.iter().zip(before);
            pairs.all(|(now, before)| now.generation == before.generation)
        }))
    }

    /// The id and the size of the device of a volume.
    pub(super) fn id_and_size(&self, volume: usize) -> (u64, ByteLen) {
        (self.ids[volume], ReadAt::len(&*self.disks[volume]))
    }

    /// The superblock of each device, if all are of one commit: between two, those of some devices are
    /// newer than the others for a moment.
    ///
    /// # Errors
    /// If one of them cannot be read, or is none.
    pub(super) fn superblocks(&self) -> Result<Option<Vec<SuperBlock>>> {
        let mut found: Vec<SuperBlock> = Vec::new();
        for (disk, id) in self.disks.iter().zip(&self.ids) {
            let copy = superblock::read_copy(disk.as_ref(), format::SUPER_OFFSETS[0])?;
            // One that is being written may be torn.
            let Ok(copy) = copy else { return Ok(None) };
            if copy.dev_item.devid.get() != *id {
                return Err(Error::new(
                    Kind::Inconsistent,
                    "it holds another device of its filesystem than before",
                )
                .on(disk.path()));
            }
            found.push(copy);
        }
        let generation = found.first().map(|first| first.generation);
        let is_one = found.iter().all(|copy| Some(copy.generation) == generation);
        Ok(is_one.then_some(found))
    }
}
