//! How bytes flow: bounded, in parallel, and never copied by the CPU without need.
//!
//! Each worker takes one chunk at a time through all steps (read, hash, compress; or check,
//! decompress, write), so that a chunk stays in one core's cache. All memory is in fixed pools of
//! aligned buffers that move from step to step by ownership. Where order matters, the writer restores
//! it from the chunks' numbers.
//!
//! Why it cannot deadlock: a worker takes its buffers *before* it takes a chunk, so whoever holds the
//! lowest unfinished chunk always has what it needs to finish it.

pub mod batch;
pub mod copy;
pub mod load;
pub mod read;
pub mod receive;
pub mod store;
pub mod stream;
pub mod throttle;
pub mod tolerant;

use std::num::NonZeroUsize;

use crate::units::ByteLen;

/// Most workers by default: what they hold in memory must fit a small machine, and more than so many
/// cores no disk keeps busy.
const MOST_WORKERS: usize = 8;

/// Most buffers beyond those that workers hold.
const MOST_SPARE: usize = 4;

/// What all buffers of a pipeline take at most by default: with everything else a run stays below
/// 128 MiB.
const DEFAULT_MEMORY: ByteLen = ByteLen::mib(96);

/// What a pipeline may take of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Threads that do the work.
    pub threads: usize,
    /// Bytes to hold in buffers, where the default is not right: for them all 96 MiB, and what a step of
    /// the ladder has for itself.
    pub memory: Option<ByteLen>,
}

/// One thread more than cores, so that one can wait for a disk while every core has work.
impl Default for Bounds {
    fn default() -> Self {
        Self::of_threads(cores() + 1)
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

impl Bounds {
    fn of_threads(threads: usize) -> Self {
        Self {
            threads: threads.min(MOST_WORKERS),
            memory: None,
        }
    }

    /// What work takes by default that writes to a target: most of its threads wait for that, which
    /// keeps so many requests under way. An io_uring was tried instead, and was no faster.
    pub fn for_target() -> Self {
        Self::of_threads(4 * cores())
    }

    /// The least that memory can be bounded to: the longest chunks need some of it each way.
    pub const LEAST_MEMORY: ByteLen = ByteLen::mib(16);

    /// Buffers beyond those that workers hold, of `each` bytes: for chunks that wait until their turn
    /// comes. They take no more than a quarter of the memory.
    fn spare(self, each: usize) -> usize {
        (self.buffers() / 4 / each).clamp(1, MOST_SPARE)
    }

    fn buffers(self) -> usize {
        self.memory.unwrap_or(DEFAULT_MEMORY).as_usize()
    }

    /// Workers that may run if each of them needs `each` bytes of buffers, and all together `shared`
    /// bytes: one at least.
    fn workers(self, each: usize, shared: usize) -> usize {
        let left = self.buffers().saturating_sub(shared);
        (left / each).clamp(1, self.threads.max(1))
    }
}
