//! The image: what it looks like ([`format`](mod@format)), what identifies its content
//! ([`content`]), how it is written ([`writer`]), and how it is read: in order ([`reader`]) or
//! anywhere ([`index`]).
//!
//! The format is specified byte by byte in `FORMAT.md` beside this module. Nothing here makes a system
//! call: images are written to a [`Sink`](writer::Sink) and read from any [`std::io::Read`].

pub mod content;
pub mod damage;
pub mod format;
pub mod index;
pub mod manifest;
pub mod reader;
mod record;
pub mod tables;
pub mod writer;
