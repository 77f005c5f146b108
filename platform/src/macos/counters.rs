//! Whether the kernel counts what is written.

use crate::error::Result;
use crate::node::BlockDevice;

/// See [`crate::counters::NOT_KEPT`].
pub(crate) const NOT_KEPT: &str = "nothing counts the writes to this device: a writer that got past the exclusive open \
     would go unnoticed";

/// See [`crate::counters::are_kept`]. I/O Kit counts the writes of a driver, but not its discards, and tells
/// them through a tool alone.
pub(crate) fn are_kept(_: &BlockDevice) -> Result<bool> {
    Ok(false)
}
