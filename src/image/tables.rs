//! The tables of a data record: its extents, and the hashes of the cells they touch.
//!
//! [`Tables`] is checked when it is decoded: extents lie within the volume, ascend, and hold as many
//! data blocks as the payload and as many hashes as cells. What it hands out can be trusted for
//! addressing; the content is trusted only after [`Tables::check_content`].

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::image::content::{CellHasher, Hash};
use crate::image::format::{BLOCK, BLOCKS_PER_CELL, CELL, ExtentEntry, MAX_EXTENTS, extent_kind};
use crate::units::{ByteLen, Offset};

/// What the blocks of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes in the payload.
    Data,
    /// Zeros.
    Zero,
    /// No longer part of the volume.
    Trim,
}

/// One run of a data record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it belongs. Starts at a block; ends at a block or at the end of the volume.
    pub extent: Extent,
    /// What it is.
    pub content: Content,
}

/// Extents and hashes of one data record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Ascending and disjoint.
    pub runs: Vec<Run>,
    /// One for each cell that a data run touches, ascending.
    pub hashes: Vec<Hash>,
}

impl Tables {
    /// Bytes of all data runs: the length of the payload when decoded.
    pub fn data_len(&self) -> ByteLen {
        self.data_extents().map(|extent| extent.len).sum()
    }

    /// From the first byte of the first run to the last of the last.
    pub fn span(&self) -> Extent {
        match (self.runs.first(), self.runs.last()) {
            (Some(first), Some(last)) => Extent::between(first.extent.start, last.extent.end()),
            _ => Extent::default(),
        }
    }

    /// Whether any run is a trim.
    pub fn has_trim(&self) -> bool {
        self.runs.iter().any(|run| run.content == Content::Trim)
    }

