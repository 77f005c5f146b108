//! `offline`: nobody has the source mounted, held or open for writing, for as long as the copy takes.
//!
//! An exclusive open does not prove that: it succeeds beside a plain writer. So all users are searched
//! and named, before the first read and after the last, and the medium itself must tell that nothing was
//! written between the two: a device by its counters of writes and discards, and by what lies below it
//! ([`Witness`]); a file by a read lease. A device whose writes the kernel does not count is claimed,
//! and nobody may have had it open for writing meanwhile. A filesystem that is mounted read-only wherever it
//! is mounted holds still as well: that is proven in the same way. Where none of that can be told, the copy may
//! still be right, but all blocks are copied, and it is graded `crash`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use holdstill_platform::counters::{self, Counters};
use holdstill_platform::device::{Access, Disk, Geometry};
use holdstill_platform::exclusive::{Claim, Lease, LeaseAnswer, Stamp};
use holdstill_platform::in_use::{self, User, Users};
use holdstill_platform::node::BlockDevice;
use holdstill_platform::witness::Witness;

use crate::error::{Error, IoContext, Kind, Result};
use crate::freeze::apfs::raw;
use crate::freeze::session::Session;
use crate::freeze::step::{Rung, Step};
use crate::freeze::survey::{Survey, worst_grade};
use crate::freeze::{Context, Next, OnePass, Pass, Proof, Still, Turn};
use crate::image::manifest::Grade;
use crate::pipeline::read::{OnReadError, READ_ERROR_HINT};
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::source::{Medium, Source, whole};

/// `offline`: nobody uses the source.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "offline"
    }

    fn about(&self) -> &'static str {
        "nobody uses it"
    }

    fn when(&self) -> &'static str {
        "nobody has it mounted, held or open for writing"
    }

    fn how(&self) -> &'static str {
        "held exclusively; the device's own counters of writes, and those of what lies below it (a lease, for a file), prove that nobody wrote meanwhile. A filesystem that is mounted read-only everywhere also counts"
    }

    fn rung(&self) -> Rung {
        Rung::AutoEverywhere
    }

    fn turn(&self, _: bool) -> Turn {
        Turn::Unused
    }

    fn has_to_freeze(&self) -> bool {
        false
    }

    fn objection(&self, source: &Source) -> Result<Option<String>> {
        objection(source)
    }

    fn siblings(&self, source: &Source) -> Result<Vec<Source>> {
        whole::siblings(source)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        Ok(Box::new(Offline::hold(sources, context)?))
    }
}

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
    /// The hooks stand around its copy.
    hooks_around_copy: bool,
    run: Session,
}

/// One device or file, and how writing to it would show.
#[derive(Debug)]
struct Held {
    source: Source,
    disk: Arc<Disk>,
    watch: Watch,
}

/// How writing by somebody else would show.
#[derive(Debug)]
enum Watch {
    Counters {
        device: BlockDevice,
        before: Counters,
        below: Witness,
        /// `None` where it is mounted read-only.
        _claim: Option<Claim>,
    },
    Lease(Lease),
    /// The file's size and times: a weak witness.
    Stamp(Stamp),
    /// The kernel does not count for this device: nobody had it open for writing.
    Nodes {
        below: Witness,
        claim: Option<Claim>,
    },
}

