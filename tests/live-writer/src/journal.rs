//! The journal: what each thread did and when, on another filesystem than the one written to.
//!
//! It is a file of fixed-size records, each appended by one `write` call before a write begins and
//! after it returned, so it is complete also when the writer is killed. Times are nanoseconds of
//! `CLOCK_MONOTONIC`: a begin is taken before the call, a return after it, so that
//! `begin <= the write itself <= returned`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use rustix::time::{ClockId, clock_gettime};

use crate::config::Config;

/// Bytes of one record: kind, thread, six bytes of zero, sequence number, time.
const RECORD: usize = 24;

const BEGUN: u8 = 1;
const RETURNED: u8 = 2;
const ACKED: u8 = 3;

/// Nanoseconds of a clock.
fn now(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn monotonic() -> u64 {
    now(ClockId::Monotonic)
}

/// What has to be added to `CLOCK_MONOTONIC` to get `CLOCK_REALTIME`, in nanoseconds.
pub(crate) fn realtime_offset() -> u64 {
    now(ClockId::Realtime).saturating_sub(monotonic())
}

/// The journal being written, shared by the threads.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    file: Arc<File>,
    thread: u8,
}

impl Recorder {
    /// Starts a new journal: the configuration, then the records.
    pub(crate) fn create(path: &Path, config: &Config) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(path)
            .map_err(|error| crate::about("cannot create the journal", path, &error))?;
        file.write_all(&config.encode())?;
        Ok(Self {
            file: Arc::new(file),
            thread: 0,
        })
    }

    /// The same journal for the thread with this index.
    pub(crate) fn for_thread(&self, thread: usize) -> Self {
        Self {
            file: Arc::clone(&self.file),
            thread: thread as u8,
        }
    }

    /// The thread's write `seq` is about to begin.
    pub(crate) fn begun(&self, seq: u64) -> io::Result<()> {
        self.append(BEGUN, seq)
    }

    /// The thread's writes up to `seq` have returned.
    pub(crate) fn returned(&self, seq: u64) -> io::Result<()> {
        self.append(RETURNED, seq)
    }

    /// The thread's writes up to `seq` have been made durable.
    pub(crate) fn acked(&self, seq: u64) -> io::Result<()> {
        self.append(ACKED, seq)
    }

    fn append(&self, kind: u8, seq: u64) -> io::Result<()> {
        let mut record = [0; RECORD];
        record[0] = kind;
        record[1] = self.thread;
        record[8..16].copy_from_slice(&seq.to_le_bytes());
        record[16..24].copy_from_slice(&monotonic().to_le_bytes());
        (&*self.file).write_all(&record)
    }
}

/// What one thread did. Its writes are numbered from 1.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeline {
    begun: Vec<u64>,
    returned: Vec<u64>,
    acked: Vec<(u64, u64)>,
}

impl Timeline {
    /// How many writes were begun.
    pub(crate) fn begun_count(&self) -> u64 {
        self.begun.len() as u64
    }

    /// When write `seq` was begun.
    pub(crate) fn begun_at(&self, seq: u64) -> Option<u64> {
        self.begun.get(seq.checked_sub(1)? as usize).copied()
    }

    /// When write `seq` had returned; `None` if it was not seen to return.
    pub(crate) fn returned_at(&self, seq: u64) -> Option<u64> {
        self.returned.get(seq.checked_sub(1)? as usize).copied()
    }

    /// The last write that had returned before `time`; 0 if none had.
    pub(crate) fn returned_before(&self, time: u64) -> u64 {
        self.returned.partition_point(|at| *at < time) as u64
    }

    /// The last write that was durable before `time`; 0 if none was.
    pub(crate) fn acked_before(&self, time: u64) -> u64 {
        let before = self.acked.partition_point(|(_, at)| *at < time);
        self.acked[..before].last().map_or(0, |(seq, _)| *seq)
    }

    /// The last write that was begun at `time` or before; 0 if none was.
    pub(crate) fn begun_until(&self, time: u64) -> u64 {
        self.begun.partition_point(|at| *at <= time) as u64
    }
}

/// A journal as it was written.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    /// What was to be done.
    pub(crate) config: Config,
    /// What each thread did.
    pub(crate) threads: Vec<Timeline>,
}

impl Journal {
    /// Reads a journal, which may still be growing: a half-written last record is left out.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(path)
            .map_err(|error| crate::about("cannot read the journal", path, &error))?;
        let wrong = |what: &str| io::Error::other(format!("{}: {what}", path.display()));
        let config = Config::decode(&bytes).ok_or_else(|| wrong("not a journal"))?;
        let mut threads = vec![Timeline::default(); config.threads().len()];
        for record in bytes[Config::SIZE..].chunks_exact(RECORD) {
            let number = |at: usize| {
                let mut word = [0; 8];
                word.copy_from_slice(&record[at..at + 8]);
                u64::from_le_bytes(word)
            };
            let (seq, time) = (number(8), number(16));
            let thread = threads
                .get_mut(usize::from(record[1]))
                .ok_or_else(|| wrong("a record of an unknown thread"))?;
            match record[0] {
                BEGUN if seq == thread.begun_count() + 1 => thread.begun.push(time),
                RETURNED if seq <= thread.begun_count() => {
                    thread.returned.resize(seq as usize, time);
                }
                ACKED if seq <= thread.returned.len() as u64 => thread.acked.push((seq, time)),
                _ => return Err(wrong("a record that cannot follow the ones before it")),
            }
        }
        Ok(Self { config, threads })
    }
}
