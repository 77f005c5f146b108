//! holdstill images a disk while it is in use: it freezes a point in time first, then copies only
//! the used blocks of that instant.
//!
//! The layers look one way: `main → cli → verbs → {freeze, destination, storage} → pipeline → {source, image,
//! fs} → {extent, read_at, progress, error, units}`. Everything of one operating system, and every line of `unsafe`,
//! lives in the crate `holdstill-platform`; `image` and `fs` make no system call at all.

#![forbid(unsafe_code)]

pub mod cli;
pub mod destination;
pub mod error;
pub mod extent;
pub mod freeze;
pub mod fs;
mod host;
pub mod image;
pub mod pipeline;
pub mod progress;
pub mod read_at;
pub mod source;
pub mod storage;
mod thread;
pub mod units;
pub mod verbs;
