//! The checksums of data: one for each sector, as it is on disk (compressed).
//!
//! Data that is overwritten in place, or only reserved, has none.

use std::ops::{Range, RangeInclusive};

use super::checksum::Checksum;
use super::chunks::damaged;
use super::format::{self, Key};
use super::superblock::Geometry;
use crate::error::Result;

/// The checksums of a run of data, as far as there are any.
#[derive(Clone, Debug)]
pub(crate) struct Sums {
    checksum: Checksum,
    sector: u64,
    /// How far before the run an item may begin that tells of it.
    reach: u64,
    logical: Range<u64>,
    /// One checksum behind the other.
    sums: Vec<u8>,
    /// Whether there is one, by sector.
    known: Vec<bool>,
}

impl Sums {
    /// Of a run of whole sectors; none is known yet.
    pub(crate) fn new(geometry: &Geometry, logical: Range<u64>) -> Self {
        let sector = u64::from(geometry.sector_size);
        let sectors = (logical.end.saturating_sub(logical.start) / sector) as usize;
        let len = geometry.checksum.len();
        Self {
            checksum: geometry.checksum,
            sector,
            // An item lies in one leaf.
            reach: geometry.node_len().0 / len as u64 * sector,
            logical,
            sums: vec![0; sectors * len],
            known: vec![false; sectors],
        }
    }

    /// The keys of all items in the checksum tree that may tell of the run.
    pub(crate) fn keys(&self) -> RangeInclusive<Key> {
        let first = self.logical.start.saturating_sub(self.reach);
        let key = |offset| Key::new(format::CSUMS, format::EXTENT_CSUM, offset);
        key(first)..=key(self.logical.end.saturating_sub(1))
    }

    /// Takes what an item tells; nothing from one of another kind.
    ///
    /// # Errors
    /// [`Kind::Damaged`](crate::error::Kind::Damaged) if it makes no sense.
    pub(crate) fn add(&mut self, key: Key, item: &[u8]) -> Result<()> {
        if key.kind != format::EXTENT_CSUM {
            return Ok(());
        }
        let len = self.checksum.len();
        if !key.offset.is_multiple_of(self.sector) || !item.len().is_multiple_of(len) {
            return Err(damaged(format!(
                "the checksums of logical {} make no sense",
                key.offset
            )));
        }
        let mut at = key.offset;
        for sum in item.chunks_exact(len) {
            if let Some(within) = at.checked_sub(self.logical.start) {
                let number = (within / self.sector) as usize;
                let Some(known) = self.known.get_mut(number) else {
                    break;
                };
                *known = true;
                self.sums[number * len..][..len].copy_from_slice(sum);
            }
            at = at.saturating_add(self.sector);
        }
        Ok(())
    }

    /// Whether every sector has one.
    pub(crate) fn is_complete(&self) -> bool {
        self.known.iter().all(|known| *known)
    }

    /// How many sectors have one.
    pub(crate) fn known(&self) -> usize {
        self.known.iter().filter(|known| **known).count()
    }

    /// Whether sector `number` of the run may hold `bytes`: it does if it has no checksum.
    pub(crate) fn allows(&self, number: usize, bytes: &[u8]) -> bool {
        let len = self.checksum.len();
        match self.known.get(number) {
            Some(true) => self.checksum.of(bytes)[..len] == self.sums[number * len..][..len],
            _ => true,
        }
    }

    /// That of one sector.
    pub(crate) fn of_sector(&self, number: usize) -> Self {
        let len = self.checksum.len();
        let start = self.logical.start + number as u64 * self.sector;
        Self {
            logical: start..start + self.sector,
            sums: self
                .sums
                .get(number * len..(number + 1) * len)
                .unwrap_or_default()
                .to_vec(),
            known: self.known.get(number..=number).unwrap_or_default().to_vec(),
            ..*self
        }
    }

    /// The sectors of the run, by number, that do not hold what they should.
    pub(crate) fn wrong<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        let sectors = bytes.chunks(self.sector as usize).enumerate();
        sectors.filter_map(|(number, sector)| (!self.allows(number, sector)).then_some(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTOR: u64 = 4096;
    const START: u64 = 1 << 30;

    fn geometry() -> Geometry {
        Geometry {
            sector_size: SECTOR as u32,
            node_size: 16 << 10,
            checksum: Checksum::Crc32c,
            metadata_uuid: [0; 16],
            generation: 1,
        }
    }

    #[test]
    fn what_has_a_checksum_is_checked_and_nothing_else() {
        let bytes: Vec<u8> = (0..4 * SECTOR).map(|at| (at / SECTOR + 1) as u8).collect();
        let mut sums = Sums::new(&geometry(), START..START + 4 * SECTOR);
        let of = |number: usize| {
            let sector = &bytes[number * SECTOR as usize..][..SECTOR as usize];
            Checksum::Crc32c.of(sector)[..4].to_vec()
        };
        assert_eq!(sums.wrong(&bytes).count(), 0);
        // An item that begins before the run, and one that ends behind it.
        let key = |offset| Key::new(format::CSUMS, format::EXTENT_CSUM, offset);
        let first = [vec![9; 4], of(0), of(1)].concat();
        sums.add(key(START - SECTOR), &first).unwrap();
        assert!(!sums.is_complete());
        sums.add(key(START + 3 * SECTOR), &[of(3), vec![9; 400]].concat())
            .unwrap();
        assert_eq!(sums.known(), 3);
        assert_eq!(sums.wrong(&bytes).count(), 0);
        let mut damaged = bytes.clone();
        for number in 0..4 {
            damaged[number * SECTOR as usize + 77] ^= 1;
        }
        assert_eq!(sums.wrong(&damaged).collect::<Vec<_>>(), [0, 1, 3]);
        assert!(sums.keys().contains(&key(START - SECTOR)));
        assert!(!sums.keys().contains(&key(START + 4 * SECTOR)));
        assert!(sums.add(key(START + 1), &of(0)).is_err());
        assert!(sums.add(key(START), &[0; 5]).is_err());
    }
}
