//! holdstill images a disk while it is in use: it freezes a point in time first, then copies only
//! the used blocks of that instant.
//!
//! The layers look one way: `main → cli → plan → verbs → {freeze, pipeline, image, fs} → {extent,
//! units, read_at, error, progress}`. Everything of one operating system, and every line of `unsafe`,
//! lives in the crate `holdstill-platform`; `image` and `fs` make no system call at all.

#![forbid(unsafe_code)]

pub mod backup;
pub mod cleanup;
pub mod cli;
pub mod clone;
pub mod compare;
pub mod demo;
pub mod destination;
pub mod dry_run;

pub mod damage;
pub mod error;
pub mod estimate;
pub mod extent;
pub mod fit;
pub mod freeze;
pub mod fs;
mod host;
pub mod image;
pub mod input;
pub mod inspect;
mod new_ids;
pub mod overwritten;
pub mod pipeline;
pub mod plan;
pub mod progress;
pub mod read_at;
pub mod restore;
pub mod run;
mod signatures;
pub mod source;
mod subvolume;
pub mod survey;
mod target_name;
mod thread;
mod twin;
pub mod units;
pub mod verify;
