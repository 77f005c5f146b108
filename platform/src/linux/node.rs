//! Block devices by `/sys/dev/block` (Documentation/ABI/stable/sysfs-block).

use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::node::{BlockDevice, DeviceNumber, PartitionPlace, read_number};

/// Major and minor of `st_dev` or `st_rdev`.
pub(crate) fn split(raw: u64) -> (u32, u32) {
    (libc::major(raw), libc::minor(raw))
}

/// The other way round.
pub(crate) fn join(major: u32, minor: u32) -> u64 {
    libc::makedev(major, minor)
}

/// The path of the block device where `path` is another node of it: there are none.
pub(crate) fn block_node(path: PathBuf) -> PathBuf {
    path
}

/// See [`BlockDevice::of`].
pub(crate) fn device(number: DeviceNumber) -> Result<BlockDevice> {
    let link = PathBuf::from(format!("/sys/dev/block/{number}"));
    let sysfs = std::fs::canonicalize(&link).context("cannot find the block device", &link)?;
    from_sysfs(number, sysfs)
}

fn from_sysfs(number: DeviceNumber, sysfs: PathBuf) -> Result<BlockDevice> {
    let name = sysfs
        .file_name()
        .ok_or_else(|| Error::invalid("cannot read", &sysfs, "no name"))?
        .to_string_lossy()
        .into_owned();
    let sectors = read_number(&sysfs.join("size"))?;
    let (disk, partition) = if sysfs.join("partition").exists() {
        let disk = sysfs.parent().unwrap_or(&sysfs);
        let place = PartitionPlace {
            index: read_number(&sysfs.join("partition"))?,
            start: read_number(&sysfs.join("start"))?,
            sectors,
        };
        (read_number(&disk.join("dev"))?, Some(place))
    } else {
        (number, None)
    };
    Ok(BlockDevice {
        number,
        name,
        disk,
        sectors,
        partition,
        sysfs,
    })
}

/// See [`BlockDevice::partitions`]; in any order.
pub(crate) fn partitions(device: &BlockDevice) -> Result<Vec<BlockDevice>> {
    let mut partitions = Vec::new();
    for entry in std::fs::read_dir(device.sysfs()).context("cannot read", device.sysfs())? {
        let path = entry.context("cannot read", device.sysfs())?.path();
        if path.join("partition").exists() {
            partitions.push(from_sysfs(read_number(&path.join("dev"))?, path)?);
        }
    }
    Ok(partitions)
}

/// See [`crate::node::disks`].
pub(crate) fn disks() -> Result<Vec<BlockDevice>> {
    let dir = Path::new("/sys/block");
    let mut disks = Vec::new();
    for entry in std::fs::read_dir(dir).context("cannot read", dir)? {
        let path = entry.context("cannot read", dir)?.path();
        let found = std::fs::canonicalize(&path)
            .context("cannot read", &path)
            .and_then(|sysfs| from_sysfs(read_number(&sysfs.join("dev"))?, sysfs));
        match found {
            Ok(disk) => disks.push(disk),
            // Unplugged between the listing and the look.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(disks)
}
