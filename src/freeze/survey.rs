//! What is on a volume, how far its own map can be trusted, and so which blocks must be copied.

use std::sync::Arc;

use holdstill_platform::device::Disk;
use holdstill_platform::mounts::Mount;

use crate::error::{Error, Kind, Result};
use crate::extent::{Extent, ExtentSet};
use crate::fs::{self, Condition, DirtyReason, Filesystem, Info, Needs, Opened};
use crate::image::manifest::{Blocks, Grade};
use crate::image::tables::{Content, Run};
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// What was found on a volume that holds still.
#[derive(Debug)]
pub struct Survey {
    /// What is on it, if it was recognized.
    pub info: Option<Info>,
    /// What its content needs of a target.
    pub needs: Needs,
    /// `Some` if its map says truly which blocks are in use, and only those shall be copied.
    filesystem: Option<Box<dyn Filesystem>>,
    /// `Some` if all else is known to be zeros, without reading it.
    provisioned: Option<ExtentSet>,
    /// Which blocks are copied.
    pub blocks: Blocks,
    /// What its own state allows to say of it, given that it holds still.
    pub grade: Grade,
    /// Bytes to copy: those in use, or all that are not holes.
    pub bytes: ByteLen,
    /// What the user should know: why the grade is not better, why more is copied.
    pub warnings: Vec<String>,
}

/// What one filesystem on these volumes is worth: what the worst of them is.
pub(crate) fn worst_grade(surveys: &[Survey]) -> Grade {
    let grades = surveys.iter().map(|survey| survey.grade);
    grades.max().unwrap_or(Grade::Torn)
}

impl Survey {
    /// Examines a volume that nobody writes to and nobody has mounted. `siblings` are those that
    /// hold its filesystem together with it.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if part of its filesystem is elsewhere, [`Kind::InUse`] if another
    /// host has it mounted; else if reading fails.
    pub fn of_offline(disk: &Disk, siblings: &[Arc<dyn ReadAt>], all_blocks: bool) -> Result<Self> {
        let opened = fs::open_with(disk, siblings)?;
        Self::new(disk, opened, all_blocks, is_clean, Grade::Clean)
    }

    /// Examines a volume whose mounted filesystem we hold frozen, or held frozen for its snapshot.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if it cannot have been frozen; else as [`of_offline`](Self::of_offline).
    pub fn of_frozen(disk: &Disk, mode: Mode, all_blocks: bool) -> Result<Self> {
        let opened = mode.open(disk)?;
        if let Settled::NotFrozen(why) = mode.settled(&opened) {
            return Err(not_frozen(disk, &why));
        }
        Self::new(disk, opened, all_blocks, mode.is_settled(), Grade::Frozen)
    }

    /// Looks only at what a mounted filesystem calls itself. Nothing else of it can be believed
    /// before it is frozen; the copy will be of its used blocks, by the kernel's own map.
    ///
    /// # Errors
    /// If reading fails.
    pub fn of_mounted(disk: &Disk) -> Result<Self> {
        Ok(Self {
            info: fs::probe(disk)?,
            needs: needs(disk),
            filesystem: None,
            provisioned: None,
            blocks: Blocks::Used,
            grade: Grade::Frozen,
            bytes: ByteLen::ZERO,
            warnings: Vec::new(),
        })
    }

    /// Looks at a volume that may change while it is copied: all its blocks are, for no map of it could
    /// be trusted.
    ///
    /// # Errors
    /// If reading fails.
    pub fn of_moving(disk: &Disk) -> Result<Self> {
        let why = "nothing holds it still: what is written meanwhile is torn in the copy";
        Self::of_all_blocks(disk, fs::probe(disk)?, Grade::Torn, why.to_owned())
    }

    /// Looks at the snapshot of a volume that somebody uses whom nothing made pause: as after a power cut,
    /// nothing of it can be relied on but that all its blocks are of one instant.
    ///
    /// # Errors
    /// If reading fails.
    pub fn of_snapshot_in_use(disk: &Disk, who: &str) -> Result<Self> {
        let why = format!(
            "all blocks are copied, as after a power cut: nobody could make its user pause ({who})"
        );
        Self::of_all_blocks(disk, fs::probe(disk)?, Grade::Crash, why)
    }

    /// Gives up on understanding a volume that could not be examined because of `error`: all its
    /// blocks are copied, as far as they can be read.
    ///
    /// # Errors
    /// If its holes cannot be found.
    pub fn of_unreadable(disk: &Disk, error: &Error) -> Result<Self> {
        let why = format!("all blocks are copied, for what is on it cannot be examined ({error})");
        Self::of_all_blocks(disk, None, Grade::Crash, why)
    }

