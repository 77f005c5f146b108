//! Where a snapshot of the device mapper keeps what is overwritten: a device that the user named, or a
//! nameless file behind a loop device, which both go by themselves when the
//! last user of the loop device does.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::fstatfs;

use crate::beneath;
use crate::device::{Access, Disk};
use crate::error::{Context, Error, Result};
use crate::exclusive::Claim;
use crate::in_use;
use crate::loop_device::LoopDevice;
use crate::memory;
use crate::node::{BlockDevice, DeviceNumber, Node};
use crate::os::linux_only;

/// What is zeroed at the begin of a device, in bytes: what was kept there last may look like something.
const HEAD: u64 = 1 << 20;

/// `TMPFS_MAGIC` of include/uapi/linux/magic.h.
const TMPFS: i64 = 0x0102_1994;

/// A copy-on-write store that nobody uses yet.
#[derive(Debug)]
pub struct CowStore {
    /// The device.
    pub device: DeviceNumber,
    path: PathBuf,
    /// Keeps a loop device attached until a snapshot does.
    open: Option<LoopDevice>,
}

/// A folder where a store can be, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder.
    pub folder: PathBuf,
    /// How many bytes may be taken: half of what is free, and of memory a quarter of what can be had.
    pub room: u64,
    /// Whether it is memory: then none is set aside beforehand.
    is_memory: bool,
}

impl Place {
    /// So much room on disk, in a folder that was looked at otherwise.
    pub fn new(folder: PathBuf, room: u64) -> Self {
        Self {
            folder,
            room,
            is_memory: false,
        }
    }

    /// Looks at a folder. `None` if it is not there, lies on a filesystem on which a loop device is no
    /// good, or rests on `source`, whose writers would wait for themselves.
    ///
    /// # Errors
    /// If what it rests on cannot be found out.
    pub fn of(folder: &Path, source: &BlockDevice) -> Result<Option<Self>> {
        let Ok(open) = File::open(folder) else {
            return Ok(None);
        };
        let stat = fstatfs(&open).context("cannot look at", folder)?;
        let is_memory = linux_only::magic(&open) == Ok(TMPFS);
        let mount = crate::mounts::Place::of(folder)?.mount;
        let is_local =
            ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"].contains(&mount.fs_type.as_str());
        if !(is_memory || is_local) || mount.is_read_only() {
            return Ok(None);
        }
        if beneath::file_rests_on(&open, source)? {
            return Ok(None);
        }
        #[allow(clippy::unnecessary_fallible_conversions)] // its width differs between systems
        let free = stat.blocks_available() * u64::try_from(stat.block_size()).unwrap_or(0);
        let mut room = free / 2;
        if is_memory {
            room = room.min(memory::available()? / 4);
        }
        Ok(Some(Self {
            folder: folder.to_owned(),
            room,
            is_memory,
        }))
    }
}

impl CowStore {
    /// Makes a store of `size` bytes, whole chunks of a snapshot, at a place. On disk, they are set aside at once.
    ///
    /// # Errors
    /// If the room is not there, or there are no loop devices.
    pub fn at(place: &Place, size: u64) -> Result<Self> {
        let folder = &place.folder;
        let file = nameless(folder)?;
        let reserved = match i64::try_from(size) {
            Ok(len) if !place.is_memory => linux_only::set_aside(&file, len),
            _ => Err(Errno::EOPNOTSUPP),
        };
        match reserved {
            Err(Errno::EOPNOTSUPP) => file
                .set_len(size)
                .context("cannot make a file in", folder)?,
            reserved => reserved.context("cannot set aside room in", folder)?,
        }
        let device = LoopDevice::attach(&file)?;
        Ok(Self {
            device: device.number(),
            path: device.path().to_owned(),
            open: Some(device),
        })
    }

