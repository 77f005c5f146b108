//! The thread that reads the trace, and what it counts.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::format::{EventFormat, PageFormat};
use super::page::{self, Completed};
use super::{Loss, TraceError, Write, WriteKind};
use crate::node::{BlockDevice, DeviceNumber};
use crate::urgent::become_urgent;

/// Real-time priority of the reader, just below the guard's.
const PRIORITY: i32 = 49;

/// What the reader thread and the others share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) devices: Vec<DeviceTally>,
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

#[derive(Debug)]
pub(super) struct DeviceTally {
    pub(super) device: DeviceNumber,
    pub(super) disk: DeviceNumber,
    /// Where it lies on the disk.
    pub(super) sectors: Range<u64>,
    pub(super) requests: AtomicU64,
    pub(super) written: AtomicU64,
    pub(super) discarded: AtomicU64,
    pub(super) flushes: AtomicU64,
}

impl Shared {
    pub(super) fn new(devices: &[BlockDevice]) -> Self {
        let tally = |device: &BlockDevice| {
            DeviceTally {
                device: device.number,
                disk: device.disk,
                // Of a discard of many places the kernel traces the first, with the length of all:
                // on a whole disk that is no reason not to add it up.
                sectors: match device.partition {
                    Some(place) => place.start..place.start + place.sectors,
                    None => 0..u64::MAX,
                },
                requests: AtomicU64::new(0),
                written: AtomicU64::new(0),
                discarded: AtomicU64::new(0),
                flushes: AtomicU64::new(0),
            }
        };
        Self {
            devices: devices.iter().map(tally).collect(),
            stop: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            caught_up: AtomicU64::new(0),
            trouble: AtomicU32::new(FINE),
            passthrough: AtomicU64::new(0),
        }
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
    }
}

impl DeviceTally {
    /// Counts an event of its disk; what was written to this device, if anything.
    pub(super) fn count(&self, event: &Completed) -> Option<Write> {
        if event.sectors == 0 {
            self.flushes.fetch_add(1, Ordering::Relaxed);
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
        self.requests.fetch_add(1, Ordering::Relaxed);
        // `F` says that a flush went before.
        let letter = if event.letter == b'F' {
            event.detail
        } else {
            event.letter
        };
        let kind = match (letter, event.detail) {
            (b'W', b'Z') => WriteKind::Zeroes,
            (b'W', _) => WriteKind::Data,
            (b'D', _) => WriteKind::Discard,
            _ => WriteKind::Other,
        };
        // Which side a request across the border was counted for cannot be known.
        if last - first == sectors {
            let sum = match kind {
                WriteKind::Discard => &self.discarded,
                _ => &self.written,
            };
            sum.fetch_add(sectors, Ordering::Release);
        }
        Some(Write {
            device: self.device,
            sector: first - self.sectors.start,
            sectors: last - first,
            kind,
        })
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
