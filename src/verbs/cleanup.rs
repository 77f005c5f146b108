//! `cleanup`: removes what killed runs left, and thaws what they left frozen.
//!
//! A run writes down what it is about to freeze or create before it does. Its guard process undoes all
//! of it when the run dies; `cleanup` is for when the guard died too, or the power went. It believes
//! only records whose run is dead (nobody holds its lock) and names that only holdstill gives, so it
//! never touches a live run or anything it did not make.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use holdstill_platform::apple::System;
use holdstill_platform::btrfs;
use holdstill_platform::dm::Takeover;
use holdstill_platform::freeze::MountPoint;
use holdstill_platform::located::Folder;
use holdstill_platform::lock;
use holdstill_platform::lvm::{self, MetadataSnapshot};
use holdstill_platform::mounts;
use holdstill_platform::node::{BlockDevice, DeviceNumber, FileId, disk_sequence};
use holdstill_platform::records::{self, Records};
use holdstill_platform::signals;
use holdstill_platform::trace::{PREFIX, Tracefs};
use holdstill_platform::zfs::{self, Made, Named, Reach, Snapdev};
use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::freeze::apfs::Leavings;
use crate::freeze::session::{FreezeRecord, PartFile, RunRecord, freezing};
use crate::freeze::track::write_trace::NUMBER;
use crate::progress::Progress;

/// For how long what is busy is tried to be removed.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Runs that live and were left alone.
    pub live_runs: Vec<String>,
    /// Dead runs whose leavings were removed.
    pub dead_runs: Vec<String>,
    /// Mount points that were still frozen and were thawed.
    pub thawed: Vec<String>,
    /// Files, trace instances and snapshots that were removed.
    pub removed: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Each thing that was done, and for which run; or would be, see `dry_run`.
    pub actions: Vec<Action>,
    /// Nothing was changed.
    pub dry_run: bool,
    /// The run that is being cleaned up after.
    #[serde(skip)]
    of: Option<(String, String)>,
}

/// One thing that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Action {
    /// `thawed` or `removed`.
    pub action: &'static str,
    /// What sort of thing it is.
    pub kind: &'static str,
    /// Its name or path.
    pub name: String,
    /// The run that left it.
    pub run_id: Option<String>,
    /// When that run began (RFC 3339), where there is a record of it.
    pub begun: Option<String>,
}

impl Report {
    fn note(&mut self, action: &'static str, kind: &'static str, name: &str) {
        let (run_id, begun) = self.of.clone().unzip();
        self.actions.push(Action {
            action,
            kind,
            name: name.to_owned(),
            run_id,
            begun: begun.filter(|begun| !begun.is_empty()),
        });
    }

    fn thawed(&mut self, point: &Path) {
        let point = point.display().to_string();
        self.note("thawed", "mount point", &point);
        self.thawed.push(point);
    }

    fn removed(&mut self, kind: &'static str, name: &str) {
        self.note("removed", kind, name);
        self.removed.push(name.to_owned());
    }

    /// Without a dry run, removes by `remove`, which says whether there was anything; else `is_there` says so.
    fn remove(
        &mut self,
        kind: &'static str,
        name: &str,
        is_there: impl FnOnce() -> Result<bool>,
        remove: impl FnOnce() -> Result<bool>,
    ) -> Result<()> {
        let is_it = match self.dry_run {
            true => is_there()?,
            false => remove()?,
        };
        if is_it {
            self.removed(kind, name);
        }
        Ok(())
    }
}

/// Cleans up after dead runs, or only says what there is to do. Nothing to do is success.
///
/// # Errors
/// If something that a dead run left cannot be undone; everything else was.
pub fn run(dry_run: bool, progress: &dyn Progress) -> Result<Report> {
    let mut report = Report {
        dry_run,
        ..Report::default()
    };
    let records = Records::default();
    let mut trouble = None;
    for found in records.list()? {
        if found.is_alive {
            report.live_runs.push(found.id);
            continue;
        }
        report.of = Some((found.id.clone(), String::new()));
        match undo(&found.content, &mut report) {
            Ok(()) => {
                if !dry_run {
                    records.remove_dead(&found.id)?;
                }
                report.dead_runs.push(found.id);
            }
            Err(error) => {
                progress.warn(&format!("run {}: {error}", found.id));
                trouble = Some(error);
            }
        }
    }
    report.of = None;
    for warning in &report.warnings {
        progress.warn(warning);
    }
    remove_stray_instances(&mut report)?;
    for remove in [remove_stray_snapshots, remove_stray_subvolumes] {
        if let Err(error) = remove(&mut report) {
            progress.warn(&error.to_string());
            trouble = Some(error);
        }
    }
    trouble.map_or(Ok(report), |error| {
        Err(error.hint("what is left of that run stays on record: try again when this is mended"))
    })
}

