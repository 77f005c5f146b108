//! `zfs`: a snapshot of a zvol is copied while the volume is in use.
//!
//! ZFS makes a snapshot of what the volume holds at that moment, and knows nothing of the filesystem on
//! it: that is frozen around it, for as long as the tool takes. The snapshot then has a read-only
//! device of its own, if the property `snapdev` of the volume is `visible`; it is made so, and set back
//! afterwards. A hold keeps everybody else from destroying the snapshot meanwhile.
//!
//! Everything that is made is on record before, and undone in reverse: by this run, by its guard should
//! it die, or by `cleanup`.

pub mod dataset;

use std::sync::Arc;
use std::time::Duration;

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::guard::{Owed, Undo};
use holdstill_platform::in_use::{self, User};
use holdstill_platform::zfs::{self, Made, Reach, Volume};

use super::freezer::{Expect, Freezer};
use super::mounted::{self, milliseconds};
use super::users::Users;
use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::freeze::step::Step;
use crate::freeze::survey::Survey;
use crate::freeze::{Context, Next, OnePass, Proof, Still, only};
use crate::image::manifest::FreezeTimes;
use crate::progress::{Event, Progress};
use crate::source::{Medium, Source};

/// When the freeze ends at the latest, by the guard's hand: a snapshot waits for what the pool is
/// writing out.
const DEADLINE: Duration = Duration::from_secs(30);

/// How often something that is busy is tried to be undone, and how long to wait between.
const TRIES: u32 = 5;
const NAP: Duration = Duration::from_millis(300);

/// A source whose snapshot is read.
#[derive(Debug)]
pub struct Zvol {
    disk: Disk,
    survey: Survey,
    instant: jiff::Timestamp,
    freezes: Vec<FreezeTimes>,
    passes: OnePass,
    // Dropped last: it is destroyed when nobody reads it any more.
    makings: Makings,
}

/// What was made, in order; undone in reverse when this is dropped.
#[derive(Debug)]
struct Makings {
    made: Vec<(Made, Owed)>,
    run: Session,
}

/// `zfs`: a snapshot of a volume.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "zfs"
    }

    fn about(&self) -> &'static str {
        "a snapshot of a ZFS volume, or the stream of a dataset"
    }

    fn when(&self) -> &'static str {
        "a volume of ZFS (zvol), or a dataset"
    }

    fn how(&self) -> &'static str {
        "what is mounted on the volume is frozen while ZFS makes a snapshot, which is held, read and destroyed; of a dataset the image keeps the stream of `zfs send`"
    }

    fn freezes(&self, source: &Source, _: bool) -> bool {
        source.mount.is_some()
    }

    fn objection(&self, source: &Source) -> Result<Option<String>> {
        objection(source)
    }

    fn undo(&self, source: &Source, run_id: &str) -> Result<Vec<Undo>> {
        undo(source, run_id)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        Ok(Box::new(Zvol::snapshot(only(sources)?, context)?))
    }
}

/// Why the source cannot be imaged by a snapshot; `None` if nothing speaks against it.
///
/// # Errors
/// If it cannot be examined.
fn objection(source: &Source) -> Result<Option<String>> {
    let Medium::Device(device) = &source.medium else {
        return Ok(Some("it is a file".to_owned()));
    };
    if zfs::volume_of(device)?.is_none() {
        return Ok(Some("it is no volume of ZFS".to_owned()));
    }
    for swap in in_use::swaps()? {
        if swap.device == Some(device.number) {
            return Ok(Some("it is swap space in use".to_owned()));
        }
    }
    Ok(None)
}

/// What the guard undoes should the run die.
///
/// # Errors
/// If the tools are missing or fail.
fn undo(source: &Source, run_id: &str) -> Result<Vec<Undo>> {
    let volume = volume(source)?;
    let makings = plan(&volume, run_id)?;
    Ok(makings
        .iter()
        .map(Made::to_undo)
        .collect::<std::result::Result<_, _>>()?)
}

