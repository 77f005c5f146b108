//! From logical addresses to places on devices.
//!
//! All of a btrfs but its superblocks is addressed logically. A chunk maps a run of logical addresses
//! to one stripe or several on devices: to each of them (copies), or in turns (columns), or both.

use std::ops::Range;

use zerocopy::FromBytes;

use super::format::{self, ChunkItem, DiskKey, Key, StripeItem};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// More stripes than this nobody has (a petabyte in mirrored chunks of 1 GiB): it bounds memory.
const MAX_STRIPES: usize = 1 << 21;

/// A part of a chunk on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stripe {
    /// The device's id within the filesystem, and its UUID.
    pub(crate) devid: u64,
    pub(crate) dev_uuid: [u8; 16],
    /// Where it begins there, in bytes.
    pub(crate) start: u64,
}

/// A run of logical addresses and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Its logical addresses, in bytes.
    pub(crate) logical: Range<u64>,
    /// What it holds and its profile, as in its item.
    pub(crate) kind: u64,
    /// How many stripes take turns with pieces of [`format::STRIPE_LEN`].
    columns: u64,
    /// How many stripes hold the same.
    copies: usize,
    /// `columns * copies`, all copies of a column beside each other.
    pub(crate) stripes: Vec<Stripe>,
}

/// A run of bytes on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The device's id.
    pub(crate) devid: u64,
    /// Bytes of that device.
    pub(crate) extent: Extent,
}

impl Chunk {
    /// Reads a chunk's item and its stripes, and checks them as the kernel's `btrfs_check_chunk_valid`
    /// does. What is left of `bytes` behind it is returned, too.
    ///
    /// # Errors
    /// [`Kind::Damaged`]; [`Kind::NotApplicable`] if its profile is not known here.
    fn parse(key: Key, bytes: &[u8], sector_size: u32) -> Result<(Self, &[u8])> {
        let nonsense = || {
            damaged(format!(
                "the chunk at logical {} makes no sense",
                key.offset
            ))
        };
        let (item, mut rest) = ChunkItem::read_from_prefix(bytes).map_err(|_| nonsense())?;
        if key.kind != format::CHUNK_ITEM || key.objectid != format::CHUNKS {
            return Err(nonsense());
        }
        let kind = item.kind.get();
        let mut stripes = Vec::new();
        for _ in 0..item.num_stripes.get() {
            let stripe;
            (stripe, rest) = StripeItem::read_from_prefix(rest).map_err(|_| nonsense())?;
            stripes.push(Stripe {
                devid: stripe.devid.get(),
                dev_uuid: stripe.dev_uuid,
                start: stripe.offset.get(),
            });
        }
        let count = stripes.len();
        let (columns, copies) = match kind & !format::CONTENT_MASK {
            0 => (1, 1),
            format::DUP | format::RAID1 => (1, 2),
            format::RAID1C3 => (1, 3),
            format::RAID1C4 => (1, 4),
            format::RAID0 => (count, 1),
            format::RAID10 if item.sub_stripes.get() == 2 => (count / 2, 2),
            format::RAID5 | format::RAID6 => {
                return Err(Error::new(
                    Kind::NotApplicable,
                    "parts of it are RAID5 or RAID6",
                ));
            }
            _ => return Err(nonsense()),
        };
        let columns = columns as u64;
        let len = item.length.get();
        let sector_size = u64::from(sector_size);
        let end = key.offset.checked_add(len).ok_or_else(nonsense)?;
        let is_sane = count > 0
            && columns * copies as u64 == count as u64
            && kind & format::CONTENT_MASK != 0
            && item.stripe_len.get() == format::STRIPE_LEN
            && len > 0
            && key.offset.is_multiple_of(sector_size)
            && len.is_multiple_of(sector_size)
            && (columns == 1 || len.is_multiple_of(columns * format::STRIPE_LEN));
        // A stripe never passes the end of the number range, either.
        let fits = |stripe: &Stripe| {
            stripe.start.is_multiple_of(sector_size) && stripe.start.checked_add(len).is_some()
        };
        if !is_sane || !stripes.iter().all(fits) {
            return Err(nonsense());
        }
        let chunk = Self {
            logical: key.offset..end,
            kind,
            columns,
            copies,
            stripes,
        };
        Ok((chunk, rest))
    }

    /// How often each byte is there.
    pub(crate) fn copies(&self) -> usize {
        self.copies
    }

    /// How many bytes each of its stripes has.
    pub(crate) fn stripe_len(&self) -> u64 {
        (self.logical.end - self.logical.start) / self.columns
    }