/// Takes away what a run made to copy volumes of APFS. This is for its guard, which undoes everything else by
/// itself, still holds the run's lock, and cannot read what the tools for that print.
///
/// # Errors
/// [`Kind::NotFound`] if there is no such run, [`Kind::InUse`] if it lives; else if something is left.
pub fn of_run(run_id: &str) -> Result<Report> {
    let runs = Records::default().list()?;
    let none = || Error::new(Kind::NotFound, "there is no record of this run").on(run_id);
    let found = runs
        .into_iter()
        .find(|run| run.id == run_id)
        .ok_or_else(none)?;
    let record = parse(&found.content)?;
    if signals::is_process(record.pid) {
        return Err(Error::new(Kind::InUse, "this run lives").on(run_id));
    }
    let mut report = Report::default();
    undo_apfs(&System::this(), &record.apfs, &mut report)?;
    Ok(report)
}

fn parse(content: &[u8]) -> Result<RunRecord> {
    serde_json::from_slice(content)
        .map_err(|source| Error::new(Kind::Failed, "a run record cannot be read").because(source))
}

/// Takes away what was made to copy volumes of APFS, by the tools of `system`.
///
/// # Errors
/// If something is left.
pub fn undo_apfs(system: &System, leavings: &[Leavings], report: &mut Report) -> Result<()> {
    for leavings in leavings.iter().filter(|_| system.is_macos()) {
        if report.dry_run {
            let folder = leavings.folder.display().to_string();
            report.removed("copy and snapshots of", &folder);
            continue;
        }
        let undone = leavings.undo(system)?;
        for name in undone.removed {
            report.removed("of a copy", &name);
        }
        report.warnings.extend(undone.left);
    }
    Ok(())
}

/// Undoes what a record speaks of: thaw first, for whoever waits.
fn undo(content: &[u8], report: &mut Report) -> Result<()> {
    let record = parse(content)?;
    if let Some((_, begun)) = &mut report.of {
        begun.clone_from(&record.begun);
    }
    // What was frozen last thaws first: the thaw of what lies on it writes to it.
    for freeze in record.freezes.iter().rev() {
        thaw(freeze, report)?;
    }
    for instance in &record.trace_instances {
        let Ok(tracefs) = Tracefs::open() else {
            break;
        };
        let is_there = || Ok(tracefs.leftovers()?.contains(instance));
        let remove = || Ok(tracefs.remove(instance)?);
        report.remove("trace instance", instance, is_there, remove)?;
    }
    for part in &record.parts {
        remove_part_file(part, report)?;
    }
    if !record.dm_devices.is_empty() {
        for left in Takeover::leftovers()? {
            if record
                .dm_devices
                .iter()
                .any(|name| name == left.takeover.name())
            {
                undo_takeover(&left.takeover, report)?;
            }
        }
    }
    undo_apfs(&System::this(), &record.apfs, report)?;
    for pool in &record.thin_pools {
        release_metadata_snapshot(pool, report)?;
    }
    if !record.zfs_snapshots.is_empty() {
        for snapshot in zfs::snapshots()? {
            if record.zfs_snapshots.contains(&snapshot.name) {
                destroy_snapshot(&snapshot, report)?;
            }
        }
    }
    for (name, own) in &record.zfs_snapdev {
        restore_snapdev(name, own.as_deref(), report)?;
    }
    for snapshot in &record.lvm_snapshots {
        // LVM may be gone with the disks it was on.
        if matches!(lvm::exists(snapshot), Ok(true)) {
            remove_snapshot(snapshot, report)?;
        }
    }
    Ok(())
}

