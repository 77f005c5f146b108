//! What a run makes to copy a snapshot, and how it is taken away again: by the run itself, by its guard, or
//! by `cleanup`, all by what the run has written down.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdstill_platform::apple::{Snapshot, System};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::volume::is_of_the_system;
use crate::error::{Error, IoContext, Kind, Result};

/// How often something that is busy is tried to be undone; the last time by force, where there is such.
const TRIES: u32 = 5;

/// For how many waits a snapshot may still appear that a killed run has asked for.
const APPEARING: u32 = 30;

/// Between asking for a snapshot and the time in its name there is at most this.
const TAKES: Duration = Duration::from_secs(120);

/// What is made: written down before it is, and forgotten when it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leavings {
    /// A folder of ours that nobody else puts anything into, by its whole path.
    pub folder: PathBuf,
    /// The snapshots.
    pub snapshots: Asked,
}

/// The snapshots of one moment: Time Machine's tool makes one of every volume that it backs up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// When they were asked for: seconds since 1970.
    pub at: i64,
    /// Whether the tool may still be at it.
    pub is_being_made: bool,
    /// The date in their names, as soon as it is known: `2026-03-24-180000`.
    pub date: Option<String>,
    /// What volumes there were, by UUID, and the UUIDs of the snapshots that each had before. Those are
    /// not ours.
    pub before: Vec<(String, Vec<String>)>,
}

/// What came of undoing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// What is gone.
    pub removed: Vec<String>,
    /// What was left alone since nothing tells whose it is.
    pub left: Vec<String>,
}

impl Leavings {
    /// What will be made, by a run that has not begun to.
    ///
    /// # Errors
    /// If the volumes cannot be listed.
    pub(super) fn planned(system: &System, folder: PathBuf) -> Result<Self> {
        let mut before = Vec::new();
        for volume in system.containers()?.into_iter().flat_map(|one| one.volumes) {
            if volume.is_locked || volume.roles.iter().any(|role| is_of_the_system(role)) {
                continue;
            }
            // One that cannot be asked is never touched either.
            if let (Some(uuid), Ok(snapshots)) = (volume.uuid, system.snapshots(&volume.id)) {
                let snapshots = snapshots.into_iter().map(|snapshot| snapshot.uuid);
                before.push((uuid, snapshots.collect()));
            }
        }
        Ok(Self {
            folder,
            snapshots: Asked {
                at: Timestamp::now().as_second(),
                is_being_made: false,
                date: None,
                before,
            },
        })
    }

    /// The disk image.
    pub fn image(&self) -> PathBuf {
        self.folder.join("copy.sparseimage")
    }

    /// Where the snapshot is mounted.
    pub fn mount_point(&self) -> PathBuf {
        self.folder.join("snapshot")
    }

    /// Takes everything away that is there, the latest first. To be called again if it fails.
    ///
    /// # Errors
    /// If something is still there; as much else as possible is gone.
    pub fn undo(&self, system: &System) -> Result<Undone> {
        let mut undone = Undone::default();
        let image = self.remove_image(system, &mut undone);
        let snapshots = self.remove_snapshots(system, &mut undone);
        let folder = match image.is_ok() && snapshots.is_ok() {
            true => remove_folder(&self.folder, &mut undone),
            false => Ok(()),
        };
        image.and(snapshots).and(folder).map(|()| undone)
    }

