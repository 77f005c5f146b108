//! What the program does, a file a verb: what it is asked, what it does, and what it reports.

pub mod backup;
pub mod cleanup;
pub mod clone;
pub mod demo;
pub mod dry_run;
mod estimate;
pub mod inspect;
pub mod restore;
pub mod verify;