/// Thaws what a run was freezing when it died, with its guard; where it is mounted, if it was still
/// frozen. The path alone proves nothing: the filesystem may have been unmounted since, and then the
/// path leads to another one, or the machine was started anew.
fn thaw(freeze: &FreezeRecord, report: &mut Report) -> Result<()> {
    let this_boot = records::this_boot();
    if freeze.boot.is_some() && this_boot.is_some() && freeze.boot != this_boot {
        return Ok(());
    }
    let Ok(device) = freeze.device.parse::<DeviceNumber>() else {
        return Err(Error::new(Kind::Failed, "a run record cannot be read").on(&freeze.point));
    };
    if disk_sequence(device) != freeze.sequence {
        // Another device has its number by now, and nothing is mounted of the one that was meant.
        return Ok(());
    }
    if freezing(&freeze.device, "")?.is_some() {
        // A run that lives has frozen it since, which it could not have if it had still been frozen.
        return Ok(());
    }
    let all = mounts::of_this_process()?;
    let elsewhere = mounts::uncovered(&all, |mount| {
        freeze.sequence.is_some() && mount.device == device
    });
    let points = std::iter::once(&freeze.point).chain(elsewhere.map(|mount| &mount.point));
    for point in points {
        if let Ok(open) = MountPoint::open_on(point, device) {
            if report.dry_run {
                // Whether it is frozen is known only by freezing it.
                let name = point.to_string_lossy();
                report.note("thawed", "mount point, if it is frozen,", &name);
            } else if open.thaw_leftover()? {
                report.thawed(point);
            }
            return Ok(());
        }
    }
    match all.iter().find(|mount| mount.device == device) {
        Some(covered) => {
            let what = "this filesystem may be frozen, and another mount covers its mount point";
            Err(Error::new(Kind::Failed, what)
                .on(&covered.point)
                .hint("unmount what covers it, and try again"))
        }
        // Unmounted everywhere within sight: then nobody waits for it here.
        None => Ok(()),
    }
}

fn release_metadata_snapshot(pool: &str, report: &mut Report) -> Result<()> {
    let Ok(device) = BlockDevice::at(&Path::new("/dev/mapper").join(pool)) else {
        return Ok(());
    };
    let is_there = || Ok(lvm::pool_fill(device.number)?.has_metadata_snapshot);
    let remove = || Ok(MetadataSnapshot::release_leftover(device.number)?);
    let name = format!("the metadata snapshot of {pool}");
    report.remove("from a thin pool", &name, is_there, remove)
}

fn undo_takeover(takeover: &Takeover, report: &mut Report) -> Result<()> {
    report.remove(
        "mapping",
        takeover.name(),
        || Ok(true),
        || {
            takeover.undo_patiently(PATIENCE)?;
            Ok(true)
        },
    )
}

fn remove_snapshot(snapshot: &str, report: &mut Report) -> Result<()> {
    report.remove(
        "snapshot of LVM",
        snapshot,
        || Ok(true),
        || {
            lvm::remove(snapshot)?;
            Ok(true)
        },
    )
}

fn destroy_snapshot(snapshot: &zfs::Found, report: &mut Report) -> Result<()> {
    report.remove(
        "snapshot of ZFS",
        &snapshot.name,
        || Ok(true),
        || {
            if snapshot.is_held {
                let run_id = snapshot.run_id.clone();
                Made::Hold(snapshot.name.clone(), run_id, Reach::Alone).undo()?;
            }
            Made::Snapshot(snapshot.name.clone(), Reach::Alone).undo()?;
            Ok(true)
        },
    )
}

/// Sets the property of a volume back, unless somebody has set it otherwise since.
fn restore_snapdev(name: &str, own: Option<&str>, report: &mut Report) -> Result<()> {
    let Some(Named::Volume(volume)) = zfs::find(name)? else {
        return Ok(());
    };
    let now = volume.snapdev()?;
    if now.own.as_deref() != Some("visible") || own == Some("visible") {
        return Ok(());
    }
    let before = Snapdev {
        own: own.map(str::to_owned),
        ..now
    };
    let what = format!("snapdev=visible of {name}");
    report.remove(
        "property",
        &what,
        || Ok(true),
        || {
            Made::Snapdev(volume, before).undo()?;
            Ok(true)
        },
    )
}

/// Whether this may be the id of a run, and nobody holds its lock.
fn is_dead(run_id: &str) -> bool {
    matches!(lock::is_held(Path::new(lock::FOLDER), run_id), Ok(false))
}

/// Snapshots of a btrfs have a name for a moment only, and no record: they are looked for on all that
/// are mounted.
fn remove_stray_subvolumes(report: &mut Report) -> Result<()> {
    let mut trouble = Ok(());
    for mounted in btrfs::mounted()? {
        trouble = remove_subvolumes_of(&mounted, report).and(trouble);
    }
    trouble
}

fn remove_subvolumes_of(mounted: &btrfs::Mounted, report: &mut Report) -> Result<()> {
    let Some(filesystem) = mounted.open()? else {
        return Ok(());
    };
    let leftovers = match filesystem.leftovers() {
        // Whoever may not look has not made any either.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(()),
        leftovers => leftovers?,
    };
    for left in leftovers {
        if !is_dead(&left.run_id) {
            continue;
        }
        let name = format!(
            "{} (subvolume {} of {})",
            left.name,
            left.id,
            filesystem.path().display()
        );
        report.of = Some((left.run_id.clone(), String::new()));
        let remove = || match filesystem.delete_leftover(&left) {
            Ok(()) => Ok(true),
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        };
        report.remove("snapshot of btrfs", &name, || Ok(true), remove)?;
    }
    Ok(())
}

