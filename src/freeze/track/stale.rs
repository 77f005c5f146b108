//! Which blocks of a tracked source are stale and in use: the map of marks, looked at through the
//! filesystem's own map. Nothing here allocates, but for [`last_runs`].

use holdstill_platform::dirty::DirtyMap;
use holdstill_platform::fsmap::UsedRange;

use crate::error::Result;
use crate::extent::{Extent, ExtentSet};
use crate::image::format::BLOCK;
use crate::image::tables::{Content, Run};
use crate::units::{ByteLen, Offset, SECTOR};

/// Blocks of marks have `1 << BLOCK_SHIFT` sectors: they are the image's blocks.
pub(super) const BLOCK_SHIFT: u32 = (BLOCK / SECTOR).trailing_zeros();

/// Gaps up to this length between two stale runs are read with them: one request instead of two.
const WORTH_READING: u64 = 32 << 10;

/// Bytes of a map.
pub(super) fn bytes(used: &[UsedRange]) -> ByteLen {
    used.iter().map(|range| ByteLen(range.len)).sum()
}

/// The blocks a range touches.
fn blocks(range: &UsedRange) -> std::ops::Range<u64> {
    range.start / BLOCK..(range.start + range.len).div_ceil(BLOCK)
}

/// The next run of marks in `blocks`, without clearing it: each block once.
fn runs<'a>(
    marks: &'a DirtyMap,
    blocks: std::ops::Range<u64>,
) -> impl Iterator<Item = (u64, u64)> + 'a {
    let mut at = blocks.start;
    std::iter::from_fn(move || {
        let first = marks.find(at).filter(|first| *first < blocks.end)?;
        let mut end = first + 1;
        while end < blocks.end && marks.is_dirty(end) {
            end += 1;
        }
        at = end;
        Some((first, end - first))
    })
}

/// Bytes that are stale and in use.
pub(super) fn count(stale: &DirtyMap, used: &[UsedRange]) -> u64 {
    let marked = used.iter().flat_map(|range| runs(stale, blocks(range)));
    marked.map(|(_, len)| len * BLOCK).sum()
}

/// Takes the marks of everything stale and in use, and only then hands it to `sink`, to be read.
/// Ascending; a block that two ranges share comes once.
pub(super) fn take(
    stale: &DirtyMap,
    copied: &DirtyMap,
    used: &[UsedRange],
    sink: &mut dyn FnMut(Run) -> Result<()>,
) -> Result<()> {
    for range in used {
        let blocks = blocks(range);
        let mut at = blocks.start;
        while let Some(first) = stale.find(at).filter(|first| *first < blocks.end) {
            let Some((first, len)) = stale.take(first, blocks.end - first) else {
                break;
            };
            copied.mark(first << BLOCK_SHIFT, len << BLOCK_SHIFT);
            at = first + len;
            sink(Run {
                extent: Extent::new(first * BLOCK, len * BLOCK),
                content: Content::Data,
            })?;
        }
    }
    Ok(())
}

/// The same for the final freeze: runs with small gaps between them are joined. `push` says whether
/// there is room for another one; if not, it stops, with the marks of what was not pushed set again.
pub(super) fn collect(
    stale: &DirtyMap,
    used: &[UsedRange],
    mut push: impl FnMut(Extent) -> bool,
) -> bool {
    let mut push_or_mark = |extent: Extent| {
        let has_room = push(extent);
        if !has_room {
            mark(stale, extent);
        }
        has_room
    };
    let mut joined: Option<Extent> = None;
    for range in used {
        let blocks = blocks(range);
        let mut at = blocks.start;
        while let Some(first) = stale.find(at).filter(|first| *first < blocks.end) {
            let Some((first, len)) = stale.take(first, blocks.end - first) else {
                break;
            };
            at = first + len;
            let extent = Extent::new(first * BLOCK, len * BLOCK);
            match &mut joined {
                Some(last) if extent.start.since(last.end()).0 <= WORTH_READING => {
                    *last = Extent::between(last.start, extent.end());
                }
                _ => {
                    let whole = joined.replace(extent);
                    if whole.is_some_and(|whole| !push_or_mark(whole)) {
                        mark(stale, extent);
                        return false;
                    }
                }
            }
        }
    }
    joined.is_none_or(push_or_mark)
}

