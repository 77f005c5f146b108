//! Volumes that somebody changed, and walks over their used blocks. Also for the fuzzer, so it uses nothing
//! of the tests.

use std::sync::atomic::{AtomicU64, Ordering};

use holdstill::error::{Error, Kind, Result};
use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{Filesystem, Walk};
use holdstill::read_at::{ReadAt, check_range};
use holdstill::units::{ByteLen, Offset};

/// No single read is larger.
const MAX_READ: usize = 4 << 20;
/// Nothing that is done with a small volume reads more.
const MAX_READ_IN_ALL: u64 = 256 << 20;

/// Where, and what comes to be there.
pub(crate) type Patch = (u64, Vec<u8>);

/// A volume, changed here and there.
pub(crate) struct Changed<'a> {
    pub(crate) base: &'a dyn ReadAt,
    /// Where it is cut off.
    pub(crate) len: ByteLen,
    pub(crate) patches: Vec<Patch>,
    /// What cannot be read.
    pub(crate) broken: Option<Extent>,
}

impl ReadAt for Changed<'_> {
    fn len(&self) -> ByteLen {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let whole = Extent::new(offset.0, buf.len() as u64);
        check_range(self.len, offset, whole.len)?;
        if self
            .broken
            .is_some_and(|broken| broken.intersect(whole).is_some())
        {
            return Err(Error::new(Kind::Io, "unreadable").at(offset));
        }
        self.base.read_exact_at(buf, offset)?;
        for (at, bytes) in &self.patches {
            if let Some(both) = whole.intersect(Extent::new(*at, bytes.len() as u64)) {
                let from = (both.start.0 - at) as usize;
                let to = (both.start.0 - offset.0) as usize;
                let len = both.len.0 as usize;
                buf[to..to + len].copy_from_slice(&bytes[from..from + len]);
            }
        }
        Ok(())
    }
}

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
