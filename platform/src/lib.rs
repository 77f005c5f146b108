//! Everything holdstill needs of one operating system, and every line of its `unsafe` code.

pub mod buffer;
pub mod device;
pub mod error;
pub mod output;
