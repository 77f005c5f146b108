//! Which filesystems are mounted where.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::node::DeviceNumber;
use crate::os;

/// One mount of a mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number for this mount.
    pub id: u32,
    /// The number of the mount it is mounted on. 0 where the system does not say.
    pub parent: u32,
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
    /// Whether nothing can be changed through this mount, or of this filesystem at all: mounted so, or
    /// stopped by an error (`emergency_ro` and `shutdown` of ext4, Linux 6.15).
    pub fn is_read_only(&self) -> bool {
        has_option(&self.options, "ro") || self.is_stopped()
    }

    /// Whether the filesystem itself cannot be changed, through whatever mount of it.
    pub fn is_stopped(&self) -> bool {
        let stopped = ["ro", "emergency_ro", "shutdown"];
        stopped
            .iter()
            .any(|option| has_option(&self.super_options, option))
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
    /// (btrfs) are asked for their source; of several devices that is one. A source outside of `/dev`
    /// is not looked up, nor what is mounted in there: on a network or FUSE filesystem whose server is
    /// gone that would wait for ever.
    pub fn block_device(&self) -> Option<DeviceNumber> {
        if os::mounts::is_of_device(self.device) {
            return Some(self.device);
        }
        let below = Path::new(&self.source).strip_prefix("/dev").ok()?;
        os::mounts::device_in_dev(below)
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

/// The mounts by which a filesystem can be reached, out of `all` mounts of this process: those of
/// `candidates` that no other mount covers, be it at their own mount point or at a folder above it.
/// Only the list is looked at, so nothing here waits for a server that is gone.
pub fn uncovered(
    all: &[Mount],
    candidates: impl Fn(&Mount) -> bool,
) -> impl Iterator<Item = &Mount> {
    all.iter()
        .filter(move |mount| candidates(mount) && seen_at(all, &mount.point) == Some(mount.id))
}

/// The number of the mount that a mount point leads to: from the root down, at each folder on the way,
/// the last one that was mounted there. `None` if the list has no root.
fn seen_at(all: &[Mount], point: &Path) -> Option<u32> {
    // Its parent is itself, or out of sight.
    let is_root = |mount: &&Mount| {
        mount.point == Path::new("/")
            && (mount.parent == mount.id || all.iter().all(|other| other.id != mount.parent))
    };
    let mut at = all.iter().find(is_root)?.id;
    let mut folders: Vec<&Path> = point.ancestors().collect();
    folders.reverse();
    for folder in folders {
        // Mounts are stacked on one folder by being mounted on one another's root.
        while let Some(above) = all
            .iter()
            .find(|mount| mount.parent == at && mount.id != at && mount.point == folder)
        {
            at = above.id;
        }
    }
    Some(at)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(id: u32, parent: u32, point: &str) -> Mount {
        Mount {
            id,
            parent,
            device: DeviceNumber {
                major: 7,
                minor: id,
            },
            root: "/".into(),
            point: point.into(),
            fs_type: "ext4".to_owned(),
            source: "/dev/x".into(),
            options: "rw".to_owned(),
            super_options: "rw".to_owned(),
        }
    }

    fn reached(all: &[Mount]) -> Vec<u32> {
        uncovered(all, |_| true).map(|mount| mount.id).collect()
    }

    #[test]
    fn a_mount_is_covered_at_its_point_and_from_above() {
        let mut all = vec![
            mount(1, 0, "/"),
            mount(2, 1, "/a"),
            mount(3, 2, "/a/b"),
            mount(4, 1, "/c"),
        ];
        assert_eq!(reached(&all), [1, 2, 3, 4]);
        // Two on one folder: the last one is seen.
        all.push(mount(5, 4, "/c"));
        assert_eq!(reached(&all), [1, 2, 3, 5]);
        // A folder above is covered, with all that is mounted below it.
        all.push(mount(6, 2, "/a"));
        assert_eq!(reached(&all), [1, 5, 6]);
        all.push(mount(7, 6, "/a/b"));
        assert_eq!(reached(&all), [1, 5, 6, 7]);
        // The root itself.
        all.push(mount(8, 1, "/"));
        assert_eq!(reached(&all), [8]);
    }

    #[test]
    fn a_list_without_a_root_or_in_circles_ends() {
        assert!(reached(&[mount(2, 1, "/a"), mount(1, 2, "/a")]).is_empty());
        assert_eq!(reached(&[mount(1, 1, "/"), mount(2, 1, "/a")]), [1, 2]);
    }
}
