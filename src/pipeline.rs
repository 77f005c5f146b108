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

/// Most workers by default: what they hold in memory must fit a small machine, and more than so many
/// cores no disk keeps busy.
const MOST_WORKERS: usize = 8;

/// Workers to run by default: one more than cores, so that one can wait for a disk while every core
/// has work.
pub fn default_workers() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (cores + 1).min(MOST_WORKERS)
}
