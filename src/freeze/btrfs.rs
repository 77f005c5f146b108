//! `btrfs`: a mounted btrfs, on one device or several, imaged as a whole at one of its commits while it is
//! in use.
//!
//! A commit is a consistent state by itself, but what it leads to may be overwritten as soon as the next
//! one is complete. So the state of one commit is taken in three ways:
//!
//! * Tree blocks are copied in rounds beforehand. A block of the same address and generation never changes:
//!   each round copies what came since the one before.
//! * Data is pinned by a read-only snapshot of every subvolume, see `pins`, and copied afterwards, without
//!   haste, every sector checked against its checksum.
//! * What is left, tree blocks of the last moments and data that no pin refers to, is read in one go, in the
//!   `window`, while the commit is the newest one.
//!
//! The window is opened under a freeze of some milliseconds. The image would be whole without one, but not
//! show what a writer may expect: a commit holds what was written past the page cache, and not what was
//! written into it before. A freeze writes out everything first. With `--no-freeze` nobody waits, and the
//! copy is as after a power cut.
//!
//! What could spoil it is a balance, or the removal or replacement of a device: they move what is pinned.
//! None may be going on at any time, the pinned trees must be the same at the end, and so must the chunks
//! that data was copied from.

mod captured;
mod checked;
mod devices;
mod loose;
mod mirrors;
mod moment;
mod pins;
mod proof;
mod roots;
mod rounds;
mod stream;
mod stripes;
mod trees;
mod window;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use holdstill_platform::btrfs::{Filesystem, Key};
use holdstill_platform::memory;
use zerocopy::FromBytes;

use super::freezer::Freezer;
use super::instant::AtInstant;
use super::mounted;
use crate::error::{Error, Kind, Result};
use crate::extent::ExtentSet;
use crate::freeze::session::Session;
use crate::freeze::step::Step;
use crate::freeze::survey::{Survey, worst_grade};
use crate::freeze::{Context, Next, Pass, Proof, Purpose, Still, Turn};
use crate::fs::btrfs::chunks::damaged;
use crate::fs::btrfs::commit::Commit;
use crate::fs::btrfs::format::{self, BlockGroupItem};
use crate::image::manifest::{FreezeTimes, Grade};
use crate::image::tables::Run as BlockRun;
use crate::pipeline::read::Walk;
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::source::{Medium, Source, whole};
use crate::units::ByteLen;
use checked::Checks;
use devices::Devices;
use moment::{Moment, View};
use pins::Pins;
use rounds::Round;
use stream::Stream;

/// Rounds go on until one copies no more than this.
const SMALL: u64 = 4 << 20;

/// After so many rounds what changed since is taken as it is, if it fits into memory.
const MOST_ROUNDS: u32 = 8;

/// Memory for what the window gives: at most this, and a quarter of what is available.
const MOST_MEMORY: u64 = 256 << 20;

/// A mounted btrfs that is being imaged.
pub struct Live {
    source: Source,
    filesystem: Arc<Filesystem>,
    freezer: Arc<Freezer>,
    devices: Arc<Devices>,
    run: Session,
    surveys: Vec<Survey>,
    /// Whether the window is opened under a freeze.
    freezes_it: bool,
    /// The only subvolume whose data is wanted.
    only: Option<u64>,
    /// Whether what was copied is still to be compared.
    compare: bool,
    /// Memory for what the window gives, at most.
    room: ByteLen,
    phase: Phase,
    /// Which volume the next pass of the phase is over.
    volume: usize,
    round: Round,
    windows: u32,
    /// A window under the freeze.
    view: Option<View>,
    pins: Pins,
    /// Those of windows that did not hold.
    old_pins: Vec<Pins>,
    moment: Option<Moment>,
    freezes: Vec<FreezeTimes>,
    checks: Arc<Checks>,
}

/// What is copied next, of one volume after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Tree blocks, in rounds.
    Rounds { done: u32 },
    /// The same again, to be compared.
    Compare,
    /// Nothing before a window was opened.
    Ready,
    /// Pinned data.
    Data,
    /// What the window gave.
    Last,
    /// Nothing.
    Over,
}

