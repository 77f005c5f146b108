//! Where images live: files and standard streams.

pub mod input;
pub mod output;