/// Why nobody may be assumed to leave the source alone; `None` if nothing speaks against it.
///
/// # Errors
/// If the users cannot be searched.
fn objection(source: &Source) -> Result<Option<String>> {
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
        if context.hooks_around_copy {
            context.run.before_freeze(context.progress)?;
        }
        Ok(Self {
            hooks_around_copy: context.hooks_around_copy,
            ..Self::take(sources, context)?
        })
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
            // A map that somebody may write to meanwhile is not to be trusted.
            let all_blocks = context.all_blocks || weakness.is_some();
            let mut survey = Self::examine(&held, own, all_blocks, context.on_read_error)?;
            if let Some(weakness) = &weakness {
                survey.grade = survey.grade.max(Grade::Crash);
                survey.warnings.push(weakness.clone());
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
            hooks_around_copy: false,
            run: context.run.clone(),
        })
    }

    /// Proves that nobody wrote since it was taken.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if somebody did; else if that cannot be told.
    pub(super) fn prove(&self) -> Result<Proof> {
        for Held {
            source,
            disk,
            watch,
        } in &self.held
        {
            // Whoever has it open for writing now is found here, whoever had it by the watch.
            let why = match objection(source)? {
                Some(user) => Some(user),
                None => watch.trace_of_writing(disk)?,
            };
            if let Some(why) = why {
                return Err(Error::new(
                    Kind::Inconsistent,
                    "somebody may have written to the source while it was copied",
                )
                .on(disk.path())
                .because(why)
                .hint("the copy was discarded; end whatever writes to it, and try again"));
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
    fn examine(
        held: &[Held],
        own: usize,
        all_blocks: bool,
        on_read_error: OnReadError,
    ) -> Result<Survey> {
        let disk = &held[own].disk;
        let others = held.iter().enumerate().filter(|(n, _)| *n != own);
        let siblings: Vec<Arc<dyn ReadAt>> = others
            .map(|(_, held)| Arc::clone(&held.disk) as Arc<dyn ReadAt>)
            .collect();
        match Survey::of_offline(disk, &siblings, all_blocks) {
            Err(error) if error.kind() == Kind::Io => match on_read_error {
                OnReadError::Fail => Err(error.hint(READ_ERROR_HINT)),
                OnReadError::Zero => Survey::of_unreadable(disk, &error),
            },
            other => other,
        }
    }
}

/// Claims a device and opens it; without a claim where it is mounted read-only: whoever has it mounted
/// keeps us from claiming it, and writes nothing.
fn claim(source: &Source, device: &BlockDevice) -> Result<(Option<Claim>, Disk)> {
    let mut tries = CLAIMS;
    loop {
        match Claim::open(&source.path, Access::Read) {
            Ok((claim, disk)) => return Ok((Some(claim), disk)),
            Err(error) if error.source.kind() == std::io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(user) = objection(source)? {
            return Err(in_use(&source.path, &user));
        }
        if is_mounted_read_only(device)? {
            return Ok((None, Disk::open(&source.path, Access::Read)?));
        }
        // Somebody who cannot be seen: tools that look at a device claim it for a moment.
        tries -= 1;
        if tries == 0 {
            return Err(in_use(&source.path, "the kernel says it is held"));
        }
        std::thread::sleep(NAP);
    }
}

/// How often a device is tried to be claimed that nobody seems to hold, and how long to wait between.
const CLAIMS: u32 = 20;
const NAP: Duration = Duration::from_millis(50);

/// Whether all that uses a device is mounts that nothing can be written through.
fn is_mounted_read_only(device: &BlockDevice) -> Result<bool> {
    let users = in_use::of_device(device, &[])?.users;
    let is_mount = |user: &User| matches!(user, User::Mount { .. } | User::Btrfs { .. });
    Ok(users.iter().any(is_mount) && !users.iter().any(User::may_write))
}

fn in_use(path: &Path, user: &str) -> Error {
    Error::new(Kind::InUse, format!("the source is in use: {user}"))
        .on(path)
        .hint("unmount it, or end whatever writes to it")
}

impl Held {
    fn device(source: &Source, device: &BlockDevice) -> Result<Self> {
        let (claim, disk) = claim(source, device)?;
        // What others wrote and the kernel has not passed on yet must count before, not meanwhile.
        disk.sync()?;
        let below = Witness::of_device(device)?;
        let watch = match counters::of_open(device, &disk.geometry())? {
            None => Watch::Nodes { below, claim },
            Some(before) => Watch::Counters {
                device: device.clone(),
                before,
                below,
                _claim: claim,
            },
        };
        Ok(Self {
            source: source.clone(),
            disk: Arc::new(disk),
            watch,
        })
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
        Ok(Self {
            source: source.clone(),
            disk: Arc::new(disk),
            watch,
        })
    }
}

impl Watch {
    /// Why the watch could miss a writer.
    fn weakness(&self) -> Option<String> {
        match self {
            Self::Lease(_) => None,
            Self::Counters { below, .. } => below.blind_spot().map(str::to_owned),
            Self::Stamp(_) => Some(
                "this file cannot be protected from writers (no leases here): only its size and \
                 times are compared"
                    .to_owned(),
            ),
            Self::Nodes { below, claim } => match below.watches_its_nodes() && claim.is_some() {
                true => below.blind_spot().map(str::to_owned),
                false => Some(counters::NOT_KEPT.to_owned()),
            },
        }
    }

    /// How it shows that somebody may have written since the watch began, in words; `None` if nobody has.
    fn trace_of_writing(&self, disk: &Disk) -> Result<Option<String>> {
        let io = |error| Error::io("cannot tell whether it was written to", error).on(disk.path());
        Ok(match self {
            Self::Counters {
                device,
                before,
                below,
                ..
            } => {
                disk.sync()?;
                let now = counters::of_open(device, &disk.geometry())?;
                match now {
                    None => Some("the kernel no longer counts what is written to it".to_owned()),
                    Some(now) if !now.nothing_written_since(before) => {
                        Some("its counters of writes have grown".to_owned())
                    }
                    Some(now) => {
                        let read = disk.is_direct().then(|| disk.sectors_read());
                        let read = read.map(|sectors| (sectors, before, &now));
                        below.trace_of_writing(read).map_err(io)?
                    }
                }
                .or(changed_below(below).map_err(io)?)
            }
            Self::Nodes { below, .. } => {
                disk.sync()?;
                let had_writer = below.watches_its_nodes() && below.was_opened_for_writing();
                had_writer
                    .then(|| "somebody had it open for writing".to_owned())
                    .or(below.trace_of_writing(None).map_err(io)?)
                    .or(changed_below(below).map_err(io)?)
            }
            Self::Lease(lease) => {
                let was_asked = "somebody asked to write to it, or did";
                (!lease.is_whole()?).then(|| was_asked.to_owned())
            }
            Self::Stamp(before) => {
                let metadata =
                    std::fs::metadata(disk.path()).context("cannot examine", disk.path())?;
                let is_same = Stamp::of(&metadata) == *before;
                (!is_same).then(|| "its size or times have changed".to_owned())
            }
        })
    }
}

fn changed_below(below: &Witness) -> std::io::Result<Option<String>> {
    let changed = "size or times of the file below it have changed";
    Ok((!below.files_are_unchanged()?).then(|| changed.to_owned()))
}

impl Still for Offline {
    fn surveys(&self) -> &[Survey] {
        &self.surveys
    }

    fn next(&mut self, _: &dyn Progress) -> Result<Next<'_>> {
        let purpose = loop {
            match self.passes.next() {
                Some(purpose) => break purpose,
                None if self.volume + 1 < self.held.len() => {
                    self.volume += 1;
                    self.passes = OnePass::new(self.compare);
                }
                None => return Ok(Next::Over),
            }
        };
        let (held, survey) = (&self.held[self.volume], &self.surveys[self.volume]);
        Ok(Next::Pass(Pass::over(
            self.volume,
            &held.disk,
            survey,
            purpose,
        )))
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let proof = self.prove();
        if self.hooks_around_copy {
            self.run.after_thaw(progress);
        }
        proof
    }
}
