//! What of a Mac's disks is not worth to be read raw, or cannot be.

use holdstill_platform::apple::{Disk, System};
use holdstill_platform::device::{self, Access};

use crate::error::Result;
use crate::source::{Medium, Source};

/// Why a source of this Mac cannot be imaged block by block; `None` if nothing speaks against it, and
/// on every other system.
///
/// # Errors
/// If the tools fail.
pub fn objection(source: &Source) -> Result<Option<String>> {
    let system = System::this();
    match &source.medium {
        Medium::Device(device) if system.is_macos() => {
            let opened = device::Disk::open(&source.path, Access::Read).map(drop);
            objection_to(&system, &device.name, opened)
        }
        _ => Ok(None),
    }
}

/// Buses of disks that are inside of a Mac, perhaps, and not of its own making.
const OTHER_BUSES: [&str; 2] = ["Disk Image", "SATA"];

/// Whether it is what Apple has built in: no card in a reader, no disk image, no drive that was added.
fn is_built_in(disk: &Disk) -> bool {
    disk.is_internal && !disk.is_removable && !OTHER_BUSES.contains(&disk.bus.as_str())
}

/// The same for the disk `id` of a system. `opened`: what came of opening it.
///
/// # Errors
/// If the tools fail, or it could not be opened for a reason not known here.
pub fn objection_to(
    system: &System,
    id: &str,
    opened: holdstill_platform::error::Result<()>,
) -> Result<Option<String>> {
    let disk = system.disk(id)?;
    let is_container = disk.container.as_deref() == Some(&disk.id);
    if disk.fs.as_deref() == Some("apfs") && !is_container {
        let container = disk.container.as_deref().unwrap_or(&disk.whole);
        let stores = disk.stores.join(" and ");
        return Ok(Some(format!(
            "a volume of APFS has no blocks of its own to be read; mount it, or, to image all of its container \
             where nothing of it is used, `diskutil unmountDisk {container}` and name {stores}"
        )));
    }
    if is_built_in(&disk) && system.has_keys_in_hardware()? {
        return Ok(Some(
            "the keys of this Mac's internal storage never leave its hardware, so that a raw copy could \
             be read nowhere: name a mounted volume, such as /System/Volumes/Data"
                .to_owned(),
        ));
    }
    if let Some(why) = mounted_of(system, &disk)? {
        return Ok(Some(why));
    }
    match opened {
        Ok(()) => Ok(None),
        Err(error)
            if error.kind() == std::io::ErrorKind::PermissionDenied
                && is_built_in(&disk)
                && system.is_root()
                && system.is_protected()? != Some(false) =>
        {
            Ok(Some(
                "System Integrity Protection keeps the internal disk from being read: name a mounted \
                 volume, or start this Mac from another disk"
                    .to_owned(),
            ))
        }
        // Mounted, locked, gone: told by who looks next.
        Err(_) => Ok(None),
    }
}

/// Which volume is mounted of a container that lies on the disk; its own node does not tell.
fn mounted_of(system: &System, disk: &Disk) -> Result<Option<String>> {
    for container in system.containers()? {
        let mut is_on_it = false;
        for store in &container.stores {
            // Of a whole disk, the store is a part.
            is_on_it |= store.id == disk.id
                || disk.id == disk.whole && system.disk(&store.id)?.whole == disk.id;
        }
        if !is_on_it {
            continue;
        }
        for volume in &container.volumes {
            if let Some(point) = system.disk(&volume.id)?.mount_point {
                return Ok(Some(format!(
                    "{} of the APFS container on it is mounted at {}: `diskutil unmountDisk {}`, or name \
                     what is mounted",
                    volume.id,
                    point.display(),
                    container.id
                )));
            }
        }
    }
    Ok(None)
}
