//! From a source into an image: read, hash, compress, write in order.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::str::FromStr;

use crossbeam_channel::{Receiver, Sender, bounded};
use holdstill_platform::buffer::{Buffer, Pool};

use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::image::format::codec;
use crate::image::tables::{Elide, Tables};
use crate::image::writer::{DataRecord, ImageWriter, Sink};
use crate::pipeline::batch::Chunk;
use crate::pipeline::read::{Moved, Numbered, Reading, Walk, read_chunk, send_chunks};
use crate::progress::Progress;
use crate::thread;
use crate::units::ByteLen;

/// How payloads are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    None,
    /// By zstd at a level from -7 to 19.
    Zstd(i32),
}

impl Compression {
    /// Plain bytes in one record. Larger chunks compress better and cost memory; these keep an image
    /// within 1 % of one long zstd stream at level 1 and within 2 % from level 3 on.
    pub fn chunk_len(self) -> usize {
        match self {
            Self::None => 1 << 20,
            Self::Zstd(level) if level < 3 => 2 << 20,
            Self::Zstd(_) => 4 << 20,
        }
    }
}

/// As an image and the command line write it.
impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// `none`, `zstd` or `zstd:LEVEL`.
impl FromStr for Compression {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, level) = text
            .split_once(':')
            .map_or((text, None), |(name, level)| (name, Some(level)));
        match (name, level) {
            ("none", None) => return Ok(Self::None),
            ("zstd", None) => return Ok(Self::Zstd(DEFAULT_LEVEL)),
            ("zstd", Some(level)) => {
                if let Some(level) = level.parse().ok().filter(|level| LEVELS.contains(level)) {
                    return Ok(Self::Zstd(level));
                }
            }
            _ => {}
        }
        Err(
            Error::new(Kind::Usage, format!("`{text}` is no way to compress")).hint(format!(
                "none, zstd, or zstd:LEVEL with a level from {} to {}",
                LEVELS.start(),
                LEVELS.end()
            )),
        )
    }
}

/// The level of zstd that is fastest where it counts: higher ones cost far more time than they save
/// space.
pub const DEFAULT_LEVEL: i32 = 1;

/// Levels of zstd that can be chosen. Those above 19 need more memory than a rescue system may have.
const LEVELS: RangeInclusive<i32> = -7..=19;

/// Compressed payloads must save at least this share of the plain bytes: one in so many. Otherwise
/// they are stored as they are, which costs nothing to restore.
const WORTH_COMPRESSING: usize = 32;

/// What and how to store.
#[derive(Clone, Copy)]
#[allow(
    missing_debug_implementations,
    reason = "a source need not be printable"
)]
pub struct Job<'a> {
    /// What is read, and how.
    pub reading: Reading<'a>,
    /// Pass, from 0.
    pub pass: u32,
    /// How payloads are stored.
    pub compression: Compression,
}

/// Stores all runs that `walk` gives as records of one pass, in ascending order.
///
/// # Errors
/// The first failure of the walk, the source or the sink, or the request to stop; the image is lost.
pub fn store<S: Sink>(
    job: &Job<'_>,
    walk: Box<Walk<'_>>,
    image: &mut ImageWriter<S>,
    progress: &dyn Progress,
) -> Result<Moved> {
    let room = job.compression.chunk_len();
    let bounds = job.reading.bounds;
    let spare = bounds.spare(2 * room);
    let workers = bounds.workers(2 * room, spare * 2 * room);
    let plain = Pool::new(workers + spare, room)?;
    let packed = Pool::new(workers + spare, room)?;
    let size = job.reading.source.len();
    let work = Work {
        workers,
        compression: job.compression,
        buffers: || (plain.take(), packed.take()),
        process: |chunk: Chunk, (plain, packed), compressor: &mut Compressor| {
            process(job, &chunk, plain, packed, compressor)
        },
    };
    work.run(
        move |to_workers| send_chunks(walk, room, size, to_workers),
        image,
        progress,
    )
}

