//! Whether the kernel counts what is written.

use crate::counters::Counters;
use crate::device::Geometry;
use crate::error::Result;
use crate::node::{BlockDevice, read_number};

/// See [`crate::counters::NOT_KEPT`].
pub(crate) const NOT_KEPT: &str = "the kernel does not count writes to this device (queue/iostats is off): a \
     writer would go unnoticed";

/// Whether reads are counted as well.
pub(crate) const COUNTS_READS: bool = true;

/// See [`crate::counters::are_kept`].
pub(crate) fn are_kept(device: &BlockDevice) -> Result<bool> {
    let value: u32 = read_number(&device.disk_sysfs().join("queue/iostats"))?;
    Ok(value != 0)
}

/// See [`crate::counters::of_open`].
pub(crate) fn of_open(device: &BlockDevice, _: &Geometry) -> Result<Option<Counters>> {
    match are_kept(device)? {
        true => Counters::of(device.number).map(Some),
        false => Ok(None),
    }
}
