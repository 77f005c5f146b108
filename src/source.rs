//! What the user named as a source: a device, a mount point, a logical volume, or a file with a raw disk
//! in it.

pub mod tag;
pub mod whole;

use std::path::{Path, PathBuf};

use holdstill_platform::apple::System;
use holdstill_platform::btrfs::{self, Mounted};
use holdstill_platform::device::{Access, Disk, Geometry};
use holdstill_platform::lvm::LogicalVolume;
use holdstill_platform::mounts::{self, Mount, Place};
use holdstill_platform::node::{BlockDevice, FileId, Kind as NodeKind, Node};
use holdstill_platform::zfs;

use crate::error::{Error, Kind, Result};
use crate::image::manifest::Subvolume;

/// A source that exists. Nothing is opened or held yet.
#[derive(Clone, Debug)]
pub struct Source {
    /// As the user wrote it.
    pub given: String,
    /// What is read: a device node or a regular file.
    pub path: PathBuf,
    /// What that is.
    pub medium: Medium,
    /// By which mount point this process reaches its filesystem: where all of it is mounted or, if
    /// there is no such place, one of its folders (of a btrfs, one of its subvolumes). A mount that
    /// another mount covers leads somewhere else, and is none of these.
    pub mount: Option<Mount>,
    /// The only subvolume of its btrfs whose data is wanted.
    pub subvolume: Option<Subvolume>,
}

/// What a source's name stands for.
#[derive(Clone, Debug)]
pub enum Named {
    /// Something with blocks.
    Blocks(Box<Source>),
    /// A dataset of ZFS, by its name: it leaves as a stream.
    Dataset(String),
}

/// What a source's bytes lie on.
#[derive(Clone, Debug)]
pub enum Medium {
    /// A block device.
    Device(BlockDevice),
    /// A regular file.
    File(FileId),
}

/// Before the name of a logical volume, so that it is not taken for a path.
const LVM: &str = "lvm:";

/// The same for a volume of ZFS.
const ZFS: &str = "zfs:";

/// Filesystem types that have no block device of this machine below them.
const NO_DEVICE_HINT: &str = "only what lies on a block device or in a file can be imaged";

impl Source {
    /// Finds out what `text` names, if that has blocks.
    ///
    /// # Errors
    /// As [`Named::resolve`]; [`Kind::NotApplicable`] for a dataset of ZFS.
    pub fn resolve(text: &str) -> Result<Self> {
        match Named::resolve(text)? {
            Named::Blocks(source) => Ok(*source),
            Named::Dataset(name) => {
                let what = "a dataset of ZFS has no blocks of its own";
                Err(Error::new(Kind::NotApplicable, what)
                    .on(name)
                    .hint("backup and restore take it as a stream"))
            }
        }
    }
}

