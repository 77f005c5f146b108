//! The moment that the copy shows: pins are taken, and a window is opened on the commit that holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Live;
use super::captured::Captured;
use super::checked::Checked;
use super::pins::Pins;
use super::proof;
use super::rounds::too_many_commits;
use super::stream::Extents;
use super::window::{Seen, Sight, Window};
use crate::error::{Error, Kind, Result};
use crate::freeze::final_read::{ReadPart, Wanted};
use crate::freeze::freezer::{Expect, Freezer};
use crate::freeze::instant::{self, AtInstant};
use crate::freeze::mounted::milliseconds;
use crate::image::manifest::{CommitProof, FreezeTimes};
use crate::progress::{Event, Progress};
use crate::units::ByteLen;

/// How often a window is opened: each time with new pins.
const MOST_WINDOWS: u32 = 6;

/// And where nobody is made to wait for it.
const MOST_WINDOWS_UNFROZEN: u32 = 24;

/// Data that has checksums is read after the freeze if there is more than this of it: nothing overwrites it
/// before the next commit.
const IN_FREEZE: ByteLen = ByteLen::mib(16);

/// The moment that the copy shows.
pub(super) struct Moment {
    pub(super) seen: Arc<Seen>,
    pub(super) instant: jiff::Timestamp,
    /// The devices as sources of pinned data, by volume.
    pub(super) checked: Vec<Checked>,
    /// What the window gave, by volume.
    pub(super) captured: Vec<Captured>,
    /// What is wanted of pinned data, if not all is.
    pub(super) only: Option<Extents>,
    /// What was copied of it, in bytes, by volume.
    pub(super) given: Vec<AtomicU64>,
    /// The chunks that pinned data was copied from, by number.
    pub(super) chunks: Vec<AtomicBool>,
}

/// What is seen through a window that is opened under a freeze.
pub(super) struct View {
    window: Window,
    /// What there was to see while nobody wrote, and whether all of it is known to be of one commit.
    looked: Option<(Result<Sight>, Option<Result<bool>>)>,
    /// A commit that was seen whole.
    seen: Option<Seen>,
}

impl Live {
    /// Takes new pins, for a window that is opened next.
    ///
    /// # Errors
    /// If something moves what is pinned.
    fn begin_window(&mut self, progress: &dyn Progress) -> Result<Window> {
        self.run.check_guard()?;
        progress.check()?;
        proof::nothing_moves(&self.filesystem)?;
        self.windows += 1;
        match self.freezes_it {
            true => self.freezer.sync_within_budget(progress)?,
            false => self.filesystem.sync()?,
        }
        // The old ones stay: until the cleaner has come by, the commit lists what only they refer to.
        self.old_pins.push(std::mem::take(&mut self.pins));
        self.pins = Pins::take(&self.filesystem, self.only, &self.run)?;
        // Without it, the commit that is looked at may show them still, with their names.
        self.filesystem.sync()?;
        Ok(Window::new(
            &self.devices,
            self.only,
            self.round.until(),
            self.room,
        ))
    }

    /// Looks for a moment without a freeze. Whether there is one now; if not, another round is needed.
    ///
    /// # Errors
    /// If no window holds.
    pub(super) fn look_unfrozen(&mut self, progress: &dyn Progress) -> Result<bool> {
        if self.windows == 0 {
            self.run.before_freeze(progress)?;
        }
        let mut in_place = 0;
        while self.windows < MOST_WINDOWS_UNFROZEN && in_place < MOST_WINDOWS {
            let mut window = self.begin_window(progress)?;
            let instant = jiff::Timestamp::now();
            let mut seen = match window.look(&self.pins, self.room)? {
                Sight::Moved => continue,
                Sight::TooMuch => return Ok(false),
                Sight::Commit(seen) => *seen,
            };
            // Of what is overwritten in place, nobody could tell whether it is as it was at the commit.
            if seen.has_in_place {
                in_place += 1;
            } else if window.confirm(&mut seen)? {
                self.run.after_thaw(progress);
                self.enter(seen, instant, progress)?;
                progress.event(&Event::Frozen {
                    instant: &instant.to_string(),
                });
                return Ok(true);
            }
        }
        if in_place == 0 {
            return Err(too_many_commits().on(&self.source.path));
        }
        let what = "files without copy-on-write are written to all the while: without a freeze they would \
                    be newer than the rest";
        Err(Error::new(Kind::Inconsistent, what)
            .on(&self.source.path)
            .hint("leave out --no-freeze: a freeze of milliseconds is all it takes"))
    }

    /// From now on this is the moment that the copy shows.
    fn enter(
        &mut self,
        seen: Seen,
        instant: jiff::Timestamp,
        progress: &dyn Progress,
    ) -> Result<()> {
        self.moment = Some(self.moment_of(seen, instant, progress)?);
        self.count_used()
    }

