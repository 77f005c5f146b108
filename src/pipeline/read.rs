//! The reading end of every pipeline: runs are cut into chunks, chunks are read into buffers.

use crossbeam_channel::Sender;

use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::image::format::BLOCK;
use crate::image::tables::Run;
use crate::pipeline::Bounds;
use crate::pipeline::batch::{Batcher, Chunk};
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// What a user can do about blocks that cannot be read.
pub const READ_ERROR_HINT: &str =
    "the disk may be failing: --on-read-error zero copies what can be read";

/// What to do with blocks that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReadError {
    /// Fail.
    Fail,
    /// Retry block by block, take zeros for what stays unreadable, and list it.
    Zero,
}

/// Hands ascending runs to the function it is given.
pub type Walk<'a> = dyn FnOnce(&mut dyn FnMut(Run) -> Result<()>) -> Result<()> + Send + 'a;

/// What went through a pipeline.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes of all runs, zeros included.
    pub bytes: ByteLen,
    /// What could not be read and became zeros.
    pub unreadable: Vec<Extent>,
}

/// What is read, and how.
#[derive(Clone, Copy)]
#[allow(
    missing_debug_implementations,
    reason = "a source need not be printable"
)]
pub struct Reading<'a> {
    /// Where blocks are read.
    pub source: &'a dyn ReadAt,
    /// Number of the volume, from 1.
    pub volume: u32,
    /// What unreadable blocks become.
    pub on_read_error: OnReadError,
    /// What it may take of the machine.
    pub bounds: Bounds,
}

/// A chunk and its place in the order.
pub(super) type Numbered<T> = (u64, T);

/// Cuts what `walk` gives into chunks of at most `room` bytes of data and sends them on. Returns how
/// many there were.
pub(super) fn send_chunks(
    walk: Box<Walk<'_>>,
    room: usize,
    size: ByteLen,
    to_workers: &Sender<Numbered<Chunk>>,
) -> Result<u64> {
    let mut number = 0;
    let mut batcher = Batcher::new(room, size, |chunk| {
        let numbered = (number, chunk);
        number += 1;
        // Nobody listens any more: whoever failed says why.
        let gone = |_| Error::new(Kind::Failed, "the pipeline has ended");
        to_workers.send(numbered).map_err(gone)
    });
    walk(&mut |run| batcher.push(run))?;
    batcher.finish()?;
    Ok(number)
}

/// Reads the data runs of a chunk one behind the other into `bytes`, which is just as long. Returns
/// what could not be read.
pub(super) fn read_chunk(
    reading: &Reading<'_>,
    chunk: &Chunk,
    bytes: &mut [u8],
) -> Result<Vec<Extent>> {
    let source = reading.source;
    let mut unreadable = Vec::new();
    let mut rest = bytes;
    for extent in chunk.data() {
        let (bytes, behind) = rest.split_at_mut(extent.len.as_usize());
        rest = behind;
        match source.read_exact_at(bytes, extent.start) {
            Ok(()) => {}
            // Only blocks can be done without: not a snapshot that is lost as a whole.
            Err(error) if error.kind() != Kind::Io => return Err(error),
            Err(error) if reading.on_read_error == OnReadError::Fail => {
                return Err(error.hint(READ_ERROR_HINT));
            }
            Err(_) => read_block_by_block(source, extent.start, bytes, &mut unreadable)?,
        }
    }
    Ok(unreadable)
}

fn read_block_by_block(
    source: &dyn ReadAt,
    start: Offset,
    bytes: &mut [u8],
    unreadable: &mut Vec<Extent>,
) -> Result<()> {
    let mut at = start;
    for block in bytes.chunks_mut(BLOCK as usize) {
        let len = block.len() as u64;
        if let Err(error) = source.read_exact_at(block, at) {
            if error.kind() != Kind::Io {
                return Err(error);
            }
            block.fill(0);
            match unreadable.last_mut() {
                Some(last) if last.end() == at => last.len += ByteLen(len),
                _ => unreadable.push(Extent::new(at.0, len)),
            }
        }
        at = at + ByteLen(len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tables::Content;

    /// 8 blocks of ones, of which the third cannot be read.
    struct Failing(Kind);

    impl ReadAt for Failing {
        fn len(&self) -> ByteLen {
            ByteLen(8 * BLOCK)
        }

        fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
            let touched = offset.0..offset.0 + buf.len() as u64;
            if touched.contains(&(2 * BLOCK)) {
                return Err(Error::new(self.0, "no"));
            }
            buf.fill(1);
            Ok(())
        }
    }

    fn read(kind: Kind, on_read_error: OnReadError) -> (Result<Vec<Extent>>, Vec<u8>) {
        let chunk = Chunk {
            runs: vec![Run {
                extent: Extent::new(0, 8 * BLOCK),
                content: Content::Data,
            }],
        };
        let reading = Reading {
            source: &Failing(kind),
            volume: 1,
            on_read_error,
            bounds: Bounds::default(),
        };
        let mut bytes = vec![9; 8 * BLOCK as usize];
        (read_chunk(&reading, &chunk, &mut bytes), bytes)
    }

    #[test]
    fn only_blocks_can_be_done_without() {
        let (unreadable, bytes) = read(Kind::Io, OnReadError::Zero);
        assert_eq!(unreadable.unwrap(), [Extent::new(2 * BLOCK, BLOCK)]);
        let zeros = bytes.iter().filter(|&&byte| byte == 0).count() as u64;
        assert_eq!(zeros, BLOCK);
        for (kind, on_read_error) in [
            (Kind::Io, OnReadError::Fail),
            (Kind::NoSpace, OnReadError::Fail),
            (Kind::NoSpace, OnReadError::Zero),
        ] {
            assert_eq!(read(kind, on_read_error).0.unwrap_err().kind(), kind);
        }
    }
}
