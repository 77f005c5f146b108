//! `offline`: nobody has the source mounted, held or open for writing, for as long as the copy takes.
//!
//! An exclusive open does not prove that: it succeeds beside a plain writer. So all users are searched
//! and named, and then the medium itself must tell that nothing was written between the first read
//! and the last: a device by its counters of writes and discards, a file by a read lease. Where
//! neither exists the copy may still be right, but is graded `crash`.

use std::path::Path;
use std::sync::Arc;

use holdstill_platform::counters::{self, Counters};
use holdstill_platform::device::{Access, Disk, Geometry};
use holdstill_platform::exclusive::{Claim, Lease, LeaseAnswer, Stamp};
use holdstill_platform::in_use::{self, User, Users};
use holdstill_platform::node::BlockDevice;

use crate::error::{Error, IoContext, Kind, Result};
use crate::freeze::apfs::raw;
use crate::freeze::{Context, OnePass, Pass, Proof, Still};
use crate::image::manifest::Grade;
use crate::pipeline::read::{OnReadError, READ_ERROR_HINT};
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::run::Run;
use crate::source::{Medium, Source};
use crate::survey::{Survey, worst_grade};

/// A source that nobody writes to.
#[derive(Debug)]
pub struct Offline {
    /// All devices of its filesystem. None is let go before the last has been copied: the map of
    /// each is read from all.
    held: Vec<Held>,
    /// What is on each.
    surveys: Vec<Survey>,
    instant: jiff::Timestamp,
    /// Which of them is being copied.
    volume: usize,
    passes: OnePass,
    compare: bool,
    run: Run,
}

/// One device or file, and how writing to it would show.
#[derive(Debug)]
struct Held {
    disk: Arc<Disk>,
    watch: Watch,
}

/// How writing by somebody else would show.
#[derive(Debug)]
enum Watch {
    Counters {
        device: BlockDevice,
        before: Counters,
        _claim: Claim,
    },
    Lease(Lease),
    /// The file's size and times: a weak witness.
    Stamp(Stamp),
    /// The kernel does not count for this device.
    Nothing {
        _claim: Claim,
    },
}

/// Why nobody may be assumed to leave the source alone; `None` if nothing speaks against it.
///
/// # Errors
/// If the users cannot be searched.
pub fn objection(source: &Source) -> Result<Option<String>> {
    if let Some(why) = raw::objection(source)? {
        return Ok(Some(why));
    }
    let Users { users, .. } = match &source.medium {
        Medium::Device(device) => in_use::of_device(device, &[])?,
        Medium::File(file) => in_use::of_file(*file, &[])?,
    };
    let writer = users.into_iter().find(User::may_write);
    Ok(writer.map(|user| user.to_string()))
}

impl Offline {
    /// Takes hold of a source, or of all devices of one filesystem together.
    ///
    /// # Errors
    /// [`Kind::InUse`] with the name of whoever uses it; else if it cannot be read.
    pub fn hold(sources: &[&Source], context: &Context<'_>) -> Result<Self> {
        context.run.before_freeze(context.progress)?;
        Self::take(sources, context)
    }

    /// The same for something the run itself has made: no hook is run for it.
    pub(super) fn take(sources: &[&Source], context: &Context<'_>) -> Result<Self> {
        let mut held = Vec::new();
        for source in sources {
            held.push(match &source.medium {
                Medium::Device(device) => Held::device(source, device)?,
                Medium::File(_) => Held::file(source)?,
            });
        }
        // Searched for only now: whoever comes later is seen by the watch.
        for (source, Held { disk, .. }) in sources.iter().zip(&held) {
            if let Some(user) = objection(source)? {
                return Err(in_use(disk.path(), &user));
            }
        }
        let instant = jiff::Timestamp::now();
        let weakness = held.iter().find_map(|held| held.watch.weakness());
        let survey = |own: usize| {
            let mut survey = Self::examine(&held, own, context)?;
            if let Some(weakness) = weakness {
                survey.grade = survey.grade.max(Grade::Crash);
                survey.warnings.push(weakness.to_owned());
            }
            Ok(survey)
        };
        Ok(Self {
            surveys: (0..held.len()).map(survey).collect::<Result<_>>()?,
            held,
            instant,
            volume: 0,
            passes: OnePass::new(context.compare),
            compare: context.compare,
            run: context.run.clone(),
        })
    }

    /// Proves that nobody wrote since it was taken.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if somebody did; else if that cannot be told.
    pub(super) fn prove(&self) -> Result<Proof> {
        for Held { disk, watch } in &self.held {
            if !watch.is_quiet(disk)? {
                return Err(Error::new(
                    Kind::Inconsistent,
                    "somebody wrote to the source while it was copied",
                )
                .on(disk.path())
                .hint("find out who, and try again"));
            }
        }
        Ok(Proof {
            grade: worst_grade(&self.surveys),
            instant: self.instant,
            freezes: Vec::new(),
            commit: None,
        })
    }

