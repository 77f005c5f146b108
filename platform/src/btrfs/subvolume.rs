//! Subvolumes: opened, snapshotted, deleted.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::search::{Question, Rooms};
use super::{Item, Key, is_root_of_subvolume, put_name};
use crate::error::{Context, Error, Result};
use crate::private_mount;

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
pub(crate) struct VolArgs {
    pub(super) fd: i64,
    pub(super) name: [u8; 4088],
}

/// `struct btrfs_ioctl_vol_args_v2`, without the half of it that is about quota groups.
#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_get_subvol_info_args`; the times are not looked at.
#[repr(C)]
struct SubvolumeInfo {
    id: u64,
    name: [u8; 256],
    parent_id: u64,
    folder_inode: u64,
    generation: u64,
    flags: u64,
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
    received_uuid: [u8; 16],
    transids: [u64; 4],
    times: [[u64; 2]; 4],
    reserved: [u64; 8],
}

/// `struct btrfs_ioctl_ino_lookup_args`.
#[repr(C)]
struct InodeLookup {
    tree: u64,
    inode: u64,
    name: [u8; 4080],
}

const _: () = assert!(size_of::<VolArgs>() == 4096 && size_of::<VolArgsV2>() == 4096);
const _: () = assert!(size_of::<SubvolumeInfo>() == 504 && size_of::<InodeLookup>() == 4096);

/// `BTRFS_SUBVOL_RDONLY`, in requests and in flags.
const READ_ONLY: u64 = 2;

mod ioctl {
    nix::ioctl_write_ptr!(snap_destroy, 0x94, 15, super::VolArgs);
    nix::ioctl_readwrite!(ino_lookup, 0x94, 18, super::InodeLookup);
    nix::ioctl_write_ptr!(snap_create_v2, 0x94, 23, super::VolArgsV2);
    nix::ioctl_read!(subvol_getflags, 0x94, 25, u64);
    nix::ioctl_read!(get_subvol_info, 0x94, 60, super::SubvolumeInfo);
}

/// The open root folder of a subvolume: one descriptor, which keeps the whole subvolume, deleted or
/// not.
#[derive(Debug)]
pub struct Subvolume {
    folder: File,
    id: u64,
    path: PathBuf,
    rooms: Arc<Rooms>,
}

impl Subvolume {
    /// The subvolume whose root folder is open. `filesystem` is what its filesystem is called.
    pub(super) fn opened(folder: File, filesystem: &Path, rooms: Arc<Rooms>) -> Result<Self> {
        let id = subvolume_of(&folder, filesystem)?
            .ok_or_else(|| Error::other("cannot use", filesystem, "not the root of a subvolume"))?;
        Ok(Self {
            folder,
            id,
            path: filesystem.join(format!("subvolume {id}")),
            rooms,
        })
    }

