//! The instant that several sources share: all are frozen together, each is captured, all thaw.
//!
//! From the return of the last freeze to the begin of the first thaw nothing is written to any of them. So
//! whatever a program wrote to one of them only after it knew that another had what it wrote there, a
//! copy of both has neither, the earlier alone, or both. Hooks stand around this freeze alone.

use std::sync::Arc;
use std::time::Duration;

use holdstill_platform::memory::{self, LockedProcess};

use super::final_read::{FinalRead, ReadPart, Wanted};
use super::freezer::{Expect, Freezer};
use super::ice::freeze_all;
use super::mounted;
use crate::error::Result;
use crate::extent::Extent;
use crate::freeze::session::Session;
use crate::image::manifest::FreezeTimes;
use crate::progress::{Event, Progress};
use crate::units::ByteLen;

/// When the freeze ends at the latest, by the guard's hand.
const DEADLINE: Duration = Duration::from_secs(10);

/// Memory for what is read in the freeze, of all sources: at most this, and a quarter of what is available.
const MOST_MEMORY: u64 = 256 << 20;

/// What a source has to do at the instant, in this order.
pub trait AtInstant {
    /// Its filesystem.
    fn freezer(&self) -> Arc<Freezer>;

    /// Makes ready what takes time or memory. `room` is its share of the memory
    /// for what is read in the freeze. Returns what that may be, if anything.
    ///
    /// # Errors
    /// If it cannot be captured.
    fn prepare(&mut self, room: ByteLen, progress: &dyn Progress) -> Result<Option<Wanted>>;

    /// Writes out what is dirty, so that the freeze that follows has little to write.
    ///
    /// # Errors
    /// If that takes too long.
    fn sync(&self, progress: &dyn Progress) -> Result<()>;

    /// Everything is frozen. Finds out what has to be read, and keeps what it sees. Allocates as little as
    /// it can, writes and tells nothing.
    fn capture(&mut self, moment: &Moment<'_>);

    /// Everything was read, and is frozen still.
    fn confirm(&mut self) {}

    /// What may happen to its devices while it is frozen.
    fn expects(&self) -> Expect;

    /// It thawed after this freeze, which held. Whether all was captured; else another round is needed.
    ///
    /// # Errors
    /// If the copy cannot be right, or there were too many such rounds.
    fn judge(&mut self, times: FreezeTimes) -> Result<bool>;

    /// The instant counts: all sources were captured. `read` is what was read of this one.
    ///
    /// # Errors
    /// If the copy cannot be right.
    fn keep(
        &mut self,
        instant: jiff::Timestamp,
        read: Option<ReadPart>,
        progress: &dyn Progress,
    ) -> Result<()>;

    /// It does not: another source was not captured, or this one.
    fn discard(&mut self, read: Option<ReadPart>);
}

/// All sources are frozen, this one too.
#[allow(missing_debug_implementations, reason = "it has a closure")]
pub struct Moment<'a>(&'a dyn Fn(Extent) -> bool);

impl Moment<'_> {
    /// Has this read of the source; whether there is room for it.
    pub(super) fn read(&self, extent: Extent) -> bool {
        self.0(extent)
    }
}

/// The instant. `None` if a source could not be captured whole: another round is needed.
///
/// # Errors
/// If a source cannot be frozen, the freeze did not hold, or a copy cannot be right.
pub(super) fn take(
    sources: &mut [&mut dyn AtInstant],
    run: &Session,
    progress: &dyn Progress,
) -> Result<Option<jiff::Timestamp>> {
    run.check_guard()?;
    let most = MOST_MEMORY.min(memory::available()? / 4);
    let room = ByteLen(most / sources.len().max(1) as u64);
    let mut wanted = Vec::new();
    // Of each source, its number among those that are read.
    let mut parts = Vec::new();
    for source in sources.iter_mut() {
        let of_it = source.prepare(room, progress)?;
        parts.push(of_it.is_some().then_some(wanted.len()));
        wanted.extend(of_it);
    }
    let freezers: Vec<_> = sources.iter().map(|source| source.freezer()).collect();
    let expects: Vec<_> = sources.iter().map(|source| source.expects()).collect();
    let mut read = FinalRead::prepare(wanted)?;
    let mut instant = jiff::Timestamp::now();
    let frozen = read.with_readers(|readers| {
        // What of us was swapped out would be fetched while others wait.
        let _locked = LockedProcess::new()?;
        for source in sources.iter() {
            source.sync(progress)?;
        }
        let mut ice = freeze_all(&freezers, DEADLINE, progress)?;
        instant = jiff::Timestamp::now();
        ice.settle();
        for (source, part) in sources.iter_mut().zip(&parts) {
            let read = |extent| part.is_some_and(|part| readers.push(part, extent));
            source.capture(&Moment(&read));
        }
        let was_read = readers.read();
        for source in sources.iter_mut() {
            source.confirm();
        }
        let read_ms = mounted::milliseconds(ice.held());
        progress.while_frozen();
        let thawed = ice.thaw_all(&expects, progress)?;
        was_read?;
        Ok((thawed, read_ms))
    });
    let (thawed, read_ms) = frozen?;
    let longest = thawed.iter().max_by_key(|thawed| thawed.total());
    if let Some(longest) = longest {
        progress.event(&Event::Thawed(&mounted::times(
            "final", longest, 0.0, read_ms,
        )));
    }
    let mut is_whole = true;
    for (source, thawed) in sources.iter_mut().zip(&thawed) {
        is_whole &= source.judge(mounted::times("final", thawed, 0.0, read_ms))?;
    }
    let read = Arc::new(read);
    let reads = parts
        .iter()
        .map(|part| part.map(|part| ReadPart::of(&read, part)));
    if !is_whole {
        for (source, read) in sources.iter_mut().zip(reads) {
            source.discard(read);
        }
        return Ok(None);
    }
    run.after_thaw(progress);
    for (source, read) in sources.iter_mut().zip(reads) {
        source.keep(instant, read, progress)?;
    }
    progress.event(&Event::Frozen {
        instant: &instant.to_string(),
    });
    Ok(Some(instant))
}