    /// What was found on its devices, to be judged by who knows more of them.
    pub(super) fn surveys_mut(&mut self) -> &mut [Survey] {
        &mut self.surveys
    }

    /// Size and sectors of one of its devices.
    pub(super) fn geometry_of(&self, volume: usize) -> Option<Geometry> {
        Some(self.held.get(volume)?.disk.geometry())
    }

    /// What is on device `own` of `held`.
    fn examine(held: &[Held], own: usize, context: &Context<'_>) -> Result<Survey> {
        let disk = &held[own].disk;
        let others = held.iter().enumerate().filter(|(n, _)| *n != own);
        let siblings: Vec<Arc<dyn ReadAt>> = others
            .map(|(_, held)| Arc::clone(&held.disk) as Arc<dyn ReadAt>)
            .collect();
        match Survey::of_offline(disk, &siblings, context.all_blocks) {
            Err(error) if error.kind() == Kind::Io => match context.on_read_error {
                OnReadError::Fail => Err(error.hint(READ_ERROR_HINT)),
                OnReadError::Zero => Survey::of_unreadable(disk, &error),
            },
            other => other,
        }
    }
}

fn in_use(path: &Path, user: &str) -> Error {
    Error::new(Kind::InUse, format!("the source is in use: {user}"))
        .on(path)
        .hint("unmount it, or end whatever writes to it")
}

impl Held {
    fn device(source: &Source, device: &BlockDevice) -> Result<Self> {
        let (claim, disk) = match Claim::open(&source.path, Access::Read) {
            Ok(both) => both,
            Err(error) if error.source.kind() == std::io::ErrorKind::ResourceBusy => {
                let user = objection(source)?;
                return Err(in_use(
                    &source.path,
                    user.as_deref().unwrap_or("the kernel says it is held"),
                ));
            }
            Err(error) => return Err(error.into()),
        };
        // What others wrote and the kernel has not passed on yet must count before, not meanwhile.
        disk.sync()?;
        let watch = match counters::of_open(device, &disk.geometry())? {
            None => Watch::Nothing { _claim: claim },
            Some(before) => Watch::Counters {
                device: device.clone(),
                before,
                _claim: claim,
            },
        };
        let disk = Arc::new(disk);
        Ok(Self { disk, watch })
    }

    fn file(source: &Source) -> Result<Self> {
        let disk = Disk::open(&source.path, Access::Read)?;
        let watch = match Lease::ask(disk.path())? {
            LeaseAnswer::Granted(lease) => Watch::Lease(lease),
            LeaseAnswer::Writer => {
                let user = objection(source)?;
                return Err(in_use(
                    disk.path(),
                    user.as_deref()
                        .unwrap_or("somebody has it open for writing"),
                ));
            }
            LeaseAnswer::Unsupported(_) => {
                let metadata =
                    std::fs::metadata(disk.path()).context("cannot examine", disk.path())?;
                Watch::Stamp(Stamp::of(&metadata))
            }
        };
        let disk = Arc::new(disk);
        Ok(Self { disk, watch })
    }
}

impl Watch {
    /// Why the watch could miss a writer.
    fn weakness(&self) -> Option<&'static str> {
        match self {
            Self::Counters { .. } | Self::Lease(_) => None,
            Self::Stamp(_) => Some(
                "this file cannot be protected from writers (no leases here): only its size and \
                 times are compared",
            ),
            Self::Nothing { .. } => Some(counters::NOT_KEPT),
        }
    }

    /// Whether nobody wrote since the watch began.
    fn is_quiet(&self, disk: &Disk) -> Result<bool> {
        Ok(match self {
            Self::Counters { device, before, .. } => {
                disk.sync()?;
                let now = counters::of_open(device, &disk.geometry())?;
                now.is_some_and(|now| now.nothing_written_since(before))
            }
            Self::Lease(lease) => lease.is_whole()?,
            Self::Stamp(before) => {
                let metadata =
                    std::fs::metadata(disk.path()).context("cannot examine", disk.path())?;
                Stamp::of(&metadata) == *before
            }
            Self::Nothing { .. } => true,
        })
    }
}

impl Still for Offline {
    fn surveys(&self) -> &[Survey] {
        &self.surveys
    }

    fn next_pass(&mut self, _: &dyn Progress) -> Result<Option<Pass<'_>>> {
        let purpose = loop {
            match self.passes.next() {
                Some(purpose) => break purpose,
                None if self.volume + 1 < self.held.len() => {
                    self.volume += 1;
                    self.passes = OnePass::new(self.compare);
                }
                None => return Ok(None),
            }
        };
        let (held, survey) = (&self.held[self.volume], &self.surveys[self.volume]);
        Ok(Some(Pass::over(self.volume, &held.disk, survey, purpose)))
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let proof = self.prove();
        self.run.after_thaw(progress);
        proof
    }
}
