//! Disks by their nodes: `/dev/disk2` is a whole disk, `/dev/disk2s1` a part of it (`/dev/disk3s1s1` a
//! snapshot of an APFS volume), and each has a character device of the same number beside it,
//! `/dev/rdisk2s1`, that goes past the cache.
//!
//! What a disk is made of, such as the partition that an APFS container lies on, no node tells.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

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

/// The whole disk that a disk or a part of one belongs to, all by name: `disk2` of `disk2s1`. `None` if it is
/// no name of a disk.
pub(super) fn disk_of(name: &str) -> Option<&str> {
    let mut numbers = name.strip_prefix("disk")?.split('s');
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let unit = numbers.next().filter(|unit| is_number(unit))?;
    numbers
        .all(is_number)
        .then(|| name.get(..4 + unit.len()))
        .flatten()
}

/// The name of the disk or part whose block device is at `path`.
pub(super) fn name_at(path: &Path) -> Option<&str> {
    let name = path.strip_prefix("/dev").ok()?.to_str()?;
    disk_of(name).map(|_| name)
}

/// The character device beside a block device.
pub(super) fn raw_node(name: &str) -> PathBuf {
    Path::new("/dev").join(format!("r{name}"))
}

/// The path of the block device where `path` is the character device beside it.
pub(crate) fn block_node(path: PathBuf) -> PathBuf {
    let name = path.strip_prefix("/dev/r").ok().and_then(Path::to_str);
    let beside = path.to_str().and_then(|path| path.strip_prefix("/dev/r"));
    match name.or(beside).filter(|name| disk_of(name).is_some()) {
        Some(name) => Path::new("/dev").join(name),
        None => path,
    }
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
