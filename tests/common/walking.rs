//! Walks the used blocks of a volume that anybody may have made. Also for the fuzzer, so it uses nothing of
//! the tests.

use std::sync::atomic::{AtomicU64, Ordering};

use holdstill::error::Result;
use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{Filesystem, Walk};
use holdstill::read_at::ReadAt;
use holdstill::units::{ByteLen, Offset};

/// No single read is larger.
const MAX_READ: usize = 4 << 20;
/// Nothing that is done with a small volume reads more.
const MAX_READ_IN_ALL: u64 = 256 << 20;

/// A small volume that panics where a parser reads without bound.
pub(crate) struct Bounded<'a> {
    volume: &'a dyn ReadAt,
    read: AtomicU64,
}

impl<'a> Bounded<'a> {
    pub(crate) fn new(volume: &'a dyn ReadAt) -> Self {
        Self {
            volume,
            read: AtomicU64::new(0),
        }
    }
}

impl ReadAt for Bounded<'_> {
    fn len(&self) -> ByteLen {
        self.volume.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        assert!(buf.len() <= MAX_READ, "{} bytes in one read", buf.len());
        let all = self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        assert!(all <= MAX_READ_IN_ALL, "it reads and reads");
        self.volume.read_exact_at(buf, offset)
    }
}

/// Walks a filesystem, checking that the runs keep their promises.
pub(crate) fn walk(filesystem: &dyn Filesystem, source: &dyn ReadAt) -> (ExtentSet, Result<Walk>) {
    let mut used = ExtentSet::new();
    let mut last = None;
    let walk = filesystem.walk_used(source, &mut |run: Extent| {
        assert!(!run.is_empty(), "an empty run");
        assert!(run.end().0 <= source.len().0, "{run:?} is outside");
        assert!(
            last.is_none_or(|last| run.start > last),
            "{run:?} after {last:?}"
        );
        last = Some(run.end());
        used.insert(run);
        Ok(())
    });
    if let Ok(walk) = &walk {
        assert_eq!(walk.used, used.bytes());
    }
    (used, walk)
}