    /// Its id: 5, or 256 and up.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether nothing in it can be changed. Its owner can make it writable again (`btrfs property`),
    /// though not a deleted one, to which no path leads.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_read_only(&self) -> Result<bool> {
        let mut flags = 0;
        // SAFETY: memory for one u64.
        unsafe { ioctl::subvol_getflags(self.folder.as_raw_fd(), &raw mut flags) }
            .context("cannot ask", &self.path)?;
        Ok(flags & READ_ONLY != 0)
    }

    /// Makes a read-only snapshot of it, `name` in its own root folder, and opens that. What it holds
    /// is committed when this returns; snapshots that are made at the same time by several threads
    /// may share a commit. The name is the caller's to delete ([`delete_child`](Self::delete_child)).
    ///
    /// # Errors
    /// `ExecutableFileBusy` if swap space lies in it; `AlreadyExists`; `ReadOnlyFilesystem` if it is
    /// read-only itself.
    pub fn snapshot_read_only(&self, name: &str) -> Result<Self> {
        let mut args = VolArgsV2 {
            fd: self.folder.as_raw_fd().into(),
            transid: 0,
            flags: READ_ONLY,
            unused: [0; 4],
            name: [0; 4040],
        };
        put_name(name.as_bytes(), &mut args.name)
            .ok_or_else(|| Error::other("cannot snapshot", &self.path, "no plain file name"))?;
        // SAFETY: an initialized struct of the size that the request's number names.
        unsafe { ioctl::snap_create_v2(self.folder.as_raw_fd(), &raw const args) }
            .context("cannot snapshot", &self.path)?;
        let snapshot = self.open_child(name).inspect_err(|_| {
            // Nothing but its name is known of it.
            let _ = self.delete_child(name);
        })?;
        // Whoever owns the folder can have put another in its place.
        let ours = snapshot.info()?.parent_uuid == self.info()?.uuid;
        if !ours || !snapshot.is_read_only()? {
            let why = format!("{name} is not the snapshot that was made of it");
            return Err(Error::invalid("cannot snapshot", &self.path, why));
        }
        Ok(snapshot)
    }

    /// Deletes the subvolume `name` in its root folder. What is open of it stays.
    ///
    /// # Errors
    /// `NotFound` if there is nothing of that name; what the kernel says if it is no subvolume.
    pub fn delete_child(&self, name: &str) -> Result<()> {
        let what = || self.path.join(name);
        let name = CString::new(name)
            .map_err(|_| Error::other("cannot delete", what(), "no plain file name"))?;
        delete_subvolume(self.folder.as_raw_fd(), &name).context("cannot delete", what())
    }

    /// Hands to `visit` the items of its own tree: as
    /// [`Filesystem::search`](super::Filesystem::search), but also after its name was deleted.
    ///
    /// # Errors
    /// What the kernel says, or `visit`.
    pub fn search<E: From<Error>>(
        &self,
        min: Key,
        max: Key,
        min_transid: u64,
        visit: &mut dyn FnMut(Item<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        // Tree 0: that of the folder.
        let question = Question::new(0, min, max, min_transid);
        self.rooms
            .search((self.folder.as_fd(), &self.path), question, visit)
    }

    fn open_child(&self, name: &str) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let folder = openat(&self.folder, name, flags, Mode::empty())
            .context("cannot open", self.path.join(name))?;
        let filesystem = self.path.parent().unwrap_or(&self.path);
        Self::opened(folder.into(), filesystem, self.rooms.clone())
    }

    fn info(&self) -> Result<SubvolumeInfo> {
        let mut info = SubvolumeInfo {
            id: 0,
            name: [0; 256],
            parent_id: 0,
            folder_inode: 0,
            generation: 0,
            flags: 0,
            uuid: [0; 16],
            parent_uuid: [0; 16],
            received_uuid: [0; 16],
            transids: [0; 4],
            times: [[0; 2]; 4],
            reserved: [0; 8],
        };
        // SAFETY: an initialized struct of the size that the request's number names.
        unsafe { ioctl::get_subvol_info(self.folder.as_raw_fd(), &raw mut info) }
            .context("cannot ask", &self.path)?;
        Ok(info)
    }
}

impl AsFd for Subvolume {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// The id of the subvolume whose root folder is at `path`; `None` if that is another folder, or on
/// another filesystem. Needs no privilege.
///
/// # Errors
/// What `open(2)` says, or the kernel.
pub fn subvolume_at(path: &Path) -> Result<Option<u64>> {
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(path)
        .context("cannot open", path)?;
    subvolume_of(&folder, path)
}

/// The same for an open folder; `path` is what it is called.
fn subvolume_of(folder: &File, path: &Path) -> Result<Option<u64>> {
    if !is_root_of_subvolume(folder).context("cannot look at", path)? {
        return Ok(None);
    }
    let mut args = InodeLookup {
        tree: 0,
        // The root folder: then the answer is the tree alone.
        inode: 256,
        name: [0; 4080],
    };
    // SAFETY: an initialized struct of the size that the request's number names.
    unsafe { ioctl::ino_lookup(folder.as_raw_fd(), &raw mut args) }.context("cannot ask", path)?;
    Ok(Some(args.tree))
}

/// Mounts a subvolume for us alone; its root folder.
pub(super) fn mount(source: &CStr, id: u64) -> io::Result<File> {
    let id = CString::new(id.to_string())?;
    let options: [(&CStr, Option<&CStr>); 3] = [
        (c"source", Some(source)),
        (c"subvolid", Some(&id)),
        // Of the filesystem, not of this mount: it is let as it is. Without it, one that is mounted
        // read-only would be made writable (`btrfs_reconfigure_for_mount` of fs/btrfs/super.c).
        (c"ro", None),
    ];
    private_mount::open_root(c"btrfs", &options)
}

/// Deletes the subvolume `name` of an open folder. Allocates nothing.
pub(crate) fn delete_subvolume(folder: RawFd, name: &CStr) -> std::result::Result<(), Errno> {
    let mut args = VolArgs {
        fd: 0,
        name: [0; 4088],
    };
    put_name(name.to_bytes(), &mut args.name).ok_or(Errno::EINVAL)?;
    // SAFETY: an initialized struct of the size that the request's number names; a stale descriptor
    // gives EBADF.
    unsafe { ioctl::snap_destroy(folder, &raw const args) }.map(drop)
}
