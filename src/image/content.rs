//! What identifies content: the hash of a cell, and the id of a whole image's content.
//!
//! A cell is 1 MiB of a volume, counted from its start. Its hash is BLAKE3 over the bytes of its
//! blocks that are not all zero, in order, and then the bitmap of those blocks. So zeros cost
//! nothing, and it makes no difference whether a block was stored as data or as zeros, or left out.
//!
//! The content id goes over the cells that are not all zero. It depends only on what the volumes and
//! streams read as, not on order, compression, chunk size or time.

use crate::image::format::{BLOCK, BLOCKS_PER_CELL};
use crate::units::ByteLen;

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

/// Ends a list of cells in the content id; no cell has this number.
const END_OF_CELLS: u64 = u64::MAX;

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Folding a fixed number of bytes without an early exit becomes vector code.
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && bytes
            .chunks_exact(64)
            .remainder()
            .iter()
            .all(|byte| *byte == 0)
}

/// Hashes one cell from its pieces, and remembers which of its blocks are not zero.
#[derive(Debug)]
pub struct CellHasher {
    hasher: blake3::Hasher,
    nonzero: [u8; BLOCKS_PER_CELL / 8],
}

impl Default for CellHasher {
    fn default() -> Self {
        Self {
            hasher: blake3::Hasher::new(),
            nonzero: [0; BLOCKS_PER_CELL / 8],
        }
    }
}

/// The hash of a cell of zeros: such cells are not part of the content id.
pub fn zero_cell_hash() -> &'static Hash {
    static HASH: std::sync::OnceLock<Hash> = std::sync::OnceLock::new();
    HASH.get_or_init(|| CellHasher::new().finish().0)
}

impl CellHasher {
    /// A cell of which nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds blocks from number `first` of the cell on. Pieces come in ascending order. `bytes` is
    /// whole blocks, but for the last block of a volume, which may be short.
    ///
    /// # Panics
    /// If the piece passes the end of the cell.
    pub fn push(&mut self, first: usize, bytes: &[u8]) {
        let mut run = 0..0;
        for (number, block) in bytes.chunks(BLOCK as usize).enumerate() {
            let start = number * BLOCK as usize;
            if is_zero(block) {
                self.hasher.update(&bytes[run]);
                run = 0..0;
            } else {
                self.nonzero[(first + number) / 8] |= 1 << ((first + number) % 8);
                run = if run.is_empty() { start } else { run.start }..start + block.len();
            }
        }
        self.hasher.update(&bytes[run]);
    }

    /// The cell's hash, and the bitmap of its blocks that are not zero (the lowest bit first).
    pub fn finish(mut self) -> (Hash, [u8; BLOCKS_PER_CELL / 8]) {
        self.hasher.update(&self.nonzero);
        (*self.hasher.finalize().as_bytes(), self.nonzero)
    }
}

/// Adds up the content id: volumes in order, and then streams, each with its non-zero cells in
/// ascending order and then its length.
#[derive(Clone, Debug)]
pub struct ContentHasher {
    hasher: blake3::Hasher,
}

impl ContentHasher {
    /// Begins the id of an image with so many volumes and streams.
    pub fn new(volumes: usize, streams: usize) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"holdstill content 1\n");
        hasher.update(&(volumes as u64).to_le_bytes());
        hasher.update(&(streams as u64).to_le_bytes());
        Self { hasher }
    }

    /// Adds cell `number` of the volume or stream, which is not all zero.
    pub fn cell(&mut self, number: u64, hash: &Hash) {
        self.hasher.update(&number.to_le_bytes());
        self.hasher.update(hash);
    }

    /// Ends the volume or stream, which is `len` bytes long.
    pub fn end(&mut self, len: ByteLen) {
        self.hasher.update(&END_OF_CELLS.to_le_bytes());
        self.hasher.update(&len.0.to_le_bytes());
    }

    /// The content id.
    pub fn finish(self) -> Hash {
        *self.hasher.finalize().as_bytes()
    }
}

/// Adds up the content id from the hashes in records, as an image is written or read in order. That
/// works as long as no block is superseded.
#[derive(Clone, Debug)]
pub struct RunningContent {
    hasher: ContentHasher,
    /// Of each volume and stream; those of streams grow.
    lens: Vec<ByteLen>,
    begun: usize,
    is_known: bool,
}

