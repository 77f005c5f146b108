//! A new UUID for a filesystem, as `btrfstune -m` gives it: superblocks get the new one and keep the
//! old one as that of the metadata, which tree blocks and device items go on carrying.
//!
//! Source: the kernel's `fs/btrfs/volumes.c` (`device_list_add`) and `disk-io.c`
//! (`btrfs_validate_super`, `check_tree_block_fsid`).

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::checksum::Checksum;
use super::format::{self, SuperBlock};
use super::superblock::{self, Geometry};
use crate::error::{Error, Kind, Result};
use crate::read_at::ReadAt;
use crate::units::Offset;

/// The superblock and its copies as they are with the UUID `new`, by where they go. A copy that is
/// damaged, or of another filesystem, is none.
///
/// # Errors
/// [`Kind::NotApplicable`] if the UUID cannot be changed, and why; else if reading fails for another
/// reason than bad blocks.
pub(crate) fn renewed(source: &dyn ReadAt, new: Uuid) -> Result<Vec<(Offset, Vec<u8>)>> {
    let refused = |why: &str| {
        let what = format!("its UUID cannot be changed: {why}");
        Error::new(Kind::NotApplicable, what)
    };
    let found = superblock::read(source)?.map_err(refused)?;
    if let Some(why) = super::unknown(&found) {
        return Err(refused(&why));
    }
    if found.newest.flags.get() & format::SUPER_CHANGING != 0 {
        return Err(refused("another change of it has not ended"));
    }
    let geometry = Geometry::check(&found.newest).map_err(refused)?;
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
            all.push((Offset(at), with_fsid(copy, new, geometry.checksum)));
        }
    }
    Ok(all)
}

/// A superblock with another UUID, checksum and all.
fn with_fsid(mut superblock: SuperBlock, new: Uuid, checksum: Checksum) -> Vec<u8> {
    superblock.metadata_uuid = *superblock.metadata_uuid();
    superblock.incompat |= format::INCOMPAT_METADATA_UUID;
    superblock.fsid = *new.as_bytes();
    superblock.csum = checksum.of(&superblock.as_bytes()[format::CSUM_SIZE..]);
    superblock.as_bytes().to_vec()
}