    /// The data runs' extents.
    pub fn data_extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let data = self.runs.iter().filter(|run| run.content == Content::Data);
        data.map(|run| run.extent)
    }

    /// The hashes with the numbers of their cells.
    pub fn cells(&self) -> impl Iterator<Item = (u64, &Hash)> + '_ {
        cells_of(self.data_extents()).zip(&self.hashes)
    }

    /// The tables of a chunk of a stream: `len` bytes from `start`, which is the start of a cell.
    pub fn of_stream(start: Offset, len: ByteLen, hashes: Vec<Hash>) -> Self {
        let run = Run {
            extent: Extent::new(start.0, len.0),
            content: Content::Data,
        };
        Self {
            runs: vec![run],
            hashes,
        }
    }

    /// The tables of a chunk of a stream that holds `plain`.
    pub fn describe_stream(start: Offset, plain: &[u8]) -> Self {
        let extent = Extent::new(start.0, plain.len() as u64);
        let cells = hash_cells(std::iter::once(extent), plain);
        let hashes = cells.into_iter().map(|cell| cell.hash).collect();
        Self::of_stream(start, extent.len, hashes)
    }

    /// Hands each data run with its bytes of `plain` to `each`, in order.
    ///
    /// # Errors
    /// The first that `each` returns.
    ///
    /// # Panics
    /// If `plain` is not [`data_len`](Self::data_len) long.
    pub fn for_each_data(
        &self,
        plain: &[u8],
        mut each: impl FnMut(Offset, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut rest = plain;
        for extent in self.data_extents() {
            let (bytes, behind) = rest.split_at(extent.len.as_usize());
            each(extent.start, bytes)?;
            rest = behind;
        }
        assert!(rest.is_empty(), "the payload is as long as its runs");
        Ok(())
    }

    /// Whether the decoded payload is what was hashed when it was stored.
    pub fn check_content(&self, plain: &[u8]) -> bool {
        let cells = hash_cells(self.data_extents(), plain);
        cells.iter().map(|cell| &cell.hash).eq(&self.hashes)
    }

    /// The tables as they stand in the record, counted from `base`.
    pub fn encode(&self) -> (Offset, Vec<u8>, u32) {
        let base = self.span().start;
        let mut bytes = Vec::with_capacity(self.runs.len() * 8 + self.hashes.len() * 32);
        let mut at = base.0 / BLOCK;
        let mut count = 0;
        for run in &self.runs {
            let kind = match run.content {
                Content::Data => extent_kind::DATA,
                Content::Zero => extent_kind::ZERO,
                Content::Trim => extent_kind::TRIM,
            };
            let start = run.extent.start.0 / BLOCK;
            let mut left = run.extent.end().0.div_ceil(BLOCK) - start;
            let mut gap = start - at;
            while left > 0 {
                let len = left.min(u64::from(extent_kind::MAX_LEN)) as u32;
                // The writer begins a new record where a gap would not fit: see `MAX_GAP`.
                let gap_field = u32::try_from(gap).expect("runs of one record lie near each other");
                let entry = ExtentEntry {
                    gap: gap_field.into(),
                    len_kind: (len | kind << extent_kind::SHIFT).into(),
                };
                bytes.extend_from_slice(entry.as_bytes());
                count += 1;
                left -= u64::from(len);
                gap = 0;
            }
            at = run.extent.end().0.div_ceil(BLOCK);
        }
        for hash in &self.hashes {
            bytes.extend_from_slice(hash);
        }
        (base, bytes, count)
    }

    /// Decodes and checks the tables of a record of a volume of `size` bytes. `bytes` holds `extents`
    /// entries and then the hashes; `plain_len` is what the header says of the payload.
    ///
    /// # Errors
    /// [`Kind::Damaged`], saying which rule they break.
    pub fn decode(
        bytes: &[u8],
        extents: u32,
        base: Offset,
        size: ByteLen,
        plain_len: ByteLen,
    ) -> Result<Self> {
        let wrong = |what: &str| {
            Error::new(
                Kind::Damaged,
                format!("a record's tables are damaged: {what}"),
            )
        };
        if extents > MAX_EXTENTS || !base.0.is_multiple_of(BLOCK) || base.0 > size.0 {
            return Err(wrong("impossible counts"));
        }
        let (entries, rest) = <[ExtentEntry]>::ref_from_prefix_with_elems(bytes, extents as usize)
            .map_err(|_| wrong("they end too early"))?;
        let (hashes, rest) = rest.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(wrong("odd length"));
        }
        let mut runs = Vec::with_capacity(entries.len());
        let mut at = base;
        for entry in entries {
            let packed = entry.len_kind.get();
            let content = match packed >> extent_kind::SHIFT {
                extent_kind::DATA => Content::Data,
                extent_kind::ZERO => Content::Zero,
                extent_kind::TRIM => Content::Trim,
                _ => return Err(wrong("unknown kind of extent")),
            };
            // Below 2^62 + 2^44 + 2^42: no overflow, as `at` never passes the volume's size.
            let start = at + ByteLen(u64::from(entry.gap.get()) * BLOCK);
            let len = ByteLen(u64::from(packed & extent_kind::MAX_LEN) * BLOCK);
            let extent = Extent::between(start, (start + len).min(Offset(size.0)));
            if extent.is_empty() || start.0 >= size.0 {
                return Err(wrong("an extent outside the volume"));
            }
            runs.push(Run { extent, content });
            // A short last block ends the volume: nothing can follow it.
            at = extent.end();
            if !at.0.is_multiple_of(BLOCK) {
                at = at.align_up(BLOCK);
            }
        }
        let tables = Self {
            runs,
            hashes: hashes.to_vec(),
        };
        if tables.data_len() != plain_len {
            return Err(wrong("payload and extents differ in length"));
        }
        if cells_of(tables.data_extents()).count() != tables.hashes.len() {
            return Err(wrong("as many hashes as cells are needed"));
        }
        Ok(tables)
    }
}

/// Which zero blocks are left out of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elide {
    /// Every one: for payloads that are stored as they are.
    EveryBlock,
    /// Those before the first and behind the last block of data: what is left is one piece that a
    /// compressor can take as it lies, and zeros in it cost next to nothing.
    Ends,
}

