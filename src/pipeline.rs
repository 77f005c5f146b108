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
pub mod sink;
pub mod store;
pub mod throttle;

use std::num::NonZeroUsize;

use crate::units::ByteLen;

/// Most workers by default: what they hold in memory must fit a small machine, and more than so many
/// cores no disk keeps busy.
const MOST_WORKERS: usize = 8;

/// Most buffers beyond those that workers hold.
const MOST_SPARE: usize = 4;

/// What a pipeline may take of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Threads that do the work.
    pub threads: usize,
    /// Bytes to hold in buffers, if there is a bound beside that by the number of threads.
    pub memory: Option<ByteLen>,
}

/// One thread more than cores, so that one can wait for a disk while every core has work.
impl Default for Bounds {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            threads: (cores + 1).min(MOST_WORKERS),
            memory: None,
        }
    }
}

impl Bounds {
    /// The least that memory can be bounded to: the longest chunks need some of it each way.
    pub const LEAST_MEMORY: ByteLen = ByteLen::mib(16);

    /// Buffers beyond those that workers hold, of `each` bytes: for chunks that wait until their turn
    /// comes. They take no more than a quarter of the memory.
    fn spare(self, each: usize) -> usize {
        self.memory.map_or(MOST_SPARE, |memory| {
            (memory.as_usize() / 4 / each).clamp(1, MOST_SPARE)
        })
    }

    /// Workers that may run if each of them needs `each` bytes of buffers, and all together `shared`
    /// bytes: one at least.
    fn workers(self, each: usize, shared: usize) -> usize {
        let threads = self.threads.max(1);
        self.memory.map_or(threads, |memory| {
            let left = memory.as_usize().saturating_sub(shared);
            (left / each).clamp(1, threads)
        })
    }
}
