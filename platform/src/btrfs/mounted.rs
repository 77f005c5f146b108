//! Which btrfs are mounted, and on which devices: /sys/fs/btrfs (fs/btrfs/sysfs.c). There is one folder
//! for each, by its id, from its first mount to its last unmount, in whatever mount namespace; the list
//! of mounts shows one device of each only.

use std::path::{Path, PathBuf};

use super::Filesystem;
use crate::error::{Context, Error, Result};
use crate::mounts::{self, Mount};
use crate::node::DeviceNumber;

const SYSFS: &str = "/sys/fs/btrfs";

/// A mounted btrfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The id it is mounted under.
    pub fsid: [u8; 16],
    /// All its devices, also those of its seed, but for missing ones; ascending.
    pub devices: Vec<DeviceNumber>,
}

impl Mounted {
    /// The one that lies on this device, alone or with others.
    ///
    /// # Errors
    /// If sysfs makes no sense.
    pub fn on(device: DeviceNumber) -> Result<Option<Self>> {
        let all = mounted()?;
        Ok(all
            .into_iter()
            .find(|mounted| mounted.devices.contains(&device)))
    }

    /// The one that the folder at `path` lies on.
    ///
    /// # Errors
    /// If `path` cannot be opened, or lies on no btrfs; if sysfs makes no sense.
    pub fn at(path: &Path) -> Result<Self> {
        let fsid = Filesystem::open(path)?.fsid();
        let unknown = || Error::other("cannot find the devices of", path, "sysfs lists none");
        let devices = devices(fsid)?.filter(|devices| !devices.is_empty());
        Ok(Self {
            fsid,
            devices: devices.ok_or_else(unknown)?,
        })
    }

    /// Where it is mounted as this process sees it: where all of it is, if there is such a place, else
    /// where one of its subvolumes is. `None` if it is mounted out of sight only.
    ///
    /// # Errors
    /// If the mounts cannot be read.
    pub fn mount(&self) -> Result<Option<Mount>> {
        Ok(self.find()?.map(|(mount, _)| mount))
    }

    /// Opens it, where it is mounted; `None` if it is mounted out of sight only.
    ///
    /// # Errors
    /// If the mounts cannot be read.
    pub fn open(&self) -> Result<Option<Filesystem>> {
        Ok(self.find()?.map(|(_, filesystem)| filesystem))
    }

    fn find(&self) -> Result<Option<(Mount, Filesystem)>> {
        let mut found = None;
        for mount in mounts::of_this_process()? {
            // Others are not even opened: that would be in the way of whoever unmounts them.
            let shown = mount.block_device();
            if mount.fs_type != "btrfs" || shown.is_some_and(|it| !self.devices.contains(&it)) {
                continue;
            }
            // Another mount may lie above it, and names of devices lie.
            let opened = Filesystem::open(&mount.point);
            let Some(filesystem) = opened.ok().filter(|open| open.fsid() == self.fsid) else {
                continue;
            };
            if mount.is_whole() {
                return Ok(Some((mount, filesystem)));
            }
            found = found.or(Some((mount, filesystem)));
        }
        Ok(found)
    }
}

/// All that are mounted.
///
/// # Errors
/// If sysfs makes no sense. One that is unmounted meanwhile is left out.
pub fn mounted() -> Result<Vec<Mounted>> {
    let mut all = Vec::new();
    let Some(entries) = gone_is_none(std::fs::read_dir(SYSFS)).context("cannot read", SYSFS)?
    else {
        return Ok(all);
    };
    for entry in entries {
        let entry = entry.context("cannot read", SYSFS)?;
        // Beside them lies `features`.
        let Some(fsid) = parse(&entry.file_name().to_string_lossy()) else {
            continue;
        };
        if let Some(devices) = devices(fsid)? {
            all.push(Mounted { fsid, devices });
        }
    }
    Ok(all)
}

/// The folder of a mounted btrfs in sysfs.
pub(super) fn folder(fsid: [u8; 16]) -> PathBuf {
    Path::new(SYSFS).join(text(fsid))
}

/// The devices of a mounted btrfs; `None` if it is mounted no more.
pub(super) fn devices(fsid: [u8; 16]) -> Result<Option<Vec<DeviceNumber>>> {
    let folder = folder(fsid).join("devices");
    let Some(entries) = gone_is_none(std::fs::read_dir(&folder)).context("cannot read", &folder)?
    else {
        return Ok(None);
    };
    let mut devices = Vec::new();
    for entry in entries {
        let path = entry.context("cannot read", &folder)?.path().join("dev");
        let read = std::fs::read_to_string(&path);
        // A device that is just taken out of it.
        let Some(number) = gone_is_none(read).context("cannot read", &path)? else {
            continue;
        };
        let number = number
            .parse()
            .map_err(|error| Error::new("cannot read", &path, error))?;
        devices.push(number);
    }
    devices.sort_unstable();
    Ok(Some(devices))
}

fn gone_is_none<T>(result: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// As sysfs writes an id: 8-4-4-4-12 hexadecimal digits.
fn text(fsid: [u8; 16]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(36);
    for (at, byte) in fsid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Writing to a string never fails.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn parse(name: &str) -> Option<[u8; 16]> {
    let digits = name.replace('-', "");
    if digits.len() != 32 || !digits.is_ascii() {
        return None;
    }
    let mut fsid = [0; 16];
    for (at, byte) in fsid.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    (text(fsid) == name).then_some(fsid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_written() {
        let name = "0c1d2e3f-4a5b-6c7d-8e9f-a0b1c2d3e4f5";
        assert_eq!(text(parse(name).unwrap()), name);
        let broken = [
            "features",
            "",
            "0C1D2E3F-4a5b-6c7d-8e9f-a0b1c2d3e4f5",
            "0c1d2e3f4a5b6c7d8e9fa0b1c2d3e4f5",
            "+c1d2e3f-4a5b-6c7d-8e9f-a0b1c2d3e4f5",
        ];
        for broken in broken {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }
}
