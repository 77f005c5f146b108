//! Real-time priority: left to the system.

use nix::errno::Errno;

/// Never granted: what must be in time on Linux, a frozen filesystem, does not exist here.
pub(crate) fn become_urgent(_priority: i32) -> Result<(), Errno> {
    Err(Errno::ENOTSUP)
}
