//! `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).
//!
//! The lines are taken as bytes: any user with FUSE can mount at a path that is no UTF-8, and that
//! must not keep us from seeing the others.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::mounts::{Mount, Place};
use crate::node::DeviceNumber;

/// Whether `st_dev` is the number of the device below: not of filesystems with numbers of their own (btrfs,
/// tmpfs, network).
pub(crate) fn is_of_device(device: DeviceNumber) -> bool {
    device.major != 0
}

/// The block device at a path below `/dev`, without leaving the filesystem that is mounted there
/// (openat2(2), Linux 5.6; an older kernel finds none).
pub(crate) fn device_in_dev(below: &Path) -> Option<DeviceNumber> {
    let dev = File::open("/dev").ok()?;
    let name = CString::new(below.as_os_str().as_bytes()).ok()?;
    // SAFETY: all-zero is a valid `open_how`, which is plain numbers.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_NO_XDEV;
    // SAFETY: an open folder, a terminated string, and one struct of the size given; all outlive the
    // call.
    let opened = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dev.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    let opened = RawFd::try_from(opened).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: a descriptor that the kernel has just made for us alone.
    let node = File::from(unsafe { OwnedFd::from_raw_fd(opened) });
    let metadata = node.metadata().ok()?;
    let is_block = metadata.file_type().is_block_device();
    is_block.then(|| DeviceNumber::from_raw(metadata.rdev()))
}

/// See [`Place::of`].
pub(crate) fn place_of(path: &Path) -> Result<Place> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(path)
        .context("cannot look up", path)?;
    place_of_open(&file, path)
}

/// See [`Place::of_open`].
pub(crate) fn place_of_open(file: &File, path: &Path) -> Result<Place> {
    let fd = file.as_raw_fd();
    let info_path = format!("/proc/self/fdinfo/{fd}");
    let info = std::fs::read_to_string(&info_path).context("cannot read", &info_path)?;
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))
        .and_then(|id| id.trim().parse::<u32>().ok())
        .ok_or_else(|| Error::invalid("cannot read", &info_path, "no mount number"))?;
    let resolved = std::fs::read_link(format!("/proc/self/fd/{fd}"))
        .context("cannot resolve the path of", path)?;
    let mount = of_this_process()?
        .into_iter()
        .find(|mount| mount.id == id)
        .ok_or_else(|| {
            Error::other(
                "cannot find the mount of",
                path,
                "it is not among the mounts of this process",
            )
        })?;
    Ok(Place {
        is_mount_point: mount.point == resolved,
        mount,
        path: resolved,
    })
}

/// See [`crate::mounts::of_this_process`].
pub(crate) fn of_this_process() -> Result<Vec<Mount>> {
    read(Path::new("/proc/self/mountinfo"))
}

/// The mounts another process sees; fails if it is gone or may not be looked at.
pub(crate) fn of_process(pid: i32) -> Result<Vec<Mount>> {
    read(Path::new(&format!("/proc/{pid}/mountinfo")))
}

fn read(path: &Path) -> Result<Vec<Mount>> {
    let bytes = std::fs::read(path).context("cannot read", path)?;
    parse(&bytes).context("cannot read", path)
}

fn parse(bytes: &[u8]) -> io::Result<Vec<Mount>> {
    bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            mount_of(line).ok_or_else(|| {
                let line = String::from_utf8_lossy(line);
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("strange line {:?}", &*line),
                )
            })
        })
        .collect()
}

