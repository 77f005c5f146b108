//! What a path is: block device, regular file, folder; and what a block device is made of
//! (on Linux `/sys/dev/block`, Documentation/ABI/stable/sysfs-block; loop ioctls of
//! include/uapi/linux/loop.h).

use std::ffi::OsString;
use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Context, Error, Result};
use crate::os;

/// Number of a device, `8:1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

impl DeviceNumber {
    /// From `st_dev` or `st_rdev`.
    pub fn from_raw(raw: u64) -> Self {
        let (major, minor) = os::node::split(raw);
        Self { major, minor }
    }

    /// As in `st_dev` and `st_rdev`.
    pub fn to_raw(self) -> u64 {
        os::node::join(self.major, self.minor)
    }

    /// As the kernel holds it inside, and shows it in trace events: 12 bits of major above 20 bits
    /// of minor (include/linux/kdev_t.h).
    pub fn to_kernel(self) -> u32 {
        (self.major << 20) | (self.minor & 0xf_ffff)
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let parsed = text.trim_end().split_once(':').and_then(|(major, minor)| {
            Some(Self {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{text:?} is no device number"),
            )
        })
    }
}

/// Which file, whatever it is called: filesystem and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// `st_dev`: the filesystem.
    pub filesystem: DeviceNumber,
    /// `st_ino`.
    pub inode: u64,
}

impl FileId {
    /// From what `stat(2)` said.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            filesystem: DeviceNumber::from_raw(metadata.dev()),
            inode: metadata.ino(),
        }
    }
}

/// What tells a device from whatever has its number later: a counter that grows with every disk and every
/// attached loop file (`diskseq` of Documentation/ABI/stable/sysfs-block, Linux 5.15). `None` where the
/// system does not say, and for numbers of filesystems without a device.
pub fn disk_sequence(device: DeviceNumber) -> Option<String> {
    let folder = PathBuf::from(format!("/sys/dev/block/{device}"));
    let read = |path: PathBuf| std::fs::read_to_string(path).ok();
    // A partition has that of its disk.
    let found = read(folder.join("diskseq")).or_else(|| {
        let partition = std::fs::canonicalize(&folder).ok()?;
        read(partition.parent()?.join("diskseq"))
    });
    found.map(|sequence| sequence.trim().to_owned())
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A block device.
    Block(DeviceNumber),
    /// A regular file.
    Regular,
    /// A folder.
    Directory,
    /// A character device.
    Character(DeviceNumber),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A path and what it leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The path without symbolic links; of a macOS disk that of its block device, `/dev/disk2`, never of
    /// the character device beside it.
    pub path: PathBuf,
    /// What is there.
    pub kind: Kind,
    /// Which file it is. For a device: the node, not the device.
    pub id: FileId,
    /// Bytes of a regular file; meaningless for others.
    pub len: u64,
}

impl Node {
    /// Looks at `path`, symbolic links followed.
    ///
    /// # Errors
    /// What `stat(2)` says.
    pub fn of(path: &Path) -> Result<Self> {
        let resolved = std::fs::canonicalize(path).context("cannot look up", path)?;
        let resolved = os::node::block_node(resolved);
        let metadata = std::fs::metadata(&resolved).context("cannot look up", path)?;
        Self::from_metadata(resolved, &metadata)
    }

    /// Looks at an open file; `path` is what it is to be called.
    ///
    /// # Errors
    /// What `fstat(2)` says.
    pub fn of_file(file: &File, path: &Path) -> Result<Self> {
        let metadata = file.metadata().context("cannot look at", path)?;
        Self::from_metadata(path.to_owned(), &metadata)
    }

    pub(crate) fn from_metadata(path: PathBuf, metadata: &Metadata) -> Result<Self> {
        let file_type = metadata.file_type();
        let device = DeviceNumber::from_raw(metadata.rdev());
        let kind = if file_type.is_block_device() {
            Kind::Block(device)
        } else if file_type.is_file() {
            Kind::Regular
        } else if file_type.is_dir() {
            Kind::Directory
        } else if file_type.is_char_device() {
            Kind::Character(device)
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else if file_type.is_socket() {
            Kind::Socket
        } else {
            return Err(Error::invalid("cannot look up", path, "unknown file type"));
        };
        Ok(Self {
            path,
            kind,
            id: FileId::of(metadata),
            len: metadata.len(),
        })
    }

    /// The number of the block device this is, if it is one.
    pub fn block_device(&self) -> Option<DeviceNumber> {
        match self.kind {
            Kind::Block(number) => Some(number),
            _ => None,
        }
    }
}

/// Where a partition lies on its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartitionPlace {
    /// Its number in the partition table, from 1.
    pub index: u32,
    /// First sector on the disk, in units of 512 bytes whatever the disk's own sectors are.
    pub start: u64,
    /// Length, in units of 512 bytes.
    pub sectors: u64,
}

