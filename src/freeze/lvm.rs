//! `lvm`: a snapshot of a logical volume, thick or thin, is copied while the volume is in use.
//!
//! LVM freezes the filesystem that is mounted on the volume while it makes the snapshot; that moment is
//! the instant of the copy, and the snapshot's own log confirms that it was frozen. What happens to the
//! volume afterwards does not reach the snapshot. What a thick snapshot keeps is bounded by its room,
//! though, and a thin one keeps the pool from being emptied: both are watched while copying
//! (`watch`), and a snapshot that may be lost never becomes an image.
//!
//! Nothing is left behind: the snapshot's name is on record before it is made, the guard removes it
//! should the run die, and `cleanup` finds it by its tags.

mod provisioned;
mod watch;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::dm::{Suspended, SuspensionWatch};
use holdstill_platform::freeze::MountPoint;
use holdstill_platform::guard::{Owed, Undo};
use holdstill_platform::in_use::{self, User};
use holdstill_platform::lvm::{self, LogicalVolume, MetadataSnapshot, PoolFill, Room};
use holdstill_platform::node::BlockDevice;

use super::mounted;
use super::mounted::milliseconds;
use super::users::Users;
use super::watched::{Undo as _, Watch, Watched, WatchedSnapshot, percent};
use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::freeze::step::Step;
use crate::freeze::{Context, CowRoom, OnePass, Still, only};
use crate::image::manifest::FreezeTimes;
use crate::progress::Event;
use crate::source::{Medium, Source};
use watch::Watching;

/// A thick snapshot begins with at least this share of its origin, or with all that the origin can
/// need: with less it would most likely overflow.
const LEAST_SHARE: u64 = 100;

/// How full a thin pool may be before a snapshot is made, in percent.
const MOST_DATA: u64 = 95;
const MOST_METADATA: u64 = 90;

/// How often a snapshot that is busy is tried to be removed.
const REMOVALS: u32 = 3;

/// A snapshot that is removed when this is dropped.
#[derive(Debug)]
struct Made {
    snapshot: lvm::Snapshot,
    owed: Option<Owed>,
    run: Session,
}

/// `lvm`: a snapshot of a logical volume.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "lvm"
    }

    fn about(&self) -> &'static str {
        "a snapshot of a logical volume"
    }

    fn when(&self) -> &'static str {
        "a logical volume, thick or thin, with room for a snapshot"
    }

    fn how(&self) -> &'static str {
        "LVM freezes what is mounted on it for a moment and makes a snapshot, which is read and removed"
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

/// Why the source cannot be imaged by a snapshot; `None` if nothing speaks against it.
///
/// # Errors
/// If it cannot be examined.
fn objection(source: &Source) -> Result<Option<String>> {
    let volume = match volume(source) {
        Ok(volume) => volume,
        Err(why) => return Ok(Some(why)),
    };
    for swap in in_use::swaps()? {
        if swap.device.is_some() && swap.device == volume.device {
            return Ok(Some("it is swap space in use".to_owned()));
        }
    }
    match &volume.kind {
        lvm::Kind::Thick => Ok(too_little_room(&volume)),
        lvm::Kind::Thin(pool) => thin_objection(&volume, pool),
        lvm::Kind::Snapshot => Ok(Some("it is a snapshot itself".to_owned())),
        lvm::Kind::Other(letter) => Ok(Some(format!(
            "it is no volume that a snapshot can be made of (its attributes begin with `{letter}`)"
        ))),
    }
}

/// What the guard undoes should the run die: the snapshot, and the one of a thin pool's metadata.
///
/// # Errors
/// If the tools are missing.
fn undo(source: &Source, run_id: &str) -> Result<Vec<Undo>> {
    let Ok(volume) = volume(source) else {
        return Ok(Vec::new());
    };
    let mut undo = vec![volume.undo(run_id)?];
    if let (lvm::Kind::Thin(_), Some(device)) = (&volume.kind, volume.device)
        && let Some((pool, _)) = lvm::pool_of(device)?
    {
        undo.extend(MetadataSnapshot::undo(pool)?);
    }
    Ok(undo)
}