    fn moment_of(
        &self,
        seen: Seen,
        instant: jiff::Timestamp,
        progress: &dyn Progress,
    ) -> Result<Moment> {
        let seen = Arc::new(seen);
        let mut captured = Vec::new();
        let mut checked = Vec::new();
        for volume in 0..self.surveys.len() {
            let (id, size) = self.devices.id_and_size(volume);
            captured.push(Captured::on(&seen, volume, id, size)?);
            checked.push(Checked::new(
                Arc::clone(&self.devices),
                volume,
                Arc::clone(&self.filesystem),
                Arc::clone(&seen),
                Arc::clone(&self.checks),
            )?);
        }
        let pin = self.only.and_then(|only| self.pins.of(only));
        let only = pin.map(|pin| Extents::of(pin, self.room)).transpose()?;
        if only.as_ref().is_some_and(Option::is_none) {
            progress.warn(
                "the subvolume has more extents than there is memory for: all data is copied",
            );
        }
        let chunks = seen.commit.chunks.chunks().iter();
        Ok(Moment {
            only: only.flatten(),
            given: checked.iter().map(|_| AtomicU64::new(0)).collect(),
            chunks: chunks.map(|_| AtomicBool::new(false)).collect(),
            seen,
            instant,
            checked,
            captured,
        })
    }

    /// What proves the copy.
    pub(super) fn commit_proof(&self, moment: &Moment) -> CommitProof {
        let Seen { commit, .. } = &*moment.seen;
        let sum = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let blocks = moment.seen.blocks.len() as u64;
        let uuid = self
            .surveys
            .first()
            .and_then(|survey| survey.info.as_ref()?.uuid.clone());
        CommitProof {
            fsid: uuid.unwrap_or_default(),
            generation: commit.geometry.generation,
            devices: self.surveys.len() as u64,
            subvolumes: moment.seen.subvolumes as u64,
            pinned: self.pins.iter().count() as u64,
            window_ms: milliseconds(moment.seen.took),
            windows: self.windows,
            window_tree_bytes: blocks * commit.geometry.node_len().0,
            window_data_bytes: moment.seen.data_len().0,
            checked_bytes: sum(&self.checks.right),
            unchecked_bytes: sum(&self.checks.without),
            mended_sectors: sum(&self.checks.mended),
            gone_sectors: sum(&self.checks.gone),
            exclusive_operation: "none".to_owned(),
        }
    }
}

/// Under the freeze, the window is looked through once more.
impl AtInstant for Live {
    fn freezer(&self) -> Arc<Freezer> {
        Arc::clone(&self.freezer)
    }

    fn prepare(&mut self, _: ByteLen, progress: &dyn Progress) -> Result<Option<Wanted>> {
        if self.windows == MOST_WINDOWS {
            return Err(too_many_commits().on(&self.source.path));
        }
        let mut window = self.begin_window(progress)?;
        // Fills its cache.
        if let Sight::Commit(seen) = window.look(&self.pins, self.room)? {
            window.keep(*seen);
        }
        self.view = Some(View {
            window,
            looked: None,
            seen: None,
        });
        Ok(None)
    }

    /// It is done when the window is opened: what is dirty then, the freeze writes out.
    fn sync(&self, _: &dyn Progress) -> Result<()> {
        Ok(())
    }

    fn capture(&mut self, _: &instant::Moment<'_>) {
        // The second time round, nothing is left for after the freeze.
        let most = match self.windows {
            1 => IN_FREEZE,
            _ => self.room,
        };
        let Some(View { window, looked, .. }) = &mut self.view else {
            return;
        };
        let mut sight = window.look(&self.pins, most);
        // As long as nobody writes, no commit comes. What is still to be read is read afterwards.
        let is_whole = match &mut sight {
            Ok(Sight::Commit(seen)) if seen.is_complete() => Some(window.confirm(seen)),
            _ => None,
        };
        *looked = Some((sight, is_whole));
    }

    fn expects(&self) -> Expect {
        Expect::Discards
    }

    fn judge(&mut self, times: FreezeTimes) -> Result<bool> {
        self.freezes.push(times);
        let missing = || Error::new(Kind::Failed, "the window was never opened");
        let view = self.view.as_mut().ok_or_else(missing)?;
        let (sight, is_whole) = view.looked.take().ok_or_else(missing)?;
        let mut seen = match sight? {
            Sight::Moved => return Ok(false),
            Sight::TooMuch => {
                self.begin_round(0)?;
                return Ok(false);
            }
            Sight::Commit(seen) => *seen,
        };
        let is_whole = match is_whole {
            Some(is_whole) => is_whole?,
            None => view.window.confirm(&mut seen)?,
        };
        view.seen = is_whole.then_some(seen);
        Ok(is_whole)
    }

    fn keep(
        &mut self,
        instant: jiff::Timestamp,
        _: Option<ReadPart>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let missing = || Error::new(Kind::Failed, "the window was never opened");
        let view = self.view.take().ok_or_else(missing)?;
        self.enter(view.seen.ok_or_else(missing)?, instant, progress)?;
        self.begin_data();
        Ok(())
    }

    fn discard(&mut self, _: Option<ReadPart>) {
        self.view = None;
    }
}
