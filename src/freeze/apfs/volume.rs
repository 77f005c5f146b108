//! The volume that shall be imaged, and why it cannot be.

use std::path::{Path, PathBuf};

use holdstill_platform::apple::{Container, SECTOR, System, Version, Volume as Facts};

use crate::error::Result;
use crate::units::ByteLen;

/// Since this version `diskutil` tells the UUIDs of snapshots, without which ours cannot be told from
/// others. (asr takes snapshots since 10.15.)
const OLDEST: Version = Version {
    major: 11,
    minor: 0,
};

/// What is the system's own, and made anew by it.
const OF_THE_SYSTEM: [&str; 8] = [
    "System",
    "Preboot",
    "Recovery",
    "VM",
    "Update",
    "Hardware",
    "xART",
    "Installer",
];

/// What a disk image needs beside its container.
const TABLE: ByteLen = ByteLen::mib(1);

/// What the copy may need beside what the volume uses, at least.
const LEAST_MARGIN: ByteLen = ByteLen::mib(64);

/// What a volume is called, and how large it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its name.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Bytes of its container.
    pub size: u64,
    /// Bytes it uses.
    pub used: u64,
}

/// Describes the volume `id`; `None` if it is no volume of APFS.
///
/// # Errors
/// If the tools fail.
pub fn describe(system: &System, id: &str) -> Result<Option<Description>> {
    let containers = system.containers()?;
    Ok(find(&containers, id).map(|(container, facts)| Description {
        name: facts.name.clone(),
        uuid: facts.uuid.clone(),
        size: container.size,
        used: facts.used,
    }))
}

/// A mounted volume of APFS that a snapshot can be copied of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// `disk3s5`.
    pub id: String,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Bytes of its container.
    pub size: u64,
    /// Bytes in use by it, and by what belongs to the same group: asr copies all of that.
    pub used: u64,
    /// The names of the others in its group.
    pub group: Vec<String>,
    /// Whether its content is encrypted.
    pub is_encrypted: bool,
}

impl Volume {
    /// Examines the volume `id` that is mounted at `mount_point`; or says why it cannot be imaged so, and what
    /// can be done.
    ///
    /// # Errors
    /// If the tools fail.
    pub fn examine(
        system: &System,
        id: &str,
        mount_point: &Path,
    ) -> Result<std::result::Result<Self, String>> {
        let no = |why: &str| Ok(Err(why.to_owned()));
        if !system.is_root() {
            return no("only root may: run it with sudo");
        }
        let version = system.version()?;
        if version < OLDEST {
            return Ok(Err(format!(
                "macOS {version} is too old, {OLDEST} is needed: image the disk from another system"
            )));
        }
        let disk = system.disk(id)?;
        if disk.fs.as_deref() != Some("apfs") {
            return no("it is no APFS");
        }
        if disk.is_sealed {
            return no(
                "it is the sealed System volume, which installing macOS makes anew: \
                 name the Data volume, /System/Volumes/Data",
            );
        }
        if disk.snapshot.is_some() {
            return no("it is a snapshot that is mounted: name the volume it is of");
        }
        let containers = system.containers()?;
        let Some((container, facts)) = find(&containers, id) else {
            return no("it is in no container that diskutil lists");
        };
        if container.is_fusion || container.stores.len() != 1 {
            return no("its container is a Fusion drive, of several disks: \
                 copy its files to one of a single disk");
        }
        if let Some(role) = facts.roles.iter().find(|role| is_of_the_system(role)) {
            return Ok(Err(format!(
                "it is the system's own {role} volume, which installing macOS makes anew: \
                 name the Data volume, /System/Volumes/Data"
            )));
        }
        if facts.is_locked {
            return no("FileVault has it locked: unlock it, `diskutil apfs unlockVolume`");
        }
        if facts.is_converting {
            return no("it is being encrypted or decrypted: wait until that is done");
        }
        let others = match &disk.group {
            Some(group) => others_of(system, container, id, group),
            None => Vec::new(),
        };
        let all = others.iter().map(|other| other.used);
        Ok(Ok(Self {
            id: id.to_owned(),
            mount_point: mount_point.to_owned(),
            size: container.size,
            used: all.fold(facts.used, u64::saturating_add),
            group: others.iter().map(|other| name_of(other)).collect(),
            is_encrypted: facts.is_encrypted,
        }))
    }

    /// How many sectors the image has that it is copied into: its container has room for all of the
    /// volume's own.
    pub fn image_sectors(&self) -> u64 {
        self.size.saturating_add(TABLE.0).div_ceil(SECTOR)
    }

    /// The room that the copy needs at most.
    pub fn needed(&self) -> ByteLen {
        let margin = (self.used / 16).max(LEAST_MARGIN.0);
        ByteLen(self.used.saturating_add(margin))
    }
}

/// Whether Time Machine never makes a snapshot of a volume with this role.
pub(super) fn is_of_the_system(role: &str) -> bool {
    OF_THE_SYSTEM
        .iter()
        .any(|own| own.eq_ignore_ascii_case(role))
}

fn name_of(volume: &Facts) -> String {
    volume.name.clone().unwrap_or_else(|| volume.id.clone())
}

fn find<'a>(containers: &'a [Container], id: &str) -> Option<(&'a Container, &'a Facts)> {
    containers.iter().find_map(|container| {
        let volume = container.volumes.iter().find(|volume| volume.id == id);
        volume.map(|volume| (container, volume))
    })
}

/// The others of a group. What cannot be asked is taken for one: then more room is asked for than needed.
fn others_of<'a>(
    system: &System,
    container: &'a Container,
    id: &str,
    group: &str,
) -> Vec<&'a Facts> {
    let belongs = |volume: &&Facts| {
        volume.id != id
            && system
                .disk(&volume.id)
                .map_or(true, |disk| disk.group.as_deref() == Some(group))
    };
    container.volumes.iter().filter(belongs).collect()
}