impl Named {
    /// Finds out what `text` names: `LABEL=`, `UUID=`, `PARTLABEL=` or `PARTUUID=`; a path to a block device, a mount point, a subvolume or a regular file; else a
    /// logical volume, `VG/LV`, or a volume of ZFS, `POOL/NAME`; said plainly, `lvm:VG/LV` and
    /// `zfs:POOL/NAME`.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Usage`] for a folder that is no mount point, and for what could be
    /// more than one of these; [`Kind::NotApplicable`] for a filesystem without a block device.
    pub fn resolve(text: &str) -> Result<Self> {
        if let Some(name) = text.strip_prefix(LVM) {
            let none = || Error::new(Kind::NotFound, "there is no such logical volume").on(name);
            return Source::volume(text, &volume_of_name(name)?.ok_or_else(none)?)
                .map(Self::blocks);
        }
        if let Some(name) = text.strip_prefix(ZFS) {
            let none =
                || Error::new(Kind::NotFound, "ZFS knows no such volume or dataset").on(name);
            return Self::zfs(text, zfs::find(name)?.ok_or_else(none)?);
        }
        let path = Path::new(text);
        let node = Node::of(path).map_err(Error::from);
        if let Some(tag) = tag::Tag::parse(text) {
            if node.is_ok() {
                return Err(Error::new(Kind::Usage, "a file has this name")
                    .on(text)
                    .hint(format!("say ./{text}, or name the device")));
            }
            let device = tag.resolve(text)?;
            let path = device.path();
            return Source::device(text, device, path).map(Self::blocks);
        }
        if !text.starts_with(['/', '.']) {
            let volume = volume_of_name(text)?;
            let named = zfs::find(text)?;
            // On a Mac.
            let disk = System::this().named(text);
            let readings = [
                node.is_ok(),
                volume.is_some(),
                named.is_some(),
                disk.is_some(),
            ];
            if readings.into_iter().filter(|is_one| *is_one).count() > 1 {
                return Err(Error::new(Kind::Usage, "this could be more than one thing")
                    .on(text)
                    .hint(format!("say ./{text}, {LVM}{text} or {ZFS}{text}")));
            }
            if let Some(volume) = volume {
                return Source::volume(text, &volume).map(Self::blocks);
            }
            if let Some(named) = named {
                return Self::zfs(text, named);
            }
            if let Some(node) = disk {
                return Source::device(text, BlockDevice::at(&node)?, node).map(Self::blocks);
            }
        }
        let node = node.map_err(|error| {
            if error.kind() == Kind::NotFound && !text.starts_with(['/', '.']) {
                error.hint(
                    "a source is a device, a mount point, a file, or a volume of LVM or ZFS: \
                     /dev/sda1, /home, ./disk.raw, vg/root",
                )
            } else {
                error
            }
        })?;
        match node.kind {
            NodeKind::Block(_) => {
                Source::device(text, BlockDevice::at(path)?, node.path).map(Self::blocks)
            }
            NodeKind::Regular => Source::file(text, &node).map(Self::blocks),
            NodeKind::Directory => Self::mount_point(text),
            _ => Err(Error::new(
                Kind::Usage,
                "this is neither a disk nor a file nor a mount point",
            )
            .on(path)),
        }
    }

    fn mount_point(text: &str) -> Result<Self> {
        let place = Place::of(Path::new(text))?;
        if !place.is_mount_point {
            return match btrfs::subvolume_at(&place.path)? {
                Some(id) => Source::one_subvolume(text, place, id).map(Self::blocks),
                None => Err(not_a_mount_point(text, &place)),
            };
        }
        if place.mount.fs_type == "btrfs" && btrfs::subvolume_at(&place.path)?.is_some() {
            return Source::btrfs(text, place).map(Self::blocks);
        }
        if !place.mount.is_whole() {
            return Err(
                Error::new(Kind::Usage, "only a folder of a filesystem is mounted here")
                    .on(text)
                    .hint(match place.mount.block_device().map(BlockDevice::of) {
                        Some(Ok(device)) => format!(
                            "name its device, {}, to image the complete filesystem",
                            device
                                .mapper_path()
                                .unwrap_or_else(|| device.path())
                                .display()
                        ),
                        _ => "name the device, or the mount point of the complete filesystem"
                            .to_owned(),
                    }),
            );
        }
        if place.mount.fs_type == "zfs" {
            let name = place.mount.source.to_string_lossy().into_owned();
            return Ok(Self::Dataset(name));
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
        Ok(Self::blocks(Source {
            given: text.to_owned(),
            path: device.mapper_path().unwrap_or_else(|| device.path()),
            medium: Medium::Device(device),
            mount: Some(place.mount),
            subvolume: None,
        }))
    }

    fn blocks(source: Source) -> Self {
        Self::Blocks(Box::new(source))
    }

    fn zfs(text: &str, named: zfs::Named) -> Result<Self> {
        let volume = match named {
            zfs::Named::Volume(volume) => volume,
            zfs::Named::Filesystem(name) => return Ok(Self::Dataset(name)),
        };
        let none = || {
            Error::new(Kind::NotFound, "this volume of ZFS has no device")
                .on(&volume.name)
                .hint("see its properties volmode and keystatus")
        };
        let device = volume.device()?.ok_or_else(none)?;
        let path = device.path();
        Source::device(text, device, path).map(Self::blocks)
    }
}

/// What to say of a folder that is neither a mount point nor a subvolume.
fn not_a_mount_point(text: &str, place: &Place) -> Error {
    let point = place.mount.point.display();
    Error::new(Kind::Usage, "this folder is not a mount point")
        .on(text)
        .hint(format!(
            "it lies on the filesystem mounted at {point}; name that to image it"
        ))
}

impl Source {
    /// The whole filesystem of which a subvolume is mounted here: by one of its devices.
    fn btrfs(text: &str, place: Place) -> Result<Self> {
        let mounted = Mounted::at(&place.path)?;
        let shown = place.mount.block_device();
        let number = shown
            .filter(|number| mounted.devices.contains(number))
            .or(mounted.devices.first().copied())
            .ok_or_else(|| Error::new(Kind::NotFound, "it has no devices").on(text))?;
        let device = BlockDevice::of(number)?;
        Ok(Self {
            given: text.to_owned(),
            path: device.mapper_path().unwrap_or_else(|| device.path()),
            medium: Medium::Device(device),
            mount: Some(place.mount),
            subvolume: None,
        })
    }

