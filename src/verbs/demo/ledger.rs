//! A program as databases are: it writes in an order, and what it reads back must show that order.
//!
//! Write number `n` goes to one block of a file, and says `n` in it. Blocks are visited in a fixed
//! order that jumps through the whole file. So any true instant shows writes 1 to `n` and none
//! behind: a block that lacks its write although a later one is there proves a torn copy.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, IoContext, Kind, Result};

/// Bytes in one block.
const BLOCK: usize = 4096;

/// Blocks in the file.
const BLOCKS: u64 = 32 << 10;

/// Blocks between two writes: odd, so that every block has its turn.
const STRIDE: u64 = 12_289;

/// Writes between two flushes.
const FLUSH_EVERY: u64 = 32;

/// Rest after a flush: a busy program, not one that does nothing but write.
const REST: Duration = Duration::from_micros(500);

/// Whether a copy shows one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// It shows exactly the writes up to one number.
    OneInstant {
        /// That number.
        writes: u64,
    },
    /// Later writes are there, earlier ones are not.
    Torn {
        /// The last write that is there.
        last: u64,
        /// How many before it are missing.
        missing: u64,
    },
    /// The copy cannot be read at all.
    Unreadable {
        /// Why.
        why: String,
    },
}

/// The writing program.
#[derive(Debug)]
pub(super) struct Ledger {
    written: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Ledger {
    /// Makes the file and begins to write.
    pub(super) fn start(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.context("cannot create", path)?;
        let zeros = vec![0; 256 * BLOCK];
        for at in 0..BLOCKS / 256 {
            file.write_all_at(&zeros, at * zeros.len() as u64)
                .context("cannot write", path)?;
        }
        file.sync_all().context("cannot flush", path)?;
        let written = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, end) = (Arc::clone(&written), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .spawn(move || write(&file, &count, &end))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self {
            written,
            stop,
            thread: Some(thread),
        })
    }

    /// How many writes were done.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Ends the writing.
    pub(super) fn stop(mut self) -> Result<()> {
        self.end()
            .unwrap_or(Ok(()))
            .map_err(|error| Error::io("the writing program failed", error))
    }

    fn end(&mut self) -> Option<std::io::Result<()>> {
        self.stop.store(true, Ordering::Relaxed);
        let died = |_| Err(std::io::Error::other("it died"));
        self.thread
            .take()
            .map(|thread| thread.join().unwrap_or_else(died))
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.end();
    }
}

fn place(write: u64) -> u64 {
    write.wrapping_mul(STRIDE) % BLOCKS
}

fn write(file: &File, written: &AtomicU64, stop: &AtomicBool) -> std::io::Result<()> {
    let mut number = 0u64;
    let mut block = vec![0; BLOCK];
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
        file.write_all_at(&block, place(number) * BLOCK as u64)?;
        if number.is_multiple_of(FLUSH_EVERY) {
            file.sync_data()?;
            std::thread::sleep(REST);
        }
        written.store(number, Ordering::Relaxed);
    }
    Ok(())
}

/// Judges a copy of the file.
pub(super) fn judge(path: &Path) -> Result<Verdict> {
    let bytes = std::fs::read(path).context("cannot read", path)?;
    if bytes.len() as u64 != BLOCKS * BLOCK as u64 {
        return Err(Error::new(Kind::Failed, "the file has another size").on(path));
    }
    let number = |block: &[u8]| {
        let (words, _) = block.as_chunks::<8>();
        let first = words.first().copied().unwrap_or_default();
        words
            .iter()
            .all(|word| *word == first)
            .then(|| u64::from_le_bytes(first))
    };
    let found: Vec<Option<u64>> = bytes.chunks(BLOCK).map(number).collect();
    let last = found.iter().flatten().max().copied().unwrap_or(0);
    // The newest writes up to the last one cover each block at most once.
    let newest = last.saturating_sub(BLOCKS) + 1..=last;
    let missing = newest.filter(|write| found.get(place(*write) as usize) != Some(&Some(*write)));
    Ok(match missing.count() as u64 {
        0 => Verdict::OneInstant { writes: last },
        missing => Verdict::Torn { last, missing },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_with(writes: impl Iterator<Item = u64>) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(BLOCKS * BLOCK as u64).unwrap();
        for write in writes {
            let block = write.to_le_bytes().repeat(BLOCK / 8);
            file.as_file()
                .write_all_at(&block, place(write) * BLOCK as u64)
                .unwrap();
        }
        file
    }

    #[test]
    fn a_prefix_is_an_instant_and_a_gap_is_not() {
        let whole = file_with(1..=100);
        assert_eq!(
            judge(whole.path()).unwrap(),
            Verdict::OneInstant { writes: 100 }
        );
        let torn = file_with((1..=100).filter(|write| *write != 40));
        assert_eq!(
            judge(torn.path()).unwrap(),
            Verdict::Torn {
                last: 100,
                missing: 1
            }
        );
        let empty = file_with(std::iter::empty());
        assert_eq!(
            judge(empty.path()).unwrap(),
            Verdict::OneInstant { writes: 0 }
        );
    }
}
