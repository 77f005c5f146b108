//! Btrfs, on one device or several: geometry, condition, and the map of blocks in use.

use std::sync::{Arc, OnceLock};

use super::{Condition, DirtyReason, Filesystem, Info, Opened, Walk};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::read_at::ReadAt;
use crate::units::ByteLen;

pub(crate) mod checksum;
pub(crate) mod chunks;
pub(crate) mod commit;
pub(crate) mod difference;
pub(crate) mod format;
pub(crate) mod map;
pub(crate) mod renew;
pub(crate) mod sums;
pub(crate) mod superblock;
pub(crate) mod tree;

use chunks::{Devices, damaged};
use commit::{Commit, check_devices, unknown};
use format::SuperBlock;
use superblock::Found;
use tree::Reader;

/// Which device of which btrfs something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The UUID of the filesystem.
    pub fsid: uuid::Uuid,
    /// The id of this device within it.
    pub devid: u64,
    /// The UUID of this device.
    pub device_uuid: uuid::Uuid,
    /// How many devices the filesystem has.
    pub devices: u64,
}

/// Finds out which device of which btrfs this is; `None` if it is none. Only the first superblock
/// counts, as it does for the kernel: copies of it outlive what was there.
///
/// # Errors
/// If reading fails for another reason than bad blocks.
pub fn member(source: &dyn ReadAt) -> Result<Option<Member>> {
    let first = superblock::read_copy(source, format::SUPER_OFFSETS[0])?;
    Ok(first.ok().map(|superblock| Member {
        fsid: uuid::Uuid::from_bytes(superblock.fsid),
        devid: superblock.dev_item.devid.get(),
        device_uuid: uuid::Uuid::from_bytes(superblock.dev_item.uuid),
        devices: superblock.num_devices.get(),
    }))
}

/// A device of a btrfs whose superblocks and chunks make sense.
struct Btrfs {
    info: Info,
    condition: Condition,
    commit: Commit,
    /// The id of this device.
    devid: u64,
    /// Its bytes, as far as they belong to the filesystem.
    size: ByteLen,
    /// The other devices, by id.
    siblings: Vec<(u64, Arc<dyn ReadAt>)>,
    /// What is damaged and does not matter for the map.
    warnings: Vec<String>,
    /// Set once the extent tree was found to be right as a whole.
    is_checked: OnceLock<()>,
}

impl std::fmt::Debug for Btrfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Btrfs")
            .field("info", &self.info)
            .field("condition", &self.condition)
            .field("geometry", &self.commit.geometry)
            .field("devid", &self.devid)
            .finish_non_exhaustive()
    }
}

impl Filesystem for Btrfs {
    fn info(&self) -> &Info {
        &self.info
    }

    fn condition(&self) -> Condition {
        self.condition
    }

    fn walk_used(
        &self,
        source: &dyn ReadAt,
        sink: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<Walk> {
        map::walk(self, source, sink)
    }
}

impl Btrfs {
    /// All devices, `source` being this one.
    fn devices<'a>(&'a self, source: &'a dyn ReadAt) -> Devices<'a> {
        let mut devices = Devices::default();
        devices.add(self.devid, source);
        for (devid, sibling) in &self.siblings {
            devices.add(*devid, sibling.as_ref());
        }
        devices
    }

    fn reader<'a>(&'a self, devices: &'a Devices<'a>) -> Reader<'a> {
        self.commit.reader(devices, None)
    }
}

/// Opens the filesystem whose superblock has the magic. `siblings` are its other devices.
pub(super) fn open(
    source: &dyn ReadAt,
    siblings: &[Arc<dyn ReadAt>],
    info: Info,
) -> Result<Opened> {
    let found = match superblock::read(source)? {
        Ok(found) => found,
        Err(why) => {
            let why = why.to_owned();
            return Ok(Opened::AllBlocks { info, why });
        }
    };
    let why = match found.is_first {
        true => unknown(&found.newest),
        false => Some("its first superblock is damaged, or older than a copy of it".into()),
    };
    if let Some(why) = why {
        return Ok(Opened::AllBlocks { info, why });
    }
    match understand(source, siblings, &found.newest, &info) {
        Ok(mut btrfs) => {
            let missing = found.missing.iter();
            btrfs.warnings = missing
                .map(|at| format!("the copy of its superblock at byte {at} is damaged or old"))
                .collect();
            Ok(Opened::Known(Box::new(btrfs)))
        }
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotApplicable) => {
            let why = error.to_string();
            Ok(Opened::AllBlocks { info, why })
        }
        Err(error) => Err(error),
    }
}

