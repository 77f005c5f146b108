//! Reading the last stale blocks of all sources while they are frozen: into locked memory, with several
//! requests at once, by threads that were started before. Between the freeze and the thaw nothing
//! here allocates.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

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

/// A source that is read in the freeze.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub(super) disk: Arc<Disk>,
    /// The most that can be read of it, in bytes.
    pub(super) room: ByteLen,
}

/// What was read of all sources.
#[derive(Debug)]
pub(super) struct FinalRead {
    arena: Arena,
    parts: Vec<Part>,
}

/// What was read of one of them.
#[derive(Debug)]
struct Part {
    wanted: Wanted,
    /// What to read, in the order it was found. Never grows beyond its capacity.
    extents: Vec<Extent>,
    held: ByteLen,
    /// Where the bytes of each extent begin in the arena, once they were read.
    places: Vec<usize>,
}

impl FinalRead {
    /// Makes memory ready.
    ///
    /// # Errors
    /// If so much cannot be locked.
    pub(super) fn prepare(wanted: Vec<Wanted>) -> Result<Self> {
        let room: ByteLen = wanted.iter().map(|wanted| wanted.room).sum();
        let part = |wanted| Part {
            wanted,
            extents: Vec::with_capacity(MOST_EXTENTS),
            held: ByteLen::ZERO,
            places: Vec::new(),
        };
        Ok(Self {
            // Never nothing: that is no memory.
            arena: Arena::new(room.as_usize().max(1))?,
            parts: wanted.into_iter().map(part).collect(),
        })
    }

    /// Starts the reading threads, runs `frozen` with them, and ends them.
    pub(super) fn with_readers<T>(
        &mut self,
        frozen: impl FnOnce(&Readers<'_>) -> Result<T>,
    ) -> Result<T> {
        let queue = Queue {
            parts: std::mem::take(&mut self.parts),
            next: (0, 0, 0),
            rest: Some(self.arena.bytes_mut()),
            state: State::Filling,
            busy: 0,
            failure: None,
        };
        let readers = Readers {
            disks: queue
                .parts
                .iter()
                .map(|it| it.wanted.disk.clone())
                .collect(),
            queue: Mutex::new(queue),
            changed: Condvar::new(),
        };
        let outcome = std::thread::scope(|scope| {
            // Whatever happens, the threads must be told to end, or the scope would wait for ever.
            let _end = EndOnDrop(&readers);
            for _ in 0..READERS {
                thread::spawn(scope, || readers.work())?;
            }
            frozen(&readers)
        });
        let queue = readers.queue.into_inner();
        self.parts = queue.unwrap_or_else(PoisonError::into_inner).parts;
        let mut place = 0;
        for part in &mut self.parts {
            part.places.extend(part.extents.iter().map(|extent| {
                place += extent.len.as_usize();
                place - extent.len.as_usize()
            }));
        }
        outcome
    }
}

/// What was read of one source. As a source it has just those blocks.
#[derive(Clone, Debug)]
pub struct ReadPart {
    read: Arc<FinalRead>,
    part: usize,
}

impl ReadPart {
    /// Of the source of that number.
    pub(super) fn of(read: &Arc<FinalRead>, part: usize) -> Self {
        Self {
            read: Arc::clone(read),
            part,
        }
    }

    /// The runs that were to be read, ascending.
    pub(super) fn extents(&self) -> &[Extent] {
        &self.read.parts[self.part].extents
    }
}

/// Threads that are ready to read.
#[derive(Debug)]
pub(super) struct Readers<'a> {
    queue: Mutex<Queue<'a>>,
    changed: Condvar,
    disks: Vec<Arc<Disk>>,
}

#[derive(Debug)]
struct Queue<'a> {
    parts: Vec<Part>,
    /// The source, the extent of it, and the byte within that, which the next request begins with.
    next: (usize, usize, u64),
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

    /// Adds a run of a source, cut at the end of the volume; whether there was room for it. If not, it is
    /// remembered all the same as far as possible, so that it can be marked again.
    pub(super) fn push(&self, part: usize, extent: Extent) -> bool {
        let whole = Extent::new(0, ReadAt::len(&*self.disks[part]).0);
        let Some(extent) = extent.intersect(whole) else {
            return true;
        };
        let mut queue = self.lock();
        let part = &mut queue.parts[part];
        if part.extents.len() == part.extents.capacity() {
            return false;
        }
        part.extents.push(extent);
        part.held += extent.len;
        part.held <= part.wanted.room
    }

    /// Reads everything that was pushed, and waits for the end of it. Reads nothing if there was not
    /// room for all.
    pub(super) fn read(&self) -> Result<()> {
        let mut queue = self.lock();
        let mut parts = queue.parts.iter();
        if parts.any(|part| part.held > part.wanted.room) {
            return Ok(());
        }
        queue.state = State::Reading;
        self.changed.notify_all();
        while queue.failure.is_none() && (queue.has_more() || queue.busy > 0) {
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.failure.take().map_or(Ok(()), Err)
    }

    fn work(&self) {
        touch_stack();
        let mut queue = self.lock();
        loop {
            while queue.state == State::Filling {
                queue = self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let Some((part, extent, memory)) = queue.take_request() else {
                self.changed.notify_all();
                return;
            };
            queue.busy += 1;
            drop(queue);
            let done = ReadAt::read_exact_at(&*self.disks[part], memory, extent.start);
            queue = self.lock();
            queue.busy -= 1;
            if let Err(error) = done {
                queue.failure.get_or_insert(error);
            }
        }
    }
}

impl<'a> Queue<'a> {
    /// Goes on to the next source that has something left to be read; whether there is one.
    fn has_more(&mut self) -> bool {
        while let Some(part) = self.parts.get(self.next.0) {
            if self.next.1 < part.extents.len() {
                return true;
            }
            self.next = (self.next.0 + 1, 0, 0);
        }
        false
    }

    /// The next piece to read, and the memory for it. `None`: nothing is left.
    fn take_request(&mut self) -> Option<(usize, Extent, &'a mut [u8])> {
        if self.state == State::Ended || self.failure.is_some() || !self.has_more() {
            return None;
        }
        let (part, index, done) = self.next;
        let extent = self.parts[part].extents[index];
        let len = (extent.len.0 - done).min(REQUEST);
        let piece = Extent::new(extent.start.0 + done, len);
        self.next = if done + len == extent.len.0 {
            (part, index + 1, 0)
        } else {
            (part, index, done + len)
        };
        let rest = self.rest.take()?;
        let (memory, rest) = rest.split_at_mut(ByteLen(len).as_usize());
        self.rest = Some(rest);
        Some((part, piece, memory))
    }
}

impl ReadAt for ReadPart {
    fn len(&self) -> ByteLen {
        ReadAt::len(&*self.read.parts[self.part].wanted.disk)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let wanted = Extent::new(offset.0, buf.len() as u64);
        check_range(ReadAt::len(self), offset, wanted.len)?;
        let Part {
            extents, places, ..
        } = &self.read.parts[self.part];
        let index = extents.partition_point(|extent| extent.end() <= wanted.start);
        if let (Some(extent), Some(place)) = (extents.get(index), places.get(index))
            && extent.start <= wanted.start
            && wanted.end() <= extent.end()
        {
            let start = place + wanted.start.since(extent.start).as_usize();
            buf.copy_from_slice(&self.read.arena.bytes()[start..start + buf.len()]);
            return Ok(());
        }
        Err(Error::new(Kind::Failed, "this block was not read in the freeze").at(offset))
    }
}