/// Hands everything that was copied and is in use to `sink`, but for what is stale. Takes no marks.
pub(super) fn settled(
    stale: &DirtyMap,
    copied: &DirtyMap,
    used: &[UsedRange],
    sink: &mut dyn FnMut(Run) -> Result<()>,
) -> Result<()> {
    for range in used {
        for (first, len) in runs(copied, blocks(range)) {
            let mut at = first;
            while at < first + len {
                let end = stale.find(at).unwrap_or(u64::MAX).min(first + len);
                if at < end {
                    sink(Run {
                        extent: Extent::new(at * BLOCK, (end - at) * BLOCK),
                        content: Content::Data,
                    })?;
                }
                at = end + 1;
            }
        }
    }
    Ok(())
}

/// Whether all blocks of a set are stale.
pub(super) fn all_marked(stale: &DirtyMap, set: &ExtentSet) -> bool {
    let mut blocks = set
        .runs()
        .iter()
        .flat_map(|run| run.start.0 / BLOCK..run.end().0.div_ceil(BLOCK));
    blocks.all(|block| stale.is_dirty(block))
}

/// Marks a run as stale again.
pub(super) fn mark(stale: &DirtyMap, extent: Extent) {
    stale.mark(extent.start.0 / SECTOR, extent.len.0.div_ceil(SECTOR));
}

