//! From a source straight to a target: each byte is read into a buffer and written from that very
//! buffer. Chunks of one pass never overlap, so they are written in whatever order they are ready.

use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, bounded};
use holdstill_platform::buffer::Buffer;

use crate::error::{Error, Kind, Result};
use crate::image::content::is_zero;
use crate::image::tables::Content;
use crate::pipeline::batch::Chunk;
use crate::pipeline::load::Receive;
use crate::pipeline::read::{Moved, Numbered, OnReadError, Walk, read_chunk, send_chunks};
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::units::ByteLen;

/// Bytes copied at once by each worker.
const CHUNK: usize = 1 << 20;

/// What and how to copy.
#[derive(Clone, Copy)]
#[allow(
    missing_debug_implementations,
    reason = "a source need not be printable"
)]
pub struct Job<'a> {
    /// Where blocks are read.
    pub source: &'a dyn ReadAt,
    /// Number of the volume, for the receiver.
    pub volume: u32,
    /// What unreadable blocks become.
    pub on_read_error: OnReadError,
    /// Threads that read and write.
    pub workers: usize,
}

/// Copies all runs that `walk` gives to `receiver`.
///
/// # Errors
/// The first failure of the walk, the source or the receiver, or the request to stop.
pub fn copy(
    job: &Job<'_>,
    walk: Box<Walk<'_>>,
    receiver: &dyn Receive,
    progress: &dyn Progress,
) -> Result<Moved> {
    let (to_workers, chunks) = bounded(job.workers);
    let outcome = Mutex::new(Ok(Moved::default()));
    let planned = std::thread::scope(|scope| {
        for _ in 0..job.workers {
            let (chunks, outcome) = (chunks.clone(), &outcome);
            scope.spawn(move || {
                if let Err(error) = work(job, &chunks, receiver, progress, outcome) {
                    let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                    if outcome.is_ok() {
                        *outcome = Err(error);
                    }
                }
            });
        }
        // Only the workers' own ends must stay: when the last of them fails, the planner notices.
        drop(chunks);
        send_chunks(walk, CHUNK, job.source.len(), &to_workers)
    });
    let mut moved = outcome
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)?;
    planned?;
    moved.unreadable.sort();
    Ok(moved)
}

fn work(
    job: &Job<'_>,
    chunks: &Receiver<Numbered<Chunk>>,
    receiver: &dyn Receive,
    progress: &dyn Progress,
    outcome: &Mutex<Result<Moved>>,
) -> Result<()> {
    let mut buffer = Buffer::new(CHUNK);
    for (_, chunk) in chunks {
        progress.check()?;
        let len = chunk.data_len().as_usize();
        let unreadable = read_chunk(job.source, &chunk, job.on_read_error, &mut buffer[..len])?;
        hand_out(job.volume, &chunk, &buffer[..len], receiver)?;
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
            Content::Trim => receiver.trim(volume, run.extent),
        }
    }
    Ok(())
}
