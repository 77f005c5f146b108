//! Logical volumes of LVM, by its own tools (lvs(8), lvcreate(8), lvextend(8), lvremove(8)), and how
//! full their snapshots are, by the kernel's status lines
//! (Documentation/admin-guide/device-mapper/{snapshot,thin-provisioning}.rst).
//!
//! The tools that change something suspend devices while they work: killed then, they would leave a
//! device, perhaps the root filesystem's, suspended for ever. So they get all the time they need.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::command::{Output, Tool};
use crate::dm;
use crate::error::{Error, Result};
use crate::guard::{Undo, Way};
use crate::node::{BlockDevice, DeviceNumber};

mod thin_map;

pub use thin_map::{MetadataSnapshot, ThinMap};

/// A tool that only asks.
const ASKING: Duration = Duration::from_secs(120);

/// A tool that changes something: killed only when all hope is lost.
const CHANGING: Duration = Duration::from_secs(3600);

/// For how long a guard tries to remove a snapshot.
const UNDO_PATIENCE: Duration = Duration::from_secs(20);

/// Every snapshot of ours has this tag, and another one with the run's id behind it.
const TAG: &str = "holdstill";

/// Between the fields that `lvs` prints; no name can hold it.
const SEPARATOR: &str = "|";

/// What is asked of each logical volume.
const FIELDS: [&str; 11] = [
    "vg_name",
    "lv_name",
    "lv_attr",
    "lv_size",
    "pool_lv",
    "vg_extent_size",
    "vg_free_count",
    "lv_kernel_major",
    "lv_kernel_minor",
    "lv_tags",
    "origin",
];

/// Most characters of a device's name in /dev/mapper, less what LVM adds to it (`-cow`, `-real`).
const MOST_NAME: usize = 127 - 5;

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalVolume {
    /// Its volume group.
    pub group: String,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: Kind,
    /// Bytes of an extent of the group.
    pub extent_size: u64,
    /// Extents of the group that are free.
    pub free_extents: u64,
    /// The device, if it is active.
    pub device: Option<DeviceNumber>,
    tags: Vec<String>,
    origin: String,
}

/// What sort of logical volume it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its blocks are its own: linear, striped, RAID, cached.
    Thick,
    /// Its blocks come from a pool, of this name.
    Thin(String),
    /// It is a snapshot with a copy-on-write store.
    Snapshot,
    /// Anything else (a pool, a part of another volume, one that is being converted), by the first
    /// letter of its attributes.
    Other(char),
}

impl fmt::Display for LogicalVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group, self.name)
    }
}

/// Whether LVM made this device: only then are its tools asked.
pub fn is_logical_volume(device: &BlockDevice) -> bool {
    let uuid = std::fs::read_to_string(device.sysfs().join("dm/uuid"));
    uuid.is_ok_and(|uuid| uuid.starts_with("LVM-"))
}

impl LogicalVolume {
    /// The logical volume that is this device; `None` if LVM knows none.
    ///
    /// # Errors
    /// If the tools are missing or fail.
    pub fn of_device(device: DeviceNumber) -> Result<Option<Self>> {
        let DeviceNumber { major, minor } = device;
        let select = format!("lv_kernel_major={major} && lv_kernel_minor={minor}");
        Ok(select_volumes(&select)?.into_iter().next())
    }

    /// The logical volume of this name; `None` if there is none, or no LVM.
    ///
    /// # Errors
    /// If the tools fail.
    pub fn of_name(group: &str, name: &str) -> Result<Option<Self>> {
        if !is_name(group) || !is_name(name) || Tool::find("lvs").is_err() {
            return Ok(None);
        }
        let select = format!("vg_name=\"{group}\" && lv_name=\"{name}\"");
        Ok(select_volumes(&select)?.into_iter().next())
    }