/// The logical volume that a source is, as it is now; or why there is none.
fn volume(source: &Source) -> std::result::Result<LogicalVolume, String> {
    let Medium::Device(device) = &source.medium else {
        return Err("it is a file".to_owned());
    };
    if !lvm::is_logical_volume(device) {
        return Err("it is no logical volume of LVM".to_owned());
    }
    match LogicalVolume::of_device(device.number) {
        Ok(Some(volume)) => Ok(volume),
        Ok(None) => Err("LVM does not know it".to_owned()),
        Err(error) => Err(format!("LVM cannot be asked: {error}")),
    }
}

/// All the extents that a snapshot of the volume can ever need: 16 bytes of metadata for each chunk of
/// 4 KiB, and something to begin with.
fn most_extents(volume: &LogicalVolume) -> u64 {
    (volume.size + volume.size / 256).div_ceil(volume.extent_size) + 1
}

fn too_little_room(volume: &LogicalVolume) -> Option<String> {
    let least = (volume.size / LEAST_SHARE)
        .div_ceil(volume.extent_size)
        .clamp(1, most_extents(volume));
    (volume.free_extents < least).then(|| {
        format!(
            "its volume group {} has {} free extents, and a snapshot needs {least} at least",
            volume.group, volume.free_extents
        )
    })
}

fn thin_objection(volume: &LogicalVolume, pool: &str) -> Result<Option<String>> {
    let fill = match volume.device.map(lvm::pool_of).transpose()?.flatten() {
        Some((device, _)) => lvm::pool_fill(device)?,
        // One with an external origin: its table does not name the pool in the usual way.
        None => return Ok(None),
    };
    let PoolFill {
        data,
        metadata,
        is_writable,
        ..
    } = fill;
    let pool = format!("its pool {}/{pool}", volume.group);
    Ok(if !is_writable {
        Some(format!("{pool} does not take writes"))
    } else if percent(data) >= MOST_DATA {
        Some(format!("{pool} has {} % of its data in use", percent(data)))
    } else if percent(metadata) >= MOST_METADATA {
        Some(format!(
            "{pool} has {} % of its metadata in use",
            percent(metadata)
        ))
    } else {
        None
    })
}

/// Room for a thick snapshot: as the user says; else half of what is free, or all the origin can need,
/// so that the other half is there to extend it.
fn room(volume: &LogicalVolume, cow: &CowRoom) -> Result<Room> {
    let on = cow.device.clone();
    let extents = match (cow.size, &on) {
        (Some(size), _) => {
            let extents = size.0.div_ceil(volume.extent_size);
            if extents > volume.free_extents {
                return Err(Error::new(
                    Kind::NotApplicable,
                    format!(
                        "--cow-size needs {extents} extents, and volume group {} has {} free",
                        volume.group, volume.free_extents
                    ),
                )
                .on(volume.path()));
            }
            extents.to_string()
        }
        (None, Some(_)) => "100%PVS".to_owned(),
        (None, None) => {
            let half = volume.free_extents.div_ceil(2);
            half.min(most_extents(volume)).to_string()
        }
    };
    Ok(Room { extents, on })
}

