//! Cuts ascending extents into chunks: the extents of one record.

use crate::error::Result;
use crate::extent::Extent;
use crate::image::format::{BLOCK, CELL};
use crate::units::{ByteLen, Offset};

/// The extents of one record: ascending, and never in a cell that another chunk of the pass touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Whole blocks, but for the end of the volume.
    pub extents: Vec<Extent>,
}

impl Chunk {
    /// How many bytes it holds.
    pub fn len(&self) -> ByteLen {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    fn push(&mut self, extent: Extent) {
        match self.extents.last_mut() {
            Some(last) if last.end() == extent.start => last.len += extent.len,
            _ => self.extents.push(extent),
        }
    }
}

/// Collects extents into chunks of at most `room` bytes, cut only between cells.
#[derive(Debug)]
pub struct Batcher<F> {
    room: ByteLen,
    size: ByteLen,
    chunk: Chunk,
    held: ByteLen,
    /// What is known of the cell that is still growing.
    cell: Chunk,
    end: Offset,
    each: F,
}

impl<F: FnMut(Chunk) -> Result<()>> Batcher<F> {
    /// For a volume of `size` bytes; `each` gets the chunks. `room` is at least one cell.
    pub fn new(room: usize, size: ByteLen, each: F) -> Self {
        assert!(room as u64 >= CELL, "a chunk has room for a cell");
        Self {
            room: ByteLen(room as u64),
            size,
            chunk: Chunk::default(),
            held: ByteLen::ZERO,
            cell: Chunk::default(),
            end: Offset::ZERO,
            each,
        }
    }

    /// Adds an extent, rounded out to whole blocks. Extents come in ascending order; what was
    /// covered by an earlier one already is left out.
    ///
    /// # Errors
    /// What `each` returns.
    pub fn push(&mut self, extent: Extent) -> Result<()> {
        let wide = extent.align_out(BLOCK, self.size);
        let mut at = wide.start.max(self.end);
        while at < wide.end() {
            let piece = Extent::between(at, wide.end().min((at + ByteLen(1)).align_up(CELL)));
            let in_cell = self.cell.extents.first().map(|first| first.start.0 / CELL);
            if in_cell.is_some_and(|number| number != at.0 / CELL) {
                self.end_cell()?;
            }
            self.cell.push(piece);
            at = piece.end();
        }
        self.end = self.end.max(wide.end());
        Ok(())
    }

    fn end_cell(&mut self) -> Result<()> {
        let len = self.cell.len();
        let is_far = self
            .chunk
            .extents
            .first()
            .zip(self.cell.extents.first())
            .is_some_and(|(first, next)| {
                next.start.since(first.start).0 / BLOCK > u64::from(u32::MAX)
            });
        if self.held + len > self.room || is_far {
            self.end_chunk()?;
        }
        for extent in std::mem::take(&mut self.cell.extents) {
            self.chunk.push(extent);
        }
        self.held += len;
        Ok(())
    }

    fn end_chunk(&mut self) -> Result<()> {
        self.held = ByteLen::ZERO;
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.is_empty() {
            Ok(())
        } else {
            (self.each)(chunk)
        }
    }

    /// Hands out what is left.
    ///
    /// # Errors
    /// What `each` returns.
    pub fn finish(mut self) -> Result<()> {
        self.end_cell()?;
        self.end_chunk()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ExtentSet;
    use proptest::prelude::*;

    fn chunks_of(extents: &[Extent], room: usize, size: ByteLen) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        let mut batcher = Batcher::new(room, size, |chunk| {
            chunks.push(chunk);
            Ok(())
        });
        for extent in extents {
            batcher.push(*extent).unwrap();
        }
        batcher.finish().unwrap();
        chunks
    }

    proptest! {
        /// Chunks cover exactly the blocks of the extents, ascend, share no cell and fit their room.
        #[test]
        fn chunks_cover_their_extents(
            runs in prop::collection::vec((0u64..40_000_000, 1u64..3_000_000), 0..30),
            room in 1usize..4,
        ) {
            let size = ByteLen(42_000_001);
            let room = room * CELL as usize;
            let set: ExtentSet = runs.iter().map(|&(start, len)| Extent::new(start, len)).collect();
            let expected: ExtentSet = set.runs().iter().map(|run| run.align_out(BLOCK, size)).collect();
            let chunks = chunks_of(set.runs(), room, size);
            let got: ExtentSet = chunks.iter().flat_map(|chunk| chunk.extents.clone()).collect();
            prop_assert_eq!(got, expected);
            let mut last_cell = None;
            for chunk in &chunks {
                prop_assert!(!chunk.is_empty() && chunk.len().0 <= room as u64);
                let first = chunk.extents[0].start.0 / CELL;
                prop_assert!(last_cell.is_none_or(|last| last < first));
                last_cell = chunk.extents.last().map(|extent| (extent.end().0 - 1) / CELL);
            }
        }
    }
}