/// Snapshots without a record are found by their names and tags.
fn remove_stray_snapshots(report: &mut Report) -> Result<()> {
    let mut trouble = Ok(());
    // In a dry run they are there still, although their record told of them.
    let is_known = |report: &Report, name: &str| report.removed.iter().any(|known| known == name);
    for left in Takeover::leftovers()? {
        if is_dead(&left.run_id) && !is_known(report, left.takeover.name()) {
            report.of = Some((left.run_id.clone(), String::new()));
            trouble = undo_takeover(&left.takeover, report).and(trouble);
        }
    }
    for snapshot in lvm::snapshots()? {
        if is_dead(&snapshot.run_id) && !is_known(report, &snapshot.name) {
            report.of = Some((snapshot.run_id.clone(), String::new()));
            trouble = remove_snapshot(&snapshot.name, report).and(trouble);
        }
    }
    for snapshot in zfs::snapshots()? {
        if is_dead(&snapshot.run_id) && !is_known(report, &snapshot.name) {
            report.of = Some((snapshot.run_id.clone(), String::new()));
            trouble = destroy_snapshot(&snapshot, report).and(trouble);
        }
    }
    trouble
}

/// Removes a part file, unless somebody else's file has its name by now.
fn remove_part_file(part: &PartFile, report: &mut Report) -> Result<()> {
    let (Some(folder), Some(name)) = (part.path.parent(), part.path.file_name()) else {
        return Ok(());
    };
    let folder = match Folder::of(folder) {
        Ok(folder) => folder,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // Nobody knew the name before the file was made: without an inode on record the name has to do.
    let is_ours = |found: FileId| part.inode.is_none_or(|inode| inode == found.inode);
    let is_there = || {
        let found = part.path.symlink_metadata();
        Ok(found.is_ok_and(|found| is_ours(FileId::of(&found))))
    };
    let remove = || {
        let removed = folder.remove(name, is_ours);
        removed.map_err(|error| Error::io("cannot remove", error).on(&part.path))
    };
    report.remove(
        "part file",
        &part.path.display().to_string(),
        is_there,
        remove,
    )
}

/// Trace instances go on tracing after their run: those without a record are found by their name.
fn remove_stray_instances(report: &mut Report) -> Result<()> {
    let Ok(tracefs) = Tracefs::open() else {
        return Ok(());
    };
    for name in tracefs.leftovers()? {
        let id = name.strip_prefix(PREFIX).unwrap_or_default();
        let run_id = id.split(NUMBER).next().unwrap_or_default();
        // Whatever does not look like a run of ours is none.
        if !is_dead(run_id) || report.removed.contains(&name) {
            continue;
        }
        report.of = Some((run_id.to_owned(), String::new()));
        let remove = || match tracefs.remove(&name) {
            Ok(is_removed) => Ok(is_removed),
            // Somebody is reading it: then it is not a leftover.
            Err(error) if error.source.kind() == ErrorKind::ResourceBusy => Ok(false),
            Err(error) => Err(error.into()),
        };
        report.remove("trace instance", &name, || Ok(true), remove)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// A stranger's file that has the name of a part file by now is not ours to remove.
    #[test]
    fn a_part_file_is_removed_and_no_other_file_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".image.0123456789abcdef.part");
        let aside = dir.path().join("aside");
        let clean = |inode: Option<u64>| {
            let record = RunRecord {
                parts: vec![PartFile {
                    path: path.clone(),
                    inode,
                }],
                ..RunRecord::default()
            };
            let mut report = Report::default();
            undo(&serde_json::to_vec(&record).unwrap(), &mut report).unwrap();
            report.removed.len()
        };
        std::fs::write(&path, "ours").unwrap();
        let ours = path.metadata().unwrap().ino();
        std::fs::rename(&path, &aside).unwrap();
        std::fs::write(&path, "a stranger's").unwrap();
        assert_eq!(clean(Some(ours)), 0);
        assert_eq!(std::fs::read(&path).unwrap(), b"a stranger's");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&aside, &path).unwrap();
        assert_eq!(clean(Some(ours)), 0);
        assert!(aside.exists());
        std::fs::rename(&aside, &path).unwrap();
        assert_eq!(clean(Some(ours)), 1);
        assert_eq!(clean(Some(ours)), 0);
        // Killed before the inode was on record.
        std::fs::write(&path, "ours").unwrap();
        assert_eq!(clean(None), 1);
        std::fs::remove_dir(dir.path()).unwrap();
        assert_eq!(clean(None), 0);
    }
}
