//! `apfs`: on a Mac, a snapshot of a mounted volume is copied into a container of its own, which is imaged.
//!
//! A volume of APFS cannot be read block by block while it is in use, and what is built into a Mac with
//! Apple silicon or a T2 is encrypted with keys that never leave it. So Apple's own tools do
//! what only they can: Time Machine's makes a snapshot, asr(8) copies it to a sparse disk image, as it
//! copies whole systems, and that image is then a disk like any other that nobody uses, whose
//! used blocks are read. No writer waits. The instant is that of the snapshot.
//!
//! The snapshot stays mounted while it is copied, so that macOS does not purge it; that it is still the
//! same afterwards, and that the copy has one of the same UUID, proves what was copied. After that it is
//! deleted. The image is attached anew, read-only, before it is read.
//!
//! Everything that is made is on record before, and undone in reverse: by this run, by its guard should
//! it die, or by `cleanup` (`leavings`). The guard cannot read what the tools print: it runs this
//! program again, with `cleanup --run`.
//!
//! No Mac has run it yet: it stands on the manuals, and is tested with tools that pretend.

mod leavings;
pub mod raw;
mod volume;

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdstill_platform::apple::{self, Mode, SECTOR, Snapshot, System};
use holdstill_platform::device::Geometry;
use holdstill_platform::guard::{Owed, Undo, Way};

use crate::error::{Error, IoContext, Kind, Result};
use crate::freeze::offline::Offline;
use crate::freeze::session::Session;
use crate::freeze::step::{Rung, Step};
use crate::freeze::survey::{Survey, worst_grade};
use crate::freeze::{Context, Next, Proof, Still, only};
use crate::image::manifest::Grade;
use crate::progress::{Event, Progress};
use crate::source::{Medium, Source};
use crate::units::ByteLen;

pub use leavings::{Asked, Leavings, Undone};
pub use volume::{Description, Volume, describe};

/// For how long the guard tries to undo everything: an image in use is detached by force at last.
const UNDO_PATIENCE: Duration = Duration::from_secs(180);

/// How often it is looked for what a tool has made and the system shows a little later.
const LOOKS: u32 = 10;

/// Where to allow what macOS keeps from programs.
const FULL_DISK_ACCESS: &str = "allow Full Disk Access to the program that holdstill is started from \
     (Terminal, sshd): System Settings, Privacy & Security";

/// A source whose snapshot was copied, and is read from there.
#[derive(Debug)]
struct Copied {
    offline: Offline,
    instant: jiff::Timestamp,
    // Dropped last: the image is detached when nobody reads it any more.
    making: Making,
}

/// What was made. Undone when this is dropped.
#[derive(Debug)]
struct Making {
    system: System,
    run: Session,
    leavings: Leavings,
    owed: Option<Owed>,
}

/// `apfs`: a snapshot, copied.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "apfs"
    }

    fn about(&self) -> &'static str {
        "macOS: a snapshot of a volume in use, copied to a disk image first"
    }

    fn when(&self) -> &'static str {
        "macOS: a mounted volume of APFS, but the system's own"
    }

    fn how(&self) -> &'static str {
        "Time Machine's tool makes a snapshot, Apple's `asr` copies that to a sparse disk image, and its used blocks are read; see [macOS](#macos)"
    }

    fn rung(&self) -> Rung {
        Rung::AutoOnMac
    }

    fn has_to_freeze(&self) -> bool {
        false
    }

    fn reads_the_source(&self) -> bool {
        false
    }

    fn objection(&self, source: &Source) -> Result<Option<String>> {
        Ok(examine(&System::this(), source)?.err())
    }

    fn geometry(&self, source: &Source) -> Result<Geometry> {
        geometry(source)
    }

    fn undo(&self, source: &Source, run_id: &str) -> Result<Vec<Undo>> {
        undo(source, run_id)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        snapshot(only(sources)?, context)
    }
}

/// What is known of a source that is a volume of APFS on a Mac, without reading it: that nobody can.
///
/// # Errors
/// If it cannot be examined.
pub fn description(source: &Source) -> Result<Option<Description>> {
    let system = System::this();
    match &source.medium {
        Medium::Device(device) if system.is_macos() => describe(&system, &device.name),
        _ => Ok(None),
    }
}

