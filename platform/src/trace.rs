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
//!
//! Of a device that is built of others ([`Stack`]) all disks below are traced, and what their requests
//! wrote is mapped to it; its own counters, of bios, are what has to be met. Why that proves the same,
//! without any border, is said in [`crate::stack`].

mod format;
mod page;
mod reader;
mod tracefs;

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fstat, fstatat, mkdirat};

use crate::counters::{self, CounterFile, InFlightFile};
use crate::dm;
use crate::error::{Context, Error, Result};
use crate::node::{BlockDevice, DeviceNumber};
use crate::stack::Stack;
use format::{EventFormat, PageFormat};
use reader::{DeviceTally, Reader, Shared, StackTally};
pub use tracefs::{PREFIX, Tracefs, instance_name};
use tracefs::{names, open, open_folder, read, write};

/// The event, below an instance.
const EVENT: &str = "events/block/block_rq_complete";

/// Devices traced at a time.
pub(crate) const MAX_DEVICES: usize = crate::stack::MOST_LEAVES;

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
    /// What is written to.
    pub subject: Subject,
    /// Room for events, in KiB for each processor.
    pub buffer_kib: u32,
    /// How often the reader looks for events.
    pub poll: Duration,
}

/// Devices whose writes are traced.
#[derive(Clone, Debug)]
pub enum Subject {
    /// Whole disks and partitions.
    Devices(Vec<DeviceNumber>),
    /// A device that is built of others.
    Stack(Arc<Stack>),
}

impl Options {
    /// For these devices: 8 MiB for each processor, looked at every millisecond.
    pub fn new(devices: Vec<DeviceNumber>) -> Self {
        Self::of(Subject::Devices(devices))
    }

    /// The same for a device that is built of others.
    pub fn of_stack(stack: Arc<Stack>) -> Self {
        Self::of(Subject::Stack(stack))
    }

    fn of(subject: Subject) -> Self {
        Self {
            subject,
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

/// Counted minus traced sectors of each device at a quiet moment (of a stack: of each device whose
/// counters are looked at, counted once for each copy). It depends on when the trace began
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

/// What is compared with the trace.
#[derive(Debug)]
struct Counted {
    file: CounterFile,
    /// Where writes are counted when they begin: none must be under way.
    in_flight: Option<InFlightFile>,
    /// How often each sector that is counted is traced.
    copies: u64,
    /// Sectors counted before the trace began.
    before: u64,
}

impl Counted {
    fn open(device: DeviceNumber, in_flight: Option<InFlightFile>, copies: u64) -> Result<Self> {
        let file = CounterFile::open(device)?;
        let what = || format!("the counters of device {device}");
        let now = file.read().context("cannot read", what())?;
        Ok(Self {
            file,
            in_flight,
            copies,
            before: now.writes.sectors.wrapping_add(now.discards.sectors),
        })
    }

    /// Sectors counted so far; `None` while that is not final.
    fn read(&self) -> io::Result<Option<u64>> {
        let is_quiet = || match &self.in_flight {
            Some(file) => file.writes().map(|writes| writes == 0),
            None => Ok(true),
        };
        let quiet_before = is_quiet()?;
        let now = self.file.read()?;
        let sectors = now.writes.sectors.wrapping_add(now.discards.sectors);
        let is_final = quiet_before && is_quiet()?;
        Ok(is_final.then(|| sectors.wrapping_mul(self.copies)))
    }
}

/// A running trace. Dropped, it is taken down.
#[derive(Debug)]
pub struct Tracker {
    tracefs: Tracefs,
    name: String,
    instance: File,
    filter: String,
    counters: Vec<Counted>,
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
        let (shared, counters) = match &options.subject {
            Subject::Devices(numbers) => look_up(numbers)?,
            Subject::Stack(stack) => look_up_stack(stack)?,
        };
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
            shared: Arc::new(shared),
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
        let of_disk = |disk: DeviceNumber| format!("dev == {}", disk.to_kernel());
        let disks: Vec<_> = self.shared.disks().map(of_disk).collect();
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
        self.shared.tally()
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
            let traced = self.shared.traced();
            let after = self.counted()?;
            let Some(mut balance) = after.filter(|_| before == after) else {
                last = None;
                continue;
            };
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

    /// Whether something was traced of a device and nothing counted since the trace began: then the two
    /// will never agree.
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn counts_nothing(&self) -> io::Result<bool> {
        for (of, traced) in self.counters.iter().zip(self.shared.traced()) {
            let now = of.file.read()?;
            let counted = now.writes.sectors.wrapping_add(now.discards.sectors);
            if traced > 0 && counted == of.before {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What was counted so far; `None` while writes are under way that are counted already.
    fn counted(&self) -> io::Result<Option<[u64; MAX_DEVICES]>> {
        let mut counted = [0u64; MAX_DEVICES];
        for (counted, of) in counted.iter_mut().zip(&self.counters) {
            match of.read()? {
                Some(sectors) => *counted = sectors,
                None => return Ok(None),
            }
        }
        Ok(Some(counted))
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

/// Whether the kernel may count what is written to a device of a stack. Of a mapped device Linux 6.1
/// says that it does not, and does all the same (`dm_io_acct` of drivers/md/dm.c); whether a kernel
/// really counts is seen only when something is written: [`Tracker::counts_nothing`].
///
/// # Errors
/// If the device is gone.
pub fn may_be_counted(device: &BlockDevice) -> Result<bool> {
    Ok(dm::is_mapped(device) || counters::are_kept(device)?)
}

/// Looks up devices that are to be traced, and opens their counters.
fn look_up(numbers: &[DeviceNumber]) -> Result<(Shared, Vec<Counted>)> {
    check_count(numbers.len())?;
    let mut devices = Vec::new();
    let mut counters = Vec::new();
    for &number in numbers {
        let device = BlockDevice::of(number)?;
        if !device.is_request_based() {
            let why = "its requests do not pass the block layer's queues under its own number";
            return Err(Error::other("cannot trace", device.path(), why));
        }
        check_counters(&device)?;
        counters.push(Counted::open(number, None, 1)?);
        devices.push(DeviceTally::new(&device));
    }
    Ok((Shared::new(devices, None), counters))
}

/// The same for a stack: counters of those of its devices that are to be compared with the trace.
fn look_up_stack(stack: &Arc<Stack>) -> Result<(Shared, Vec<Counted>)> {
    check_count(stack.leaves().count())?;
    check_count(stack.gauges().count())?;
    let mut counters = Vec::new();
    for (number, copies) in stack.gauges() {
        if !may_be_counted(&BlockDevice::of(number)?)? {
            let why = "what is written to it is not counted (queue/iostats)";
            return Err(Error::other(
                "cannot trace",
                format!("device {number}"),
                why,
            ));
        }
        let in_flight = InFlightFile::open(number)?;
        counters.push(Counted::open(number, Some(in_flight), copies)?);
    }
    let tally = StackTally::new(Arc::clone(stack));
    Ok((Shared::new(Vec::new(), Some(tally)), counters))
}

fn check_count(devices: usize) -> Result<()> {
    if devices == 0 || devices > MAX_DEVICES {
        let why = format!("1 to {MAX_DEVICES} devices can be, not {devices}");
        return Err(Error::other("cannot trace", "the disks", why));
    }
    Ok(())
}

fn check_counters(device: &BlockDevice) -> Result<()> {
    if !counters::are_kept(device)? {
        let why = "its counters are switched off (queue/iostats)";
        return Err(Error::other("cannot trace", device.path(), why));
    }
    Ok(())
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
mod stack_tests;
#[cfg(test)]
mod tests;
