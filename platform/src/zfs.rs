//! Volumes of ZFS (zvols), by its own tools (zfs-snapshot(8), zfs-hold(8), zfs-destroy(8),
//! zfsprops(7)) and the one ioctl by which a block device says which volume it is.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::command::{Output, Tool};
use crate::error::{Error, Result};
use crate::guard::{Undo, Way};
use crate::node::{self, BlockDevice};

/// A tool waits for the pool to write out what it holds: on a busy one that takes long.
const PATIENCE: Duration = Duration::from_secs(300);

/// For how long a guard tries to undo each thing.
const UNDO_PATIENCE: Duration = Duration::from_secs(20);

/// For how long the device of a snapshot is waited for, and how often it is looked for.
const DEVICE_PATIENCE: Duration = Duration::from_secs(60);
const NAP: Duration = Duration::from_millis(20);

/// Before the run's id in the names of snapshots and holds.
const TAG: &str = "holdstill";

/// The user property that every snapshot of ours has: the run's id.
const PROPERTY: &str = "holdstill:run";

/// The longest name, with the zero byte: `ZFS_MAX_DATASET_NAME_LEN` of include/sys/fs/zfs.h.
const MAX_NAME: usize = 256;

mod dataset;

pub use dataset::{
    Facts, abort_receive, destroy, exists, facts, guid, receive, rename, send, with_below,
};

mod ioctl {
    //! `BLKZNAME` of module/os/linux/zfs/zvol_os.c: the name of the volume or snapshot.
    nix::ioctl_read!(blkzname, 0x12, 125, [u8; super::MAX_NAME]);
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// A volume.
    Volume(Volume),
    /// A dataset with files in it: its name.
    Filesystem(String),
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// `POOL/NAME`.
    pub name: String,
}

/// The volume that a block device is; `None` if it is no zvol, or a snapshot of one.
///
/// # Errors
/// If the device cannot be opened.
pub fn volume_of(device: &BlockDevice) -> Result<Option<Volume>> {
    let name = name_of(device)?;
    Ok(name
        .filter(|name| !name.contains('@'))
        .map(|name| Volume { name }))
}

/// The name of a zvol or of a snapshot of one.
fn name_of(device: &BlockDevice) -> Result<Option<String>> {
    if !device.name.starts_with("zd") || !device.is_whole_disk() {
        return Ok(None);
    }
    let path = device.path();
    let file = File::open(&path).map_err(|error| Error::new("cannot open", &path, error))?;
    let mut name = [0; MAX_NAME];
    // SAFETY: the kernel writes a name of at most MAX_NAME bytes, its zero byte included.
    if unsafe { ioctl::blkzname(file.as_raw_fd(), &raw mut name) }.is_err() {
        return Ok(None);
    }
    let len = name.iter().position(|&byte| byte == 0).unwrap_or(MAX_NAME);
    Ok(std::str::from_utf8(&name[..len]).ok().map(str::to_owned))
}

/// What `text` names; `None` if ZFS knows no such thing, or is not there.
///
/// # Errors
/// If the tool cannot be run.
pub fn find(text: &str) -> Result<Option<Named>> {
    if !is_name(text) || Tool::find("zfs").is_err() {
        return Ok(None);
    }
    let tool = Tool::find("zfs")?.args(["list", "-H", "-p", "-o", "type", text]);
    let output = tool.deadline(PATIENCE).run()?;
    if !output.success() {
        return Ok(None);
    }
    Ok(match String::from_utf8_lossy(&output.stdout).trim() {
        "volume" => Some(Named::Volume(Volume {
            name: text.to_owned(),
        })),
        "filesystem" => Some(Named::Filesystem(text.to_owned())),
        _ => None,
    })
}

impl Volume {
    /// Its device; `None` if it has none (`volmode=none`, or the key is not loaded).
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub fn device(&self) -> Result<Option<BlockDevice>> {
        device_named(&self.name)
    }

    /// How the property that shows devices of snapshots is set.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn snapdev(&self) -> Result<Snapdev> {
        let output = get("value,source", "snapdev", &self.name)?;
        parse_snapdev(&output)
            .ok_or_else(|| Error::invalid("cannot understand", "zfs get snapdev", output.trim()))
    }
}

/// The name of the snapshot that run `run_id` makes of a volume or dataset.
pub fn snapshot_name(of: &str, run_id: &str) -> String {
    format!("{of}@{TAG}.{run_id}")
}

