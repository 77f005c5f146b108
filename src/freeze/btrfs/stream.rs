//! What is copied after the window: all data of the commit that is pinned.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use holdstill_platform::btrfs::Filesystem;

use super::proof;
use super::rounds::{data, extents};
use super::window::Seen;
use crate::error::Result;
use crate::fs::btrfs::format;
use crate::image::tables::Run;
use crate::units::ByteLen;

/// How often to look whether what is pinned is being moved.
const LOOK: Duration = Duration::from_millis(100);

/// The data of a commit.
pub(super) struct Stream<'a> {
    pub(super) filesystem: &'a Filesystem,
    pub(super) seen: &'a Seen,
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
                    && !self.seen.has_read(listed.logical.start);
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
                sink(data(chunk.on_stripe(index, &listed.logical)))
            })?;
        }
        Ok(())
    }
}