/// Makes a snapshot of the source.
///
/// # Errors
/// [`Kind::NotApplicable`] if none can be made; else if LVM fails or reading does.
pub fn snapshot(source: &Source, context: &Context<'_>) -> Result<Box<dyn Still>> {
    let Context {
        run,
        all_blocks,
        progress,
        ..
    } = *context;
    let no = |why| {
        Error::new(
            Kind::NotApplicable,
            format!("no snapshot can be made of it: {why}"),
        )
        .on(&source.path)
    };
    let (Medium::Device(device), Ok(volume)) = (&source.medium, volume(source)) else {
        return Err(no("it is no logical volume of LVM"));
    };
    let room = match volume.kind {
        lvm::Kind::Thick => Some(room(&volume, context.cow)?),
        _ if *context.cow != CowRoom::default() => {
            return Err(Error::new(
                Kind::Usage,
                "a thin snapshot takes its room from its pool: --cow-size and --cow-device are \
                 for thick ones",
            )
            .on(&source.path));
        }
        _ => None,
    };
    let users = Users::of(device, |user| matches!(user, User::Mount { .. }))?;
    run.before_freeze(progress)?;
    if let Some(mount) = &source.mount {
        // So that LVM has little to write out while writers wait.
        let point = MountPoint::open_on(&mount.point, device.number)?;
        mounted::sync(&Arc::new(point), progress)?;
    }
    progress.hush(true);
    let made = Made::make(&volume, device, room.as_ref(), run);
    progress.hush(false);
    let (made, instant, times, uncertainty) = made?;
    run.after_thaw(progress);
    progress.event(&Event::Frozen {
        instant: &instant.to_string(),
    });
    progress.event(&Event::Thawed(&times));
    let snapshot = made.snapshot.clone();
    let path = BlockDevice::of(snapshot.device)?.path();
    let watching = Watching::of(&volume, &snapshot, context.cow)?;
    let source = Watched {
        disk: Disk::open(&path, Access::Read)?,
        watch: Watch::start(Box::new(watching))?,
    };
    let mut survey = users.survey(&source.disk, all_blocks)?;
    survey.warnings.extend(uncertainty);
    if survey.copies_all() {
        provisioned::leave_out_the_rest(&mut survey, &source.disk, snapshot.device, run);
    }
    Ok(Box::new(WatchedSnapshot {
        source,
        survey,
        instant,
        freezes: vec![times],
        passes: OnePass::new(context.compare),
        made,
    }))
}

impl Made {
    /// Makes the snapshot, and finds out when the volume was frozen for it; or a warning that this is
    /// not known exactly.
    fn make(
        volume: &LogicalVolume,
        device: &BlockDevice,
        room: Option<&Room>,
        run: &Session,
    ) -> Result<(Self, jiff::Timestamp, FreezeTimes, Option<String>)> {
        let name = volume.undo(run.id())?.name;
        run.note(|record| record.lvm_snapshots.push(name.clone()))?;
        let owed = run.owe_undo(&name)?;
        let watch = SuspensionWatch::start(device.number)?;
        let begun = SystemTime::now();
        let made = volume.snapshot(run.id(), room);
        let ended = SystemTime::now();
        let seen = watch.finish();
        let snapshot = match made {
            Ok(snapshot) => snapshot,
            Err(error) => {
                let error = Error::from(error)
                    .on(volume.path())
                    .hint("LVM could not make a snapshot; --freeze names another way");
                // Should it be there anyway, the guard removes it.
                if let Ok(false) = lvm::exists(&name) {
                    run.undone(owed);
                    return Err(error.undone());
                }
                return Err(error);
            }
        };
        let made = Self {
            snapshot,
            owed: Some(owed),
            run: run.clone(),
        };
        let (at, total, uncertainty) = match seen {
            Some(Suspended { at, total }) => (at, total, None),
            // Shorter than one look.
            None => {
                let took = ended.duration_since(begun).unwrap_or_default();
                let text = format!(
                    "when LVM froze it was not seen: up to {:.1} s before the instant given",
                    took.as_secs_f64()
                );
                (ended, Duration::ZERO, Some(text))
            }
        };
        let instant = jiff::Timestamp::try_from(at).map_err(|error| {
            Error::new(Kind::Failed, "the clock is beyond all bounds").because(error)
        })?;
        let times = FreezeTimes {
            purpose: "snapshot".to_owned(),
            freeze_ms: milliseconds(total),
            drain_ms: 0.0,
            read_ms: 0.0,
            thaw_ms: 0.0,
        };
        Ok((made, instant, times, uncertainty))
    }
}

impl super::watched::Undo for Made {
    /// Removes the snapshot. If that fails the guard tries again, and then `cleanup`.
    fn undo(&mut self) -> Result<()> {
        let Some(owed) = self.owed.take() else {
            return Ok(());
        };
        let mut tries = 0;
        loop {
            match lvm::remove(&self.snapshot.name) {
                Ok(()) => {
                    self.run.undone(owed);
                    return Ok(());
                }
                Err(error) => {
                    tries += 1;
                    if tries == REMOVALS {
                        return Err(Error::from(error)
                            .on(&self.snapshot.name)
                            .hint("holdstill cleanup removes it when nobody uses it any more"));
                    }
                }
            }
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            log::warn!("{error}");
        }
    }
}
