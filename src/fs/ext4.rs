//! ext2, ext3 and ext4: geometry, condition, and the map of blocks in use.

use super::{Condition, DirtyReason, Filesystem, Held, Info, Opened, Walk};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

pub(super) mod format;
mod map;

use format::{GroupDesc, SuperBlock};

/// More groups than this nobody has; fewer blocks in a group nobody makes. Both bound the time
/// a walk takes.
const MAX_GROUPS: u64 = 1 << 24;
const MIN_BLOCKS_PER_GROUP: u64 = 256;

/// An ext filesystem whose superblock makes sense.
struct Ext {
    superblock: SuperBlock,
    info: Info,
    condition: Condition,
    held: Held,
    geometry: Geometry,
}

/// The superblock's numbers, checked.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    /// Bytes in a block: 1024 to 65536.
    block_size: u64,
    /// Blocks in a cluster, a power of two; 1 without bigalloc.
    cluster_blocks: u64,
    /// All blocks, of which those before `first_data_block` (0 or 1) belong to no group.
    blocks: u64,
    first_data_block: u64,
    blocks_per_group: u64,
    groups: u64,
    /// Bytes in a group descriptor: 32, or a power of two from 64 to the block size.
    desc_size: u64,
    /// Blocks with descriptors, where they are all together.
    desc_blocks: u64,
    /// Blocks of one group's part of the inode table.
    inode_table_blocks: u64,
}

impl std::fmt::Debug for Ext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ext")
            .field("info", &self.info)
            .field("condition", &self.condition)
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

impl Filesystem for Ext {
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

    if !superblock.checksum_holds() {
        return all_blocks(info, "the superblock's checksum is wrong".into());
    }
    let unknown_incompat = superblock.incompat() & !format::INCOMPAT_KNOWN;
    let unknown_ro_compat = superblock.ro_compat() & !format::RO_COMPAT_KNOWN;
    if unknown_incompat != 0 || unknown_ro_compat != 0 {
        return all_blocks(
            info,
            format!(
                "it has features unknown here (incompatible {unknown_incompat:#x}, \
                 read-only compatible {unknown_ro_compat:#x})"
            ),
        );
    }
    if superblock.has_metadata_csum() && superblock.checksum_type != format::CHECKSUM_CRC32C {
        return all_blocks(info, "its kind of checksum is unknown here".into());
    }
    let geometry = match Geometry::check(&superblock, source.len()) {
        Ok(geometry) => geometry,
        Err(why) => return all_blocks(info, why.into()),
    };
    if superblock.compat() & format::COMPAT_HAS_JOURNAL != 0 && superblock.journal_inum.get() == 0 {
        return Err(Error::new(
            Kind::NotApplicable,
            format!("the journal of this {} is on another device", info.kind),
        )
        .hint("image a filesystem with an internal journal, or unmount it and remove the journal: tune2fs -O ^has_journal"));
    }
    if held == Held::Unmounted {
        check_mmp(source, &superblock, &geometry)?;
    }
    Ok(Opened::Known(Box::new(Ext {
        condition: condition(&superblock, held),
        superblock,
        info,
        held,
        geometry,
    })))
}

/// The superblock, its magic unchecked.
pub(super) fn read_superblock(source: &dyn ReadAt) -> Result<SuperBlock> {
    let mut bytes = [0; size_of::<SuperBlock>()];
    source.read_exact_at(&mut bytes, Offset(format::SUPERBLOCK_OFFSET))?;
    Ok(zerocopy::transmute!(bytes))
}

/// What the superblock says about unfinished business. A journal that has to be replayed is
/// marked as such before anything else is written to a mounted filesystem
/// (`ext4_setup_super`), and the mark goes when the journal is empty: at unmount and at freeze. One
/// that found errors in itself may keep the mark even frozen: then these are what matters.
fn condition(superblock: &SuperBlock, held: Held) -> Condition {
    let state = superblock.state.get();
    let dirty = |reason| Condition::Dirty { reason };
    let has_log = superblock.incompat() & format::INCOMPAT_RECOVER != 0;
    let has_errors = state & format::STATE_ERROR != 0;
    if has_log && !(has_errors && held == Held::Frozen) {
        dirty(DirtyReason::Log)
    } else if has_errors {
        dirty(DirtyReason::Errors)
    } else if state & format::STATE_VALID == 0 {
        if superblock.compat() & format::COMPAT_HAS_JOURNAL != 0 {
            dirty(DirtyReason::Unchecked)
        } else {
            dirty(DirtyReason::NotUnmounted)
        }
    } else if state & format::STATE_ORPHAN != 0
        || superblock.ro_compat() & format::RO_COMPAT_ORPHAN_PRESENT != 0
        || superblock.last_orphan.get() != 0
    {
        dirty(DirtyReason::Orphans)
    } else {
        Condition::Clean
    }
}

