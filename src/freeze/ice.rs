//! The one place that freezes mounted filesystems and thaws them.
//!
//! Several are frozen together: those that are independent at the same time, those that lie on others
//! before these, for a freeze writes out what is dirty, and whoever writes to what is frozen waits. They
//! thaw in reverse, for a thaw writes, too.
//!
//! While anything is frozen, nothing is written to standard output or error (they may end on what is
//! frozen), and a stop by the terminal waits.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use holdstill_platform::freeze::FreezeError;
use holdstill_platform::guard::{Frozen, Ready, Thawed};
use holdstill_platform::memory::touch_stack;

use super::freezer::{Expect, Freezer, Looks, change};
use super::mounted;
use crate::error::{Error, Kind, Result};
use crate::freeze::session::{self, FreezeRecord, Session};
use crate::progress::Progress;
use crate::source::Source;
use crate::thread;

/// How long another run of holdstill is waited for that has a source frozen.
const PATIENCE: Duration = Duration::from_secs(15);

/// How often to look whether it has thawed it.
const NAP: Duration = Duration::from_millis(20);

/// How long requests that were under way when the freeze came may take to end.
const SETTLING: Duration = Duration::from_secs(1);

/// Freezes several filesystems: all are frozen when this returns, and the first thaws after that. What is
/// dirty should have been written out just before, or the freeze takes as long. Another run of holdstill
/// that has one of them frozen is waited for, while none of ours is.
///
/// # Errors
/// If that takes too long, somebody else has frozen one, each lies on the other, or the guard is lost.
/// Nothing is frozen then.
pub(super) fn freeze_all(
    freezers: &[Arc<Freezer>],
    deadline: Duration,
    progress: &dyn Progress,
) -> Result<Ice> {
    let Some(first) = freezers.first() else {
        return Err(Error::new(Kind::Usage, "there is nothing to freeze"));
    };
    let levels = levels(freezers)?;
    let run = &first.run;
    run.check_guard()?;
    // On record before it happens, as long as it may; in the order in which they are frozen, for whoever has
    // to thaw them has to do it in reverse.
    let mut in_order: Vec<usize> = (0..freezers.len()).collect();
    in_order.sort_by_key(|number| levels[*number]);
    let in_order = in_order.into_iter();
    let under_way = in_order.map(|number| UnderWay::begin(&freezers[number]));
    let under_way = Arc::new(under_way.collect::<Result<Vec<_>>>()?);
    let begin = Instant::now();
    let mut is_told = false;
    loop {
        let guard = run.guard()?;
        let ready = freezers.iter().map(|_| guard.ready());
        let ready = ready
            .collect::<io::Result<Vec<_>>>()
            .map_err(|error| Error::io("cannot start a thread", error))?;
        progress.hush(true);
        let (frozen, failure) = freeze_in_order(freezers, &levels, ready, deadline);
        let ice = Ice {
            frozen,
            freezers: freezers.to_vec(),
            levels: levels.clone(),
            settled: Vec::with_capacity(freezers.len()),
            last: Vec::with_capacity(freezers.len()),
            thawed: freezers.iter().map(|_| None).collect(),
            _under_way: Arc::clone(&under_way),
        };
        let Some((number, error)) = failure else {
            return Ok(ice);
        };
        drop(ice);
        progress.hush(false);
        let freezer = &freezers[number];
        if !matches!(error, FreezeError::AlreadyFrozen) {
            return Err(mounted::explain(error, &freezer.source));
        }
        let device = freezer.point.device().to_string();
        let Some(other) = session::freezing(&device, run.id())? else {
            return Err(mounted::explain(error, &freezer.source));
        };
        if begin.elapsed() > PATIENCE {
            let what = format!("another run of holdstill keeps it frozen ({other})");
            return Err(Error::new(Kind::InUse, what)
                .on(&freezer.source.path)
                .hint("try again when that run has ended"));
        }
        if !std::mem::replace(&mut is_told, true) {
            progress.warn(&format!("waiting for another run of holdstill ({other})"));
        }
        progress.check()?;
        std::thread::sleep(NAP);
    }
}

