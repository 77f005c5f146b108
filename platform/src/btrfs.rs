//! A mounted btrfs, as the kernel speaks of it (include/uapi/linux/btrfs.h, fs/btrfs/ioctl.c): its
//! devices, the items of its trees, its subvolumes and their snapshots.
//!
//! A [`Subvolume`] is one open folder, the root of its tree. As long as that is open, the kernel keeps
//! the whole subvolume, even one whose name was deleted (`inode_tree_del` of fs/btrfs/inode.c queues
//! the dropping of a dead tree only when its last inode in memory goes): a read-only snapshot that is
//! opened and deleted at once pins every block it refers to for as long as the descriptor lives, and
//! there is nothing to clean up, however the process ends.

mod emptying;
mod leftovers;
mod members;
mod mounted;
mod pruning;
mod search;
mod subvolume;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Context, Error, Result};
use crate::node::DeviceNumber;
use crate::os::linux_only;

pub use leftovers::{Leftover, snapshot_name};
pub use members::Member;
pub use mounted::{Mounted, mounted};
pub use pruning::{Child, Dropping, forget};
pub use search::{Item, Key};
pub(crate) use subvolume::delete_subvolume;
pub use subvolume::{Subvolume, subvolume_at};

/// `BTRFS_SUPER_MAGIC` of include/uapi/linux/magic.h.
const MAGIC: i64 = 0x9123_683e;

/// The id of the top-level subvolume (`BTRFS_FS_TREE_OBJECTID`). Those of all others begin at 256.
pub const TOP_LEVEL: u64 = 5;

/// `struct btrfs_ioctl_fs_info_args`.
#[repr(C)]
#[derive(Clone, Copy)]
struct FsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    node_size: u32,
    sector_size: u32,
    clone_alignment: u32,
    checksum_type: u16,
    checksum_size: u16,
    flags: u64,
    generation: u64,
    metadata_uuid: [u8; 16],
    reserved: [u8; 944],
}

const _: () = assert!(size_of::<FsInfo>() == 1024);

/// `BTRFS_FS_INFO_FLAG_CSUM_INFO`, `_GENERATION`, `_METADATA_UUID`: what is asked beyond the rest.
const ASKED: u64 = 1 | 2 | 4;

mod ioctl {
    nix::ioctl_read!(fs_info, 0x94, 31, super::FsInfo);
}

/// What a mounted btrfs says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// The id it is mounted under, also in sysfs. Of two mounted copies of one filesystem, one has an
    /// id made up for this mount (Linux 6.7).
    pub fsid: [u8; 16],
    /// The id in its blocks, if that is another one.
    pub metadata_uuid: [u8; 16],
    /// How many devices it has now, missing ones counted, those of a seed not.
    pub devices: u64,
    /// Bytes of a tree block.
    pub node_size: u32,
    /// Bytes of a sector: of the smallest piece of data that has a checksum.
    pub sector_size: u32,
    /// Which checksum, as in the superblock.
    pub checksum_type: u16,
    /// The transaction that is running or, if none is, the last that was committed.
    pub generation: u64,
}

/// A mounted btrfs, held by an open folder: it cannot be unmounted meanwhile.
#[derive(Debug)]
pub struct Filesystem {
    folder: File,
    path: PathBuf,
    fsid: [u8; 16],
    rooms: Arc<search::Rooms>,
}

