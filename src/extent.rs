//! Runs of bytes of a volume, alone and in sorted sets.

use crate::units::{ByteLen, Offset};

/// A run of bytes: `[start, start + len)`. The end never overflows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// The first byte.
    pub start: Offset,
    /// How many bytes.
    pub len: ByteLen,
}

impl Extent {
    /// `len` bytes from `start`. A run that would pass the end of the number range is cut there.
    pub fn new(start: u64, len: u64) -> Self {
        Self {
            start: Offset(start),
            len: ByteLen(len.min(u64::MAX - start)),
        }
    }

    /// The run from `start` up to, not including, `end`; empty if `end` lies before `start`.
    pub fn between(start: Offset, end: Offset) -> Self {
        Self {
            start,
            len: end.since(start),
        }
    }

    /// The first byte behind the run.
    pub fn end(self) -> Offset {
        self.start + self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == ByteLen::ZERO
    }

    /// What both have in common, if anything.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let both = Self::between(self.start.max(other.start), self.end().min(other.end()));
        (!both.is_empty()).then_some(both)
    }

    /// The smallest run of whole `unit`s that covers it, cut at `limit` (the volume's size).
    pub fn align_out(self, unit: u64, limit: ByteLen) -> Self {
        Self::between(
            self.start.align_down(unit),
            self.end().align_up(unit).min(Offset(limit.0)),
        )
    }
}

/// A set of bytes as ascending, disjoint, non-adjacent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    runs: Vec<Extent>,
}

impl ExtentSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The runs, ascending, disjoint and not touching each other.
    pub fn runs(&self) -> &[Extent] {
        &self.runs
    }

    /// Whether no byte is in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many bytes are in it.
    pub fn bytes(&self) -> ByteLen {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Adds a run. Cheap when runs come in ascending order, as maps give them.
    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        // Every run before `from` ends before the new one begins; every run from `to` on
        // begins behind its end: those between touch or overlap it and become one with it.
        let from = match self.runs.last() {
            Some(last) if last.end() < extent.start => self.runs.len(),
            _ => self.runs.partition_point(|run| run.end() < extent.start),
        };
        let to = from + self.runs[from..].partition_point(|run| run.start <= extent.end());
        let merged = self.runs[from..to].iter().fold(extent, |whole, run| {
            Extent::between(whole.start.min(run.start), whole.end().max(run.end()))
        });
        self.runs.splice(from..to, [merged]);
    }

    /// Takes a run out.
    pub fn remove(&mut self, extent: Extent) {
        let from = self.runs.partition_point(|run| run.end() <= extent.start);
        let to = from + self.runs[from..].partition_point(|run| run.start < extent.end());
        if from == to {
            return;
        }
        let before = Extent::between(self.runs[from].start, extent.start);
        let behind = Extent::between(extent.end(), self.runs[to - 1].end());
        let rest = [before, behind].into_iter().filter(|run| !run.is_empty());
        self.runs.splice(from..to, rest);
    }

    /// What of `extent` is in the set, ascending.
    pub fn intersect(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let from = self.runs.partition_point(|run| run.end() <= extent.start);
        self.runs[from..]
            .iter()
            .map_while(move |run| run.intersect(extent))
    }

    /// What of `extent` is not in the set, ascending.
    pub fn gaps(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let mut at = extent.start;
        self.intersect(extent)
            .map(Some)
            .chain([None])
            .filter_map(move |run| {
                let gap = Extent::between(at, run.map_or(extent.end(), |run| run.start));
                at = run.map_or(extent.end(), Extent::end);
                (!gap.is_empty()).then_some(gap)
            })
    }

    /// Whether every byte of `extent` is in the set.
    pub fn covers(&self, extent: Extent) -> bool {
        self.gaps(extent).next().is_none()
    }

    /// What is in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        other
            .runs
            .iter()
            .flat_map(|run| self.intersect(*run))
            .collect()
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.runs.iter().flat_map(|run| other.gaps(*run)).collect()
    }
}

impl Extend<Extent> for ExtentSet {
    fn extend<I: IntoIterator<Item = Extent>>(&mut self, extents: I) {
        for extent in extents {
            self.insert(extent);
        }
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        set.extend(extents);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPACE: u64 = 64;

    fn bits(set: &ExtentSet) -> Vec<bool> {
        let mut bits = vec![false; 2 * SPACE as usize];
        for run in set.runs() {
            bits[run.start.0 as usize..run.end().0 as usize].fill(true);
        }
        bits
    }

    fn any_set() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0..SPACE, 0..SPACE / 4), 0..20)
    }

    fn set_of(runs: &[(u64, u64)]) -> ExtentSet {
        runs.iter()
            .map(|&(start, len)| Extent::new(start, len))
            .collect()
    }

    proptest! {
        /// A set behaves like one bit for each byte.
        #[test]
        fn sets_are_sets(a in any_set(), b in any_set()) {
            let (set_a, set_b) = (set_of(&a), set_of(&b));
            for (set, runs) in [(&set_a, &a), (&set_b, &b)] {
                let mut model = vec![false; 2 * SPACE as usize];
                for &(start, len) in runs {
                    model[start as usize..(start + len) as usize].fill(true);
                }
                prop_assert_eq!(bits(set), model);
                prop_assert!(set.runs().windows(2).all(|pair| pair[0].end() < pair[1].start));
            }
            let both: Vec<bool> = bits(&set_a).iter().zip(bits(&set_b)).map(|(x, y)| *x && y).collect();
            prop_assert_eq!(bits(&set_a.intersection(&set_b)), both);
            let only_a: Vec<bool> = bits(&set_a).iter().zip(bits(&set_b)).map(|(x, y)| *x && !y).collect();
            prop_assert_eq!(bits(&set_a.difference(&set_b)), only_a);
            let mut removed = set_a.clone();
            set_b.runs().iter().for_each(|run| removed.remove(*run));
            prop_assert_eq!(removed, set_a.difference(&set_b));
        }
    }

    #[test]
    fn runs_never_pass_the_end_of_numbers() {
        assert_eq!(Extent::new(u64::MAX - 1, 5).end(), Offset(u64::MAX));
        let cut = Extent::new(4000, 500).align_out(4096, ByteLen(4608));
        assert_eq!(cut, Extent::new(0, 4608));
    }
}