    /// Uses a device that nobody else does, and that is neither part of `source` nor the other way round.
    ///
    /// # Errors
    /// `ResourceBusy` if it is in use; what opening it says.
    pub fn on_device(path: &Path, source: &BlockDevice) -> Result<Self> {
        let busy = |why: String| {
            let source = io::Error::new(io::ErrorKind::ResourceBusy, why);
            Error::new("cannot keep a snapshot on", path, source)
        };
        let node = Node::of(path)?;
        let Some(number) = node.block_device() else {
            return Err(Error::new(
                "cannot keep a snapshot on",
                path,
                io::Error::new(io::ErrorKind::InvalidInput, "not a block device"),
            ));
        };
        let device = BlockDevice::of(number)?;
        if beneath::rests_on(number, source)? || beneath::rests_on(source.number, &device)? {
            return Err(busy("the source is stacked with it".to_owned()));
        }
        let claim = Claim::new(path)?;
        if let Some(user) = in_use::of_device(&device, &[])?.users.first() {
            return Err(busy(user.to_string()));
        }
        let store = Self {
            device: number,
            path: device.path(),
            open: None,
        };
        store.forget_head()?;
        drop(claim);
        Ok(store)
    }

    /// A snapshot has it open from now on.
    pub fn hand_over(&mut self) {
        self.open = None;
    }

    /// Zeroes the begin of a device that the user named.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn forget_head(&self) -> Result<()> {
        let disk = Disk::open(&self.path, Access::ReadWrite)?;
        disk.zero_range(0, HEAD.min(disk.geometry().size))?;
        disk.sync()
    }
}

/// A new file in `folder` that has no name.
fn nameless(folder: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    linux_only::open_nameless(&options, folder).context("cannot make a file in", folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, Mounted, mkfs, needs_root, scratch};

    #[test]
    fn privileged_a_store_in_a_file_goes_by_itself() {
        needs_root!();
        let dir = scratch();
        let outer = Loop::sparse(&dir.path().join("outer"), 64 << 20);
        mkfs("ext4", outer.path());
        let mount = Mounted::new(outer.path(), &dir.path().join("m"), "rw");
        let source = BlockDevice::at(outer.path()).unwrap();
        // Its own writers would wait for it.
        assert_eq!(Place::of(mount.path(), &source).unwrap(), None);
        assert_eq!(Place::of(&dir.path().join("none"), &source).unwrap(), None);
        let other = Loop::sparse(&dir.path().join("other"), 1 << 20);
        let other = BlockDevice::at(other.path()).unwrap();
        let place = Place::of(mount.path(), &other).unwrap().unwrap();
        assert!(place.room > 10 << 20 && place.room < 32 << 20, "{place:?}");

        let mut store = CowStore::at(&place, 8 << 20).unwrap();
        let device = BlockDevice::of(store.device).unwrap();
        assert_eq!(device.sectors, (8 << 20) / 512);
        assert!(beneath::rests_on(store.device, &source).unwrap());
        assert_eq!(
            std::fs::read_dir(mount.path()).unwrap().count(),
            1,
            "it has a name"
        );
        store.hand_over();
        for _ in 0..500 {
            if device.loop_shown().unwrap().is_none() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(device.loop_shown().unwrap(), None);
        assert!(CowStore::at(&place, 1 << 40).is_err());
    }

    #[test]
    fn privileged_a_device_in_use_is_no_store() {
        needs_root!();
        let dir = scratch();
        let source = Loop::sparse(&dir.path().join("source"), 64 << 20);
        mkfs("ext4", source.path());
        let mounted = Mounted::new(source.path(), &dir.path().join("m"), "rw");
        let free = Loop::sparse(&dir.path().join("free"), 8 << 20);
        Disk::open(free.path(), Access::ReadWrite)
            .and_then(|disk| disk.write_all_at(&[7; 2 << 20], 0))
            .unwrap();
        let device = BlockDevice::at(free.path()).unwrap();
        let of = |path: &Path, source| CowStore::on_device(path, source).map(|store| store.device);
        let refused = of(source.path(), &device).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        // Below the source, and the source itself.
        let inner = Loop::sparse(&mounted.path().join("inner"), 8 << 20);
        let inside = BlockDevice::at(inner.path()).unwrap();
        assert!(of(source.path(), &inside).is_err());
        assert!(of(free.path(), &device).is_err());
        let writer = OpenOptions::new().write(true).open(free.path()).unwrap();
        assert_eq!(
            of(dir.path(), &inside).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        drop(writer);
        assert_eq!(of(free.path(), &inside).unwrap(), device.number);
        let mut head = vec![1; 2 << 20];
        Disk::open(free.path(), Access::Read)
            .unwrap()
            .read_exact_at(&mut head, 0)
            .unwrap();
        let (zeroed, rest) = head.split_at(1 << 20);
        assert!(zeroed.iter().all(|byte| *byte == 0) && rest[0] == 7);
    }
}
