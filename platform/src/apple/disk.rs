//! One disk, slice, volume or mounted snapshot (`diskutil info -plist`), and the containers of APFS with
//! what is in them (`diskutil apfs list -plist`).

use std::path::PathBuf;

use super::plist::{Dict, parse};
use super::{System, checked_id};
use crate::error::Result;

const TOOL: &str = "diskutil";

/// What `diskutil info` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// `disk3s5`.
    pub id: String,
    /// The whole disk it is on, itself perhaps; of a volume of APFS, the one that the container shows.
    pub whole: String,
    /// What the partition table says is in it: a name (`Apple_APFS`, `GUID_partition_scheme`) or a UUID.
    pub content: String,
    /// Whether it is built into the machine.
    pub is_internal: bool,
    /// Whether its medium can be taken out, as that of a card reader that is built in.
    pub is_removable: bool,
    /// What it is attached by: `Apple Fabric`, `PCI-Express`, `SATA`, `USB`, `Disk Image`, …
    pub bus: String,
    /// Bytes; of a volume of APFS, of its container.
    pub size: u64,
    /// `apfs`, `hfs`, …, where a filesystem is known on it.
    pub fs: Option<String>,
    /// Where it is mounted.
    pub mount_point: Option<PathBuf>,
    /// The container of APFS that it is a volume of, or the whole disk of: `disk3`.
    pub container: Option<String>,
    /// The partitions that this container lies on.
    pub stores: Vec<String>,
    /// If it is a mounted snapshot: its UUID.
    pub snapshot: Option<String>,
    /// Whether Apple's seal is on it: the system itself.
    pub is_sealed: bool,
    /// The group of volumes it belongs to: system and data of one installed macOS.
    pub group: Option<String>,
}

/// A container of APFS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The whole disk that shows it: `disk3`.
    pub id: String,
    /// What it lies on.
    pub stores: Vec<Store>,
    /// Whether it lies on a fast and a slow disk together.
    pub is_fusion: bool,
    /// Bytes.
    pub size: u64,
    /// Bytes that no volume uses.
    pub free: u64,
    /// Its volumes.
    pub volumes: Vec<Volume>,
}

/// A partition or disk that a container lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    /// `disk0s2`.
    pub id: String,
    /// Bytes.
    pub size: u64,
}

/// A volume of APFS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// `disk3s5`.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Bytes that it uses.
    pub used: u64,
    /// What it is for: `System`, `Data`, `Preboot`, `Recovery`, `VM`, …; none of an ordinary one.
    pub roles: Vec<String>,
    /// Whether its content is encrypted.
    pub is_encrypted: bool,
    /// Whether its key is not there.
    pub is_locked: bool,
    /// Whether it is being encrypted or decrypted right now.
    pub is_converting: bool,
}

impl System {
    /// What is known of a disk, slice, volume or snapshot, by its name.
    ///
    /// # Errors
    /// If there is none of that name, or the tool fails.
    pub fn disk(&self, id: &str) -> Result<Disk> {
        parse_disk(&self.ask(TOOL, &["info", "-plist", checked_id(id)?])?)
    }

    /// All containers of APFS.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn containers(&self) -> Result<Vec<Container>> {
        parse_containers(&self.ask(TOOL, &["apfs", "list", "-plist"])?)
    }
}

fn parse_disk(said: &[u8]) -> Result<Disk> {
    let value = parse(TOOL, said)?;
    let info = Dict::of(TOOL, &value)?;
    let id = |key| info.text(key).map(checked_id).transpose();
    let stores = info.list("APFSPhysicalStores")?;
    let stores = stores
        .iter()
        .map(|store| checked_id(store.needed_text("APFSPhysicalStore")?).map(str::to_owned));
    let is_snapshot = info.flag("APFSSnapshot").unwrap_or(false);
    Ok(Disk {
        id: checked_id(info.needed_text("DeviceIdentifier")?)?.to_owned(),
        whole: checked_id(info.needed_text("ParentWholeDisk")?)?.to_owned(),
        content: info.text("Content").unwrap_or_default().to_owned(),
        is_internal: info.needed_flag("Internal")?,
        is_removable: info.flag("RemovableMedia").unwrap_or(false),
        bus: info.text("BusProtocol").unwrap_or_default().to_owned(),
        size: info.needed_number("Size")?,
        fs: info.text("FilesystemType").map(str::to_owned),
        mount_point: info.text("MountPoint").map(PathBuf::from),
        container: id("APFSContainerReference")?.map(str::to_owned),
        stores: stores.collect::<Result<_>>()?,
        snapshot: match is_snapshot {
            true => Some(info.needed_text("APFSSnapshotUUID")?.to_owned()),
            false => None,
        },
        is_sealed: info.flag("Sealed").unwrap_or(false),
        group: info.text("APFSVolumeGroupID").map(str::to_owned),
    })
}

fn parse_containers(said: &[u8]) -> Result<Vec<Container>> {
    let value = parse(TOOL, said)?;
    let list = Dict::of(TOOL, &value)?;
    // An empty dictionary where there is none.
    list.list("Containers")?.iter().map(container).collect()
}

