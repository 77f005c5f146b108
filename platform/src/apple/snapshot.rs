//! Snapshots of a volume of APFS: made by Time Machine's tool, which alone may (fs_snapshot_create(2) wants
//! an entitlement of Apple's), listed and deleted by diskutil(8), mounted by mount_apfs(8).

use std::path::Path;

use super::plist::{Dict, parse};
use super::{System, checked_id, checked_path, checked_uuid};
use crate::error::{Error, Result};

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique on its volume.
    pub name: String,
    /// Unique altogether.
    pub uuid: String,
}

/// Before the date in the name of a snapshot that Time Machine made of a volume, and behind it. The latter is
/// missing before macOS 11.
const BEFORE: &str = "com.apple.TimeMachine.";
const BEHIND: &str = ".local";

impl Snapshot {
    /// When Time Machine made it, if that made it: `2026-03-24-180000`, by the clock on the wall.
    pub fn date(&self) -> Option<&str> {
        let date = self.name.strip_prefix(BEFORE)?;
        let date = date.strip_suffix(BEHIND).unwrap_or(date);
        is_date(date).then_some(date)
    }
}

/// `YYYY-MM-DD-HHMMSS`.
fn is_date(text: &str) -> bool {
    text.len() == 17
        && text.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 | 10 => byte == b'-',
            _ => byte.is_ascii_digit(),
        })
}

impl System {
    /// All snapshots of a volume.
    ///
    /// # Errors
    /// If the tool fails; also where it gives no UUIDs, as before macOS 11.
    pub fn snapshots(&self, volume: &str) -> Result<Vec<Snapshot>> {
        let args = ["apfs", "listSnapshots", "-plist", checked_id(volume)?];
        parse_snapshots(&self.ask("diskutil", &args)?)
    }

    /// Has Time Machine's tool make a snapshot of every volume that Time Machine would back up. Their date.
    ///
    /// # Errors
    /// If the tool fails, or does not say that it made any.
    pub fn make_snapshots(&self) -> Result<String> {
        let said = self.change("tmutil", |tool| tool.arg("localsnapshot"))?;
        let said = String::from_utf8_lossy(&said);
        let none = || Error::invalid("cannot understand", "tmutil", said.trim());
        parse_created(&said).map(str::to_owned).ok_or_else(none)
    }

    /// Deletes a snapshot of a volume. The system goes on with that in the background.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn delete_snapshot(&self, volume: &str, uuid: &str) -> Result<()> {
        let args = [
            "apfs",
            "deleteSnapshot",
            checked_id(volume)?,
            "-uuid",
            checked_uuid(uuid)?,
        ];
        self.change("diskutil", |tool| tool.args(args)).map(drop)
    }

    /// Mounts a snapshot of the volume that is mounted at `volume`, read-only and out of people's sight, on
    /// the folder `on`.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn mount_snapshot(&self, snapshot: &Snapshot, volume: &Path, on: &Path) -> Result<()> {
        let (volume, on) = (checked_path(volume)?, checked_path(on)?);
        let args = ["-o", "rdonly,nobrowse", "-s", &snapshot.name];
        self.change("mount_apfs", |tool| tool.args(args).arg(volume).arg(on))
            .map(drop)
    }

    /// What is mounted at this very folder, if anything is, as the mount table says it: a node, or of a
    /// snapshot `NAME@NODE` (diskutil does not know such by their mount points).
    ///
    /// # Errors
    /// If the folder is no whole path, or the tool fails.
    pub fn mounted_at(&self, folder: &Path) -> Result<Option<String>> {
        let folder = checked_path(folder)?;
        let said = self.ask_text("mount", &[])?;
        Ok(parse_mounted(&said, folder).map(str::to_owned))
    }

    /// Whether this snapshot of a volume is mounted at this very folder.
    ///
    /// # Errors
    /// As [`mounted_at`](Self::mounted_at).
    pub fn is_mounted_at(&self, snapshot: &Snapshot, folder: &Path) -> Result<bool> {
        let mounted = self.mounted_at(folder)?;
        let name = mounted.as_deref().and_then(|what| what.rsplit_once('@'));
        Ok(name.is_some_and(|(name, _)| name == snapshot.name))
    }

    /// Unmounts what is mounted at `from`, even if somebody still looks at it if `force`.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn unmount(&self, from: &Path, force: bool) -> Result<()> {
        let force = force.then_some("-f");
        let from = checked_path(from)?;
        self.change("umount", |tool| tool.args(force).arg(from))
            .map(drop)
    }
}