    /// What of the logical run `range` lies in stripe `index`, as bytes of its device: one run, as
    /// the pieces of a striped chunk follow each other on each device. `range` lies in the chunk.
    pub(crate) fn on_stripe(&self, index: usize, range: &Range<u64>) -> Extent {
        let Some(stripe) = self.stripes.get(index) else {
            return Extent::new(0, 0);
        };
        let column = index as u64 / self.copies as u64;
        // The first byte of the stripe that holds `logical` or what comes behind it.
        let place = |logical: u64| {
            let within = logical.clamp(self.logical.start, self.logical.end) - self.logical.start;
            let offset = if self.columns == 1 {
                within
            } else {
                let piece = within / format::STRIPE_LEN;
                let row = piece / self.columns * format::STRIPE_LEN;
                match (piece % self.columns).cmp(&column) {
                    std::cmp::Ordering::Less => row,
                    std::cmp::Ordering::Equal => row + within % format::STRIPE_LEN,
                    std::cmp::Ordering::Greater => row + format::STRIPE_LEN,
                }
            };
            Offset(stripe.start + offset)
        };
        Extent::between(place(range.start), place(range.end))
    }

    /// The run of logical addresses that goes on without a gap from `place`, in bytes from the start of
    /// stripe `index`.
    pub(crate) fn logical_at(&self, index: usize, place: u64) -> Range<u64> {
        if self.columns == 1 {
            return self.logical.start + place..self.logical.end;
        }
        let column = index as u64 / self.copies as u64;
        let piece = place / format::STRIPE_LEN * self.columns + column;
        let start = self.logical.start + piece * format::STRIPE_LEN;
        start + place % format::STRIPE_LEN..start + format::STRIPE_LEN
    }

    /// Which copy of what it holds stripe `index` has.
    pub(crate) fn copy_of(&self, index: usize) -> usize {
        index % self.copies
    }

    /// How many of its logical bytes of `used` lie in each of its stripes, about.
    pub(crate) fn share(&self, used: u64) -> u64 {
        used / self.columns
    }

    /// Where copy number `copy` of the logical run `range` lies, in order. `range` lies in the chunk.
    pub(crate) fn pieces(
        &self,
        copy: usize,
        range: Range<u64>,
    ) -> impl Iterator<Item = Piece> + '_ {
        let mut at = range.start.max(self.logical.start);
        std::iter::from_fn(move || {
            if at >= range.end.min(self.logical.end) {
                return None;
            }
            let piece = (at - self.logical.start) / format::STRIPE_LEN;
            let end = match self.columns {
                1 => range.end,
                _ => range
                    .end
                    .min(self.logical.start + (piece + 1) * format::STRIPE_LEN),
            };
            let column = (piece % self.columns) as usize;
            let index = column * self.copies + copy;
            let extent = self.on_stripe(index, &(at..end));
            at = end;
            let devid = self.stripes.get(index)?.devid;
            Some(Piece { devid, extent })
        })
    }
}

/// All chunks, ascending by logical address and disjoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChunkMap {
    chunks: Vec<Chunk>,
    stripes: usize,
}

impl ChunkMap {
    /// The chunks that the superblock itself lists, with which those of the chunk tree are found.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub(crate) fn of_system(mut array: &[u8], sector_size: u32) -> Result<Self> {
        let mut map = Self::default();
        while !array.is_empty() {
            let (key, rest) = DiskKey::read_from_prefix(array)
                .map_err(|_| damaged("its list of system chunks is cut short"))?;
            let chunk;
            (chunk, array) = Chunk::parse(key.into(), rest, sector_size)?;
            if chunk.kind & format::SYSTEM == 0 {
                return Err(damaged("its list of system chunks holds another chunk"));
            }
            map.insert(chunk)?;
        }
        Ok(map)
    }

    /// Adds the chunk of an item of the chunk tree.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it makes no sense, or overlaps another; [`Kind::NotApplicable`] if its
    /// profile is not known here, or there are too many.
    pub(crate) fn add(&mut self, key: Key, item: &[u8], sector_size: u32) -> Result<()> {
        let (chunk, rest) = Chunk::parse(key, item, sector_size)?;
        if !rest.is_empty() {
            return Err(damaged("the item of a chunk is too long"));
        }
        self.insert(chunk)
    }

    fn insert(&mut self, chunk: Chunk) -> Result<()> {
        self.stripes += chunk.stripes.len();
        if self.stripes > MAX_STRIPES {
            return Err(Error::new(Kind::NotApplicable, "it has too many chunks"));
        }
        let at = self
            .chunks
            .partition_point(|other| other.logical.start < chunk.logical.start);
        let is_behind_previous = at == 0
            || self
                .chunks
                .get(at - 1)
                .is_some_and(|other| other.logical.end <= chunk.logical.start);
        let is_before_next = self
            .chunks
            .get(at)
            .is_none_or(|other| chunk.logical.end <= other.logical.start);
        if !is_behind_previous || !is_before_next {
            return Err(damaged("two of its chunks overlap"));
        }
        self.chunks.insert(at, chunk);
        Ok(())
    }

    /// All chunks, ascending.
    pub(crate) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The chunk that holds a logical address, and its number.
    pub(crate) fn find(&self, logical: u64) -> Option<(usize, &Chunk)> {
        let behind = self
            .chunks
            .partition_point(|chunk| chunk.logical.start <= logical);
        let number = behind.checked_sub(1)?;
        let chunk = self.chunks.get(number)?;
        chunk.logical.contains(&logical).then_some((number, chunk))
    }

    /// All stripes on a device as number of the chunk and number within it, ascending by place.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if two of them overlap, or one passes `size`.
    pub(crate) fn stripes_on(&self, devid: u64, size: ByteLen) -> Result<Vec<(usize, usize)>> {
        let mut found = Vec::new();
        for (number, chunk) in self.chunks.iter().enumerate() {
            for (index, stripe) in chunk.stripes.iter().enumerate() {
                if stripe.devid == devid {
                    found.push((
                        stripe.start,
                        stripe.start + chunk.stripe_len(),
                        number,
                        index,
                    ));
                }
            }
        }
        found.sort_unstable();
        let mut last = 0;
        for (start, end, ..) in &found {
            if *start < last || *end > size.0 {
                return Err(damaged("parts of its chunks overlap, or leave the device"));
            }
            last = *end;
        }
        let places = found.into_iter().map(|(.., number, index)| (number, index));
        Ok(places.collect())
    }
}

