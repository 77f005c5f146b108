//! What a run does: who writes, how much, from which seed. It stands at the head of the journal,
//! so that the checker needs nothing else.

/// Marks the beginning of a journal.
const MAGIC: u64 = 0x314a_5257_4556_494c;

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
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Buffered,
        Self::Direct,
        Self::Mmap,
        Self::Append,
        Self::Churn,
        Self::Sqlite,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Buffered => "buffered",
            Self::Direct => "direct",
            Self::Mmap => "mmap",
            Self::Append => "append",
            Self::Churn => "churn",
            Self::Sqlite => "sqlite",
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
    /// The file or folder it writes to, in the run's folder.
    pub(crate) name: String,
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
    pub(crate) counts: [u8; 6],
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
        bytes[33..39].copy_from_slice(&self.counts);
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
            counts: bytes[33..39].try_into().ok()?,
        })
    }
}