impl Tables {
    /// Describes ascending runs. The bytes of the data runs follow each other in `plain`; those that
    /// are zero become zero runs. Returns with the tables the pieces of `plain` that are the payload.
    ///
    /// # Panics
    /// If `plain` is shorter than the data runs.
    pub fn describe(runs: &[Run], plain: &[u8], elide: Elide) -> (Self, Vec<Range<usize>>) {
        let extents = || {
            runs.iter()
                .filter(|run| run.content == Content::Data)
                .map(|run| run.extent)
        };
        let cells = hash_cells(extents(), plain);
        let is_data = data_blocks(extents(), &cells, elide);
        let mut tables = Self::default();
        let mut pieces: Vec<Range<usize>> = Vec::new();
        let (mut at, mut block) = (0, 0);
        for run in runs {
            if run.content != Content::Data {
                tables.runs.push(*run);
                continue;
            }
            let mut start = run.extent.start;
            while start < run.extent.end() {
                let data = is_data[block];
                let blocks = is_data[block..]
                    .iter()
                    .take_while(|other| **other == data)
                    .count();
                let end = run.extent.end().min(start + ByteLen(blocks as u64 * BLOCK));
                let extent = Extent::between(start, end);
                let bytes = at..at + extent.len.as_usize();
                at = bytes.end;
                block += extent.len.0.div_ceil(BLOCK) as usize;
                start = end;
                let content = if data { Content::Data } else { Content::Zero };
                tables.runs.push(Run { extent, content });
                match pieces.last_mut() {
                    _ if !data => {}
                    Some(last) if last.end == bytes.start => last.end = bytes.end,
                    _ => pieces.push(bytes),
                }
            }
        }
        let touched = cells_of(tables.data_extents());
        let mut hashes = cells.into_iter().map(|cell| (cell.number, cell.hash));
        tables.hashes = touched
            .filter_map(|number| hashes.find(|(other, _)| *other == number))
            .map(|(_, hash)| hash)
            .collect();
        (tables, pieces)
    }
}

/// For each block of the extents in turn, whether it goes into the payload.
fn data_blocks(
    extents: impl Iterator<Item = Extent>,
    cells: &[HashedCell],
    elide: Elide,
) -> Vec<bool> {
    let mut cells = cells.iter().peekable();
    let mut is_data = Vec::new();
    for (number, first, len) in extents.flat_map(split_at_cells) {
        while cells.next_if(|cell| cell.number < number).is_some() {}
        let blocks = first..first + len.0.div_ceil(BLOCK) as usize;
        let nonzero = |block| cells.peek().is_some_and(|cell| cell.is_nonzero(block));
        is_data.extend(blocks.map(nonzero));
    }
    if elide == Elide::Ends {
        let first = is_data.iter().position(|data| *data);
        let last = is_data.iter().rposition(|data| *data);
        if let (Some(first), Some(last)) = (first, last) {
            is_data[first..=last].fill(true);
        }
    }
    is_data
}

/// The numbers of the cells that ascending extents touch, each once.
pub fn cells_of(extents: impl Iterator<Item = Extent>) -> impl Iterator<Item = u64> {
    let mut next = 0;
    extents.flat_map(move |extent| {
        let first = (extent.start.0 / CELL).max(next);
        let last = extent.end().0.div_ceil(CELL);
        next = next.max(last);
        first..last
    })
}

/// A cell that was hashed.
struct HashedCell {
    number: u64,
    hash: Hash,
    nonzero: [u8; BLOCKS_PER_CELL / 8],
}

impl HashedCell {
    fn is_nonzero(&self, block: usize) -> bool {
        self.nonzero[block / 8] & (1 << (block % 8)) != 0
    }
}

/// Hashes the cells that ascending extents touch, whose bytes follow each other in `plain`.
fn hash_cells(extents: impl Iterator<Item = Extent>, plain: &[u8]) -> Vec<HashedCell> {
    let mut cells = Vec::new();
    let mut current: Option<(u64, CellHasher)> = None;
    let mut rest = plain;
    let finish = |(number, hasher): (u64, CellHasher)| {
        let (hash, nonzero) = hasher.finish();
        HashedCell {
            number,
            hash,
            nonzero,
        }
    };
    for (number, first_block, len) in extents.flat_map(split_at_cells) {
        let (bytes, behind) = rest.split_at(len.as_usize());
        rest = behind;
        if current.as_ref().is_some_and(|(other, _)| *other != number) {
            cells.extend(current.take().map(finish));
        }
        let (_, hasher) = current.get_or_insert_with(|| (number, CellHasher::new()));
        hasher.push(first_block, bytes);
    }
    cells.extend(current.map(finish));
    cells
}

/// An extent in pieces that lie in one cell each: the cell's number, the first block in it, and the
/// length.
pub fn split_at_cells(extent: Extent) -> impl Iterator<Item = (u64, usize, ByteLen)> {
    let mut at = extent.start;
    std::iter::from_fn(move || {
        let end = extent.end().min((at + ByteLen(1)).align_up(CELL));
        let len = end.since(at);
        if len == ByteLen::ZERO {
            return None;
        }
        let piece = (at.0 / CELL, (at.0 % CELL / BLOCK) as usize, len);
        at = end;
        Some(piece)
    })
}
