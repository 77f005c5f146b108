//! The search for users: mounts, and processes that have a device or file open for writing.
//!
//! What is built on a device (an APFS container on a partition, a disk on a disk image's file) is not found:
//! no call tells. A device with something on it that is in use cannot be claimed for writing
//! ([`crate::exclusive::Claim`]), the program that serves a disk image has its file open, and what is mounted
//! of a container its tools tell ([`crate::apple`]).

use std::collections::BTreeSet;

use super::names::{name_at, share_bytes};
use super::{node, processes};
use crate::error::Result;
use crate::in_use::{Swap, User, Users};
use crate::mounts;
use crate::node::{BlockDevice, DeviceNumber, FileId};

/// See [`crate::in_use::of_device`]. No device is opened for this: it may be claimed.
pub(crate) fn of_device(device: &BlockDevice, ignore: &[i32]) -> Result<Users> {
    let numbers: BTreeSet<DeviceNumber> = node::all()?
        .into_iter()
        .filter(|(name, _)| share_bytes(name, &device.name))
        .map(|(_, number)| number)
        .collect();
    let mut users = Vec::new();
    for mount in mounts::of_this_process()? {
        let name = name_at(mount.source.as_ref());
        if name.is_some_and(|name| share_bytes(name, &device.name)) {
            users.push(User::Mount {
                read_only: mount.is_read_only(),
                is_stopped: mount.is_stopped(),
                point: mount.point,
                fs_type: mount.fs_type,
                elsewhere: None,
            });
        }
    }
    let mut found = processes::writers(ignore, &|open| {
        open.device.is_some_and(|device| numbers.contains(&device))
    })?;
    users.append(&mut found.users);
    found.users = users;
    Ok(found)
}

/// See [`crate::in_use::of_file`].
pub(crate) fn of_file(file: FileId, ignore: &[i32]) -> Result<Users> {
    processes::writers(ignore, &|open| open.device.is_none() && open.file == file)
}

/// See [`crate::in_use::is_open_elsewhere`]: only who writes is told.
pub(crate) fn is_open_elsewhere(file: FileId) -> Result<bool> {
    Ok(!of_file(file, &[])?.users.is_empty())
}

/// See [`crate::in_use::swaps`].
pub(crate) fn swaps() -> Result<Vec<Swap>> {
    Ok(Vec::new())
}
