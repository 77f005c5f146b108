//! The image: what it looks like ([`format`](self::format)), what identifies its content
//! ([`content`]), how it is written ([`writer`]) and how it is read ([`reader`]).
//!
//! The format is specified byte by byte in `FORMAT.md` beside this module. Nothing here makes a system
//! call: images are written to a [`Sink`](writer::Sink) and read from any [`std::io::Read`].

pub mod content;
pub mod format;
pub mod manifest;
pub mod reader;
pub mod tables;
pub mod writer;
