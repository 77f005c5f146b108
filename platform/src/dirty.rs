//! Which blocks of a volume were written to since they were last read: a bitmap that one thread
//! marks while others take.

use std::sync::atomic::{AtomicU64, Ordering};

/// A set of blocks, shared between threads. All its memory is there from the begin: 32 KiB for each
/// GiB of 4 KiB blocks.
#[derive(Debug)]
pub struct DirtyMap {
    words: Box<[AtomicU64]>,
    blocks: u64,
    /// log2 of the block size in units of 512 bytes.
    shift: u32,
}

impl DirtyMap {
    /// For a volume of `sectors` (512 bytes each); blocks have `1 << shift` sectors. Nothing is
    /// dirty. `None` if that needs more memory than there can be.
    pub fn new(sectors: u64, shift: u32) -> Option<Self> {
        if shift > 30 {
            return None;
        }
        let blocks = sectors.div_ceil(1 << shift);
        let words = usize::try_from(blocks.div_ceil(64)).ok()?;
        let mut map = Vec::new();
        map.try_reserve_exact(words).ok()?;
        map.resize_with(words, || AtomicU64::new(0));
        let map = Self {
            words: map.into_boxed_slice(),
            blocks,
            shift,
        };
        // Not only allocated, but there: zeroed pages may be promises.
        for word in map.words.iter().step_by(512) {
            word.fetch_or(0, Ordering::Relaxed);
        }
        Some(map)
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Marks every block that `sectors` sectors from `sector` touch; what lies beyond the volume is
    /// left out.
    pub fn mark(&self, sector: u64, sectors: u64) {
        if sectors == 0 {
            return;
        }
        let first = sector >> self.shift;
        let last = sector.saturating_add(sectors - 1) >> self.shift;
        let last = last.min(self.blocks.saturating_sub(1));
        if first > last || self.blocks == 0 {
            return;
        }
        for index in first / 64..=last / 64 {
            let from = if index == first / 64 { first % 64 } else { 0 };
            let to = if index == last / 64 { last % 64 } else { 63 };
            let mask = (u64::MAX << from) & (u64::MAX >> (63 - to));
            if let Some(word) = self.word(index) {
                // Release: whoever takes the mark sees what was written before it was set.
                word.fetch_or(mask, Ordering::Release);
            }
        }
    }

    /// How many blocks are dirty.
    pub fn count(&self) -> u64 {
        let count = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.words.iter().map(count).sum()
    }

    /// Whether a block is dirty.
    pub fn is_dirty(&self, block: u64) -> bool {
        self.word(block / 64)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (block % 64) & 1 == 1)
    }

    /// Takes the next run of dirty blocks at or after `from`, at most `most` long: clears their
    /// marks and returns the first block and the length. The blocks are to be read **after** that:
    /// a write that the reading may have missed is marked again.
    pub fn take(&self, from: u64, most: u64) -> Option<(u64, u64)> {
        let first = self.find(from)?;
        let mut taken = 0;
        while taken < most && first + taken < self.blocks {
            let at = first + taken;
            let word = self.word(at / 64)?;
            // As many as this word holds and are asked for.
            let bits = (64 - at % 64).min(most - taken);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            let run = (word.load(Ordering::Relaxed) & mask) >> (at % 64);
            let length = u64::from(run.trailing_ones()).min(bits);
            if length == 0 {
                break;
            }
            let clear = (u64::MAX >> (64 - length)) << (at % 64);
            word.fetch_and(!clear, Ordering::AcqRel);
            taken += length;
            if length < bits {
                break;
            }
        }
        (taken > 0).then_some((first, taken))
    }

    /// The first dirty block at or after `from`.
    pub fn find(&self, from: u64) -> Option<u64> {
        let mut index = from / 64;
        let mut mask = u64::MAX << (from % 64);
        while let Some(word) = self.word(index) {
            let found = word.load(Ordering::Relaxed) & mask;
            if found != 0 {
                return Some(index * 64 + u64::from(found.trailing_zeros()));
            }
            mask = u64::MAX;
            index += 1;
        }
        None
    }

    /// Forgets all marks.
    pub fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }

    fn word(&self, index: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(index).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn runs_come_out_as_they_went_in() {
        let map = DirtyMap::new(8 * 1000 + 1, 3).unwrap();
        assert_eq!(map.blocks(), 1001);
        assert_eq!(map.take(0, 10), None);
        map.mark(8 * 60 + 7, 2);
        map.mark(8 * 62, 8 * 70);
        map.mark(8 * 1000, 1);
        assert_eq!(map.count(), 2 + 70 + 1);
        assert!(map.is_dirty(61) && !map.is_dirty(59));
        assert_eq!(map.take(0, 3), Some((60, 3)));
        assert_eq!(map.take(0, 1000), Some((63, 69)));
        assert_eq!(map.take(0, 1000), Some((1000, 1)));
        assert_eq!(map.count(), 0);
    }

    #[test]
    fn what_lies_outside_is_left_out() {
        let map = DirtyMap::new(100, 3).unwrap();
        map.mark(8 * 13, 1);
        map.mark(u64::MAX, u64::MAX);
        map.mark(5, 0);
        assert_eq!(map.count(), 0);
        map.mark(0, u64::MAX);
        assert_eq!(map.count(), 13);
        map.clear();
        assert_eq!(map.find(0), None);
        let empty = DirtyMap::new(0, 3).unwrap();
        empty.mark(0, 1);
        assert_eq!(empty.take(0, 1), None);
        assert!(DirtyMap::new(u64::MAX, 0).is_none());
    }

    #[test]
    fn as_a_plain_set_of_blocks() {
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..200 {
            let sectors = random(5000) + 1;
            let shift = u32::try_from(random(5)).unwrap();
            let map = DirtyMap::new(sectors, shift).unwrap();
            let mut set = BTreeSet::new();
            for _ in 0..random(20) {
                let (sector, length) = (random(sectors), random(400));
                map.mark(sector, length);
                let end = (sector + length).min(sectors);
                set.extend((sector..end).map(|sector| sector >> shift));
            }
            assert_eq!(map.count(), set.len() as u64);
            let most = random(200) + 1;
            let mut taken = BTreeSet::new();
            let mut from = 0;
            while let Some((first, length)) = map.take(from, most) {
                assert!(length <= most);
                taken.extend(first..first + length);
                from = first + length;
            }
            assert_eq!(taken, set);
            assert_eq!(map.count(), 0);
        }
    }
}
