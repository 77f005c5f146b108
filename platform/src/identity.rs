//! What tells machines and disks apart for people: names, models, serial numbers. Nothing here is proof of
//! anything.

use nix::sys::utsname::uname;

use crate::node::BlockDevice;
use crate::os;

/// The name of this machine.
pub fn host() -> Option<String> {
    let name = uname().ok()?.nodename().to_string_lossy().into_owned();
    (!name.is_empty()).then_some(name)
}

/// The id of this machine's system (`/etc/machine-id`), where it has one.
pub fn machine_id() -> Option<String> {
    os::identity::machine_id()
}

/// What a disk calls itself. Text is as the device has it: escape it before showing it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// Vendor and model; of a loop device the file behind it, of a mapped device its name.
    pub model: Option<String>,
    /// Serial number, else a worldwide id.
    pub serial: Option<String>,
}

/// What the disk that `device` is, or is on, calls itself; empty where the system does not say.
pub fn of_disk(device: &BlockDevice) -> Label {
    os::identity::of_disk(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_name() {
        assert!(host().is_some_and(|name| !name.contains('\0')));
        if let Some(id) = machine_id() {
            assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()));
        }
    }
}
