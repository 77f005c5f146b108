//! Damage in an image that reading goes on behind: how it is taken in.

use std::sync::{Mutex, PoisonError};

use super::receive::Receive;
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::image::damage::{Damage, State};
use crate::image::reader::Lost;
use crate::progress::{Event, Progress};
use crate::units::Offset;

/// Takes in what a receiver would fail on.
#[allow(
    missing_debug_implementations,
    reason = "a receiver need not be printable"
)]
pub struct Tolerant<'a> {
    inner: &'a dyn Receive,
    progress: &'a dyn Progress,
    /// Lost blocks are handed on as zeros.
    zeroes: bool,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    count: u64,
    /// The first by its place in the image.
    first: Option<Error>,
}

impl<'a> Tolerant<'a> {
    /// In front of `inner`. With `zeroes`, lost blocks are handed on as zeros.
    pub fn new(inner: &'a dyn Receive, zeroes: bool, progress: &'a dyn Progress) -> Self {
        Self {
            inner,
            progress,
            zeroes,
            found: Mutex::default(),
        }
    }

    /// What was found, given how the reading ended: with what the image says at its end, with `None`
    /// if damage keeps that back, or with an error that has nothing to do with damage.
    ///
    /// # Errors
    /// That error.
    pub fn finish<T>(self, read: Result<T>) -> Result<(Option<T>, Damages)> {
        let mut found = self
            .found
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let end = match read {
            Ok(end) => Some(end),
            Err(error) if matches!(error.kind(), Kind::Damaged | Kind::Truncated) => {
                found.count = found.count.max(1);
                found.remember(error);
                None
            }
            Err(error) => return Err(error),
        };
        let damages = Damages {
            count: found.count,
            first: found.first,
        };
        Ok((end, damages))
    }
}

impl Found {
    fn remember(&mut self, error: Error) {
        let is_first = self
            .first
            .as_ref()
            .is_none_or(|first| error.offset() < first.offset());
        if is_first {
            self.first = Some(error);
        }
    }
}

/// All damage of an image.
#[derive(Debug)]
pub struct Damages {
    count: u64,
    first: Option<Error>,
}

impl Damages {
    /// Nothing is damaged.
    pub fn none() -> Self {
        Self {
            count: 0,
            first: None,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The damage as an error: the first place, how many there are, and `hint`.
    ///
    /// # Errors
    /// Unless nothing is damaged.
    pub fn as_failure(self, hint: &str) -> Result<()> {
        let places = match self.count {
            1 => "1 place is".to_owned(),
            count => format!("{count} places are"),
        };
        match self.first {
            None => Ok(()),
            Some(first) => Err(first.hint(format!("{places} damaged: {hint}"))),
        }
    }
}

impl Receive for Tolerant<'_> {
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        self.inner.data(volume, offset, bytes)
    }

    fn zeros(&self, volume: u32, extent: Extent) -> Result<()> {
        self.inner.zeros(volume, extent)
    }

    fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
        self.inner.trim(volume, extent)
    }

    fn abandon(&self) {
        self.inner.abandon();
    }

    fn damaged(&self, lost: Lost) -> Result<()> {
        let damage = Damage::of(&lost);
        self.progress.event(&Event::Damaged(&damage));
        let is_lost = damage.state == State::Lost;
        {
            let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            found.count += 1;
            found.remember(lost.error);
        }
        match lost.place {
            Some((volume, extents)) if self.zeroes && is_lost => extents
                .into_iter()
                .try_for_each(|extent| self.inner.zeros(volume, extent)),
            _ => Ok(()),
        }
    }
}