impl Filesystem {
    /// Opens the folder at `path`, anywhere on a mounted btrfs.
    ///
    /// # Errors
    /// What `open(2)` says; if no btrfs is there.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(path)
            .context("cannot open", path)?;
        let fsid = ask(folder.as_fd(), path)?.fsid;
        Ok(Self {
            folder,
            path: path.to_owned(),
            fsid,
            rooms: Arc::default(),
        })
    }

    /// By which path it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The id it is mounted under: see [`Info::fsid`].
    pub fn fsid(&self) -> [u8; 16] {
        self.fsid
    }

    /// What it says of itself now.
    ///
    /// # Errors
    /// If the kernel does not say; it does since Linux 5.11.
    pub fn info(&self) -> Result<Info> {
        let info = ask(self.folder.as_fd(), &self.path)?;
        if info.flags & ASKED != ASKED {
            let why = "the kernel is too old to say its generation";
            return Err(Error::other("cannot ask", &self.path, why));
        }
        Ok(Info {
            fsid: info.fsid,
            metadata_uuid: info.metadata_uuid,
            devices: info.num_devices,
            node_size: info.node_size,
            sector_size: info.sector_size,
            checksum_type: info.checksum_type,
            generation: info.generation,
        })
    }

    /// Which operation that moves blocks is going on, as sysfs calls it: `balance`, `device replace`,
    /// `balance paused`. None of them can begin while another is there.
    ///
    /// # Errors
    /// If the kernel does not say; it does since Linux 5.10.
    pub fn exclusive_operation(&self) -> Result<Option<String>> {
        let path = mounted::folder(self.fsid).join("exclusive_operation");
        let text = std::fs::read_to_string(&path).context("cannot read", &path)?;
        let operation = text.trim();
        Ok((operation != "none").then(|| operation.to_owned()))
    }

    /// Writes out everything that is dirty, and commits (`syncfs(2)`).
    ///
    /// # Errors
    /// What it says: a write of earlier may have failed.
    pub fn sync(&self) -> Result<()> {
        linux_only::syncfs(&self.folder).context("cannot sync", &self.path)
    }

    /// Hands to `visit` all items of a tree with keys from `min` to `max` (as a key is one number of
    /// 136 bits: kinds in between that are not meant have to be passed over), as far as they lie in
    /// leaves written in transaction `min_transid` or later. Ascending; from the live tree, piece by
    /// piece: not one instant of a tree that changes. Needs CAP_SYS_ADMIN.
    ///
    /// `tree` is a tree's id: 1 the root tree, 2 extents, 3 chunks, 7 checksums, or a subvolume; one
    /// whose name was deleted is found no more (`NotFound`), only through
    /// [`Subvolume::search`].
    ///
    /// # Errors
    /// What the kernel says, or `visit`.
    pub fn search<E: From<Error>>(
        &self,
        tree: u64,
        min: Key,
        max: Key,
        min_transid: u64,
        visit: &mut dyn FnMut(Item<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        // 0 would be the tree of our folder.
        if tree == 0 {
            let why = "there is no tree 0";
            return Err(Error::other("cannot search", &self.path, why).into());
        }
        let question = search::Question::new(tree, min, max, min_transid);
        let asked = (self.folder.as_fd(), self.path.as_path());
        self.rooms.search(asked, question, visit)
    }

    /// Opens the root folder of a subvolume, wherever it is mounted, if anywhere, and whatever its path
    /// is: through a mount that nobody else sees, gone with the last descriptor. It is never the one
    /// that makes a filesystem writable that is mounted read-only.
    ///
    /// # Errors
    /// `NotFound` if there is none, or it was deleted.
    pub fn subvolume(&self, id: u64) -> Result<Subvolume> {
        let source = self.present_device()?;
        let folder = subvolume::mount(&source, id)
            .context("cannot open", self.path.join(format!("subvolume {id}")))?;
        let subvolume = Subvolume::opened(folder, &self.path, self.rooms.clone())?;
        let is_ours = ask(subvolume.as_fd(), &self.path)?.fsid == self.fsid;
        if !is_ours || subvolume.id() != id {
            let why = format!("{} is of another filesystem", source.to_string_lossy());
            return Err(Error::invalid(
                "cannot open the subvolumes of",
                &self.path,
                why,
            ));
        }
        Ok(subvolume)
    }
}

impl AsFd for Filesystem {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// Whether an open file lies on a btrfs.
fn is_btrfs(file: BorrowedFd<'_>) -> bool {
    linux_only::magic(file).is_ok_and(|magic| magic & 0xffff_ffff == MAGIC)
}

/// The devices that an open file lies on, if that is on a btrfs. Its `st_dev` does not tell: each subvolume
/// has one of its own.
///
/// # Errors
/// What the kernel says; if sysfs makes no sense.
pub fn devices_below(file: BorrowedFd<'_>) -> Result<Option<Vec<DeviceNumber>>> {
    if !is_btrfs(file) {
        return Ok(None);
    }
    let path = PathBuf::from(format!("file descriptor {}", file.as_raw_fd()));
    Ok(Some(
        mounted::devices(ask(file, &path)?.fsid)?.unwrap_or_default(),
    ))
}

/// FS_INFO.
fn ask(file: BorrowedFd<'_>, path: &Path) -> Result<FsInfo> {
    // The numbers of the requests mean something else elsewhere.
    if !is_btrfs(file) {
        return Err(Error::other(
            "cannot use",
            path,
            "no btrfs is mounted there",
        ));
    }
    let mut info = FsInfo {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        node_size: 0,
        sector_size: 0,
        clone_alignment: 0,
        checksum_type: 0,
        checksum_size: 0,
        flags: ASKED,
        generation: 0,
        metadata_uuid: [0; 16],
        reserved: [0; 944],
    };
    // SAFETY: an initialized struct of the size that the request's number names.
    unsafe { ioctl::fs_info(file.as_raw_fd(), &raw mut info) }.context("cannot ask", path)?;
    Ok(info)
}

/// A name as a `char` array of a request, ended by a zero byte; `None` if it is no plain file name.
fn put_name(name: &[u8], array: &mut [u8]) -> Option<()> {
    let is_plain = !name.is_empty() && !name.contains(&b'/') && !name.contains(&0);
    if !is_plain || name == b"." || name == b".." || name.len() > 255 {
        return None;
    }
    array.get_mut(..name.len())?.copy_from_slice(name);
    *array.get_mut(name.len())? = 0;
    Some(())
}

/// The inode number of the root folder of every subvolume (`BTRFS_FIRST_FREE_OBJECTID`).
fn is_root_of_subvolume(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.ino() == 256 && is_btrfs(file.as_fd()))
}

#[cfg(test)]
mod tests;
