//! The blocks of a thin volume that do not exist need not be read: they are zeros.

use holdstill_platform::device::Disk;
use holdstill_platform::lvm::{self, MetadataSnapshot, ThinMap};
use holdstill_platform::node::DeviceNumber;

use crate::error::Result;
use crate::extent::{Extent, ExtentSet};
use crate::freeze::session::Session;
use crate::freeze::survey::Survey;
use crate::units::SECTOR;

/// Leaves out of a survey what the pool of a thin snapshot has no blocks for. Where that cannot be told,
/// everything is read, and a warning says why.
pub(super) fn leave_out_the_rest(
    survey: &mut Survey,
    disk: &Disk,
    snapshot: DeviceNumber,
    run: &Session,
) {
    let left_out = map(snapshot, run).and_then(|map| match map {
        Some(map) => survey.leave_out_all_but(to_set(&map), disk),
        None => Ok(()),
    });
    if let Err(error) = left_out {
        let warning = format!("the blocks that the pool does not hold are read, too: {error}");
        survey.warnings.push(warning);
    }
}

fn to_set(map: &ThinMap) -> ExtentSet {
    let mut set = ExtentSet::new();
    for &(start, sectors) in &map.ranges {
        set.insert(Extent::new(start * SECTOR, sectors * SECTOR));
    }
    set
}

/// The map of a thin snapshot; `None` if it is no such thing, or its map is not understood.
fn map(snapshot: DeviceNumber, run: &Session) -> Result<Option<ThinMap>> {
    let Some((pool, id)) = lvm::pool_of(snapshot)? else {
        return Ok(None);
    };
    let Some(name) = MetadataSnapshot::name(pool) else {
        return Ok(None);
    };
    // Somebody else's must not be released by our guard.
    if lvm::pool_fill(pool)?.has_metadata_snapshot {
        return Ok(None);
    }
    run.note(|record| record.thin_pools.push(name.clone()))?;
    let owed = run.owe_undo(&name)?;
    let made = MetadataSnapshot::make(pool);
    let map = match &made {
        Ok(Some(made)) => made.map(id),
        _ => Ok(None),
    };
    drop(made?);
    run.undone(owed);
    run.note(|record| record.thin_pools.retain(|pool| *pool != name))?;
    Ok(map?)
}
