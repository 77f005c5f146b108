//! Taking a btrfs apart that is mounted for nobody but us: its subvolumes listed, deleted and emptied,
//! and the cleaner waited for.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat, futimens};
use nix::sys::time::TimeSpec;

use super::emptying;
use super::subvolume::{self, Subvolume, VolArgs};
use super::{Filesystem, Item, Key, TOP_LEVEL, ask};
use crate::error::{Context, Error, Result};
use crate::private_mount;

/// The tree of all trees, and the directory in it that names the default subvolume
/// (`BTRFS_ROOT_TREE_OBJECTID`, `BTRFS_ROOT_TREE_DIR_OBJECTID`).
const ROOT_TREE: u64 = 1;
const ROOT_TREE_DIR: u64 = 6;
/// Ids of subvolumes (`BTRFS_FIRST_FREE_OBJECTID` and `BTRFS_LAST_FREE_OBJECTID`), and under which the
/// ids of those stand whose dropping has begun (`BTRFS_ORPHAN_OBJECTID`).
const FIRST_ID: u64 = 256;
const LAST_ID: u64 = -256i64 as u64;
const ORPHANS: u64 = -5i64 as u64;

/// Kinds of items.
const ORPHAN_ITEM: u8 = 48;
const DIR_ITEM: u8 = 84;
const ROOT_ITEM: u8 = 132;
const ROOT_BACKREF: u8 = 144;

/// In `struct btrfs_root_item`: where flags, references and how far the dropping has come are
/// (`drop_progress`, `drop_level`), in bytes. `BTRFS_ROOT_SUBVOL_RDONLY` is a flag.
const ROOT_FLAGS: usize = 208;
const ROOT_REFS: usize = 216;
const ROOT_DROP: usize = 220;
const ROOT_DROP_LEN: usize = 18;
const ROOT_READ_ONLY: u64 = 1;

/// `BTRFS_SUBVOL_RDONLY`.
const READ_ONLY: u64 = 2;

/// `struct btrfs_ioctl_ino_lookup_args`.
#[repr(C)]
struct InodeLookup {
    tree: u64,
    inode: u64,
    name: [u8; 4080],
}

const _: () = assert!(size_of::<InodeLookup>() == 4096);

mod ioctl {
    nix::ioctl_write_ptr!(forget_dev, 0x94, 5, super::VolArgs);
    nix::ioctl_none!(sync, 0x94, 8);
    nix::ioctl_readwrite!(ino_lookup, 0x94, 18, super::InodeLookup);
    nix::ioctl_write_ptr!(default_subvol, 0x94, 19, u64);
    nix::ioctl_read!(subvol_getflags, 0x94, 25, u64);
    nix::ioctl_write_ptr!(subvol_setflags, 0x94, 26, u64);
}

/// A subvolume below the top level, by the folder it has its name in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// Its id.
    pub id: u64,
    /// The id of the subvolume that its folder is in.
    pub parent: u64,
    /// The inode number of that folder.
    pub folder: u64,
    /// Its name there.
    pub name: OsString,
    /// Whether nothing in it can be changed.
    pub is_read_only: bool,
}

/// A subvolume without a name, of which the kernel's cleaner has not dropped everything yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropping {
    /// Its id.
    pub id: u64,
    /// How far it has come; only good for telling whether it goes on.
    pub progress: Vec<u8>,
}

impl Filesystem {
    /// Whether [`mount`](Self::mount) can work at all.
    ///
    /// # Errors
    /// `PermissionDenied`; `Unsupported` if this kernel has no btrfs, or is older than Linux 5.2.
    pub fn can_mount() -> Result<()> {
        private_mount::prepare(c"btrfs")
            .map(drop)
            .context("cannot mount", "btrfs")
    }

    /// Mounts the btrfs that lives on these devices, writable, for us alone: nobody else sees the mount,
    /// and it goes with the last descriptor that leads into it. A balance that has not ended stays so.
    ///
    /// # Errors
    /// What the kernel says; if there is no device.
    pub fn mount(devices: &[&Path]) -> Result<Self> {
        let names = devices.iter().map(|path| {
            CString::new(path.as_os_str().as_bytes())
                .map_err(|_| Error::invalid("cannot mount", path, "a name with a zero byte"))
        });
        let names = names.collect::<Result<Vec<_>>>()?;
        let (Some(first), Some(path)) = (names.first(), devices.first()) else {
            return Err(Error::other("cannot mount", "btrfs", "no device"));
        };
        let others = names.iter().skip(1);
        let mut options = vec![(c"source", Some(first.as_c_str()))];
        options.extend(others.map(|name| (c"device", Some(name.as_c_str()))));
        options.extend([(c"subvolid", Some(c"5")), (c"skip_balance", None)]);
        let folder = private_mount::open_root(c"btrfs", &options).context("cannot mount", path)?;
        let fsid = ask(folder.as_fd(), path)?.fsid;
        Ok(Self {
            folder,
            path: path.to_path_buf(),
            fsid,
            rooms: Arc::default(),
        })
    }

