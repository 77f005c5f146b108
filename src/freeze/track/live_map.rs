//! Which blocks a mounted filesystem uses right now, by the kernel's own map, and which of those are
//! worth copying: all but swap space.

use std::path::Path;
use std::sync::Arc;

use holdstill_platform::freeze::MountPoint;
use holdstill_platform::fsmap::{FsMap, FsMapError, UsedRange};
use holdstill_platform::node::DeviceNumber;
use holdstill_platform::swap_file::SwapFile;

use crate::error::{Error, Kind, Result};
use crate::image::format::BLOCK;
use crate::units::ByteLen;

/// Room for ranges at first.
const ROOM: usize = 64 << 10;

/// And always for so many more than at the last look, beside half as many again.
const MORE_ROOM: usize = 4096;

/// Room for ranges of swap space. What finds no room is copied like anything else.
const SWAP_ROOM: usize = 16 << 10;

/// The map of a mounted filesystem, as of the last look.
#[derive(Debug)]
pub(super) struct LiveMap {
    fsmap: FsMap,
    point: Arc<MountPoint>,
    device: DeviceNumber,
    size: ByteLen,
    /// Everything counts as in use.
    all_blocks: bool,
    /// What the filesystem calls used.
    mapped: Vec<UsedRange>,
    swap_files: Vec<SwapFile>,
    /// What of that is swap space: whole blocks.
    swap: Vec<UsedRange>,
    /// The rest.
    used: Vec<UsedRange>,
}

impl LiveMap {
    /// For the filesystem at `point` on `device`, of `size` bytes. With `all_blocks` it says that
    /// everything is in use. What lies in `swap_files` is in use, but not worth copying.
    pub(super) fn new(
        point: Arc<MountPoint>,
        device: DeviceNumber,
        size: ByteLen,
        all_blocks: bool,
        swap_files: Vec<SwapFile>,
    ) -> Self {
        Self {
            fsmap: FsMap::new(),
            point,
            device,
            size,
            all_blocks,
            mapped: Vec::with_capacity(ROOM),
            swap: Vec::with_capacity(if swap_files.is_empty() { 0 } else { SWAP_ROOM }),
            swap_files,
            used: Vec::with_capacity(ROOM),
        }
    }

    /// From the next look on, everything is in use.
    pub(super) fn distrust(&mut self) {
        self.all_blocks = true;
    }

    /// Whether there are swap files in use, to which the kernel writes whatever is frozen.
    pub(super) fn has_swap(&self) -> bool {
        !self.swap_files.is_empty()
    }

    /// What was in use and worth copying at the last look: ascending.
    pub(super) fn used(&self) -> &[UsedRange] {
        &self.used
    }

    /// What was in use, swap space included: ascending.
    pub(super) fn mapped(&self) -> &[UsedRange] {
        &self.mapped
    }

    /// What was swap space, in whole blocks: ascending.
    pub(super) fn swap(&self) -> &[UsedRange] {
        &self.swap
    }

    /// A look that may take its time and its memory.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if the filesystem has no such map, or lies on other devices too.
    pub(super) fn look(&mut self, name: &Path) -> Result<()> {
        loop {
            match self.try_look() {
                Err(FsMapError::TooManyRanges { needed }) => {
                    for ranges in [&mut self.mapped, &mut self.used] {
                        ranges.clear();
                        ranges.reserve_exact(needed + needed / 2);
                    }
                }
                other => return other.map_err(|error| explain(&error, name)),
            }
        }
    }

    /// A look that allocates nothing: for while the filesystem is frozen. There must be
    /// [room](Self::make_room).
    ///
    /// # Errors
    /// As [`look`](Self::look), or if there are more ranges than room.
    pub(super) fn look_in_place(&mut self, name: &Path) -> Result<()> {
        self.try_look().map_err(|error| explain(&error, name))
    }

    /// Makes room for half as many ranges again as at the last look.
    pub(super) fn make_room(&mut self) {
        let len = self.mapped.len().max(self.used.len());
        let wanted = len + len / 2 + MORE_ROOM;
        for ranges in [&mut self.mapped, &mut self.used] {
            if ranges.capacity() < wanted {
                ranges.reserve_exact(wanted - ranges.len());
            }
        }
    }

