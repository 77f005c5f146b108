//! A dataset of ZFS: its snapshot leaves as the stream of `zfs send`, and is kept as it is.

use holdstill_platform::command::Streaming;
use holdstill_platform::guard::Undo;
use holdstill_platform::stream::Reader;
use holdstill_platform::zfs::{self, Made};

use super::Makings;
use crate::error::{Error, Kind, Result};
use crate::freeze::Proof;
use crate::image::manifest::{Grade, ZfsSend};
use crate::progress::{Event, Progress};
use crate::run::Run;

/// A dataset whose snapshot is sent.
#[derive(Debug)]
pub struct Dataset {
    /// What has to be known to receive it.
    pub description: ZfsSend,
    instant: jiff::Timestamp,
    makings: Makings,
}

/// What the guard undoes should the run die.
///
/// # Errors
/// If the tools are missing.
pub fn undo(name: &str, run_id: &str) -> Result<Vec<Undo>> {
    let plan = plan(name, run_id);
    let undo = plan.iter().map(Made::to_undo);
    Ok(undo.collect::<std::result::Result<_, _>>()?)
}

fn plan(name: &str, run_id: &str) -> [Made; 2] {
    let snapshot = zfs::snapshot_name(name, run_id);
    [
        Made::Snapshot(snapshot.clone()),
        Made::Hold(snapshot, run_id.to_owned()),
    ]
}

impl Dataset {
    /// Makes a snapshot of a dataset.
    ///
    /// # Errors
    /// If ZFS fails.
    pub fn snapshot(name: &str, run: &Run, progress: &dyn Progress) -> Result<Self> {
        let snapshot = zfs::snapshot_name(name, run.id());
        run.before_freeze()?;
        run.note(|record| record.zfs_snapshots.push(snapshot.clone()))?;
        let mut makings = Makings::new(run);
        let mut instant = jiff::Timestamp::now();
        for made in plan(name, run.id()) {
            makings.make(made, |made| match made {
                Made::Hold(snapshot, run_id) => Ok(zfs::hold(snapshot, run_id)?),
                _ => {
                    let done = zfs::snapshot(name, run.id());
                    instant = jiff::Timestamp::now();
                    run.after_thaw(progress);
                    done.map_err(|error| Error::from(error).on(name))
                }
            })?;
        }
        progress.event(&Event::Frozen {
            instant: &instant.to_string(),
        });
        let facts = zfs::facts(&snapshot)?;
        Ok(Self {
            description: ZfsSend {
                dataset: name.to_owned(),
                snapshot,
                guid: facts.guid,
                size: facts.size,
                pool: facts.pool,
                pool_guid: facts.pool_guid,
                properties: facts.properties,
                features: facts.features,
                version: facts.version,
            },
            instant,
            makings,
        })
    }

    /// Starts to send it.
    ///
    /// # Errors
    /// If the tool cannot be started.
    pub fn send(&self) -> Result<(Streaming, Reader)> {
        Ok(zfs::send(&self.description.snapshot)?)
    }

    /// Proves what was sent, and lets go.
    ///
    /// # Errors
    /// If the tool failed: what it sent is not whole.
    pub fn finish(mut self, sent: Streaming, progress: &dyn Progress) -> Result<Proof> {
        sent.finish().map_err(|error| {
            let what = "the dataset could not be sent";
            Error::new(Kind::Tool, what)
                .on(&self.description.dataset)
                .because(error)
        })?;
        if let Err(error) = self.makings.undo() {
            progress.warn(&format!("the snapshot could not be removed: {error}"));
        }
        Ok(Proof {
            grade: Grade::Frozen,
            instant: self.instant,
            freezes: Vec::new(),
        })
    }
}