/// When each is frozen, from 0: after everything that lies on it.
fn levels(freezers: &[Arc<Freezer>]) -> Result<Vec<usize>> {
    let mut levels = vec![0; freezers.len()];
    if freezers.len() < 2 {
        return Ok(levels);
    }
    let below = freezers.iter().map(|freezer| freezer.below());
    let below = below.collect::<Result<Vec<_>>>()?;
    // What nobody can see below one may be any of those of which everything can be seen.
    let is_hidden: Vec<bool> = below
        .iter()
        .map(|below| below.iter().any(|it| it.is_hidden))
        .collect();
    let comes_first = |upper: usize, lower: usize| {
        upper != lower
            && (freezers[upper].lies_on(&below[upper], &freezers[lower])
                || is_hidden[upper] && !is_hidden[lower])
    };
    // One round more than there are freezers: whatever still moves goes in a circle.
    for _ in 0..=freezers.len() {
        let mut has_moved = false;
        for upper in 0..freezers.len() {
            for lower in 0..freezers.len() {
                if comes_first(upper, lower) && levels[lower] <= levels[upper] {
                    levels[lower] = levels[upper] + 1;
                    has_moved = true;
                }
            }
        }
        if !has_moved {
            return Ok(levels);
        }
    }
    let what = "the sources lie on each other in a circle: no order to freeze them in is safe";
    Err(Error::new(Kind::NotApplicable, what)
        .on(&freezers[0].source.path)
        .hint("image them one after the other"))
}

/// Which freeze failed first, and why.
type Failure = Option<(usize, FreezeError)>;

/// Freezes level after level, in threads that were started before the first. Ends with the first level in
/// which one fails; what is frozen by then is returned all the same.
fn freeze_in_order(
    freezers: &[Arc<Freezer>],
    levels: &[usize],
    ready: Vec<Ready>,
    deadline: Duration,
) -> (Vec<Option<Frozen>>, Failure) {
    let mut frozen: Vec<Option<Frozen>> = freezers.iter().map(|_| None).collect();
    let mut failure = None;
    std::thread::scope(|scope| {
        let mut lanes = Vec::new();
        for (freezer, ready) in freezers.iter().zip(ready) {
            let (go, wait) = sync_channel::<()>(1);
            let (tell, told) = sync_channel(1);
            let work = move || {
                touch_stack();
                if wait.recv().is_ok() {
                    let _ = tell.send(ready.freeze(&freezer.point, deadline));
                }
            };
            if let Err(error) = thread::spawn(scope, work) {
                let error = FreezeError::Failed(io::Error::other(error.to_string()));
                failure = Some((lanes.len(), error));
                return;
            }
            lanes.push((go, told));
        }
        for level in 0..=levels.iter().copied().max().unwrap_or(0) {
            let of_it = || (0..lanes.len()).filter(|number| levels[*number] == level);
            for number in of_it() {
                let _ = lanes[number].0.send(());
            }
            for number in of_it() {
                match lanes[number].1.recv() {
                    Ok(Ok(done)) => frozen[number] = Some(done),
                    Ok(Err(error)) => failure = failure.take().or(Some((number, error))),
                    Err(_) => {}
                }
            }
            if failure.is_some() {
                return;
            }
        }
    });
    (frozen, failure)
}

/// Filesystems that are frozen together. Dropped, they are thawed.
#[derive(Debug)]
#[must_use = "dropping it thaws"]
pub(super) struct Ice {
    /// Those whose thaw failed, or was done, are gone.
    frozen: Vec<Option<Frozen>>,
    freezers: Vec<Arc<Freezer>>,
    levels: Vec<usize>,
    /// What was seen of each when the freeze had settled.
    settled: Vec<io::Result<Looks>>,
    /// And right before the first thaw.
    last: Vec<io::Result<Looks>>,
    thawed: Vec<Option<std::result::Result<Thawed, FreezeError>>>,
    // Dropped last: it writes, perhaps to what was frozen.
    _under_way: Arc<Vec<UnderWay>>,
}

impl Ice {
    /// How long the last one is frozen by now: since then all are.
    pub(super) fn held(&self) -> Duration {
        let held = self.frozen.iter().flatten().map(Frozen::held);
        held.min().unwrap_or_default()
    }

