//! An opaque stream into an image: read in order, hash, compress, write in order; and out of an image
//! again, in order.

use std::io::Write;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::Sender;
use holdstill_platform::buffer::{Buffer, Pool};
use holdstill_platform::stream::Reader;

use crate::error::{Error, Kind, Result};
use crate::image::format::MAX_VOLUME_SIZE;
use crate::image::tables::Tables;
use crate::image::writer::{ImageWriter, Sink};
use crate::pipeline::Bounds;
use crate::pipeline::read::Numbered;
use crate::pipeline::store::{Compression, Compressor, Finished, Work};
use crate::progress::Progress;
use crate::units::{ByteLen, Offset};

/// How long a silent stream is waited for before looking whether we were asked to stop.
const PATIENCE: Duration = Duration::from_millis(200);

/// Stores all that `reader` gives as stream `number`. Returns how much that was.
///
/// # Errors
/// The first failure of reading or of the sink, or the request to stop; the image is lost.
pub fn store_stream<S: Sink>(
    reader: &mut Reader,
    number: u32,
    compression: Compression,
    bounds: Bounds,
    image: &mut ImageWriter<S>,
    progress: &dyn Progress,
) -> Result<ByteLen> {
    let room = compression.chunk_len();
    let spare = bounds.spare(2 * room);
    let workers = bounds.workers(2 * room, spare * 2 * room);
    let plain = Pool::new(workers + spare, room)?;
    let packed = Pool::new(workers + spare, room)?;
    let work = Work {
        workers,
        compression,
        buffers: || packed.take(),
        process: |(start, plain, len): Piece, packed, compressor: &mut Compressor| {
            let tables = Tables::describe_stream(start, &plain[..len]);
            Finished::of_stream(number, tables, plain, len).pack(packed, compressor)
        },
    };
    let mut read = ByteLen::ZERO;
    let total = &mut read;
    let stored = work.run(
        |to_workers| {
            let (count, len) = read_all(reader, &plain, to_workers, progress)?;
            *total = len;
            Ok(count)
        },
        image,
        progress,
    )?;
    if stored.bytes != read {
        return Err(Error::new(Kind::Failed, "a thread of the pipeline died"));
    }
    Ok(read)
}

/// A chunk of a stream: where it begins, its bytes, and how many.
type Piece = (Offset, Buffer, usize);

/// Reads chunks that are full, all but the last. Returns how many, and how many bytes.
fn read_all(
    reader: &mut Reader,
    pool: &Pool,
    to_workers: &Sender<Numbered<Piece>>,
    progress: &dyn Progress,
) -> Result<(u64, ByteLen)> {
    let (mut count, mut at) = (0, Offset::ZERO);
    loop {
        let mut buffer = pool.take();
        let mut len = 0;
        while len < buffer.len() {
            progress.check()?;
            let read = reader.read_within(&mut buffer[len..], PATIENCE);
            match read.map_err(|error| Error::io("cannot read the stream", error))? {
                Some(0) => break,
                Some(read) => len += read,
                None => {}
            }
        }
        if len == 0 {
            return Ok((count, ByteLen(at.0)));
        }
        let end = at + ByteLen(len as u64);
        if end.0 > MAX_VOLUME_SIZE {
            return Err(Error::new(
                Kind::Failed,
                "the stream is too long for an image",
            ));
        }
        // Nobody listens any more: whoever failed says why.
        let is_last = len < buffer.len();
        let gone = |_| Error::new(Kind::Failed, "the pipeline has ended");
        to_workers.send((count, (at, buffer, len))).map_err(gone)?;
        count += 1;
        at = end;
        if is_last {
            return Ok((count, ByteLen(at.0)));
        }
    }
}

/// What is held back until all of the image was checked, in bytes: a stream of ZFS ends with a record of
/// 312, without which nothing of it is taken.
const HELD_BACK: usize = 4096;

/// Puts the chunks of a stream, which come from several threads, in order again, and writes them. The
/// last bytes are held back: whoever reads the stream must not see its end before all was checked.
pub struct InOrder<W> {
    state: Mutex<Ordered<W>>,
    moved: Condvar,
}

struct Ordered<W> {
    to: W,
    next: Offset,
    held: Vec<u8>,
    /// A write failed: nothing is written any more.
    has_failed: bool,
    /// Why is known: whoever waits may give up.
    is_abandoned: bool,
}

impl<W> std::fmt::Debug for InOrder<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InOrder").finish_non_exhaustive()
    }
}

impl<W: Write> InOrder<W> {
    /// Writes to `to`.
    pub fn new(to: W) -> Self {
        Self {
            state: Mutex::new(Ordered {
                to,
                next: Offset::ZERO,
                held: Vec::new(),
                has_failed: false,
                is_abandoned: false,
            }),
            moved: Condvar::new(),
        }
    }

