//! What is reported of damage in an image.

use serde::Serialize;

use super::reader::Lost;
pub use super::reader::State;
use crate::units::ByteLen;

/// One damaged place of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Where in the image, in bytes.
    pub position: Option<u64>,
    /// The volume it is of, if that can be told.
    pub volume: Option<u32>,
    /// Where in the volume: offset and length in bytes.
    pub ranges: Vec<(u64, u64)>,
    /// What became of those blocks.
    pub state: State,
    /// What is wrong.
    pub message: String,
}

impl Damage {
    /// What is told of what was lost.
    pub(crate) fn of(lost: &Lost) -> Self {
        let (volume, extents) = match &lost.place {
            Some((volume, extents)) => (Some(*volume), extents.as_slice()),
            None => (None, [].as_slice()),
        };
        Self {
            position: lost.error.offset().map(|offset| offset.0),
            volume,
            ranges: extents
                .iter()
                .map(|extent| (extent.start.0, extent.len.0))
                .collect(),
            state: lost.state,
            message: lost.error.message().to_owned(),
        }
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> ByteLen {
        ByteLen(self.ranges.iter().map(|(_, len)| len).sum())
    }
}
