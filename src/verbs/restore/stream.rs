//! A stream of `zfs send` back into a pool.
//!
//! ZFS takes a stream as a whole or not at all: its snapshot appears when the last record has come. That
//! record is held back until all of the image was checked, so that a damaged image leaves no dataset
//! that looks whole.

use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::{Mutex, PoisonError};

use holdstill_platform::command::Streaming;
use holdstill_platform::zfs;

use crate::error::{Error, Kind, Result};
use crate::image::manifest::{Manifest, StreamManifest, ZFS_SEND, ZfsSend};
use crate::pipeline::stream::InOrder;
use crate::progress::Progress;
use crate::units::Offset;

/// Begins the last part of the name under which a dataset is received before it is put in its place.
const ASIDE: &str = "holdstill-receive";

/// A stream of an image and the dataset it goes to.
#[derive(Clone, Debug)]
pub struct WantedStream {
    /// Its number in the image.
    pub n: u32,
    /// The dataset: `POOL/NAME`.
    pub target: String,
    /// The dataset it is received as: `target` itself, or one aside.
    received_as: String,
    /// What the image says of it.
    zfs: ZfsSend,
}

impl WantedStream {
    /// Finds out whether a stream can be received as the dataset `target`.
    ///
    /// # Errors
    /// [`Kind::Exists`] if there is such a dataset; [`Kind::NotApplicable`] for other kinds of streams.
    pub(super) fn examine(stream: &StreamManifest, target: &Path) -> Result<Self> {
        let zfs = match &stream.zfs {
            Some(zfs) if stream.kind == ZFS_SEND => zfs.clone(),
            _ => {
                return Err(Error::new(
                    Kind::NotApplicable,
                    format!(
                        "{} is a stream ({} of {}), which this version checks but does not restore",
                        stream.n, stream.kind, stream.path
                    ),
                ));
            }
        };
        let name = target.to_string_lossy();
        let target = name.strip_prefix("zfs:").unwrap_or(&name).to_owned();
        if zfs::exists(&target)? {
            return Err(Error::new(Kind::Exists, "this dataset exists already")
                .on(&target)
                .hint(format!(
                    "name a new one; zfs receive -A {target} takes back what an interrupted restore left"
                )));
        }
        Ok(Self {
            n: stream.n,
            received_as: target.clone(),
            target,
            zfs,
        })
    }

    /// Of datasets that go below one another none can be received before the one above is there, and that
    /// is only when all of the image was checked. They are received aside, side by side, and renamed.
    pub(super) fn keep_apart(streams: &mut [Self]) {
        let targets: Vec<String> = streams.iter().map(|stream| stream.target.clone()).collect();
        let is_below =
            |one: &str, other: &str| below(one, other).is_some_and(|rest| !rest.is_empty());
        let id = uuid::Uuid::new_v4().simple();
        for stream in streams {
            let own = stream.target.as_str();
            let related = targets
                .iter()
                .map(String::as_str)
                .filter(|other| is_below(own, other) || is_below(other, own));
            // The topmost of those that are related has the shortest name.
            let Some(other) = related.min_by_key(|name| name.len()) else {
                continue;
            };
            let top = if other.len() < own.len() { other } else { own };
            if let Some((above, _)) = top.rsplit_once('/') {
                stream.received_as = format!("{above}/{ASIDE}.{id}.{}", stream.n);
            }
        }
    }
}

/// What the name of a dataset has behind that of another: empty, or it begins with a slash. `None` if it
/// is not below it.
fn below<'a>(name: &'a str, other: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(other)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

/// The datasets of an image that holds one and what is below it, and where each goes if the first goes to
/// `root`; `None` if it holds something else.
pub(super) fn tree<'a>(
    manifest: &'a Manifest,
    root: &Path,
) -> Option<Vec<(&'a StreamManifest, PathBuf)>> {
    if !manifest.volumes.is_empty() || manifest.streams.len() < 2 {
        return None;
    }
    let top = &manifest.streams.first()?.zfs.as_ref()?.dataset;
    let place = |stream: &'a StreamManifest| {
        let rest = below(&stream.zfs.as_ref()?.dataset, top)?;
        let root = root.to_str()?;
        Some((stream, PathBuf::from(format!("{root}{rest}"))))
    };
    manifest.streams.iter().map(place).collect()
}

/// A dataset that was received whole. Dropped before it is in its place, it is destroyed.
#[derive(Debug)]
pub(super) struct Received {
    wanted: WantedStream,
    is_placed: bool,
}

/// Puts datasets in their places, what is above first.
///
/// # Errors
/// If one cannot be renamed.
pub(super) fn place(mut all: Vec<Received>) -> Result<()> {
    all.sort_by_key(|received| received.wanted.target.matches('/').count());
    for received in &mut all {
        let WantedStream {
            target,
            received_as,
            ..
        } = &received.wanted;
        if received_as != target {
            zfs::rename(received_as, target).map_err(|error| not_received(target, error))?;
        }
        received.is_placed = true;
    }
    Ok(())
}

impl Drop for Received {
    fn drop(&mut self) {
        // In its place already: only something else that was wanted failed.
        if self.is_placed || self.wanted.received_as == self.wanted.target {
            return;
        }
        if let Err(error) = zfs::destroy(&self.wanted.received_as) {
            log::warn!("{error}");
        }
    }
}

/// A stream that is being received. Dropped before its end, what came of it is taken back.
pub(super) struct Receiving<'a> {
    wanted: WantedStream,
    order: Option<InOrder<ChildStdin>>,
    tool: Mutex<Option<Streaming>>,
    progress: &'a dyn Progress,
}

