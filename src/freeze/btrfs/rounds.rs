//! Rounds: tree blocks are copied while the filesystem changes.
//!
//! The kernel is asked which blocks its extent tree lists. One that is no newer than the last complete commit
//! is on disk, and as long as it is listed with the same generation it is what it was. So if a round copies
//! all blocks from one generation to another, then of the commit at the end, whichever it is, nothing up to
//! that generation is missing: a block that is in use then was listed all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use holdstill_platform::btrfs::{self as kernel, Filesystem};

use super::devices::Devices;
use super::trees::TreeSource;
use crate::error::{Error, Kind, Result};
use crate::extent::{Extent, ExtentSet};
use crate::fs::btrfs::commit::{Commit, check_devices};
use crate::fs::btrfs::format;
use crate::fs::btrfs::map::{Listed, listed};
use crate::image::tables::{Content, Run};
use crate::units::ByteLen;

/// How often a commit is tried to be read while others come.
const PATIENT_READS: u32 = 50;

/// How long to wait before that is tried again.
const NAP: Duration = Duration::from_millis(20);

/// Tree blocks from one generation to another.
pub(super) struct Round {
    pub(super) commit: Arc<Commit>,
    /// The devices, by volume.
    pub(super) sources: Vec<TreeSource>,
    /// Those of this generation and before were copied before; 0 at first.
    since: u64,
    /// What it gave, in bytes of all devices.
    given: AtomicU64,
}

impl Round {
    /// Begins with what is newer than `since`.
    ///
    /// # Errors
    /// If no commit can be read before the next one comes; [`Kind::NotApplicable`] if it is of a kind that
    /// cannot be imaged.
    pub(super) fn begin(devices: &Arc<Devices>, since: u64) -> Result<Self> {
        let by_id = devices.by_id();
        for _ in 0..PATIENT_READS {
            if let Some(superblocks) = devices.superblocks()?
                && let Some(first) = superblocks.first()
            {
                let read = Commit::read(first, &by_id, None).and_then(|commit| {
                    check_devices(&commit.trees.dev, &commit.reader(&by_id, None))?;
                    Ok(commit)
                });
                match read {
                    Ok(commit) => {
                        let commit = Arc::new(commit);
                        let volumes = 0..devices.disks.len();
                        let source = |volume| TreeSource::new(devices, volume, &commit);
                        return Ok(Self {
                            sources: volumes.map(source).collect::<Result<_>>()?,
                            commit,
                            since,
                            given: AtomicU64::new(0),
                        });
                    }
                    Err(error) if devices.are_still(&superblocks)? => return Err(error),
                    Err(_) => {}
                }
            }
            std::thread::sleep(NAP);
        }
        Err(too_many_commits())
    }

    /// The newest generation that it copies.
    pub(super) fn until(&self) -> u64 {
        self.commit.geometry.generation
    }

    /// How many bytes it gave so far.
    pub(super) fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }

    /// What of it lies on the device of this id and size; the start of the device, too, if it is the first
    /// round.
    ///
    /// # Errors
    /// What the kernel says, or the sink.
    pub(super) fn walk(
        &self,
        filesystem: &Filesystem,
        (id, size): (u64, ByteLen),
        sink: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        if self.since == 0 {
            sink(data(Extent::new(0, format::RESERVED)))?;
        }
        let mut give = |extent: Extent| {
            self.given.fetch_add(extent.len.0, Ordering::Relaxed);
            sink(data(extent))
        };
        self.blocks(filesystem, (id, size), self.since, &mut give)
    }

    /// Everything that the rounds up to this one copied and that is still in use, but for the superblock,
    /// which changes.
    ///
    /// # Errors
    /// As [`walk`](Self::walk).
    pub(super) fn walk_again(
        &self,
        filesystem: &Filesystem,
        (id, size): (u64, ByteLen),
        sink: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let superblock = format::SUPER_OFFSETS[0];
        let behind = superblock + format::SUPER_SIZE;
        sink(data(Extent::new(0, superblock)))?;
        sink(data(Extent::new(behind, format::RESERVED - behind)))?;
        self.blocks(filesystem, (id, size), 0, &mut |extent| sink(data(extent)))
    }

    /// Whether none of these runs of a device holds a tree block any more that was copied.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn has_freed(
        &self,
        filesystem: &Filesystem,
        (id, size): (u64, ByteLen),
        runs: &ExtentSet,
    ) -> Result<bool> {
        let mut is_kept = false;
        self.blocks(filesystem, (id, size), 0, &mut |extent| {
            is_kept |= runs.intersect(extent).next().is_some();
            Ok(())
        })?;
        Ok(!is_kept)
    }

    /// Where the tree blocks newer than `since` lie on a device, ascending.
    fn blocks(
        &self,
        filesystem: &Filesystem,
        (id, size): (u64, ByteLen),
        since: u64,
        sink: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        let generations = since + 1..=self.until();
        for (number, index) in self.commit.chunks.stripes_on(id, size)? {
            let Some(chunk) = self.commit.chunks.chunks().get(number) else {
                continue;
            };
            if chunk.kind & (format::METADATA | format::SYSTEM) == 0 {
                continue;
            }
            extents(
                filesystem,
                &self.commit,
                &chunk.logical,
                *generations.start(),
                &mut |listed| match listed.is_tree_block && generations.contains(&listed.generation)
                {
                    true => sink(chunk.on_stripe(index, &listed.logical)),
                    false => Ok(()),
                },
            )?;
        }
        Ok(())
    }
}

/// They come too fast to be read.
pub(super) fn too_many_commits() -> Error {
    let what = "its commits follow each other faster than one can be read";
    Error::new(Kind::Inconsistent, what).hint("try again when less is written")
}

/// All extents that the kernel lists now within a run of logical addresses, ascending; those in parts of the
/// extent tree that were not written since a generation are left out.
///
/// # Errors
/// What the kernel says, or `visit`.
pub(super) fn extents(
    filesystem: &Filesystem,
    commit: &Commit,
    logical: &std::ops::Range<u64>,
    since: u64,
    visit: &mut dyn FnMut(&Listed) -> Result<()>,
) -> Result<()> {
    let first = kernel::Key::new(logical.start, 0, 0);
    let last = kernel::Key::new(logical.end - 1, u8::MAX, u64::MAX);
    filesystem.search(
        format::EXTENT_TREE,
        first,
        last,
        since,
        &mut |item| match listed(&commit.geometry, item.key().into(), item.data)? {
            Some(listed) => visit(&listed),
            None => Ok(()),
        },
    )
}

/// A run to be copied.
pub(super) fn data(extent: Extent) -> Run {
    Run {
        extent,
        content: Content::Data,
    }
}
