//! A new UUID for a filesystem, as `btrfstune -m` gives it: superblocks get the new one and keep the
//! old one as that of the metadata, which tree blocks and device items go on carrying. And a new label.
//!
//! Source: the kernel's `fs/btrfs/volumes.c` (`device_list_add`) and `disk-io.c`
//! (`btrfs_validate_super`, `check_tree_block_fsid`).

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::checksum::Checksum;
use super::commit;
use super::format::{self, SuperBlock};
use super::superblock::{self, Found, Geometry};
use crate::error::{Error, Kind, Result};
use crate::read_at::ReadAt;
use crate::units::Offset;

/// What a filesystem is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) fsid: Uuid,
    /// As on disk, the end filled with zeros.
    pub(crate) label: [u8; 256],
}

impl Identity {
    /// What the superblock says.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if it cannot be changed, and why; else if reading fails for another reason
    /// than bad blocks.
    pub(crate) fn of(source: &dyn ReadAt) -> Result<Self> {
        let (found, _) = changeable(source)?;
        Ok(Self {
            fsid: Uuid::from_bytes(found.newest.fsid),
            label: found.newest.label,
        })
    }
}

/// The superblocks, if what they say may be changed.
fn changeable(source: &dyn ReadAt) -> Result<(Found, Geometry)> {
    let refused = |why: &str| {
        let what = format!("its UUID cannot be changed: {why}");
        Error::new(Kind::NotApplicable, what)
    };
    let found = superblock::read(source)?.map_err(refused)?;
    if !found.is_first {
        return Err(refused(
            "its first superblock is damaged, or older than a copy of it",
        ));
    }
    if let Some(why) = commit::unknown(&found.newest) {
        return Err(refused(&why));
    }
    if found.newest.flags.get() & format::SUPER_CHANGING != 0 {
        return Err(refused("another change of it has not ended"));
    }
    let geometry = Geometry::check(&found.newest).map_err(refused)?;
    Ok((found, geometry))
}

/// The superblock and its copies as they are with another identity, by where they go, ascending. A copy
/// that is damaged, or of another filesystem, is none.
///
/// # Errors
/// As [`Identity::of`].
pub(crate) fn renewed(source: &dyn ReadAt, new: &Identity) -> Result<Vec<(Offset, Vec<u8>)>> {
    let (found, geometry) = changeable(source)?;
    let mut all = Vec::new();
    for at in format::SUPER_OFFSETS {
        if at + format::SUPER_SIZE > source.len().0 {
            break;
        }
        let Ok(copy) = superblock::read_copy(source, at)? else {
            continue;
        };
        let is_ours = copy.fsid == found.newest.fsid
            && *copy.metadata_uuid() == geometry.metadata_uuid
            && copy.dev_item.devid == found.newest.dev_item.devid;
        if is_ours {
            all.push((Offset(at), with_identity(copy, new, geometry.checksum)));
        }
    }
    Ok(all)
}

/// A superblock with another identity, checksum and all. The UUID of the metadata is noted only where it
/// is another one.
fn with_identity(mut superblock: SuperBlock, new: &Identity, checksum: Checksum) -> Vec<u8> {
    let metadata_uuid = *superblock.metadata_uuid();
    superblock.fsid = *new.fsid.as_bytes();
    superblock.label = new.label;
    if superblock.fsid == metadata_uuid {
        superblock.metadata_uuid = [0; 16];
        superblock.incompat &= !format::INCOMPAT_METADATA_UUID;
    } else {
        superblock.metadata_uuid = metadata_uuid;
        superblock.incompat |= format::INCOMPAT_METADATA_UUID;
    }
    superblock.csum = checksum.of(&superblock.as_bytes()[format::CSUM_SIZE..]);
    superblock.as_bytes().to_vec()
}