    /// Its node by the name LVM gives it; it need not exist where udev does not run.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/{}/{}", self.group, self.name))
    }

    /// How the snapshot of it that run `run_id` makes is called: the tool, the run, and as much of the
    /// origin's name as fits.
    pub fn snapshot_name(&self, run_id: &str) -> String {
        let mut name = format!("{TAG}.{run_id}.{}", self.name);
        // In /dev/mapper hyphens are doubled.
        let len = |name: &str| name.len() + name.matches('-').count();
        while len(&self.group) + 1 + len(&name) > MOST_NAME && name.pop().is_some() {}
        name
    }

    /// What removes the snapshot of this run, for the guard.
    ///
    /// # Errors
    /// If the tool is missing.
    pub fn undo(&self, run_id: &str) -> Result<Undo> {
        let snapshot = format!("{}/{}", self.group, self.snapshot_name(run_id));
        Ok(Undo {
            way: Way::Command(removal(&snapshot)?.words()),
            name: snapshot,
            patience: UNDO_PATIENCE,
        })
    }

    /// Makes a read-only snapshot, active, for run `run_id`. LVM freezes a filesystem that is mounted
    /// on it meanwhile. `room`: what a thick volume's snapshot gets at first; on which physical volume,
    /// if that matters.
    ///
    /// # Errors
    /// If the tool is missing or fails: then there is none, unless it was killed.
    pub fn snapshot(&self, run_id: &str, room: Option<&Room>) -> Result<Snapshot> {
        let name = self.snapshot_name(run_id);
        let mut tool = Tool::find("lvcreate")?
            .args(["--snapshot", "--permission", "r", "--yes", "--quiet"])
            .args(["--addtag", TAG, "--addtag", &run_tag(run_id)])
            .args(["--name", &name]);
        tool = match room {
            Some(room) => tool.args(["--extents", &room.extents]),
            // Else it would have to be activated by hand.
            None => tool.args(["--setactivationskip", "n"]),
        };
        tool = tool.arg(self.to_string());
        if let Some(on) = room.and_then(|room| room.on.as_ref()) {
            tool = tool.arg(on);
        }
        change(tool)?;
        let made = Self::of_name(&self.group, &name)?;
        let device = made.and_then(|made| made.device).ok_or_else(|| {
            let why = "LVM says it made it, and does not show it";
            Error::other("cannot find the snapshot", &name, why)
        })?;
        Ok(Snapshot {
            name: format!("{}/{name}", self.group),
            device,
        })
    }
}

/// Room for a thick snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// How many extents, as `lvcreate --extents` takes it: a number, or a share (`100%PVS`).
    pub extents: String,
    /// The physical volume they shall be on.
    pub on: Option<PathBuf>,
}

/// A snapshot that a run has made. It stays until it is removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// `GROUP/NAME`.
    pub name: String,
    /// Its device.
    pub device: DeviceNumber,
}

impl Snapshot {
    /// Gives a thick snapshot more room, on this physical volume if that matters.
    ///
    /// # Errors
    /// If there is none, or the tool fails.
    pub fn extend(&self, extents: u64, on: Option<&Path>) -> Result<()> {
        let tool = Tool::find("lvextend")?.args(["--quiet", "--extents", &format!("+{extents}")]);
        change(tool.arg(&self.name).args(on))
    }
}

/// Removes the snapshot `GROUP/NAME`.
///
/// # Errors
/// If somebody uses it, or the tool fails.
pub fn remove(snapshot: &str) -> Result<()> {
    change(removal(snapshot)?)
}

fn removal(snapshot: &str) -> Result<Tool> {
    Ok(Tool::find("lvremove")?
        .args(["--force", "--quiet", "--quiet"])
        .arg(snapshot))
}

/// Whether there is a logical volume `GROUP/NAME`.
///
/// # Errors
/// If the tools are missing or fail.
pub fn exists(volume: &str) -> Result<bool> {
    let (group, name) = volume.split_once('/').unwrap_or_default();
    Ok(LogicalVolume::of_name(group, name)?.is_some())
}

/// A snapshot found on this machine that a run of holdstill made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// `GROUP/NAME`.
    pub name: String,
    /// The run.
    pub run_id: String,
}

/// All snapshots that runs of holdstill made: by tags, name and kind together, so that nobody else's is
/// taken for ours. None where there is no LVM.
///
/// # Errors
/// If the tools fail.
pub fn snapshots() -> Result<Vec<Found>> {
    if Tool::find("lvs").is_err() {
        return Ok(Vec::new());
    }
    Ok(select_volumes("")?.iter().filter_map(ours).collect())
}