/// How far down a snapshot reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The volume or dataset alone.
    Alone,
    /// With all datasets and volumes below, at one instant.
    Below,
}

impl Reach {
    /// These words with the option that says so behind the first.
    fn words<'a>(self, words: &[&'a str]) -> Vec<&'a str> {
        let option: &[&str] = match self {
            Self::Alone => &[],
            Self::Below => &["-r"],
        };
        let (verb, rest) = words.split_at(1);
        [verb, option, rest].concat()
    }
}

/// Makes that snapshot.
///
/// # Errors
/// If the tool fails.
pub fn snapshot(of: &str, run_id: &str, reach: Reach) -> Result<()> {
    let property = format!("{PROPERTY}={run_id}");
    let name = snapshot_name(of, run_id);
    change(&reach.words(&["snapshot", "-o", &property, &name]))
}

/// The property `snapdev` of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapdev {
    /// Whether snapshots have devices.
    pub is_visible: bool,
    /// What was set on the volume itself; `None`: it is inherited.
    pub own: Option<String>,
}

/// `VALUE<tab>SOURCE`.
fn parse_snapdev(text: &str) -> Option<Snapdev> {
    let (value, source) = text.trim_end().split_once('\t')?;
    Some(Snapdev {
        is_visible: value == "visible",
        own: matches!(source, "local" | "received").then(|| value.to_owned()),
    })
}

/// One thing that a run makes or changes, in the order in which that happens. Each is undone by one
/// command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Made {
    /// `snapdev` of this volume was set; before, it was so.
    Snapdev(Volume, Snapdev),
    /// This snapshot.
    Snapshot(String, Reach),
    /// The hold on this snapshot by this run.
    Hold(String, String, Reach),
}

impl Made {
    /// What to call it.
    pub fn name(&self) -> String {
        match self {
            Self::Snapdev(volume, _) => format!("snapdev of {}", volume.name),
            Self::Snapshot(name, _) => name.clone(),
            Self::Hold(name, ..) => format!("the hold on {name}"),
        }
    }

    fn words(&self) -> Vec<String> {
        let words: Vec<&str> = match self {
            Self::Snapdev(volume, Snapdev { own: None, .. }) => {
                vec!["inherit", "snapdev", &volume.name]
            }
            Self::Snapdev(volume, Snapdev { own: Some(own), .. }) => {
                let set = format!("snapdev={own}");
                return ["set", &set, &volume.name].map(str::to_owned).to_vec();
            }
            Self::Snapshot(name, reach) => reach.words(&["destroy", name]),
            Self::Hold(name, run_id, reach) => {
                let tag = hold_tag(run_id);
                let words = reach.words(&["release", &tag, name]);
                return words.into_iter().map(str::to_owned).collect();
            }
        };
        words.into_iter().map(str::to_owned).collect()
    }

    /// What undoes it, for the guard.
    ///
    /// # Errors
    /// If the tool is missing.
    pub fn to_undo(&self) -> Result<Undo> {
        Ok(Undo {
            name: self.name(),
            way: Way::Command(Tool::find("zfs")?.args(self.words()).words()),
            patience: UNDO_PATIENCE,
        })
    }

