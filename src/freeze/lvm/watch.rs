//! What of a snapshot of LVM is watched while it is read: how full it is, or its pool.

use std::path::PathBuf;

use holdstill_platform::dm::{self, Fill};
use holdstill_platform::lvm::{self, LogicalVolume, PoolFill, Snapshot};
use holdstill_platform::node::DeviceNumber;

use super::most_extents;
use crate::error::Result;
use crate::freeze::CowRoom;
use crate::freeze::watched::{self, percent};

/// A thick snapshot is extended when so full, and given up when so full and nothing is left to extend
/// it with; in percent.
const EXTEND_AT: u64 = 60;
const GIVE_UP_AT: u64 = 96;

/// A pool so full is given up: writers need what is left. In percent.
const MOST_DATA: u64 = 98;
const MOST_METADATA: u64 = 95;

/// What is watched.
#[derive(Clone, Debug)]
pub(super) enum Watching {
    /// The copy-on-write store of a thick snapshot.
    Thick {
        volume: LogicalVolume,
        snapshot: Snapshot,
        /// Extents to add each time; 0: the user said how much it gets.
        step: u64,
        /// Where to add them.
        on: Option<PathBuf>,
    },
    /// The pool of a thin one.
    Thin {
        snapshot: Snapshot,
        pool: DeviceNumber,
    },
    /// A thin one whose pool is not known: the kernel says so when it cannot be read.
    Nothing { snapshot: Snapshot },
}

impl Watching {
    pub(super) fn of(volume: &LogicalVolume, snapshot: &Snapshot, cow: &CowRoom) -> Result<Self> {
        let snapshot = snapshot.clone();
        if volume.kind == lvm::Kind::Thick {
            let step = match cow.size {
                Some(_) => 0,
                None => most_extents(volume).div_ceil(8),
            };
            return Ok(Self::Thick {
                volume: volume.clone(),
                snapshot,
                step,
                on: cow.device.clone(),
            });
        }
        Ok(match lvm::pool_of(snapshot.device)? {
            Some((pool, _)) => Self::Thin { snapshot, pool },
            None => Self::Nothing { snapshot },
        })
    }

    fn snapshot(&self) -> &Snapshot {
        match self {
            Self::Thick { snapshot, .. } | Self::Thin { snapshot, .. } => snapshot,
            Self::Nothing { snapshot } => snapshot,
        }
    }
}

impl watched::Watching for Watching {
    fn name(&self) -> &str {
        &self.snapshot().name
    }

    fn look(&self, may_extend: Option<&mut bool>) -> Result<Option<String>> {
        match self {
            Self::Nothing { .. } => Ok(None),
            Self::Thin { pool, .. } => thin_trouble(*pool),
            Self::Thick {
                volume,
                snapshot,
                step,
                on,
            } => {
                let full = match dm::fill(snapshot.device)? {
                    Fill::Used { sectors, of } => percent((sectors, of)),
                    Fill::Lost => {
                        return Ok(Some("it overflowed, and what it held is lost".to_owned()));
                    }
                };
                let Some(may_extend) = may_extend.filter(|_| full >= EXTEND_AT) else {
                    return Ok(None);
                };
                if *may_extend && *step > 0 {
                    let now = LogicalVolume::of_name(&volume.group, &volume.name)?;
                    let free = now.map_or(0, |now| now.free_extents);
                    let extended = match free.min(*step) {
                        0 => false,
                        extents => snapshot.extend(extents, on.as_deref()).is_ok(),
                    };
                    if extended {
                        return Ok(None);
                    }
                    *may_extend = false;
                }
                Ok((full >= GIVE_UP_AT)
                    .then(|| format!("it is {full} % full, and there is no room to extend it")))
            }
        }
    }
}

fn thin_trouble(pool: DeviceNumber) -> Result<Option<String>> {
    let PoolFill {
        data,
        metadata,
        is_writable,
        ..
    } = lvm::pool_fill(pool)?;
    Ok(if !is_writable {
        Some("its pool has no room left and takes no more writes".to_owned())
    } else if percent(data) >= MOST_DATA {
        Some(format!("{} % of its pool's data are in use", percent(data)))
    } else if percent(metadata) >= MOST_METADATA {
        Some(format!(
            "{} % of its pool's metadata are in use",
            percent(metadata)
        ))
    } else {
        None
    })
}
