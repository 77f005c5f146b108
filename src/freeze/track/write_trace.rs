//! The trace of what is written to a source, and the proof that it missed nothing.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdstill_platform::dirty::DirtyMap;
use holdstill_platform::guard::{Leftover, LeftoverKind};
use holdstill_platform::node::BlockDevice;
use holdstill_platform::stack::Stack;
use holdstill_platform::trace::{Balance, Options, TraceError, Tracefs, Tracker, instance_name};

use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::progress::Progress;
use crate::source::Source;

/// How long the reader of the trace may take to catch up.
pub(super) const CATCH_UP: Duration = Duration::from_secs(5);

/// How long the source may take to pause, outside and inside a freeze, so that its counters can be
/// compared with the trace. Frozen, it pauses at once, but for what is not its filesystem's.
const PAUSE: Duration = Duration::from_secs(10);
const PAUSE_FROZEN: Duration = Duration::from_millis(20);

/// Kernel memory for the trace: of all processors together at most, and of each at least, in KiB.
const MOST_TRACE_KIB: u32 = 128 << 10;
const LEAST_TRACE_KIB: u32 = 1 << 10;

/// Between the id of a run and the number of its trace instance, from the second on.
pub(crate) const NUMBER: char = ':';

/// A balance taken in a freeze; it may have found no pause there.
pub(super) type InFreeze = std::result::Result<Balance, TraceError>;

/// Marks every block of a source that is written to.
#[derive(Debug)]
pub(super) struct WriteTrace {
    // Taken down before the guard is told to forget it.
    tracker: Tracker,
    leftover: Option<Leftover>,
    source: PathBuf,
    stale: Arc<DirtyMap>,
    /// The device, and what it was built of when the trace began; `None` for a disk or partition.
    layers: Option<(BlockDevice, Arc<Stack>)>,
    /// What the trace has to agree with at the end; known since the first freeze.
    balance: Option<Balance>,
    /// So many sectors at either end are beyond proof.
    border: u64,
}

impl WriteTrace {
    /// Begins to mark in `stale` what is written to the source, a device or partition.
    ///
    /// # Errors
    /// If its disks cannot be traced.
    pub(super) fn begin(
        source: &Source,
        device: &BlockDevice,
        run: &Session,
        stale: &Arc<DirtyMap>,
    ) -> Result<Self> {
        // The sources of one run have an instance each.
        let mut id = run.id().to_owned();
        run.note(|record| {
            let others = record.trace_instances.len();
            if others > 0 {
                id = format!("{id}{NUMBER}{others}");
            }
            record.trace_instances.push(instance_name(&id));
        })?;
        let name = instance_name(&id);
        let tracefs = Tracefs::open()?;
        let leftover = run.register(tracefs.instances(), &name, LeftoverKind::Folder)?;
        let layers = match device.is_request_based() {
            true => None,
            false => Some((device.clone(), Arc::new(layers_of(source, device)?))),
        };
        let mut options = match &layers {
            None => Options::new(vec![device.number]),
            Some((_, stack)) => Options::of_stack(Arc::clone(stack)),
        };
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let share = MOST_TRACE_KIB / u32::try_from(processors).unwrap_or(u32::MAX);
        options.buffer_kib = options.buffer_kib.min(share.max(LEAST_TRACE_KIB));
        let marks = Arc::clone(stale);
        let tracker = Tracker::start(tracefs, &id, &options, move |write| {
            marks.mark(write.sector, write.sectors);
        })?;
        Ok(Self {
            tracker,
            leftover,
            source: source.path.clone(),
            stale: Arc::clone(stale),
            balance: None,
            border: match &layers {
                None => border(device)?,
                Some(_) => 0,
            },
            layers,
        })
    }

    /// Returns once all that was complete before is marked. Allocates nothing.
    pub(super) fn catch_up(&self) -> std::result::Result<(), TraceError> {
        self.tracker.drain(CATCH_UP)
    }

    /// The balance in a freeze. Allocates nothing.
    pub(super) fn balance_frozen(&self) -> InFreeze {
        self.tracker.balance(PAUSE_FROZEN)
    }

