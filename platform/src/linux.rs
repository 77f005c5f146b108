//! What differs by system, on Linux.

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
pub(crate) mod node;
pub(crate) mod output;
pub(crate) mod private_mount;
pub(crate) mod privilege;
pub(crate) mod streaming;
pub(crate) mod urgent;

/// Where locks are: gone after a restart.
pub(crate) const LOCKS: &str = "/run/holdstill";

/// Where records are: still there after a restart.
pub(crate) const RECORDS: &str = "/var/lib/holdstill";
