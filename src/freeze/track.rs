//! `track`: a mounted ext4 or XFS on a disk, or on a stack of devices above disks, imaged while it is
//! in use, with two short freezes.
//!
//! Every write to the disk is traced from the start, and marks its blocks as *stale*: what the copy
//! has of them, if anything, is out of date. A first freeze of some milliseconds gives an exact map
//! of what is in use. Then everything stale and in use is copied, again and again, while writers go
//! on; each round is shorter than the one before. At last the filesystem is frozen once more, what is
//! still stale is read into memory that was made ready before, and it thaws: that moment is the
//! instant of the copy. Only then is the rest written out.
//!
//! Why the copy is exact: a block's mark is cleared before the block is read, and set again after any
//! write that the reading may have missed, since the trace tells of a write when it is complete. When
//! the freeze has returned, all writes of the filesystem are complete and in the trace. That nothing
//! was lost from the trace is proven: between the two freezes the counters of the partition (or disk)
//! must have grown by exactly the sectors that were traced on it, however busy its neighbours were.
//! The argument, and why the borders of a partition are read in the last freeze whatever the trace
//! says of them, is in [`holdstill_platform::trace`].
//!
//! On a stack (LUKS, LVM, md and what else [`holdstill_platform::stack`] can follow) the disks below are
//! traced, and their writes mapped to the source; sums are compared with what the source itself counted.
//! Its layout must be the same when the trace begins, between rounds, and after the last freeze.
//!
//! Swap files are the exception: the kernel goes on writing to them while the filesystem is frozen,
//! and nothing it writes there is worth copying. Their blocks are not read but become zeros, all but
//! the header. Which blocks these are is decided in the last freeze, and nothing has to have stayed
//! as it was before: what no longer is swap space then is stale, for no round has taken its marks.

mod capture;
mod live_map;
mod stale;
pub(crate) mod write_trace;

use std::sync::Arc;
use std::time::{Duration, Instant};

use holdstill_platform::counters;
use holdstill_platform::device::{Access, Disk};
use holdstill_platform::dirty::DirtyMap;
use holdstill_platform::node::BlockDevice;
use holdstill_platform::stack::Stack;
use holdstill_platform::trace::{self, Tracefs};

use self::capture::{LastPass, Seen};
use self::live_map::LiveMap;
use self::stale::BLOCK_SHIFT;
use self::write_trace::{CATCH_UP, WriteTrace};
use super::freezer::{Expect, Freezer};
use super::instant::AtInstant;
use super::mounted::{self, milliseconds};
use crate::error::{Error, Kind, Result};
use crate::extent::ExtentSet;
use crate::freeze::session::Session;
use crate::freeze::step::Step;
use crate::freeze::survey::{Mode, Survey};
use crate::freeze::{Context, Next, Pass, Proof, Purpose, Still, Turn, only};
use crate::image::manifest::{FreezeTimes, Grade};
use crate::progress::{Event, Progress};
use crate::read_at::ReadAt;
use crate::source::Source;
use crate::units::ByteLen;

/// When the first freeze ends at the latest, by the guard's hand.
const DEADLINE: Duration = Duration::from_secs(10);

/// Rounds go on until no more than this is stale.
const SMALL: ByteLen = ByteLen::mib(4);

/// A round that leaves more than this share of what the one before it left does not converge.
const CONVERGING: f64 = 0.8;

/// After so many rounds in a row that do not converge, or so many rounds at all, what is stale is
/// taken as it is, if it fits into memory.
const PATIENT_ROUNDS: u32 = 3;
const MOST_ROUNDS: u32 = 12;

/// How long to wait before looking again whether a write is complete.
const NAP: Duration = Duration::from_millis(10);

