//! Tracking every write to a disk: the event `block:block_rq_complete` in a private instance of
//! tracefs (Documentation/trace/ftrace.rst).
//!
//! A completed request is traced before the filesystem learns of its completion, so a mark made
//! from the trace always comes after the write took effect: whoever clears the mark and then reads
//! the block either reads the new content or finds the mark again. And when FIFREEZE has returned,
//! every write of the filesystem is in the trace.
//!
//! The whole disk is traced, for requests of neighbouring partitions are merged across their
//! border. Reads are left out by a filter of the kernel's. Nothing lost goes unnoticed: overruns and
//! drops are counted by the ring buffer, and the sectors traced between two quiet moments must be
//! those that the device's own counters counted ([`Tracker::balance`]).
//!
//! # Why equal sums prove that nothing was lost
//! A partition is compared with its own counters, so its neighbours may be as busy as they like: it
//! is quiet when its own filesystem is frozen. The kernel counts a request of bios whole for the
//! partition that the first of them was for, after it has traced the request and before it tells
//! whoever sent it (`blk_update_request` of block/blk-core.c). We add up the traced requests that lie
//! within the partition. Between two balances therefore
//!
//! counted = added up + lost + merged,
//!
//! where *lost* are the sectors of requests of the partition that are missing in the trace, and
//! *merged* those of requests that reach across its border and were counted for it. Neither is ever
//! negative, so equality proves both to be none. A request that reaches across the border and was
//! counted for the neighbour is in neither sum: had it been lost, nobody would know. It is no longer
//! than the longest request of the disk, so it lies within that distance of the border:
//! [`BlockDevice::longest_request`] at either end of a partition is beyond proof, and whoever copies
//! the partition must not rely on the trace there. A whole disk has no such border.
//!
//! Two things could make equal what is not, each only together with a loss of exactly the same size.
//! A write to the partition through the disk's own node is added up and not counted: see to it that
//! there is no such writer. A request that was traced and not yet counted when the last balance is
//! taken: of a frozen filesystem there is none, as it knows of the completion of all it wrote; for
//! others (swap space) a balance is taken only where it stays the same for a while.

mod format;
mod page;
mod reader;
mod tracefs;

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fstat, fstatat, mkdirat};

use crate::counters::{self, CounterFile};
use crate::error::{Context, Error, Result};
use crate::node::{BlockDevice, DeviceNumber};
use format::{EventFormat, PageFormat};
use reader::{DeviceTally, Reader, Shared};
pub use tracefs::{PREFIX, Tracefs, instance_name};
use tracefs::{names, open, open_folder, read, write};

/// The event, below an instance.
const EVENT: &str = "events/block/block_rq_complete";

/// Devices traced at a time.
const MAX_DEVICES: usize = 16;

/// What sort of request changed the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteKind {
    /// A write.
    Data,
    /// A discard, secure erasures included.
    Discard,
    /// Zeros without data, where the kernel says so.
    Zeroes,
    /// Anything else that is no read: older kernels' zeros, zone commands.
    Other,
}

/// A completed request that changed a device; what of it lies on that device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// The disk or partition.
    pub device: DeviceNumber,
    /// First sector on it, in units of 512 bytes.
    pub sector: u64,
    /// How many, never 0.
    pub sectors: u64,
    /// What was done.
    pub kind: WriteKind,
}

/// What to trace.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whole disks and partitions.
    pub devices: Vec<DeviceNumber>,
    /// Room for events, in KiB for each processor.
    pub buffer_kib: u32,
    /// How often the reader looks for events.
    pub poll: Duration,
}

impl Options {
    /// For these devices: 8 MiB for each processor, looked at every millisecond.
    pub fn new(devices: Vec<DeviceNumber>) -> Self {
        Self {
            devices,
            buffer_kib: 8192,
            poll: Duration::from_millis(1),
        }
    }
}

/// What was traced so far, of all devices together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Completed requests that changed a device.
    pub requests: u64,
    /// Sectors of all but discards, of requests that lie within one device.
    pub written: u64,
    /// The same of discards.
    pub discarded: u64,
    /// Requests without data, of the whole disk: cache flushes. The disk's own counter is lower: a flush may be traced
    /// for itself and for the request that asked for it.
    pub flushes: u64,
    /// Commands sent past the block layer (SG_IO: SMART queries, but perhaps writes). They have no
    /// place, are not counted by the disk's counters, and are not handed on.
    pub passthrough: u64,
}

