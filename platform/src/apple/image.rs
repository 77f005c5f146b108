//! Sparse disk images, by hdiutil(1): a disk in a file that grows as it is filled.

use std::path::Path;

use super::plist::{Dict, parse};
use super::{System, checked_id, checked_path, id_of_node, whole_of};
use crate::error::{Error, Result};

const TOOL: &str = "hdiutil";

/// What hdiutil counts in, in bytes.
pub const SECTOR: u64 = 512;

/// How the partition table of an image says that a container of APFS is on a partition: by the name or by
/// the type.
const APFS: [&str; 2] = ["Apple_APFS", "7C3457EF-0000-11AA-AA11-00306543ECAC"];

/// The same for the table itself.
const TABLE: &str = "GUID_partition_scheme";

/// What an image is attached for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To be read: nobody can write to it.
    ReadOnly,
    /// To be filled.
    ReadWrite,
}

/// An attached image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The disk: `disk4`.
    pub disk: String,
    /// Its partition for a container of APFS: `disk4s1`.
    pub store: String,
}

impl System {
    /// Makes a sparse image of so many sectors at `path`, which ends in `.sparseimage`, with a partition on
    /// it and an empty container of APFS in that.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn create_image(&self, path: &Path, sectors: u64) -> Result<()> {
        let sectors = sectors.to_string();
        let args = [
            "create", "-type", "SPARSE", "-fs", "APFS", "-sectors", &sectors,
        ];
        let path = checked_path(path)?;
        self.change(TOOL, |tool| tool.args(args).arg(path))
            .map(drop)
    }

    /// Attaches the image, and mounts nothing of it.
    ///
    /// # Errors
    /// If the tool fails, or there is not just the one partition for APFS.
    pub fn attach(&self, path: &Path, mode: Mode) -> Result<Attached> {
        let path = checked_path(path)?;
        let read_only = (mode == Mode::ReadOnly).then_some("-readonly");
        let said = self.change(TOOL, |tool| {
            let tool = tool.args(["attach", "-plist", "-nomount", "-nobrowse"]);
            tool.args(read_only).arg(path)
        })?;
        parse_attached(&said)
    }

    /// The disks by which the image at `path` is attached: one for each time.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn attached(&self, path: &Path) -> Result<Vec<String>> {
        let said = self.ask(TOOL, &["info", "-plist"])?;
        parse_info(&said, path)
    }

    /// Unmounts what is mounted of an attached image, and detaches it: even if somebody still uses it if
    /// `force`.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn detach(&self, disk: &str, force: bool) -> Result<()> {
        let disk = checked_id(disk)?;
        let force = force.then_some("-force");
        self.change(TOOL, |tool| tool.args(["detach", disk]).args(force))
            .map(drop)
    }
}

/// Every device that came with an image: its name, and what is in it.
fn entities(dict: &Dict<'_>) -> Result<Vec<(String, Vec<String>)>> {
    let list = dict.needed_list("system-entities")?;
    let entities = list.iter().map(|entity| {
        let hints = ["content-hint", "unmapped-content-hint"];
        let hints = hints.iter().filter_map(|key| entity.text(key));
        let id = id_of_node(entity.needed_text("dev-entry")?)?;
        Ok((id, hints.map(str::to_owned).collect()))
    });
    entities.collect()
}

/// Beside the disk and its partition there are the disk that the container shows, and its volumes.
fn parse_attached(said: &[u8]) -> Result<Attached> {
    let value = parse(TOOL, said)?;
    let entities = entities(&Dict::of(TOOL, &value)?)?;
    let only = |is_wanted: &dyn Fn(&str) -> bool| {
        let mut found = entities
            .iter()
            .filter(|(_, hints)| hints.iter().any(|hint| is_wanted(hint)));
        match (found.next(), found.next()) {
            (Some((id, _)), None) => Some(id.clone()),
            _ => None,
        }
    };
    let disk = only(&|hint| hint == TABLE);
    let store = only(&|hint| APFS.iter().any(|apfs| apfs.eq_ignore_ascii_case(hint)));
    match (disk, store) {
        (Some(disk), Some(store)) if whole_of(&store)? == disk && store != disk => {
            Ok(Attached { disk, store })
        }
        _ => {
            let why = "not one disk with one partition for APFS";
            Err(Error::invalid("cannot understand", TOOL, why))
        }
    }
}

fn parse_info(said: &[u8], path: &Path) -> Result<Vec<String>> {
    let value = parse(TOOL, said)?;
    let images = Dict::of(TOOL, &value)?.needed_list("images")?;
    let mut disks = Vec::new();
    for image in images {
        if image.text("image-path").map(Path::new) != Some(path) {
            continue;
        }
        let entities = entities(&image)?;
        let has_table = |hints: &[String]| hints.iter().any(|hint| hint == TABLE);
        let disk = entities.iter().find(|(_, hints)| has_table(hints));
        // Any device of it will do to detach all.
        let disk = disk.or(entities.first()).map(|(id, _)| id.clone());
        disks.extend(disk);
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACHED: &[u8] = include_bytes!("shapes/attach.plist");
    const INFO: &[u8] = include_bytes!("shapes/hdiutil-info.plist");

    #[test]
    fn the_disk_and_its_partition_are_found() {
        let attached = parse_attached(ATTACHED).unwrap();
        assert_eq!(
            (attached.disk.as_str(), attached.store.as_str()),
            ("disk4", "disk4s1")
        );
        let text = String::from_utf8(ATTACHED.to_vec()).unwrap();
        for (from, to) in [
            ("<string>/dev/disk4s1<", "<string>/dev/disk5s9<"),
            ("<string>/dev/disk4s1<", "<string>/etc/passwd<"),
            ("GUID_partition_scheme", "Apple_APFS"),
            ("Apple_APFS", "Apple_HFS"),
            ("system-entities", "system"),
        ] {
            let bad = text.replace(from, to);
            // The type of the partition tells what its name does not.
            let bad = bad.replace("7C3457EF", "48465300");
            assert!(parse_attached(bad.as_bytes()).is_err(), "{from} {to}");
        }
        for end in (0..text.trim_end().len()).step_by(5) {
            assert!(parse_attached(&ATTACHED[..end]).is_err());
        }
    }

    #[test]
    fn the_disks_of_one_image_are_found() {
        let disks = |path: &str| parse_info(INFO, Path::new(path)).unwrap();
        assert_eq!(
            disks("/Volumes/Backup/.holdstill.12ab/copy.sparseimage"),
            ["disk4"]
        );
        assert_eq!(disks("/Users/me/other.dmg"), ["disk9"]);
        assert!(disks("/Volumes/Backup").is_empty());
        let text = String::from_utf8(INFO.to_vec()).unwrap();
        let other_table = text.replace("GUID_partition_scheme", "FDisk_partition_scheme");
        let path = Path::new("/Users/me/other.dmg");
        assert_eq!(parse_info(other_table.as_bytes(), path).unwrap(), ["disk9"]);
        assert!(parse_info(b"<plist><dict/></plist>", Path::new("/")).is_err());
    }
}
