//! The ladder of ways to make a source hold still, and what each of them promises.
//!
//! A [`Still`] source is a value: dropping it thaws what was frozen and removes what was made.

pub mod apfs;
pub mod btrfs;
pub mod dm;
mod final_read;
mod freezer;
pub mod hold;
mod ice;
mod instant;
pub mod lvm;
mod mounted;
pub mod none;
pub mod offline;
pub mod plan;
pub mod session;
pub mod step;
pub mod stills;
pub mod survey;
pub mod track;
mod users;
mod watched;
pub mod zfs;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use holdstill_platform::device::{Disk, Geometry};

use self::instant::AtInstant;
use crate::error::{Error, Kind, Result};
use crate::extent::ExtentSet;
use crate::freeze::session::Session;
use crate::freeze::survey::Survey;
use crate::image::manifest::{CommitProof, FreezeTimes, Grade};
use crate::pipeline::read::{OnReadError, Walk};
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::source::Source;
use crate::units::ByteLen;

/// What a step is given to work with.
#[derive(Clone, Copy)]
#[allow(
    missing_debug_implementations,
    reason = "a listener need not be printable"
)]
pub struct Context<'a> {
    /// The run: its guard, its record, its hooks.
    pub run: &'a Session,
    /// What the copy is written to, if it is a file or device of this machine.
    pub output: Option<BorrowedFd<'a>>,
    /// Where that is, if it has a name.
    pub output_path: Option<&'a Path>,
    /// Room for a snapshot.
    pub cow: &'a CowRoom,
    /// Freeze nothing.
    pub no_freeze: bool,
    /// The hooks stand around the copy of this source, though nothing of it is frozen: nothing else of the
    /// run is either.
    pub hooks_around_copy: bool,
    /// Copy unallocated blocks too.
    pub all_blocks: bool,
    /// Give a pass to compare the copy with as well.
    pub compare: bool,
    /// What unreadable blocks become.
    pub on_read_error: OnReadError,
    /// Most memory to hold what is read in a freeze, if there is a bound beside the step's own.
    pub memory: Option<ByteLen>,
    /// Who listens.
    pub progress: &'a dyn Progress,
}

/// Room for what writers change while a copy-on-write snapshot exists, where the user said so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CowRoom {
    /// How much, at first and at last: it is not extended.
    pub size: Option<ByteLen>,
    /// On which device: a physical volume of the volume group, or any free one (`dm`).
    pub device: Option<PathBuf>,
}

/// The source of a step that images one device at a time.
fn only<'a>(sources: &[&'a Source]) -> Result<&'a Source> {
    match sources {
        [only] => Ok(only),
        _ => Err(Error::new(Kind::Failed, "it is not one device")),
    }
}

/// One pass over a source that holds still.
#[allow(missing_debug_implementations, reason = "a walk is a closure")]
pub struct Pass<'a> {
    /// Which of the source's volumes it is over: the place of its survey.
    pub volume: usize,
    /// Where to read.
    pub source: &'a dyn ReadAt,
    /// What to read, ascending.
    pub walk: Box<Walk<'a>>,
    /// What for.
    pub purpose: Purpose,
}

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be copied.
    Copy,
    /// To be compared with what was copied before. What passes after this one give has to be compared
    /// when it is written.
    Compare,
}

/// The passes of a source that holds still from the first read to the last: one to copy it, and on
/// request the same again, to compare.
#[derive(Clone, Copy, Debug)]
struct OnePass {
    next: Option<Purpose>,
    compare: bool,
}

impl OnePass {
    fn new(compare: bool) -> Self {
        Self {
            next: Some(Purpose::Copy),
            compare,
        }
    }

    fn next(&mut self) -> Option<Purpose> {
        let purpose = self.next.take();
        if purpose == Some(Purpose::Copy) && self.compare {
            self.next = Some(Purpose::Compare);
        }
        purpose
    }

    /// The next pass over a disk, by its survey.
    fn over<'a>(&mut self, disk: &'a Disk, survey: &'a Survey) -> Option<Pass<'a>> {
        let purpose = self.next()?;
        Some(Pass::over(0, disk, survey, purpose))
    }
}

impl<'a> From<Option<Pass<'a>>> for Next<'a> {
    fn from(pass: Option<Pass<'a>>) -> Self {
        pass.map_or(Self::Over, Self::Pass)
    }
}

impl<'a> Pass<'a> {
    /// A pass over the disk of a volume, by its survey.
    fn over(volume: usize, disk: &'a Disk, survey: &'a Survey, purpose: Purpose) -> Self {
        Self {
            volume,
            source: disk,
            walk: Box::new(move |sink| survey.walk(disk, sink)),
            purpose,
        }
    }
}

/// What a source that holds still asks for.
#[allow(missing_debug_implementations, reason = "a pass has a closure")]
pub enum Next<'a> {
    /// To be copied, or compared.
    Pass(Pass<'a>),
    /// Nothing before the instant. Asked again, it may have another pass for what has changed since.
    Ready,
    /// Nothing any more.
    Over,
}

/// When a source is copied, among others of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Turn {
    /// First: writers wait all the while.
    Held,
    /// Before those that are in use: what is overwritten meanwhile takes room.
    Snapshot,
    /// At one instant with all others of this turn.
    Shared,
    /// Nobody writes to it, from its first read until it is [finished](Still::finish).
    Unused,
}

/// A source that holds still.
pub trait Still {
    /// What is on each of its volumes: several where a filesystem lives on several devices.
    fn surveys(&self) -> &[Survey];

    /// Size and sectors of one of them, where they are not those of its source.
    fn geometry(&self, _volume: usize) -> Option<Geometry> {
        None
    }

    /// What comes next. What a later pass over a volume gives supersedes what an earlier one gave.
    ///
    /// # Errors
    /// If it moved after all, or reading fails.
    fn next(&mut self, progress: &dyn Progress) -> Result<Next<'_>>;

    /// Right before the instant, when the pre-freeze command has run: writes out what is dirty, and gives
    /// what that changed, as a pass. Only of one that has an [instant](Self::at_instant) to share.
    ///
    /// # Errors
    /// If that takes too long.
    fn last_round(&mut self, _progress: &dyn Progress) -> Result<Option<Pass<'_>>> {
        Ok(None)
    }

    /// What it does at the instant; `None` if it needs none, or has one of its own.
    fn at_instant(&mut self) -> Option<&mut dyn AtInstant> {
        None
    }

    /// Whether nothing but a later write to the source can be why these blocks differed in a pass to
    /// compare: then a pass that is still to come gives them again.
    ///
    /// # Errors
    /// If that cannot be told.
    fn has_rewritten(&self, _differing: &ExtentSet) -> Result<bool> {
        Ok(false)
    }

    /// Proves that it held still, and lets go.
    ///
    /// # Errors
    /// If it moved: what was read must not be used.
    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof>;
}

/// What a source that held still is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Proof {
    /// How far it can be relied on.
    pub grade: Grade,
    /// The instant all its bytes are of.
    pub instant: jiff::Timestamp,
    /// Each time writers were blocked.
    pub freezes: Vec<FreezeTimes>,
    /// The commit it shows, if it is one of a filesystem in use.
    pub commit: Option<CommitProof>,
}
