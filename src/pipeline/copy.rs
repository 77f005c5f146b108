//! From a source straight to a target: each byte is read into a buffer and written from that very
//! buffer. Chunks of one pass never overlap, so they are written in whatever order they are ready.

use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, bounded};
use holdstill_platform::buffer::Buffer;

use crate::error::{Error, Kind, Result};
use crate::image::content::is_zero;
use crate::image::tables::Content;
use crate::pipeline::batch::Chunk;
use crate::pipeline::read::{Moved, Numbered, Reading, Walk, read_chunk, send_chunks};
use crate::pipeline::receive::Receive;
use crate::progress::Progress;
use crate::thread;
use crate::units::ByteLen;

/// Bytes copied at once by each worker.
const CHUNK: usize = 1 << 20;

/// Copies all runs that `walk` gives to `receiver`.
///
/// # Errors
/// The first failure of the walk, the source or the receiver, or the request to stop.
pub fn copy(
    reading: &Reading<'_>,
    walk: Box<Walk<'_>>,
    receiver: &dyn Receive,
    progress: &dyn Progress,
) -> Result<Moved> {
    // One buffer to read into, and one in case the receiver compares.
    let workers = reading.bounds.workers(2 * CHUNK, 0);
    let (to_workers, chunks) = bounded(workers);
    let outcome = Mutex::new(Ok(Moved::default()));
    let planned = std::thread::scope(|scope| {
        for _ in 0..workers {
            let (chunks, outcome) = (chunks.clone(), &outcome);
            let work = move || {
                if let Err(error) = work(reading, &chunks, receiver, progress, outcome) {
                    let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                    if outcome.is_ok() {
                        *outcome = Err(error);
                    }
                }
            };
            // If one is not to be had, the channel's ends go, and with them all others.
            thread::spawn(scope, work)?;
        }
        // Only the workers' own ends must stay: when the last of them fails, the planner notices.
        drop(chunks);
        let planned = send_chunks(walk, CHUNK, reading.source.len(), &to_workers);
        // And the planner's own end must go, or the workers wait for more for ever.
        drop(to_workers);
        planned
    });
    let mut moved = outcome
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)?;
    planned?;
    moved.unreadable.sort();
    Ok(moved)
}

fn work(
    reading: &Reading<'_>,
    chunks: &Receiver<Numbered<Chunk>>,
    receiver: &dyn Receive,
    progress: &dyn Progress,
    outcome: &Mutex<Result<Moved>>,
) -> Result<()> {
    let mut buffer = Buffer::try_new(CHUNK)?;
    for (_, chunk) in chunks {
        progress.check()?;
        let len = chunk.data_len().as_usize();
        let unreadable = read_chunk(reading, &chunk, &mut buffer[..len])?;
        hand_out(reading.volume, &chunk, &buffer[..len], receiver)?;
        progress.advance(chunk.len());
        let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *outcome {
            Ok(moved) => {
                moved.bytes += chunk.len();
                moved.unreadable.extend(unreadable);
            }
            Err(_) => return Err(Error::new(Kind::Failed, "the pipeline has ended")),
        }
    }
    Ok(())
}

fn hand_out(volume: u32, chunk: &Chunk, bytes: &[u8], receiver: &dyn Receive) -> Result<()> {
    let mut rest = bytes;
    for run in &chunk.runs {
        match run.content {
            Content::Data => {
                let (data, behind) = rest.split_at(run.extent.len.as_usize());
                rest = behind;
                // A run of nothing but zeros keeps a sparse target sparse.
                if run.extent.len >= ByteLen::kib(64) && is_zero(data) {
                    receiver.zeros(volume, run.extent)?;
                } else {
                    receiver.data(volume, run.extent.start, data)?;
                }
            }
            Content::Zero => receiver.zeros(volume, run.extent)?,
            Content::Trim => receiver.trim(volume, run.extent)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;
    use crate::image::tables::Run;
    use crate::pipeline::Bounds;
    use crate::pipeline::read::OnReadError;
    use crate::progress::Silent;
    use crate::units::Offset;

    /// A target in memory.
    struct Target(Mutex<Vec<u8>>);

    impl Receive for Target {
        fn data(&self, _: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
            let at = offset.0 as usize;
            self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn zeros(&self, _: u32, extent: Extent) -> Result<()> {
            let at = extent.start.0 as usize;
            self.0.lock().unwrap()[at..at + extent.len.as_usize()].fill(0);
            Ok(())
        }

        fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
            self.zeros(volume, extent)
        }
    }

    #[test]
    fn all_runs_arrive_and_nothing_else() {
        let source: Vec<u8> = (0..5 << 20).map(|byte: u32| (byte % 251) as u8).collect();
        let target = Target(Mutex::new(vec![0xa5; source.len()]));
        let reading = Reading {
            source: &source,
            volume: 1,
            on_read_error: OnReadError::Fail,
            bounds: Bounds::default(),
        };
        let (begin, end) = (4096, 4 << 20);
        let run = Run {
            extent: Extent::between(Offset(begin), Offset(end)),
            content: Content::Data,
        };
        let moved = copy(&reading, Box::new(move |give| give(run)), &target, &Silent).unwrap();
        assert_eq!(moved.bytes, ByteLen(end - begin));
        let target = target.0.into_inner().unwrap();
        let (begin, end) = (begin as usize, end as usize);
        assert_eq!(target[begin..end], source[begin..end]);
        assert!(
            target[..begin]
                .iter()
                .chain(&target[end..])
                .all(|byte| *byte == 0xa5)
        );
    }
}