/// Size and sectors of the image that a source is copied into: the copy is no larger.
///
/// # Errors
/// As [`snapshot`].
fn geometry(source: &Source) -> Result<Geometry> {
    let volume = examine(&System::this(), source)?.map_err(|why| no(&source.path, &why))?;
    Ok(Geometry {
        size: volume.image_sectors().saturating_mul(SECTOR),
        logical_sector: 512,
        physical_sector: 4096,
        is_block_device: true,
        read_only: false,
    })
}

/// What the guard undoes should the run die.
///
/// # Errors
/// If this program does not know where it is.
fn undo(source: &Source, run_id: &str) -> Result<Vec<Undo>> {
    let program = std::env::current_exe().context("cannot find", "the program itself")?;
    let words = [
        program.into_os_string(),
        "cleanup".into(),
        "--run".into(),
        run_id.into(),
    ];
    let Medium::Device(device) = &source.medium else {
        return Ok(Vec::new());
    };
    Ok(vec![undo_by(&device.name, words.to_vec())])
}

/// The same by any command, for tests.
pub fn undo_by(volume: &str, words: Vec<OsString>) -> Undo {
    Undo {
        name: undo_name(volume),
        way: Way::Command(words),
        patience: UNDO_PATIENCE,
    }
}

fn undo_name(volume: &str) -> String {
    format!("what was made to copy {volume}")
}

fn no(path: &Path, why: &str) -> Error {
    Error::new(
        Kind::NotApplicable,
        format!("no snapshot can be copied: {why}"),
    )
    .on(path)
}

/// The mounted volume that a source is; or why it cannot be imaged so.
fn examine(system: &System, source: &Source) -> Result<std::result::Result<Volume, String>> {
    if !system.is_macos() {
        return Ok(Err("this system is not macOS".to_owned()));
    }
    let Medium::Device(device) = &source.medium else {
        return Ok(Err("it is a file".to_owned()));
    };
    match &source.mount {
        Some(mount) if mount.fs_type == "apfs" => {
            Volume::examine(system, &device.name, &mount.point)
        }
        Some(_) => Ok(Err("it is no APFS".to_owned())),
        None => Ok(Err("it is not mounted".to_owned())),
    }
}

/// Copies a snapshot of the source.
///
/// # Errors
/// [`Kind::NotApplicable`] if none can be made, or there is no room for the copy; [`Kind::Inconsistent`] if
/// the snapshot was lost meanwhile; else if a tool fails.
pub fn snapshot(source: &Source, context: &Context<'_>) -> Result<Box<dyn Still>> {
    let system = System::this();
    let volume = examine(&system, source)?.map_err(|why| no(&source.path, &why))?;
    snapshot_of(
        &system,
        &volume,
        &scratch_beside(context.output_path),
        context,
    )
}