/// Why the trace cannot be trusted any more.
#[derive(Debug)]
pub enum TraceError {
    /// Events were lost.
    Lost(Loss),
    /// The reader met a page it does not understand.
    BadPage,
    /// Reading the trace or the counters failed.
    Failed(io::Error),
    /// The reader thread has ended.
    ReaderGone,
    /// The disk never paused long enough, or the reader never caught up.
    NoQuiet,
    /// Something about the instance is not as it was set: which file, and what it says now.
    Changed(&'static str, String),
}

/// Events lost in the kernel's buffer, by its own count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Overwritten before they were read.
    pub overrun: u64,
    /// Lost to interrupts that filled the buffer.
    pub commit_overrun: u64,
    /// Dropped for want of room.
    pub dropped: u64,
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(loss) => write!(
                f,
                "events were lost ({} overwritten, {} by interrupts, {} dropped)",
                loss.overrun, loss.commit_overrun, loss.dropped
            ),
            Self::BadPage => write!(f, "the trace is in a format that is not understood"),
            Self::Failed(error) => write!(f, "the trace cannot be read: {error}"),
            Self::ReaderGone => write!(f, "the reader of the trace has ended"),
            Self::NoQuiet => write!(f, "the disk was never quiet for long enough"),
            Self::Changed(file, now) => {
                write!(f, "somebody changed the trace instance: {file} is {now:?}")
            }
        }
    }
}

impl std::error::Error for TraceError {}

impl From<io::Error> for TraceError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// Counted minus traced sectors of each device at a quiet moment. It depends on when the trace began
/// and means nothing by itself: between two moments it must not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance([u64; MAX_DEVICES]);

impl Balance {
    /// Sectors that were counted but not traced since `earlier`, of all devices; negative if more were
    /// traced than counted. Anything but 0 on any device shows in [`PartialEq`].
    pub fn missed_since(&self, earlier: &Self) -> i64 {
        let pairs = self.0.iter().zip(&earlier.0);
        let missed = pairs.map(|(now, then)| now.wrapping_sub(*then).cast_signed());
        missed.fold(0, i64::wrapping_add)
    }
}

/// A running trace. Dropped, it is taken down.
#[derive(Debug)]
pub struct Tracker {
    tracefs: Tracefs,
    name: String,
    instance: File,
    filter: String,
    counters: Vec<CounterFile>,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    cpus: Vec<String>,
}

impl Tracker {
    /// Makes the instance of run `run_id` and begins to trace. From its return on, every request
    /// that completes is handed to `each`, cut at the borders of the device, in the reader thread, which allocates nothing itself; nor
    /// may `each`, should a filesystem be frozen meanwhile. `each` sees a request at the latest when
    /// a [`drain`](Self::drain) begun after its completion returns.
    ///
    /// # Errors
    /// If a device is not request-based, its counters are switched off, the kernel's format is not
    /// understood, or tracefs refuses.
    pub fn start(
        tracefs: Tracefs,
        run_id: &str,
        options: &Options,
        each: impl FnMut(Write) + Send + 'static,
    ) -> Result<Self> {
        if cfg!(target_endian = "big") {
            let why = "only little-endian machines are understood";
            return Err(Error::other("cannot read", "the trace", why));
        }
        let (devices, counters) = look_up(&options.devices)?;
        let page_format = read_page_format(&tracefs.root)?;
        let name = instance_name(run_id);
        mkdirat(
            &tracefs.instances,
            name.as_str(),
            Mode::from_bits_truncate(0o700),
        )
        .context("cannot make the trace instance", &name)?;
        // From here on a failure takes the instance down again.
        let mut tracker = Self {
            instance: match open_folder(&tracefs.instances, &name) {
                Ok(instance) => instance,
                Err(error) => {
                    let _ = tracefs.remove(&name);
                    return Err(error);
                }
            },
            tracefs,
            name,
            filter: String::new(),
            counters,
            shared: Arc::new(Shared::new(&devices)),
            reader: None,
            cpus: Vec::new(),
        };
        tracker.set_up(options)?;
        let format = read(&tracker.instance, &format!("{EVENT}/format"))?;
        let event_format = EventFormat::parse(&format).ok_or_else(|| {
            Error::invalid("cannot understand", "block_rq_complete", "unknown layout")
        })?;
        let mut pipes = Vec::new();
        for cpu in &tracker.cpus {
            let path = format!("per_cpu/{cpu}/trace_pipe_raw");
            pipes.push(open(
                &tracker.instance,
                &path,
                OFlag::O_RDONLY | OFlag::O_NONBLOCK,
            )?);
        }
        let reader = Reader {
            page: vec![1; page_format.page_len()],
            // One pass reads at least what was in the buffer when it began.
            pages: u64::from(options.buffer_kib) * 1024 / page_format.page_len() as u64 + 3,
            page_format,
            event_format,
            pipes,
            shared: tracker.shared.clone(),
            poll: options.poll,
            each,
        };
        let handle = std::thread::Builder::new()
            .name("holdstill-trace".to_owned())
            .spawn(move || reader.run())
            .context("cannot start", "the reader of the trace")?;
        tracker.reader = Some(handle);
        write(&tracker.instance, &format!("{EVENT}/enable"), "1")?;
        write(&tracker.instance, "tracing_on", "1")?;
        Ok(tracker)
    }

