//! Data of a commit that no pin refers to: what was written after the last pin was taken.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use zerocopy::FromBytes;

use super::mirrors;
use super::roots::PinnedRoot;
use crate::error::Result;
use crate::fs::btrfs::chunks::damaged;
use crate::fs::btrfs::commit::Commit;
use crate::fs::btrfs::difference::difference;
use crate::fs::btrfs::format::{self, FileExtentItem, Key};
use crate::fs::btrfs::sums::Sums;
use crate::fs::btrfs::tree::Reader;
use crate::units::ByteLen;

/// Most bytes of data that are read at a time.
const REQUEST: u64 = 1 << 20;

/// Data that was read before, by its place.
pub(super) type Held = HashMap<(u64, u64), Arc<Vec<u8>>>;

/// A run of data, and what was read of it before.
type RunToRead = (Range<u64>, Option<Arc<Vec<u8>>>);

/// A run of data that no pin refers to.
pub(super) struct Loose {
    pub(super) logical: Range<u64>,
    /// Empty until it is read.
    pub(super) bytes: Arc<Vec<u8>>,
    sums: Sums,
}

impl Loose {
    /// Whether every sector has a checksum: else it may be overwritten in place, or was only reserved.
    pub(super) fn has_all_sums(&self) -> bool {
        self.sums.is_complete()
    }

    /// How many bytes it has.
    pub(super) fn len(&self) -> ByteLen {
        ByteLen(self.logical.end - self.logical.start)
    }

    /// Reads it, each sector from a copy that is right.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn read(&mut self, reader: &Reader<'_>) -> Result<()> {
        let mut bytes = vec![0; self.len().as_usize()];
        mirrors::read(reader, 0, &self.logical, &self.sums, &mut bytes)?;
        self.bytes = Arc::new(bytes);
        Ok(())
    }
}

/// Extents that no pin refers to: bytes by logical address.
#[derive(Default)]
pub(super) struct LooseExtents {
    /// Those that something was written to.
    written: BTreeMap<u64, u64>,
    /// Those of which parts are only reserved.
    reserved: BTreeMap<u64, u64>,
}

impl LooseExtents {
    /// Notes the data that a subvolume refers to and its pin does not, by address.
    ///
    /// # Errors
    /// As [`Reader::walk`].
    pub(super) fn find(
        &mut self,
        reader: &Reader<'_>,
        root: &PinnedRoot,
        pin: Option<&PinnedRoot>,
    ) -> Result<()> {
        let mut own = Self::default();
        let mut pins: HashSet<u64> = HashSet::new();
        let pin = pin.map(PinnedRoot::root);
        difference(
            reader,
            &root.root(),
            pin.as_ref(),
            &mut |key, item| {
                if let Some(data) = DataRef::of(key, item)? {
                    let list = match data.is_reserved {
                        true => &mut own.reserved,
                        false => &mut own.written,
                    };
                    list.insert(data.start, data.len);
                }
                Ok(())
            },
            &mut |key, item| {
                pins.extend(DataRef::of(key, item)?.map(|data| data.start));
                Ok(())
            },
        )?;
        own.written.retain(|start, _| !pins.contains(start));
        own.reserved.retain(|start, _| !pins.contains(start));
        self.written.append(&mut own.written);
        self.reserved.append(&mut own.reserved);
        Ok(())
    }

    /// All of it that has to be read, in runs, ascending; what was read before, and is still right, is taken from
    /// `held`. `None` if it is more than `room`.
    ///
    /// # Errors
    /// [`Kind::Damaged`](crate::error::Kind::Damaged) if it makes no sense.
    pub(super) fn runs(
        &self,
        commit: &Commit,
        reader: &Reader<'_>,
        held: &mut Held,
        room: ByteLen,
    ) -> Result<Option<Vec<Loose>>> {
        let mut pieces = pieces(commit, &self.written)?;
        for (start, piece) in self::pieces(commit, &self.reserved)? {
            // It may have been written to before, and still have checksums for that.
            if !pieces.contains_key(&start) && has_sums(commit, reader, start..start + piece)? {
                pieces.insert(start, piece);
            }
        }
        if pieces.values().sum::<u64>() > room.0 {
            return Ok(None);
        }
        let mut runs = take_held(held, &mut pieces);
        runs.extend(merged(commit, pieces).map(|run| (run, None)));
        runs.sort_unstable_by_key(|(run, _)| run.start);
        let loose = |(logical, held): RunToRead| {
            let sums = sums_of(commit, reader, logical.clone())?;
            let is_right =
                |bytes: &Arc<Vec<u8>>| sums.is_complete() && sums.wrong(bytes).next().is_none();
            Ok(Loose {
                bytes: held.filter(is_right).unwrap_or_default(),
                logical,
                sums,
            })
        };
        runs.into_iter().map(loose).collect::<Result<_>>().map(Some)
    }

