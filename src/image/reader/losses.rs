//! What was lost of a damaged image, and where it belonged.

use std::collections::VecDeque;
use std::ops::Range;

use serde::Serialize;

use super::{Item, Progress};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::image::format::IndexEntry;
use crate::image::manifest::Manifest;
use crate::image::record::damaged;
use crate::units::Offset;

/// More separate places of damage than this are not worth going on for.
pub(super) const ENOUGH_DAMAGE: usize = 10_000;

/// Something that is damaged.
#[derive(Debug)]
pub struct Lost {
    /// What is wrong, and where in the image.
    pub error: Error,
    /// The volume and where in it; `None` if no block is known to be lost.
    pub place: Option<(u32, Vec<Extent>)>,
    /// What became of the blocks there.
    pub state: State,
}

/// What became of the blocks of a damaged place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Their content is lost.
    Lost,
    /// Some of them are older than the instant of the image; nobody can tell which.
    Outdated,
    /// Nobody can tell whether a block is lost. If one is, it is here, where a place is named.
    Unknown,
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
    /// What lies between the records of a volume's first pass where records were lost: volume and extents.
    gaps: Vec<(u32, ExtentSet)>,
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
            state: match entry.pass.get() {
                0 => State::Lost,
                _ => State::Outdated,
            },
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

    /// Remembers that records of a volume's first pass may be missing here.
    pub(super) fn note_gap(&mut self, volume: u32, gap: Extent) -> Result<()> {
        let mut gaps = self.gaps.iter_mut();
        let known = match gaps.find(|(n, _)| *n == volume) {
            Some((_, known)) => known,
            None => {
                self.gaps.push((volume, ExtentSet::new()));
                let last = self.gaps.last_mut();
                &mut last.ok_or_else(|| damaged("impossible"))?.1
            }
        };
        known.insert(gap);
        match known.runs().len() > ENOUGH_DAMAGE {
            true => Err(damaged("there is too much damage to go on")),
            false => Ok(()),
        }
    }

    /// Hands out what nothing told the place of, and where it may have belonged. `volumes` tells how far
    /// each volume has come, and its size.
    pub(super) fn tell_unplaced<'a>(
        &mut self,
        volumes: impl Iterator<Item = (u32, u64, &'a Progress)>,
    ) -> Result<()> {
        let mut unplaced = std::mem::take(&mut self.unplaced);
        unplaced.sort_by_key(|(range, _)| range.start);
        let Some((_, first)) = unplaced.first() else {
            return Ok(());
        };
        let what = first.message().to_owned();
        for (_, error) in unplaced {
            self.tell(Lost::nowhere(error));
        }
        for (n, size, progress) in volumes {
            if progress.pass > 0 {
                self.note_gap(n, Extent::new(0, size))?;
            } else if progress.is_unsure {
                self.note_gap(n, Extent::between(progress.end, Offset(size)))?;
            }
        }
        for (n, gaps) in std::mem::take(&mut self.gaps) {
            if !gaps.is_empty() {
                self.tell(Lost {
                    error: damaged(&format!("a lost record may belong here ({what})")),
                    place: Some((n, gaps.runs().to_vec())),
                    state: State::Unknown,
                });
            }
        }
        Ok(())
    }
}

impl Lost {
    pub(super) fn nowhere(error: Error) -> Self {
        Self {
            error,
            place: None,
            state: State::Unknown,
        }
    }
}
