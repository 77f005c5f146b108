//! A device of a mounted btrfs, whose data is checked as it is read.
//!
//! Every read is told apart into runs of data, whose checksums the kernel is asked for: those of pinned data
//! stay as long as it is pinned. What is wrong on this device is taken from another copy.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdstill_platform::btrfs::Filesystem;
use holdstill_platform::device::Disk;

use super::devices::Devices;
use super::mirrors;
use super::rounds::extents;
use super::stripes::{Part, Stripes};
use super::window::Seen;
use crate::error::{Kind, Result};
use crate::fs::btrfs::format;
use crate::fs::btrfs::map::Listed;
use crate::fs::btrfs::sums::Sums;
use crate::fs::btrfs::tree::Reader;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// What was checked so far, of all devices.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Bytes whose checksums were right, in this copy or another one.
    pub(super) right: AtomicU64,
    /// Bytes that have none.
    pub(super) without: AtomicU64,
    /// Sectors that were taken from another copy.
    pub(super) mended: AtomicU64,
    /// Sectors that belong to nothing any more: of subvolumes that were being deleted.
    pub(super) gone: AtomicU64,
}

/// One device.
pub(super) struct Checked {
    disk: Arc<Disk>,
    devices: Arc<Devices>,
    filesystem: Arc<Filesystem>,
    seen: Arc<Seen>,
    checks: Arc<Checks>,
    stripes: Stripes,
}

impl Checked {
    /// Device `volume` of a commit.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if its chunks make no sense.
    pub(super) fn new(
        devices: Arc<Devices>,
        volume: usize,
        filesystem: Arc<Filesystem>,
        seen: Arc<Seen>,
        checks: Arc<Checks>,
    ) -> Result<Self> {
        let disk = Arc::clone(&devices.disks[volume]);
        let stripes = Stripes::on(&seen.commit, devices.id_and_size(volume))?;
        Ok(Self {
            disk,
            devices,
            filesystem,
            seen,
            checks,
            stripes,
        })
    }

    /// Reads a part of a chunk of data.
    fn read_data(&self, part: &Part<'_>, buf: &mut [u8]) -> Result<()> {
        let commit = &self.seen.commit;
        let sector = u64::from(commit.geometry.sector_size);
        // Whole sectors have checksums: what is read may begin and end within one.
        let before = part.logical.start % sector;
        let start = part.logical.start - before;
        let end = part.logical.end.next_multiple_of(sector);
        if (start..end) != part.logical {
            let mut whole = vec![0; ByteLen(end - start).as_usize()];
            self.read_sectors(part, &(start..end), &mut whole)?;
            let wanted = whole.get(ByteLen(before).as_usize()..);
            let wanted = wanted.and_then(|bytes| bytes.get(..buf.len()));
            buf.copy_from_slice(wanted.unwrap_or_default());
            return Ok(());
        }
        self.read_sectors(part, &part.logical, buf)
    }

    /// Reads whole sectors of a chunk.
    fn read_sectors(&self, part: &Part<'_>, logical: &Range<u64>, buf: &mut [u8]) -> Result<()> {
        let commit = &self.seen.commit;
        let by_id = self.devices.by_id();
        let reader = commit.reader(&by_id, None);
        let mut sums = Sums::new(&commit.geometry, logical.clone());
        self.find(&mut sums)?;
        match mirrors::read(&reader, part.copy, logical, &sums, buf) {
            Ok(mended) => {
                self.checks.mended.fetch_add(mended, Ordering::Relaxed);
            }
            Err(error) if error.kind() == Kind::Io && self.seen.has_dying => {
                self.read_what_is_left(&reader, part.copy, logical, &sums, buf)?;
            }
            Err(error) => return Err(error.on(self.disk.path())),
        }
        let known = sums.known() as u64 * u64::from(commit.geometry.sector_size);
        self.checks.right.fetch_add(known, Ordering::Relaxed);
        let without = logical.end - logical.start - known;
        self.checks.without.fetch_add(without, Ordering::Relaxed);
        Ok(())
    }

    /// Asks for checksums.
    fn find(&self, sums: &mut Sums) -> Result<()> {
        let (first, last) = sums.keys().into_inner();
        self.filesystem.search(
            format::CSUM_TREE,
            first.into(),
            last.into(),
            0,
            &mut |item| sums.add(item.key().into(), item.data),
        )
    }

    /// Reads a run sector by sector, of which some may hold no data of the commit any more.
    fn read_what_is_left(
        &self,
        reader: &Reader<'_>,
        copy: usize,
        logical: &Range<u64>,
        sums: &Sums,
        bytes: &mut [u8],
    ) -> Result<()> {
        let sector = u64::from(reader.geometry.sector_size);
        let sectors = bytes.chunks_mut(sector as usize).enumerate();
        for (number, bytes) in sectors {
            let at = logical.start + number as u64 * sector;
            let one = sums.of_sector(number);
            match mirrors::read(reader, copy, &(at..at + sector), &one, bytes) {
                Ok(mended) => {
                    self.checks.mended.fetch_add(mended, Ordering::Relaxed);
                }
                Err(error) if error.kind() == Kind::Io && !self.is_kept(at)? => {
                    bytes.fill(0);
                    self.checks.gone.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether an extent of the commit, or an older one, still lies there.
    fn is_kept(&self, logical: u64) -> Result<bool> {
        let commit = &self.seen.commit;
        let chunk = commit.chunks.find(logical);
        let start = chunk.map_or(logical, |(_, chunk)| chunk.logical.start);
        let first = start.max(logical.saturating_sub(MAX_EXTENT));
        let mut is_kept = false;
        let visit = &mut |listed: &Listed| {
            let is_old = listed.generation <= commit.geometry.generation;
            is_kept |= is_old && listed.logical.contains(&logical);
            Ok(())
        };
        extents(&self.filesystem, commit, &(first..logical + 1), 0, visit)?;
        Ok(is_kept)
    }
}

/// No extent of data is longer (BTRFS_MAX_EXTENT_SIZE; reserved space: a sixteenth of a device, but that
/// has no checksums).
const MAX_EXTENT: u64 = 1 << 30;

impl ReadAt for Checked {
    fn len(&self) -> ByteLen {
        ReadAt::len(&*self.disk)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let mut read = |part: &Part<'_>, bytes: &mut [u8]| self.read_data(part, bytes);
        self.stripes
            .read(&self.seen.commit, &self.disk, (offset, buf), &mut read)
    }
}