    /// All subvolumes that have a name, but for the top level.
    ///
    /// # Errors
    /// What the kernel says; if it contradicts itself.
    pub fn children(&self) -> Result<Vec<Child>> {
        let mut children = Vec::new();
        // The item of a subvolume comes before what says where its name is.
        let mut last = (0, None);
        let mut is_whole = true;
        self.for_each_subvolume(&mut |item| {
            let (id, data) = (item.objectid, item.data);
            if item.kind == ROOT_ITEM && root_refs(data) > 0 {
                last = (id, number(data, ROOT_FLAGS));
            } else if item.kind == ROOT_BACKREF {
                let (true, Some(flags)) = (last.0 == id, last.1) else {
                    is_whole = false;
                    return;
                };
                // `struct btrfs_root_ref`: folder, sequence, length of the name, name.
                let name = data.get(18..).unwrap_or_default();
                children.push(Child {
                    id,
                    parent: item.offset,
                    folder: number(data, 0).unwrap_or_default(),
                    name: OsString::from_vec(name.to_vec()),
                    is_read_only: flags & ROOT_READ_ONLY != 0,
                });
            }
        })?;
        match is_whole {
            true => Ok(children),
            false => Err(Error::invalid(
                "cannot list the subvolumes of",
                &self.path,
                "there are names of subvolumes that are none",
            )),
        }
    }

    /// All subvolumes that were deleted and are still there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dropping(&self) -> Result<Vec<Dropping>> {
        let mut dropping: Vec<Dropping> = Vec::new();
        self.for_each_subvolume(&mut |item| {
            if item.kind == ROOT_ITEM && root_refs(item.data) == 0 {
                let progress = item.data.get(ROOT_DROP..ROOT_DROP + ROOT_DROP_LEN);
                dropping.push(Dropping {
                    id: item.objectid,
                    progress: progress.unwrap_or_default().to_vec(),
                });
            }
        })?;
        let min = Key::new(ORPHANS, ORPHAN_ITEM, 0);
        let max = Key::new(ORPHANS, ORPHAN_ITEM, u64::MAX);
        self.search(ROOT_TREE, min, max, 0, &mut |item| {
            if dropping.iter().all(|other| other.id != item.offset) {
                dropping.push(Dropping {
                    id: item.offset,
                    progress: Vec::new(),
                });
            }
            Result::Ok(())
        })?;
        Ok(dropping)
    }

    /// Hands every item of a subvolume in the root tree to `visit`.
    fn for_each_subvolume(&self, visit: &mut dyn FnMut(Item<'_>)) -> Result<()> {
        let min = Key::new(FIRST_ID, ROOT_ITEM, 0);
        let max = Key::new(LAST_ID, ROOT_BACKREF, u64::MAX);
        self.search(ROOT_TREE, min, max, 0, &mut |item| {
            visit(item);
            Result::Ok(())
        })
    }

    /// The id of the subvolume that is mounted when none is named.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn default_subvolume(&self) -> Result<u64> {
        let mut found = TOP_LEVEL;
        let min = Key::new(ROOT_TREE_DIR, DIR_ITEM, 0);
        let max = Key::new(ROOT_TREE_DIR, DIR_ITEM, u64::MAX);
        self.search(ROOT_TREE, min, max, 0, &mut |item| {
            // `struct btrfs_dir_item`: 17 bytes of key, 13 of other things, name.
            if item.data.get(30..) == Some(b"default") {
                found = number(item.data, 0).unwrap_or(TOP_LEVEL);
            }
            Result::Ok(())
        })?;
        Ok(found)
    }

    /// Sets it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_default_subvolume(&self, id: u64) -> Result<()> {
        // SAFETY: memory that holds one u64.
        unsafe { ioctl::default_subvol(self.folder.as_raw_fd(), &raw const id) }
            .map(drop)
            .context("cannot set the default subvolume of", &self.path)
    }

    /// Commits, and wakes the cleaner, which drops what was deleted.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clean(&self) -> Result<()> {
        // SAFETY: a request without an argument, on an open descriptor.
        unsafe { ioctl::sync(self.folder.as_raw_fd()) }
            .map(drop)
            .context("cannot sync", &self.path)
    }

    /// Where a folder of a subvolume is, from the root of that; empty for the root itself.
    ///
    /// # Errors
    /// What the kernel says: also if the path is longer than 4 KiB.
    pub fn folder_path(&self, subvolume: u64, inode: u64) -> Result<PathBuf> {
        let mut args = InodeLookup {
            tree: subvolume,
            inode,
            name: [0; 4080],
        };
        // SAFETY: an initialized struct of the size that the request's number names.
        unsafe { ioctl::ino_lookup(self.folder.as_raw_fd(), &raw mut args) }
            .context("cannot find a folder of", &self.path)?;
        let end = args.name.iter().position(|byte| *byte == 0);
        let path = args.name.get(..end.unwrap_or_default()).unwrap_or_default();
        let path = path.strip_suffix(b"/").unwrap_or(path);
        Ok(PathBuf::from(OsStr::from_bytes(path)))
    }
}

