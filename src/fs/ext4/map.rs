//! The walk over the block groups.
//!
//! Two passes over the group descriptors. The first checks all of them and notes the metadata
//! that lies outside of its own group (flex_bg); the second reads the bitmaps. Metadata is in
//! use whatever a bitmap says, and so is every group whose bitmap is not proven right.

use std::ops::Range;

use super::format::{self, GroupDesc};
use super::{Ext, Geometry};
use crate::error::{Error, Kind, Result};
use crate::extent::{Extent, ExtentSet};
use crate::fs::bitmap;
use crate::fs::emit::Emitter;
use crate::fs::{Held, Walk};
use crate::read_at::ReadAt;
use crate::units::ByteLen;

/// Bytes of descriptors read at once, at least one block.
const DESC_WINDOW: u64 = 256 << 10;
/// Bytes of bitmaps read at once: flex_bg puts them side by side.
const BITMAP_WINDOW: u64 = 1 << 20;
/// How many runs of metadata outside of its group are kept apart; beyond, near ones are joined.
const MAX_FOREIGN_RUNS: usize = 1 << 16;

/// Walks the used blocks: see [`Filesystem::walk_used`](crate::fs::Filesystem::walk_used).
pub(super) fn walk(
    ext: &Ext,
    source: &dyn ReadAt,
    sink: &mut dyn FnMut(Extent) -> Result<()>,
) -> Result<Walk> {
    let geometry = &ext.geometry;
    let foreign = survey(ext, source)?;
    let mut emitter = Emitter::new(source.len(), sink);
    emitter.used(
        geometry.offset(0),
        geometry.offset(geometry.first_data_block),
    )?;
    let mut bitmaps = Bitmaps::default();
    for_each_window(ext, source, &mut |first, descs| {
        for (index, desc) in descs.iter().enumerate() {
            let group = first + index as u64;
            let bits = match group_bits(ext, source, group, &descs[index..], &mut bitmaps)? {
                Ok(mut bits) => {
                    mark_metadata(ext, group, desc, &foreign, &mut bits);
                    match uninit_contradiction(ext, group, desc, &bits) {
                        None => Some(bits),
                        Some(why) => {
                            emitter.warn(why);
                            None
                        }
                    }
                }
                Err(why) => {
                    emitter.warn(why);
                    None
                }
            };
            let (start, end) = (geometry.group_start(group), geometry.group_end(group));
            match bits {
                None => emitter.used(geometry.offset(start), geometry.offset(end))?,
                Some(bits) => {
                    for run in bitmap::runs_of_set(&bits, geometry.group_clusters(group)) {
                        emitter.used(
                            geometry.offset(start + run.start * geometry.cluster_blocks),
                            geometry.offset(end.min(start + run.end * geometry.cluster_blocks)),
                        )?;
                    }
                }
            }
        }
        Ok(())
    })?;
    emitter.finish(geometry.offset(geometry.blocks))
}

/// The first pass: every descriptor is checked, and their sum against the superblock. Returns
/// the metadata that lies outside of its own group.
fn survey(ext: &Ext, source: &dyn ReadAt) -> Result<ExtentSet> {
    let geometry = &ext.geometry;
    let mut foreign = Foreign::default();
    let mut free_clusters = 0u64;
    for_each_window(ext, source, &mut |first, descs| {
        for (group, desc) in (first..).zip(descs) {
            let group_blocks = geometry.group_start(group)..geometry.group_end(group);
            for blocks in metadata_blocks(geometry, desc) {
                if blocks.start < geometry.first_data_block || blocks.end > geometry.blocks {
                    return Err(damaged(format!(
                        "the descriptor of group {group} points outside of the filesystem"
                    )));
                }
                if blocks.start < group_blocks.start || blocks.end > group_blocks.end {
                    let start = geometry.offset(blocks.start);
                    foreign.insert(Extent::between(start, geometry.offset(blocks.end)));
                }
            }
            free_clusters += desc.free_clusters();
        }
        Ok(())
    })?;
    let noted = ext.superblock.free_blocks_count();
    let counted = free_clusters * geometry.cluster_blocks;
    let must_agree = ext.condition.is_settled()
        || ext.held == Held::Frozen && ext.condition.is_settled_if_frozen();
    if must_agree && noted != counted {
        return Err(damaged(format!(
            "the superblock counts {noted} free blocks and the groups {counted}"
        )));
    }
    Ok(foreign.runs)
}

