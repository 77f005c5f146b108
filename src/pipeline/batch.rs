//! Cuts ascending runs into chunks: the runs of one record.

use crate::error::Result;
use crate::extent::Extent;
use crate::image::format::{BLOCK, CELL};
use crate::image::tables::{Content, Run};
use crate::units::{ByteLen, Offset};

/// Most runs in one chunk, so that its tables stay small beside its data.
const MAX_RUNS: usize = 4096;

/// The runs of one record: ascending, and never in a cell that another chunk of the pass has data in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Whole blocks, but for the end of the volume.
    pub runs: Vec<Run>,
}

impl Chunk {
    /// How many bytes have to be read for it.
    pub fn data_len(&self) -> ByteLen {
        self.data().map(|extent| extent.len).sum()
    }

    /// How many bytes it is about, zeros included.
    pub fn len(&self) -> ByteLen {
        let used = self.runs.iter().filter(|run| run.content != Content::Trim);
        used.map(|run| run.extent.len).sum()
    }

    /// Whether it is about nothing.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// What has to be read.
    pub fn data(&self) -> impl Iterator<Item = Extent> + '_ {
        let data = self.runs.iter().filter(|run| run.content == Content::Data);
        data.map(|run| run.extent)
    }

    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.extent.end() == run.extent.start && last.content == run.content => {
                last.extent.len += run.extent.len;
            }
            _ => self.runs.push(run),
        }
    }
}

/// Collects runs into chunks of at most `room` bytes of data, cut only between cells.
#[derive(Debug)]
pub struct Batcher<F> {
    room: ByteLen,
    size: ByteLen,
    chunk: Chunk,
    held: ByteLen,
    /// The runs of the cell that is still growing.
    cell: Chunk,
    end: Offset,
    each: F,
}

impl<F: FnMut(Chunk) -> Result<()>> Batcher<F> {
    /// For a volume of `size` bytes; `each` gets the chunks.
    ///
    /// # Panics
    /// If `room` is less than one cell.
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

    /// Adds a run. Runs come in ascending order. Data is rounded out to whole blocks (more is copied,
    /// never less), and wins where that makes it overlap a neighbour.
    ///
    /// # Errors
    /// What `each` returns.
    pub fn push(&mut self, run: Run) -> Result<()> {
        let wide = match run.content {
            Content::Data => run.extent.align_out(BLOCK, self.size),
            Content::Zero | Content::Trim => inner_blocks(run.extent, self.size),
        };
        let mut at = wide.start.max(self.end);
        while at < wide.end() {
            let cell_end = (at + ByteLen(1)).align_up(CELL);
            let growing = self
                .cell
                .runs
                .first()
                .map(|first| first.extent.start.0 / CELL);
            if growing.is_some_and(|number| number != at.0 / CELL) {
                self.end_cell()?;
            }
            // Whole cells without data need not be looked at one by one.
            let skips_cells = run.content != Content::Data && self.cell.is_empty();
            let end = if skips_cells && at.0.is_multiple_of(CELL) {
                wide.end().align_down(CELL).max(cell_end).min(wide.end())
            } else {
                wide.end().min(cell_end)
            };
            self.cell.push(Run {
                extent: Extent::between(at, end),
                content: run.content,
            });
            at = end;
        }
        self.end = self.end.max(wide.end());
        Ok(())
    }

    fn end_cell(&mut self) -> Result<()> {
        let len = self.cell.data_len();
        let start = |chunk: &Chunk| chunk.runs.first().map(|run| run.extent.start);
        // A gap is counted in blocks in 32 bits.
        let is_far = start(&self.chunk)
            .zip(start(&self.cell))
            .is_some_and(|(first, next)| next.since(first).0 / BLOCK > u64::from(u32::MAX));
        let is_full =
            self.held + len > self.room || self.chunk.runs.len() + self.cell.runs.len() > MAX_RUNS;
        if is_full || is_far {
            self.end_chunk()?;
        }
        for run in std::mem::take(&mut self.cell.runs) {
            self.chunk.push(run);
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

/// The whole blocks inside `extent`; the volume's last block is whole where the volume ends.
fn inner_blocks(extent: Extent, size: ByteLen) -> Extent {
    let end = if extent.end().0 == size.0 {
        extent.end()
    } else {
        extent.end().align_down(BLOCK)
    };
    Extent::between(extent.start.align_up(BLOCK), end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ExtentSet;
    use proptest::prelude::*;

    const SIZE: ByteLen = ByteLen(42_000_001);

    fn chunks_of(runs: &[Run], room: usize) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        let mut batcher = Batcher::new(room, SIZE, |chunk| {
            chunks.push(chunk);
            Ok(())
        });
        for run in runs {
            batcher.push(*run).unwrap();
        }
        batcher.finish().unwrap();
        chunks
    }

    fn only(chunks: &[Chunk], content: Content) -> ExtentSet {
        let runs = chunks.iter().flat_map(|chunk| &chunk.runs);
        runs.filter(|run| run.content == content)
            .map(|run| run.extent)
            .collect()
    }

    proptest! {
        /// Chunks cover the blocks of the data and everything between it that is zero; they ascend,
        /// fit their room, and no two have data in one cell.
        #[test]
        fn chunks_cover_their_runs(
            data in prop::collection::vec((0u64..40_000_000, 1u64..3_000_000), 0..30),
            room in 1usize..4,
            with_zeros in any::<bool>(),
        ) {
            let room = room * CELL as usize;
            let whole = Extent::new(0, SIZE.0);
            let set: ExtentSet = data.iter().map(|&(start, len)| Extent::new(start, len)).collect();
            let wide: ExtentSet = set.runs().iter().map(|run| run.align_out(BLOCK, SIZE)).collect();
            let mut runs: Vec<Run> = Vec::new();
            runs.extend(set.runs().iter().map(|run| Run { extent: *run, content: Content::Data }));
            if with_zeros {
                runs.extend(set.gaps(whole).map(|gap| Run { extent: gap, content: Content::Zero }));
                runs.sort_by_key(|run| run.extent);
            }
            let chunks = chunks_of(&runs, room);
            prop_assert_eq!(&only(&chunks, Content::Data), &wide);
            if with_zeros {
                let zero: ExtentSet = wide.gaps(whole).collect();
                prop_assert_eq!(only(&chunks, Content::Zero), zero);
            }
            let mut end = Offset::ZERO;
            let mut last_cell = None;
            for chunk in &chunks {
                prop_assert!(!chunk.is_empty() && chunk.data_len().0 <= room as u64);
                for run in &chunk.runs {
                    prop_assert!(run.extent.start >= end && !run.extent.is_empty());
                    end = run.extent.end();
                }
                if let Some(first) = chunk.data().next() {
                    prop_assert!(last_cell.is_none_or(|last| last < first.start.0 / CELL));
                }
                last_cell = chunk.data().last().map(|run| (run.end().0 - 1) / CELL).or(last_cell);
            }
        }
    }

    #[test]
    fn a_huge_hole_is_one_run() {
        let hole = Run {
            extent: Extent::new(5 * CELL, 30 * CELL),
            content: Content::Zero,
        };
        assert_eq!(
            chunks_of(&[hole], CELL as usize),
            [Chunk { runs: vec![hole] }]
        );
    }
}
