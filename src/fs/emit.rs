//! From what a map finds, in order, to the runs its caller gets.

use crate::error::Result;
use crate::extent::Extent;
use crate::units::{ByteLen, Offset};

/// How many warnings a walk keeps; the rest are counted.
const MAX_WARNINGS: usize = 32;

/// Merges ascending runs and hands them on. Whatever it is given, what it hands on is ascending,
/// disjoint and within the volume.
pub(super) struct Emitter<'a> {
    sink: &'a mut dyn FnMut(Extent) -> Result<()>,
    volume: ByteLen,
    pending: Extent,
    used: ByteLen,
    warnings: Vec<String>,
    unsaid: u64,
}

impl<'a> Emitter<'a> {
    pub(super) fn new(volume: ByteLen, sink: &'a mut dyn FnMut(Extent) -> Result<()>) -> Self {
        Self {
            sink,
            volume,
            pending: Extent::new(0, 0),
            used: ByteLen::ZERO,
            warnings: Vec::new(),
            unsaid: 0,
        }
    }

    /// `[start, end)` is in use. What lies before the end of the last run is known already.
    pub(super) fn used(&mut self, start: Offset, end: Offset) -> Result<()> {
        let start = start.max(self.pending.end());
        let end = end.min(Offset(self.volume.0));
        if start >= end {
            return Ok(());
        }
        if start > self.pending.end() {
            self.flush()?;
            self.pending = Extent::between(start, end);
        } else {
            self.pending = Extent::between(self.pending.start, end);
        }
        Ok(())
    }

    /// Something was damaged and is taken as in use.
    pub(super) fn warn(&mut self, warning: String) {
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push(warning);
        } else {
            self.unsaid += 1;
        }
    }

    /// All of the volume from `start` on is in use, and that was all.
    pub(super) fn finish(mut self, start: Offset) -> Result<super::Walk> {
        self.used(start, Offset(self.volume.0))?;
        self.flush()?;
        if self.unsaid > 0 {
            self.warnings
                .push(format!("and {} more of the kind", self.unsaid));
        }
        Ok(super::Walk {
            used: self.used,
            warnings: self.warnings,
        })
    }

    fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.used += self.pending.len;
        (self.sink)(self.pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_out_merged_ascending_and_within_the_volume() {
        let mut runs = Vec::new();
        let mut sink = |run| {
            runs.push(run);
            Ok(())
        };
        let mut emitter = Emitter::new(ByteLen(1000), &mut sink);
        for (start, end) in [(10, 20), (20, 30), (25, 28), (5, 31), (40, 41), (990, 2000)] {
            emitter.used(Offset(start), Offset(end)).unwrap();
        }
        let walk = emitter.finish(Offset(3000)).unwrap();
        assert_eq!(
            runs,
            [
                Extent::new(10, 21),
                Extent::new(40, 1),
                Extent::new(990, 10)
            ]
        );
        assert_eq!(walk.used, ByteLen(32));
    }

    #[test]
    fn the_first_run_may_begin_at_the_start() {
        let mut runs = Vec::new();
        let mut sink = |run| {
            runs.push(run);
            Ok(())
        };
        let mut emitter = Emitter::new(ByteLen(100), &mut sink);
        emitter.used(Offset(0), Offset(5)).unwrap();
        emitter.finish(Offset(90)).unwrap();
        assert_eq!(runs, [Extent::new(0, 5), Extent::new(90, 10)]);
    }

    #[test]
    fn warnings_are_bounded() {
        let mut sink = |_| Ok(());
        let mut emitter = Emitter::new(ByteLen(1), &mut sink);
        for n in 0..100 {
            emitter.warn(format!("{n}"));
        }
        let warnings = emitter.finish(Offset(0)).unwrap().warnings;
        assert_eq!(warnings.len(), MAX_WARNINGS + 1);
        assert_eq!(warnings[MAX_WARNINGS], "and 68 more of the kind");
    }
}
