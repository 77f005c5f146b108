//! Which filesystems are mounted where.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::node::DeviceNumber;
use crate::os;

/// One mount of a mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number for this mount.
    pub id: u32,
    /// `st_dev` of the files on it. Major 0 (btrfs, tmpfs, network): no block device's number.
    pub device: DeviceNumber,
    /// Which folder or file of the filesystem is mounted; `/` for all of it.
    pub root: PathBuf,
    /// Where it is mounted, as seen from the root folder of the process.
    pub point: PathBuf,
    /// Filesystem type: `ext4`, `xfs`, `fuse.sshfs`.
    pub fs_type: String,
    /// What was mounted: usually a device node. Only as true as whoever mounted it wished.
    pub source: OsString,
    /// Options of this mount, comma separated: `rw,relatime`.
    pub options: String,
    /// Options of the filesystem, comma separated: `rw,logdev=/dev/x`.
    pub super_options: String,
}

impl Mount {
    /// Whether files can be changed through this mount.
    pub fn is_read_only(&self) -> bool {
        has_option(&self.options, "ro") || has_option(&self.super_options, "ro")
    }

    /// Whether the whole filesystem is mounted, not one of its folders (a bind mount, a subvolume).
    pub fn is_whole(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Whether an option, with or without a value, is set on the filesystem.
    pub fn has_super_option(&self, name: &str) -> bool {
        has_option(&self.super_options, name)
    }

    /// The block device the filesystem lies on. Filesystems with device numbers of their own
    /// (btrfs) are asked for their source; of several devices that is one.
    pub fn block_device(&self) -> Option<DeviceNumber> {
        if os::mounts::is_of_device(self.device) {
            return Some(self.device);
        }
        if !self.source.as_bytes().starts_with(b"/") {
            return None;
        }
        let metadata = std::fs::metadata(&self.source).ok()?;
        let is_block = metadata.file_type().is_block_device();
        is_block.then(|| DeviceNumber::from_raw(metadata.rdev()))
    }
}

/// Where a path lies among the mounts of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The mount it lies on.
    pub mount: Mount,
    /// The path without symbolic links.
    pub path: PathBuf,
    /// Whether the path is the mount point itself.
    pub is_mount_point: bool,
}

impl Place {
    /// Finds the mount that `path` lies on, symbolic links followed. Exact also where mounts are
    /// stacked on one folder: the kernel is asked for the mount's number.
    ///
    /// # Errors
    /// If the path cannot be looked up, or its mount is hidden from this process.
    pub fn of(path: &Path) -> Result<Self> {
        os::mounts::place_of(path)
    }

    /// The same of an open file or folder; `path` is what it is to be called.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn of_open(file: &File, path: &Path) -> Result<Self> {
        os::mounts::place_of_open(file, path)
    }
}

/// The mounts this process sees, in the order they were made.
///
/// # Errors
/// If /proc is not mounted or the list makes no sense.
pub fn of_this_process() -> Result<Vec<Mount>> {
    os::mounts::of_this_process()
}

fn has_option(options: &str, name: &str) -> bool {
    options
        .split(',')
        .any(|option| option.split('=').next() == Some(name))
}
