//! Whether the kernel counts what is written.

use crate::error::Result;
use crate::node::{BlockDevice, read_number};

/// See [`crate::counters::NOT_KEPT`].
pub(crate) const NOT_KEPT: &str = "the kernel does not count writes to this device (queue/iostats is off): a \
     writer would go unnoticed";

/// See [`crate::counters::are_kept`].
pub(crate) fn are_kept(device: &BlockDevice) -> Result<bool> {
    let value: u32 = read_number(&device.disk_sysfs().join("queue/iostats"))?;
    Ok(value != 0)
}