    /// From now on nothing may be written any more: what the filesystems wrote to be frozen is complete.
    /// Waits for requests that are still under way. Allocates nothing.
    pub(super) fn settle(&mut self) {
        let begin = Instant::now();
        let is_writing = || self.freezers.iter().any(|freezer| freezer.is_writing());
        while begin.elapsed() < SETTLING && is_writing() {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.settled.clear();
        let looks = self.freezers.iter().map(|freezer| freezer.look());
        self.settled.extend(looks);
    }

    /// Thaws the only one there is, and says how long it was frozen.
    ///
    /// # Errors
    /// As [`thaw_all`](Self::thaw_all).
    pub(super) fn thaw(self, expect: Expect, progress: &dyn Progress) -> Result<Thawed> {
        let thawed = self.thaw_all(&[expect], progress)?;
        let missing = || Error::new(Kind::Failed, "nothing was frozen");
        thawed.into_iter().next().ok_or_else(missing)
    }

    /// Thaws all, what was frozen last first, and says how long each was frozen. `expect` has what may have
    /// happened to each.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if one was thawed before, or written to since all [settled](Self::settle)
    /// other than was to be expected: what was read is worthless.
    pub(super) fn thaw_all(
        mut self,
        expect: &[Expect],
        progress: &dyn Progress,
    ) -> Result<Vec<Thawed>> {
        let looks = self.freezers.iter().map(|freezer| freezer.look());
        self.last.extend(looks);
        let mut thawed = std::mem::take(&mut self.thawed);
        self.thaw_in_order(|number, frozen| thawed[number] = Some(frozen.thaw()));
        progress.hush(false);
        let mut all = Vec::new();
        for (freezer, thawed) in self.freezers.iter().zip(thawed) {
            let thawed = thawed.unwrap_or(Err(FreezeError::DidNotHold));
            all.push(thawed.map_err(|error| mounted::explain(error, &freezer.source))?);
        }
        let (settled, last) = (self.settled.drain(..), self.last.drain(..));
        let looks = settled.zip(last).zip(expect);
        for (freezer, ((then, now), expect)) in self.freezers.iter().zip(looks) {
            let io = |error| {
                Error::io("cannot tell whether it was written to", error).on(&freezer.source.path)
            };
            if let Some(how) = change(&then.map_err(io)?, now.map_err(io)?, *expect) {
                return Err(did_not_hold(&freezer.source).because(how));
            }
        }
        Ok(all)
    }

    /// Hands each that is frozen to whoever thaws it, what was frozen last first.
    fn thaw_in_order(&mut self, mut thaw: impl FnMut(usize, Frozen)) {
        for level in (0..=self.levels.iter().copied().max().unwrap_or(0)).rev() {
            for (number, frozen) in self.frozen.iter_mut().enumerate() {
                let is_next = self.levels[number] == level;
                if let Some(frozen) = frozen.take_if(|_| is_next) {
                    thaw(number, frozen);
                }
            }
        }
    }
}

impl Drop for Ice {
    fn drop(&mut self) {
        self.thaw_in_order(|_, frozen| drop(frozen));
    }
}

fn did_not_hold(source: &Source) -> Error {
    Error::new(
        Kind::Inconsistent,
        "the freeze did not hold: the device was written to meanwhile",
    )
    .on(&source.path)
    .hint("the copy was discarded; find out who writes to the device, or thaws it, and try again")
}

/// The record says that a freeze is under way until this is dropped.
#[derive(Debug)]
struct UnderWay {
    run: Session,
    device: String,
}

impl UnderWay {
    fn begin(freezer: &Freezer) -> Result<Self> {
        let record = FreezeRecord::of(freezer.point.path(), freezer.point.device());
        let device = record.device.clone();
        let run = freezer.run.clone();
        run.note(|it| it.freezes.push(record))?;
        Ok(Self { run, device })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let Self { run, device } = self;
        let ended = run.note(|it| it.freezes.retain(|freeze| freeze.device != *device));
        if let Err(error) = ended {
            log::debug!("{error}");
        }
    }
}
