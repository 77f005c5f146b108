//! APFS: a container's state, volumes, and the map of blocks in use.
//!
//! What is imaged is the container, with all its volumes and snapshots; the maps that say which blocks
//! are in use are never encrypted, so an encrypted volume is imaged as it lies on disk.

use super::emit::Emitter;
use super::{Condition, DirtyReason, Filesystem, Info, Opened, Volume, Walk};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

mod blocks;
mod btree;
mod checkpoint;
pub(super) mod format;
mod spaceman;
mod volumes;

use blocks::Blocks;
use checkpoint::{Checkpoint, Newest};
use format::Superblock;

/// A container of which a checkpoint is whole.
struct Apfs {
    info: Info,
    condition: Condition,
    block_size: u64,
    block_count: u64,
    checkpoint: Checkpoint,
}

impl std::fmt::Debug for Apfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Apfs")
            .field("info", &self.info)
            .field("condition", &self.condition)
            .field("xid", &self.checkpoint.xid())
            .finish_non_exhaustive()
    }
}

impl Apfs {
    fn blocks<'a>(&self, source: &'a dyn ReadAt) -> Blocks<'a> {
        Blocks {
            source,
            size: self.block_size,
            count: self.block_count,
        }
    }
}

impl Filesystem for Apfs {
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
        let blocks = self.blocks(source);
        let map = spaceman::Map::new(blocks, &self.checkpoint)?;
        let mut emitter = Emitter::new(source.len(), sink);
        map.walk(&mut emitter)?;
        emitter.finish(blocks.offset(blocks.count))
    }

    fn volumes(&self, source: &dyn ReadAt) -> Result<Vec<Volume>> {
        volumes::all(&self.blocks(source), &self.checkpoint)
    }
}

/// Opens the container whose superblock has the magic.
pub(super) fn open(source: &dyn ReadAt, info: Info) -> Result<Opened> {
    let all_blocks = |info, why: &str| {
        Ok(Opened::AllBlocks {
            info,
            why: why.to_owned(),
        })
    };
    let superblock = read_superblock(source)?;
    let block_size = u64::from(superblock.block_size.get());
    if !block_size.is_power_of_two()
        || !(format::MIN_BLOCK_SIZE..=format::MAX_BLOCK_SIZE).contains(&block_size)
        || block_size > source.len().0
    {
        return all_blocks(info, "its block size makes no sense");
    }
    let first = source.read_vec_at(Offset::ZERO, ByteLen(block_size))?;
    if !format::checksum_holds(&first) {
        return all_blocks(info, "the checksum of its first superblock is wrong");
    }
    refuse_fusion(&superblock)?;
    if superblock.incompat.get() & !format::INCOMPAT_KNOWN != 0 || superblock.ro_compat.get() != 0 {
        return all_blocks(info, "it has features unknown here");
    }
    let block_count = superblock.block_count.get();
    let size = block_count.checked_mul(block_size);
    if block_count == 0 || size.is_none_or(|size| size > source.len().0) {
        return all_blocks(info, "it is larger than the volume it is on");
    }
    let blocks = Blocks {
        source,
        size: block_size,
        count: block_count,
    };
    let Newest {
        checkpoint,
        is_doubtful,
        is_interrupted,
    } = match checkpoint::newest(blocks, &superblock)? {
        Ok(newest) => newest,
        Err(why) => return all_blocks(info, why),
    };
    refuse_fusion(&checkpoint.superblock)?;
    let features = |superblock: &Superblock| (superblock.incompat, superblock.ro_compat);
    if features(&checkpoint.superblock) != features(&superblock) {
        return all_blocks(info, "its superblocks differ in their features");
    }
    Ok(Opened::Known(Box::new(Apfs {
        info,
        condition: match (is_doubtful, is_interrupted) {
            (false, false) => Condition::Clean,
            (false, true) => Condition::Interrupted,
            (true, _) => Condition::Dirty {
                reason: DirtyReason::Checkpoint,
            },
        },
        block_size,
        block_count,
        checkpoint,
    })))
}

/// The superblock of block 0, nothing of it checked.
pub(super) fn read_superblock(source: &dyn ReadAt) -> Result<Superblock> {
    let mut bytes = [0; size_of::<Superblock>()];
    source.read_exact_at(&mut bytes, Offset::ZERO)?;
    Ok(zerocopy::transmute!(bytes))
}

fn refuse_fusion(superblock: &Superblock) -> Result<()> {
    if superblock.incompat.get() & format::INCOMPAT_FUSION == 0 && superblock.fusion_uuid == [0; 16]
    {
        return Ok(());
    }
    Err(Error::new(
        Kind::NotApplicable,
        "this APFS container is a Fusion set, half of which is on another device",
    )
    .hint(
        "only containers on one device can be imaged; image the files, or both disks as they are",
    ))
}
