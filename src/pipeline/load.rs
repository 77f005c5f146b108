//! Out of an image: read in order, check, decode, and hand to a receiver in parallel.

use std::io::Read;
use std::sync::{Condvar, Mutex, PoisonError};

use crossbeam_channel::{Receiver, bounded};
use holdstill_platform::buffer::{Buffer, Pool};

use crate::error::{Error, Kind, Result};
use crate::extent::ExtentSet;
use crate::image::reader::{DataHead, End, ImageReader, Item, Lost, State};
use crate::image::tables::{Content, Tables};
use crate::pipeline::Bounds;
use crate::pipeline::receive::Receive;
use crate::progress::Progress;
use crate::thread;
use crate::units::ByteLen;

/// Reads all of an image and hands it to `receiver`; every byte is checked before it is handed out.
/// `heads` sees every data record in order, before its content is checked.
///
/// # Errors
/// The first damage, the receiver's first error, or the request to stop.
pub fn load<R: Read>(
    image: &mut ImageReader<R>,
    receiver: &dyn Receive,
    bounds: Bounds,
    progress: &dyn Progress,
    mut heads: impl FnMut(&DataHead),
) -> Result<Box<End>> {
    let max_plain = image.max_plain();
    // Each worker decodes one record into a buffer of its own, while the next one waits for it.
    let workers = bounds.workers(3 * max_plain, max_plain);
    let stored = Pool::new(2 * workers + 1, max_plain)?;
    let in_flight = InFlight::default();
    let (to_workers, records) = bounded::<Loaded>(workers);
    let failure = Failure::of(receiver);
    let end = std::thread::scope(|scope| {
        for _ in 0..workers {
            let records = records.clone();
            let (in_flight, failure) = (&in_flight, &failure);
            let work = move || work(max_plain, receiver, progress, &records, in_flight, failure);
            thread::spawn(scope, work)?;
        }
        drop(records);
        let mut place = (0, 0);
        let mut read = || loop {
            progress.check()?;
            if failure.is_set() {
                return Err(Error::new(Kind::Failed, "the pipeline has ended"));
            }
            // Input that was given up because we were asked to stop is no failure of the input.
            let stopped = |error| progress.check().err().unwrap_or(error);
            match image.next_item().map_err(stopped)? {
                Item::Data(head) => {
                    let mut buffer = stored.take();
                    let len = match image.read_payload(&head, &mut buffer).map_err(stopped) {
                        // The image ends within this record: it is lost, and the next item says what
                        // else is.
                        Err(error) if error.kind() == Kind::Truncated => {
                            in_flight.wait_until_none();
                            lose(&head, error, receiver)?;
                            continue;
                        }
                        other => other?,
                    };
                    heads(&head);
                    // A later pass may overwrite what an earlier one is still writing.
                    if place != (head.volume, head.pass) {
                        in_flight.wait_until_none();
                        place = (head.volume, head.pass);
                    }
                    in_flight.enter();
                    let loaded = Loaded { head, buffer, len };
                    if to_workers.send(loaded).is_err() {
                        return Err(Error::new(Kind::Failed, "the pipeline has ended"));
                    }
                }
                Item::Lost(lost) => {
                    in_flight.wait_until_none();
                    receiver.damaged(lost)?;
                }
                Item::End(end) => return Ok(end),
            }
        };
        let end = read();
        let end = end.map_err(|error| {
            // What was read before the end of an image that was cut off is intact: it is handed out.
            if error.kind() == Kind::Truncated {
                in_flight.wait_until_none();
            }
            failure.set(error);
            Error::new(Kind::Failed, "the pipeline has ended")
        });
        // The workers end once nothing more comes.
        drop(to_workers);
        end
    });
    // A worker's failure is the cause of everything the reader may have run into after it.
    match failure
        .first
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None => end,
    }
}

struct Loaded {
    head: DataHead,
    buffer: Buffer,
    len: usize,
}