    /// The same, of which only the subvolume is wanted that this folder is.
    fn one_subvolume(text: &str, place: Place, id: u64) -> Result<Self> {
        // What is mounted may be a folder of the filesystem, and this one lies below that.
        let below = place.path.strip_prefix(&place.mount.point);
        let path = place.mount.root.join(below.unwrap_or(&place.path));
        let path = path.strip_prefix("/").unwrap_or(&path);
        let subvolume = Subvolume {
            id,
            path: path.to_string_lossy().into_owned(),
        };
        Ok(Self {
            subvolume: Some(subvolume),
            ..Self::btrfs(text, place)?
        })
    }

    fn volume(text: &str, volume: &LogicalVolume) -> Result<Self> {
        let Some(number) = volume.device else {
            return Err(
                Error::new(Kind::NotFound, "this logical volume is not active")
                    .on(volume.to_string())
                    .hint(format!("activate it: lvchange --activate y {volume}")),
            );
        };
        let device = BlockDevice::of(number)?;
        let path = device.path();
        Self::device(text, device, path)
    }

    fn device(text: &str, device: BlockDevice, path: PathBuf) -> Result<Self> {
        let mount = match Mounted::on(device.number)? {
            // It shows one of its devices only, and often nowhere all of it.
            Some(btrfs) => btrfs.mount()?,
            None => way_in(&mounts::of_this_process()?, &device),
        };
        Ok(Self {
            given: text.to_owned(),
            path: device.mapper_path().unwrap_or(path),
            medium: Medium::Device(device),
            mount,
            subvolume: None,
        })
    }

    /// Size and sectors.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn geometry(&self) -> Result<Geometry> {
        Ok(Disk::open(&self.path, Access::Read)?.geometry())
    }

    /// Whether `node` is the very file or device that this is.
    pub fn is_same_as(&self, node: &Node) -> bool {
        match &self.medium {
            Medium::File(file) => *file == node.id,
            Medium::Device(device) => node.block_device() == Some(device.number),
        }
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
            subvolume: None,
        })
    }
}

/// The mount by which to reach the filesystem on a device; `None` if it is not mounted, or every mount
/// of it is covered.
fn way_in(all: &[Mount], device: &BlockDevice) -> Option<Mount> {
    let is_of_device = |mount: &Mount| mount.block_device() == Some(device.number);
    let mut ways: Vec<&Mount> = mounts::uncovered(all, is_of_device)
        // A single file can be mounted, too.
        .filter(|mount| mount.is_whole() || mount.point.is_dir())
        .collect();
    ways.sort_by_key(|mount| !mount.is_whole());
    ways.first().copied().cloned()
}

/// The logical volume `VG/LV`, if there is one.
fn volume_of_name(text: &str) -> Result<Option<LogicalVolume>> {
    let Some((group, name)) = text.split_once('/') else {
        return Ok(None);
    };
    Ok(LogicalVolume::of_name(group, name)?)
}
