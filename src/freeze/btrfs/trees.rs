//! A device of a mounted btrfs, as a source of tree blocks: one that is damaged on it is taken from another
//! copy.

use std::sync::Arc;

use holdstill_platform::device::Disk;

use super::devices::Devices;
use super::stripes::{Part, Stripes};
use crate::error::{Kind, Result};
use crate::fs::btrfs::commit::Commit;
use crate::fs::btrfs::format;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// One device.
pub(super) struct TreeSource {
    disk: Arc<Disk>,
    devices: Arc<Devices>,
    commit: Arc<Commit>,
    stripes: Stripes,
}

impl TreeSource {
    /// Device `volume` of a commit.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if its chunks make no sense.
    pub(super) fn new(devices: &Arc<Devices>, volume: usize, commit: &Arc<Commit>) -> Result<Self> {
        Ok(Self {
            disk: Arc::clone(&devices.disks[volume]),
            devices: Arc::clone(devices),
            commit: Arc::clone(commit),
            stripes: Stripes::on(commit, devices.id_and_size(volume))?,
        })
    }

    /// Reads a part of a chunk of trees. What is right in no copy is left as it is: it was freed meanwhile, or
    /// the walk through the last commit will find it.
    fn read_blocks(&self, part: &Part<'_>, buf: &mut [u8]) -> Result<()> {
        let by_id = self.devices.by_id();
        let reader = self.commit.reader(&by_id, None);
        let whole = by_id.read(part.chunk, part.copy, part.logical.clone(), buf);
        if whole.as_ref().is_err_and(|error| error.kind() != Kind::Io) {
            return whole;
        }
        let node_len = self.commit.geometry.node_len();
        let is_aligned = part.logical.start.is_multiple_of(node_len.0)
            && part.logical.end.is_multiple_of(node_len.0);
        let is_checked = is_aligned && part.chunk.kind & format::DATA == 0;
        if !is_checked || part.chunk.copies() == 1 {
            return whole;
        }
        let blocks = buf.chunks_mut(node_len.as_usize());
        for (bytenr, block) in (part.logical.start..)
            .step_by(node_len.as_usize())
            .zip(blocks)
        {
            if whole.is_ok() && reader.is_block_of(bytenr, block) {
                continue;
            }
            let is_right = |block: &[u8]| reader.is_block_of(bytenr, block);
            match (reader.read_copy(part.chunk, bytenr, is_right)?, &whole) {
                (Some(right), _) => block.copy_from_slice(&right),
                (None, Ok(())) => {}
                (None, Err(_)) => return whole,
            }
        }
        Ok(())
    }
}

impl ReadAt for TreeSource {
    fn len(&self) -> ByteLen {
        ReadAt::len(&*self.disk)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let mut read = |part: &Part<'_>, bytes: &mut [u8]| self.read_blocks(part, bytes);
        self.stripes
            .read(&self.commit, &self.disk, (offset, buf), &mut read)
    }
}
