//! All integration tests, in one binary: one module per concept.

mod common;
mod ext4;
mod harness;
mod hostile_fs;
mod image;
mod xfs;
