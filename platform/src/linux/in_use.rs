//! The search for users through /proc and /sys.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::mounts::unescape;
use crate::error::{Context, Error, Result};
use crate::in_use::{Swap, User, Users};
use crate::mounts::{self, Mount};
use crate::node::{self, BlockDevice, DeviceNumber, FileId};

/// See [`crate::in_use::of_device`].
pub(crate) fn of_device(device: &BlockDevice, ignore: &[i32]) -> Result<Users> {
    let mut target = Target::default();
    target.add_device(device)?;
    target.search(ignore)
}

/// See [`crate::in_use::of_file`].
pub(crate) fn of_file(file: FileId, ignore: &[i32]) -> Result<Users> {
    let mut target = Target::default();
    target.files.insert(file);
    target.search(ignore)
}

/// See [`crate::in_use::is_open_elsewhere`].
pub(crate) fn is_open_elsewhere(file: FileId) -> Result<bool> {
    let mut target = Target::default();
    target.files.insert(file);
    let proc = Path::new("/proc");
    for entry in std::fs::read_dir(proc).context("cannot read", proc)? {
        let name = entry.context("cannot read", proc)?.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<u32>().ok());
        if pid.is_none_or(|pid| pid == std::process::id()) {
            continue;
        }
        for folder in ["fd", "map_files"] {
            // Ended meanwhile, or hidden: then it is no explanation.
            let open = std::fs::read_dir(proc.join(&name).join(folder));
            let mut links = open.into_iter().flatten().flatten();
            if links.any(|link| target.leads_here(&link.path()).unwrap_or(false)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// See [`crate::in_use::swaps`].
pub(crate) fn swaps() -> Result<Vec<Swap>> {
    let list = Path::new("/proc/swaps");
    let bytes = match std::fs::read(list) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::new("cannot read", list, error)),
    };
    let lines = bytes.split(|&byte| byte == b'\n').skip(1);
    let names = lines.filter_map(|line| line.split(|byte| b" \t".contains(byte)).next());
    Ok(names
        .filter(|name| !name.is_empty())
        .map(|name| {
            let path = PathBuf::from(unescape(name));
            // One that cannot be looked up (a deleted file) is still listed, by its name.
            let found = Identity::of(&path).ok();
            Swap {
                device: found.and_then(|found| found.device),
                file: found.and_then(|found| found.device.is_none().then_some(found.file)),
                path,
            }
        })
        .collect())
}

/// What is searched for.
#[derive(Debug, Default)]
struct Target {
    /// The device, its disk, its partitions: everything through which the same bytes are reached.
    direct: Vec<BlockDevice>,
    /// Numbers of those, and of the devices below them.
    devices: BTreeSet<DeviceNumber>,
    /// The files searched for, and those below a loop device.
    files: BTreeSet<FileId>,
    /// Loop devices that are themselves searched for, or on the way down.
    own_loops: BTreeSet<DeviceNumber>,
}

impl Target {
    fn add_device(&mut self, device: &BlockDevice) -> Result<()> {
        self.direct.push(device.clone());
        if device.is_whole_disk() {
            self.direct.extend(device.partitions()?);
        } else {
            self.direct.push(BlockDevice::of(device.disk)?);
        }
        let numbers: Vec<_> = self.direct.iter().map(|device| device.number).collect();
        self.devices.extend(numbers);
        self.add_below(device)
    }

    /// Adds what lies below `device`: whoever writes there writes to it.
    fn add_below(&mut self, device: &BlockDevice) -> Result<()> {
        let mut below = Vec::new();
        if device.loop_shown()?.is_some() {
            self.own_loops.insert(device.disk);
            if let Some(backing) = device.loop_backing()? {
                match backing.device {
                    Some(lower) => below.push(lower),
                    None => {
                        self.files.insert(backing.file);
                    }
                }
            }
        }
        below.extend(device.lower_devices()?);
        for number in below {
            let lower = BlockDevice::of(number)?;
            self.devices.insert(lower.disk);
            if self.devices.insert(lower.number) || lower.is_whole_disk() {
                self.add_below(&lower)?;
            }
        }
        Ok(())
    }

    fn search(&self, ignore: &[i32]) -> Result<Users> {
        let mut found = Users::default();
        self.search_mounts(&mounts::of_this_process()?, None, &mut found.users);
        for swap in swaps()? {
            let by_device = swap.device.is_some_and(|d| self.devices.contains(&d));
            if by_device || swap.file.is_some_and(|file| self.files.contains(&file)) {
                found.users.push(User::Swap { path: swap.path });
            }
        }
        self.search_holders(&mut found.users)?;
        self.search_loops(&mut found.users)?;
        self.search_processes(ignore, &mut found)?;
        Ok(found)
    }

    fn search_mounts(&self, mounts: &[Mount], elsewhere: Option<i32>, users: &mut Vec<User>) {
        for mount in mounts {
            let device = mount.block_device();
            if !device.is_some_and(|device| self.devices.contains(&device)) {
                continue;
            }
            let known = users
                .iter()
                .any(|user| matches!(user, User::Mount { point, .. } if *point == mount.point));
            if !known || elsewhere.is_none() {
                users.push(User::Mount {
                    point: mount.point.clone(),
                    fs_type: mount.fs_type.clone(),
                    read_only: mount.is_read_only(),
                    is_stopped: mount.is_stopped(),
                    elsewhere,
                });
            }
        }
    }

    fn search_holders(&self, users: &mut Vec<User>) -> Result<()> {
        for device in &self.direct {
            let mut holders = device.holders()?;
            for holder in &mut holders {
                let name = format!("/sys/block/{holder}/dm/name");
                if let Ok(name) = std::fs::read_to_string(name) {
                    *holder = format!("{holder} ({})", name.trim());
                }
            }
            // A registered bcache or a mounted btrfs keeps its devices without appearing there.
            if holders.is_empty() && device.sysfs().join("bcache").exists() {
                holders.push("bcache".to_owned());
            }
            if let Some(uuid) = btrfs_of(&device.name) {
                users.push(User::Btrfs {
                    device: device.name.clone(),
                    is_stopped: is_stopped_btrfs(&uuid)?,
                    uuid,
                });
            }
            users.extend(holders.into_iter().map(|by| User::Holder {
                device: device.name.clone(),
                by,
            }));
        }
        Ok(())
    }

    fn search_loops(&self, users: &mut Vec<User>) -> Result<()> {
        for device in node::disks()? {
            if self.own_loops.contains(&device.number) || device.loop_shown()?.is_none() {
                continue;
            }
            let backing = match device.loop_backing() {
                Ok(Some(backing)) => backing,
                Ok(None) => continue,
                // Without privilege the file's name has to do.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    if self.loop_by_name(&device)? {
                        users.push(User::Loop {
                            device: device.number,
                            read_only: read_only(&device),
                            name: device.name,
                        });
                    }
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let hit = match backing.device {
                Some(lower) => self.devices.contains(&lower),
                None => self.files.contains(&backing.file),
            };
            if hit {
                users.push(User::Loop {
                    device: device.number,
                    name: device.name,
                    read_only: backing.read_only,
                });
            }
        }
        Ok(())
    }

    fn loop_by_name(&self, device: &BlockDevice) -> Result<bool> {
        let shown = device.loop_shown()?;
        let found = shown.and_then(|path| Identity::of(&path).ok());
        Ok(found.is_some_and(|found| self.contains(found)))
    }

    fn contains(&self, identity: Identity) -> bool {
        match identity.device {
            Some(device) => self.devices.contains(&device),
            None => self.files.contains(&identity.file),
        }
    }

    /// Whether a link of /proc/PID leads to something searched for. Gone meanwhile: no.
    fn leads_here(&self, link: &Path) -> io::Result<bool> {
        match Identity::of(link) {
            Ok(identity) => Ok(self.contains(identity)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Looks at every other process: what it can write to, and what is mounted where it lives.
    fn search_processes(&self, ignore: &[i32], found: &mut Users) -> Result<()> {
        let proc = Path::new("/proc");
        let mut namespaces = HashSet::new();
        namespaces.extend(std::fs::read_link("/proc/self/ns/mnt"));
        let own_pid = std::process::id().cast_signed();
        for entry in std::fs::read_dir(proc).context("cannot read", proc)? {
            let name = entry.context("cannot read", proc)?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let dir = proc.join(&name);
            // Of a hidden process the open files are hidden too, and it is counted below.
            if let Ok(namespace) = std::fs::read_link(dir.join("ns/mnt"))
                && namespaces.insert(namespace)
                && let Ok(mounts) = super::mounts::of_process(pid)
            {
                self.search_mounts(&mounts, Some(pid), &mut found.users);
            }
            if pid == own_pid || ignore.contains(&pid) {
                continue;
            }
            match self.lasting_writer_in(pid, &dir) {
                Ok(Some(writer)) => found.users.push(writer),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    found.hidden_processes += 1;
                }
                // It ended meanwhile.
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// The same as [`writers_in`](Self::writers_in), but for a process that was just started: until it runs a
    /// program of its own, it has all that is open in the one that started it.
    fn lasting_writer_in(&self, pid: i32, dir: &Path) -> io::Result<Option<User>> {
        for _ in 0..LOOKS {
            let writer = self.writers_in(pid, dir)?;
            if writer.is_none() || !is_new(dir) {
                return Ok(writer);
            }
            std::thread::sleep(NAP);
        }
        self.writers_in(pid, dir)
    }

    /// The first thing searched for that a process can write to.
    fn writers_in(&self, pid: i32, dir: &Path) -> io::Result<Option<User>> {
        let writer = |path: PathBuf, mapped| {
            let command = std::fs::read(dir.join("comm")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).trim_end().to_owned();
            User::Writer {
                pid,
                command,
                path,
                mapped,
            }
        };
        for entry in std::fs::read_dir(dir.join("fd"))? {
            let fd = entry?.file_name();
            let link = dir.join("fd").join(&fd);
            // In this order: what is only read is not looked up, whoever serves it may be gone.
            if is_open_for_writing(&dir.join("fdinfo").join(&fd)) && self.leads_here(&link)? {
                let path = std::fs::read_link(&link).unwrap_or(link);
                return Ok(Some(writer(path, false)));
            }
        }
        let maps = std::fs::read(dir.join("maps"))?;
        for line in maps.split(|&byte| byte == b'\n') {
            let Some(range) = shared_writable(line) else {
                continue;
            };
            let link = dir.join("map_files").join(range);
            if self.leads_here(&link)? {
                let path = std::fs::read_link(&link).unwrap_or(link);
                return Ok(Some(writer(path, true)));
            }
        }
        Ok(None)
    }
}

/// How often a process is looked at again that was just started, and how long to wait between.
const LOOKS: u32 = 10;
const NAP: Duration = Duration::from_millis(20);

/// Processes that run for less than this are new, in seconds.
const NEW: f64 = 1.0;

/// Whether a process was just started: field 22 of `/proc/PID/stat` is when, in hundredths of a second since
/// the machine was (proc(5)).
fn is_new(dir: &Path) -> bool {
    let since_start = |stat: String| {
        let (_, fields) = stat.rsplit_once(')')?;
        let ticks: f64 = fields.split_whitespace().nth(19)?.parse().ok()?;
        let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
        let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
        Some(uptime - ticks / 100.0)
    };
    let stat = std::fs::read_to_string(dir.join("stat")).ok();
    stat.and_then(since_start).is_some_and(|age| age < NEW)
}

/// Which file, and which device if the file is a block device's node.
#[derive(Clone, Copy, Debug)]
struct Identity {
    file: FileId,
    device: Option<DeviceNumber>,
}

impl Identity {
    /// Looks at what `path` leads to without asking a server: a network filesystem whose server is
    /// gone, or a FUSE filesystem that does not answer, must not make us wait.
    fn of(path: &Path) -> io::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: `name` is a terminated string and `found` memory for one `struct statx`; the
        // kernel reads the one and writes the other.
        let result = unsafe {
            libc::statx(
                libc::AT_FDCWD,
                name.as_ptr(),
                libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT,
                libc::STATX_TYPE | libc::STATX_INO,
                found.as_mut_ptr(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: plain integers, all zeroed or written by the kernel.
        let found = unsafe { found.assume_init() };
        let is_block = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
        Ok(Self {
            file: FileId {
                filesystem: DeviceNumber {
                    major: found.stx_dev_major,
                    minor: found.stx_dev_minor,
                },
                inode: found.stx_ino,
            },
            device: is_block.then_some(DeviceNumber {
                major: found.stx_rdev_major,
                minor: found.stx_rdev_minor,
            }),
        })
    }
}

/// Whether the flags in a file of /proc/PID/fdinfo allow writing. Unreadable ones count as such.
fn is_open_for_writing(fdinfo: &Path) -> bool {
    let Ok(info) = std::fs::read_to_string(fdinfo) else {
        return true;
    };
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_none_or(|flags| flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// The address range of a line of /proc/PID/maps, if it maps a file so that writes reach it.
fn shared_writable(line: &[u8]) -> Option<&OsStr> {
    let mut fields = line.split(|&byte| byte == b' ');
    let range = fields.next()?;
    match fields.next()? {
        [_, b'w', _, b's'] => Some(OsStr::from_bytes(range)),
        _ => None,
    }
}

/// The mounted btrfs filesystem that a device belongs to, by its UUID.
fn btrfs_of(device: &str) -> Option<String> {
    let filesystems = std::fs::read_dir("/sys/fs/btrfs").ok()?;
    filesystems.flatten().find_map(|entry| {
        let member = entry.path().join("devices").join(device);
        let uuid = || entry.file_name().to_string_lossy().into_owned();
        member.exists().then(uuid)
    })
}

/// Whether a mounted btrfs is mounted read-only. All its mounts are of one kind; one that is mounted in
/// another mount namespace only counts as writable.
fn is_stopped_btrfs(uuid: &str) -> Result<bool> {
    let devices = Path::new("/sys/fs/btrfs").join(uuid).join("devices");
    let shows = |mount: &Mount| {
        let number = mount.block_device().map(BlockDevice::of);
        number.is_some_and(|device| device.is_ok_and(|it| devices.join(it.name).exists()))
    };
    let mounts = mounts::of_this_process()?;
    let mut mounts = mounts
        .iter()
        .filter(|mount| mount.fs_type == "btrfs" && shows(mount));
    Ok(mounts.next().is_some_and(Mount::is_stopped))
}

/// Whether a disk refuses to be written, as sysfs says.
fn read_only(device: &BlockDevice) -> bool {
    node::read_number::<u32>(&device.sysfs().join("ro")).is_ok_and(|flag| flag == 1)
}

#[cfg(test)]
mod tests;