fn parse_snapshots(said: &[u8]) -> Result<Vec<Snapshot>> {
    const TOOL: &str = "diskutil";
    let value = parse(TOOL, said)?;
    let list = Dict::of(TOOL, &value)?.needed_list("Snapshots")?;
    let snapshots = list.iter().map(|snapshot| {
        Ok(Snapshot {
            name: snapshot.needed_text("SnapshotName")?.to_owned(),
            uuid: checked_uuid(snapshot.needed_text("SnapshotUUID")?)?.to_owned(),
        })
    });
    snapshots.collect()
}

/// `WHAT on FOLDER (apfs, local, …)`, a line each.
fn parse_mounted<'a>(said: &'a str, folder: &Path) -> Option<&'a str> {
    said.lines().find_map(|line| {
        let (mount, _) = line.rsplit_once(" (")?;
        let (what, at) = mount.split_once(" on ")?;
        (Path::new(at) == folder).then_some(what)
    })
}

/// The date in `Created local snapshot with date: 2026-03-24-180000`.
fn parse_created(said: &str) -> Option<&str> {
    let mut lines = said.lines();
    let date = lines.find_map(|line| {
        line.trim()
            .strip_prefix("Created local snapshot with date:")
    })?;
    Some(date.trim()).filter(|date| is_date(date))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_listed_with_their_dates() {
        let said = include_bytes!("shapes/snapshots.plist");
        let snapshots = parse_snapshots(said).unwrap();
        let dates: Vec<_> = snapshots.iter().map(Snapshot::date).collect();
        assert_eq!(
            dates,
            [None, Some("2026-03-24-170000"), Some("2026-03-24-180000")]
        );
        assert!(
            parse_snapshots(b"<plist><dict><key>Snapshots</key><array/></dict></plist>")
                .unwrap()
                .is_empty()
        );
        assert!(parse_snapshots(b"<plist><dict/></plist>").is_err());
        let text = String::from_utf8(said.to_vec()).unwrap();
        let without = text.replace("SnapshotUUID", "Snapshot");
        assert!(parse_snapshots(without.as_bytes()).is_err());
        let option = text.replace("<string>5D7C5E32", "<string>-D7C5E32");
        assert!(parse_snapshots(option.as_bytes()).is_err());
        for end in (0..said.len()).step_by(5) {
            let _ = parse_snapshots(&said[..end]);
        }
    }

    #[test]
    fn only_names_of_time_machine_have_a_date() {
        let date = |name: &str| {
            let snapshot = Snapshot {
                name: name.to_owned(),
                uuid: String::new(),
            };
            snapshot.date().map(str::to_owned)
        };
        let right = Some("2026-03-24-180000".to_owned());
        assert_eq!(date("com.apple.TimeMachine.2026-03-24-180000.local"), right);
        assert_eq!(date("com.apple.TimeMachine.2026-03-24-180000"), right);
        for other in [
            "com.apple.TimeMachine.2026-03-24-180000.backup",
            "com.apple.os.update-2026-03-24-180000",
            "2026-03-24-180000",
            "com.apple.TimeMachine.2026-03-24-18000",
        ] {
            assert_eq!(date(other), None, "{other}");
        }
    }

    #[test]
    fn mounts_are_found_by_their_folders() {
        let said = "/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)\n\
            /dev/disk5s1 on /Volumes/My on (off) Disk (apfs, local, journaled)\n\
            com.apple.TimeMachine.2026-03-24-180000.local@/dev/disk3s5 on /private/x/snapshot \
            (apfs, local, read-only, journaled, nobrowse)\n";
        let mounted = |folder: &str| parse_mounted(said, Path::new(folder));
        assert_eq!(mounted("/"), Some("/dev/disk3s1s1"));
        assert_eq!(mounted("/Volumes/My on (off) Disk"), Some("/dev/disk5s1"));
        let snapshot = "com.apple.TimeMachine.2026-03-24-180000.local@/dev/disk3s5";
        assert_eq!(mounted("/private/x/snapshot"), Some(snapshot));
        for other in ["/private/x", "/x/snapshot", "/private/x/snapshot/y"] {
            assert_eq!(mounted(other), None, "{other}");
        }
    }

    #[test]
    fn what_was_made_is_read() {
        let said = "NOTE: local snapshots are considered purgeable\n\
                    Created local snapshot with date: 2026-03-24-180000\n";
        assert_eq!(parse_created(said), Some("2026-03-24-180000"));
        for bad in [
            "",
            "Created local snapshot with date: today",
            "Failed to create local snapshot",
        ] {
            assert_eq!(parse_created(bad), None, "{bad}");
        }
    }
}
