//! The devices of a mounted btrfs: their items in the chunk tree, and BTRFS_IOC_DEV_INFO.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::{Filesystem, Key, mounted};
use crate::error::{Context, Error, Result};
use crate::node::{BlockDevice, DeviceNumber, Node};

/// The chunk tree, the id under which its device items stand, and their kind
/// (`BTRFS_CHUNK_TREE_OBJECTID`, `BTRFS_DEV_ITEMS_OBJECTID`, `BTRFS_DEV_ITEM_KEY`).
const CHUNK_TREE: u64 = 3;
const DEV_ITEMS: u64 = 1;
const DEV_ITEM: u8 = 216;

/// The id that the target of a running replacement has (`BTRFS_DEV_REPLACE_DEVID`).
const REPLACEMENT: u64 = 0;

/// One device of a btrfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its number in this filesystem.
    pub devid: u64,
    /// Its id in this filesystem.
    pub uuid: [u8; 16],
    /// Which device it is.
    pub number: DeviceNumber,
    /// How the kernel calls it. The node need not be there.
    pub path: PathBuf,
    /// Bytes of it that the filesystem may use.
    pub size: u64,
}

/// `struct btrfs_ioctl_dev_info_args`. Its id (`fsid`) of Linux 6.4 is part of `unused`.
#[repr(C)]
#[derive(Clone, Copy)]
struct DevInfo {
    devid: u64,
    uuid: [u8; 16],
    bytes_used: u64,
    total_bytes: u64,
    unused: [u64; 379],
    path: [u8; 1024],
}

const _: () = assert!(size_of::<DevInfo>() == 4096);

mod ioctl {
    nix::ioctl_readwrite!(dev_info, 0x94, 30, super::DevInfo);
}

/// A device by its id; `None` if there is none.
fn ask(fd: BorrowedFd<'_>, devid: u64) -> nix::Result<Option<DevInfo>> {
    let mut info = DevInfo {
        devid,
        uuid: [0; 16],
        bytes_used: 0,
        total_bytes: 0,
        unused: [0; 379],
        path: [0; 1024],
    };
    // SAFETY: an initialized struct of the size that the request's number names.
    match unsafe { ioctl::dev_info(fd.as_raw_fd(), &raw mut info) } {
        Ok(_) => Ok(Some(info)),
        Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(errno),
    }
}

impl DevInfo {
    /// How the kernel calls it; empty for a missing one.
    fn path(&self) -> &Path {
        let bytes = self.path.split(|&byte| byte == 0).next();
        Path::new(OsStr::from_bytes(bytes.unwrap_or_default()))
    }

    fn is_missing(&self) -> bool {
        // What DEV_INFO of old kernels said for one.
        self.path().as_os_str().is_empty() || self.path() == Path::new("missing")
    }
}

impl Filesystem {
    /// All devices it lies on, those of its seed and the target of a replacement among them, by their
    /// numbers in it. Needs CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// If one is missing, or is not among those that sysfs lists.
    pub fn devices(&self) -> Result<Vec<Member>> {
        let listed = mounted::devices(self.fsid)?.unwrap_or_default();
        let mut members = Vec::new();
        for info in self.device_infos()? {
            if info.is_missing() {
                let why = format!("its device {} is missing", info.devid);
                return Err(Error::other("cannot use", &self.path, why));
            }
            let number = number_of(info.path(), &listed).ok_or_else(|| {
                let why = format!("which device {} is, is not known", info.path().display());
                Error::other("cannot use", &self.path, why)
            })?;
            members.push(Member {
                devid: info.devid,
                uuid: info.uuid,
                number,
                path: info.path().to_owned(),
                size: info.total_bytes,
            });
        }
        let mut numbers: Vec<_> = members.iter().map(|member| member.number).collect();
        numbers.sort_unstable();
        if numbers != listed {
            let why = "its devices are not those that sysfs lists: one was just added or removed";
            return Err(Error::other("cannot use", &self.path, why));
        }
        Ok(members)
    }

    /// A device of it, by the name the kernel knows: with another one, mounting would rename it.
    pub(super) fn present_device(&self) -> Result<CString> {
        let listed = mounted::devices(self.fsid)?.unwrap_or_default();
        let infos = self.device_infos()?;
        let present = infos.iter().find(|info| {
            let node = Node::of(info.path());
            node.is_ok_and(|node| node.block_device().is_some_and(|it| listed.contains(&it)))
        });
        let path = match (present, listed.first()) {
            (Some(info), _) => info.path().to_owned(),
            (None, Some(number)) => BlockDevice::of(*number)?.path(),
            (None, None) => {
                let why = "sysfs knows none of its devices";
                return Err(Error::other("cannot use", &self.path, why));
            }
        };
        CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Error::invalid("cannot use", path, "a name with a zero byte"))
    }

    fn device_infos(&self) -> Result<Vec<DevInfo>> {
        let mut ids = vec![REPLACEMENT];
        let min = Key::new(DEV_ITEMS, DEV_ITEM, 0);
        let max = Key::new(DEV_ITEMS, DEV_ITEM, u64::MAX);
        self.search(CHUNK_TREE, min, max, 0, &mut |item| {
            ids.push(item.offset);
            Result::Ok(())
        })?;
        let mut infos = Vec::new();
        for id in ids {
            let info = ask(self.as_fd(), id).context("cannot ask for a device of", &self.path)?;
            infos.extend(info);
        }
        Ok(infos)
    }
}

/// The number of a device that is among those listed; a name that leads elsewhere here (another
/// mount namespace) does no harm if there is only one.
fn number_of(path: &Path, listed: &[DeviceNumber]) -> Option<DeviceNumber> {
    let number = Node::of(path).ok().and_then(|node| node.block_device());
    match (number, listed) {
        (Some(number), _) if listed.contains(&number) => Some(number),
        (_, [only]) => Some(*only),
        _ => None,
    }
}
