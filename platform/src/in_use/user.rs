//! Who uses a device, and how they are named.

use std::fmt;
use std::path::PathBuf;

use crate::node::DeviceNumber;

/// Somebody who uses a device or file. `Display` names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// It is mounted.
    Mount {
        /// Where.
        point: PathBuf,
        /// As what.
        fs_type: String,
        /// Whether this mount refuses to be written.
        read_only: bool,
        /// Whether the filesystem itself is mounted read-only, or was stopped by an error: it writes
        /// nothing, through whatever mount.
        is_stopped: bool,
        /// A process of the other mount namespace in which it is mounted; `None`: in ours.
        elsewhere: Option<i32>,
    },
    /// It is swap space.
    Swap {
        /// By this name.
        path: PathBuf,
    },
    /// Another device or a filesystem of several devices is built on it.
    Holder {
        /// Which of the devices searched for is held.
        device: String,
        /// By the kernel's name, with the name its owner gave it: `dm-3 (vg-root)`.
        by: String,
    },
    /// It is a device of a mounted btrfs: the list of mounts shows one device of each alone.
    Btrfs {
        /// Which of the devices searched for.
        device: String,
        /// The filesystem's UUID.
        uuid: String,
        /// Whether it is mounted read-only.
        is_stopped: bool,
    },
    /// A loop device lies on it.
    Loop {
        /// The loop device.
        device: DeviceNumber,
        /// Its name.
        name: String,
        /// Whether it refuses to be written.
        read_only: bool,
    },
    /// A process can write to it.
    Writer {
        /// The process.
        pid: i32,
        /// Its name.
        command: String,
        /// What it opened.
        path: PathBuf,
        /// Whether it has mapped it into memory, not (only) open.
        mapped: bool,
    },
}

impl User {
    /// Whether this user could change what is stored: all except read-only loop devices, and
    /// filesystems that are mounted read-only (whatever log there was, they replayed it when they were
    /// mounted).
    pub fn may_write(&self) -> bool {
        match self {
            Self::Loop { read_only, .. } => !read_only,
            Self::Mount { is_stopped, .. } | Self::Btrfs { is_stopped, .. } => !is_stopped,
            Self::Swap { .. } | Self::Holder { .. } | Self::Writer { .. } => true,
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount {
                point,
                read_only,
                elsewhere,
                ..
            } => {
                let mode = if *read_only { "ro" } else { "rw" };
                write!(f, "mounted at {} ({mode})", point.display())?;
                match elsewhere {
                    Some(pid) => write!(f, " in the mount namespace of process {pid}"),
                    None => Ok(()),
                }
            }
            Self::Swap { path } => write!(f, "swap space ({})", path.display()),
            Self::Btrfs { device, uuid, .. } => {
                write!(f, "{device} is held by the mounted btrfs filesystem {uuid}")
            }
            Self::Holder { device, by } => write!(f, "{device} is held by {by}"),
            Self::Loop {
                name, read_only, ..
            } => {
                let mode = if *read_only { ", read-only" } else { "" };
                write!(f, "attached to loop device {name}{mode}")
            }
            Self::Writer {
                pid,
                command,
                path,
                mapped,
            } => {
                let how = if *mapped { "mapped" } else { "open" };
                let path = path.display();
                write!(f, "process {pid} ({command}) has {path} {how} for writing")
            }
        }
    }
}
