//! What the user named as a source: a device, a mount point, or a file with a raw disk in it.

use std::path::{Path, PathBuf};

use holdstill_platform::mounts::{self, Mount, Place};
use holdstill_platform::node::{BlockDevice, FileId, Kind as NodeKind, Node};

use crate::error::{Error, Kind, Result};

/// A source that exists. Nothing is opened or held yet.
#[derive(Clone, Debug)]
pub struct Source {
    /// As the user wrote it.
    pub given: String,
    /// What is read: a device node or a regular file.
    pub path: PathBuf,
    /// What that is.
    pub medium: Medium,
    /// Where its filesystem is mounted in this process's view, whole and as seen from its root.
    pub mount: Option<Mount>,
}

/// What a source's bytes lie on.
#[derive(Clone, Debug)]
pub enum Medium {
    /// A block device.
    Device(BlockDevice),
    /// A regular file.
    File(FileId),
}

/// Filesystem types that have no block device of this machine below them.
const NO_DEVICE_HINT: &str = "only what lies on a block device or in a file can be imaged";

impl Source {
    /// Finds out what `text` names: a path to a block device, a mount point or a regular file.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Usage`] for a folder that is no mount point;
    /// [`Kind::NotApplicable`] for a filesystem without a block device.
    pub fn resolve(text: &str) -> Result<Self> {
        let path = Path::new(text);
        let node = Node::of(path).map_err(|error| {
            let error = Error::from(error);
            if error.kind() == Kind::NotFound && !text.starts_with(['/', '.']) {
                error.hint(
                    "a source is a device, a mount point or a file: /dev/sda1, /home, ./disk.raw",
                )
            } else {
                error
            }
        })?;
        match node.kind {
            NodeKind::Block(_) => Self::device(text, BlockDevice::at(path)?, node.path),
            NodeKind::Regular => Self::file(text, &node),
            NodeKind::Directory => Self::mount_point(text),
            _ => Err(Error::new(
                Kind::Usage,
                "this is neither a disk nor a file nor a mount point",
            )
            .on(path)),
        }
    }

    fn device(text: &str, device: BlockDevice, path: PathBuf) -> Result<Self> {
        let mount = mounts::of_this_process()?
            .into_iter()
            .find(|mount| mount.is_whole() && mount.block_device() == Some(device.number));
        Ok(Self {
            given: text.to_owned(),
            path,
            medium: Medium::Device(device),
            mount,
        })
    }

    /// A file that is attached to a loop device is read through that device: only there can the
    /// kernel tell who else uses it, and its cache is the one that writers fill.
    fn file(text: &str, node: &Node) -> Result<Self> {
        for device in holdstill_platform::node::disks()? {
            // Without privilege loop devices cannot be asked; a lease on the file then still tells
            // that one has it open for writing.
            let Ok(Some(backing)) = device.loop_backing() else {
                continue;
            };
            if backing.file == node.id && backing.offset == 0 && backing.size_limit == 0 {
                let path = device.path();
                return Self::device(text, device, path);
            }
        }
        Ok(Self {
            given: text.to_owned(),
            path: node.path.clone(),
            medium: Medium::File(node.id),
            mount: None,
        })
    }

    fn mount_point(text: &str) -> Result<Self> {
        let place = Place::of(Path::new(text))?;
        let point = place.mount.point.display();
        if !place.is_mount_point {
            return Err(Error::new(Kind::Usage, "this folder is not a mount point")
                .on(text)
                .hint(format!(
                    "it lies on the filesystem mounted at {point}; name that to image it"
                )));
        }
        if !place.mount.is_whole() {
            return Err(
                Error::new(Kind::Usage, "only a folder of a filesystem is mounted here")
                    .on(text)
                    .hint("name the device, or the mount point of the whole filesystem"),
            );
        }
        let Some(number) = place.mount.block_device() else {
            let what = format!(
                "a {} filesystem has no disk of its own",
                place.mount.fs_type
            );
            return Err(Error::new(Kind::NotApplicable, what)
                .on(text)
                .hint(NO_DEVICE_HINT));
        };
        let device = BlockDevice::of(number)?;
        Ok(Self {
            given: text.to_owned(),
            path: device.path(),
            medium: Medium::Device(device),
            mount: Some(place.mount),
        })
    }
}
