//! `dm`: the kernel's snapshot target is slid under the live mapping of a device-mapper device (an open
//! LUKS, a hand-made mapping), which is copied while the device is in use. Only when named.
//!
//! The filesystem that is mounted on it is frozen while one system call swaps the table of the device
//! (`holdstill_platform::dm::Takeover` tells how, and what is undone when); everything that can fail
//! was done before. What is overwritten afterwards is kept in a store (`store`), whose room is bounded:
//! it is watched while copying, and a snapshot that may be lost never becomes an image. Nor does one
//! whose device has got another table meanwhile.
//!
//! Nothing is left behind: the names of what is made are on record before, the guard undoes it should
//! the run die, and `cleanup` finds it by its uuids.

mod store;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use holdstill_platform::beneath;
use holdstill_platform::cow_store::CowStore;
use holdstill_platform::device::{Access, Disk};
use holdstill_platform::dm::{self, Fill, Prepared, Refusal, Table, Takeover};
use holdstill_platform::guard::{Owed, Undo, Way};
use holdstill_platform::in_use::User;
use holdstill_platform::node::BlockDevice;
use holdstill_platform::{lock, lvm, records};

use super::freezer::{Expect, Freezer};
use super::mounted::{self, milliseconds};
use super::users::Users;
use super::watched::{self, Undo as _, Watch, Watched, WatchedSnapshot, Watching, percent};
use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::freeze::step::{Rung, Step};
use crate::freeze::{Context, OnePass, Still, only};
use crate::image::manifest::FreezeTimes;
use crate::progress::Event;
use crate::progress::Progress;
use crate::source::{Medium, Source};

/// Targets that may exist twice over the same blocks: they keep nothing in memory, and nothing of their
/// own on disk.
const TARGETS: [&str; 6] = ["linear", "striped", "crypt", "delay", "error", "zero"];

/// When the freeze ends at the latest, by the guard's hand.
const DEADLINE: Duration = Duration::from_secs(10);

/// For how long this run tries to remove what it made, and then its guard.
const PATIENCE: Duration = Duration::from_secs(5);
const UNDO_PATIENCE: Duration = Duration::from_secs(20);

/// A store so full, in percent, is given up: what writers do next may overflow it.
const GIVE_UP_AT: u64 = 96;

/// A takeover that is undone when this is dropped.
#[derive(Debug)]
struct Made {
    takeover: Takeover,
    owed: Option<Owed>,
    run: Session,
    /// One that the user named: what was kept last at its begin may look like a filesystem.
    store: Option<CowStore>,
}

/// What is watched.
#[derive(Debug)]
struct Overlay {
    name: String,
    prepared: Prepared,
}

/// `dm`: a snapshot slid under a mapping.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "dm"
    }

    fn about(&self) -> &'static str {
        "a snapshot slid under a device-mapper device; never chosen by auto"
    }

    fn when(&self) -> &'static str {
        "only when named: a mapping of the device mapper (an open LUKS, `dmsetup`) whose key, if any, is in its table"
    }

    fn how(&self) -> &'static str {
        "the kernel's snapshot target is slid under the live mapping within a freeze of milliseconds, read, and taken away again"
    }

    fn rung(&self) -> Rung {
        Rung::Named
    }

    fn freezes(&self, _: &Source, _: bool) -> bool {
        true
    }

    fn keeps_what_is_overwritten(&self) -> bool {
        true
    }

    fn objection(&self, source: &Source) -> Result<Option<String>> {
        objection(source)
    }

    fn undo(&self, source: &Source, run_id: &str) -> Result<Vec<Undo>> {
        undo(source, run_id)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        snapshot(only(sources)?, context)
    }
}

/// Why the source cannot be imaged this way; `None` if nothing speaks against it.
///
/// # Errors
/// If it cannot be examined.
fn objection(source: &Source) -> Result<Option<String>> {
    let device = match device(source) {
        Ok(device) => device,
        Err(why) => return Ok(Some(why)),
    };
    if device.is_request_based() {
        let why = "it is request-based (multipath), which nothing can be slid under";
        return Ok(Some(why.to_owned()));
    }
    if lvm::is_logical_volume(device) {
        let why =
            "it is a logical volume, which LVM would not know any more; --freeze lvm or track";
        return Ok(Some(why.to_owned()));
    }
    if let Some(why) = why_not(&dm::table(device.number)?) {
        return Ok(Some(why));
    }
    if mounted::has_swap(device)? {
        return Ok(Some("swap space lies on it".to_owned()));
    }
    Ok(rests_beneath_us(device)?.map(str::to_owned))
}