    fn try_look(&mut self) -> std::result::Result<(), FsMapError> {
        self.swap.clear();
        if self.all_blocks {
            self.mapped.clear();
            self.mapped.push(UsedRange {
                start: 0,
                len: self.size.0,
            });
        } else {
            self.fsmap
                .used(&self.point, self.device, self.size.0, &mut self.mapped)?;
            for file in &mut self.swap_files {
                file.add_ranges(&mut self.swap);
            }
            whole_blocks(&mut self.swap);
        }
        without(&self.mapped, &self.swap, &mut self.used)
    }
}

/// Cuts ranges to the whole blocks in them, and puts them in order.
fn whole_blocks(ranges: &mut Vec<UsedRange>) {
    ranges.retain_mut(|range| {
        let end = (range.start + range.len) / BLOCK * BLOCK;
        range.start = range.start.next_multiple_of(BLOCK);
        range.len = end.saturating_sub(range.start);
        range.len > 0
    });
    ranges.sort_unstable_by_key(|range| range.start);
}

/// Puts what is in `ranges` and not in `others` into `rest`, which never grows beyond its capacity.
fn without(
    ranges: &[UsedRange],
    others: &[UsedRange],
    rest: &mut Vec<UsedRange>,
) -> std::result::Result<(), FsMapError> {
    rest.clear();
    let mut needed = 0;
    let mut add = |start: u64, end: u64| {
        if start >= end {
            return;
        }
        needed += 1;
        if rest.len() < rest.capacity() {
            let len = end - start;
            rest.push(UsedRange { start, len });
        }
    };
    let mut others = others.iter().peekable();
    for range in ranges {
        let (mut at, end) = (range.start, range.start + range.len);
        while let Some(other) = others.peek().filter(|other| other.start < end) {
            add(at, other.start);
            at = at.max(other.start + other.len);
            if at > end {
                // It may reach into the next range as well.
                break;
            }
            others.next();
        }
        add(at, end);
    }
    if needed > rest.len() {
        return Err(FsMapError::TooManyRanges { needed });
    }
    Ok(())
}

fn explain(error: &FsMapError, name: &Path) -> Error {
    let kind = match error {
        FsMapError::AnotherDevice(_) | FsMapError::Unsupported => Kind::NotApplicable,
        _ => Kind::Io,
    };
    Error::new(kind, "the filesystem's map cannot be had")
        .on(name)
        .because(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges_of(set: &[bool]) -> Vec<UsedRange> {
        let mut ranges: Vec<UsedRange> = Vec::new();
        for (at, _) in set.iter().enumerate().filter(|(_, is_in)| **is_in) {
            let start = at as u64;
            match ranges.last_mut() {
                Some(last) if last.start + last.len == start => last.len += 1,
                _ => ranges.push(UsedRange { start, len: 1 }),
            }
        }
        ranges
    }

    proptest! {
        /// Every byte is copied that is in use and no swap space, and no other; without room for
        /// that it says so.
        #[test]
        fn without_is_the_difference(
            sets in prop::collection::vec(any::<(bool, bool)>(), 0..200), room in 0usize..50,
        ) {
            let (used, swap): (Vec<bool>, Vec<bool>) = sets.iter().copied().unzip();
            let both: Vec<bool> = sets.iter().map(|(used, swap)| *used && !*swap).collect();
            let expected = ranges_of(&both);
            let mut rest = Vec::with_capacity(room);
            let capacity = rest.capacity();
            let result = without(&ranges_of(&used), &ranges_of(&swap), &mut rest);
            prop_assert_eq!(rest.capacity(), capacity);
            if expected.len() > capacity {
                let needed = expected.len();
                prop_assert_eq!(result, Err(FsMapError::TooManyRanges { needed }));
            } else {
                prop_assert_eq!(result, Ok(()));
                prop_assert_eq!(rest, expected);
            }
        }
    }

    #[test]
    fn only_whole_blocks_are_swap_space() {
        let range = |start, len| UsedRange { start, len };
        let mut ranges = vec![
            range(5 * BLOCK, 3 * BLOCK + 1),
            range(100, BLOCK),
            range(BLOCK, 2 * BLOCK),
            range(10 * BLOCK - 1, BLOCK + 1),
        ];
        whole_blocks(&mut ranges);
        let expected = [(1, 2), (5, 3), (10, 1)];
        assert_eq!(
            ranges,
            expected.map(|(start, len)| range(start * BLOCK, len * BLOCK))
        );
    }
}
