//! What was lost of a damaged image, and where it belonged.

use std::collections::VecDeque;
use std::ops::Range;

use super::Item;
use crate::error::Error;
use crate::extent::Extent;
use crate::image::format::IndexEntry;
use crate::image::manifest::Manifest;
use crate::units::Offset;

/// More separate places of damage than this are not worth going on for.
pub(super) const ENOUGH_DAMAGE: usize = 10_000;

/// Something that is damaged.
#[derive(Debug)]
pub struct Lost {
    /// What is wrong, and where in the image.
    pub error: Error,
    /// The volume and where in it; `None` if no block is lost, or nobody can tell which.
    pub place: Option<(u32, Vec<Extent>)>,
    /// Only some of those blocks are lost, nobody can tell which, and an earlier pass has older
    /// content for them.
    pub is_outdated: bool,
}

/// What was lost so far.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Whether anything was: what is counted over the whole image does not add up then.
    pub(super) any: bool,
    /// To be handed out.
    pub(super) queue: VecDeque<Item>,
    /// Records that were lost, as long as nothing told where they belong.
    pub(super) unplaced: Vec<(Range<u64>, Error)>,
    /// Why reading cannot go on, once the queue is empty.
    pub(super) end: Option<Error>,
}

impl Losses {
    pub(super) fn tell(&mut self, lost: Lost) {
        self.any = true;
        self.queue.push_back(Item::Lost(lost));
    }

    /// Tells where a record belonged if it was lost.
    pub(super) fn place(&mut self, entry: &IndexEntry, manifest: &Manifest) {
        let sequence = entry.sequence.get();
        let lost = self
            .unplaced
            .iter()
            .find(|(range, _)| range.contains(&sequence));
        let Some((range, error)) = lost else {
            return;
        };
        let error = Error::new(error.kind(), error.message()).at(Offset(entry.position.get()));
        let range = range.clone();
        let volume = (entry.volume.get() as usize)
            .checked_sub(1)
            .and_then(|n| manifest.volumes.get(n));
        let size = volume.map_or(u64::MAX, |volume| volume.size);
        let extent = Extent::between(Offset(entry.start.get()), Offset(entry.end.get().min(size)));
        self.tell(Lost {
            error,
            place: Some((entry.volume.get(), vec![extent])),
            is_outdated: entry.pass.get() > 0,
        });
        // What is left of the range is still to be placed.
        let at = self.unplaced.iter().position(|(other, _)| *other == range);
        if let Some(at) = at {
            let (_, error) = self.unplaced.swap_remove(at);
            if self.unplaced.len() >= ENOUGH_DAMAGE {
                return;
            }
            for rest in [range.start..sequence, sequence + 1..range.end] {
                if !rest.is_empty() {
                    let same = Error::new(error.kind(), error.message());
                    let same = error.offset().into_iter().fold(same, Error::at);
                    self.unplaced.push((rest, same));
                }
            }
        }
    }

    /// Hands out what nothing told the place of.
    pub(super) fn tell_unplaced(&mut self) {
        let mut unplaced = std::mem::take(&mut self.unplaced);
        unplaced.sort_by_key(|(range, _)| range.start);
        for (_, error) in unplaced {
            self.tell(Lost::nowhere(error));
        }
    }
}

impl Lost {
    pub(super) fn nowhere(error: Error) -> Self {
        Self {
            error,
            place: None,
            is_outdated: false,
        }
    }
}