/// The group's bitmap as the disk has it, proven; or why it is not. `descs` begins with the
/// group's own descriptor.
fn group_bits(
    ext: &Ext,
    source: &dyn ReadAt,
    group: u64,
    descs: &[GroupDesc],
    bitmaps: &mut Bitmaps,
) -> Result<std::result::Result<Vec<u8>, String>> {
    let geometry = &ext.geometry;
    let bitmap_bytes = ByteLen(geometry.blocks_per_group / geometry.cluster_blocks / 8).as_usize();
    let [desc, ..] = descs else {
        return Ok(Err(format!("group {group} has no descriptor")));
    };
    if is_uninit(ext, desc) {
        return Ok(Ok(vec![0; bitmap_bytes]));
    }
    let adjacent = (0..)
        .zip(descs)
        .take_while(|&(n, other)| {
            let distance = other.block_bitmap().checked_sub(desc.block_bitmap());
            !is_uninit(ext, other) && distance == Some(n)
        })
        .count() as u64;
    let block = match bitmaps.get(geometry, source, desc.block_bitmap(), adjacent) {
        Ok(block) => block,
        Err(error) if error.kind() == Kind::Io => {
            return Ok(Err(format!(
                "the block bitmap of group {group} cannot be read ({error}): all of it is taken as used"
            )));
        }
        Err(error) => return Err(error),
    };
    let Some(bits) = block.get(..bitmap_bytes) else {
        return Ok(Err(format!(
            "the block bitmap of group {group} lies outside of the filesystem"
        )));
    };
    if ext.superblock.has_metadata_csum()
        && !desc.bitmap_csum_holds(ext.superblock.csum_seed(), bits, geometry.desc_size)
    {
        return Ok(Err(format!(
            "the checksum of the block bitmap of group {group} is wrong: all of it is taken as used"
        )));
    }
    let free = bitmap::count_clear(bits, geometry.group_clusters(group));
    if free != desc.free_clusters() {
        return Ok(Err(format!(
            "group {group} claims {} free clusters and its bitmap has {free}: all of it is taken as used",
            desc.free_clusters()
        )));
    }
    Ok(Ok(bits.to_vec()))
}

/// A group whose bitmap was never written holds nothing but metadata: its free count must say so.
fn uninit_contradiction(ext: &Ext, group: u64, desc: &GroupDesc, bits: &[u8]) -> Option<String> {
    let free = bitmap::count_clear(bits, ext.geometry.group_clusters(group));
    (is_uninit(ext, desc) && free != desc.free_clusters()).then(|| {
        format!(
            "group {group} was never used, but claims {} free clusters instead of {free}: \
             all of it is taken as used",
            desc.free_clusters()
        )
    })
}

/// Whether the group's bitmap on disk means nothing yet. The flag counts only where descriptors
/// have checksums (`ext4_has_group_desc_csum`).
fn is_uninit(ext: &Ext, desc: &GroupDesc) -> bool {
    ext.superblock.has_desc_csum() && desc.flags() & format::BG_BLOCK_UNINIT != 0
}

/// Sets the bits of all metadata that lies in the group: its superblock and descriptor copies,
/// its own bitmaps and inode table, and those of other groups.
fn mark_metadata(ext: &Ext, group: u64, desc: &GroupDesc, foreign: &ExtentSet, bits: &mut [u8]) {
    let geometry = &ext.geometry;
    let (start, end) = (geometry.group_start(group), geometry.group_end(group));
    let mut mark = |blocks: Range<u64>| {
        let from = blocks.start.max(start) - start;
        let to = blocks.end.clamp(start, end) - start;
        let ratio = geometry.cluster_blocks;
        bitmap::set(bits, from / ratio..to.div_ceil(ratio));
    };
    mark(start..start + base_blocks(ext, group));
    for blocks in metadata_blocks(geometry, desc) {
        if blocks.start < end && blocks.end > start {
            mark(blocks);
        }
    }
    let here = Extent::between(geometry.offset(start), geometry.offset(end));
    for run in foreign.intersect(here) {
        let size = geometry.block_size;
        mark(run.start.0 / size..run.end().0.div_ceil(size));
    }
}

