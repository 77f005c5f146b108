//! The walk over used blocks.
//!
//! Used is what the extent tree lists, and nothing else: it holds every tree block and every extent of
//! data of all subvolumes, but not what a log tree holds. So it is read and checked as a whole first:
//! what is missing from it is free only if nothing in it is wrong. Then the stripes of the device are
//! gone through in the order in which they lie there, and the part of the extent tree that belongs to
//! each is read once more: what is held in memory does not grow with the number of extents.

use std::ops::Range;

use zerocopy::FromBytes;

use super::Btrfs;
use super::chunks::{Chunk, damaged};
use super::commit::{Trees, root_item};
use super::format::{self, BlockGroupItem, ExtentItem, Key};
use super::superblock::Geometry;
use super::tree::Reader;
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::fs::Walk;
use crate::fs::emit::Emitter;
use crate::read_at::ReadAt;
use crate::units::Offset;

/// More roots of trees than this nobody has; it bounds memory.
const MAX_ROOTS: usize = 1 << 22;

/// An extent, as its item in the extent tree says.
pub(crate) struct Listed {
    pub(crate) logical: Range<u64>,
    pub(crate) is_tree_block: bool,
    /// The commit it was allocated in.
    pub(crate) generation: u64,
}

/// Walks the used blocks: see [`Filesystem::walk_used`](crate::fs::Filesystem::walk_used).
pub(super) fn walk(
    btrfs: &Btrfs,
    source: &dyn ReadAt,
    sink: &mut dyn FnMut(Extent) -> Result<()>,
) -> Result<Walk> {
    let devices = btrfs.devices(source);
    let reader = btrfs.reader(&devices);
    // What is behind does not belong to it, and could be anything.
    let end = btrfs.size;
    let stripes = btrfs.commit.chunks.stripes_on(btrfs.devid, end)?;
    if btrfs.is_checked.get().is_none() {
        check(btrfs, &reader)?;
        let _ = btrfs.is_checked.set(());
    }
    let mut emitter = Emitter::new(source.len(), sink);
    let fixed = std::iter::once(Extent::new(0, format::RESERVED))
        .chain(format::SUPER_OFFSETS.map(|at| Extent::new(at, format::SUPER_SIZE)));
    let mut fixed = fixed.peekable();
    let mut emit = |run: Extent| {
        while let Some(other) = fixed.next_if(|other| other.start <= run.start) {
            emitter.used(other.start, other.end())?;
        }
        emitter.used(run.start, run.end())
    };
    for (number, index) in stripes {
        let Some(chunk) = btrfs.commit.chunks.chunks().get(number) else {
            continue;
        };
        let logical = &chunk.logical;
        let first = Key::new(logical.start, 0, 0);
        let last = Key::new(logical.end - 1, u8::MAX, u64::MAX);
        reader.walk(
            &btrfs.commit.trees.extent,
            first..=last,
            &mut |key: Key, item: &[u8]| {
                if let Some(listed) = listed(&btrfs.commit.geometry, key, item)? {
                    emit(chunk.on_stripe(index, &listed.logical))?;
                }
                Ok(())
            },
        )?;
    }
    // All that is fixed comes before the end.
    emit(Extent::new(end.0, 0))?;
    for warning in &btrfs.warnings {
        emitter.warn(warning.clone());
    }
    emitter.finish(Offset(end.0))
}

/// Checks the extent tree from end to end against itself, the chunks, the block groups, the roots of
/// all trees and the superblock.
fn check(btrfs: &Btrfs, reader: &Reader<'_>) -> Result<()> {
    let Trees {
        extent,
        block_group,
        ..
    } = &btrfs.commit.trees;
    let mut roots = roots(btrfs, reader)?;
    roots.sort_unstable();
    roots.dedup();
    let mut roots = roots.into_iter().peekable();
    let mut groups = Groups::new(btrfs);
    let mut last = 0;
    reader.walk(extent, Key::MIN..=Key::MAX, &mut |key: Key, item: &[u8]| {
        if key.kind == format::BLOCK_GROUP_ITEM && block_group.is_none() {
            return groups.note(key, item);
        }
        let Some(listed) = listed(&btrfs.commit.geometry, key, item)? else {
            return Ok(());
        };
        let Range { start, end } = listed.logical;
        if listed.generation > btrfs.commit.geometry.generation {
            return Err(damaged(format!(
                "the extent at logical {start} is newer than all else"
            )));
        }
        if start < last {
            return Err(damaged(format!("extents overlap at logical {start}")));
        }
        last = end;
        // A root that was passed by lies in no extent.
        if let Some(root) = roots.next_if(|root| *root <= start)
            && (root != start || !listed.is_tree_block)
        {
            return Err(unlisted(root));
        }
        groups.add(&listed)
    })?;
    if let Some(root) = roots.next() {
        return Err(unlisted(root));
    }
    if let Some(block_group) = block_group {
        reader.walk(
            block_group,
            Key::MIN..=Key::MAX,
            &mut |key: Key, item: &[u8]| groups.note(key, item),
        )?;
    }
    let used = groups.finish()?;
    let noted = btrfs.commit.bytes_used;
    if used != noted {
        return Err(damaged(format!(
            "the superblock counts {noted} bytes in use and the extent tree {used}"
        )));
    }
    Ok(())
}

fn unlisted(root: u64) -> Error {
    damaged(format!(
        "the root of a tree, at logical {root}, is not in the extent tree"
    ))
}