/// Refuses a filesystem that is marked as mounted by multiple mount protection
/// (`fs/ext4/mmp.c`).
fn check_mmp(source: &dyn ReadAt, superblock: &SuperBlock, geometry: &Geometry) -> Result<()> {
    let block = superblock.mmp_block.get();
    if superblock.incompat() & format::INCOMPAT_MMP == 0 || block == 0 {
        return Ok(());
    }
    let offset = block.checked_mul(geometry.block_size).map(Offset);
    let mut bytes = [0; size_of::<format::MmpBlock>()];
    match offset {
        Some(offset) => source.read_exact_at(&mut bytes, offset)?,
        None => return Ok(()),
    }
    let mmp: format::MmpBlock = zerocopy::transmute!(bytes);
    if mmp.magic.get() != format::MMP_MAGIC || mmp.seq.get() == format::MMP_SEQ_CLEAN {
        return Ok(());
    }
    let text = |bytes: &[u8]| super::probe::text(bytes).unwrap_or_else(|| "unknown".into());
    Err(Error::new(
        Kind::InUse,
        format!(
            "the filesystem says that it is in use (multiple mount protection: host {}, device {})",
            text(&mmp.node),
            text(&mmp.device)
        ),
    )
    .hint("unmount it there; if that host is gone, run: tune2fs -f -E clear_mmp"))
}

impl Geometry {
    /// Checks all numbers the walk relies on, much as `ext4_fill_super` does.
    fn check(superblock: &SuperBlock, volume: ByteLen) -> std::result::Result<Self, &'static str> {
        let log_block_size = superblock.log_block_size.get();
        let log_cluster_size = superblock.log_cluster_size.get();
        if log_block_size > format::MAX_LOG_BLOCK_SIZE {
            return Err("its block size makes no sense");
        }
        let block_size = 1024u64 << log_block_size;
        let is_bigalloc = superblock.ro_compat() & format::RO_COMPAT_BIGALLOC != 0;
        let bitmap_bits = block_size * 8;
        let blocks_per_group = u64::from(superblock.blocks_per_group.get());
        let cluster_blocks = if is_bigalloc {
            if log_cluster_size < log_block_size || log_cluster_size > format::MAX_LOG_CLUSTER_SIZE
            {
                return Err("its cluster size makes no sense");
            }
            1u64 << (log_cluster_size - log_block_size)
        } else {
            1
        };
        let clusters_per_group = if is_bigalloc {
            u64::from(superblock.clusters_per_group.get())
        } else {
            blocks_per_group
        };
        if clusters_per_group > bitmap_bits
            || !clusters_per_group.is_multiple_of(8)
            || blocks_per_group != clusters_per_group * cluster_blocks
            || blocks_per_group < MIN_BLOCKS_PER_GROUP
        {
            return Err("its groups make no sense");
        }
        let blocks = superblock.blocks_count();
        let first_data_block = u64::from(superblock.first_data_block.get());
        let expected_first = u64::from(block_size == 1024 && !is_bigalloc);
        if first_data_block != expected_first || blocks <= first_data_block {
            return Err("its first block makes no sense");
        }
        if blocks
            .checked_mul(block_size)
            .is_none_or(|size| size > volume.0)
        {
            return Err("it is larger than the volume it is on");
        }
        let groups = (blocks - first_data_block).div_ceil(blocks_per_group);
        let inode_size = superblock.inode_size();
        let inodes_per_group = u64::from(superblock.inodes_per_group.get());
        if !inode_size.is_power_of_two()
            || !(format::MIN_INODE_SIZE..=block_size).contains(&inode_size)
            || inodes_per_group == 0
            || inodes_per_group > bitmap_bits
            || groups > MAX_GROUPS
            || groups * inodes_per_group != u64::from(superblock.inodes_count.get())
        {
            return Err("its inode tables make no sense");
        }
        let desc_size = superblock.desc_size();
        let is_64bit = superblock.incompat() & format::INCOMPAT_64BIT != 0;
        if is_64bit
            && (!desc_size.is_power_of_two()
                || !(format::MIN_DESC_SIZE_64BIT..=block_size).contains(&desc_size))
        {
            return Err("the size of its group descriptors makes no sense");
        }
        Ok(Self {
            block_size,
            cluster_blocks,
            blocks,
            first_data_block,
            blocks_per_group,
            groups,
            desc_size,
            desc_blocks: groups.div_ceil(block_size / desc_size),
            inode_table_blocks: (inodes_per_group * inode_size).div_ceil(block_size),
        })
    }

    /// Descriptors in one block.
    fn descs_per_block(&self) -> u64 {
        self.block_size / self.desc_size
    }

    /// The first block of a group.
    fn group_start(&self, group: u64) -> u64 {
        self.first_data_block + group * self.blocks_per_group
    }

    /// The block behind the last one of a group.
    fn group_end(&self, group: u64) -> u64 {
        self.blocks.min(self.group_start(group + 1))
    }

    /// Clusters of a group, a partial one at the end of the filesystem included.
    fn group_clusters(&self, group: u64) -> u64 {
        (self.group_end(group) - self.group_start(group)).div_ceil(self.cluster_blocks)
    }

    /// The block the superblock is in.
    fn superblock_block(&self) -> u64 {
        u64::from(self.block_size == 1024)
    }

    /// Where a block begins. Blocks of this filesystem never overflow: their end was checked.
    fn offset(&self, block: u64) -> Offset {
        Offset(block.min(self.blocks) * self.block_size)
    }
}

impl GroupDesc {
    /// The descriptor from all its bytes on disk: 32 or more.
    fn from_raw(raw: &[u8]) -> Self {
        let mut bytes = [0; size_of::<Self>()];
        let len = raw.len().min(bytes.len());
        bytes[..len].copy_from_slice(&raw[..len]);
        zerocopy::transmute!(bytes)
    }
}
