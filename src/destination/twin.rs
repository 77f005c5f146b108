//! A btrfs must not be visible twice: the kernel knows devices by the UUIDs in their superblocks, and may
//! write to either of two that have the same.

use std::path::Path;

use holdstill_platform::in_use::is_mounted_btrfs;
use holdstill_platform::node::{self, FileId, Kind as NodeKind, Node};
use uuid::Uuid;

use crate::error::{Error, Kind, Result};
use crate::source::whole;

/// Refuses to write the btrfs `fsid` to `target` where it is mounted, or on another block device than
/// `targets`, all of which will be overwritten. A file that is attached to no loop device is not visible.
///
/// # Errors
/// [`Kind::Twin`]; else if the devices cannot be listed.
pub(crate) fn refuse(fsid: Uuid, target: &Path, targets: &[&Path]) -> Result<()> {
    match Node::of(target) {
        Ok(node) if matches!(node.kind, NodeKind::Block(_)) => {}
        Ok(node) if is_attached(node.id)? => {}
        _ => return Ok(()),
    }
    let nodes: Vec<Node> = targets.iter().flat_map(|path| Node::of(path)).collect();
    for (device, _) in whole::devices_of(fsid)? {
        let backing = device.loop_backing().unwrap_or_default();
        let is_target = nodes.iter().any(|node| match node.block_device() {
            // A partition of the target goes with it.
            Some(number) => number == device.number || number == device.disk,
            None => backing
                .as_ref()
                .is_some_and(|backing| backing.file == node.id),
        });
        if !is_target {
            let name = device.mapper_path().unwrap_or_else(|| device.path());
            return Err(twin(fsid, target, &format!("on {}", name.display())));
        }
    }
    match is_mounted_btrfs(&fsid.to_string()) {
        true => Err(twin(fsid, target, "mounted here")),
        false => Ok(()),
    }
}

fn twin(fsid: Uuid, target: &Path, place: &str) -> Error {
    let what = format!("the btrfs {fsid} is {place} already, and must not be there twice");
    Error::new(Kind::Twin, what)
        .on(target)
        .hint("--new-ids gives the copy a UUID of its own; --allow-twin writes it as it is: then mount neither")
}

/// Whether a loop device shows a file.
fn is_attached(file: FileId) -> Result<bool> {
    for device in node::disks()? {
        if let Ok(Some(backing)) = device.loop_backing()
            && backing.file == file
        {
            return Ok(true);
        }
    }
    Ok(false)
}
