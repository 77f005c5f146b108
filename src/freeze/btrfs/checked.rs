//! A device of a mounted btrfs, whose data is checked as it is read.
//!
//! Every read is told apart into runs of data, whose checksums the kernel is asked for: those of pinned data
//! stay as long as it is pinned. What is wrong on this device is taken from another copy.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdstill_platform::btrfs::{self as kernel, Filesystem};
use holdstill_platform::device::Disk;

use super::devices::Devices;
use super::mirrors;
use super::window::Seen;
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::fs::btrfs::format::{self, Key};
use crate::fs::btrfs::map::listed;
use crate::fs::btrfs::sums::Sums;
use crate::fs::btrfs::tree::Reader;
use crate::read_at::{ReadAt, check_range};
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
    /// The stripes on this device, ascending: where, of which chunk, its number in that.
    stripes: Vec<(Range<u64>, usize, usize)>,
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
        let commit = &seen.commit;
        let (id, size) = devices.id_and_size(volume);
        let mut stripes = Vec::new();
        for (number, index) in commit.chunks.stripes_on(id, size)? {
            if let Some(chunk) = commit.chunks.chunks().get(number)
                && let Some(stripe) = chunk.stripes.get(index)
            {
                let end = stripe.start + chunk.stripe_len();
                stripes.push((stripe.start..end, number, index));
            }
        }
        Ok(Self {
            disk,
            devices,
            filesystem,
            seen,
            checks,
            stripes,
        })
    }

    /// Reads a run within one stripe.
    fn read_within(
        &self,
        stripe: &(Range<u64>, usize, usize),
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let (place, number, index) = stripe;
        let missing = || Error::new(Kind::Failed, "a chunk is gone");
        let commit = &self.seen.commit;
        let chunk = commit.chunks.chunks().get(*number);
        let chunk = chunk.ok_or_else(missing)?;
        let sector = u64::from(commit.geometry.sector_size);
        let by_id = self.devices.by_id();
        let reader = commit.reader(&by_id, None);
        let mut at = offset - place.start;
        let mut rest = buf;
        while !rest.is_empty() {
            // Whole sectors have checksums: what is read may begin and end within one.
            let run = chunk.logical_at(*index, at);
            let within = run.start % sector;
            let start = run.start - within;
            let wanted = (rest.len() as u64).min(run.end - run.start);
            let end = (run.start + wanted).next_multiple_of(sector);
            let logical = start..end;
            let mut sums = Sums::new(&commit.geometry, logical.clone());
            self.find(&mut sums)?;
            let (part, behind) = rest.split_at_mut(wanted as usize);
            rest = behind;
            at += wanted;
            let mut whole = Vec::new();
            let is_whole = within == 0 && wanted.is_multiple_of(sector);
            let bytes = match is_whole {
                true => &mut *part,
                false => {
                    whole.resize((end - start) as usize, 0);
                    whole.as_mut_slice()
                }
            };
            let copy = chunk.copy_of(*index);
            match mirrors::read(&reader, copy, &logical, &sums, bytes) {
                Ok(mended) => {
                    self.checks.mended.fetch_add(mended, Ordering::Relaxed);
                }
                Err(error) if error.kind() == Kind::Io && self.seen.has_dying => {
                    self.read_what_is_left(&reader, copy, &logical, &sums, bytes)?;
                }
                Err(error) => return Err(error.on(self.disk.path()).at(Offset(offset))),
            }
            let known = sums.known() as u64 * sector;
            self.checks.right.fetch_add(known, Ordering::Relaxed);
            let without = end - start - known;
            self.checks.without.fetch_add(without, Ordering::Relaxed);
            if !is_whole {
                let skip = within as usize;
                part.copy_from_slice(&whole[skip..skip + wanted as usize]);
            }
        }
        Ok(())
    }

    /// Asks for checksums.
    fn find(&self, sums: &mut Sums) -> Result<()> {
        let (first, last) = sums.keys().into_inner();
        self.search(
            format::CSUM_TREE,
            first,
            last,
            &mut |key, item| match key.kind {
                format::EXTENT_CSUM => sums.add(key, item),
                _ => Ok(()),
            },
        )
    }

    fn search(
        &self,
        tree: u64,
        first: Key,
        last: Key,
        visit: &mut dyn FnMut(Key, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let key = |key: Key| kernel::Key::new(key.objectid, key.kind, key.offset);
        self.filesystem
            .search(tree, key(first), key(last), 0, &mut |item| {
                let key = Key::new(item.objectid, item.kind, item.offset);
                visit(key, item.data)
            })
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
        let first = Key::new(start.max(logical.saturating_sub(MAX_EXTENT)), 0, 0);
        let last = Key::new(logical, u8::MAX, u64::MAX);
        let mut is_kept = false;
        let geometry = &commit.geometry;
        self.search(format::EXTENT_TREE, first, last, &mut |key, item| {
            if let Some(listed) = listed(geometry, key, item)? {
                let is_old = listed.generation <= geometry.generation;
                is_kept |= is_old && listed.logical.contains(&logical);
            }
            Ok(())
        })?;
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
        let wanted = Extent::new(offset.0, buf.len() as u64);
        check_range(ReadAt::len(self), offset, wanted.len)?;
        let mut at = offset.0;
        let mut rest = buf;
        while !rest.is_empty() {
            let number = self.stripes.partition_point(|(place, ..)| place.end <= at);
            let stripe = self.stripes.get(number);
            // Between stripes there is no data.
            let end = match stripe {
                Some((place, ..)) if place.contains(&at) => place.end,
                Some((place, ..)) => place.start,
                None => u64::MAX,
            };
            let len = (end - at).min(rest.len() as u64);
            let (part, behind) = rest.split_at_mut(len as usize);
            rest = behind;
            match stripe {
                Some(stripe) if stripe.0.contains(&at) => self.read_within(stripe, at, part)?,
                _ => ReadAt::read_exact_at(&*self.disk, part, Offset(at))?,
            }
            at += len;
        }
        Ok(())
    }
}