    /// Takes the bytes at `offset`. Waits until all before them was written: whoever has those never waits
    /// for us. After a failure all others wait for [`abandon`](Self::abandon): the first error that is
    /// heard of must be the one that says why.
    ///
    /// # Errors
    /// What writing says; for all others, that it failed.
    pub fn push(&self, offset: Offset, bytes: &[u8], progress: &dyn Progress) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while (state.next < offset || state.has_failed) && !state.is_abandoned {
            progress.check()?;
            let waited = self.moved.wait_timeout(state, PATIENCE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.is_abandoned || state.next > offset {
            return Err(Error::new(Kind::Failed, "the stream has ended before"));
        }
        let written = state.take(bytes);
        state.has_failed |= written.is_err();
        self.moved.notify_all();
        written
    }

    /// Has everybody who waits here give up: why they should is known, and what they wait for will not
    /// come.
    pub fn abandon(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_abandoned = true;
        self.moved.notify_all();
    }

    /// Writes what was held back, and closes.
    ///
    /// # Errors
    /// What writing says.
    pub fn finish(self) -> Result<W> {
        let mut state = self
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let held = std::mem::take(&mut state.held);
        write(&mut state.to, &held)?;
        Ok(state.to)
    }
}

impl<W: Write> Ordered<W> {
    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let keep = bytes.len().min(HELD_BACK);
        let (now, later) = bytes.split_at(bytes.len() - keep);
        // Of what was held, as much stays as the new bytes do not fill up.
        let stays = (HELD_BACK - keep).min(self.held.len());
        let goes = self.held.len() - stays;
        write(&mut self.to, &self.held[..goes])?;
        self.held.drain(..goes);
        if !now.is_empty() {
            write(&mut self.to, &self.held)?;
            self.held.clear();
            write(&mut self.to, now)?;
        }
        self.held.extend_from_slice(later);
        self.next = self.next + ByteLen(bytes.len() as u64);
        Ok(())
    }
}

fn write(to: &mut impl Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes)
        .map_err(|error| Error::io("cannot write the stream", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn the_end_comes_last() {
        let bytes: Vec<u8> = (0..100_000u32)
            .map(|at| at.to_le_bytes()[0] ^ 0x5a)
            .collect();
        for sizes in [
            vec![100_000],
            vec![5000; 20],
            vec![1, 2, 3, 4090, 10, 4096, 4097, 60_000],
        ] {
            let order = InOrder::new(Vec::new());
            let mut at = 0;
            for size in sizes {
                let end = (at + size).min(bytes.len());
                order
                    .push(Offset(at as u64), &bytes[at..end], &Silent)
                    .unwrap();
                at = end;
                let state = order.state.lock().unwrap();
                assert_eq!(state.held.len(), HELD_BACK.min(at));
                assert_eq!([&state.to[..], &state.held].concat(), bytes[..at]);
            }
            assert_eq!(order.finish().unwrap(), bytes[..at]);
        }
    }

    #[test]
    fn chunks_are_put_in_order() {
        let bytes: Vec<u8> = (0..200_000u32).map(|at| at.to_le_bytes()[1]).collect();
        let order = InOrder::new(Vec::new());
        std::thread::scope(|scope| {
            for (number, chunk) in bytes.chunks(10_000).enumerate().rev() {
                let order = &order;
                let offset = Offset(number as u64 * 10_000);
                scope.spawn(move || order.push(offset, chunk, &Silent).unwrap());
            }
        });
        assert_eq!(order.finish().unwrap(), bytes);
    }

    #[test]
    fn a_failure_ends_all() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let order = InOrder::new(Full);
        std::thread::scope(|scope| {
            let later = scope.spawn(|| order.push(Offset(10_000), &[0; 10], &Silent));
            let error = order.push(Offset(0), &[0; 10_000], &Silent).unwrap_err();
            assert_eq!(error.kind(), Kind::NoSpace);
            // Those who wait, and those who come later, say nothing before the cause is known.
            let last = scope.spawn(|| order.push(Offset(10_010), &[0; 10], &Silent));
            std::thread::sleep(PATIENCE / 10);
            assert!(!later.is_finished() && !last.is_finished());
            order.abandon();
            assert!(later.join().unwrap().is_err() && last.join().unwrap().is_err());
        });
        let twice = InOrder::new(Vec::new());
        twice.push(Offset(0), &[1; 5], &Silent).unwrap();
        assert!(twice.push(Offset(0), &[1; 5], &Silent).is_err());
    }
}
