//! Reading the last stale blocks while the filesystem is frozen: into locked memory, with several
//! requests at once, by threads that were started before. Between the freeze and the thaw nothing
//! here allocates.

use std::sync::{Condvar, Mutex, PoisonError};

use holdstill_platform::device::Disk;
use holdstill_platform::memory::{Arena, touch_stack};

use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::read_at::{ReadAt, check_range};
use crate::thread;
use crate::units::{ByteLen, Offset};

/// Requests at a time.
const READERS: usize = 8;

/// Longest single request in bytes.
const REQUEST: u64 = 1 << 20;

/// Most runs there is room for.
const MOST_EXTENTS: usize = 128 << 10;

/// What was read in the freeze. As a source it has just those blocks.
#[derive(Debug)]
pub(super) struct FinalRead {
    arena: Arena,
    extents: Vec<Extent>,
    /// Where the bytes of each extent begin in the arena.
    places: Vec<usize>,
    room: ByteLen,
    /// Size of the volume.
    size: ByteLen,
}

impl FinalRead {
    /// Makes memory for `room` bytes ready.
    ///
    /// # Errors
    /// If so much cannot be locked.
    pub(super) fn prepare(room: ByteLen, size: ByteLen) -> Result<Self> {
        Ok(Self {
            arena: Arena::new(room.as_usize())?,
            extents: Vec::with_capacity(MOST_EXTENTS),
            places: Vec::new(),
            room,
            size,
        })
    }

    /// The runs that were read, ascending.
    pub(super) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Starts the reading threads, runs `frozen` with them, and ends them.
    pub(super) fn with_readers<T>(
        &mut self,
        disk: &Disk,
        frozen: impl FnOnce(&Readers<'_>) -> Result<T>,
    ) -> Result<T> {
        self.extents.clear();
        self.places.clear();
        let queue = Queue {
            extents: std::mem::take(&mut self.extents),
            room: self.room,
            held: ByteLen::ZERO,
            next: (0, 0),
            rest: Some(self.arena.bytes_mut()),
            state: State::Filling,
            busy: 0,
            failure: None,
        };
        let readers = Readers {
            queue: Mutex::new(queue),
            changed: Condvar::new(),
            size: self.size,
        };
        let outcome = std::thread::scope(|scope| {
            // Whatever happens, the threads must be told to end, or the scope would wait for ever.
            let _end = EndOnDrop(&readers);
            for _ in 0..READERS {
                thread::spawn(scope, || readers.work(disk))?;
            }
            frozen(&readers)
        });
        let queue = readers
            .queue
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        self.extents = queue.extents;
        let mut place = 0;
        self.places.extend(self.extents.iter().map(|extent| {
            place += extent.len.as_usize();
            place - extent.len.as_usize()
        }));
        outcome
    }
}

/// Threads that are ready to read.
#[derive(Debug)]
pub(super) struct Readers<'a> {
    queue: Mutex<Queue<'a>>,
    changed: Condvar,
    size: ByteLen,
}

#[derive(Debug)]
struct Queue<'a> {
    /// What to read. Never grows beyond its capacity.
    extents: Vec<Extent>,
    room: ByteLen,
    held: ByteLen,
    /// The extent and the byte within it that the next request begins with.
    next: (usize, u64),
    /// Memory that no request has taken: requests take it from the front, in order.
    rest: Option<&'a mut [u8]>,
    state: State,
    /// Requests under way.
    busy: usize,
    failure: Option<Error>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Filling,
    Reading,
    Ended,
}

struct EndOnDrop<'a, 'b>(&'a Readers<'b>);

impl Drop for EndOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().state = State::Ended;
        self.0.changed.notify_all();
    }
}

impl<'a> Readers<'a> {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue<'a>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a run, cut at the end of the volume; whether there was room for it. If not, it is
    /// remembered all the same as far as possible, so that it can be marked again.
    pub(super) fn push(&self, extent: Extent) -> bool {
        let whole = Extent::new(0, self.size.0);
        let Some(extent) = extent.intersect(whole) else {
            return true;
        };
        let mut queue = self.lock();
        if queue.extents.len() == queue.extents.capacity() {
            return false;
        }
        queue.extents.push(extent);
        queue.held += extent.len;
        queue.held <= queue.room
    }

    /// Reads everything that was pushed, and waits for the end of it. Reads nothing if there was not
    /// room for all.
    pub(super) fn read(&self) -> Result<()> {
        let mut queue = self.lock();
        if queue.held > queue.room {
            return Ok(());
        }
        queue.state = State::Reading;
        self.changed.notify_all();
        while queue.failure.is_none() && (queue.next.0 < queue.extents.len() || queue.busy > 0) {
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.failure.take().map_or(Ok(()), Err)
    }

    fn work(&self, disk: &Disk) {
        touch_stack();
        let mut queue = self.lock();
        loop {
            while queue.state == State::Filling {
                queue = self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let Some((extent, memory)) = queue.take_request() else {
                self.changed.notify_all();
                return;
            };
            queue.busy += 1;
            drop(queue);
            let done = ReadAt::read_exact_at(disk, memory, extent.start);
            queue = self.lock();
            queue.busy -= 1;
            if let Err(error) = done {
                queue.failure.get_or_insert(error);
            }
        }
    }
}

impl<'a> Queue<'a> {
    /// The next piece to read, and the memory for it. `None`: nothing is left.
    fn take_request(&mut self) -> Option<(Extent, &'a mut [u8])> {
        if self.state == State::Ended || self.failure.is_some() {
            return None;
        }
        let (index, done) = self.next;
        let extent = *self.extents.get(index)?;
        let len = (extent.len.0 - done).min(REQUEST);
        let piece = Extent::new(extent.start.0 + done, len);
        self.next = if done + len == extent.len.0 {
            (index + 1, 0)
        } else {
            (index, done + len)
        };
        let rest = self.rest.take()?;
        let (memory, rest) = rest.split_at_mut(ByteLen(len).as_usize());
        self.rest = Some(rest);
        Some((piece, memory))
    }
}

impl ReadAt for FinalRead {
    fn len(&self) -> ByteLen {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let wanted = Extent::new(offset.0, buf.len() as u64);
        check_range(self.size, offset, wanted.len)?;
        let index = self
            .extents
            .partition_point(|extent| extent.end() <= wanted.start);
        if let (Some(extent), Some(place)) = (self.extents.get(index), self.places.get(index))
            && extent.start <= wanted.start
            && wanted.end() <= extent.end()
        {
            let start = place + wanted.start.since(extent.start).as_usize();
            buf.copy_from_slice(&self.arena.bytes()[start..start + buf.len()]);
            return Ok(());
        }
        Err(Error::new(Kind::Failed, "this block was not read in the freeze").at(offset))
    }
}
