//! XFS, versions 4 and 5: geometry, condition, and the map of blocks in use.

use super::{Condition, DirtyReason, Filesystem, Held, Info, Opened, Walk};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

pub(super) mod format;
mod log;
mod map;

use format::SuperBlock;

/// An XFS whose superblock makes sense.
struct Xfs {
    superblock: SuperBlock,
    info: Info,
    condition: Condition,
    geometry: Geometry,
}

/// The superblock's numbers, checked.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    /// Bytes in a block, 512 to 65536, and in a sector, 512 to 32768.
    block_size: u64,
    sector_size: u64,
    /// All blocks.
    blocks: u64,
    /// Blocks in an allocation group but the last, which may be shorter.
    ag_blocks: u64,
    ag_count: u64,
    /// The internal log, in bytes of the volume; within one allocation group.
    log: Extent,
}

impl std::fmt::Debug for Xfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Xfs")
            .field("info", &self.info)
            .field("condition", &self.condition)
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

impl Filesystem for Xfs {
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

/// Opens the filesystem whose superblock has the magic.
pub(super) fn open(source: &dyn ReadAt, info: Info, held: Held) -> Result<Opened> {
    let superblock = read_superblock(source)?;
    let all_blocks = |info, why: String| Ok(Opened::AllBlocks { info, why });

    let geometry = match Geometry::check(&superblock, source.len()) {
        Ok(geometry) => geometry,
        Err(why) => return all_blocks(info, why.into()),
    };
    if superblock.is_v5() {
        let sector = source.read_vec_at(Offset::ZERO, ByteLen(geometry.sector_size))?;
        if !format::crc_holds(&sector, format::SB_CRC_OFFSET) {
            return all_blocks(info, "the superblock's checksum is wrong".into());
        }
    }
    if let Some(why) = unknown_features(&superblock) {
        return all_blocks(info, why);
    }
    let elsewhere = |what| {
        Err(Error::new(
            Kind::NotApplicable,
            format!("this XFS has {what}, which is on another device"),
        )
        .hint("only filesystems that live on one device can be imaged by their used blocks"))
    };
    if superblock.rt_blocks.get() != 0 {
        return elsewhere("a realtime section");
    }
    if superblock.log_start.get() == 0 {
        return elsewhere("an external log");
    }
    Ok(Opened::Known(Box::new(Xfs {
        condition: condition(source, &superblock, &geometry, held)?,
        superblock,
        info,
        geometry,
    })))
}

/// The superblock, its magic unchecked.
pub(super) fn read_superblock(source: &dyn ReadAt) -> Result<SuperBlock> {
    let mut bytes = [0; size_of::<SuperBlock>()];
    source.read_exact_at(&mut bytes, Offset::ZERO)?;
    Ok(zerocopy::transmute!(bytes))
}

/// Why the map may not mean what it says, if it has features that are not known here.
fn unknown_features(superblock: &SuperBlock) -> Option<String> {
    match superblock.version_number() {
        4 => {
            let unknown = superblock.features2() & !format::FEATURES2_KNOWN;
            let shared = superblock.version.get() & format::VERSION_SHARED;
            (unknown != 0 || shared != 0)
                .then(|| format!("it has features unknown here ({unknown:#x}, shared {shared:#x})"))
        }
        5 => {
            let incompat = superblock.features_incompat.get() & !format::INCOMPAT_KNOWN;
            let ro_compat = superblock.features_ro_compat.get() & !format::RO_COMPAT_KNOWN;
            (incompat != 0 || ro_compat != 0).then(|| {
                format!(
                    "it has features unknown here (incompatible {incompat:#x}, \
                     read-only compatible {ro_compat:#x})"
                )
            })
        }
        other => Some(format!("version {other} of XFS is unknown here")),
    }
}

/// What the superblock and the log say about unfinished business.
fn condition(
    source: &dyn ReadAt,
    superblock: &SuperBlock,
    geometry: &Geometry,
    held: Held,
) -> Result<Condition> {
    let dirty = |reason| Ok(Condition::Dirty { reason });
    if superblock.in_progress != 0 {
        return dirty(DirtyReason::InProgress);
    }
    if superblock.is_v5() && superblock.features_incompat.get() & format::INCOMPAT_NEEDS_REPAIR != 0
    {
        return dirty(DirtyReason::NeedsRepair);
    }
    let is_frozen = held == Held::Frozen;
    if is_frozen && !superblock.has_lazy_count() {
        // The kernel may then cover its log without writing anything to it.
        return dirty(DirtyReason::Unproven);
    }
    match log::state(source, superblock, geometry, is_frozen) {
        Ok(log::State::Clean) => Ok(Condition::Clean),
        Ok(log::State::Frozen) => Ok(Condition::Frozen),
        Ok(log::State::Dirty) => dirty(DirtyReason::Log),
        Ok(log::State::Damaged) => dirty(DirtyReason::LogDamaged),
        Err(error) if error.kind() == Kind::Io => dirty(DirtyReason::LogDamaged),
        Err(error) => Err(error),
    }
}

impl Geometry {
    /// Checks all numbers the walk relies on, much as `xfs_validate_sb_common` does.
    fn check(superblock: &SuperBlock, volume: ByteLen) -> std::result::Result<Self, &'static str> {
        let (block_log, sector_log) = (superblock.block_log, superblock.sector_log);
        let block_size = u64::from(superblock.block_size.get());
        let sector_size = u64::from(superblock.sector_size.get());
        if !(format::MIN_BLOCK_LOG..=format::MAX_BLOCK_LOG).contains(&block_log)
            || !(format::MIN_SECTOR_LOG..=format::MAX_SECTOR_LOG).contains(&sector_log)
            || block_size != 1 << block_log
            || sector_size != 1 << sector_log
            || sector_size > block_size
        {
            return Err("its block or sector size makes no sense");
        }
        let blocks = superblock.data_blocks.get();
        if blocks
            .checked_mul(block_size)
            .is_none_or(|size| size > volume.0)
        {
            return Err("it is larger than the volume it is on");
        }
        let ag_blocks = u64::from(superblock.ag_blocks.get());
        let ag_bytes = ag_blocks * block_size;
        let ag_count = u64::from(superblock.ag_count.get());
        let ag_block_log = superblock.ag_block_log;
        if !(format::MIN_AG_BYTES..=format::MAX_AG_BYTES).contains(&ag_bytes)
            || blocks == 0
            || ag_count != blocks.div_ceil(ag_blocks)
            || ag_block_log > 32
            || 1u64 << ag_block_log != ag_blocks.next_power_of_two()
        {
            return Err("its allocation groups make no sense");
        }
        let log_start = superblock.log_start.get();
        let log_blocks = u64::from(superblock.log_blocks.get());
        let (log_ag, log_block) = (
            log_start >> ag_block_log,
            log_start & ((1 << ag_block_log) - 1),
        );
        let log_first = log_ag.saturating_mul(ag_blocks).saturating_add(log_block);
        if log_start != 0
            && (log_blocks == 0
                || log_block + log_blocks > ag_blocks
                || log_first.saturating_add(log_blocks) > blocks)
        {
            return Err("the place of its log makes no sense");
        }
        Ok(Self {
            block_size,
            sector_size,
            blocks,
            ag_blocks,
            ag_count,
            log: if log_start == 0 {
                Extent::new(0, 0)
            } else {
                Extent::new(log_first * block_size, log_blocks * block_size)
            },
        })
    }

    /// The first block of an allocation group, counted over the whole filesystem.
    fn ag_start(&self, ag: u64) -> u64 {
        ag * self.ag_blocks
    }

    /// Blocks of an allocation group.
    fn ag_len(&self, ag: u64) -> u64 {
        self.ag_blocks
            .min(self.blocks - self.ag_start(ag).min(self.blocks))
    }

    /// Where a block of the filesystem begins. It is cut at the filesystem's end, so it never
    /// overflows.
    fn offset(&self, block: u64) -> Offset {
        Offset(block.min(self.blocks) * self.block_size)
    }
}