/// The block bitmap, the inode bitmap and the inode table of a group.
fn metadata_blocks(geometry: &Geometry, desc: &GroupDesc) -> [Range<u64>; 3] {
    let run = |start: u64, len: u64| start..start.saturating_add(len);
    [
        run(desc.block_bitmap(), 1),
        run(desc.inode_bitmap(), 1),
        run(desc.inode_table(), geometry.inode_table_blocks),
    ]
}

/// How many blocks at the start of a group hold copies of the superblock and the descriptors, or
/// are reserved for more descriptors (`ext4_num_base_meta_clusters`, `ext4_bg_num_gdb`).
fn base_blocks(ext: &Ext, group: u64) -> u64 {
    let geometry = &ext.geometry;
    let per_block = geometry.descs_per_block();
    let first_meta_bg = first_meta_bg(ext);
    // With 1 KiB blocks and bigalloc, group 0 begins with the boot block.
    let boot = if group == 0 {
        geometry.superblock_block() - geometry.first_data_block
    } else {
        0
    };
    let copies = if group / per_block < first_meta_bg {
        let descs = geometry.desc_blocks.min(first_meta_bg);
        if has_superblock(ext, group) {
            1 + descs + u64::from(ext.superblock.reserved_gdt_blocks.get())
        } else {
            0
        }
    } else {
        let has_descs = [0, 1, per_block - 1].contains(&(group % per_block));
        u64::from(has_superblock(ext, group)) + u64::from(has_descs)
    };
    boot + copies
}

/// From which block of descriptors on they lie in the groups they describe.
fn first_meta_bg(ext: &Ext) -> u64 {
    if ext.superblock.incompat() & format::INCOMPAT_META_BG != 0 {
        u64::from(ext.superblock.first_meta_bg.get())
    } else {
        u64::MAX
    }
}

/// Whether a group begins with a copy of the superblock (`ext4_bg_has_super`).
fn has_superblock(ext: &Ext, group: u64) -> bool {
    let is_power_of = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    if group == 0 {
        true
    } else if ext.superblock.compat() & format::COMPAT_SPARSE_SUPER2 != 0 {
        let backups = ext.superblock.backup_bgs;
        backups
            .iter()
            .any(|backup| u64::from(backup.get()) == group)
    } else if group == 1 || ext.superblock.ro_compat() & format::RO_COMPAT_SPARSE_SUPER == 0 {
        true
    } else {
        [3, 5, 7].into_iter().any(is_power_of)
    }
}

/// The block that holds the `nr`th block of descriptors (`descriptor_loc`).
fn desc_block(ext: &Ext, nr: u64) -> u64 {
    let geometry = &ext.geometry;
    if nr < first_meta_bg(ext) {
        return geometry.superblock_block() + 1 + nr;
    }
    let group = nr * geometry.descs_per_block();
    let boot = if group == 0 {
        geometry.superblock_block() - geometry.first_data_block
    } else {
        0
    };
    geometry.group_start(group) + boot + u64::from(has_superblock(ext, group))
}

/// Calls `visit` with the first group and the descriptors of one window after the other, in
/// order. Every one has passed its checksum.
fn for_each_window(
    ext: &Ext,
    source: &dyn ReadAt,
    visit: &mut dyn FnMut(u64, &[GroupDesc]) -> Result<()>,
) -> Result<()> {
    let geometry = &ext.geometry;
    let seed = ext.superblock.csum_seed();
    let window_blocks = (DESC_WINDOW / geometry.block_size).max(1);
    let mut nr = 0;
    while nr < geometry.desc_blocks {
        let limit = window_blocks.min(geometry.desc_blocks - nr);
        let block = desc_block(ext, nr);
        let adjacent = (1..limit)
            .take_while(|&n| desc_block(ext, nr + n) == block + n)
            .count() as u64
            + 1;
        if block + adjacent > geometry.blocks {
            return Err(damaged("its group descriptors lie behind its end".into()));
        }
        let len = ByteLen(adjacent * geometry.block_size);
        let bytes = source
            .read_vec_at(geometry.offset(block), len)
            .map_err(|error| match error.kind() {
                Kind::Io => damaged("its group descriptors cannot be read".into()).because(error),
                _ => error,
            })?;
        let first = nr * geometry.descs_per_block();
        let mut descs = Vec::new();
        let raw_descs = bytes.chunks_exact(ByteLen(geometry.desc_size).as_usize());
        for (group, raw) in (first..geometry.groups).zip(raw_descs) {
            if !format::desc_csum_holds(&ext.superblock, seed, group as u32, raw) {
                return Err(damaged(format!(
                    "the checksum of the descriptor of group {group} is wrong"
                )));
            }
            descs.push(GroupDesc::from_raw(raw));
        }
        visit(first, &descs)?;
        nr += adjacent;
    }
    Ok(())
}

