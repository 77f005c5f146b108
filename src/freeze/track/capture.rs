//! What `track` does at the instant: what is still stale is read into memory.

use std::sync::Arc;
use std::time::Instant;

use holdstill_platform::trace::TraceError;

use super::stale;
use super::write_trace::InFreeze;
use super::{Phase, ROUNDS_AGAIN, Track};
use crate::error::{Error, Kind, Result};
use crate::freeze::final_read::{ReadPart, Wanted};
use crate::freeze::freezer::{Expect, Freezer};
use crate::freeze::instant::{AtInstant, Moment};
use crate::freeze::mounted::{self, milliseconds};
use crate::freeze::survey::Survey;
use crate::freeze::{Pass, Purpose};
use crate::image::manifest::{FreezeTimes, Grade};
use crate::image::tables::Run as BlockRun;
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::units::ByteLen;

/// So many times a freeze may find more than fits into memory before the run gives up.
const MOST_FREEZES: u32 = 3;

/// Memory for what is read in the final freeze is at least this, if there is so much: for writers that are
/// faster just then.
const LEAST_MEMORY: ByteLen = ByteLen::mib(64);

/// What was seen in the final freeze.
#[derive(Debug)]
pub(super) struct Seen {
    /// Whether all that was written before is marked, and how long that took in milliseconds.
    drained: std::result::Result<(), TraceError>,
    drain_ms: f64,
    balance: InFreeze,
    /// Whether the map could be looked at.
    map: Result<()>,
    /// Whether all that is stale fits into memory.
    fits: bool,
    /// Why the filesystem is not as a freeze leaves it.
    unsettled: Result<Option<String>>,
    /// Whether all that was written until everything was read is marked.
    drained_again: std::result::Result<(), TraceError>,
    /// Blocks in use were written to in the freeze.
    is_rewritten: bool,
}

/// What the final freeze gave.
#[derive(Debug)]
pub(super) struct LastPass {
    read: ReadPart,
    runs: Vec<BlockRun>,
    pub(super) instant: jiff::Timestamp,
}

impl Track {
    fn written_while_frozen(&self) -> Error {
        let what = "the freeze did not hold: blocks in use were written to meanwhile";
        Error::new(Kind::Inconsistent, what)
            .on(&self.source.path)
            .hint("the copy was discarded; find out who writes to the device, and try again")
    }

    fn too_much(&self, bytes: u64, room: ByteLen) -> Error {
        Error::new(
            Kind::Inconsistent,
            format!("it is written to faster than it can be copied: {} are still changing, there is memory for {}", ByteLen(bytes), ByteLen(room.0 / 2)),
        )
        .on(&self.source.path)
        .hint("try again when less is written")
    }
}

impl AtInstant for Track {
    fn freezer(&self) -> Arc<Freezer> {
        Arc::clone(&self.freezer)
    }

    fn prepare(&mut self, room: ByteLen, progress: &dyn Progress) -> Result<Option<Wanted>> {
        progress.check()?;
        let device = mounted::device(&self.source).map_err(|why| Error::new(Kind::Failed, why))?;
        self.trace.mark_borders(device)?;
        self.map.look(&self.source.path)?;
        self.map.make_room();
        let most = self.most_memory.map_or(room, |most| most.min(room));
        let ready = stale::count(&self.stale, self.map.used());
        if ready > most.0 / 2 {
            return Err(self.too_much(ready, most));
        }
        // Locking memory takes time in which more becomes stale: all of it only where less did not do.
        let room = match self.tries {
            0 => ByteLen(ready * 8).max(LEAST_MEMORY).min(most),
            _ => most,
        };
        self.room = room;
        // Once before the freeze, so that the memory it takes is there.
        let _ = Survey::why_unsettled(&self.disk, self.mode());
        Ok(Some(Wanted {
            disk: Arc::clone(&self.disk),
            room,
        }))
    }