fn container(dict: &Dict<'_>) -> Result<Container> {
    let stores = dict.needed_list("PhysicalStores")?;
    let stores = stores.iter().map(|store| {
        Ok(Store {
            id: checked_id(store.needed_text("DeviceIdentifier")?)?.to_owned(),
            size: store.needed_number("Size")?,
        })
    });
    let volumes = dict.needed_list("Volumes")?;
    Ok(Container {
        id: checked_id(dict.needed_text("ContainerReference")?)?.to_owned(),
        stores: stores.collect::<Result<_>>()?,
        is_fusion: dict.needed_flag("Fusion")?,
        size: dict.needed_number("CapacityCeiling")?,
        free: dict.needed_number("CapacityFree")?,
        volumes: volumes.iter().map(volume).collect::<Result<_>>()?,
    })
}

fn volume(dict: &Dict<'_>) -> Result<Volume> {
    Ok(Volume {
        id: checked_id(dict.needed_text("DeviceIdentifier")?)?.to_owned(),
        name: dict.text("Name").map(str::to_owned),
        uuid: dict.text("APFSVolumeUUID").map(str::to_owned),
        used: dict.needed_number("CapacityInUse")?,
        roles: dict.texts("Roles")?,
        is_encrypted: dict.needed_flag("Encryption")?,
        is_locked: dict.needed_flag("Locked")?,
        is_converting: dict.flag("CryptoMigrationOn").unwrap_or(false),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const DATA: &[u8] = include_bytes!("shapes/info-data.plist");
    const SEALED: &[u8] = include_bytes!("shapes/info-sealed.plist");
    const PARTITION: &[u8] = include_bytes!("shapes/info-partition.plist");
    const CONTAINERS: &[u8] = include_bytes!("shapes/apfs-list.plist");

    #[test]
    fn a_data_volume_is_read() {
        let data = parse_disk(DATA).unwrap();
        assert_eq!(
            (data.id.as_str(), data.whole.as_str()),
            ("disk3s5", "disk3")
        );
        assert_eq!(data.fs.as_deref(), Some("apfs"));
        let point = Path::new("/System/Volumes/Data");
        assert_eq!(data.mount_point.as_deref(), Some(point));
        assert_eq!(data.container.as_deref(), Some("disk3"));
        assert_eq!(data.stores, ["disk0s2"]);
        assert_eq!(
            (data.bus.as_str(), data.is_removable),
            ("Apple Fabric", false)
        );
        assert!(data.is_internal && !data.is_sealed && data.snapshot.is_none());
        assert!(data.group.is_some());
        assert_eq!(data.size, 494_384_795_648);
    }

    #[test]
    fn the_sealed_snapshot_of_the_system_and_a_partition_are_told_apart() {
        let sealed = parse_disk(SEALED).unwrap();
        assert_eq!(sealed.id, "disk3s1s1");
        assert!(sealed.is_sealed && sealed.snapshot.is_some());
        let partition = parse_disk(PARTITION).unwrap();
        assert_eq!(partition.content, "Apple_APFS");
        assert!(partition.fs.is_none() && partition.mount_point.is_none());
        assert!(!partition.is_sealed && partition.stores.is_empty());
    }

    #[test]
    fn containers_and_their_volumes_are_read() {
        let containers = parse_containers(CONTAINERS).unwrap();
        let ids: Vec<_> = containers.iter().map(|one| one.id.as_str()).collect();
        assert_eq!(ids, ["disk3", "disk6"]);
        assert_eq!(containers[0].stores[0].id, "disk0s2");
        assert!(!containers[0].is_fusion && containers[1].is_fusion);
        assert_eq!(containers[1].stores.len(), 2);
        let data = &containers[0].volumes[1];
        assert_eq!(
            (data.id.as_str(), data.roles.as_slice()),
            ("disk3s5", &["Data".to_owned()][..])
        );
        assert!(data.is_encrypted && !data.is_locked && !data.is_converting);
        assert!(containers[1].volumes[0].is_locked);
        assert!(
            parse_containers(b"<plist><dict/></plist>")
                .unwrap()
                .is_empty()
        );
    }

    /// Whatever of these texts is cut off or replaced: there is an answer, or an error.
    #[test]
    fn damaged_outputs_are_errors_at_most() {
        for text in [DATA, SEALED, PARTITION, CONTAINERS] {
            let text = String::from_utf8(text.to_vec()).unwrap();
            for end in (0..text.len()).step_by(7) {
                let _ = (
                    parse_disk(&text.as_bytes()[..end]),
                    parse_containers(&text.as_bytes()[..end]),
                );
            }
            for (from, to) in [
                ("<integer>", "<integer>-"),
                ("<integer>", "<integer>99999999999999999999"),
                ("<true/>", "<string>maybe</string>"),
                ("<string>disk", "<string>-disk"),
                ("<array>", "<string/><array>"),
                ("dict>", "array>"),
            ] {
                let bad = text.replace(from, to);
                assert!(parse_disk(bad.as_bytes()).is_err() || !text.contains(from));
                assert!(parse_containers(bad.as_bytes()).is_err() || !text.contains("Containers"));
            }
        }
        assert!(parse_disk(b"bplist00").is_err());
    }
}
