//! Everything holdstill needs of one operating system, and every line of its `unsafe` code.
//!
//! The operating system is Linux: each module names the kernel interface it stands on. The crate
//! knows nothing of images, filesystem formats or the command line.

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
pub mod freeze;
pub mod fsmap;
pub mod guard;
pub mod in_use;
pub mod lock;
pub mod loop_device;
pub mod lvm;
pub mod memory;
pub mod mounts;
pub mod node;
pub mod open_files;
pub mod output;
mod private_mount;
pub mod records;
pub mod signals;
pub mod stack;
pub mod stream;
pub mod swap_file;
pub mod trace;
mod urgent;
pub mod zfs;

#[cfg(test)]
mod testing;