fn ours(volume: &LogicalVolume) -> Option<Found> {
    let prefix = run_tag("");
    let run_id = volume
        .tags
        .iter()
        .find_map(|tag| tag.strip_prefix(&prefix))?;
    let is_named = volume.name.starts_with(&format!("{TAG}.{run_id}."));
    (is_named && !volume.origin.is_empty()).then(|| Found {
        name: volume.to_string(),
        run_id: run_id.to_owned(),
    })
}

fn run_tag(run_id: &str) -> String {
    format!("{TAG}.run.{run_id}")
}

/// What LVM allows in a name, and so nothing that means something in a selection.
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte);
    !text.is_empty() && !text.starts_with('-') && text.bytes().all(allowed)
}

fn change(tool: Tool) -> Result<()> {
    tool.deadline(CHANGING)
        .run()
        .and_then(Output::checked)
        .map(drop)
}

fn select_volumes(select: &str) -> Result<Vec<LogicalVolume>> {
    let tool = Tool::find("lvs")?
        .args(["--all", "--noheadings", "--nosuffix", "--units", "b"])
        .args(["--separator", SEPARATOR, "--options", &FIELDS.join(",")])
        .args(["--select", select]);
    let output = tool.deadline(ASKING).run()?.checked()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| {
            parse_volume(line)
                .ok_or_else(|| Error::invalid("cannot understand", "lvs", line.trim().to_owned()))
        })
        .collect()
}

fn parse_volume(line: &str) -> Option<LogicalVolume> {
    let fields: Vec<&str> = line.trim().split(SEPARATOR).collect();
    let [
        group,
        name,
        attributes,
        size,
        pool,
        extent_size,
        free_extents,
        major,
        minor,
        tags,
        origin,
    ] = fields[..]
    else {
        return None;
    };
    // -1 where it is not active.
    let device = major.parse().ok().zip(minor.parse().ok());
    Some(LogicalVolume {
        group: group.to_owned(),
        // In brackets: a part of another volume.
        name: name.trim_matches(['[', ']']).to_owned(),
        size: size.parse().ok()?,
        kind: match attributes.chars().next()? {
            '-' | 'o' | 'r' | 'R' | 'C' => Kind::Thick,
            'V' => Kind::Thin(pool.to_owned()),
            's' => Kind::Snapshot,
            other => Kind::Other(other),
        },
        extent_size: extent_size.parse().ok().filter(|size| *size > 0)?,
        free_extents: free_extents.parse().ok()?,
        device: device.map(|(major, minor)| DeviceNumber { major, minor }),
        tags: tags.split(',').map(str::to_owned).collect(),
        origin: origin.to_owned(),
    })
}

/// How full a thin pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolFill {
    /// Blocks of metadata: taken, of how many.
    pub metadata: (u64, u64),
    /// Blocks of data: taken, of how many.
    pub data: (u64, u64),
    /// Whether it serves writes.
    pub is_writable: bool,
    /// Whether somebody holds a snapshot of its metadata.
    pub has_metadata_snapshot: bool,
}

/// The pool a thin volume's blocks come from, and its id there. `None` if it is no thin volume, or one
/// with an external origin, whose blocks come from there, too.
///
/// # Errors
/// If the device is gone.
pub fn pool_of(thin: DeviceNumber) -> Result<Option<(DeviceNumber, u64)>> {
    let table = dm::table(thin)?;
    let [target] = &table.targets[..] else {
        return Ok(None);
    };
    let words: Vec<&str> = target.params.split(' ').collect();
    Ok(match words[..] {
        [pool, id] if target.kind == "thin" => pool.parse().ok().zip(id.parse().ok()),
        _ => None,
    })
}

/// Asks the kernel how full a thin pool is.
///
/// # Errors
/// If the device is gone or is no pool.
pub fn pool_fill(pool: DeviceNumber) -> Result<PoolFill> {
    let status = dm::status(pool)?;
    let parsed = match &status.targets[..] {
        [target] if target.kind == "thin-pool" => parse_pool_fill(&target.params),
        _ => None,
    };
    parsed.ok_or_else(|| Error::invalid("cannot understand", "the pool's status", "no thin pool"))
}

