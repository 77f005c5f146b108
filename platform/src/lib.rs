//! Everything holdstill needs of one operating system, and every line of its `unsafe` code.
//!
//! Each module names the kernel interface it stands on. The crate knows nothing of images, filesystem
//! formats or the command line.
//!
//! Modules that mean something on Linux and on macOS take what differs from `os`: one folder for each
//! system, with the same names in it. Modules of what Linux alone has (LVM, btrfs, traces, ...) are the
//! same everywhere: elsewhere they find nothing, because the files they ask are not there, and the few
//! system calls that are not either are in `os::linux_only`.

pub mod apple;
pub mod beneath;
pub mod btrfs;
pub mod buffer;
pub mod command;
pub mod counters;
pub mod cow_store;
pub mod device;
pub mod dirty;
pub mod dm;
pub mod error;
pub mod exclusive;
pub mod extents_below;
pub mod freeze;
pub mod fsmap;
pub mod guard;
pub mod identity;
pub mod in_use;
pub mod located;
pub mod lock;
pub mod loop_claims;
pub mod loop_device;
pub mod lvm;
pub mod memory;
pub mod mounts;
pub mod node;
pub mod open_files;
pub mod output;
pub mod privilege;
pub mod records;
pub mod room;
pub mod signals;
pub mod stack;
pub mod stream;
pub mod swap_file;
pub mod trace;
pub mod witness;
pub mod zfs;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

#[cfg(target_os = "linux")]
use linux as os;
#[cfg(target_os = "macos")]
use macos as os;

use os::{private_mount, urgent};

// What of macOS calls no kernel is tested everywhere.
#[cfg(all(test, target_os = "linux"))]
#[path = "macos/names.rs"]
mod macos_names;
#[cfg(all(test, target_os = "linux"))]
#[path = "macos/sectors.rs"]
mod macos_sectors;

#[cfg(test)]
mod testing;