fn work(
    max_plain: usize,
    receiver: &dyn Receive,
    progress: &dyn Progress,
    records: &Receiver<Loaded>,
    in_flight: &InFlight,
    failure: &Failure<'_>,
) {
    let _takes_off = TakesOff {
        records,
        in_flight,
        failure,
    };
    let mut plain = match Buffer::try_new(max_plain) {
        Ok(plain) => plain,
        Err(error) => return failure.set(error.into()),
    };
    let decompressor = zstd::bulk::Decompressor::new();
    let mut decompressor = match decompressor {
        Ok(decompressor) => decompressor,
        Err(error) => return failure.set(Error::io("cannot set up decompression", error)),
    };
    for loaded in records {
        let _leaves = Leaves(in_flight);
        // After a failure the rest is only taken off the channel, so that nobody waits for us.
        if !failure.is_set() {
            let done = loaded
                .head
                .decode(&loaded.buffer[..loaded.len], &mut plain, &mut decompressor)
                .map(|bytes| hand_out(&loaded.head, Some(bytes), receiver))
                .unwrap_or_else(|error| lose(&loaded.head, error, receiver));
            match done {
                Ok(len) => progress.advance(len),
                Err(error) => failure.set(error),
            }
        }
        drop(loaded);
    }
}

/// What a worker that ends before its time owes to the others: that all know, and that records which are on
/// their way already are not waited for.
struct TakesOff<'a> {
    records: &'a Receiver<Loaded>,
    in_flight: &'a InFlight,
    failure: &'a Failure<'a>,
}

impl Drop for TakesOff<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let died = Error::new(Kind::Failed, "a thread of the pipeline died");
            self.failure.set(died);
        }
        if self.failure.is_set() {
            self.records.iter().for_each(|_| self.in_flight.leave());
        }
    }
}

/// A record is finished, or never will be.
struct Leaves<'a>(&'a InFlight);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Hands out the runs of a record, those with data only if there is any. Returns the bytes handed
/// out, zeros included.
fn hand_out(head: &DataHead, plain: Option<&[u8]>, receiver: &dyn Receive) -> Result<ByteLen> {
    let tables: &Tables = &head.tables;
    let mut len = ByteLen::ZERO;
    if let Some(plain) = plain {
        tables.for_each_data(plain, |offset, bytes| {
            receiver.data(head.volume, offset, bytes)
        })?;
        len = tables.data_len();
    }
    for run in &tables.runs {
        match run.content {
            Content::Data => {}
            Content::Zero => {
                receiver.zeros(head.volume, run.extent)?;
                len += run.extent.len;
            }
            Content::Trim => receiver.trim(head.volume, run.extent)?,
        }
    }
    Ok(len)
}

/// The payload of a record is damaged or cut off: what the record says of zeros still holds.
fn lose(head: &DataHead, error: Error, receiver: &dyn Receive) -> Result<ByteLen> {
    if !matches!(error.kind(), Kind::Damaged | Kind::Truncated) {
        return Err(error);
    }
    let mut extents = ExtentSet::new();
    extents.extend(head.tables.data_extents());
    receiver.damaged(Lost {
        error,
        place: Some((head.volume, extents.runs().to_vec())),
        state: State::Lost,
    })?;
    hand_out(head, None, receiver)
}

/// The first failure of any thread.
struct Failure<'a> {
    first: Mutex<Option<Error>>,
    receiver: &'a dyn Receive,
}

impl<'a> Failure<'a> {
    fn of(receiver: &'a dyn Receive) -> Self {
        Self {
            first: Mutex::default(),
            receiver,
        }
    }

    /// Notes the cause first: those who give up for it fail, too.
    fn set(&self, error: Error) {
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(error);
        self.receiver.abandon();
    }

    fn is_set(&self) -> bool {
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }
}

/// Counts the records that workers have not finished.
#[derive(Default)]
struct InFlight {
    count: Mutex<usize>,
    left: Condvar,
}

impl InFlight {
    fn enter(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn leave(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.left.notify_all();
    }

    fn wait_until_none(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            count = self
                .left
                .wait(count)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