    /// Whether any of these runs holds data that may be overwritten in place.
    ///
    /// # Errors
    /// As [`Reader::walk`].
    pub(super) fn has_in_place(
        &self,
        commit: &Commit,
        reader: &Reader<'_>,
        runs: &[Loose],
    ) -> Result<bool> {
        for Loose { logical, .. } in runs.iter().filter(|run| !run.has_all_sums()) {
            let before = self.written.range(..=logical.start).next_back();
            let within = self.written.range(logical.start + 1..logical.end);
            for (&start, &len) in before.into_iter().chain(within) {
                // Of an extent that was only reserved at first, what is written to has checksums.
                let is_here = start + len > logical.start;
                if is_here && !has_sums(commit, reader, start..start + len)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// The checksums of a run of data.
fn sums_of(commit: &Commit, reader: &Reader<'_>, logical: Range<u64>) -> Result<Sums> {
    let mut sums = Sums::new(&commit.geometry, logical);
    let keys = sums.keys();
    let mut add = |key: Key, item: &[u8]| sums.add(key, item);
    reader.walk(&commit.trees.csum, keys, &mut add)?;
    Ok(sums)
}

/// Whether anything of a run of data has a checksum.
fn has_sums(commit: &Commit, reader: &Reader<'_>, logical: Range<u64>) -> Result<bool> {
    Ok(sums_of(commit, reader, logical)?.known() > 0)
}

/// Extents, by address, in pieces that can be read at a time.
fn pieces(commit: &Commit, extents: &BTreeMap<u64, u64>) -> Result<BTreeMap<u64, u64>> {
    let sector = u64::from(commit.geometry.sector_size);
    let mut pieces = BTreeMap::new();
    let mut last = 0;
    for (&start, &len) in extents {
        let nonsense = || damaged(format!("the extent at logical {start} makes no sense"));
        let (_, chunk) = commit.chunks.find(start).ok_or_else(nonsense)?;
        let end = start.checked_add(len).ok_or_else(nonsense)?;
        let is_sane = start.is_multiple_of(sector)
            && len.is_multiple_of(sector)
            && start >= last
            && end <= chunk.logical.end
            && chunk.kind & format::DATA != 0;
        if !is_sane {
            return Err(nonsense());
        }
        last = end;
        let mut at = start;
        while at < end {
            let piece = (end - at).min(REQUEST);
            pieces.insert(at, piece);
            at += piece;
        }
    }
    Ok(pieces)
}

/// Takes out of `pieces` those that make up runs that were read before.
fn take_held(held: &mut Held, pieces: &mut BTreeMap<u64, u64>) -> Vec<RunToRead> {
    let mut runs = Vec::new();
    for ((start, end), bytes) in held.drain() {
        let mut at = start;
        while let Some(len) = pieces.get(&at).filter(|_| at < end) {
            at += len;
        }
        if at == end {
            let mut rest = pieces.split_off(&start);
            let mut behind = rest.split_off(&end);
            pieces.append(&mut behind);
            runs.push((start..end, Some(bytes)));
        }
    }
    runs
}

/// Pieces that follow each other within a chunk as one run, as far as that can be read at a time.
fn merged(commit: &Commit, pieces: BTreeMap<u64, u64>) -> impl Iterator<Item = Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (start, len) in pieces {
        let end = start + len;
        let goes_on = |last: &Range<u64>| {
            let chunk = commit.chunks.find(last.start);
            last.end == start
                && end - last.start <= REQUEST
                && chunk.is_some_and(|(_, chunk)| chunk.logical.contains(&start))
        };
        match runs.last_mut() {
            Some(last) if goes_on(last) => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs.into_iter()
}

/// What a subvolume says of an extent of data.
pub(super) struct DataRef {
    /// Its logical address.
    pub(super) start: u64,
    /// Its bytes on disk.
    pub(super) len: u64,
    /// Whether this part of it was never written to.
    is_reserved: bool,
}

impl DataRef {
    /// What an item refers to; `None` if to no extent.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it makes no sense.
    pub(super) fn of(key: Key, item: &[u8]) -> Result<Option<Self>> {
        let is_inline = item.get(FILE_EXTENT_KIND_AT) == Some(&format::FILE_EXTENT_INLINE);
        if key.kind != format::EXTENT_DATA || is_inline {
            return Ok(None);
        }
        let nonsense = |_| damaged(format!("the data of inode {} makes no sense", key.objectid));
        let item = FileExtentItem::read_from_bytes(item).map_err(nonsense)?;
        let data = Self {
            start: item.disk_bytenr.get(),
            len: item.disk_num_bytes.get(),
            is_reserved: item.kind == format::FILE_EXTENT_RESERVED,
        };
        // A hole lies nowhere.
        Ok((data.start > 0).then_some(data))
    }
}

/// Where in the item of a part of a file its kind stands.
const FILE_EXTENT_KIND_AT: usize = std::mem::offset_of!(FileExtentItem, kind);
