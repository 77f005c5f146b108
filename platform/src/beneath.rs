//! What lies beneath a file: whether writing to it would write to a given block device.
//!
//! Whoever writes to a filesystem that is frozen waits until it thaws. So before a source is frozen,
//! everything that will be written meanwhile is followed down: file, filesystem, loop device, dm and
//! md devices, partition, disk.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::btrfs;
use crate::error::{Context, Result};
use crate::mounts::{self, Mount};
use crate::node::{BlockDevice, DeviceNumber};
use crate::os;

/// Whether the filesystem numbered `filesystem` (`st_dev` of a file on it) lies on `source`, directly
/// or through other devices. What is below a network or FUSE filesystem cannot be seen.
///
/// # Errors
/// If /proc or /sys cannot be read.
pub fn rests_on(filesystem: DeviceNumber, source: &BlockDevice) -> Result<bool> {
    Ok(Below::of(filesystem)?.devices.contains(&source.number))
}

/// What a filesystem or device writes to, all the way down, itself included.
#[derive(Clone, Debug, Default)]
pub struct Below {
    /// Filesystems, by their devices' numbers, and devices.
    pub devices: BTreeSet<DeviceNumber>,
    /// There is more, which cannot be seen: what a network or FUSE filesystem writes to.
    pub is_hidden: bool,
}

impl Below {
    /// Follows down the filesystem numbered so, or the device.
    ///
    /// # Errors
    /// If /proc or /sys cannot be read.
    pub fn of(filesystem: DeviceNumber) -> Result<Self> {
        let mounts = mounts::of_this_process()?;
        let mut found = Self::default();
        let mut open = vec![filesystem];
        while let Some(number) = open.pop() {
            if !found.devices.insert(number) {
                continue;
            }
            if !os::mounts::is_of_device(number) {
                let on_it = mounts.iter().filter(|mount| mount.device == number);
                let below: Vec<_> = on_it.filter_map(below_mount).collect();
                found.is_hidden |= below.is_empty();
                open.extend(below);
                continue;
            }
            match BlockDevice::of(number) {
                Ok(device) => open.extend(below_device(&device)?),
                // A number that sysfs does not know has nothing below it that could be frozen.
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// The same for an open file, block device, pipe or terminal; the last two rest on nothing.
///
/// # Errors
/// As [`rests_on`].
pub fn file_rests_on(file: impl AsFd, source: &BlockDevice) -> Result<bool> {
    let fd = file.as_fd();
    let metadata = fd.try_clone_to_owned().map(File::from);
    let metadata = metadata.and_then(|file| file.metadata()).context(
        "cannot look at",
        PathBuf::from(format!("file descriptor {}", fd.as_raw_fd())),
    )?;
    let kind = metadata.file_type();
    if kind.is_block_device() {
        return rests_on(DeviceNumber::from_raw(metadata.rdev()), source);
    }
    if kind.is_file() || kind.is_dir() {
        let filesystem = DeviceNumber::from_raw(metadata.dev());
        for device in btrfs::devices_below(fd)?.unwrap_or_else(|| vec![filesystem]) {
            if rests_on(device, source)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The filesystem or device that a filesystem without a device number of its own writes to.
fn below_mount(mount: &Mount) -> Option<DeviceNumber> {
    if mount.fs_type == "overlay" {
        let upper = mount
            .super_options
            .split(',')
            .find_map(|option| option.strip_prefix("upperdir="))?;
        let metadata = std::fs::metadata(Path::new(upper)).ok()?;
        return Some(DeviceNumber::from_raw(metadata.dev()));
    }
    mount.block_device()
}

/// Devices that a device writes to, one level down.
fn below_device(device: &BlockDevice) -> Result<Vec<DeviceNumber>> {
    let mut below = Vec::new();
    if !device.is_whole_disk() {
        below.push(device.disk);
    }
    if let Some(backing) = device.loop_backing()? {
        below.push(backing.device.unwrap_or(backing.file.filesystem));
    }
    below.extend(device.lower_devices()?);
    Ok(below)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, Mounted, mkfs, needs_root, scratch};

    #[test]
    fn privileged_a_file_on_a_loop_on_the_source_rests_on_it() {
        needs_root!();
        let dir = scratch();
        let outer = Loop::sparse(&dir.path().join("outer"), 64 << 20);
        mkfs("ext4", outer.path());
        let mount = Mounted::new(outer.path(), &dir.path().join("m"), "rw");
        let inner = Loop::sparse(&mount.path().join("inner"), 16 << 20);
        let source = BlockDevice::at(outer.path()).unwrap();
        let inside = BlockDevice::at(inner.path()).unwrap();
        assert!(rests_on(inside.number, &source).unwrap());
        let file = std::fs::File::open(mount.path()).unwrap();
        assert!(file_rests_on(&file, &source).unwrap());
        assert!(!file_rests_on(&file, &inside).unwrap());
        let elsewhere = std::fs::File::open("/proc/self/status").unwrap();
        assert!(!file_rests_on(&elsewhere, &source).unwrap());
    }
}