/// `btrfs`: one commit.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn about(&self) -> &'static str {
        "one commit of a mounted btrfs, pinned by snapshots"
    }

    fn when(&self) -> &'static str {
        "a mounted btrfs, on one device or several"
    }

    fn how(&self) -> &'static str {
        "read-only snapshots without a name pin its data, and one commit is read as a whole while it is the newest, under a freeze of milliseconds"
    }

    fn turn(&self, no_freeze: bool) -> Turn {
        match no_freeze {
            true => Turn::Snapshot,
            false => Turn::Shared,
        }
    }

    fn has_to_freeze(&self) -> bool {
        false
    }

    fn freezes(&self, _: &Source, no_freeze: bool) -> bool {
        !no_freeze
    }

    fn objection(&self, source: &Source) -> Result<Option<String>> {
        proof::objection(source)
    }

    fn siblings(&self, source: &Source) -> Result<Vec<Source>> {
        whole::siblings(source)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        Ok(Box::new(Live::begin(sources, context)?))
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live")
            .field("source", &self.source)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

impl Live {
    /// Begins with all devices of a filesystem.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if it cannot be imaged this way; else if it cannot be read.
    pub fn begin(sources: &[&Source], context: &Context<'_>) -> Result<Self> {
        let Context {
            run,
            output,
            no_freeze,
            all_blocks,
            compare,
            memory,
            ..
        } = *context;
        let nothing = || Error::new(Kind::Usage, "no source was named");
        let source = *sources.first().ok_or_else(nothing)?;
        let no = |why: &str| {
            let what = format!("it cannot be imaged at a commit: {why}");
            Error::new(Kind::NotApplicable, what).on(&source.path)
        };
        if all_blocks {
            return Err(no("what is free has no state at a commit")
                .hint("leave out --all-blocks, or unmount it"));
        }
        let mount = source
            .mount
            .as_ref()
            .ok_or_else(|| no("it is not mounted here"))?;
        for source in sources {
            if let Medium::Device(device) = &source.medium
                && !no_freeze
                && let Some(why) = mounted::would_wait_for_itself(device, output)?
            {
                return Err(no(why).hint(
                    "write the image elsewhere, or to a pipe that does; or say --no-freeze",
                ));
            }
        }
        let filesystem = Arc::new(Filesystem::open(&mount.point)?);
        let devices = Arc::new(Devices::open(&filesystem, sources)?);
        let freezer = Arc::new(Freezer::of_btrfs(&filesystem, sources, run)?);
        proof::nothing_moves(&filesystem).map_err(|error| no(&error.to_string()))?;
        let round = Round::begin(&devices, 0)?;
        let mut surveys = Vec::new();
        for disk in &devices.disks {
            surveys.push(Survey::of_mounted(disk)?);
        }
        let most = memory.map_or(MOST_MEMORY, |memory| memory.0.min(MOST_MEMORY));
        let mut live = Self {
            source: source.clone(),
            filesystem,
            freezer,
            devices,
            run: run.clone(),
            surveys,
            freezes_it: !no_freeze,
            only: source.subvolume.as_ref().map(|only| only.id),
            compare,
            room: ByteLen(most.min(memory::available()? / 4)),
            phase: Phase::Rounds { done: 0 },
            volume: 0,
            round,
            windows: 0,
            view: None,
            pins: Pins::default(),
            old_pins: Vec::new(),
            moment: None,
            freezes: Vec::new(),
            checks: Arc::default(),
        };
        live.count_used()?;
        if no_freeze {
            for survey in &mut live.surveys {
                survey.grade = Grade::Crash;
            }
            if let Some(first) = live.surveys.first_mut() {
                first.warnings.push(NO_FREEZE.to_owned());
            }
        }
        Ok(live)
    }

    /// Counts what is in use on each device.
    fn count_used(&mut self) -> Result<()> {
        let moment = self.moment.as_ref();
        let commit = moment.map_or(&*self.round.commit, |it| &it.seen.commit);
        let used = self.used_by(commit, format::CONTENT_MASK)?;
        for (survey, used) in self.surveys.iter_mut().zip(used) {
            survey.bytes = used;
        }
        Ok(())
    }

    /// What is in use of one subvolume is known only when it was copied.
    fn count_copied(&mut self) -> Result<()> {
        let Some(moment) = self.moment.as_ref().filter(|moment| moment.only.is_some()) else {
            return Ok(());
        };
        let trees = self.used_by(&moment.seen.commit, format::METADATA | format::SYSTEM)?;
        let copied = trees.into_iter().zip(&moment.given);
        for (survey, (trees, given)) in self.surveys.iter_mut().zip(copied) {
            survey.bytes = trees + ByteLen(given.load(Ordering::Relaxed)) + moment.seen.data_len();
        }
        Ok(())
    }

    /// The bytes in use on each device, in chunks that hold any of `contents`.
    fn used_by(&self, commit: &Commit, contents: u64) -> Result<Vec<ByteLen>> {
        let used = used_by_chunk(&self.filesystem, commit)?;
        let on = |id: &u64| {
            let mut bytes = format::RESERVED;
            for (chunk, used) in commit.chunks.chunks().iter().zip(&used) {
                let stripes = chunk.stripes.iter().filter(|stripe| stripe.devid == *id);
                if chunk.kind & contents != 0 {
                    bytes += stripes.count() as u64 * chunk.share(*used);
                }
            }
            ByteLen(bytes)
        };
        Ok(self.devices.ids.iter().map(on).collect())
    }

    /// Decides what comes after a round over all devices.
    fn after_round(&mut self, done: u32) -> Result<Phase> {
        self.run.check_guard()?;
        proof::nothing_moves(&self.filesystem)?;
        if std::mem::take(&mut self.compare) {
            return Ok(Phase::Compare);
        }
        if done > 1 && (self.round.given() <= SMALL || done >= MOST_ROUNDS) {
            return Ok(Phase::Ready);
        }
        self.another_round(done)
    }

    /// Goes back to rounds: too much has changed.
    fn begin_round(&mut self, done: u32) -> Result<()> {
        self.phase = self.another_round(done)?;
        self.volume = 0;
        Ok(())
    }

    /// The moment is known: pinned data is next.
    fn begin_data(&mut self) {
        self.phase = Phase::Data;
        self.volume = 0;
    }

    fn another_round(&mut self, done: u32) -> Result<Phase> {
        self.round = Round::begin(&self.devices, self.round.until())?;
        Ok(Phase::Rounds { done })
    }

    fn no_moment(&self) -> Error {
        Error::new(Kind::Failed, "the instant never came").on(&self.source.path)
    }

    /// The pass of the present phase over a volume; `None` if it has none.
    fn pass(&self, volume: usize) -> Result<Option<Pass<'_>>> {
        let missing = || self.no_moment();
        let device = self.devices.id_and_size(volume);
        let (round, filesystem) = (&self.round, &self.filesystem);
        let trees = || round.sources.get(volume).ok_or_else(missing);
        let moment = || self.moment.as_ref().ok_or_else(missing);
        let purpose = match self.phase {
            Phase::Compare => Purpose::Compare,
            _ => Purpose::Copy,
        };
        let (source, walk): (&dyn ReadAt, Box<Walk<'_>>) = match self.phase {
            Phase::Rounds { .. } => {
                let walk =
                    Box::new(move |sink: &mut Sink<'_>| round.walk(filesystem, device, sink));
                (trees()?, walk)
            }
            Phase::Compare => {
                let walk =
                    Box::new(move |sink: &mut Sink<'_>| round.walk_again(filesystem, device, sink));
                (trees()?, walk)
            }
            Phase::Data => {
                let moment = moment()?;
                let stream = Stream {
                    filesystem,
                    seen: &moment.seen,
                    only: moment.only.as_ref(),
                    given: &moment.given[volume],
                    chunks: &moment.chunks,
                };
                let walk = Box::new(move |sink: &mut Sink<'_>| stream.walk(device, sink));
                (moment.checked.get(volume).ok_or_else(missing)?, walk)
            }
            Phase::Last => {
                let captured = moment()?.captured.get(volume).ok_or_else(missing)?;
                let walk = Box::new(move |sink: &mut Sink<'_>| {
                    let mut extents = captured.extents();
                    extents.try_for_each(|extent| sink(rounds::data(extent)))
                });
                (captured, walk)
            }
            Phase::Ready | Phase::Over => return Ok(None),
        };
        Ok(Some(Pass {
            volume,
            source,
            walk,
            purpose,
        }))
    }
}

/// What takes the runs of a pass.
type Sink<'a> = dyn FnMut(BlockRun) -> Result<()> + 'a;

impl Still for Live {
    fn surveys(&self) -> &[Survey] {
        &self.surveys
    }

    fn next(&mut self, progress: &dyn Progress) -> Result<Next<'_>> {
        loop {
            let has_passes = !matches!(self.phase, Phase::Ready | Phase::Over);
            if has_passes && self.volume < self.surveys.len() {
                self.volume += 1;
                return Ok(self.pass(self.volume - 1)?.into());
            }
            self.volume = 0;
            self.phase = match self.phase {
                Phase::Rounds { done } => self.after_round(done + 1)?,
                Phase::Compare => self.another_round(1)?,
                Phase::Ready if self.freezes_it => return Ok(Next::Ready),
                Phase::Ready => match self.look_unfrozen(progress)? {
                    true => Phase::Data,
                    false => self.another_round(0)?,
                },
                Phase::Data => Phase::Last,
                Phase::Last => {
                    self.count_copied()?;
                    Phase::Over
                }
                Phase::Over => return Ok(Next::Over),
            };
        }
    }

    fn at_instant(&mut self) -> Option<&mut dyn AtInstant> {
        Some(self)
    }

    /// Only tree blocks are compared while they may be freed: what differs was, and then written to.
    fn has_rewritten(&self, differing: &ExtentSet) -> Result<bool> {
        let device = self.devices.id_and_size(0);
        self.round.has_freed(&self.filesystem, device, differing)
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let moment = self.moment.as_ref().ok_or_else(|| self.no_moment())?;
        proof::nothing_moved(&self.filesystem, &moment.seen, &moment.chunks)?;
        self.devices.are_the_same(&self.filesystem)?;
        self.freezer.no_other_writer()?;
        let commit = self.commit_proof(moment);
        if commit.mended_sectors > 0 {
            progress.warn(&format!(
                "{} sectors were damaged in one copy and taken from another: scrub the filesystem",
                commit.mended_sectors
            ));
        }
        if commit.gone_sectors > 0 {
            progress.warn(&format!(
                "{} sectors of subvolumes that were being deleted are left out",
                commit.gone_sectors
            ));
        }
        Ok(Proof {
            grade: worst_grade(&self.surveys),
            instant: moment.instant,
            freezes: self.freezes,
            commit: Some(commit),
        })
    }
}

/// How many logical bytes of each chunk are in use, as its block group counts.
fn used_by_chunk(filesystem: &Filesystem, commit: &Commit) -> Result<Vec<u64>> {
    let tree = match commit.trees.block_group {
        Some(_) => format::BLOCK_GROUP_TREE,
        None => format::EXTENT_TREE,
    };
    let used = commit.chunks.chunks().iter().map(|chunk| {
        let len = chunk.logical.end - chunk.logical.start;
        let key = Key::new(chunk.logical.start, format::BLOCK_GROUP_ITEM, len);
        let mut used = 0;
        filesystem.search(tree, key, key, 0, &mut |item| {
            let group = BlockGroupItem::read_from_bytes(item.data)
                .map_err(|_| damaged("a block group makes no sense"))?;
            used = group.used.get();
            Result::Ok(())
        })?;
        Ok(used)
    });
    used.collect()
}

/// What the user should know of a window without a freeze.
const NO_FREEZE: &str = "nobody was made to wait (--no-freeze): its files are as after a power cut";