/// The devices of a filesystem, by id.
#[derive(Clone, Default)]
pub(crate) struct Devices<'a>(Vec<(u64, &'a dyn ReadAt)>);

impl<'a> Devices<'a> {
    /// Adds a device.
    pub(crate) fn add(&mut self, devid: u64, source: &'a dyn ReadAt) {
        self.0.push((devid, source));
    }

    /// Reads a run of logical addresses by copy number `copy`; the run must lie in one chunk.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it does not; [`Kind::Io`] if it cannot be read, or its device is not here.
    pub(crate) fn read(
        &self,
        chunk: &Chunk,
        copy: usize,
        range: Range<u64>,
        buf: &mut [u8],
    ) -> Result<()> {
        let mut rest = buf;
        for Piece { devid, extent } in chunk.pieces(copy, range) {
            let device = self.0.iter().find(|(id, _)| *id == devid);
            let (_, source) = device
                .ok_or_else(|| Error::new(Kind::Io, format!("device {devid} is not here")))?;
            let (part, behind) = rest
                .split_at_mut_checked(extent.len.as_usize())
                .ok_or_else(|| damaged("a run of a chunk is longer than it is"))?;
            source.read_exact_at(part, extent.start)?;
            rest = behind;
        }
        match rest.is_empty() {
            true => Ok(()),
            false => Err(damaged("a tree block leaves its chunk")),
        }
    }
}