impl Subvolume {
    /// Makes it read-only or writable.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_read_only(&self, read_only: bool) -> Result<()> {
        let fd = self.as_fd().as_raw_fd();
        let what = || PathBuf::from(format!("subvolume {}", self.id()));
        let mut flags = 0;
        // SAFETY: memory for one u64.
        unsafe { ioctl::subvol_getflags(fd, &raw mut flags) }.context("cannot ask", what())?;
        let flags = match read_only {
            true => flags | READ_ONLY,
            false => flags & !READ_ONLY,
        };
        // SAFETY: memory that holds one u64.
        unsafe { ioctl::subvol_setflags(fd, &raw const flags) }
            .map(drop)
            .context("cannot change", what())
    }

    /// Deletes a subvolume of the folder `folder`, a path from the root of this one. The folder keeps
    /// the time of its last change, and its flags.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn delete_in(&self, folder: &Path, name: &OsStr) -> Result<()> {
        let what = || folder.join(name);
        let open = self.open_folder(folder)?;
        let before = fstat(&open).context("cannot look at", folder)?;
        let name = CString::new(name.as_bytes())
            .map_err(|_| Error::invalid("cannot delete", what(), "a name with a zero byte"))?;
        let fixed = emptying::clear_flags(&open).context("cannot change", folder)?;
        subvolume::delete_subvolume(open.as_raw_fd(), &name).context("cannot delete", what())?;
        let times = (
            TimeSpec::new(before.st_atime, before.st_atime_nsec),
            TimeSpec::new(before.st_mtime, before.st_mtime_nsec),
        );
        futimens(&open, &times.0, &times.1).context("cannot set the time of", folder)?;
        emptying::set_flags(&open, fixed).context("cannot change", folder)
    }

    /// Opens a folder by its path from the root.
    pub(super) fn open_folder(&self, folder: &Path) -> Result<File> {
        let relative = match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => folder,
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(self.as_fd(), relative, flags, Mode::empty())
            .map(File::from)
            .context("cannot open", relative)
    }
}

/// Makes the kernel forget a device that is not mounted: it remembers of which filesystem it was.
///
/// # Errors
/// `NotFound` if it knows none of it; what else it says.
pub fn forget(device: &Path) -> Result<()> {
    const CONTROL: &str = "/dev/btrfs-control";
    let control = File::open(CONTROL).context("cannot open", CONTROL)?;
    let mut args = VolArgs {
        fd: 0,
        name: [0; 4088],
    };
    let name = device.as_os_str().as_bytes();
    args.name
        .get_mut(..name.len())
        .filter(|_| name.len() < 4088)
        .ok_or_else(|| Error::invalid("cannot forget", device, "its name is too long"))?
        .copy_from_slice(name);
    // SAFETY: an initialized struct of the size that the request's number names.
    unsafe { ioctl::forget_dev(control.as_raw_fd(), &raw const args) }
        .map(drop)
        .context("cannot forget", device)
}

/// The little-endian number at an offset.
fn number(data: &[u8], at: usize) -> Option<u64> {
    let bytes = data.get(at..at + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// How many names a subvolume has: one, or none if it was deleted.
fn root_refs(data: &[u8]) -> u64 {
    number(data, ROOT_REFS).unwrap_or_default() & u64::from(u32::MAX)
}