/// What the last pass is about: the blocks that were read in the freeze, zeros for what is in use but
/// not worth copying, and what was copied before and is no longer in use.
pub(super) fn last_runs(
    read: &[Extent],
    zeros: &[UsedRange],
    copied: &DirtyMap,
    used: &[UsedRange],
    size: ByteLen,
) -> Vec<Run> {
    let data = read.iter().map(|extent| Run {
        extent: *extent,
        content: Content::Data,
    });
    let mut runs_of_pass: Vec<Run> = data.collect();
    runs_of_pass.extend(zeros.iter().map(|range| Run {
        extent: Extent::new(range.start, range.len),
        content: Content::Zero,
    }));
    let mut free_from = 0;
    let end = UsedRange {
        start: size.0,
        len: 0,
    };
    for range in used.iter().chain([&end]) {
        // Only whole blocks that no range in use touches.
        let free = free_from..(range.start / BLOCK).max(free_from);
        let freed = runs(copied, free).map(|(first, len)| Run {
            extent: Extent::between(
                Offset(first * BLOCK),
                Offset(((first + len) * BLOCK).min(size.0)),
            ),
            content: Content::Trim,
        });
        runs_of_pass.extend(freed);
        free_from = free_from.max((range.start + range.len).div_ceil(BLOCK));
    }
    runs_of_pass.sort_by_key(|run| run.extent.start);
    runs_of_pass
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const BLOCKS: u64 = 256;

    fn any_blocks() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(0..BLOCKS, 0..100)
    }

    fn map_of(set: &BTreeSet<u64>) -> DirtyMap {
        let map = DirtyMap::new(BLOCKS << BLOCK_SHIFT, BLOCK_SHIFT).unwrap();
        set.iter()
            .for_each(|block| map.mark(block << BLOCK_SHIFT, 1 << BLOCK_SHIFT));
        map
    }

    fn ranges_of(set: &BTreeSet<u64>) -> Vec<UsedRange> {
        let mut ranges: Vec<UsedRange> = Vec::new();
        for block in set {
            match ranges.last_mut() {
                Some(last) if last.start + last.len == block * BLOCK => last.len += BLOCK,
                _ => ranges.push(UsedRange {
                    start: block * BLOCK,
                    len: BLOCK,
                }),
            }
        }
        ranges
    }

    fn blocks_of(extents: impl IntoIterator<Item = Extent>) -> BTreeSet<u64> {
        let each = |extent: Extent| extent.start.0 / BLOCK..extent.end().0.div_ceil(BLOCK);
        extents.into_iter().flat_map(each).collect()
    }

    proptest! {
        /// A round takes exactly what is stale and in use, and leaves every other mark.
        #[test]
        fn rounds_take_what_is_stale_and_used(marked in any_blocks(), in_use in any_blocks()) {
            let (stale, copied) = (map_of(&marked), map_of(&BTreeSet::new()));
            let used = ranges_of(&in_use);
            let both: BTreeSet<u64> = marked.intersection(&in_use).copied().collect();
            prop_assert_eq!(count(&stale, &used), both.len() as u64 * BLOCK);
            let mut taken = Vec::new();
            take(&stale, &copied, &used, &mut |run| { taken.push(run.extent); Ok(()) }).unwrap();
            prop_assert_eq!(&blocks_of(taken), &both);
            for block in 0..BLOCKS {
                prop_assert_eq!(copied.is_dirty(block), both.contains(&block));
                prop_assert_eq!(stale.is_dirty(block), marked.contains(&block) && !both.contains(&block));
            }
        }

        /// What is compared was copied, is in use, and is not stale; no mark is taken.
        #[test]
        fn what_is_settled_is_compared(
            marked in any_blocks(), in_use in any_blocks(), before in any_blocks(),
        ) {
            let (stale, copied) = (map_of(&marked), map_of(&before));
            let mut compared = Vec::new();
            settled(&stale, &copied, &ranges_of(&in_use), &mut |run| {
                compared.push(run.extent);
                Ok(())
            }).unwrap();
            let expected: BTreeSet<u64> = before.intersection(&in_use)
                .filter(|block| !marked.contains(block)).copied().collect();
            prop_assert_eq!(blocks_of(compared.clone()), expected);
            prop_assert_eq!(stale.count(), marked.len() as u64);
            let compared: ExtentSet = compared.into_iter().collect();
            prop_assert!(compared.is_empty() || !all_marked(&stale, &compared));
            let marked: ExtentSet = marked.iter().map(|block| Extent::new(block * BLOCK, BLOCK)).collect();
            prop_assert!(all_marked(&stale, &marked));
        }

        /// Without room no mark is lost: what was not read is still marked.
        #[test]
        fn without_room_no_mark_is_lost(
            marked in any_blocks(), in_use in any_blocks(), room in 0usize..4,
        ) {
            let stale = map_of(&marked);
            let mut read = Vec::new();
            collect(&stale, &ranges_of(&in_use), |extent| {
                let has_room = read.len() < room;
                if has_room { read.push(extent); }
                has_room
            });
            let covered = blocks_of(read);
            for block in marked {
                prop_assert!(stale.is_dirty(block) || covered.contains(&block));
            }
        }

        /// The final reading covers what is stale and in use, joins only near runs, and the last pass
        /// gives up exactly what was copied and is no longer in use.
        #[test]
        fn the_last_pass_is_complete(
            marked in any_blocks(), in_use in any_blocks(), before in any_blocks(),
        ) {
            let (stale, copied) = (map_of(&marked), map_of(&before));
            let used = ranges_of(&in_use);
            let mut read = Vec::new();
            let fits = collect(&stale, &used, |extent| {
                read.push(extent);
                true
            });
            prop_assert!(fits);
            prop_assert!(read.windows(2).all(|pair| pair[1].start.since(pair[0].end()).0 > WORTH_READING));
            let covered = blocks_of(read.clone());
            prop_assert!(marked.intersection(&in_use).all(|block| covered.contains(block)));
            let runs = last_runs(&read, &[], &copied, &used, ByteLen(BLOCKS * BLOCK));
            prop_assert!(runs.windows(2).all(|pair| pair[0].extent.start <= pair[1].extent.start));
            let trimmed = runs.iter().filter(|run| run.content == Content::Trim).map(|run| run.extent);
            let expected: BTreeSet<u64> = before.difference(&in_use).copied().collect();
            prop_assert_eq!(blocks_of(trimmed), expected);
        }
    }
}