/// A block device as the system describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its number.
    pub number: DeviceNumber,
    /// The kernel's name: `sda1`, `dm-3`, `nvme0n1`; `disk2s1`.
    pub name: String,
    /// The whole disk it belongs to: itself, if it is one.
    pub disk: DeviceNumber,
    /// Length in units of 512 bytes.
    pub sectors: u64,
    /// Where it lies on the disk, if it is a partition. macOS does not say.
    pub partition: Option<PartitionPlace>,
    /// Its folder in sysfs. Elsewhere than on Linux one that does not exist.
    pub(crate) sysfs: PathBuf,
}

impl BlockDevice {
    /// Looks a device up by number.
    ///
    /// # Errors
    /// If there is no such device, or sysfs is not mounted; on macOS, if it cannot be opened.
    pub fn of(number: DeviceNumber) -> Result<Self> {
        os::node::device(number)
    }

    /// Looks up the device that `path` leads to.
    ///
    /// # Errors
    /// If `path` is no block device.
    pub fn at(path: &Path) -> Result<Self> {
        let node = Node::of(path)?;
        let number = node
            .block_device()
            .ok_or_else(|| Error::other("cannot use", path, "not a block device"))?;
        Self::of(number)
    }

    /// Whether this is a whole disk, not a partition of one.
    pub fn is_whole_disk(&self) -> bool {
        self.disk == self.number
    }

    /// Its folder in sysfs, without symbolic links.
    pub fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    /// The folder in sysfs of the whole disk.
    pub fn disk_sysfs(&self) -> &Path {
        match self.partition {
            Some(_) => self.sysfs.parent().unwrap_or(&self.sysfs),
            None => &self.sysfs,
        }
    }

    /// Whether it is a mapped device that is suspended: whoever reads it waits until it is resumed.
    pub fn is_suspended(&self) -> bool {
        read_number::<u32>(&self.disk_sysfs().join("dm/suspended")).is_ok_and(|flag| flag == 1)
    }

    /// The usual node, `/dev/NAME`. It need not exist.
    pub fn path(&self) -> PathBuf {
        // sysfs writes `!` for the slash of a few old drivers' names (cciss!c0d0).
        Path::new("/dev").join(self.name.replace('!', "/"))
    }

    /// The node of a mapped device by the name that people know it by, `/dev/mapper/vg-root`. `None` for
    /// other devices, and where that node is missing or another device's.
    pub fn mapper_path(&self) -> Option<PathBuf> {
        let name = std::fs::read_to_string(self.sysfs.join("dm/name")).ok()?;
        let path = Path::new("/dev/mapper").join(name.trim());
        let node = Node::of(&path).ok()?;
        (node.block_device() == Some(self.number)).then_some(path)
    }

    /// The partitions of a whole disk that the kernel knows, in order of their start. None for a
    /// partition.
    ///
    /// # Errors
    /// If sysfs cannot be read, or the disk vanished.
    pub fn partitions(&self) -> Result<Vec<Self>> {
        let mut partitions = os::node::partitions(self)?;
        partitions.sort_by_key(|partition| partition.partition.map(|place| place.start));
        Ok(partitions)
    }

