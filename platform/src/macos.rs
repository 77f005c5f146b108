//! What differs by system, on macOS. Facts are those of XNU (bsd/sys/disk.h, bsd/miscfs/specfs,
//! bsd/kern/proc_info.c) and of IOStorageFamily (IOMediaBSDClient.cpp, IOMedia.cpp).

use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

pub(crate) mod close_watch;
pub(crate) mod counters;
pub(crate) mod device;
pub(crate) mod exclusive;
pub(crate) mod guard;
pub(crate) mod identity;
pub(crate) mod in_use;
pub(crate) mod linux_only;
pub(crate) mod located;
pub(crate) mod memory;
pub(crate) mod mounts;
mod names;
pub(crate) mod node;
pub(crate) mod output;
pub(crate) mod private_mount;
pub(crate) mod privilege;
mod processes;
mod sectors;
pub(crate) mod streaming;
pub(crate) mod urgent;

/// Where locks are: gone after a restart.
pub(crate) const LOCKS: &str = "/var/run/holdstill";

/// Where records are: still there after a restart.
pub(crate) const RECORDS: &str = "/var/db/holdstill";

/// Keeps a descriptor from programs that are started later.
fn close_on_exec(file: impl AsFd) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map(drop)
}