fn volume(source: &Source) -> Result<Volume> {
    let volume = match &source.medium {
        Medium::Device(device) => zfs::volume_of(device)?,
        Medium::File(_) => None,
    };
    let none = || Error::new(Kind::NotApplicable, "it is no volume of ZFS").on(&source.path);
    volume.ok_or_else(none)
}

/// What will be made.
fn plan(volume: &Volume, run_id: &str) -> Result<Vec<Made>> {
    let snapshot = zfs::snapshot_name(&volume.name, run_id);
    let snapdev = volume.snapdev()?;
    let mut plan = Vec::new();
    if !snapdev.is_visible {
        plan.push(Made::Snapdev(volume.clone(), snapdev));
    }
    plan.push(Made::Snapshot(snapshot.clone(), Reach::Alone));
    plan.push(Made::Hold(snapshot, run_id.to_owned(), Reach::Alone));
    Ok(plan)
}

impl Zvol {
    /// Makes a snapshot of the source.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if none can be made; else if ZFS fails, or freezing or reading.
    pub fn snapshot(source: &Source, context: &Context<'_>) -> Result<Self> {
        let Context {
            run,
            output,
            all_blocks,
            progress,
            ..
        } = *context;
        let volume = volume(source)?;
        let Medium::Device(device) = &source.medium else {
            return Err(Error::new(Kind::NotApplicable, "it is no device").on(&source.path));
        };
        let freezer = match (&source.mount, mounted::device(source)) {
            (Some(_), Ok(_)) => Some(Arc::new(Freezer::open(source, run)?)),
            _ => None,
        };
        // All its mounts are frozen at once, in whatever namespace, by way of the one that we see.
        let users = Users::of(device, |user| {
            freezer.is_some() && matches!(user, User::Mount { .. })
        })?;
        if freezer.is_some()
            && let Some(why) = mounted::would_wait_for_itself(device, output)?
        {
            return Err(Error::new(
                Kind::NotApplicable,
                format!("it cannot be frozen for a snapshot: {why}"),
            )
            .on(&source.path)
            .hint("write the image elsewhere, or to a pipe that does"));
        }
        run.before_freeze(progress)?;
        let mut makings = Makings::new(run);
        let plan = plan(&volume, run.id())?;
        let snapshot = zfs::snapshot_name(&volume.name, run.id());
        run.note(|record| {
            record.zfs_snapshots.push(snapshot.clone());
            for made in &plan {
                if let Made::Snapdev(volume, snapdev) = made {
                    let before = (volume.name.clone(), snapdev.own.clone());
                    record.zfs_snapdev.push(before);
                }
            }
        })?;
        let mut instant = jiff::Timestamp::now();
        let mut freezes = Vec::new();
        for made in plan {
            let make = makings.make(made, |made| match made {
                Made::Snapdev(volume, _) => Ok(zfs::show_snapshots(volume)?),
                Made::Hold(name, run_id, reach) => Ok(zfs::hold(name, run_id, *reach)?),
                Made::Snapshot(..) => {
                    let frozen = freeze_and_snapshot(&volume, freezer.as_ref(), run, progress);
                    run.after_thaw(progress);
                    let (at, times) = frozen?;
                    instant = at;
                    freezes.extend(times);
                    Ok(())
                }
            });
            make.map_err(|error| error.on(&source.path))?;
        }
        progress.event(&Event::Frozen {
            instant: &instant.to_string(),
        });
        for times in &freezes {
            progress.event(&Event::Thawed(times));
        }
        let device = zfs::device_of_snapshot(&snapshot)?;
        let disk = Disk::open(&device.path(), Access::Read)?;
        let survey = users.survey(&disk, all_blocks)?;
        Ok(Self {
            disk,
            survey,
            instant,
            freezes,
            passes: OnePass::new(context.compare),
            makings,
        })
    }
}