    fn of_all_blocks(
        disk: &Disk,
        info: Option<Info>,
        grade: Grade,
        warning: String,
    ) -> Result<Self> {
        let needs = match info {
            Some(_) => needs(disk),
            None => Needs::unknown(ReadAt::len(disk)),
        };
        Ok(Self {
            info,
            needs,
            filesystem: None,
            provisioned: None,
            blocks: Blocks::All,
            grade,
            bytes: data_bytes(disk, None)?,
            warnings: vec![warning],
        })
    }

    /// Why the map of a filesystem that we hold frozen cannot be trusted even so, where no freeze could
    /// mend that; `None` if it can.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if it cannot have been frozen; else as [`of_offline`](Self::of_offline).
    pub fn why_unsettled(disk: &Disk, mode: Mode) -> Result<Option<String>> {
        match mode.settled(&mode.open(disk)?) {
            Settled::Yes => Ok(None),
            Settled::No(why) => Ok(Some(why)),
            Settled::NotFrozen(why) => Err(not_frozen(disk, &why)),
        }
    }

    fn new(
        disk: &Disk,
        opened: Opened,
        all_blocks: bool,
        is_settled: fn(Condition) -> bool,
        best: Grade,
    ) -> Result<Self> {
        let mut survey = Self {
            info: None,
            needs: needs(disk),
            filesystem: None,
            provisioned: None,
            blocks: Blocks::All,
            grade: Grade::Crash,
            bytes: ByteLen::ZERO,
            warnings: Vec::new(),
        };
        match opened {
            Opened::Known(filesystem) => {
                survey.info = Some(filesystem.info().clone());
                survey.trust(disk, filesystem, all_blocks, is_settled, best)?;
            }
            Opened::AllBlocks { info, why } => {
                survey
                    .warnings
                    .push(format!("all blocks are copied: {why}"));
                survey.info = Some(info);
            }
            Opened::NoMap(info) => {
                let kind = info.kind;
                survey.warnings.push(format!(
                    "all blocks are copied, and whether it was left in order is not known: \
                     the used blocks of {kind} cannot be read yet"
                ));
                survey.grade = unread(best);
                survey.info = Some(info);
            }
            Opened::Unknown => {
                survey.grade = unread(best);
                survey.warnings.push(
                    "all blocks are copied, and whether it was left in order is not known: \
                     no filesystem was recognized"
                        .to_owned(),
                );
            }
        }
        if survey.filesystem.is_none() {
            survey.bytes = data_bytes(disk, None)?;
        }
        Ok(survey)
    }

