//! The search for users: mounts, and processes that have a device or file open for writing.
//!
//! What is built on a device (an APFS container on a partition, a disk on a disk image's file) is not found:
//! no call tells. A device with something on it that is in use cannot be claimed
//! ([`crate::exclusive::Claim`]), and the program that serves a disk image has its file open.

use std::collections::BTreeMap;

use super::node::{self, disk_of, name_at};
use super::processes;
use crate::error::Result;
use crate::in_use::{Swap, User, Users};
use crate::mounts;
use crate::node::{BlockDevice, DeviceNumber, FileId};

/// See [`crate::in_use::of_device`]. No device is opened for this: it may be claimed.
pub(crate) fn of_device(device: &BlockDevice, ignore: &[i32]) -> Result<Users> {
    let shares = shares_bytes_with(&device.name);
    let names: BTreeMap<DeviceNumber, String> = node::all()?
        .into_iter()
        .filter(|(name, _)| shares(name))
        .map(|(name, number)| (number, name))
        .collect();
    let mut users = Vec::new();
    for mount in mounts::of_this_process()? {
        let name = name_at(mount.source.as_ref());
        if name.is_some_and(&shares) {
            users.push(User::Mount {
                read_only: mount.is_read_only(),
                point: mount.point,
                fs_type: mount.fs_type,
                elsewhere: None,
            });
        }
    }
    let mut found = processes::writers(ignore, &|open| {
        open.device
            .is_some_and(|device| names.contains_key(&device))
    })?;
    users.append(&mut found.users);
    found.users = users;
    Ok(found)
}

/// Whether a disk or part, by name, has bytes in common with `device`: itself, the whole disk, and all that is
/// on it.
fn shares_bytes_with(device: &str) -> impl Fn(&str) -> bool {
    let whole = disk_of(device).unwrap_or(device).to_owned();
    let device = device.to_owned();
    move |name| {
        let is_on = |name: &str, below: &str| {
            let rest = name.strip_prefix(below);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('s'))
        };
        name == whole || is_on(name, &device) || is_on(&device, name)
    }
}

/// See [`crate::in_use::of_file`].
pub(crate) fn of_file(file: FileId, ignore: &[i32]) -> Result<Users> {
    processes::writers(ignore, &|open| open.device.is_none() && open.file == file)
}

/// See [`crate::in_use::swaps`].
pub(crate) fn swaps() -> Result<Vec<Swap>> {
    Ok(Vec::new())
}