    /// The devices built directly on top of this one (dm, md, bcache), by the kernel's names.
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub fn holders(&self) -> Result<Vec<String>> {
        let dir = self.sysfs.join("holders");
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::new("cannot read", dir, error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.context("cannot read", &dir)?.file_name();
            names.push(name.to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// The devices that this one, or the disk it is on, is directly built of (dm, md).
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub fn lower_devices(&self) -> Result<Vec<DeviceNumber>> {
        let dir = self.disk_sysfs().join("slaves");
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::new("cannot read", dir, error)),
        };
        let mut numbers = Vec::new();
        for entry in entries {
            let path = entry.context("cannot read", &dir)?.path();
            numbers.push(read_number(&path.join("dev"))?);
        }
        Ok(numbers)
    }

    /// Whether requests pass through the multi-queue block layer under this disk's own number.
    /// Only then do `block_rq_*` trace events name it: bio-based devices (dm, md, zram, brd, pmem,
    /// the head of an NVMe multipath device) have no folder `mq`.
    pub fn is_request_based(&self) -> bool {
        self.disk_sysfs().join("mq").is_dir()
    }

    /// The longest request that writes to its disk can be merged to, in units of 512 bytes, as the
    /// disk is set just now.
    ///
    /// # Errors
    /// If sysfs does not say.
    pub fn longest_request(&self) -> Result<u64> {
        let kib: u64 = read_number(&self.disk_sysfs().join("queue/max_sectors_kb"))?;
        Ok(kib.saturating_mul(2))
    }

    /// What a loop device, or a partition on one, lies on; `None` if it is no loop device, or none
    /// that is attached.
    ///
    /// # Errors
    /// If the device node cannot be opened (which needs root), or it vanished.
    pub fn loop_backing(&self) -> Result<Option<LoopBacking>> {
        let Some(shown) = self.loop_shown()? else {
            return Ok(None);
        };
        let disk = self.disk_sysfs().file_name().unwrap_or_default();
        let node = Path::new("/dev").join(disk);
        let device = File::open(&node).context("cannot open", &node)?;
        let opened =
            DeviceNumber::from_raw(device.metadata().context("cannot open", &node)?.rdev());
        if opened != self.disk {
            return Err(Error::invalid(
                "cannot ask the loop device",
                node,
                format!("the node is device {opened}, not {}", self.disk),
            ));
        }
        match LoopInfo::of(&device) {
            Ok(info) => Ok(Some(info.into_backing(shown))),
            // Detached since.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(Error::new("cannot ask the loop device", node, error)),
        }
    }

    /// The file a loop device lies on, by the name it had when it was attached. Needs no privilege,
    /// but names lie: another mount namespace, a rename.
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub fn loop_shown(&self) -> Result<Option<PathBuf>> {
        let shown = self.disk_sysfs().join("loop/backing_file");
        match std::fs::read(&shown) {
            Ok(mut path) => {
                if path.last() == Some(&b'\n') {
                    path.pop();
                }
                Ok(Some(OsString::from_vec(path).into()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::new("cannot read", shown, error)),
        }
    }
}

/// What an attached loop device lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopBacking {
    /// The name the file had when it was attached; ` (deleted)` behind it if it is gone.
    pub path: PathBuf,
    /// Which file it is, whatever it is called.
    pub file: FileId,
    /// Which device, where it lies on a device and not on a file.
    pub device: Option<DeviceNumber>,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// How many bytes of the file at most; 0: all of it.
    pub size_limit: u64,
    /// Whether it refuses to be written.
    pub read_only: bool,
}

/// `struct loop_info64` of include/uapi/linux/loop.h.
#[repr(C)]
pub(crate) struct LoopInfo {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) rdevice: u64,
    pub(crate) offset: u64,
    pub(crate) sizelimit: u64,
    pub(crate) number: u32,
    pub(crate) encrypt_type: u32,
    pub(crate) encrypt_key_size: u32,
    pub(crate) flags: u32,
    pub(crate) file_name: [u8; 64],
    pub(crate) crypt_name: [u8; 64],
    pub(crate) encrypt_key: [u8; 32],
    pub(crate) init: [u64; 2],
}

/// `LO_FLAGS_READ_ONLY`.
const LOOP_READ_ONLY: u32 = 1;

mod ioctl {
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, super::LoopInfo);
}

impl LoopInfo {
    fn of(device: &File) -> io::Result<Self> {
        let mut info = std::mem::MaybeUninit::<Self>::zeroed();
        // SAFETY: the descriptor is open, and the kernel writes one `struct loop_info64`, whose
        // layout `LoopInfo` has, into memory that is large enough and ours.
        unsafe { ioctl::loop_get_status64(device.as_raw_fd(), info.as_mut_ptr()) }?;
        // SAFETY: all fields are plain integers, and all bytes were zeroed or written by the kernel.
        Ok(unsafe { info.assume_init() })
    }

    fn into_backing(self, path: PathBuf) -> LoopBacking {
        // The kernel fills these by huge_encode_dev(): the low 32 bits are as in stat(2), and its
        // device numbers have no more than 32.
        LoopBacking {
            path,
            file: FileId {
                filesystem: DeviceNumber::from_raw(self.device),
                inode: self.inode,
            },
            device: (self.rdevice != 0).then(|| DeviceNumber::from_raw(self.rdevice)),
            offset: self.offset,
            size_limit: self.sizelimit,
            read_only: self.flags & LOOP_READ_ONLY != 0,
        }
    }
}

/// The device that udev found a filesystem of this UUID on (`/dev/disk/by-uuid`), if any.
pub fn device_with_uuid(uuid: &str) -> Option<PathBuf> {
    // The text may come from an image: it must not lead out of the folder.
    if uuid.is_empty() || uuid.contains('/') || uuid.starts_with('.') {
        return None;
    }
    std::fs::canonicalize(Path::new("/dev/disk/by-uuid").join(uuid)).ok()
}

/// All block devices that are whole disks; on macOS those that may be opened.
///
/// # Errors
/// If they cannot be listed.
pub fn disks() -> Result<Vec<BlockDevice>> {
    os::node::disks()
}