    fn sync(&self, progress: &dyn Progress) -> Result<()> {
        self.freezer.sync_within_budget(progress)
    }

    fn capture(&mut self, moment: &Moment<'_>) {
        let begin = Instant::now();
        let drained = self.trace.catch_up();
        let drain_ms = milliseconds(begin.elapsed());
        let balance = self.trace.balance_frozen();
        let map = self.map.look_in_place(&self.source.path);
        let fits = stale::collect(&self.stale, self.map.used(), |extent| moment.read(extent));
        self.seen = Some(Seen {
            drained,
            drain_ms,
            balance,
            map,
            fits,
            unsettled: Ok(None),
            drained_again: Ok(()),
            is_rewritten: false,
        });
    }

    fn confirm(&mut self) {
        let mode = self.mode();
        let Some(seen) = &mut self.seen else {
            return;
        };
        seen.unsettled = Survey::why_unsettled(&self.disk, mode);
        // What was written since what was stale was collected has marked it again.
        seen.drained_again = self.trace.catch_up();
        seen.is_rewritten = seen.fits && stale::count(&self.stale, self.map.used()) > 0;
    }

    fn expects(&self) -> Expect {
        self.expected()
    }

    fn judge(&mut self, times: FreezeTimes) -> Result<bool> {
        let missing = || Error::new(Kind::Failed, "the instant never came");
        let seen = self.seen.as_mut().ok_or_else(missing)?;
        let trace = &self.trace;
        let untrusted = |error| trace.untrusted(&error);
        std::mem::replace(&mut seen.drained, Ok(())).map_err(untrusted)?;
        std::mem::replace(&mut seen.drained_again, Ok(())).map_err(untrusted)?;
        std::mem::replace(&mut seen.map, Ok(()))?;
        let Seen {
            fits,
            is_rewritten,
            drain_ms,
            ..
        } = *seen;
        self.freezes.push(FreezeTimes {
            drain_ms,
            read_ms: (times.read_ms - drain_ms).max(0.0),
            ..times
        });
        if is_rewritten {
            return Err(self.written_while_frozen());
        }
        self.tries += u32::from(!fits);
        if self.tries == MOST_FREEZES {
            let stale = stale::count(&self.stale, self.map.used());
            return Err(self.too_much(stale, self.room));
        }
        Ok(fits)
    }

    fn keep(
        &mut self,
        instant: jiff::Timestamp,
        read: Option<ReadPart>,
        _: &dyn Progress,
    ) -> Result<()> {
        let missing = || Error::new(Kind::Failed, "the instant never came");
        let seen = self.seen.take().ok_or_else(missing)?;
        let read = read.ok_or_else(missing)?;
        self.trace.prove(seen.balance)?;
        if let (Some(why), false) = (seen.unsettled?, self.survey.grade == Grade::Crash) {
            return Err(Error::new(Kind::Inconsistent, format!("frozen, {why}"))
                .on(&self.source.path)
                .hint("try again"));
        }
        self.survey.bytes = stale::bytes(self.map.mapped());
        let runs = stale::last_runs(
            read.extents(),
            self.map.swap(),
            &self.copied,
            self.map.mapped(),
            ReadAt::len(&*self.disk),
        );
        self.last_pass = Some(LastPass {
            read,
            runs,
            instant,
        });
        self.phase = Phase::Last;
        Ok(())
    }

    fn discard(&mut self, read: Option<ReadPart>) {
        self.seen = None;
        for extent in read.iter().flat_map(ReadPart::extents) {
            stale::mark(&self.stale, *extent);
        }
        self.phase = ROUNDS_AGAIN;
    }
}

impl LastPass {
    /// What has to be copied of it.
    pub(super) fn pass(&self) -> Pass<'_> {
        Pass {
            volume: 0,
            source: &self.read,
            walk: Box::new(move |sink| self.runs.iter().try_for_each(|run| sink(*run))),
            purpose: Purpose::Copy,
        }
    }
}