/// The filesystem contradicts itself.
pub(crate) fn damaged(what: impl Into<String>) -> Error {
    Error::new(Kind::Damaged, what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 1 << 30;
    const PIECE: u64 = format::STRIPE_LEN;

    fn chunk(kind: u64, columns: u64, copies: usize, rows: u64) -> Chunk {
        let stripe = |n: u64| Stripe {
            devid: n + 1,
            dev_uuid: [n as u8; 16],
            start: (n + 1) << 32,
        };
        Chunk {
            logical: START..START + columns * rows * PIECE,
            kind: kind | format::DATA,
            columns,
            copies,
            stripes: (0..columns * copies as u64).map(stripe).collect(),
        }
    }

    fn item(chunk: &Chunk, sub_stripes: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in [
            chunk.logical.end - chunk.logical.start,
            2,
            PIECE,
            chunk.kind,
        ] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend([0; 12]);
        bytes.extend((chunk.stripes.len() as u16).to_le_bytes());
        bytes.extend(sub_stripes.to_le_bytes());
        for stripe in &chunk.stripes {
            bytes.extend(stripe.devid.to_le_bytes());
            bytes.extend(stripe.start.to_le_bytes());
            bytes.extend(stripe.dev_uuid);
        }
        bytes
    }

    fn key() -> Key {
        Key::new(format::CHUNKS, format::CHUNK_ITEM, START)
    }

    #[test]
    fn profiles_are_read_as_they_are() {
        for (kind, columns, copies) in [
            (0, 1, 1),
            (format::DUP, 1, 2),
            (format::RAID1, 1, 2),
            (format::RAID1C3, 1, 3),
            (format::RAID1C4, 1, 4),
            (format::RAID0, 3, 1),
            (format::RAID10, 2, 2),
        ] {
            let chunk = chunk(kind, columns, copies, 8);
            let mut map = ChunkMap::default();
            map.add(key(), &item(&chunk, 2), 4096).unwrap();
            assert_eq!(map.chunks(), std::slice::from_ref(&chunk));
            // Once more, it overlaps itself.
            let error = map.add(key(), &item(&chunk, 2), 4096).unwrap_err();
            assert_eq!(error.kind(), Kind::Damaged);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let good = chunk(format::RAID10, 2, 2, 8);
        let refused = |bytes: &[u8], kind: Kind| {
            let mut map = ChunkMap::default();
            let error = map.add(key(), bytes, 4096).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
        };
        refused(&item(&good, 1), Kind::Damaged);
        refused(&item(&good, 2)[..100], Kind::Damaged);
        refused(&[item(&good, 2), vec![0]].concat(), Kind::Damaged);
        let with = |change: fn(&mut Chunk)| {
            let mut chunk = good.clone();
            change(&mut chunk);
            item(&chunk, 2)
        };
        refused(&with(|chunk| chunk.kind |= format::DUP), Kind::Damaged);
        refused(&with(|chunk| chunk.kind = format::RAID10), Kind::Damaged);
        refused(&with(|chunk| chunk.kind |= 1 << 11), Kind::Damaged);
        refused(&with(|chunk| chunk.logical.end -= 4096), Kind::Damaged);
        refused(
            &with(|chunk| chunk.logical.end = chunk.logical.start),
            Kind::Damaged,
        );
        refused(&with(|chunk| drop(chunk.stripes.drain(1..))), Kind::Damaged);
        refused(
            &with(|chunk| chunk.stripes[1].start = u64::MAX - 4095),
            Kind::Damaged,
        );
        let raid5 = |chunk: &mut Chunk| chunk.kind = format::DATA | format::RAID5;
        refused(&with(raid5), Kind::NotApplicable);
    }

    #[test]
    fn stripes_that_overlap_or_leave_the_device_are_damage() {
        let mut map = ChunkMap::default();
        let mut one = chunk(format::DUP, 1, 2, 8);
        one.stripes[1].devid = 1;
        one.stripes[1].start = one.stripes[0].start + 8 * PIECE;
        map.insert(one.clone()).unwrap();
        let end = one.stripes[1].start + 8 * PIECE;
        assert_eq!(map.stripes_on(1, ByteLen(end)).unwrap(), [(0, 0), (0, 1)]);
        assert!(map.stripes_on(1, ByteLen(end - 1)).is_err());
        assert!(map.stripes_on(2, ByteLen(0)).unwrap().is_empty());
        let mut map = ChunkMap::default();
        one.stripes[1].start -= 4096;
        map.insert(one).unwrap();
        assert!(map.stripes_on(1, ByteLen(end)).is_err());
    }

    proptest! {
        /// Piece by piece, and stripe by stripe, the same bytes are found, each once a copy.
        #[test]
        fn pieces_and_stripes_agree(columns in 1u64..5, copies in 1usize..4, from in 0u64..300, len in 1u64..300) {
            let chunk = chunk(0, columns, copies, 16);
            let end = (chunk.logical.end - START) / 4096;
            let from = from % end;
            let range = START + from * 4096..START + (from + len).min(end) * 4096;
            let mut by_piece = vec![Vec::new(); chunk.stripes.len()];
            for copy in 0..copies {
                let mut covered = 0;
                for piece in chunk.pieces(copy, range.clone()) {
                    prop_assert!(piece.extent.len.0 > 0);
                    covered += piece.extent.len.0;
                    by_piece[piece.devid as usize - 1].push(piece.extent);
                }
                prop_assert_eq!(covered, range.end - range.start);
            }
            for (index, pieces) in by_piece.into_iter().enumerate() {
                let whole = chunk.on_stripe(index, &range);
                // And back again.
                let stripe = chunk.stripes[index].start;
                let mut place = whole.start.0 - stripe;
                while place < whole.end().0 - stripe {
                    let run = chunk.logical_at(index, place);
                    prop_assert!(range.contains(&run.start));
                    let run = run.start..run.end.min(range.end);
                    let back = chunk.on_stripe(index, &run);
                    prop_assert_eq!(back.start.0 - stripe, place);
                    place += run.end - run.start;
                }
                let mut at = whole.start;
                for piece in pieces {
                    prop_assert_eq!(piece.start, at);
                    at = piece.end();
                }
                prop_assert_eq!(at, whole.end());
            }
        }
    }
}