/// A source whose writes are being tracked.
#[derive(Debug)]
pub struct Track {
    source: Source,
    disk: Arc<Disk>,
    freezer: Arc<Freezer>,
    run: Session,
    survey: Survey,
    trace: WriteTrace,
    stale: Arc<DirtyMap>,
    /// Blocks that any pass has copied.
    copied: DirtyMap,
    map: LiveMap,
    /// Whether what was copied is still to be compared.
    compare: bool,
    /// Memory for what is read in the final freeze, at most, where the user said so.
    most_memory: Option<ByteLen>,
    /// And how much there was the last time.
    room: ByteLen,
    phase: Phase,
    /// Final freezes that found more than fits into memory.
    tries: u32,
    seen: Option<Seen>,
    last_pass: Option<LastPass>,
    freezes: Vec<FreezeTimes>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Nothing was copied.
    First,
    /// Comparing what was copied and has not changed since.
    Compared,
    /// Copying what has become stale. `left`: how much the last round began with.
    Rounds { done: u32, slow: u32, left: u64 },
    /// Little is stale. `is_new`: as of just now.
    Ready { is_new: bool },
    /// The instant has passed, and what it gave is not copied yet.
    Last,
    /// Everything was copied.
    Over,
}

/// `track`: writes are tracked.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "track"
    }

    fn about(&self) -> &'static str {
        "its writes are tracked; frozen for milliseconds at the end"
    }

    fn when(&self) -> &'static str {
        "a mounted ext4 or XFS on a disk or partition, or on LUKS, LVM, md mirrors and stacks of them"
    }

    fn how(&self) -> &'static str {
        "every write is traced; what changes is copied again; one short freeze at the end"
    }

    fn turn(&self, _: bool) -> Turn {
        Turn::Shared
    }

    fn freezes(&self, _: &Source, _: bool) -> bool {
        true
    }

    fn objection(&self, source: &Source) -> Result<Option<String>> {
        objection(source)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        Ok(Box::new(Track::begin(only(sources)?, context)?))
    }
}

/// Why the source cannot be tracked; `None` if nothing speaks against it.
///
/// # Errors
/// If it cannot be examined.
fn objection(source: &Source) -> Result<Option<String>> {
    let device = match mounted::device(source) {
        Ok(device) => device,
        Err(why) => return Ok(Some(why)),
    };
    let is_counted = if device.is_request_based() {
        counters::are_kept(device)?
    } else {
        match Stack::of(device) {
            Ok(stack) => is_counted(&stack)?,
            Err(why) => return Ok(Some(why)),
        }
    };
    let mount = source.mount.as_ref();
    if mount.is_some_and(|mount| mount.has_super_option("dax")) {
        return Ok(Some(
            "it is mounted with dax: writes do not pass the block layer".to_owned(),
        ));
    }
    if !is_counted {
        return Ok(Some(
            "the kernel does not count what is written to it (queue/iostats is off)".to_owned(),
        ));
    }
    if let Err(why) = mounted::swap_files(device)? {
        return Ok(Some(why));
    }
    if let Err(error) = Tracefs::open() {
        return Ok(Some(format!("writes cannot be traced: {error}")));
    }
    mounted::other_writer(device)
}

