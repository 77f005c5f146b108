//! Names of machines and disks: no file of macOS has them, only its tools.

use crate::identity::Label;
use crate::node::BlockDevice;

/// See [`crate::identity::machine_id`].
pub(crate) fn machine_id() -> Option<String> {
    None
}

/// See [`crate::identity::of_disk`].
pub(crate) fn of_disk(_: &BlockDevice) -> Label {
    Label::default()
}
