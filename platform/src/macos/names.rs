//! Disks by name: `disk2` is a whole disk, `disk2s1` a part of it, `disk3s1s1` a snapshot of an APFS
//! volume. `/dev/disk2s1` is a block device; a character device of the same number beside it,
//! `/dev/rdisk2s1`, goes past the cache.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The whole disk that a disk or a part of one belongs to: `disk2` of `disk2s1`. `None` if it is no name
/// of a disk.
pub(crate) fn disk_of(name: &str) -> Option<&str> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let mut numbers = name.strip_prefix("disk")?.split('s');
    let unit = numbers.next().filter(|unit| is_number(unit))?;
    let is_name = numbers.all(is_number);
    name.get(.."disk".len() + unit.len()).filter(|_| is_name)
}

/// The name of the disk or part whose block device is at `path`.
pub(crate) fn name_at(path: &Path) -> Option<&str> {
    let name = path.to_str()?.strip_prefix("/dev/")?;
    disk_of(name).map(|_| name)
}

/// The character device beside a block device.
pub(crate) fn raw_node(name: &str) -> PathBuf {
    Path::new("/dev").join(format!("r{name}"))
}

/// The path of the block device where `path` is the character device beside it.
pub(crate) fn block_node(path: PathBuf) -> PathBuf {
    let name = path.to_str().and_then(|path| path.strip_prefix("/dev/r"));
    match name.filter(|name| disk_of(name).is_some()) {
        Some(name) => Path::new("/dev").join(name),
        None => path,
    }
}

/// Whether two disks or parts have bytes in common: one is the other, or on it.
pub(crate) fn share_bytes(one: &str, other: &str) -> bool {
    let is_on = |name: &str, below: &str| {
        let rest = name.strip_prefix(below);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('s'))
    };
    is_on(one, other) || is_on(other, one)
}

/// What is mounted, of a mount's name for it: a mounted snapshot of an APFS volume is called
/// `NAME@/dev/disk3s5`.
pub(crate) fn mounted_node(name: OsString) -> OsString {
    let device = name.to_str().and_then(|name| name.rsplit_once('@'));
    match device {
        Some((_, device)) if name_at(Path::new(device)).is_some() => device.into(),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_parts_are_told_from_anything_else() {
        for (name, disk) in [
            ("disk0", "disk0"),
            ("disk12s3", "disk12"),
            ("disk3s1s1", "disk3"),
        ] {
            assert_eq!(disk_of(name), Some(disk), "{name}");
        }
        for name in [
            "", "disk", "disks1", "disk2s", "disk2s1s", "disk2x", "disk2s1x", "rdisk2", "sda",
            "disk2 s1",
        ] {
            assert_eq!(disk_of(name), None, "{name}");
        }
        assert_eq!(name_at(Path::new("/dev/disk2s1")), Some("disk2s1"));
        for path in ["/dev/rdisk2", "disk2", "/tmp/dev/disk2", "/dev/x/disk2"] {
            assert_eq!(name_at(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn both_nodes_are_one_device() {
        assert_eq!(raw_node("disk2s1"), Path::new("/dev/rdisk2s1"));
        assert_eq!(
            block_node("/dev/rdisk2s1".into()),
            Path::new("/dev/disk2s1")
        );
        for path in [
            "/dev/disk2s1",
            "/dev/random",
            "/dev/rdisk",
            "/tmp/rdisk2",
            "rdisk2",
        ] {
            assert_eq!(block_node(path.into()), Path::new(path));
        }
    }

    #[test]
    fn bytes_are_shared_up_and_down_but_not_aside() {
        for (one, other) in [
            ("disk2", "disk2"),
            ("disk2", "disk2s1"),
            ("disk3s1", "disk3s1s1"),
            ("disk3", "disk3s1s1"),
        ] {
            assert!(
                share_bytes(one, other) && share_bytes(other, one),
                "{one} {other}"
            );
        }
        for (one, other) in [
            ("disk2", "disk20"),
            ("disk2s1", "disk2s2"),
            ("disk2s1", "disk2s10"),
            ("disk2s1", "disk3"),
        ] {
            assert!(
                !share_bytes(one, other) && !share_bytes(other, one),
                "{one} {other}"
            );
        }
    }

    #[test]
    fn a_mounted_snapshot_is_on_its_volume() {
        for (name, node) in [
            ("/dev/disk3s5", "/dev/disk3s5"),
            (
                "com.apple.TimeMachine.2026-01-01.local@/dev/disk3s5",
                "/dev/disk3s5",
            ),
            ("user@server:/dev/x", "user@server:/dev/x"),
            ("//user@server/share", "//user@server/share"),
        ] {
            assert_eq!(mounted_node(name.into()), node);
        }
    }
}
