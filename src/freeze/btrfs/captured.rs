//! What the window gave, by the places it has on one device: the last pass over it.

use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::fs::btrfs::chunks::{Chunk, damaged};
use crate::fs::btrfs::commit::Commit;
use crate::fs::btrfs::format::{self, SuperBlock};
use crate::fs::btrfs::superblock;
use crate::read_at::{ReadAt, check_range};
use crate::units::{ByteLen, Offset};

use super::window::Seen;

/// What belongs on one device, by place.
pub(super) struct Captured {
    pieces: Vec<(Extent, Arc<Vec<u8>>, usize)>,
    size: ByteLen,
}

impl Captured {
    /// What of `seen` belongs on the device of volume `volume`, which has this id and size.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it does not fit there.
    pub(super) fn on(seen: &Seen, volume: usize, id: u64, size: ByteLen) -> Result<Self> {
        let mut captured = Self {
            pieces: Vec::new(),
            size,
        };
        for (bytenr, block) in &seen.blocks {
            captured.add(&seen.commit, id, *bytenr, block)?;
        }
        for loose in &seen.data {
            captured.add(&seen.commit, id, loose.logical.start, &loose.bytes)?;
        }
        let nothing = || damaged("a device has no superblock");
        captured.add_superblocks(seen.superblocks.get(volume).ok_or_else(nothing)?);
        captured
            .pieces
            .sort_unstable_by_key(|(extent, ..)| extent.start);
        let is_apart = |two: &[(Extent, _, _)]| two[0].0.end() <= two[1].0.start;
        let fits = captured
            .pieces
            .last()
            .is_none_or(|(extent, ..)| extent.end().0 <= size.0);
        match fits && captured.pieces.windows(2).all(is_apart) {
            true => Ok(captured),
            false => Err(damaged(
                "what was written last overlaps, or leaves its device",
            )),
        }
    }

    /// Adds all copies on the device of what lies at `logical`.
    fn add(&mut self, commit: &Commit, id: u64, logical: u64, bytes: &Arc<Vec<u8>>) -> Result<()> {
        let nowhere = || damaged(format!("logical {logical} is in no chunk"));
        let (_, chunk): (_, &Chunk) = commit.chunks.find(logical).ok_or_else(nowhere)?;
        for copy in 0..chunk.copies() {
            let mut within = 0;
            for piece in chunk.pieces(copy, logical..logical + bytes.len() as u64) {
                if piece.devid == id {
                    self.pieces.push((piece.extent, Arc::clone(bytes), within));
                }
                within += piece.extent.len.as_usize();
            }
        }
        Ok(())
    }

    /// Adds all copies of the superblock, as far as the device reaches (`write_dev_supers` of the kernel's
    /// fs/btrfs/disk-io.c).
    fn add_superblocks(&mut self, superblock: &SuperBlock) {
        for at in format::SUPER_OFFSETS {
            if at + format::SUPER_SIZE < superblock.dev_item.total_bytes.get() {
                let bytes = superblock::of_commit_alone(superblock, at).to_vec();
                let place = Extent::new(at, format::SUPER_SIZE);
                self.pieces.push((place, Arc::new(bytes), 0));
            }
        }
    }

    /// Where all of it belongs, ascending.
    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.pieces.iter().map(|(extent, ..)| *extent)
    }
}

impl ReadAt for Captured {
    fn len(&self) -> ByteLen {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        check_range(self.size, offset, ByteLen(buf.len() as u64))?;
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let number = self
                .pieces
                .partition_point(|(extent, ..)| extent.end() <= at);
            let missing = || Error::new(Kind::Failed, "this block was not read").at(at);
            let piece = self.pieces.get(number).filter(|piece| piece.0.start <= at);
            let (extent, bytes, from) = piece.ok_or_else(missing)?;
            let len = extent.end().since(at).as_usize().min(rest.len());
            let from = from + at.since(extent.start).as_usize();
            let (part, behind) = rest.split_at_mut(len);
            part.copy_from_slice(bytes.get(from..from + len).ok_or_else(missing)?);
            rest = behind;
            at = at + ByteLen(len as u64);
        }
        Ok(())
    }
}
