//! What a run does: who writes, how much, from which seed. It stands at the head of the journal,
//! so that the checker needs nothing else.

use std::path::{Path, PathBuf};

/// Marks the beginning of a journal.
const MAGIC: u64 = 0x324a_5257_4556_494c;

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Random 4 KiB writes through the page cache, and fsync.
    Buffered,
    /// Random 4 KiB writes past the page cache (`O_DIRECT`), and fsync.
    Direct,
    /// Random 4 KiB stores into a shared mapping, and msync.
    Mmap,
    /// Records appended to a file, which starts again at its limit.
    Append,
    /// Files created, written, truncated, renamed, linked, removed, and so on.
    Churn,
    /// `SQLite` transactions in WAL mode with synchronous=FULL.
    Sqlite,
    /// Two files: a write through the page cache to one, then one past it to the other.
    Pair,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Buffered,
        Self::Direct,
        Self::Mmap,
        Self::Append,
        Self::Churn,
        Self::Sqlite,
        Self::Pair,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Buffered => "buffered",
            Self::Direct => "direct",
            Self::Mmap => "mmap",
            Self::Append => "append",
            Self::Churn => "churn",
            Self::Sqlite => "sqlite",
            Self::Pair => "pair",
        }
    }
}

/// One writing thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Thread {
    /// Its index among all threads.
    pub(crate) index: usize,
    /// What it does.
    pub(crate) kind: Kind,
    /// Its number among those of its kind.
    pub(crate) number: u8,
    /// The file or folder it writes to, in one of the run's folders.
    pub(crate) name: String,
}

impl Thread {
    /// Where it writes: the folders are taken in turn.
    pub(crate) fn place(&self, dirs: &[PathBuf]) -> PathBuf {
        self.folder(dirs, 0).join(&self.name)
    }

    /// The other file of a pair: of every other thread in the next folder.
    pub(crate) fn second_place(&self, dirs: &[PathBuf]) -> PathBuf {
        let next = usize::from(self.number.is_multiple_of(2));
        self.folder(dirs, next)
            .join(format!("{}.second", self.name))
    }

    fn folder<'a>(&self, dirs: &'a [PathBuf], next: usize) -> &'a Path {
        &dirs[(self.index + next) % dirs.len()]
    }
}

/// What a run does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// All random choices follow from it.
    pub(crate) seed: u64,
    /// Whether the threads pause between writes, for slow machines.
    pub(crate) light: bool,
    /// Bytes the run may take up, roughly.
    pub(crate) budget: u64,
    /// How many threads of each kind, in the order of [`Kind::ALL`].
    pub(crate) counts: [u8; 7],
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC` at the beginning, in nanoseconds.
    pub(crate) realtime_offset: u64,
}

impl Config {
    /// Bytes of the encoded form.
    pub(crate) const SIZE: usize = 48;

    /// All threads, by index.
    pub(crate) fn threads(&self) -> Vec<Thread> {
        let kinds = Kind::ALL.iter().zip(self.counts);
        kinds
            .flat_map(|(kind, count)| (0..count).map(move |number| (*kind, number)))
            .enumerate()
            .map(|(index, (kind, number))| Thread {
                index,
                number,
                kind,
                name: format!("{}-{number}", kind.name()),
            })
            .collect()
    }

    /// Blocks in the file of a random writer.
    pub(crate) fn blocks(&self) -> u64 {
        (self.budget / 8 / crate::content::BLOCK as u64).max(16)
    }

    /// Bytes at which an appender's file starts again.
    pub(crate) fn append_limit(&self) -> u64 {
        (self.budget / 16).max(256 << 10)
    }

    /// The head of a journal.
    pub(crate) fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seed.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.budget.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.realtime_offset.to_le_bytes());
        bytes[32] = u8::from(self.light);
        bytes[33..40].copy_from_slice(&self.counts);
        bytes
    }

    /// Reads the head of a journal.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        (number(0)? == MAGIC && bytes.len() >= Self::SIZE).then_some(())?;
        Some(Self {
            seed: number(8)?,
            budget: number(16)?,
            realtime_offset: number(24)?,
            light: bytes[32] != 0,
            counts: bytes[33..40].try_into().ok()?,
        })
    }
}