    fn set_up(&mut self, options: &Options) -> Result<()> {
        let instance = &self.instance;
        write(instance, "tracing_on", "0")?;
        write(instance, "buffer_size_kb", &options.buffer_kib.to_string())?;
        let filter_file = format!("{EVENT}/filter");
        let of_disk = |tally: &DeviceTally| format!("dev == {}", tally.disk.to_kernel());
        let disks: Vec<_> = self.shared.devices.iter().map(of_disk).collect();
        let filter = format!("({}) && !(rwbs ~ \"R*\")", disks.join(" || "));
        write(instance, &filter_file, &filter)?;
        self.filter = read(instance, &filter_file)?;
        if self.filter.trim() == "none" {
            return Err(Error::other(
                "cannot set",
                filter_file,
                "the filter was not taken",
            ));
        }
        self.cpus = names(&open_folder(instance, "per_cpu")?, "per_cpu")?;
        self.cpus.retain(|name| name.starts_with("cpu"));
        if self.cpus.is_empty() {
            return Err(Error::invalid("cannot read", "per_cpu", "no processors"));
        }
        Ok(())
    }

    /// The name of the instance.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns once every request that completed before the call has been handed on. Allocates
    /// nothing.
    ///
    /// # Errors
    /// If events were lost or the reader does not keep up within `patience`.
    pub fn drain(&self, patience: Duration) -> std::result::Result<(), TraceError> {
        let ticket = self.shared.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let begin = Instant::now();
        loop {
            self.shared.trouble()?;
            if self.shared.caught_up.load(Ordering::Acquire) >= ticket {
                return Ok(());
            }
            match &self.reader {
                Some(reader) if !reader.is_finished() => reader.thread().unpark(),
                _ => return Err(TraceError::ReaderGone),
            }
            if begin.elapsed() >= patience {
                return Err(TraceError::NoQuiet);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// What was handed on so far.
    pub fn tally(&self) -> Tally {
        let sum = |of: fn(&DeviceTally) -> &AtomicU64| {
            let devices = self.shared.devices.iter();
            devices
                .map(|device| of(device).load(Ordering::Acquire))
                .sum()
        };
        Tally {
            requests: sum(|device| &device.requests),
            written: sum(|device| &device.written),
            discarded: sum(|device| &device.discarded),
            flushes: sum(|device| &device.flushes),
            passthrough: self.shared.passthrough.load(Ordering::Acquire),
        }
    }

    /// Waits for a moment in which nothing on the devices completes, and compares what they counted
    /// with what was traced. Two balances that differ prove that the trace is not whole. Allocates
    /// nothing.
    ///
    /// # Errors
    /// As [`drain`](Self::drain); `NoQuiet` if the devices never pause within `patience`.
    pub fn balance(&self, patience: Duration) -> std::result::Result<Balance, TraceError> {
        let begin = Instant::now();
        let mut last = None;
        while begin.elapsed() < patience {
            // Counters only grow: equal before and after, they were so all the time between, and
            // everything they counted has been handed on.
            let before = self.counted()?;
            self.drain(patience)?;
            let traced = self.traced();
            let mut balance = self.counted()?;
            if before != balance {
                last = None;
                continue;
            }
            for (counted, traced) in balance.iter_mut().zip(traced) {
                *counted = counted.wrapping_sub(traced);
            }
            // A request is traced a moment before it is counted: only what holds twice is true.
            if last == Some(balance) {
                return Ok(Balance(balance));
            }
            last = Some(balance);
            std::thread::sleep(Duration::from_micros(300));
        }
        Err(TraceError::NoQuiet)
    }

    fn counted(&self) -> io::Result<[u64; MAX_DEVICES]> {
        let mut counted = [0u64; MAX_DEVICES];
        for (counted, file) in counted.iter_mut().zip(&self.counters) {
            let now = file.read()?;
            *counted = now.writes.sectors.wrapping_add(now.discards.sectors);
        }
        Ok(counted)
    }

    fn traced(&self) -> [u64; MAX_DEVICES] {
        let mut traced = [0u64; MAX_DEVICES];
        for (traced, device) in traced.iter_mut().zip(&self.shared.devices) {
            let written = device.written.load(Ordering::Acquire);
            *traced = written.wrapping_add(device.discarded.load(Ordering::Acquire));
        }
        traced
    }

    /// Whether everything traced since the start is whole and still as it was set up. For the end,
    /// after a drain; not for while a filesystem is frozen.
    ///
    /// # Errors
    /// The first thing that is wrong. Nothing that was tracked can be trusted then.
    pub fn check(&self) -> std::result::Result<(), TraceError> {
        let loss = self.loss()?;
        if loss != Loss::default() {
            return Err(TraceError::Lost(loss));
        }
        self.shared.trouble()?;
        if self.reader.as_ref().is_none_or(JoinHandle::is_finished) {
            return Err(TraceError::ReaderGone);
        }
        let by_name = fstatat(
            &self.tracefs.instances,
            self.name.as_str(),
            AtFlags::empty(),
        );
        let open = fstat(&self.instance).map_err(io::Error::from)?;
        if !by_name.is_ok_and(|by_name| by_name.st_ino == open.st_ino) {
            return Err(TraceError::Changed("instance", "gone".to_owned()));
        }
        let expected = [
            ("tracing_on", "tracing_on".to_owned(), "1"),
            ("enable", format!("{EVENT}/enable"), "1"),
            ("filter", format!("{EVENT}/filter"), self.filter.trim()),
        ];
        for (name, path, value) in expected {
            let now = read(&self.instance, &path).map_err(|error| error.source)?;
            if now.trim() != value {
                return Err(TraceError::Changed(name, now.trim().to_owned()));
            }
        }
        Ok(())
    }

    /// What the ring buffers say they lost.
    fn loss(&self) -> io::Result<Loss> {
        let mut loss = Loss::default();
        for cpu in &self.cpus {
            let path = format!("per_cpu/{cpu}/stats");
            let stats = read(&self.instance, &path).map_err(|error| error.source)?;
            let number = |name: &str| {
                let lines = stats.lines();
                let value = lines.filter_map(|line| line.split_once(':'));
                value
                    .filter(|(key, _)| key.trim() == name)
                    .find_map(|(_, value)| value.trim().parse::<u64>().ok())
                    .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
            };
            loss.overrun += number("overrun")?;
            loss.commit_overrun += number("commit overrun")?;
            loss.dropped += number("dropped events")?;
        }
        Ok(loss)
    }

    /// Ends the trace and removes the instance.
    ///
    /// # Errors
    /// If the instance cannot be removed: it goes on tracing.
    pub fn stop(mut self) -> Result<Tally> {
        let tally = self.tally();
        self.take_down()?;
        Ok(tally)
    }

    fn take_down(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(reader) = self.reader.take() {
            reader.thread().unpark();
            // A panic in `each` was reported by `check`.
            let _ = reader.join();
        }
        let end = Instant::now() + Duration::from_secs(2);
        loop {
            match self.tracefs.remove(&self.name) {
                Err(error) if error.errno() == Some(libc::EBUSY) && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                result => return result.map(drop),
            }
        }
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            log::warn!("{error}");
        }
    }
}

/// Looks up devices that are to be traced, and opens their counters.
fn look_up(numbers: &[DeviceNumber]) -> Result<(Vec<BlockDevice>, Vec<CounterFile>)> {
    if numbers.is_empty() || numbers.len() > MAX_DEVICES {
        let why = format!("1 to {MAX_DEVICES} devices can be, not {}", numbers.len());
        return Err(Error::other("cannot trace", "the disks", why));
    }
    let mut devices = Vec::new();
    let mut files = Vec::new();
    for &number in numbers {
        let device = BlockDevice::of(number)?;
        let refuse = |why: &str| Err(Error::other("cannot trace", device.path(), why));
        if !device.is_request_based() {
            return refuse(
                "its requests do not pass the block layer's queues under its own number",
            );
        }
        if !counters::are_kept(&device)? {
            return refuse("its counters are switched off (queue/iostats)");
        }
        files.push(CounterFile::open(number)?);
        devices.push(device);
    }
    Ok((devices, files))
}

fn read_page_format(root: &File) -> Result<PageFormat> {
    let page = read(root, "events/header_page")?;
    let event = read(root, "events/header_event")?;
    PageFormat::parse(&page, &event)
        .ok_or_else(|| Error::invalid("cannot understand", "the ring buffer", "unknown layout"))
}

#[cfg(test)]
mod live_tests;
#[cfg(test)]
mod tests;
