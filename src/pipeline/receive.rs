//! Whoever takes what a volume is made of: from an image, or straight from a source.

use crate::error::Result;
use crate::extent::Extent;
use crate::image::reader::Lost;
use crate::units::Offset;

/// Takes what an image holds. Called from several threads; pieces of one pass never overlap, and a
/// pass is finished before the next begins. Streams are numbered behind the volumes.
pub trait Receive: Sync {
    /// Bytes of a volume.
    ///
    /// # Errors
    /// Any; it ends the reading.
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()>;

    /// A run of zeros of a volume.
    ///
    /// # Errors
    /// Any; it ends the reading.
    fn zeros(&self, volume: u32, extent: Extent) -> Result<()>;

    /// A run that is no longer part of the volume: it counts as zeros. Whoever keeps what earlier
    /// passes said of it has to forget that.
    ///
    /// # Errors
    /// Any; it ends the reading.
    fn trim(&self, volume: u32, extent: Extent) -> Result<()>;

    /// Something is damaged. Whoever takes it in gets everything else.
    ///
    /// # Errors
    /// Any; it ends the reading. Unless overridden, the damage itself.
    fn damaged(&self, lost: Lost) -> Result<()> {
        Err(lost.error)
    }

    /// Nothing more will come, and what is missing never will: whoever waits in here for it gives up.
    fn abandon(&self) {}
}

/// Takes everything and does nothing: for checking an image alone.
#[derive(Clone, Copy, Debug)]
pub struct Discard;

impl Receive for Discard {
    fn data(&self, _: u32, _: Offset, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn zeros(&self, _: u32, _: Extent) -> Result<()> {
        Ok(())
    }

    fn trim(&self, _: u32, _: Extent) -> Result<()> {
        Ok(())
    }
}