/// Where the copy is made: beside the output, if that is a file, else in the system's temporary folder. It may
/// lie on the volume that is imaged: the snapshot is older.
fn scratch_beside(output: Option<&Path>) -> PathBuf {
    let is_file = |path: &&Path| match std::fs::metadata(path) {
        Ok(metadata) => metadata.is_file(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    match output.filter(is_file).and_then(Path::parent) {
        Some(folder) if folder.as_os_str().is_empty() => PathBuf::from("."),
        Some(folder) => folder.to_owned(),
        None => std::env::temp_dir(),
    }
}

/// Copies a snapshot of a volume of a system, with all that is made for that in a folder inside of `scratch`.
///
/// # Errors
/// As [`snapshot`].
pub fn snapshot_of(
    system: &System,
    volume: &Volume,
    scratch: &Path,
    context: &Context<'_>,
) -> Result<Box<dyn Still>> {
    let Context { run, progress, .. } = *context;
    let scratch = std::fs::canonicalize(scratch).context("cannot find", scratch)?;
    let (needed, free) = (volume.needed(), ByteLen(apple::free_in(&scratch)?));
    if free < needed {
        let why = format!(
            "the snapshot is copied to a disk image first, which needs {needed} ({} bytes), and {} has {free} \
             ({} bytes) free",
            needed.0,
            scratch.display(),
            free.0
        );
        return Err(Error::new(Kind::NotApplicable, why)
            .on(&volume.mount_point)
            .hint("write the image to a file on a larger disk: the copy is made beside it"));
    }
    let folder = scratch.join(format!(".holdstill.{}.{}", run.id(), volume.id));
    let mut making = Making::begin(system, run, &volume.id, folder)?;
    run.before_freeze(progress)?;
    let begun = Instant::now();
    let made = making.snapshot(volume);
    let instant = jiff::Timestamp::now();
    let took = begun.elapsed();
    run.after_thaw(progress);
    let snapshot = made?;
    progress.event(&Event::Frozen {
        instant: &instant.to_string(),
    });
    let mut warnings = vec![format!(
        "the snapshot was made up to {:.1} s before the instant given",
        took.as_secs_f64()
    )];
    let is_encrypted = making.copy(volume, &snapshot, progress)?;
    if volume.is_encrypted && !is_encrypted {
        warnings.push(
            "the volume is encrypted, and its copy is not: whoever can read the image can read all of it"
                .to_owned(),
        );
    }
    if !volume.group.is_empty() {
        warnings.push(format!(
            "it belongs with other volumes, which macOS copies, too, as they are now: {}",
            volume.group.join(", ")
        ));
    }
    let attached = making.attach(Mode::ReadOnly)?;
    let node = system.node(&attached)?;
    let copy = Source::resolve(&node.to_string_lossy())?;
    let mut offline = Offline::take(&[&copy], context)?;
    for survey in offline.surveys_mut() {
        // A container in order is what asr made of a snapshot of a mounted filesystem.
        if survey.grade == Grade::Clean {
            survey.grade = Grade::Frozen;
        }
        survey.warnings.append(&mut warnings);
    }
    Ok(Box::new(Copied {
        offline,
        instant,
        making,
    }))
}

/// What macOS forbids looks like any failure of a tool.
fn explain(error: impl Into<Error>) -> Error {
    let error = error.into();
    let text = error.to_string();
    let is_forbidden = ["not permitted", "Full Disk Access", "not authorized"]
        .iter()
        .any(|words| text.contains(words));
    match is_forbidden {
        true => Error::new(Kind::Permission, "macOS does not allow it")
            .because(error)
            .hint(FULL_DISK_ACCESS),
        false => error,
    }
}

impl Making {
    /// Writes down what will be made, and makes the folder for it.
    fn begin(system: &System, run: &Session, volume: &str, folder: PathBuf) -> Result<Self> {
        let leavings = Leavings::planned(system, volume, folder).map_err(explain)?;
        let making = Self {
            system: system.clone(),
            run: run.clone(),
            owed: Some(run.owe_undo(&undo_name(volume))?),
            leavings,
        };
        making.note()?;
        for folder in [
            making.leavings.folder.clone(),
            making.leavings.mount_point(),
        ] {
            let made = std::fs::DirBuilder::new().mode(0o700).create(&folder);
            made.context("cannot create", &folder)?;
        }
        Ok(making)
    }

    /// Writes down what is about to be made, in the place of what was written before.
    fn note(&self) -> Result<()> {
        self.run.note(|record| {
            record.apfs.retain(|one| one.folder != self.leavings.folder);
            record.apfs.push(self.leavings.clone());
        })
    }

    /// Has a tool make something. That it is at it is on record meanwhile: it may outlive this run.
    fn by_tool<T>(
        &mut self,
        make: impl FnOnce(&System, &Leavings) -> holdstill_platform::error::Result<T>,
    ) -> Result<T> {
        self.leavings.busy_since = Some(jiff::Timestamp::now().as_second());
        self.note()?;
        let made = make(&self.system, &self.leavings);
        self.leavings.busy_since = None;
        self.note()?;
        made.map_err(explain)
    }

    /// Has a snapshot made of the volume.
    fn snapshot(&mut self, volume: &Volume) -> Result<Snapshot> {
        self.leavings.snapshots.at = jiff::Timestamp::now().as_second();
        let date = self.by_tool(|system, _| system.make_snapshots())?;
        self.leavings.snapshots.date = Some(date);
        self.note()?;
        let mut looks = 0;
        loop {
            if let Some(snapshot) = self.leavings.snapshots.of(&self.system, &volume.id)? {
                return Ok(snapshot);
            }
            looks += 1;
            if looks == LOOKS {
                let what = "Time Machine made no snapshot of it";
                return Err(Error::new(Kind::NotApplicable, what)
                    .on(&volume.mount_point)
                    .hint("it makes them of what it would back up: take the volume off its exclusions"));
            }
            std::thread::sleep(self.system.wait());
        }
    }

    /// Copies the snapshot into the image, and deletes it. Whether the copy is encrypted.
    fn copy(
        &mut self,
        volume: &Volume,
        snapshot: &Snapshot,
        progress: &dyn Progress,
    ) -> Result<bool> {
        let on = self.leavings.mount_point();
        self.by_tool(|system, _| system.mount_snapshot(snapshot, &volume.mount_point, &on))?;
        let sectors = volume.image_sectors();
        self.by_tool(|system, leavings| system.create_image(&leavings.image(), sectors))?;
        let store = self.attach(Mode::ReadWrite)?;
        let system = &self.system;
        let is_over = || progress.stop().is_some();
        let is_done = system.restore(&volume.id, &snapshot.uuid, &store, &is_over);
        if !is_done.map_err(explain)? {
            progress.check()?;
            return Err(Error::new(Kind::Failed, "the copy was ended"));
        }
        if !self.is_held(volume, snapshot)? {
            return Err(Error::new(
                Kind::Inconsistent,
                "macOS gave the snapshot up while it was copied",
            )
            .on(&volume.mount_point)
            .hint("make room on the volume, and try again"));
        }
        let is_encrypted = self.examine_copy(&store, snapshot)?;
        let mut undone = Undone::default();
        if let Err(error) = self.leavings.remove_snapshots(system, &mut undone) {
            log::debug!("{error}: it is tried again at the end");
        }
        // What the system still had to write to it is there then; by force it might not be.
        self.leavings.detach(system, false, &mut undone)?;
        Ok(is_encrypted)
    }

    /// Attaches the image: the partition with the copy.
    fn attach(&mut self, mode: Mode) -> Result<String> {
        let attached = self.by_tool(|system, leavings| system.attach(&leavings.image(), mode));
        Ok(attached?.store)
    }

    /// Whether the snapshot is still there, and still mounted.
    fn is_held(&self, volume: &Volume, snapshot: &Snapshot) -> Result<bool> {
        let is_listed = self.system.snapshots(&volume.id)?.contains(snapshot);
        let point = self.leavings.mount_point();
        Ok(is_listed && self.system.is_mounted_at(snapshot, &point)?)
    }

    /// Makes sure that the partition holds a copy of the snapshot: it has the same UUID then. Whether it is
    /// encrypted.
    fn examine_copy(&self, store: &str, snapshot: &Snapshot) -> Result<bool> {
        for look in 0..LOOKS {
            if look > 0 {
                std::thread::sleep(self.system.wait());
            }
            let containers = self.system.containers()?;
            let ours = containers
                .iter()
                .filter(|one| matches!(&one.stores[..], [only] if only.id == store));
            for volume in ours.flat_map(|container| &container.volumes) {
                let Ok(snapshots) = self.system.snapshots(&volume.id) else {
                    continue;
                };
                if snapshots.iter().any(|copied| copied.uuid == snapshot.uuid) {
                    return Ok(volume.is_encrypted);
                }
            }
        }
        Err(Error::new(
            Kind::Inconsistent,
            "asr says it is done, and there is no copy of the snapshot",
        )
        .on(self.leavings.image()))
    }

    /// Takes everything away. What fails is left to `cleanup`, with the record.
    fn undo(&mut self) -> Result<()> {
        let Some(owed) = self.owed.take() else {
            return Ok(());
        };
        let undone = self.leavings.undo(&self.system);
        self.run.undone(owed);
        let undone = undone.map_err(|error| {
            error.hint("holdstill cleanup takes it away when nobody uses it any more")
        })?;
        for left in undone.left {
            log::warn!("{left}");
        }
        self.run
            .note(|record| record.apfs.retain(|one| one.folder != self.leavings.folder))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            log::warn!("{error}");
        }
    }
}

impl Still for Copied {
    fn surveys(&self) -> &[Survey] {
        self.offline.surveys()
    }

    fn geometry(&self, volume: usize) -> Option<Geometry> {
        self.offline.geometry_of(volume)
    }

    fn next(&mut self, progress: &dyn Progress) -> Result<Next<'_>> {
        self.offline.next(progress)
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let Self {
            offline,
            instant,
            mut making,
        } = *self;
        let proof = offline.prove()?;
        let grade = worst_grade(offline.surveys());
        drop(offline);
        if let Err(error) = making.undo() {
            progress.warn(&format!(
                "what was made for the copy could not be removed: {error}"
            ));
        }
        Ok(Proof {
            grade,
            instant,
            ..proof
        })
    }
}