    /// Decides whether the map of a known filesystem is used, by its condition and by walking it once.
    fn trust(
        &mut self,
        disk: &Disk,
        filesystem: Box<dyn Filesystem>,
        all_blocks: bool,
        is_settled: fn(Condition) -> bool,
        best: Grade,
    ) -> Result<()> {
        let condition = filesystem.condition();
        if !is_settled(condition) {
            let why = match condition {
                Condition::Dirty { reason } => reason.to_string(),
                _ => "it was frozen and never unmounted".to_owned(),
            };
            self.warnings.push(format!(
                "the {} filesystem was not left in order ({why}): all blocks are copied, and after \
                 a restore it will recover as after a power cut",
                filesystem.info().kind
            ));
            return Ok(());
        }
        self.grade = best;
        if condition == Condition::Interrupted {
            self.grade = best.max(Grade::Crash);
            self.warnings.push(format!(
                "the {} filesystem was not unmounted: it is as a power cut left it",
                filesystem.info().kind
            ));
        }
        if all_blocks {
            return Ok(());
        }
        match filesystem.walk_used(disk, &mut |_| Ok(())) {
            Ok(walk) => {
                self.bytes = walk.used;
                self.warnings.extend(walk.warnings);
                self.filesystem = Some(filesystem);
                self.blocks = Blocks::Used;
                Ok(())
            }
            Err(error) if error.kind() == Kind::Damaged => {
                self.grade = Grade::Crash;
                self.warnings.push(format!(
                    "all blocks are copied: the filesystem contradicts itself ({error}); check it"
                ));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether all blocks are copied, not only those that a filesystem calls used.
    pub fn copies_all(&self) -> bool {
        self.filesystem.is_none()
    }

    /// Of all blocks, only `provisioned` ones are read: the others are zeros.
    ///
    /// # Errors
    /// If the holes of the disk cannot be found.
    pub fn leave_out_all_but(&mut self, provisioned: ExtentSet, disk: &Disk) -> Result<()> {
        if self.copies_all() {
            self.bytes = data_bytes(disk, Some(&provisioned))?;
            self.provisioned = Some(provisioned);
        }
        Ok(())
    }

    /// Hands all runs that must be copied to `sink`, ascending.
    ///
    /// # Errors
    /// If reading fails, or the sink's.
    pub fn walk(&self, disk: &Disk, sink: &mut dyn FnMut(Run) -> Result<()>) -> Result<()> {
        match &self.filesystem {
            Some(filesystem) => {
                let mut data = |extent| {
                    sink(Run {
                        extent,
                        content: Content::Data,
                    })
                };
                filesystem.walk_used(disk, &mut data).map(drop)
            }
            None => walk_all(disk, self.provisioned.as_ref(), sink),
        }
    }
}

/// How a filesystem that we freeze is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Read-only: a freeze leaves it as it is, be that as a power cut left it.
    ReadOnly,
    /// For writing: a freeze empties its log.
    Writable,
}

/// Whether the map of a filesystem that we hold frozen can be trusted.
enum Settled {
    /// It can.
    Yes,
    /// It cannot, for a reason that no freeze mends: all blocks are copied.
    No(String),
    /// Its log holds changes that no freeze leaves there: it is not this device that is frozen, or
    /// somebody has thawed it.
    NotFrozen(String),
}

impl Mode {
    /// The mode of a mount; none is taken for writable, whose freeze must show.
    pub fn of(mount: Option<&Mount>) -> Self {
        Self::read_only(mount.is_some_and(Mount::is_stopped))
    }

    /// Read-only or not.
    pub fn read_only(is_so: bool) -> Self {
        match is_so {
            true => Self::ReadOnly,
            false => Self::Writable,
        }
    }

    fn open(self, disk: &Disk) -> Result<Opened> {
        match self {
            Self::Writable => fs::open_frozen(disk),
            Self::ReadOnly => fs::open_mounted(disk),
        }
    }

    fn is_settled(self) -> fn(Condition) -> bool {
        match self {
            Self::Writable => Condition::is_settled_if_frozen,
            Self::ReadOnly => Condition::is_settled,
        }
    }

    fn settled(self, opened: &Opened) -> Settled {
        let condition = match opened {
            Opened::Known(filesystem) => filesystem.condition(),
            Opened::AllBlocks { why, .. } => return Settled::No(why.clone()),
            Opened::NoMap(_) | Opened::Unknown => {
                return Settled::No("its filesystem is not known".to_owned());
            }
        };
        match condition {
            condition if self.is_settled()(condition) => Settled::Yes,
            Condition::Dirty {
                reason: reason @ DirtyReason::Log,
            } if self == Self::Writable => Settled::NotFrozen(reason.to_string()),
            Condition::Dirty { reason } => Settled::No(reason.to_string()),
            _ => Settled::No("its log is not settled".to_owned()),
        }
    }
}

/// The refusal of a filesystem that we froze and that shows no freeze.
fn not_frozen(disk: &Disk, why: &str) -> Error {
    let what = format!(
        "though frozen, {why}: the freeze did not hold, or another device is the frozen one"
    );
    Error::new(Kind::Inconsistent, what)
        .on(disk.path())
        .hint("try again; if that does not help, find out who else freezes and thaws it")
}

fn needs(disk: &Disk) -> Needs {
    Needs::of(disk, disk.geometry().logical_sector)
}

/// The grade of content that nothing here can read: offline, nobody writes to it.
fn unread(best: Grade) -> Grade {
    match best {
        Grade::Clean => Grade::Unknown,
        _ => Grade::Crash,
    }
}

/// Offline only what was unmounted is trusted, or has no log. An XFS that was frozen once, and then copied or
/// cut off, is most likely whole too, but nothing proves that nobody wrote between.
fn is_clean(condition: Condition) -> bool {
    matches!(condition, Condition::Clean | Condition::Interrupted)
}

/// All of a disk: what its own medium knows to be holes as zeros, and what is not `provisioned`, where
/// that is known; the rest as data.
fn walk_all(
    disk: &Disk,
    provisioned: Option<&ExtentSet>,
    sink: &mut dyn FnMut(Run) -> Result<()>,
) -> Result<()> {
    let size = Offset(ReadAt::len(disk).0);
    let mut at = Offset::ZERO;
    let mut give = |extent: Extent, content| match extent.is_empty() {
        true => Ok(()),
        false => sink(Run { extent, content }),
    };
    loop {
        let data = disk.next_data(at.0)?;
        let (start, end) = data.map_or((size, size), |(start, end)| (Offset(start), Offset(end)));
        give(Extent::between(at, start), Content::Zero)?;
        let found = Extent::between(start, end);
        match provisioned {
            None => give(found, Content::Data)?,
            Some(set) => {
                let mut at = start;
                for data in set.intersect(found) {
                    give(Extent::between(at, data.start), Content::Zero)?;
                    give(data, Content::Data)?;
                    at = data.end();
                }
                give(Extent::between(at, end), Content::Zero)?;
            }
        }
        if end >= size {
            return Ok(());
        }
        at = end;
    }
}

fn data_bytes(disk: &Disk, provisioned: Option<&ExtentSet>) -> Result<ByteLen> {
    let mut bytes = ByteLen::ZERO;
    walk_all(disk, provisioned, &mut |run| {
        if run.content == Content::Data {
            bytes += run.extent.len;
        }
        Ok(())
    })?;
    Ok(bytes)
}
