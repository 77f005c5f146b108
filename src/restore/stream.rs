//! A stream of `zfs send` back into a pool.
//!
//! ZFS takes a stream as a whole or not at all: its snapshot appears when the last record has come. That
//! record is held back until all of the image was checked, so that a damaged image leaves no dataset
//! that looks whole.

use std::path::Path;
use std::process::ChildStdin;
use std::sync::{Mutex, PoisonError};

use holdstill_platform::command::Streaming;
use holdstill_platform::zfs;

use crate::error::{Error, Kind, Result};
use crate::image::manifest::{StreamManifest, ZFS_SEND, ZfsSend};
use crate::pipeline::stream::InOrder;
use crate::progress::Progress;
use crate::units::Offset;

/// A stream of an image and the dataset it goes to.
#[derive(Clone, Debug)]
pub struct WantedStream {
    /// Its number in the image.
    pub n: u32,
    /// The dataset: `POOL/NAME`.
    pub target: String,
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
            target,
            zfs,
        })
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
        let (tool, stdin) = zfs::receive(&wanted.target)?;
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
    pub(super) fn finish(mut self) -> Result<()> {
        if let Some(order) = self.order.take() {
            let stdin = order.finish().map_err(|error| self.explain(error))?;
            drop(stdin);
        }
        let tool = self.tool.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(tool) = tool.take() {
            let target = &self.wanted.target;
            tool.finish().map_err(|error| not_received(target, error))?;
        }
        let ZfsSend { snapshot, guid, .. } = &self.wanted.zfs;
        let (_, name) = snapshot.split_once('@').unwrap_or_default();
        let received = format!("{}@{name}", self.wanted.target);
        let found = zfs::guid(&received)?;
        if found != *guid {
            return Err(Error::new(
                Kind::Mismatch,
                format!("its guid is {found}, and that of what was sent is {guid}"),
            )
            .on(received));
        }
        Ok(())
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
        if let Err(error) = zfs::abort_receive(&self.wanted.target) {
            log::debug!("{error}");
        }
    }
}
