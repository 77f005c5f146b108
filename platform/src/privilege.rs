//! What this process may do.

use crate::os;

/// Whether it runs as root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Capabilities that the work needs and that this process does not have: root in a container often lacks
/// some. Empty where that cannot be told.
pub fn missing() -> Vec<&'static str> {
    os::privilege::missing()
}