/// Reads one line of mountinfo; `None` if it is none.
fn mount_of(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = text(fields.next()?).parse().ok()?;
    let parent = text(fields.next()?).parse().ok()?;
    let device = text(fields.next()?).parse().ok()?;
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    let options = text(fields.next()?);
    // Optional fields, ended by a lone hyphen.
    fields.find(|field| *field == b"-")?;
    Some(Mount {
        id,
        parent,
        device,
        root: root.into(),
        point: point.into(),
        fs_type: text(&unescape(fields.next()?).into_vec()),
        source: unescape(fields.next()?),
        options,
        super_options: text(fields.next()?),
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Undoes the kernel's `\ooo` escapes (fs/seq_file.c, mangle_path): space, tab, newline, backslash
/// and `#` come as three octal digits.
pub(super) fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = |byte: u8| {
            (b'0'..=b'7')
                .contains(&byte)
                .then(|| u32::from(byte - b'0'))
        };
        let escaped = match (byte, after) {
            (b'\\', [a, b, c, ..]) => match (octal(*a), octal(*b), octal(*c)) {
                (Some(a), Some(b), Some(c)) => u8::try_from(a * 64 + b * 8 + c).ok(),
                _ => None,
            },
            _ => None,
        };
        if let Some(escaped) = escaped {
            plain.push(escaped);
            rest = after.get(3..).unwrap_or_default();
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    OsStr::from_bytes(&plain).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, Mounted, mkfs, needs_root, scratch};

    #[test]
    fn reads_escapes_optional_fields_and_bytes_that_are_no_text() {
        let line = b"36 35 98:0 /mnt1 /mnt\\0402\xff rw,noatime master:1 propagate_from:2 - ext4 /dev/ro\\134ot ro,errors=continue";
        let mount = mount_of(line).unwrap();
        assert_eq!((mount.id, mount.parent), (36, 35));
        assert_eq!(mount.device.to_string(), "98:0");
        assert_eq!(mount.root, Path::new("/mnt1"));
        assert_eq!(mount.point.as_os_str().as_bytes(), b"/mnt 2\xff");
        assert_eq!(mount.fs_type, "ext4");
        assert_eq!(mount.source, "/dev/ro\\ot");
        assert!(mount.is_read_only());
        assert!(!mount.is_whole());
        assert!(mount.has_super_option("errors"));
        assert!(!mount.has_super_option("error"));
        for end in 0..line.len() {
            // A line cut short is refused or read, never a panic.
            let _ = mount_of(&line[..end]);
        }
        assert!(mount_of(b"36 35 98:0 / /mnt rw - ext4").is_none());
        assert!(mount_of(b"36 35 980 / /mnt rw - ext4 a rw").is_none());
    }

    #[test]
    fn half_an_escape_stays_as_it_is() {
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"\\0400\\777\\"), " 0\\777\\");
    }

    #[test]
    fn this_process_has_a_root() {
        let place = Place::of(Path::new("/")).unwrap();
        assert!(place.is_mount_point);
        assert_eq!(place.mount.point, Path::new("/"));
        let place = Place::of(Path::new("/proc/self/mountinfo")).unwrap();
        assert_eq!(place.mount.fs_type, "proc");
        assert!(!place.is_mount_point);
        assert_eq!(place.mount.block_device(), None);
        assert!(Place::of(Path::new("/nowhere/at/all")).is_err());
    }

    #[test]
    fn privileged_finds_the_mount_under_odd_names_links_and_stacks() {
        needs_root!();
        let dir = scratch();
        let lower = Loop::sparse(&dir.path().join("lower"), 32 << 20);
        let upper = Loop::sparse(&dir.path().join("upper"), 32 << 20);
        mkfs("ext4", lower.path());
        mkfs("ext4", upper.path());
        let point = dir.path().join("a b\\c\td#");
        std::fs::create_dir(&point).unwrap();
        let first = Mounted::new(lower.path(), &point, "rw");
        let second = Mounted::new(upper.path(), &point, "ro");
        std::os::unix::fs::symlink(&point, dir.path().join("link")).unwrap();

        let place = Place::of(&dir.path().join("link")).unwrap();
        assert!(place.is_mount_point && place.mount.is_whole());
        assert_eq!(place.path, point);
        assert_eq!(place.mount.point, point);
        assert_eq!(place.mount.block_device(), Some(upper.number()));
        assert!(place.mount.is_read_only());
        assert_eq!(place.mount.fs_type, "ext4");

        drop(second);
        std::fs::write(point.join("file"), "x").unwrap();
        let place = Place::of(&point.join("file")).unwrap();
        assert_eq!(place.mount.device, lower.number());
        assert!(!place.is_mount_point && !place.mount.is_read_only());
        drop(first);
    }
}
