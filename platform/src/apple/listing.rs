//! Which whole disks there are, and what is on each: `diskutil list -plist`.

use super::plist::{Dict, parse};
use super::{System, checked_id};
use crate::error::Result;

const TOOL: &str = "diskutil";

/// A whole disk: one of metal, one that a container of APFS shows, or an attached image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// `disk0`.
    pub id: String,
    /// The kind of its partition table, or what it holds without one.
    pub content: String,
    /// Bytes.
    pub size: u64,
    /// Its partitions: `disk0s1`, …
    pub partitions: Vec<String>,
    /// The volumes of the container that it shows: `disk3s1`, …
    pub volumes: Vec<String>,
    /// The partitions that this container lies on.
    pub stores: Vec<String>,
}

impl System {
    /// All whole disks.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn whole_disks(&self) -> Result<Vec<Whole>> {
        parse_list(&self.ask(TOOL, &["list", "-plist"])?)
    }
}

fn parse_list(said: &[u8]) -> Result<Vec<Whole>> {
    let value = parse(TOOL, said)?;
    let disks = Dict::of(TOOL, &value)?.needed_list("AllDisksAndPartitions")?;
    let ids = |disk: &Dict<'_>, key| -> Result<Vec<String>> {
        let parts = disk.list(key)?;
        let ids = parts
            .iter()
            .map(|part| checked_id(part.needed_text("DeviceIdentifier")?).map(str::to_owned));
        ids.collect()
    };
    let disks = disks.iter().map(|disk| {
        Ok(Whole {
            id: checked_id(disk.needed_text("DeviceIdentifier")?)?.to_owned(),
            content: disk.text("Content").unwrap_or_default().to_owned(),
            size: disk.needed_number("Size")?,
            partitions: ids(disk, "Partitions")?,
            volumes: ids(disk, "APFSVolumes")?,
            stores: ids(disk, "APFSPhysicalStores")?,
        })
    });
    disks.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_disks_are_listed() {
        let said = include_bytes!("shapes/list.plist");
        let disks = parse_list(said).unwrap();
        let ids: Vec<_> = disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk0", "disk3"]);
        assert_eq!(disks[0].partitions, ["disk0s1", "disk0s2"]);
        assert!(disks[0].volumes.is_empty());
        assert_eq!(
            (disks[1].stores.as_slice(), disks[1].volumes.len()),
            (&["disk0s2".to_owned()][..], 2)
        );
        for end in (0..said.len()).step_by(11) {
            let _ = parse_list(&said[..end]);
        }
        assert!(parse_list(b"<plist><dict/></plist>").is_err());
    }
}
