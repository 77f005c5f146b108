//! A dataset of ZFS, alone or with all below it: the snapshot of each leaves as the stream of `zfs send`,
//! and is kept as it is.

use std::fmt;

use holdstill_platform::command::Streaming;
use holdstill_platform::guard::Undo;
use holdstill_platform::stream::Reader;
use holdstill_platform::zfs::{self, Made, Reach};

use super::Makings;
use crate::error::{Error, Kind, Result};
use crate::freeze::Proof;
use crate::freeze::session::Session;
use crate::image::manifest::{Grade, ZfsSend};
use crate::progress::{Event, Progress};

/// A dataset to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// `POOL/NAME`.
    pub name: String,
    /// Whether all below goes, too.
    pub reach: Reach,
}

/// One line for people.
impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let below = match self.reach {
            Reach::Alone => "",
            Reach::Below => " and all below",
        };
        write!(f, "{}{below}: zfs, as a stream", self.name)
    }
}

/// Snapshots of one instant that are sent.
#[derive(Debug)]
pub struct Datasets {
    /// What has to be known to receive each, what is above first.
    pub descriptions: Vec<ZfsSend>,
    instant: jiff::Timestamp,
    makings: Makings,
}

/// What the guard undoes should the run die.
///
/// # Errors
/// If the tools are missing.
pub fn undo(wanted: &Wanted, run_id: &str) -> Result<Vec<Undo>> {
    let plan = plan(wanted, run_id);
    let undo = plan.iter().map(Made::to_undo);
    Ok(undo.collect::<std::result::Result<_, _>>()?)
}

fn plan(wanted: &Wanted, run_id: &str) -> [Made; 2] {
    let snapshot = zfs::snapshot_name(&wanted.name, run_id);
    [
        Made::Snapshot(snapshot.clone(), wanted.reach),
        Made::Hold(snapshot, run_id.to_owned(), wanted.reach),
    ]
}

impl Datasets {
    /// Makes the snapshots, all at one instant.
    ///
    /// # Errors
    /// If ZFS fails.
    pub fn snapshot(wanted: &Wanted, run: &Session, progress: &dyn Progress) -> Result<Self> {
        let Wanted { name, reach } = wanted;
        let snapshot = zfs::snapshot_name(name, run.id());
        run.before_freeze(progress)?;
        run.note(|record| record.zfs_snapshots.push(snapshot.clone()))?;
        let mut makings = Makings::new(run);
        let mut instant = jiff::Timestamp::now();
        for made in plan(wanted, run.id()) {
            makings.make(made, |made| match made {
                Made::Hold(snapshot, run_id, reach) => Ok(zfs::hold(snapshot, run_id, *reach)?),
                _ => {
                    let done = zfs::snapshot(name, run.id(), *reach);
                    instant = jiff::Timestamp::now();
                    run.after_thaw(progress);
                    done.map_err(|error| Error::from(error).on(name))
                }
            })?;
        }
        progress.event(&Event::Frozen {
            instant: &instant.to_string(),
        });
        let snapshots = match reach {
            Reach::Alone => vec![snapshot],
            Reach::Below => zfs::with_below(&snapshot)?,
        };
        let descriptions = snapshots.into_iter().map(describe);
        Ok(Self {
            descriptions: descriptions.collect::<Result<_>>()?,
            instant,
            makings,
        })
    }

    /// Starts to send one of them.
    ///
    /// # Errors
    /// If the tool cannot be started.
    pub fn send(description: &ZfsSend) -> Result<(Streaming, Reader)> {
        Ok(zfs::send(&description.snapshot)?)
    }

    /// Proves that one was sent. Of a volume nobody froze what is mounted on it.
    ///
    /// # Errors
    /// If the tool failed: what it sent is not whole.
    pub fn sent(&self, description: &ZfsSend, sent: Streaming) -> Result<Proof> {
        sent.finish().map_err(|error| {
            let what = "the dataset could not be sent";
            Error::new(Kind::Tool, what)
                .on(&description.dataset)
                .because(error)
        })?;
        Ok(Proof {
            grade: match is_volume(description) {
                true => Grade::Crash,
                false => Grade::Frozen,
            },
            instant: self.instant,
            freezes: Vec::new(),
            commit: None,
        })
    }

    /// What the user should know of what will be sent.
    pub fn warnings(&self) -> Vec<String> {
        let volumes = self.descriptions.iter().filter(|sent| is_volume(sent));
        let warn = |sent: &ZfsSend| {
            format!(
                "{} is a volume: its copy is as after a power cut; name it by itself to have what is \
                 mounted on it frozen",
                sent.dataset
            )
        };
        volumes.map(warn).collect()
    }

    /// Lets go.
    pub fn finish(mut self, progress: &dyn Progress) {
        if let Err(error) = self.makings.undo() {
            progress.warn(&format!("the snapshot could not be removed: {error}"));
        }
    }
}

fn is_volume(description: &ZfsSend) -> bool {
    description
        .properties
        .get("type")
        .is_some_and(|kind| kind == "volume")
}

fn describe(snapshot: String) -> Result<ZfsSend> {
    let facts = zfs::facts(&snapshot)?;
    let dataset = snapshot.split('@').next().unwrap_or_default();
    Ok(ZfsSend {
        dataset: dataset.to_owned(),
        snapshot,
        guid: facts.guid,
        size: facts.size,
        pool: facts.pool,
        pool_guid: facts.pool_guid,
        properties: facts.properties,
        features: facts.features,
        version: facts.version,
    })
}