/// Reads a file of sysfs that holds one value.
pub(crate) fn read_number<T>(path: &Path) -> Result<T>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    let text = std::fs::read_to_string(path).context("cannot read", path)?;
    text.trim()
        .parse()
        .map_err(|error: T::Err| Error::invalid("cannot read", path, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, needs_root, scratch};

    #[test]
    fn numbers_go_round() {
        let number: DeviceNumber = "259:70000\n".parse().unwrap();
        assert_eq!(number.to_string(), "259:70000");
        assert_eq!(DeviceNumber::from_raw(number.to_raw()), number);
        assert_eq!(number.to_kernel(), (259 << 20) | 70000);
        for bad in ["", "8", "8:", ":1", "8:-1", "8:1:2", "99999999999:1"] {
            assert!(bad.parse::<DeviceNumber>().is_err(), "{bad}");
        }
    }

    #[test]
    fn kinds_are_told_apart() {
        let dir = scratch();
        let file = dir.path().join("file");
        std::fs::write(&file, "abc").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("file", &link).unwrap();
        let node = Node::of(&link).unwrap();
        assert_eq!((node.kind, node.len), (Kind::Regular, 3));
        assert_eq!(node, Node::of(&file).unwrap());
        assert_eq!(Node::of(dir.path()).unwrap().kind, Kind::Directory);
        let null = DeviceNumber { major: 1, minor: 3 };
        let node = Node::of(Path::new("/dev/null")).unwrap();
        assert_eq!(node.kind, Kind::Character(null));
        assert_eq!(node.block_device(), None);
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(Node::of(&fifo).unwrap().kind, Kind::Fifo);
        let missing = Node::of(&dir.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(BlockDevice::at(&file).is_err());
    }

    #[test]
    fn privileged_a_disk_knows_its_partitions_and_they_know_it() {
        needs_root!();
        let dir = scratch();
        let device = Loop::sparse(&dir.path().join("disk"), 16 << 20);
        // Added out of order: the list is by place.
        let second = device.add_partition(2, 8192, 100);
        let first = device.add_partition(1, 2048, 4096);
        let disk = BlockDevice::at(device.path()).unwrap();
        assert!(disk.is_whole_disk() && disk.partition.is_none());
        assert_eq!(disk.sectors, 32768);
        assert_eq!(disk.path(), device.path());
        assert!(disk.is_request_based());
        let partitions = disk.partitions().unwrap();
        assert_eq!(partitions.len(), 2);
        assert_eq!(partitions[0], BlockDevice::at(&first).unwrap());
        assert_eq!(partitions[1], BlockDevice::at(&second).unwrap());
        let place = PartitionPlace {
            index: 1,
            start: 2048,
            sectors: 4096,
        };
        assert_eq!(partitions[0].partition, Some(place));
        assert!(!partitions[0].is_whole_disk());
        assert_eq!(partitions[0].disk, disk.number);
        assert!(partitions[0].is_request_based());
        assert!(partitions[0].partitions().unwrap().is_empty());
        assert!(disk.holders().unwrap().is_empty());
        assert!(disks().unwrap().contains(&disk));
    }

    #[test]
    fn privileged_a_loop_device_knows_its_file_and_its_device() {
        needs_root!();
        let dir = scratch();
        let file = dir.path().join("a file");
        let outer = Loop::sparse(&file, 1 << 20);
        let inner = Loop::attach(outer.path(), &["-r", "-o", "4096", "--sizelimit", "8192"]);

        let backing = BlockDevice::at(outer.path()).unwrap();
        let backing = backing.loop_backing().unwrap().unwrap();
        assert_eq!(backing.path, file);
        assert_eq!(backing.file, Node::of(&file).unwrap().id);
        assert_eq!((backing.device, backing.read_only), (None, false));

        let stacked = BlockDevice::at(inner.path()).unwrap();
        assert_eq!(stacked.sectors, 16);
        let stacked = stacked.loop_backing().unwrap().unwrap();
        assert_eq!(stacked.device, Some(outer.number()));
        assert_eq!((stacked.offset, stacked.size_limit), (4096, 8192));
        assert!(stacked.read_only);

        std::fs::remove_file(&file).unwrap();
        let backing = BlockDevice::at(outer.path())
            .unwrap()
            .loop_backing()
            .unwrap();
        assert!(backing.is_some(), "a deleted file still backs its device");
        drop(inner);
        let partition = outer.add_partition(1, 8, 8);
        let of_partition = BlockDevice::at(&partition).unwrap().loop_backing().unwrap();
        assert_eq!(of_partition, backing, "a partition lies on its disk's file");
    }
}
