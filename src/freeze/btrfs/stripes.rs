//! Which chunks lie where on a device.

use std::ops::Range;

use holdstill_platform::device::Disk;

use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::fs::btrfs::chunks::Chunk;
use crate::fs::btrfs::commit::Commit;
use crate::read_at::{ReadAt, check_range};
use crate::units::{ByteLen, Offset};

/// The stripes on one device, ascending: where, of which chunk, and their number in that.
#[derive(Debug)]
pub(super) struct Stripes(Vec<(Range<u64>, usize, usize)>);

/// A part of a read that lies in one chunk without a gap.
pub(super) struct Part<'a> {
    pub(super) chunk: &'a Chunk,
    /// Which copy of the chunk the device has.
    pub(super) copy: usize,
    /// Its logical addresses.
    pub(super) logical: Range<u64>,
}

impl Stripes {
    /// Those on the device of this id and size.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if they make no sense.
    pub(super) fn on(commit: &Commit, (id, size): (u64, ByteLen)) -> Result<Self> {
        let mut stripes = Vec::new();
        for (number, index) in commit.chunks.stripes_on(id, size)? {
            if let Some(chunk) = commit.chunks.chunks().get(number)
                && let Some(stripe) = chunk.stripes.get(index)
            {
                let end = stripe.start + chunk.stripe_len();
                stripes.push((stripe.start..end, number, index));
            }
        }
        Ok(Self(stripes))
    }

    /// Reads from the device, but for what lies in chunks: that `read` does, part by part.
    ///
    /// # Errors
    /// The device's, or `read`'s.
    pub(super) fn read(
        &self,
        commit: &Commit,
        disk: &Disk,
        (offset, buf): (Offset, &mut [u8]),
        read: &mut dyn FnMut(&Part<'_>, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let wanted = Extent::new(offset.0, buf.len() as u64);
        check_range(ReadAt::len(disk), offset, wanted.len)?;
        let mut at = offset.0;
        let mut rest = buf;
        while !rest.is_empty() {
            let number = self.0.partition_point(|(place, ..)| place.end <= at);
            let stripe = self.0.get(number);
            let (len, part) = match stripe {
                Some((place, number, index)) if place.contains(&at) => {
                    let gone = || Error::new(Kind::Failed, "a chunk is gone");
                    let chunk = commit.chunks.chunks().get(*number).ok_or_else(gone)?;
                    let run = chunk.logical_at(*index, at - place.start);
                    let len = (run.end - run.start).min(rest.len() as u64);
                    let part = Part {
                        chunk,
                        copy: chunk.copy_of(*index),
                        logical: run.start..run.start + len,
                    };
                    (len, Some(part))
                }
                // Between stripes there is nothing that could be checked.
                Some((place, ..)) => ((place.start - at).min(rest.len() as u64), None),
                None => (rest.len() as u64, None),
            };
            let (bytes, behind) = rest.split_at_mut(ByteLen(len).as_usize());
            rest = behind;
            match part {
                Some(part) => read(&part, bytes)?,
                None => ReadAt::read_exact_at(disk, bytes, Offset(at))?,
            }
            at += len;
        }
        Ok(())
    }
}
