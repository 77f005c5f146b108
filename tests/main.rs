//! All integration tests, in one binary: one module per concept.

mod backup;
mod btrfs;
mod clone;
mod common;
mod damage;
mod events;
mod ext4;
mod failures;
mod golden;
mod harness;
mod hold;
mod hostile_fs;
mod hostile_image;
mod image;
mod inspect;
mod interrupt;
mod memory;
mod probe;
mod refusals;
mod restore;
mod salvage;
mod streams;
mod track;
mod track_ends;
mod verify;
mod xfs;