fn device(source: &Source) -> std::result::Result<&BlockDevice, String> {
    match &source.medium {
        Medium::Device(device) if dm::is_mapped(device) => Ok(device),
        Medium::Device(_) => Err("it is no device of the device mapper".to_owned()),
        Medium::File(_) => Err("it is a file".to_owned()),
    }
}

/// What of a table speaks against loading it a second time.
fn why_not(table: &Table) -> Option<String> {
    if table.is_suspended {
        return Some("it is suspended".to_owned());
    }
    if table.targets.is_empty() {
        return Some("it has no table".to_owned());
    }
    table.targets.iter().find_map(|target| {
        let kind = &target.kind;
        if !TARGETS.contains(&kind.as_str()) {
            return Some(format!(
                "a target of the kind `{kind}` is not known to stand a second one beside it"
            ));
        }
        let mut words = target.params.split(' ').skip(1);
        if kind == "crypt" && words.next().is_none_or(|key| key.starts_with(':')) {
            let why = "its key is in the kernel's keyring, out of reach; --freeze track needs none";
            return Some(why.to_owned());
        }
        (kind == "crypt" && words.any(|word| word.starts_with("integrity:")))
            .then(|| "it keeps checksums on another device".to_owned())
    })
}

/// Why a device is one that the run itself stands on: the root filesystem, or what the run writes.
fn rests_beneath_us(device: &BlockDevice) -> Result<Option<&'static str>> {
    let places = [
        ("/", "the root filesystem lies on it"),
        (".", "the current folder lies on it"),
        (records::FOLDER, "the records of runs lie on it"),
        (lock::FOLDER, "the locks of runs lie on it"),
    ];
    for (place, why) in places {
        // What is not there will lie on the root filesystem.
        let Ok(open) = File::open(Path::new(place)) else {
            continue;
        };
        if beneath::file_rests_on(&open, device)? {
            return Ok(Some(why));
        }
    }
    Ok(None)
}

/// What the guard undoes should the run die.
///
/// # Errors
/// If the device mapper cannot be asked.
fn undo(source: &Source, run_id: &str) -> Result<Vec<Undo>> {
    let Ok(device) = device(source) else {
        return Ok(Vec::new());
    };
    let takeover = Takeover::of(device, run_id)?;
    Ok(vec![Undo {
        name: takeover.name().to_owned(),
        way: Way::Takeover(takeover),
        patience: UNDO_PATIENCE,
    }])
}

/// Slides a snapshot under the source.
///
/// # Errors
/// [`Kind::NotApplicable`] if that cannot be done; else if the device mapper fails, or freezing or
/// reading.
pub fn snapshot(source: &Source, context: &Context<'_>) -> Result<Box<dyn Still>> {
    let Context {
        run,
        output,
        all_blocks,
        progress,
        ..
    } = *context;
    let no = |why: String| {
        Error::new(
            Kind::NotApplicable,
            format!("no snapshot can be slid under it: {why}"),
        )
        .on(&source.path)
    };
    let device = device(source).map_err(no)?;
    if let Some(why) = mounted::would_wait_for_itself(device, output)? {
        return Err(no(why.to_owned()).hint("write the image elsewhere, or to a pipe that does"));
    }
    let freezer = match (&source.mount, mounted::device(source)) {
        (Some(_), Ok(_)) => Some(Arc::new(Freezer::open(source, run)?)),
        _ => None,
    };
    // All its mounts are frozen at once, in whatever namespace, by way of the one that we see.
    let users = Users::of(device, |user| {
        freezer.is_some() && matches!(user, User::Mount { .. })
    })?;
    let store = store::of(source, device, context.cow)?;
    let (made, prepared) = Made::prepare(source, device, store, context)?;
    run.before_freeze(progress)?;
    if !made.takeover.is_current()? {
        let what = "somebody has given it another table meanwhile";
        return Err(Error::new(Kind::Inconsistent, what)
            .on(&source.path)
            .hint("try again when nobody changes it"));
    }
    let swapped = swap(source, &prepared, freezer.as_ref(), progress);
    run.after_thaw(progress);
    let (instant, times) = match swapped {
        Ok(swapped) => swapped,
        Err(error) => {
            // It may be why.
            progress.check()?;
            return Err(error);
        }
    };
    progress.event(&Event::Frozen {
        instant: &instant.to_string(),
    });
    progress.event(&Event::Thawed(&times));
    let disk = Disk::open(&BlockDevice::of(prepared.snapshot)?.path(), Access::Read)?;
    let overlay = Overlay {
        name: made.takeover.name().to_owned(),
        prepared,
    };
    let source = Watched {
        disk,
        watch: Watch::start(Box::new(overlay))?,
    };
    Ok(Box::new(WatchedSnapshot {
        survey: users.survey(&source.disk, all_blocks)?,
        source,
        instant,
        freezes: vec![times],
        passes: OnePass::new(context.compare),
        made,
    }))
}

