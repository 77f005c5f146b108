//! Comparing what was read with what a device or raw file holds.

use std::sync::{Mutex, PoisonError};

use holdstill_platform::buffer::Buffer;
use holdstill_platform::device::Disk;

use crate::error::{Error, Kind, Result};
use crate::extent::{Extent, ExtentSet};
use crate::image::content::is_zero;
use crate::image::format::BLOCK;
use crate::pipeline::receive::Receive;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// Compares one volume with a device, as its bytes are handed in. Blocks that differ are remembered,
/// not reported at once: a later pass may say what the device has.
#[derive(Debug)]
pub struct Comparison {
    disk: Disk,
    volume: u32,
    /// The volume, as far as the disk has room for it.
    volume_extent: Extent,
    /// What is not compared.
    without: ExtentSet,
    /// What was trimmed must be zeros.
    is_copy: bool,
    differing: Mutex<ExtentSet>,
}

/// So many separate differences are enough to stop looking; they take 16 MiB.
const ENOUGH: usize = 1 << 20;

impl Comparison {
    /// Compares volume number `volume` of `size` bytes with what is on `disk`.
    ///
    /// # Errors
    /// [`Kind::Mismatch`] if that is smaller.
    pub fn new(volume: u32, size: ByteLen, disk: Disk) -> Result<Self> {
        let room = ReadAt::len(&disk);
        if room < size {
            let what = format!("it is smaller ({room}) than the volume ({size})");
            return Err(Error::new(Kind::Mismatch, what).on(disk.path()));
        }
        Ok(Self {
            disk,
            volume,
            volume_extent: Extent::new(0, size.0),
            without: ExtentSet::new(),
            is_copy: false,
            differing: Mutex::default(),
        })
    }

    /// The same, except `without`.
    pub fn without(self, without: ExtentSet) -> Self {
        Self { without, ..self }
    }

    /// The same with a copy that we made ourselves: what was trimmed is zeros there. On any other device
    /// nobody knows what it is.
    pub fn of_copy(self) -> Self {
        Self {
            is_copy: true,
            ..self
        }
    }

    /// Takes what was found to differ so far.
    pub fn take_differing(&self) -> ExtentSet {
        std::mem::take(&mut *self.differing())
    }

    fn differing(&self) -> std::sync::MutexGuard<'_, ExtentSet> {
        self.differing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Compares block by block what the device has at `offset` with what `expected` says.
    fn compare(&self, extent: Extent, expected: impl Fn(usize, &[u8]) -> bool) -> Result<()> {
        let Some(compared) = extent.intersect(self.volume_extent) else {
            return Ok(());
        };
        self.without
            .gaps(compared)
            .try_for_each(|compared| self.compare_part(extent, compared, &expected))
    }

    fn compare_part(
        &self,
        extent: Extent,
        compared: Extent,
        expected: &impl Fn(usize, &[u8]) -> bool,
    ) -> Result<()> {
        let mut found = Buffer::try_new(compared.len.0.min(COMPARED_AT_ONCE) as usize)?;
        let mut at = compared.start;
        while at < compared.end() {
            let piece = compared.end().since(at).0.min(found.len() as u64) as usize;
            self.disk
                .read_exact_at(&mut found[..piece], at.0)
                .map_err(|error| Error::from(error).at(at))?;
            for (number, block) in found[..piece].chunks(BLOCK as usize).enumerate() {
                let start = at + ByteLen(number as u64 * BLOCK);
                let block_extent = Extent::new(start.0, block.len() as u64);
                let differs = !expected(start.since(extent.start).as_usize(), block);
                self.note(block_extent, differs)?;
            }
            at = at + ByteLen(piece as u64);
        }
        Ok(())
    }

    /// What is past the end of a device that is shorter than the volume has to be zeros.
    fn check_behind(&self, extent: Extent, bytes: &[u8]) -> Result<()> {
        let room = ReadAt::len(&self.disk).0;
        let fitting = room.saturating_sub(extent.start.0).min(extent.len.0) as usize;
        match is_zero(&bytes[fitting..]) {
            true => Ok(()),
            false => Err(self.mismatch(&ExtentSet::from_iter([Extent::between(
                Offset(room.max(extent.start.0)),
                extent.end(),
            )]))),
        }
    }

    fn note(&self, block: Extent, differs: bool) -> Result<()> {
        let mut set = self.differing();
        if differs {
            set.insert(block);
            if set.runs().len() > ENOUGH {
                return Err(self.mismatch(&set));
            }
        } else if !set.is_empty() {
            set.remove(block);
        }
        Ok(())
    }

    /// The error that tells of what differs.
    pub fn mismatch(&self, differing: &ExtentSet) -> Error {
        let bytes = differing.bytes();
        let first = differing
            .runs()
            .first()
            .map_or(Offset::ZERO, |run| run.start);
        Error::new(
            Kind::Mismatch,
            format!(
                "{} ({} bytes) differ from what should be there, first",
                bytes, bytes.0
            ),
        )
        .on(self.disk.path())
        .at(first)
    }

    /// Whether everything was equal in the end.
    ///
    /// # Errors
    /// [`Kind::Mismatch`] if not.
    pub fn finish(&self) -> Result<()> {
        let set = self.differing();
        if set.is_empty() {
            Ok(())
        } else {
            Err(self.mismatch(&set))
        }
    }
}

/// Each takes what is of its volume.
impl Receive for &[Comparison] {
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        self.iter()
            .try_for_each(|comparison| comparison.data(volume, offset, bytes))
    }

    fn zeros(&self, volume: u32, extent: Extent) -> Result<()> {
        self.iter()
            .try_for_each(|comparison| comparison.zeros(volume, extent))
    }

    fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
        self.iter()
            .try_for_each(|comparison| comparison.trim(volume, extent))
    }
}

/// Bytes read from the device at once.
const COMPARED_AT_ONCE: u64 = 1 << 20;

impl Receive for Comparison {
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        if volume != self.volume {
            return Ok(());
        }
        let extent = Extent::new(offset.0, bytes.len() as u64);
        self.check_behind(extent, bytes)?;
        self.compare(extent, |at, block| bytes[at..at + block.len()] == *block)
    }

    fn zeros(&self, volume: u32, extent: Extent) -> Result<()> {
        if volume != self.volume {
            return Ok(());
        }
        self.compare(extent, |_, block| is_zero(block))
    }

    fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
        if self.is_copy {
            return self.zeros(volume, extent);
        }
        if volume == self.volume {
            self.differing().remove(extent);
        }
        Ok(())
    }
}
