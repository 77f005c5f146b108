//! The thread that reads the trace, and what it counts.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::format::{EventFormat, PageFormat};
use super::page::{self, Completed};
use super::{Loss, MAX_DEVICES, Tally, TraceError, Write, WriteKind};
use crate::node::{BlockDevice, DeviceNumber};
use crate::stack::{Reached, Stack};
use crate::urgent::become_urgent;

/// Real-time priority of the reader, just below the guard's.
const PRIORITY: i32 = 49;

/// What the reader thread and the others share.
#[derive(Debug)]
pub(super) struct Shared {
    devices: Vec<DeviceTally>,
    stack: Option<StackTally>,
    pub(super) stop: AtomicBool,
    /// Number of the last request to catch up, and of the last one fulfilled.
    pub(super) asked: AtomicU64,
    pub(super) caught_up: AtomicU64,
    trouble: AtomicU32,
    pub(super) passthrough: AtomicU64,
}

/// No trouble; else one of those below, or an error number.
const FINE: u32 = 0;
const LOST: u32 = u32::MAX;
const BAD_PAGE: u32 = u32::MAX - 1;

/// What was counted.
#[derive(Debug, Default)]
pub(super) struct Sums {
    requests: AtomicU64,
    pub(super) written: AtomicU64,
    discarded: AtomicU64,
    flushes: AtomicU64,
}

/// One disk or partition.
#[derive(Debug)]
pub(super) struct DeviceTally {
    pub(super) device: DeviceNumber,
    pub(super) disk: DeviceNumber,
    /// Where it lies on the disk.
    pub(super) sectors: Range<u64>,
    pub(super) sums: Sums,
}

/// A device that is built of others.
#[derive(Debug)]
pub(super) struct StackTally {
    stack: Arc<Stack>,
    /// Of the device itself: what was written to any copy.
    sums: Sums,
    /// Sectors written of each device whose counters are compared, all copies together.
    gauges: Vec<AtomicU64>,
}

impl Shared {
    pub(super) fn new(devices: Vec<DeviceTally>, stack: Option<StackTally>) -> Self {
        Self {
            devices,
            stack,
            stop: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            caught_up: AtomicU64::new(0),
            trouble: AtomicU32::new(FINE),
            passthrough: AtomicU64::new(0),
        }
    }

    /// The disks whose events are looked at.
    pub(super) fn disks(&self) -> impl Iterator<Item = DeviceNumber> {
        let below = self.stack.iter().flat_map(|tally| tally.stack.leaves());
        self.devices.iter().map(|tally| tally.disk).chain(below)
    }

    /// What was handed on so far.
    pub(super) fn tally(&self) -> Tally {
        let of_devices = self.devices.iter().map(|tally| &tally.sums);
        let of_stack = self.stack.iter().map(|tally| &tally.sums);
        let mut all = Tally {
            passthrough: self.passthrough.load(Ordering::Acquire),
            ..Tally::default()
        };
        for sums in of_devices.chain(of_stack) {
            all.requests += sums.requests.load(Ordering::Acquire);
            all.written += sums.written.load(Ordering::Acquire);
            all.discarded += sums.discarded.load(Ordering::Acquire);
            all.flushes += sums.flushes.load(Ordering::Acquire);
        }
        all
    }

    /// Sectors traced so far, in the order of the counters that they are compared with.
    pub(super) fn traced(&self) -> [u64; MAX_DEVICES] {
        let of_devices = self.devices.iter().map(|tally| {
            let written = tally.sums.written.load(Ordering::Acquire);
            written.wrapping_add(tally.sums.discarded.load(Ordering::Acquire))
        });
        let gauges = self.stack.iter().flat_map(|tally| &tally.gauges);
        let of_stack = gauges.map(|gauge| gauge.load(Ordering::Acquire));
        let mut traced = [0; MAX_DEVICES];
        for (traced, sum) in traced.iter_mut().zip(of_devices.chain(of_stack)) {
            *traced = sum;
        }
        traced
    }

    /// The first trouble stays.
    fn complain(&self, trouble: u32) {
        let _ = self
            .trouble
            .compare_exchange(FINE, trouble, Ordering::AcqRel, Ordering::Acquire);
    }

    /// What `complain` was told first, if anything.
    pub(super) fn trouble(&self) -> Result<(), TraceError> {
        match self.trouble.load(Ordering::Acquire) {
            FINE => Ok(()),
            LOST => Err(TraceError::Lost(Loss::default())),
            BAD_PAGE => Err(TraceError::BadPage),
            errno => Err(io::Error::from_raw_os_error(errno.cast_signed()).into()),
        }
    }

    /// Counts an event and hands on the write it tells of, if it is one.
    pub(super) fn count(&self, event: Completed, each: &mut impl FnMut(Write)) {
        let disk = DeviceNumber {
            major: event.dev >> 20,
            minor: event.dev & 0xf_ffff,
        };
        // Requests past the block layer have no place: (sector_t)-1.
        if event.sectors > 0 && event.sector == u64::MAX {
            self.passthrough.fetch_add(1, Ordering::Relaxed);
            return;
        }
        for tally in self.devices.iter().filter(|tally| tally.disk == disk) {
            if let Some(write) = tally.count(&event) {
                each(write);
            }
        }
        if let Some(tally) = &self.stack {
            tally.count(disk, &event, each);
        }
    }
}