/// Swaps the table, within a freeze if a filesystem is mounted on the device. The instant, and how long
/// writers waited.
fn swap(
    source: &Source,
    prepared: &Prepared,
    freezer: Option<&Arc<Freezer>>,
    progress: &dyn Progress,
) -> Result<(jiff::Timestamp, FreezeTimes)> {
    let explain = |error| {
        Error::io("the device mapper could not swap its table", error)
            .on(&source.path)
            .hint("nothing has changed; the kernel's log may say why")
    };
    let Some(freezer) = freezer else {
        let instant = jiff::Timestamp::now();
        let begin = std::time::Instant::now();
        prepared.swap().map_err(explain)?;
        let times = FreezeTimes {
            purpose: "snapshot".to_owned(),
            freeze_ms: milliseconds(begin.elapsed()),
            drain_ms: 0.0,
            read_ms: 0.0,
            thaw_ms: 0.0,
        };
        return Ok((instant, times));
    };
    freezer.sync(progress)?;
    let mut frozen = freezer.freeze(DEADLINE, progress)?;
    let instant = jiff::Timestamp::now();
    frozen.settle();
    let swapped = prepared.swap();
    let read_ms = milliseconds(frozen.held());
    let thawed = frozen.thaw(Expect::Discards, progress)?;
    swapped.map_err(explain)?;
    Ok((instant, mounted::times("snapshot", &thawed, 0.0, read_ms)))
}

impl Made {
    /// Makes everything but the swap.
    fn prepare(
        source: &Source,
        device: &BlockDevice,
        mut store: CowStore,
        context: &Context<'_>,
    ) -> Result<(Self, Prepared)> {
        let run = context.run;
        let takeover = Takeover::of(device, run.id())?;
        run.note(|record| record.dm_devices.push(takeover.name().to_owned()))?;
        let mut made = Self {
            owed: Some(run.owe_undo(takeover.name())?),
            takeover,
            run: run.clone(),
            store: None,
        };
        let prepared = made.takeover.prepare(store.device);
        store.hand_over();
        made.store = context.cow.device.is_some().then_some(store);
        Ok((made, prepared.map_err(|error| refusal(error, source))?))
    }
}

impl watched::Undo for Made {
    /// Gives the device its table back, and removes everything. If that fails the guard tries again,
    /// and then `cleanup`.
    fn undo(&mut self) -> Result<()> {
        let Some(owed) = self.owed.take() else {
            return Ok(());
        };
        self.takeover.undo_patiently(PATIENCE).map_err(|error| {
            Error::from(error).hint("holdstill cleanup removes it when nobody uses it any more")
        })?;
        self.run.undone(owed);
        if let Some(Err(error)) = self.store.as_ref().map(CowStore::forget_head) {
            log::warn!("{error}");
        }
        Ok(())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            log::warn!("{error}");
        }
    }
}

/// What the device mapper does not do is a refusal, unless it is this machine that cannot.
fn refusal(error: holdstill_platform::error::Error, source: &Source) -> Error {
    match Takeover::refusal(&error) {
        Some(Refusal::Key) => Error::new(
            Kind::NotApplicable,
            "its key is in the kernel's keyring, out of reach",
        )
        .on(&source.path)
        .hint("--freeze track needs no key"),
        Some(Refusal::Table) => Error::new(Kind::NotApplicable, "no snapshot can be slid under it")
            .on(&source.path)
            .because(error)
            .hint("the kernel's log may say why; --freeze names another way"),
        None => error.into(),
    }
}

impl Watching for Overlay {
    fn name(&self) -> &str {
        &self.name
    }

    fn look(&self, while_read: Option<&mut bool>) -> Result<Option<String>> {
        if !self.prepared.is_in_place()? {
            let what = "somebody has given the source another table: the snapshot is worthless";
            return Err(Error::new(Kind::Inconsistent, what).on(&self.name));
        }
        Ok(match dm::fill(self.prepared.snapshot)? {
            Fill::Lost => Some("it overflowed, and what it held is lost".to_owned()),
            Fill::Used { sectors, of } => {
                let full = percent((sectors, of));
                (while_read.is_some() && full >= GIVE_UP_AT)
                    .then(|| format!("its store is {full} % full"))
            }
        })
    }
}

#[cfg(test)]
mod tests;