impl<'a> Receiving<'a> {
    /// Starts to receive.
    ///
    /// # Errors
    /// If the tool cannot be started.
    pub(super) fn start(wanted: &WantedStream, progress: &'a dyn Progress) -> Result<Self> {
        let (tool, stdin) = zfs::receive(&wanted.received_as)?;
        Ok(Self {
            wanted: wanted.clone(),
            order: Some(InOrder::new(stdin)),
            tool: Mutex::new(Some(tool)),
            progress,
        })
    }

    /// The stream's number.
    pub(super) fn number(&self) -> u32 {
        self.wanted.n
    }

    /// Nothing more will come: whoever waits for what is missing gives up.
    pub(super) fn abandon(&self) {
        if let Some(order) = &self.order {
            order.abandon();
        }
    }

    /// Takes a chunk.
    ///
    /// # Errors
    /// Why the tool does not take it.
    pub(super) fn push(&self, offset: Offset, bytes: &[u8]) -> Result<()> {
        let pushed = match &self.order {
            Some(order) => order.push(offset, bytes, self.progress),
            None => Ok(()),
        };
        pushed.map_err(|error| self.explain(error))
    }

    /// Of a tool that hung up, what it said is the reason.
    fn explain(&self, error: Error) -> Error {
        if error.kind() != Kind::BrokenPipe {
            return error;
        }
        let tool = self
            .tool
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match tool.map(Streaming::finish) {
            Some(Err(said)) => not_received(&self.wanted.target, said),
            _ => error,
        }
    }

    /// Gives the tool the end of the stream, and makes sure that the snapshot is what it was.
    ///
    /// # Errors
    /// If the tool failed; [`Kind::Mismatch`] if what it made is something else.
    pub(super) fn finish(mut self) -> Result<Received> {
        if let Some(order) = self.order.take() {
            let stdin = order.finish().map_err(|error| self.explain(error))?;
            drop(stdin);
        }
        let tool = self.tool.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(tool) = tool.take() {
            let target = &self.wanted.target;
            tool.finish().map_err(|error| not_received(target, error))?;
        }
        let done = Received {
            wanted: self.wanted.clone(),
            is_placed: false,
        };
        let ZfsSend { snapshot, guid, .. } = &self.wanted.zfs;
        let (_, name) = snapshot.split_once('@').unwrap_or_default();
        let received = format!("{}@{name}", self.wanted.received_as);
        let found = zfs::guid(&received)?;
        if found != *guid {
            return Err(Error::new(
                Kind::Mismatch,
                format!("its guid is {found}, and that of what was sent is {guid}"),
            )
            .on(received));
        }
        Ok(done)
    }
}

fn not_received(target: &str, why: holdstill_platform::error::Error) -> Error {
    Error::new(Kind::Tool, "the dataset could not be received")
        .on(target)
        .because(why)
}

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        let Some(order) = self.order.take() else {
            return;
        };
        drop(order);
        let tool = self.tool.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Killed first: it would else wait for more.
        drop(tool.take());
        if let Err(error) = zfs::abort_receive(&self.wanted.received_as) {
            log::debug!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn stream(n: u32, dataset: &str) -> StreamManifest {
        StreamManifest {
            n,
            path: dataset.to_owned(),
            kind: ZFS_SEND.to_owned(),
            zfs: Some(ZfsSend {
                dataset: dataset.to_owned(),
                snapshot: format!("{dataset}@s"),
                guid: String::new(),
                size: 0,
                pool: String::new(),
                pool_guid: String::new(),
                properties: BTreeMap::new(),
                features: Vec::new(),
                version: String::new(),
            }),
        }
    }

    fn image(datasets: &[&str]) -> Manifest {
        Manifest {
            tool: String::new(),
            created: String::new(),
            run_id: String::new(),
            compress: String::new(),
            parent: None,
            host: None,
            machine_id: None,
            volumes: Vec::new(),
            streams: (1..)
                .zip(datasets)
                .map(|(n, dataset)| stream(n, dataset))
                .collect(),
        }
    }

    #[test]
    fn a_tree_goes_below_its_target() {
        let places = |datasets: &[&str]| {
            let image = image(datasets);
            let tree = tree(&image, Path::new("pool/new"))?;
            let targets = tree.into_iter().map(|(_, to)| to.display().to_string());
            Some(targets.collect::<Vec<_>>())
        };
        assert_eq!(
            places(&["tank/a", "tank/a/b", "tank/a/b/c"]).unwrap(),
            ["pool/new", "pool/new/b", "pool/new/b/c"]
        );
        assert_eq!(places(&["tank/a"]), None);
        assert_eq!(places(&["tank/a", "tank/ab"]), None);
        assert_eq!(places(&["tank/a/b", "tank/a"]), None);
    }

    #[test]
    fn only_what_goes_below_one_another_is_received_aside() {
        let wanted = |n: u32, target: &str| WantedStream {
            n,
            target: target.to_owned(),
            received_as: target.to_owned(),
            zfs: stream(n, "tank/x").zfs.unwrap(),
        };
        let targets = ["p/a", "p/a/b/c", "p/ab", "p/q/r", "p/a/b"];
        let mut all: Vec<_> = (1..).zip(targets).map(|(n, to)| wanted(n, to)).collect();
        WantedStream::keep_apart(&mut all);
        let aside: Vec<bool> = all
            .iter()
            .map(|stream| stream.received_as.starts_with("p/holdstill-receive."))
            .collect();
        assert_eq!(aside, [true, true, false, false, true]);
        assert_eq!(all[2].received_as, "p/ab");
        assert_eq!(all[3].received_as, "p/q/r");
    }
}
