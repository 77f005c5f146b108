//! What is copied after the window: all data of the commit that is pinned.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use holdstill_platform::btrfs::{self as kernel, Filesystem};

use super::loose::DataRef;
use super::pins::Pin;
use super::proof;
use super::rounds::{data, extents};
use super::window::Seen;
use crate::error::Result;
use crate::fs::btrfs::format;
use crate::image::tables::Run;
use crate::units::ByteLen;

/// How often to look whether what is pinned is being moved.
const LOOK: Duration = Duration::from_millis(100);

/// The extents of one subvolume, by logical address.
#[derive(Debug)]
pub(super) struct Extents(Vec<u64>);

impl Extents {
    /// Those that a pinned tree refers to; `None` if that takes more than `room`.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn of(pin: &Pin, room: ByteLen) -> Result<Option<Self>> {
        let most = room.as_usize() / size_of::<u64>();
        let mut starts: Vec<u64> = Vec::new();
        let mut is_too_much = false;
        let visit = &mut |item: kernel::Item<'_>| {
            if let Some(data) = DataRef::of(item.key().into(), item.data)?.filter(|_| !is_too_much)
            {
                starts.push(data.start);
                if starts.len() > most {
                    // Clones refer to the same extent many times.
                    starts.sort_unstable();
                    starts.dedup();
                    is_too_much = starts.len() > most / 2;
                }
            }
            Result::Ok(())
        };
        pin.folder
            .search(kernel::Key::MIN, kernel::Key::MAX, 0, visit)?;
        starts.sort_unstable();
        starts.dedup();
        Ok((!is_too_much).then_some(Self(starts)))
    }

    fn contains(&self, start: u64) -> bool {
        self.0.binary_search(&start).is_ok()
    }
}

/// The data of a commit.
pub(super) struct Stream<'a> {
    pub(super) filesystem: &'a Filesystem,
    pub(super) seen: &'a Seen,
    /// Those that are wanted, if not all are.
    pub(super) only: Option<&'a Extents>,
    /// What was given, in bytes of this device.
    pub(super) given: &'a AtomicU64,
    /// The chunks that data was given from, by number.
    pub(super) chunks: &'a [AtomicBool],
}

impl Stream<'_> {
    /// What lies on the device of this id and size, ascending. Every extent that the kernel lists and that is
    /// no newer than the commit was in it; those of it that are not listed any more were pinned by nothing,
    /// and either read in the window or of a subvolume that was being deleted.
    ///
    /// # Errors
    /// What the kernel says, or the sink;
    /// [`Kind::Inconsistent`](crate::error::Kind::Inconsistent) if blocks are being moved.
    pub(super) fn walk(
        &self,
        (id, size): (u64, ByteLen),
        sink: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let commit = &self.seen.commit;
        let mut looked = Instant::now();
        proof::nothing_moves(self.filesystem)?;
        for (number, index) in commit.chunks.stripes_on(id, size)? {
            let Some(chunk) = commit.chunks.chunks().get(number) else {
                continue;
            };
            if chunk.kind & format::DATA == 0 {
                continue;
            }
            extents(self.filesystem, commit, &chunk.logical, 0, &mut |listed| {
                let is_its = !listed.is_tree_block
                    && listed.generation <= commit.geometry.generation
                    && !self.seen.has_read(listed.logical.start)
                    && self
                        .only
                        .is_none_or(|only| only.contains(listed.logical.start));
                if !is_its {
                    return Ok(());
                }
                if let Some(used) = self.chunks.get(number) {
                    used.store(true, Ordering::Relaxed);
                }
                if looked.elapsed() > LOOK {
                    proof::nothing_moves(self.filesystem)?;
                    looked = Instant::now();
                }
                let extent = chunk.on_stripe(index, &listed.logical);
                self.given.fetch_add(extent.len.0, Ordering::Relaxed);
                sink(data(extent))
            })?;
        }
        Ok(())
    }
}