impl RunningContent {
    /// For volumes of these sizes, and so many streams.
    pub fn new(volumes: impl Iterator<Item = ByteLen>, streams: usize) -> Self {
        let mut lens: Vec<ByteLen> = volumes.collect();
        let hasher = ContentHasher::new(lens.len(), streams);
        lens.resize(lens.len() + streams, ByteLen::ZERO);
        Self {
            hasher,
            lens,
            begun: 0,
            is_known: true,
        }
    }

    /// Adds the cells of a record of volume or stream `number`. They must be whole: all of the cell's
    /// content, and none of it superseded.
    pub fn add<'a>(&mut self, number: u32, cells: impl Iterator<Item = (u64, &'a Hash)>) {
        let number = number as usize;
        self.is_known &= number >= self.begun && number <= self.lens.len();
        if !self.is_known {
            return;
        }
        self.begin_up_to(number);
        for (cell, hash) in cells {
            if hash != zero_cell_hash() {
                self.hasher.cell(cell, hash);
            }
        }
    }

    /// Says that stream `number` goes up to `len`.
    pub fn grow(&mut self, number: u32, len: ByteLen) {
        if let Some(old) = self.lens.get_mut(number as usize - 1) {
            *old = len;
        }
    }

    /// Says that a block was superseded, or that a record's hashes are not of whole cells.
    pub fn give_up(&mut self) {
        self.is_known = false;
    }

    /// The content id; `None` if it cannot be told in this way.
    pub fn finish(mut self) -> Option<Hash> {
        self.begin_up_to(self.lens.len());
        if let Some(last) = self.lens.last() {
            self.hasher.end(*last);
        }
        self.is_known.then(|| self.hasher.finish())
    }

    fn begin_up_to(&mut self, number: usize) {
        while self.begun < number {
            if self.begun > 0 {
                self.hasher.end(self.lens[self.begun - 1]);
            }
            self.begun += 1;
        }
    }
}

/// A hash, or the start of one, in lower-case hexadecimal.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads `N` bytes from exactly `2 N` hexadecimal digits.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |digit: u8| char::from(digit).to_digit(16);
        *byte = (nibble(pair[0])? * 16 + nibble(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const B: usize = BLOCK as usize;

    #[test]
    fn zero_means_every_byte() {
        for len in [0, 1, 63, 64, 65, 4096, 4100] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in [0, len / 2, len.saturating_sub(1)] {
                if at < len {
                    bytes[at] = 1;
                    assert!(!is_zero(&bytes), "{len}, {at}");
                    bytes[at] = 0;
                }
            }
        }
    }

    proptest! {
        /// The hash depends on the content alone, not on the pieces it came in, nor on whether zero
        /// blocks were pushed or left out.
        #[test]
        fn pieces_make_no_difference(
            zero in prop::collection::vec(any::<bool>(), 1..40),
            cuts in prop::collection::vec(any::<bool>(), 40),
        ) {
            let mut bytes = vec![0u8; zero.len() * B];
            for (number, block) in bytes.chunks_mut(B).enumerate() {
                if !zero[number] { block[number] = 7; }
            }
            let mut whole = CellHasher::new();
            whole.push(0, &bytes);
            let mut pieces = CellHasher::new();
            let mut from = 0;
            for to in 1..=zero.len() {
                if cuts[to - 1] || to == zero.len() {
                    if !is_zero(&bytes[from * B..to * B]) {
                        pieces.push(from, &bytes[from * B..to * B]);
                    }
                    from = to;
                }
            }
            let (hash, nonzero) = whole.finish();
            for (number, zero) in zero.iter().enumerate() {
                prop_assert_eq!(nonzero[number / 8] & (1 << (number % 8)) == 0, *zero);
            }
            prop_assert_eq!((hash, nonzero), pieces.finish());
        }
    }

    #[test]
    fn moving_a_block_changes_the_hash() {
        let hash_at = |number: usize| {
            let mut hasher = CellHasher::new();
            hasher.push(number, &[9; B]);
            hasher.finish().0
        };
        assert_ne!(hash_at(0), hash_at(1));
    }

    #[test]
    fn hexadecimal_goes_both_ways() {
        assert_eq!(
            from_hex::<3>(&to_hex(&[0, 0x9f, 255])),
            Some([0, 0x9f, 255])
        );
        assert_eq!(from_hex::<1>("g0"), None);
        assert_eq!(from_hex::<1>("012"), None);
        assert_eq!(from_hex::<1>("é"), None);
    }
}