    /// Proves from here on, as nothing was copied before.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if the source never pauses; [`Kind::NotApplicable`] if it counts nothing.
    pub(super) fn prove_from(&mut self, in_freeze: InFreeze) -> Result<()> {
        self.balance = Some(self.or_later(in_freeze)?);
        // The freeze has written something.
        let counts_nothing = self.tracker.counts_nothing();
        if counts_nothing.map_err(|error| self.untrusted(&error.into()))? {
            return Err(Error::new(
                Kind::NotApplicable,
                "the kernel does not count what is written to it (queue/iostats is off)",
            )
            .on(&self.source)
            .hint("write 1 to queue/iostats of the device in sysfs, and try again"));
        }
        Ok(())
    }

    /// Marks what no sum of sectors proves: whoever copies it does so in the last freeze.
    ///
    /// # Errors
    /// If the device cannot be examined.
    pub(super) fn mark_borders(&mut self, device: &BlockDevice) -> Result<()> {
        if self.layers.is_some() {
            // Bios are added up there, which are for one device each: no border is beyond proof.
            return Ok(());
        }
        // It may have grown since the run began.
        self.border = self.border.max(border(device)?);
        let border = self.border.min(device.sectors);
        self.stale.mark(0, border);
        self.stale.mark(device.sectors - border, border);
        Ok(())
    }

    /// Proves that no write was missed.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if that cannot be proven.
    pub(super) fn prove(&self, in_freeze: InFreeze) -> Result<()> {
        self.check_layers()?;
        let balance = self.or_later(in_freeze)?;
        let before = self
            .balance
            .ok_or_else(|| self.untrusted(&TraceError::NoQuiet))?;
        if balance != before {
            let missed = balance.missed_since(&before);
            return Err(Error::new(
                Kind::Inconsistent,
                format!("the disk counted {missed} sectors more than were traced: writes may have been missed"),
            )
            .on(&self.source)
            .hint("the copy was discarded; try again, or image it offline"));
        }
        let whole = self.tracker.check();
        whole.map_err(|error| self.untrusted(&error))
    }

    /// Checks that the source is still built as it was when the trace began: else marks were made in
    /// the wrong places.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if it is not.
    pub(super) fn check_layers(&self) -> Result<()> {
        let Some((device, before)) = &self.layers else {
            return Ok(());
        };
        let changed = Error::new(Kind::Inconsistent, "its layout changed while it was copied")
            .on(&self.source)
            .hint("the copy was discarded; try again");
        match Stack::of(device) {
            Ok(now) if now.signature() == before.signature() => Ok(()),
            Ok(_) => Err(changed),
            Err(why) => Err(changed.because(why)),
        }
    }

    /// A balance that was taken in a freeze; without a pause in there, one of now.
    fn or_later(&self, in_freeze: InFreeze) -> Result<Balance> {
        let balance = match in_freeze {
            Err(TraceError::NoQuiet) => self.tracker.balance(PAUSE),
            other => other,
        };
        balance.map_err(|error| self.untrusted(&error))
    }

    /// The error of a trace that failed.
    pub(super) fn untrusted(&self, error: &TraceError) -> Error {
        Error::new(Kind::Inconsistent, "the trace of writes cannot be trusted")
            .on(&self.source)
            .because(error.to_string())
            .hint("the copy was discarded; try again, or image it offline")
    }

    /// Ends the trace.
    ///
    /// # Errors
    /// If it cannot be taken down.
    pub(super) fn end(self, run: &Session, progress: &dyn Progress) -> Result<()> {
        let tally = self.tracker.stop()?;
        if tally.passthrough > 0 {
            progress.warn(&format!(
                "{} commands went to the disk past the block layer (SMART queries do): what they \
                 wrote, if anything, could not be tracked",
                tally.passthrough
            ));
        }
        run.forget(self.leftover);
        Ok(())
    }
}

/// What a source is built of.
fn layers_of(source: &Source, device: &BlockDevice) -> Result<Stack> {
    Stack::of(device).map_err(|why| {
        Error::new(Kind::NotApplicable, "its writes cannot be tracked")
            .on(&source.path)
            .because(why)
    })
}

/// How far from its ends a write to a partition may be merged with one to its neighbour, in sectors.
fn border(device: &BlockDevice) -> Result<u64> {
    if device.is_whole_disk() {
        return Ok(0);
    }
    Ok(device.longest_request()?)
}