/// The logical addresses of the roots of all trees there are.
fn roots(btrfs: &Btrfs, reader: &Reader<'_>) -> Result<Vec<u64>> {
    let trees = &btrfs.commit.trees;
    let mut roots = vec![trees.root.block.bytenr, trees.chunk.block.bytenr];
    reader.walk(
        &trees.root,
        Key::MIN..=Key::MAX,
        &mut |key: Key, item: &[u8]| {
            if key.kind != format::ROOT_ITEM {
                return Ok(());
            }
            let root = root_item(item)?;
            // One that is being deleted may have no block left.
            if root.bytenr.get() > 0 {
                roots.push(root.bytenr.get());
            }
            match roots.len() {
                0..=MAX_ROOTS => Ok(()),
                _ => Err(Error::new(Kind::Damaged, "it has too many trees")),
            }
        },
    )?;
    Ok(roots)
}

/// What an item of the extent tree lists: an extent, or `None` if it tells more about one.
pub(crate) fn listed(geometry: &Geometry, key: Key, bytes: &[u8]) -> Result<Option<Listed>> {
    let Key {
        objectid: start,
        kind,
        offset,
    } = key;
    let nonsense = || damaged(format!("the extent at logical {start} makes no sense"));
    let node_len = geometry.node_len().0;
    let len = match kind {
        format::EXTENT_ITEM => offset,
        format::METADATA_ITEM if offset < u64::from(format::MAX_LEVELS) => node_len,
        format::BLOCK_GROUP_ITEM
        | format::EXTENT_OWNER_REF
        | format::TREE_BLOCK_REF
        | format::EXTENT_DATA_REF
        | format::SHARED_BLOCK_REF
        | format::SHARED_DATA_REF => return Ok(None),
        _ => return Err(nonsense()),
    };
    let (item, _) = ExtentItem::read_from_prefix(bytes).map_err(|_| nonsense())?;
    let contents = format::EXTENT_IS_DATA | format::EXTENT_IS_TREE_BLOCK;
    let is_tree_block = match item.flags.get() & contents {
        format::EXTENT_IS_DATA => false,
        format::EXTENT_IS_TREE_BLOCK => true,
        _ => return Err(nonsense()),
    };
    let sector_size = u64::from(geometry.sector_size);
    let end = start.checked_add(len).ok_or_else(nonsense)?;
    let is_sane = len > 0
        && start.is_multiple_of(sector_size)
        && len.is_multiple_of(sector_size)
        && (!is_tree_block || len == node_len)
        && (is_tree_block || kind == format::EXTENT_ITEM)
        && item.refs.get() > 0;
    match is_sane {
        true => Ok(Some(Listed {
            logical: start..end,
            is_tree_block,
            generation: item.generation.get(),
        })),
        false => Err(nonsense()),
    }
}

/// Block groups: what is accounted to each chunk.
struct Groups<'a> {
    btrfs: &'a Btrfs,
    /// By number of the chunk: the bytes of its extents, and what its block group counts.
    used: Vec<(u64, Option<u64>)>,
}

impl<'a> Groups<'a> {
    fn new(btrfs: &'a Btrfs) -> Self {
        Self {
            btrfs,
            used: vec![(0, None); btrfs.commit.chunks.chunks().len()],
        }
    }

    fn chunk_at(&mut self, logical: u64) -> Result<(&'a Chunk, &mut (u64, Option<u64>))> {
        let found = self.btrfs.commit.chunks.find(logical);
        let found = found.and_then(|(number, chunk)| Some((chunk, self.used.get_mut(number)?)));
        found.ok_or_else(|| damaged(format!("logical {logical} is in no chunk")))
    }

    /// Accounts an extent.
    fn add(&mut self, listed: &Listed) -> Result<()> {
        let Range { start, end } = listed.logical;
        let (chunk, (used, _)) = self.chunk_at(start)?;
        let may_hold = match listed.is_tree_block {
            true => format::METADATA | format::SYSTEM,
            false => format::DATA,
        };
        if end > chunk.logical.end || chunk.kind & may_hold == 0 {
            return Err(damaged(format!(
                "the extent at logical {start} lies in the wrong chunk"
            )));
        }
        *used += end - start;
        Ok(())
    }

    /// Notes what a block group item says.
    fn note(&mut self, key: Key, bytes: &[u8]) -> Result<()> {
        let start = key.objectid;
        let nonsense = || damaged(format!("the block group at logical {start} makes no sense"));
        let item = BlockGroupItem::read_from_bytes(bytes).map_err(|_| nonsense())?;
        let (chunk, (_, noted)) = self.chunk_at(start)?;
        let len = chunk.logical.end - chunk.logical.start;
        let is_same = key.kind == format::BLOCK_GROUP_ITEM
            && chunk.logical.start == start
            && len == key.offset
            && chunk.kind == item.flags.get()
            && item.chunk_objectid.get() == format::CHUNKS;
        if !is_same || noted.is_some() {
            return Err(nonsense());
        }
        *noted = Some(item.used.get());
        Ok(())
    }

    /// All bytes in use, if every block group counts just what is in it.
    fn finish(self) -> Result<u64> {
        let mut all = 0u64;
        for (chunk, (used, noted)) in self.btrfs.commit.chunks.chunks().iter().zip(self.used) {
            let start = chunk.logical.start;
            match noted {
                Some(noted) if noted == used => {}
                Some(noted) => {
                    return Err(damaged(format!(
                        "the block group at logical {start} counts {noted} bytes in use and the \
                         extent tree {used}"
                    )));
                }
                None => {
                    return Err(damaged(format!(
                        "the chunk at logical {start} has no block group"
                    )));
                }
            }
            all = all.saturating_add(used);
        }
        Ok(all)
    }
}