/// Whether the kernel may count what is written to a stack.
fn is_counted(stack: &Stack) -> Result<bool> {
    for (number, _) in stack.gauges() {
        if !trace::may_be_counted(&BlockDevice::of(number)?)? {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Track {
    /// Begins to track the source, and freezes it once, shortly, for an exact map.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if it cannot be tracked; else if tracing, freezing or reading fails.
    pub fn begin(source: &Source, context: &Context<'_>) -> Result<Self> {
        let Context {
            run,
            output,
            all_blocks,
            compare,
            memory,
            progress,
            ..
        } = *context;
        let no = |why: &str| {
            Error::new(
                Kind::NotApplicable,
                format!("its writes cannot be tracked: {why}"),
            )
            .on(&source.path)
        };
        let device = mounted::device(source).map_err(|why| no(&why))?.clone();
        if let Some(why) = mounted::would_wait_for_itself(&device, output)? {
            return Err(no(why).hint("write the image elsewhere, or to a pipe that does"));
        }
        let disk = Arc::new(Disk::open(&source.path, Access::Read)?);
        if !disk.is_direct() {
            return Err(no("it cannot be read past the page cache"));
        }
        let freezer = Arc::new(Freezer::open(source, run)?);
        let sectors = device.sectors;
        let marks = || {
            DirtyMap::new(sectors, BLOCK_SHIFT)
                .ok_or_else(|| no("there is not enough memory for a map of its blocks"))
        };
        let stale = Arc::new(marks()?);
        let copied = marks()?;
        // The copy has nothing yet: everything is stale until it is read.
        stale.mark(0, sectors);
        let trace = WriteTrace::begin(source, &device, run, &stale)?;
        // What the survey of a live filesystem says is not believed: this is to know what it is, and
        // to be told of an external log before anything is frozen.
        let survey = Survey::of_mounted(&disk)?;
        let size = ReadAt::len(&*disk);
        let swap_files = mounted::swap_files(&device)?.map_err(|why| no(&why))?;
        let map = LiveMap::new(
            Arc::clone(freezer.point()),
            device.number,
            size,
            all_blocks,
            swap_files,
        );
        let mut track = Self {
            source: source.clone(),
            disk,
            freezer,
            run: run.clone(),
            survey,
            tries: 0,
            trace,
            stale,
            copied,
            map,
            compare,
            most_memory: memory,
            room: ByteLen::ZERO,
            phase: Phase::First,
            seen: None,
            last_pass: None,
            freezes: Vec::new(),
        };
        track.map.look(&track.source.path)?;
        track.first_freeze(progress)?;
        if let Some(why) = track.freezer.blind_spot() {
            track
                .survey
                .warnings
                .push(format!("all blocks are copied: {why}"));
            track.survey.grade = Grade::Crash;
            track.map.distrust();
            track.map.look(&track.source.path)?;
            track.survey.bytes = stale::bytes(track.map.mapped());
        }
        Ok(track)
    }

    /// The first freeze: an exact map, and a balance of the trace to compare the last one with.
    fn first_freeze(&mut self, progress: &dyn Progress) -> Result<()> {
        self.map.make_room();
        self.freezer.sync(progress)?;
        let mut frozen = self.freezer.freeze(DEADLINE, progress)?;
        let drained = self.trace.catch_up();
        let drain_ms = milliseconds(frozen.held());
        let balance = self.trace.balance_frozen();
        frozen.settle();
        let map = self.map.look_in_place(&self.source.path);
        let confirmed = Survey::why_unsettled(&self.disk, self.mode());
        let read_ms = milliseconds(frozen.held()) - drain_ms;
        let thawed = frozen.thaw(self.expected(), progress)?;
        let times = mounted::times("map", &thawed, drain_ms, read_ms);
        progress.event(&Event::Thawed(&times));
        self.freezes.push(times);
        drained.map_err(|error| self.trace.untrusted(&error))?;
        map?;
        // Nothing was copied yet, so the sums may as well begin now.
        self.trace.prove_from(balance)?;
        if let Some(why) = confirmed? {
            self.survey.grade = Grade::Crash;
            self.map.distrust();
            self.survey
                .warnings
                .push(format!("all blocks are copied: even frozen, {why}"));
            self.map.look(&self.source.path)?;
        }
        self.survey.bytes = stale::bytes(self.map.mapped());
        Ok(())
    }

    /// What may be written while it is frozen: the kernel goes on swapping to its swap files, and
    /// discards of what was freed before may end late.
    fn expected(&self) -> Expect {
        match self.map.has_swap() {
            true => Expect::Anything,
            false => Expect::Discards,
        }
    }

    fn mode(&self) -> Mode {
        Mode::of(self.source.mount.as_ref())
    }

    /// Waits until all that was written before is marked.
    fn catch_up(&self) -> Result<()> {
        let caught_up = self.trace.catch_up();
        caught_up.map_err(|error| self.trace.untrusted(&error))
    }

    /// Decides what comes after a round: another one, or getting ready for the end.
    fn after_round(
        &mut self,
        done: u32,
        slow: u32,
        left: u64,
        progress: &dyn Progress,
    ) -> Result<Phase> {
        self.run.check_guard()?;
        self.trace.check_layers()?;
        if done > 0 {
            self.sync(progress)?;
        }
        self.catch_up()?;
        self.map.look(&self.source.path)?;
        let now = stale::count(&self.stale, self.map.used());
        let is_slow = now as f64 >= CONVERGING * left as f64;
        let slow = if is_slow { slow + 1 } else { 0 };
        if now <= SMALL.0 || slow >= PATIENT_ROUNDS || done >= MOST_ROUNDS {
            return Ok(match std::mem::take(&mut self.compare) {
                true => Phase::Compared,
                false => Phase::Ready { is_new: true },
            });
        }
        Ok(Phase::Rounds {
            done: done + 1,
            slow,
            left: now,
        })
    }

    /// What is stale and in use now, as a pass.
    fn stale_pass(&self) -> Pass<'_> {
        Pass {
            volume: 0,
            source: &*self.disk,
            walk: Box::new(move |sink| {
                stale::take(&self.stale, &self.copied, self.map.used(), sink)
            }),
            purpose: Purpose::Copy,
        }
    }

    /// What was copied, is in use, and was not written to since. Everything else is copied after this.
    fn settled_pass(&self) -> Pass<'_> {
        Pass {
            volume: 0,
            source: &*self.disk,
            walk: Box::new(move |sink| {
                stale::settled(&self.stale, &self.copied, self.map.used(), sink)
            }),
            purpose: Purpose::Compare,
        }
    }
}

impl Still for Track {
    fn surveys(&self) -> &[Survey] {
        std::slice::from_ref(&self.survey)
    }

    fn next(&mut self, progress: &dyn Progress) -> Result<Next<'_>> {
        loop {
            match self.phase {
                Phase::First => {
                    let left = stale::count(&self.stale, self.map.used());
                    self.phase = Phase::Rounds {
                        done: 0,
                        slow: 0,
                        left,
                    };
                    return Ok(Next::Pass(self.stale_pass()));
                }
                Phase::Rounds { done, slow, left } => {
                    self.phase = self.after_round(done, slow, left, progress)?;
                    match self.phase {
                        Phase::Compared => return Ok(Next::Pass(self.settled_pass())),
                        Phase::Rounds { .. } => return Ok(Next::Pass(self.stale_pass())),
                        _ => {}
                    }
                }
                Phase::Compared => {
                    // Comparing took as long as copying: much may be stale again.
                    self.phase = ROUNDS_AGAIN;
                    return Ok(Next::Pass(self.stale_pass()));
                }
                Phase::Ready { is_new: true } => {
                    self.phase = Phase::Ready { is_new: false };
                    return Ok(Next::Ready);
                }
                // Others made it wait: more may be stale by now.
                Phase::Ready { is_new: false } => self.phase = ROUNDS_AGAIN,
                Phase::Last => {
                    self.phase = Phase::Over;
                    let missing = || Error::new(Kind::Failed, "the instant never came");
                    let last = self.last_pass.as_ref().ok_or_else(missing)?;
                    return Ok(Next::Pass(last.pass()));
                }
                Phase::Over => return Ok(Next::Over),
            }
        }
    }

    fn last_round(&mut self, progress: &dyn Progress) -> Result<Option<Pass<'_>>> {
        self.sync(progress)?;
        Ok(Some(self.stale_pass()))
    }

    fn at_instant(&mut self) -> Option<&mut dyn AtInstant> {
        Some(self)
    }

    /// A block may differ because it was written to before it was read for comparison: then the trace
    /// tells of it, at the latest when that write is complete.
    fn has_rewritten(&self, differing: &ExtentSet) -> Result<bool> {
        let begin = Instant::now();
        loop {
            self.catch_up()?;
            if stale::all_marked(&self.stale, differing) {
                return Ok(true);
            }
            if begin.elapsed() > CATCH_UP {
                return Ok(false);
            }
            std::thread::sleep(NAP);
        }
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let Self {
            freezer,
            trace,
            run,
            survey,
            last_pass,
            freezes,
            ..
        } = *self;
        freezer.no_other_writer()?;
        trace.end(&run, progress)?;
        let last = last_pass.ok_or_else(|| Error::new(Kind::Failed, "the instant never came"))?;
        Ok(Proof {
            grade: survey.grade,
            instant: last.instant,
            freezes,
            commit: None,
        })
    }
}

/// As long as what is stale becomes less.
const ROUNDS_AGAIN: Phase = Phase::Rounds {
    done: 0,
    slow: 0,
    left: u64::MAX,
};