/// What is done with pieces of a source, `T`, on their way into an image: in parallel, each in buffers `B`.
pub(super) struct Work<Buffers, Process> {
    /// Threads.
    pub(super) workers: usize,
    /// How payloads are stored.
    pub(super) compression: Compression,
    /// Takes what a piece needs, before the piece is taken: see the module `pipeline`.
    pub(super) buffers: Buffers,
    /// Makes a record of a piece.
    pub(super) process: Process,
}

impl<Buffers, Process> Work<Buffers, Process> {
    /// Writes what becomes of all that `produce` sends, in its order. `produce` says how many pieces
    /// that were.
    ///
    /// # Errors
    /// The first failure of the writer, a worker or `produce`.
    pub(super) fn run<T, B, S>(
        &self,
        produce: impl FnOnce(&Sender<Numbered<T>>) -> Result<u64> + Send,
        image: &mut ImageWriter<S>,
        progress: &dyn Progress,
    ) -> Result<Moved>
    where
        T: Send,
        S: Sink,
        Buffers: Fn() -> B + Sync,
        Process: Fn(T, B, &mut Compressor) -> Result<Finished> + Sync,
    {
        let (to_workers, pieces) = bounded(self.workers);
        let (to_writer, finished) = bounded(self.workers);
        std::thread::scope(|scope| {
            let producer = thread::spawn(scope, move || produce(&to_workers))?;
            for _ in 0..self.workers {
                let (pieces, to_writer) = (pieces.clone(), to_writer.clone());
                // If one is not to be had, the channels' ends go, and with them all others.
                thread::spawn(scope, move || self.work(&pieces, &to_writer))?;
            }
            // Only the threads' own ends of the channels must stay: when one side fails, its end
            // goes, and the others see that there is nothing more to do.
            drop((pieces, to_writer));
            let stored = write_in_order(&finished, image, progress);
            drop(finished);
            let produced = producer
                .join()
                .map_err(|_| Error::new(Kind::Failed, "a thread died"))?;
            let (stored, written) = stored?;
            if written != produced? {
                return Err(Error::new(Kind::Failed, "a thread of the pipeline died"));
            }
            Ok(stored)
        })
    }

    fn work<T, B>(
        &self,
        pieces: &Receiver<Numbered<T>>,
        to_writer: &Sender<Result<Numbered<Finished>>>,
    ) where
        Buffers: Fn() -> B,
        Process: Fn(T, B, &mut Compressor) -> Result<Finished>,
    {
        let _tells = TellsOfPanic(to_writer);
        let mut compressor = match Compressor::new(self.compression) {
            Ok(compressor) => compressor,
            Err(error) => {
                let _ = to_writer.send(Err(error));
                return;
            }
        };
        loop {
            let buffers = (self.buffers)();
            let Ok((number, piece)) = pieces.recv() else {
                return;
            };
            let finished = (self.process)(piece, buffers, &mut compressor);
            let has_failed = finished.is_err();
            let message = finished.map(|finished| (number, finished));
            if to_writer.send(message).is_err() || has_failed {
                return;
            }
        }
    }
}

/// Tells the writer that a worker died: it would wait for its chunk while all others wait for the buffers
/// that it keeps meanwhile.
struct TellsOfPanic<'a, T>(&'a Sender<Result<T>>);

impl<T> Drop for TellsOfPanic<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let died = Error::new(Kind::Failed, "a thread of the pipeline died");
            let _ = self.0.send(Err(died));
        }
    }
}

/// A record ready to be written, with the buffer its payload lies in.
pub(super) struct Finished {
    record: DataRecord,
    payload: Buffer,
    pieces: Vec<Range<usize>>,
    bytes: ByteLen,
    unreadable: Vec<Extent>,
}