    /// Detaches the image and removes its file.
    pub(super) fn remove_image(&self, system: &System, undone: &mut Undone) -> Result<()> {
        let image = self.image();
        self.detach(system, undone)?;
        match std::fs::remove_file(&image) {
            Ok(()) => undone.removed.push(image.display().to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("cannot remove", &image),
        }
        // A tool that has outlived its run may have attached it in between.
        self.detach(system, undone)
    }

    /// Detaches the image.
    pub(super) fn detach(&self, system: &System, undone: &mut Undone) -> Result<()> {
        for disk in system.attached(&self.image())? {
            patiently(system, |force| system.detach(&disk, force))?;
            undone
                .removed
                .push(format!("{disk} ({})", self.image().display()));
        }
        Ok(())
    }

    /// Unmounts the snapshot, and deletes those of its moment.
    pub(super) fn remove_snapshots(&self, system: &System, undone: &mut Undone) -> Result<()> {
        let point = self.mount_point();
        if system.mounted_at(&point)?.is_some() {
            patiently(system, |force| system.unmount(&point, force))?;
            undone
                .removed
                .push(format!("the mount at {}", point.display()));
        }
        remove_folder(&point, undone)?;
        let mut waits = 0;
        loop {
            match self.snapshots.ours(system)? {
                Ours::These(snapshots) => {
                    for (volume, snapshot) in snapshots {
                        patiently(system, |_| system.delete_snapshot(&volume, &snapshot.uuid))?;
                        undone
                            .removed
                            .push(format!("{} of {volume}", snapshot.name));
                    }
                    return Ok(());
                }
                Ours::NoneYet if waits < APPEARING => {
                    waits += 1;
                    std::thread::sleep(system.wait());
                }
                Ours::NoneYet => return Ok(()),
                Ours::AnyOf(dates) => {
                    undone.left.push(format!(
                        "one of the snapshots of {} may be left of a killed run, and which is not known: \
                         macOS deletes both within a day",
                        dates.join(" and ")
                    ));
                    return Ok(());
                }
            }
        }
    }
}

/// Which snapshots are ours.
#[derive(Debug)]
enum Ours {
    /// These: by volume.
    These(Vec<(String, Snapshot)>),
    /// None so far, but the tool may still be at it.
    NoneYet,
    /// Those of one of these dates.
    AnyOf(Vec<String>),
}

impl Asked {
    /// What is new since they were asked for, and has the right date.
    fn ours(&self, system: &System) -> Result<Ours> {
        let mut new = self.new_ones(system)?;
        if let Some(date) = &self.date {
            new.retain(|(_, snapshot)| snapshot.date() == Some(date));
            return Ok(Ours::These(new));
        }
        // What the tool would have said was never heard.
        new.retain(|(_, snapshot)| snapshot.date().is_some_and(|date| self.may_be_of(date)));
        let mut dates: Vec<_> = new
            .iter()
            .filter_map(|(_, snapshot)| snapshot.date().map(str::to_owned))
            .collect();
        dates.sort();
        dates.dedup();
        Ok(match dates.len() {
            0 if self.is_being_made => Ours::NoneYet,
            0 | 1 => Ours::These(new),
            _ => Ours::AnyOf(dates),
        })
    }

    /// All snapshots that were not there before, by volume.
    fn new_ones(&self, system: &System) -> Result<Vec<(String, Snapshot)>> {
        let mut new = Vec::new();
        for volume in system.containers()?.into_iter().flat_map(|one| one.volumes) {
            // By UUID: disks are numbered anew at each start.
            let known = self
                .before
                .iter()
                .find(|(uuid, _)| volume.uuid.as_ref() == Some(uuid));
            let Some((_, before)) = known.filter(|_| !volume.is_locked) else {
                continue;
            };
            let mut snapshots = system.snapshots(&volume.id)?;
            snapshots.retain(|snapshot| !before.contains(&snapshot.uuid));
            new.extend(snapshots.into_iter().map(|one| (volume.id.clone(), one)));
        }
        Ok(new)
    }

    /// Whether a snapshot of this date can be one that was asked for then.
    fn may_be_of(&self, date: &str) -> bool {
        let parsed = DateTime::strptime("%Y-%m-%d-%H%M%S", date);
        let time = parsed.and_then(|date| date.to_zoned(TimeZone::system()));
        let Ok(time) = time.map(|time| time.timestamp()) else {
            return false;
        };
        // It has no parts of a second.
        let since = time.as_second().saturating_sub(self.at);
        (0..=TAKES.as_secs() as i64).contains(&since)
    }

    /// The snapshot of the volume `id`, once the date is known.
    pub(super) fn of(&self, system: &System, id: &str) -> Result<Option<Snapshot>> {
        match self.ours(system)? {
            Ours::These(all) => Ok(all
                .into_iter()
                .find(|(volume, _)| volume == id)
                .map(|one| one.1)),
            _ => Ok(None),
        }
    }
}

/// Removes an empty folder, if it is there.
fn remove_folder(folder: &Path, undone: &mut Undone) -> Result<()> {
    match std::fs::remove_dir(folder) {
        Ok(()) => undone.removed.push(folder.display().to_string()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("cannot remove", folder),
    }
    Ok(())
}

/// Tries something again and again; at last by force.
fn patiently(
    system: &System,
    mut act: impl FnMut(bool) -> holdstill_platform::error::Result<()>,
) -> Result<()> {
    for _ in 1..TRIES {
        if act(false).is_ok() {
            return Ok(());
        }
        std::thread::sleep(system.wait());
    }
    act(true).map_err(|error| {
        Error::new(
            Kind::Tool,
            "something made for the copy cannot be taken away",
        )
        .because(error)
    })
}
