//! What the user named as a target: a path, or a volume of LVM or ZFS that is there already.

use std::path::{Path, PathBuf};

use holdstill_platform::apple::System;
use holdstill_platform::lvm::LogicalVolume;
use holdstill_platform::node::{BlockDevice, Node};
use holdstill_platform::zfs;

use crate::error::{Error, Kind, Result};
use crate::source::tag::Tag;

/// The path that `text` stands for. What looks like the name of a volume is never the name of a file that
/// would have to be made.
///
/// # Errors
/// [`Kind::NotApplicable`] for a volume that does not exist or has no device, [`Kind::Usage`] for what could be
/// more than one thing, and for a target by label or UUID.
pub(crate) fn resolve(target: &Path) -> Result<PathBuf> {
    let Some(text) = target.to_str() else {
        return Ok(target.to_owned());
    };
    if text.starts_with(['/', '.']) {
        return Ok(target.to_owned());
    }
    if text == "-" {
        return Err(
            Error::new(Kind::Usage, "this target has to be a device or file")
                .on("-")
                .hint(
                    "backup and restore write to standard output; for a file of that name say ./-",
                ),
        );
    }
    if Tag::parse(text).is_some() {
        let what =
            "a target is named by its device: several devices may have the same label or UUID";
        return Err(Error::new(Kind::Usage, what)
            .on(text)
            .hint(format!("for a file of that name say ./{text}")));
    }
    if let Some(name) = text.strip_prefix("lvm:") {
        return logical_volume(name)?.ok_or_else(|| missing("logical volume", name));
    }
    if let Some(name) = text.strip_prefix("zfs:") {
        return zfs_volume(name)?.ok_or_else(|| missing("volume of ZFS", name));
    }
    // On a Mac.
    let disk = System::this().named(text);
    let named = [logical_volume(text)?, zfs_volume(text)?, disk];
    let mut named = named.into_iter().flatten();
    let is_path = Node::of(target).is_ok();
    match (named.next(), named.next(), is_path) {
        (Some(path), None, false) => Ok(path),
        (None, _, true) => Ok(target.to_owned()),
        (None, _, false) if text.contains('/') => {
            Err(missing("volume", text).hint(format!("for a new file say ./{text}")))
        }
        (None, _, false) => Ok(target.to_owned()),
        _ => Err(Error::new(Kind::Usage, "this could be more than one thing")
            .on(text)
            .hint(format!("say ./{text}, lvm:{text} or zfs:{text}"))),
    }
}

fn missing(kind: &str, name: &str) -> Error {
    let what = format!("there is no such {kind}, and holdstill makes none");
    Error::new(Kind::NotApplicable, what)
        .on(name)
        .hint("create it first")
}

/// The device of a logical volume; `None` if there is no such volume.
fn logical_volume(name: &str) -> Result<Option<PathBuf>> {
    let Some((group, volume)) = name.split_once('/') else {
        return Ok(None);
    };
    let Some(volume) = LogicalVolume::of_name(group, volume)? else {
        return Ok(None);
    };
    let Some(number) = volume.device else {
        let what = "this logical volume is not active";
        return Err(Error::new(Kind::NotApplicable, what)
            .on(name)
            .hint(format!("activate it: lvchange --activate y {volume}")));
    };
    let device = BlockDevice::of(number)?;
    Ok(Some(device.mapper_path().unwrap_or_else(|| device.path())))
}

/// The same for a volume of ZFS; a dataset is none.
fn zfs_volume(name: &str) -> Result<Option<PathBuf>> {
    match zfs::find(name)? {
        Some(zfs::Named::Volume(volume)) => {
            let device = volume.device()?.ok_or_else(|| {
                Error::new(Kind::NotApplicable, "this volume of ZFS has no device").on(name)
            })?;
            Ok(Some(device.path()))
        }
        _ => Ok(None),
    }
}