fn process(
    job: &Job<'_>,
    chunk: &Chunk,
    mut plain: Buffer,
    packed: Buffer,
    compressor: &mut Compressor,
) -> Result<Finished> {
    let len = chunk.data_len().as_usize();
    let unreadable = read_chunk(&job.reading, chunk, &mut plain[..len])?;
    let elide = match job.compression {
        Compression::None => Elide::EveryBlock,
        Compression::Zstd(_) => Elide::Ends,
    };
    let (tables, pieces) = Tables::describe(&chunk.runs, &plain[..len], elide);
    let record = DataRecord {
        volume: job.reading.volume,
        pass: job.pass,
        tables,
        codec: codec::NONE,
        payload_crc: 0,
    };
    let finished = Finished {
        record,
        payload: plain,
        pieces,
        bytes: chunk.len(),
        unreadable,
    };
    finished.pack(packed, compressor)
}

impl Finished {
    /// A chunk of stream `number`: `len` bytes of `plain`.
    pub(super) fn of_stream(number: u32, tables: Tables, plain: Buffer, len: usize) -> Self {
        Self {
            record: DataRecord {
                volume: number,
                pass: 0,
                tables,
                codec: codec::NONE,
                payload_crc: 0,
            },
            payload: plain,
            pieces: std::iter::once(0..len).collect(),
            bytes: ByteLen(len as u64),
            unreadable: Vec::new(),
        }
    }

    /// Compresses the payload into `packed`, if that is worth it, and sums it up.
    pub(super) fn pack(mut self, mut packed: Buffer, compressor: &mut Compressor) -> Result<Self> {
        if let ([piece], Compressor::Zstd(zstd)) = (self.pieces.as_slice(), compressor) {
            let room = piece.len() - piece.len() / WORTH_COMPRESSING;
            if let Some(len) = compress(zstd, &self.payload[piece.clone()], &mut packed[..room])? {
                self.record.codec = codec::ZSTD;
                self.payload = packed;
                self.pieces = std::iter::once(0..len).collect();
            }
        }
        let mut crc = crc32fast::Hasher::new();
        for piece in &self.pieces {
            crc.update(&self.payload[piece.clone()]);
        }
        self.record.payload_crc = crc.finalize();
        Ok(self)
    }
}

/// One compression context, reused for all chunks of a worker.
pub(super) enum Compressor {
    None,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    fn new(compression: Compression) -> Result<Self> {
        match compression {
            Compression::None => Ok(Self::None),
            Compression::Zstd(level) => zstd::bulk::Compressor::new(level)
                .map(Self::Zstd)
                .map_err(|error| Error::io("cannot set up compression", error)),
        }
    }
}

/// Compresses into `room`; `None` if it does not fit there.
fn compress(
    zstd: &mut zstd::bulk::Compressor<'_>,
    bytes: &[u8],
    room: &mut [u8],
) -> Result<Option<usize>> {
    match zstd.compress_to_buffer(bytes, room) {
        Ok(len) => Ok(Some(len)),
        // The only error of a one-shot compression into a buffer is that the buffer is too small.
        Err(error) if error.kind() == io::ErrorKind::Other => Ok(None),
        Err(error) => Err(Error::io("cannot compress", error)),
    }
}

/// Returns with what was stored the number of chunks.
fn write_in_order<S: Sink>(
    finished: &Receiver<Result<Numbered<Finished>>>,
    image: &mut ImageWriter<S>,
    progress: &dyn Progress,
) -> Result<(Moved, u64)> {
    let mut stored = Moved::default();
    let mut waiting: BTreeMap<u64, Finished> = BTreeMap::new();
    let mut next = 0;
    for message in finished {
        progress.check()?;
        let (number, chunk) = message?;
        waiting.insert(number, chunk);
        while let Some(chunk) = waiting.remove(&next) {
            let pieces: Vec<&[u8]> = chunk
                .pieces
                .iter()
                .map(|piece| &chunk.payload[piece.clone()])
                .collect();
            image.data(&chunk.record, &pieces)?;
            stored.bytes += chunk.bytes;
            stored.unreadable.extend(chunk.unreadable);
            progress.advance(chunk.bytes);
            next += 1;
        }
    }
    Ok((stored, next))
}