/// A snapshot that could not be made. Another step may do, unless the hooks ran around this one.
fn failed(error: holdstill_platform::error::Error, run: &Session) -> Error {
    match run.has_hooks() {
        true => error.into(),
        false => Error::from(error).undone(),
    }
}

/// Makes the snapshot, within a freeze if a filesystem is mounted on the volume. The instant, and how
/// long writers were blocked.
fn freeze_and_snapshot(
    volume: &Volume,
    freezer: Option<&Arc<Freezer>>,
    run: &Session,
    progress: &dyn Progress,
) -> Result<(jiff::Timestamp, Option<FreezeTimes>)> {
    let Some(freezer) = freezer else {
        let made = zfs::snapshot(&volume.name, run.id(), Reach::Alone);
        made.map_err(|error| failed(error, run))?;
        return Ok((jiff::Timestamp::now(), None));
    };
    freezer.sync(progress)?;
    let mut frozen = freezer.freeze(DEADLINE, progress)?;
    let instant = jiff::Timestamp::now();
    frozen.settle();
    let made = zfs::snapshot(&volume.name, run.id(), Reach::Alone);
    let read_ms = milliseconds(frozen.held());
    let thawed = frozen.thaw(Expect::Discards, progress);
    if let (Err(_), Ok(())) = (&thawed, &made) {
        // It was thawed too early: what the snapshot holds may be torn.
        let name = zfs::snapshot_name(&volume.name, run.id());
        Made::Snapshot(name, Reach::Alone).undo()?;
    }
    let thawed = thawed?;
    made.map_err(|error| failed(error, run))?;
    let times = mounted::times("snapshot", &thawed, 0.0, read_ms);
    Ok((instant, Some(times)))
}

impl Makings {
    fn new(run: &Session) -> Self {
        Self {
            made: Vec::new(),
            run: run.clone(),
        }
    }

    /// Makes one more thing, which is owed to be undone from before it is begun.
    fn make(&mut self, made: Made, make: impl FnOnce(&Made) -> Result<()>) -> Result<()> {
        let owed = self.run.owe_undo(&made.name())?;
        match make(&made) {
            Ok(()) => {
                self.made.push((made, owed));
                Ok(())
            }
            Err(error) => {
                // A tool that failed has made nothing.
                self.run.undone(owed);
                Err(error)
            }
        }
    }

    /// Undoes everything, the latest first. What fails is left to the guard, and then to `cleanup`.
    fn undo(&mut self) -> Result<()> {
        let mut trouble = None;
        while let Some((made, owed)) = self.made.pop() {
            match undo_patiently(&made) {
                Ok(()) => self.run.undone(owed),
                Err(error) => trouble = Some(error),
            }
        }
        trouble.map_or(Ok(()), |error| {
            Err(error.hint("holdstill cleanup undoes it when nobody uses it any more"))
        })
    }
}

fn undo_patiently(made: &Made) -> Result<()> {
    for _ in 1..TRIES {
        if made.undo().is_ok() {
            return Ok(());
        }
        // udev looks at a new device, too.
        std::thread::sleep(NAP);
    }
    Ok(made.undo()?)
}

impl Drop for Makings {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            log::warn!("{error}");
        }
    }
}

impl Still for Zvol {
    fn surveys(&self) -> &[Survey] {
        std::slice::from_ref(&self.survey)
    }

    fn next(&mut self, _: &dyn Progress) -> Result<Next<'_>> {
        Ok(self.passes.over(&self.disk, &self.survey).into())
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let Self {
            disk,
            survey,
            instant,
            freezes,
            mut makings,
            ..
        } = *self;
        drop(disk);
        if let Err(error) = makings.undo() {
            progress.warn(&format!("the snapshot could not be removed: {error}"));
        }
        Ok(Proof {
            grade: survey.grade,
            instant,
            freezes,
            commit: None,
        })
    }
}