fn damaged(message: String) -> Error {
    Error::new(
        Kind::Damaged,
        format!("the filesystem contradicts itself: {message}"),
    )
    .hint("check it with e2fsck -fn; until it is repaired every block has to be copied")
}

/// The bitmaps read last: those of neighbouring groups often lie side by side.
#[derive(Default)]
struct Bitmaps {
    blocks: Range<u64>,
    bytes: Vec<u8>,
}

impl Bitmaps {
    /// One block with a bitmap. If it has to be read, so are up to `adjacent` blocks from it on.
    fn get(
        &mut self,
        geometry: &Geometry,
        source: &dyn ReadAt,
        block: u64,
        adjacent: u64,
    ) -> Result<&[u8]> {
        let size = geometry.block_size;
        if !self.blocks.contains(&block) {
            let count = adjacent.min(BITMAP_WINDOW / size).max(1);
            let mut end = geometry.blocks.min(block.saturating_add(count));
            self.blocks = 0..0;
            let mut read = |end: u64| {
                let len = ByteLen(end.saturating_sub(block) * size);
                self.bytes.resize(len.as_usize(), 0);
                source.read_exact_at(&mut self.bytes, geometry.offset(block))
            };
            if let Err(error) = read(end) {
                // One unreadable block must not take its neighbours with it.
                if count == 1 {
                    return Err(error);
                }
                end = geometry.blocks.min(block + 1);
                read(end)?;
            }
            self.blocks = block..end;
        }
        let at = ByteLen((block - self.blocks.start) * size).as_usize();
        Ok(self
            .bytes
            .get(at..at + ByteLen(size).as_usize())
            .unwrap_or_default())
    }
}

/// Metadata outside of its own group, in bounded memory.
#[derive(Default)]
struct Foreign {
    runs: ExtentSet,
    /// Gaps up to this many bytes are filled.
    slack: u64,
}

impl Foreign {
    fn insert(&mut self, extent: Extent) {
        self.runs.insert(extent);
        while self.runs.runs().len() > MAX_FOREIGN_RUNS {
            self.slack = (self.slack * 2).max(1 << 20);
            let mut wider = ExtentSet::new();
            let mut last: Option<Extent> = None;
            for &run in self.runs.runs() {
                last = Some(match last {
                    Some(last) if run.start.since(last.end()).0 <= self.slack => {
                        Extent::between(last.start, run.end())
                    }
                    Some(last) => {
                        wider.insert(last);
                        run
                    }
                    None => run,
                });
            }
            if let Some(last) = last {
                wider.insert(last);
            }
            self.runs = wider;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_metadata_stays_within_memory_and_is_never_lost() {
        const STEP: u64 = 3 << 20;
        let mut foreign = Foreign::default();
        let count = 2 * MAX_FOREIGN_RUNS as u64;
        for n in 0..count {
            // From both ends, so that not all come in order.
            let n = if n % 2 == 0 { n } else { count - n };
            foreign.insert(Extent::new(n * STEP, 4096));
        }
        assert!(foreign.runs.runs().len() <= MAX_FOREIGN_RUNS);
        for n in 0..count {
            let run = Extent::new(n * STEP, 4096);
            assert_eq!(foreign.runs.gaps(run).count(), 0, "{n}");
        }
    }
}
