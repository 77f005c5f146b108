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

/// How often it is looked for what a tool makes that has outlived its run.
const APPEARING: u32 = 10;

/// What a tool makes is there after this, at most: so long the time in the name of a snapshot may be behind
/// that of asking for it.
const TAKES: Duration = Duration::from_secs(120);

/// What is made: written down before it is, and forgotten when it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leavings {
    /// A folder of ours that nobody else puts anything into, by its whole path.
    pub folder: PathBuf,
    /// Since when a tool is at work that may outlive the run, if one is: seconds since 1970.
    pub busy_since: Option<i64>,
    /// The snapshots.
    pub snapshots: Asked,
}

/// The snapshots of one moment: Time Machine's tool makes one of every volume that it backs up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// When they were asked for: seconds since 1970.
    pub at: i64,
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
    /// What will be made to copy the volume `id`, by a run that has not begun to.
    ///
    /// # Errors
    /// If the volumes cannot be listed, or the snapshots of this one.
    pub(super) fn planned(system: &System, id: &str, folder: PathBuf) -> Result<Self> {
        let mut before = Vec::new();
        for volume in system.containers()?.into_iter().flat_map(|one| one.volumes) {
            if volume.is_locked || volume.roles.iter().any(|role| is_of_the_system(role)) {
                continue;
            }
            let snapshots = match system.snapshots(&volume.id) {
                Err(error) if volume.id == id => return Err(error.into()),
                snapshots => snapshots,
            };
            // Another one that cannot be asked is never touched either.
            if let (Some(uuid), Ok(snapshots)) = (volume.uuid, snapshots) {
                let snapshots = snapshots.into_iter().map(|snapshot| snapshot.uuid);
                before.push((uuid, snapshots.collect()));
            }
        }
        Ok(Self {
            folder,
            busy_since: None,
            snapshots: Asked {
                at: Timestamp::now().as_second(),
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
        let looks = match self.may_be_busy() {
            true => APPEARING,
            false => 1,
        };
        for look in 0..looks {
            if look > 0 {
                std::thread::sleep(system.wait());
            }
            let image = self.remove_image(system, &mut undone);
            let snapshots = self.remove_snapshots(system, &mut undone);
            image.and(snapshots)?;
            remove_folder(&self.folder, &mut undone)?;
        }
        Ok(undone)
    }

    /// Whether a tool that has outlived its run may still be making something.
    fn may_be_busy(&self) -> bool {
        let now = Timestamp::now().as_second();
        self.busy_since
            .is_some_and(|since| now.saturating_sub(since) <= TAKES.as_secs() as i64)
    }

    /// Detaches the image and removes its file.
    fn remove_image(&self, system: &System, undone: &mut Undone) -> Result<()> {
        self.detach(system, true, undone)?;
        let image = self.image();
        match std::fs::remove_file(&image) {
            Ok(()) => undone.removed.push(image.display().to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("cannot remove", &image),
        }
        Ok(())
    }

    /// Detaches the image: at last by force, if that may be.
    pub(super) fn detach(
        &self,
        system: &System,
        may_force: bool,
        undone: &mut Undone,
    ) -> Result<()> {
        for disk in system.attached(&self.image())? {
            patiently(system, |is_last| system.detach(&disk, is_last && may_force))?;
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
        match self.snapshots.ours(system)? {
            Ours::These(snapshots) => {
                for (volume, snapshot) in snapshots {
                    patiently(system, |_| system.delete_snapshot(&volume, &snapshot.uuid))?;
                    let removed = format!("{} of {volume}", snapshot.name);
                    undone.removed.push(removed);
                }
            }
            Ours::AnyOf(dates) => {
                undone.left = vec![format!(
                    "one of the snapshots of {} may be left of a killed run, and which is not known: \
                     macOS deletes both within a day",
                    dates.join(" and ")
                )];
            }
        }
        Ok(())
    }
}

/// Which snapshots are ours.
#[derive(Debug)]
enum Ours {
    /// These: by volume.
    These(Vec<(String, Snapshot)>),
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
            Ours::AnyOf(_) => Ok(None),
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

/// Tries something again and again; it is told when it is the last time.
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