impl Sums {
    /// Counts `sectors` that were written in this way.
    fn add(&self, kind: WriteKind, sectors: u64) {
        let sum = match kind {
            WriteKind::Discard => &self.discarded,
            _ => &self.written,
        };
        sum.fetch_add(sectors, Ordering::Release);
    }
}

impl DeviceTally {
    pub(super) fn new(device: &BlockDevice) -> Self {
        Self {
            device: device.number,
            disk: device.disk,
            // Of a discard of many places the kernel traces the first, with the length of all:
            // on a whole disk that is no reason not to add it up.
            sectors: match device.partition {
                Some(place) => place.start..place.start + place.sectors,
                None => 0..u64::MAX,
            },
            sums: Sums::default(),
        }
    }

    /// Counts an event of its disk; what was written to this device, if anything.
    pub(super) fn count(&self, event: &Completed) -> Option<Write> {
        if event.sectors == 0 {
            self.sums.flushes.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let sectors = u64::from(event.sectors);
        let end = event.sector.saturating_add(sectors);
        let (first, last) = (
            event.sector.max(self.sectors.start),
            end.min(self.sectors.end),
        );
        if first >= last {
            return None;
        }
        self.sums.requests.fetch_add(1, Ordering::Relaxed);
        let kind = kind_of(event);
        // Which side a request across the border was counted for cannot be known.
        if last - first == sectors {
            self.sums.add(kind, sectors);
        }
        Some(Write {
            device: self.device,
            sector: first - self.sectors.start,
            sectors: last - first,
            kind,
        })
    }
}

impl StackTally {
    pub(super) fn new(stack: Arc<Stack>) -> Self {
        Self {
            gauges: stack.gauges().map(|_| AtomicU64::new(0)).collect(),
            sums: Sums::default(),
            stack,
        }
    }

    /// Counts an event of a disk below, and hands on what it wrote to the top. Allocates nothing.
    fn count(&self, disk: DeviceNumber, event: &Completed, each: &mut impl FnMut(Write)) {
        if event.sectors == 0 {
            self.sums.flushes.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let kind = kind_of(event);
        let sectors = u64::from(event.sectors);
        let device = self.stack.top();
        let add = |gauge: usize, sectors: u64| {
            if let Some(sum) = self.gauges.get(gauge) {
                sum.fetch_add(sectors, Ordering::Release);
            }
        };
        // Of a discard of many places the kernel traces the first, with the length of all: they belong
        // to whom the first belongs to, wherever the others are.
        let is_discard = kind == WriteKind::Discard;
        if is_discard {
            self.stack.climb(disk, event.sector, 1, &mut |reached| {
                if let Reached::Gauge(gauge, _) = reached {
                    add(gauge, sectors);
                }
            });
        }
        let mut is_ours = false;
        self.stack
            .climb(disk, event.sector, sectors, &mut |reached| match reached {
                Reached::Gauge(gauge, sectors) if !is_discard => add(gauge, sectors),
                Reached::Gauge(..) => {}
                Reached::Top(sector, sectors) => {
                    is_ours = true;
                    self.sums.add(kind, sectors);
                    each(Write {
                        device,
                        sector,
                        sectors,
                        kind,
                    });
                }
            });
        if is_ours {
            self.sums.requests.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What sort of request was completed.
fn kind_of(event: &Completed) -> WriteKind {
    // `F` says that a flush went before.
    let letter = if event.letter == b'F' {
        event.detail
    } else {
        event.letter
    };
    match (letter, event.detail) {
        (b'W', b'Z') => WriteKind::Zeroes,
        (b'W', _) => WriteKind::Data,
        (b'D', _) => WriteKind::Discard,
        _ => WriteKind::Other,
    }
}

/// The thread that reads the trace.
pub(super) struct Reader<F> {
    pub(super) page_format: PageFormat,
    pub(super) event_format: EventFormat,
    pub(super) pipes: Vec<File>,
    pub(super) page: Vec<u8>,
    pub(super) pages: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) poll: Duration,
    pub(super) each: F,
}

impl<F: FnMut(Write)> Reader<F> {
    pub(super) fn run(mut self) {
        if let Err(errno) = become_urgent(PRIORITY) {
            log::debug!("no real-time priority: {errno}");
        }
        while !self.shared.stop.load(Ordering::Acquire) {
            let asked = self.shared.asked.load(Ordering::Acquire);
            for at in 0..self.pipes.len() {
                self.read_pipe(at);
            }
            self.shared.caught_up.store(asked, Ordering::Release);
            if self.shared.asked.load(Ordering::Acquire) == asked {
                std::thread::park_timeout(self.poll);
            }
        }
    }

    /// Reads one processor's events until there are none, or as many as its buffer holds.
    fn read_pipe(&mut self, at: usize) {
        let Some(pipe) = self.pipes.get_mut(at) else {
            return;
        };
        for _ in 0..self.pages {
            let page = match pipe.read(&mut self.page) {
                Ok(0) => return,
                Ok(length) => self.page.get(..length).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EIO);
                    self.shared.complain(errno.cast_unsigned());
                    return;
                }
            };
            let (shared, each) = (&self.shared, &mut self.each);
            let events = page::read(page, &self.page_format, &self.event_format, |event| {
                shared.count(event, each);
            });
            match events {
                Ok(false) => {}
                Ok(true) => shared.complain(LOST),
                Err(page::BadPage) => {
                    shared.complain(BAD_PAGE);
                    return;
                }
            }
        }
    }
}
