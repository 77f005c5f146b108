//! Disks by their nodes (see [`super::names`]). What a disk is made of, such as the partition that an APFS
//! container lies on, no node tells.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

pub(crate) use super::names::block_node;
use super::names::{disk_of, raw_node};
use crate::error::{Context, Error, Result};
use crate::node::{BlockDevice, DeviceNumber};

/// Major and minor of `st_dev` or `st_rdev`, which have 32 bits.
pub(crate) fn split(raw: u64) -> (u32, u32) {
    let raw = raw as libc::dev_t;
    (
        libc::major(raw).cast_unsigned(),
        libc::minor(raw).cast_unsigned(),
    )
}

/// The other way round: with the sign extended, as the standard library does it.
pub(crate) fn join(major: u32, minor: u32) -> u64 {
    let raw = libc::makedev(major.cast_signed(), minor.cast_signed());
    i64::from(raw).cast_unsigned()
}

/// Name and number of every disk and part of one.
pub(super) fn all() -> Result<Vec<(String, DeviceNumber)>> {
    let dev = Path::new("/dev");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dev).context("cannot read", dev)? {
        let entry = entry.context("cannot read", dev)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if disk_of(&name).is_none() {
            continue;
        }
        // Gone since: it is listed no more.
        if let Ok(metadata) = entry.metadata()
            && metadata.file_type().is_block_device()
        {
            found.push((name, DeviceNumber::from_raw(metadata.rdev())));
        }
    }
    Ok(found)
}

/// See [`BlockDevice::of`].
pub(crate) fn device(number: DeviceNumber) -> Result<BlockDevice> {
    let all = all()?;
    let named = all.iter().find(|(_, found)| *found == number);
    let none = || {
        Error::new(
            "cannot find the block device",
            number.to_string(),
            io::ErrorKind::NotFound,
        )
    };
    let (name, _) = named.ok_or_else(none)?;
    open(name, number, &all)
}

/// Looks at one of `all` disks.
fn open(name: &str, number: DeviceNumber, all: &[(String, DeviceNumber)]) -> Result<BlockDevice> {
    let node = raw_node(name);
    let file = File::open(&node).context("cannot open", &node)?;
    let geometry = super::device::geometry(&file).context("cannot examine", &node)?;
    let whole = disk_of(name).unwrap_or(name);
    let disk = all.iter().find(|(name, _)| name == whole);
    let (_, disk) = disk.ok_or_else(|| {
        let why = "the whole disk has no node";
        Error::other("cannot examine", &node, why)
    })?;
    Ok(BlockDevice {
        number,
        name: name.to_owned(),
        disk: *disk,
        sectors: geometry.size / 512,
        partition: None,
        sysfs: PathBuf::from(format!("/sys/dev/block/{number}")),
    })
}

/// See [`BlockDevice::partitions`].
pub(crate) fn partitions(device: &BlockDevice) -> Result<Vec<BlockDevice>> {
    list(|name| name != device.name && disk_of(name) == Some(&device.name))
}

/// See [`crate::node::disks`].
pub(crate) fn disks() -> Result<Vec<BlockDevice>> {
    list(|name| disk_of(name) == Some(name))
}

/// Those with such a name that may be looked at: not without a medium, nor what somebody has to himself.
fn list(is_meant: impl Fn(&str) -> bool) -> Result<Vec<BlockDevice>> {
    let all = all()?;
    let mut found = Vec::new();
    for (name, number) in all.iter().filter(|(name, _)| is_meant(name)) {
        match open(name, *number, &all) {
            Ok(device) => found.push(device),
            Err(error) => log::debug!("left out: {error}"),
        }
    }
    Ok(found)
}