/// What the superblock says about unfinished business. Which commit it stands for was reached as a
/// whole, or it would stand for the one before: only a log of fsyncs may have come behind it.
fn condition(superblock: &SuperBlock) -> Condition {
    let flags = superblock.flags.get();
    let dirty = |reason| Condition::Dirty { reason };
    if flags & format::SUPER_ERROR != 0 {
        dirty(DirtyReason::Errors)
    } else if flags & format::SUPER_CHANGING != 0 {
        dirty(DirtyReason::InProgress)
    } else if superblock.log_root.get() != 0 {
        dirty(DirtyReason::Log)
    } else {
        Condition::Clean
    }
}

/// Reads what the map stands on: devices, chunks, and where the trees begin.
///
/// # Errors
/// [`Kind::Damaged`] if it contradicts itself, [`Kind::NotApplicable`] if it is of a kind whose map
/// cannot be read; else if reading fails.
fn understand(
    source: &dyn ReadAt,
    siblings: &[Arc<dyn ReadAt>],
    superblock: &SuperBlock,
    info: &Info,
) -> Result<Btrfs> {
    let siblings = members(superblock, siblings)?;
    let devid = superblock.dev_item.devid.get();
    let mut devices = Devices::default();
    devices.add(devid, source);
    for (devid, sibling) in &siblings {
        devices.add(*devid, sibling.as_ref());
    }
    let size = ByteLen(superblock.dev_item.total_bytes.get());
    if size > source.len() {
        return Err(damaged("it is larger than the volume it is on"));
    }
    let commit = Commit::read(superblock, &devices, None)?;
    check_devices(&commit.trees.dev, &commit.reader(&devices, None))?;
    let own = commit.own_device(superblock)?;
    Ok(Btrfs {
        info: info.clone(),
        condition: condition(superblock),
        devid,
        // A device that was made larger or smaller: what either number leaves out is copied.
        size: size.min(ByteLen(own.total_bytes.get())),
        commit,
        siblings,
        warnings: Vec::new(),
        is_checked: OnceLock::new(),
    })
}

/// The other devices of the filesystem by id, each of them the only one of its id, and all of one
/// commit.
fn members(
    superblock: &SuperBlock,
    siblings: &[Arc<dyn ReadAt>],
) -> Result<Vec<(u64, Arc<dyn ReadAt>)>> {
    let devices = superblock.num_devices.get();
    let mut members: Vec<(u64, Arc<dyn ReadAt>)> = Vec::new();
    for sibling in siblings {
        let Ok(Found { newest, .. }) = superblock::read(sibling.as_ref())? else {
            return Err(damaged("another device of it has no superblock"));
        };
        let devid = newest.dev_item.devid.get();
        if newest.fsid != superblock.fsid {
            return Err(damaged("another device is of another filesystem"));
        }
        if newest.generation != superblock.generation {
            return Err(damaged(format!(
                "its devices are of different commits: {} and {}",
                superblock.generation, newest.generation
            )));
        }
        let is_new = superblock.dev_item.devid.get() != devid
            && members.iter().all(|(other, _)| *other != devid);
        if !is_new {
            return Err(damaged(format!(
                "two devices call themselves number {devid}"
            )));
        }
        members.push((devid, Arc::clone(sibling)));
    }
    if members.len() as u64 + 1 != devices {
        return Err(Error::new(
            Kind::NotApplicable,
            format!(
                "it is one of the {devices} devices of its filesystem, and not all of them are here"
            ),
        ));
    }
    Ok(members)
}
