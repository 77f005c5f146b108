//! The other devices of a filesystem that lives on several: a btrfs.

use holdstill_platform::btrfs::Mounted;
use holdstill_platform::device::{Access, Disk};
use holdstill_platform::node::{self, BlockDevice};
use uuid::Uuid;

use super::{Medium, Source};
use crate::error::Result;
use crate::fs::{self, Member};

/// The other devices of the filesystem that `source` is a part of: of a mounted one those that the
/// kernel uses, else by their number in it. None if it lives on one device, or if not each of the others
/// is here just once: then the source has to be taken by itself.
///
/// # Errors
/// If the source or the list of disks cannot be read.
pub fn siblings(source: &Source) -> Result<Vec<Source>> {
    let Some(own) = member(source)? else {
        return Ok(Vec::new());
    };
    if own.devices <= 1 {
        return Ok(Vec::new());
    }
    if let Medium::Device(device) = &source.medium
        && let Some(mounted) = Mounted::on(device.number)?
    {
        return siblings_of_mounted(device, own, &mounted);
    }
    let mut found = devices_of(own.fsid)?;
    found.retain(|(device, member)| {
        let is_itself =
            matches!(&source.medium, Medium::Device(source) if source.number == device.number);
        !is_itself && member.devid != own.devid
    });
    found.sort_by_key(|(_, member)| member.devid);
    let is_once = found.windows(2).all(|two| two[0].1.devid < two[1].1.devid);
    if !is_once || found.len() as u64 + 1 != own.devices {
        return Ok(Vec::new());
    }
    found
        .into_iter()
        .map(|(device, _)| sibling(device))
        .collect()
}

/// What a copy of one of its devices shows is of no interest then.
fn siblings_of_mounted(
    device: &BlockDevice,
    own: Member,
    mounted: &Mounted,
) -> Result<Vec<Source>> {
    if mounted.devices.len() as u64 != own.devices {
        return Ok(Vec::new());
    }
    let others = mounted.devices.iter().copied();
    others
        .filter(|number| *number != device.number)
        .map(|number| sibling(BlockDevice::of(number)?))
        .collect()
}

fn sibling(device: BlockDevice) -> Result<Source> {
    let path = device.path();
    let given = path.display().to_string();
    Source::device(&given, device, path)
}

/// What of which btrfs a source is, if that is what it holds.
///
/// # Errors
/// If it cannot be opened.
pub fn member(source: &Source) -> Result<Option<Member>> {
    let disk = Disk::open(&source.path, Access::Read)?;
    // What cannot be read there is for the copy itself to find. What another filesystem left of one is
    // none.
    let holds_btrfs = matches!(fs::probe(&disk), Ok(Some(info)) if info.kind == fs::Kind::Btrfs);
    match holds_btrfs {
        true => Ok(fs::member(&disk).unwrap_or_default()),
        false => Ok(None),
    }
}

/// All block devices of this machine that belong to a btrfs, and what of it they are. Not what other
/// devices are built on, which shows the same a second time, nor what is suspended, which cannot be read.
///
/// # Errors
/// If the disks cannot be listed.
pub fn devices_of(fsid: Uuid) -> Result<Vec<(BlockDevice, Member)>> {
    let mut found = Vec::new();
    for disk in node::disks()? {
        // A disk that vanishes meanwhile has no partitions either.
        let partitions = disk.partitions().unwrap_or_default();
        for device in std::iter::once(disk).chain(partitions) {
            if device.is_suspended() || !device.holders().unwrap_or_default().is_empty() {
                continue;
            }
            // Without a medium, without permission, broken: nothing that could be imaged.
            let Ok(opened) = Disk::open(&device.path(), Access::Read) else {
                continue;
            };
            match fs::member(&opened) {
                Ok(Some(member)) if member.fsid == fsid => found.push((device, member)),
                _ => {}
            }
        }
    }
    Ok(found)
}
