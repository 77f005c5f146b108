//! What is written to a disk: I/O Kit's drivers count it, and a tool tells (see [`crate::apple`]).

use super::names::disk_of;
use crate::apple::{System, Written};
use crate::counters::{Counters, Moved};
use crate::device::Geometry;
use crate::error::Result;
use crate::node::BlockDevice;

/// See [`crate::counters::NOT_KEPT`].
pub(crate) const NOT_KEPT: &str = "nothing counts the writes to this disk: a writer would go unnoticed (of an APFS \
     container, name the partition it lies on)";

/// Whether reads are counted as well.
pub(crate) const COUNTS_READS: bool = false;

/// See [`crate::counters::are_kept`]: not in the way that a trace could be compared with.
pub(crate) fn are_kept(_: &BlockDevice) -> Result<bool> {
    Ok(false)
}

/// See [`crate::counters::of_open`]. The device is not opened: it may be claimed. Discards are not counted;
/// whoever makes some, and writes nothing, had to have it open for writing before.
pub(crate) fn of_open(device: &BlockDevice, geometry: &Geometry) -> Result<Option<Counters>> {
    if geometry.read_only {
        // Nobody can write to it.
        return Ok(Some(Counters::default()));
    }
    let all = System::this().written()?;
    let whole = disk_of(&device.name).and_then(|whole| all.get(whole));
    Ok(whole.map(|Written { operations, bytes }| Counters {
        writes: Moved {
            requests: *operations,
            sectors: bytes.div_ceil(512),
        },
        ..Counters::default()
    }))
}
