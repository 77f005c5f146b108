//! The moment that the copy shows: pins are taken, and a window is opened on the commit that holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use holdstill_platform::memory::LockedProcess;

use super::Live;
use super::captured::Captured;
use super::checked::Checked;
use super::pins::Pins;
use super::proof;
use super::rounds::too_many_commits;
use super::stream::Extents;
use super::window::{Seen, Sight, Window};
use crate::error::{Error, Kind, Result};
use crate::freeze::instant::Expect;
use crate::freeze::mounted::{self, milliseconds};
use crate::image::manifest::{CommitProof, FreezeTimes};
use crate::progress::{Event, Progress};
use crate::units::ByteLen;

/// When the freeze ends at the latest, by the guard's hand.
const DEADLINE: Duration = Duration::from_secs(10);

/// How often a window is opened: each time with new pins.
const MOST_WINDOWS: u32 = 6;

/// And where nobody is made to wait for it.
const MOST_WINDOWS_UNFROZEN: u32 = 24;

/// Data that has checksums is read after the freeze if there is more than this of it: nothing overwrites it
/// before the next commit.
const IN_FREEZE: ByteLen = ByteLen::mib(16);

/// What one window gave, and how long writers were blocked for it.
struct Opened {
    /// `None` if it did not hold.
    moment: Option<Moment>,
    freeze: Option<FreezeTimes>,
    /// More changed since the last round than there is memory for.
    is_too_much: bool,
    /// Without a freeze, data was seen that may be newer than the commit.
    has_in_place: bool,
}

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

impl Live {
    /// Opens a window, with new pins. Whether there is a moment now; if not, another round is needed.
    ///
    /// # Errors
    /// If no window holds.
    pub(super) fn open_window(&mut self, progress: &dyn Progress) -> Result<bool> {
        if self.windows == 0 {
            self.run.before_freeze(progress)?;
        }
        self.run.check_guard()?;
        let mut in_place = 0;
        let most = match self.freezes_it {
            true => MOST_WINDOWS,
            false => MOST_WINDOWS_UNFROZEN,
        };
        while self.windows < most && in_place < MOST_WINDOWS {
            progress.check()?;
            proof::nothing_moves(&self.filesystem)?;
            self.windows += 1;
            match self.freezes_it {
                true => mounted::sync_within_budget(self.freezer.point(), &self.source, progress)?,
                false => self.filesystem.sync()?,
            }
            // The old ones stay: until the cleaner has come by, the commit lists what only they refer to.
            self.old_pins.push(std::mem::take(&mut self.pins));
            self.pins = Pins::take(&self.filesystem, self.only, &self.run)?;
            // Without it, the commit that is looked at may show them still, with their names.
            self.filesystem.sync()?;
            let opened = self.look_through_window(progress)?;
            if let Some(times) = opened.freeze {
                progress.event(&Event::Thawed(&times));
                self.freezes.push(times);
            }
            in_place += u32::from(opened.has_in_place);
            if opened.is_too_much {
                return Ok(false);
            }
            if let Some(moment) = opened.moment {
                self.run.after_thaw(progress);
                progress.event(&Event::Frozen {
                    instant: &moment.instant.to_string(),
                });
                self.moment = Some(moment);
                self.count_used()?;
                return Ok(true);
            }
        }
        let error = match in_place {
            0 => too_many_commits(),
            _ => Error::new(
                Kind::Inconsistent,
                "files without copy-on-write are written to all the while: without a freeze they would \
                 be newer than the rest",
            )
            .hint("leave out --no-freeze: a freeze of milliseconds is all it takes"),
        };
        Err(error.on(&self.source.path))
    }

    fn look_through_window(&self, progress: &dyn Progress) -> Result<Opened> {
        let mut opened = Opened {
            moment: None,
            freeze: None,
            is_too_much: false,
            has_in_place: false,
        };
        let mut window = Window::new(
            &self.devices,
            &self.pins,
            self.only,
            self.round.until(),
            self.room,
        );
        let mut instant = jiff::Timestamp::now();
        let mut is_whole = None;
        let mut sight = window.look(self.room)?;
        if self.freezes_it {
            if let Sight::Commit(seen) = sight {
                window.keep(*seen);
            }
            // The second time round, nothing is left for after the freeze.
            let most = match self.windows {
                1 => IN_FREEZE,
                _ => self.room,
            };
            let locked = LockedProcess::new()?;
            let mut frozen = self.freezer.freeze(DEADLINE, progress)?;
            instant = jiff::Timestamp::now();
            frozen.settle();
            let mut looked = window.look(most);
            // As long as nobody writes, no commit comes. What is still to be read is read afterwards.
            is_whole = match &mut looked {
                Ok(Sight::Commit(seen)) if seen.is_complete() => Some(window.confirm(seen)),
                _ => None,
            };
            let read_ms = milliseconds(frozen.held());
            progress.while_frozen();
            let thawed = frozen.thaw(Expect::Discards, progress)?;
            drop(locked);
            opened.freeze = Some(mounted::times("final", &thawed, 0.0, read_ms));
            sight = looked?;
        }
        let mut seen = match sight {
            Sight::Moved => return Ok(opened),
            Sight::TooMuch => {
                opened.is_too_much = true;
                return Ok(opened);
            }
            Sight::Commit(seen) => *seen,
        };
        let is_whole = match is_whole {
            Some(is_whole) => is_whole?,
            // Of what is overwritten in place, nobody could tell whether it is as it was at the commit.
            None if !self.freezes_it && seen.has_in_place => {
                opened.has_in_place = true;
                false
            }
            None => window.confirm(&mut seen)?,
        };
        if is_whole {
            opened.moment = Some(self.moment_of(seen, instant, progress)?);
        }
        Ok(opened)
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