/// `TRANSACTION USED/METADATA USED/DATA HELD_ROOT MODE ...`, or `Fail` (drivers/md/dm-thin.c:
/// `pool_status`).
fn parse_pool_fill(status: &str) -> Option<PoolFill> {
    let words: Vec<&str> = status.split(' ').collect();
    let pair = |at: usize| {
        let (used, total) = words.get(at)?.split_once('/')?;
        Some((used.parse().ok()?, total.parse().ok()?))
    };
    if words == ["Fail"] {
        return Some(PoolFill {
            metadata: (0, 0),
            data: (0, 0),
            is_writable: false,
            has_metadata_snapshot: false,
        });
    }
    Some(PoolFill {
        metadata: pair(1)?,
        data: pair(2)?,
        has_metadata_snapshot: *words.get(3)? != "-",
        is_writable: *words.get(4)? == "rw",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(line: &str) -> LogicalVolume {
        parse_volume(line).unwrap()
    }

    #[test]
    fn volumes_are_read() {
        let root = volume("  vg|root|-wi-ao----|12582912||4194304|7|254|3||");
        assert_eq!(root.to_string(), "vg/root");
        assert_eq!((root.size, root.kind.clone()), (12 << 20, Kind::Thick));
        assert_eq!((root.extent_size, root.free_extents), (4 << 20, 7));
        assert_eq!(
            root.device,
            Some(DeviceNumber {
                major: 254,
                minor: 3
            })
        );
        assert_eq!(ours(&root), None);
        let thin = volume("vg|t|Vwi---tz--|1048576|pool|4194304|0|-1|-1||");
        assert_eq!(
            (thin.kind, thin.device),
            (Kind::Thin("pool".to_owned()), None)
        );
        let part = volume("vg|[pool_tdata]|Twi-ao----|8388608||4194304|0|254|1||");
        assert_eq!(
            (part.name.as_str(), part.kind),
            ("pool_tdata", Kind::Other('T'))
        );
        for bad in [
            "",
            "vg|root",
            "vg|root|-|x||4194304|7|254|3||",
            "vg|root|-|1||0|7|254|3||",
        ] {
            assert_eq!(parse_volume(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_our_own_snapshots_are_ours() {
        let line = |name: &str, tags: &str, origin: &str| {
            ours(&volume(&format!(
                "vg|{name}|sri-a-s---|8||4194304|0|254|4|{tags}|{origin}"
            )))
        };
        let tags = "holdstill,holdstill.run.12ab";
        let found = line("holdstill.12ab.root", tags, "root").unwrap();
        assert_eq!(
            (found.name.as_str(), found.run_id.as_str()),
            ("vg/holdstill.12ab.root", "12ab")
        );
        assert_eq!(line("holdstill.12ab.root", "holdstill", "root"), None);
        assert_eq!(line("holdstill.34cd.root", tags, "root"), None);
        assert_eq!(line("holdstill.12ab.root", tags, ""), None);
        assert_eq!(line("my-holdstill.12ab.root", tags, "root"), None);
    }

    #[test]
    fn names_of_snapshots_fit() {
        let name = |group: &str, name: &str| {
            let line = format!("{group}|{name}|-wi-ao----|8||4194304|7|254|3||");
            volume(&line).snapshot_name("0123456789abcdef0123456789abcdef")
        };
        assert_eq!(
            name("vg", "root"),
            "holdstill.0123456789abcdef0123456789abcdef.root"
        );
        let long = name("a-group", &"long-".repeat(20));
        assert!(long.starts_with("holdstill.0123456789abcdef0123456789abcdef.long-long-"));
        let mapped = "a-group".len() + 1 + 1 + long.len() + long.matches('-').count();
        assert!((MOST_NAME - 1..=MOST_NAME).contains(&mapped), "{mapped}");
        assert!(is_name("a_b+c.d-e") && !is_name("") && !is_name("-a") && !is_name("a\"b"));
    }

    #[test]
    fn status_lines_are_read() {
        let pool =
            parse_pool_fill("1 12/1024 7/160 - rw discard_passdown queue_if_no_space - 1024");
        let pool = pool.unwrap();
        assert_eq!((pool.metadata, pool.data), ((12, 1024), (7, 160)));
        assert!(pool.is_writable && !pool.has_metadata_snapshot);
        let full = parse_pool_fill("1 12/1024 160/160 99 out_of_data_space").unwrap();
        assert!(!full.is_writable && full.has_metadata_snapshot);
        assert!(!parse_pool_fill("Fail").unwrap().is_writable);
        assert_eq!(parse_pool_fill("1 12 7/160 - rw"), None);
    }
}