    /// Undoes it.
    ///
    /// # Errors
    /// If somebody uses it, or the tool fails.
    pub fn undo(&self) -> Result<()> {
        let words = self.words();
        change(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// Keeps a snapshot from being destroyed by others.
///
/// # Errors
/// If the tool fails.
pub fn hold(snapshot: &str, run_id: &str, reach: Reach) -> Result<()> {
    change(&reach.words(&["hold", &hold_tag(run_id), snapshot]))
}

/// Makes the devices of a volume's snapshots appear.
///
/// # Errors
/// If the tool fails.
pub fn show_snapshots(volume: &Volume) -> Result<()> {
    change(&["set", "snapdev=visible", &volume.name])
}

/// Waits for the device of a snapshot.
///
/// # Errors
/// `TimedOut` if it does not appear.
pub fn device_of_snapshot(snapshot: &str) -> Result<BlockDevice> {
    let end = Instant::now() + DEVICE_PATIENCE;
    loop {
        if let Some(device) = device_named(snapshot)? {
            return Ok(device);
        }
        if Instant::now() > end {
            let why = std::io::ErrorKind::TimedOut;
            return Err(Error::new("cannot find the device of", snapshot, why));
        }
        std::thread::sleep(NAP);
    }
}

fn device_named(name: &str) -> Result<Option<BlockDevice>> {
    for device in node::disks()? {
        // One that goes while it is asked is none.
        if matches!(name_of(&device), Ok(Some(found)) if found == name) {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// A snapshot found on this machine that a run of holdstill made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// `POOL/NAME@SNAPSHOT`.
    pub name: String,
    /// The run.
    pub run_id: String,
    /// Whether the run's hold is still on it.
    pub is_held: bool,
}

/// All snapshots that runs of holdstill made: by name and property together, so that nobody else's is
/// taken for ours. None where there is no ZFS.
///
/// # Errors
/// If the tools fail.
pub fn snapshots() -> Result<Vec<Found>> {
    // Without its module loaded the tool fails: nothing of ours can be there then.
    if Tool::find("zfs").is_err() || !std::path::Path::new("/sys/module/zfs").exists() {
        return Ok(Vec::new());
    }
    let fields = format!("name,userrefs,{PROPERTY}");
    let text = zfs(&["list", "-H", "-p", "-t", "snapshot", "-o", &fields])?;
    Ok(text.lines().filter_map(ours).collect())
}

fn ours(line: &str) -> Option<Found> {
    let mut fields = line.split('\t');
    let (name, held, run_id) = (fields.next()?, fields.next()?, fields.next()?);
    let is_named = name
        .split_once('@')
        .is_some_and(|(_, snapshot)| snapshot == format!("{TAG}.{run_id}"));
    (is_named && !run_id.is_empty()).then(|| Found {
        name: name.to_owned(),
        run_id: run_id.to_owned(),
        is_held: held != "0",
    })
}

fn hold_tag(run_id: &str) -> String {
    format!("{TAG}.{run_id}")
}

/// What ZFS allows in the name of a dataset (module/zcommon/zfs_namecheck.c), with a pool in front.
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.: /".contains(&byte);
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(allowed)
        && !text.contains("//")
}

/// `zfs get`: these fields of a property, or of `all`; a line each, with tabs between.
fn get(fields: &str, property: &str, of: &str) -> Result<String> {
    zfs(&["get", "-H", "-p", "-o", fields, property, of])
}

fn zfs(args: &[&str]) -> Result<String> {
    let tool = Tool::find("zfs")?.args(args).deadline(PATIENCE);
    let output = tool.run().and_then(Output::checked)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn change(args: &[&str]) -> Result<()> {
    zfs(args).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_property_is_restored_as_it_was() {
        let volume = Volume {
            name: "tank/vol".to_owned(),
        };
        for (text, is_visible, words) in [
            ("hidden\tdefault\n", false, "inherit snapdev tank/vol"),
            (
                "hidden\tinherited from tank\n",
                false,
                "inherit snapdev tank/vol",
            ),
            ("hidden\tlocal\n", false, "set snapdev=hidden tank/vol"),
            ("visible\tlocal\n", true, "set snapdev=visible tank/vol"),
        ] {
            let snapdev = parse_snapdev(text).unwrap();
            assert_eq!(snapdev.is_visible, is_visible);
            let made = Made::Snapdev(volume.clone(), snapdev);
            assert_eq!(made.words().join(" "), words);
        }
        assert_eq!(parse_snapdev("hidden"), None);
        let name = || "tank/vol@holdstill.1".to_owned();
        let hold = |reach| Made::Hold(name(), "1".to_owned(), reach).words().join(" ");
        assert_eq!(
            hold(Reach::Alone),
            "release holdstill.1 tank/vol@holdstill.1"
        );
        assert_eq!(
            hold(Reach::Below),
            "release -r holdstill.1 tank/vol@holdstill.1"
        );
        let snapshot = Made::Snapshot(name(), Reach::Below).words().join(" ");
        assert_eq!(snapshot, "destroy -r tank/vol@holdstill.1");
    }

    #[test]
    fn only_our_own_snapshots_are_ours() {
        let found = ours("tank/vol@holdstill.12ab\t1\t12ab").unwrap();
        assert_eq!((found.run_id.as_str(), found.is_held), ("12ab", true));
        assert_eq!(ours("tank/vol@holdstill.12ab\t1\t-"), None);
        assert_eq!(ours("tank/vol@holdstill.34cd\t1\t12ab"), None);
        assert_eq!(ours("tank/vol@daily\t0\t12ab"), None);
        assert_eq!(ours("tank/vol@holdstill.\t0\t"), None);
        assert!(is_name("tank/a-b_c.d:e f") && is_name("tank"));
        assert!(!is_name("1tank") && !is_name("tank//a") && !is_name("tank@a") && !is_name("-r"));
    }
}
