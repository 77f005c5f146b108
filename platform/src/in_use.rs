//! Who uses a device or a file: mounts, swap, devices built on top, loop devices, processes that
//! can write to it.
//!
//! Opening a device exclusively does not tell: on Linux that succeeds beside a process that has it open
//! for writing, and beside another loop device over the same file. So everything the kernel shows is
//! searched, and the culprit is named. What it cannot show (a process of another user, a mount namespace
//! without a process) is counted or missed: this search finds reasons to refuse, never proof that
//! nobody writes.

mod user;

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::node::{BlockDevice, DeviceNumber, FileId};
use crate::os;
pub use user::User;

/// What a search found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// The users.
    pub users: Vec<User>,
    /// How many processes could not be looked at, for want of privilege.
    pub hidden_processes: usize,
}

/// Searches for the users of a block device: of itself, of the disk it is a partition of, of all
/// partitions if it is a whole disk, and of what lies below it (the file of a loop device, the
/// members of a dm or md device). This process and those in `ignore` are left out.
///
/// # Errors
/// If the kernel cannot be asked, or the device vanished.
pub fn of_device(device: &BlockDevice, ignore: &[i32]) -> Result<Users> {
    os::in_use::of_device(device, ignore)
}

/// Searches for the users of a regular file, in the same way.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn of_file(file: FileId, ignore: &[i32]) -> Result<Users> {
    os::in_use::of_file(file, ignore)
}

/// Whether a process other than this one has a regular file open, if only for reading, or mapped.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn is_open_elsewhere(file: FileId) -> Result<bool> {
    os::in_use::is_open_elsewhere(file)
}

/// An area of swap space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// By this name.
    pub path: PathBuf,
    /// On this device.
    pub device: Option<DeviceNumber>,
    /// In this file.
    pub file: Option<FileId>,
}

/// The swap space in use (`/proc/swaps`, proc_swaps(5)).
///
/// # Errors
/// If /proc cannot be read. A kernel without swap has none; macOS has it in files that nobody names.
pub fn swaps() -> Result<Vec<Swap>> {
    os::in_use::swaps()
}

/// Whether the btrfs of this UUID is mounted, wherever, as `/sys/fs/btrfs` says.
pub fn is_mounted_btrfs(uuid: &str) -> bool {
    // The text may come from an image: it must not lead out of the folder.
    let is_name = uuid.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    is_name && !uuid.is_empty() && Path::new("/sys/fs/btrfs").join(uuid).exists()
}
