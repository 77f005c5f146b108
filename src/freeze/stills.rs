//! Sources of one run, side by side: each is brought to the point where only the freeze is missing, then
//! all are frozen together.
//!
//! What takes room or makes writers wait is copied before that, and has an instant of its own. What nobody
//! uses is copied after it, and held from before it to the end, so that its instant is the same.

use super::instant;
use super::{Next, Pass, Proof, Still, Turn};
use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::progress::Progress;
use crate::units::ByteLen;

/// So often all get their turn before the instant, until none has anything left to copy.
const MOST_LAPS: u32 = 5;

/// Who copies what the sources give.
pub trait Copier {
    /// Copies, or compares, a pass over a source of this number.
    ///
    /// # Errors
    /// If reading or writing fails.
    fn pass(&mut self, still: usize, pass: Pass<'_>) -> Result<()>;

    /// That pass is over.
    ///
    /// # Errors
    /// If what was copied is wrong.
    fn passed(&mut self, _still: &dyn Still) -> Result<()> {
        Ok(())
    }
}

/// A source that was copied.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// What it is worth.
    pub proof: Proof,
    /// What is in use of each of its volumes.
    pub used: Vec<ByteLen>,
}

/// Tells a run how often something will be frozen, or held, by itself; whether its hooks stand around the
/// copy of what nobody uses. `turns` has that of each source.
pub fn expect_hooks(run: &Session, turns: &[Turn]) -> bool {
    let is_by_itself = |turn: &&Turn| matches!(turn, Turn::Held | Turn::Snapshot);
    let hooks_around_copy = turns.iter().all(|turn| *turn == Turn::Unused);
    run.expect_freezes(match hooks_around_copy {
        true => turns.len(),
        false => turns.iter().filter(is_by_itself).count(),
    });
    hooks_around_copy
}

/// Copies all sources, each when it is its turn, and lets them go. Returns what they are worth, in their order.
///
/// # Errors
/// If one moved after all, or copying fails.
pub fn copy_all(
    stills: Vec<Box<dyn Still>>,
    turns: &[Turn],
    run: &Session,
    copier: &mut dyn Copier,
    progress: &dyn Progress,
) -> Result<Vec<Held>> {
    let of = |wanted: Turn| -> Vec<usize> {
        let numbers = 0..turns.len();
        numbers.filter(|number| turns[*number] == wanted).collect()
    };
    let mut sources = Sources {
        held: stills.iter().map(|_| None).collect(),
        stills: stills.into_iter().map(Some).collect(),
        copier,
        progress,
    };
    for number in of(Turn::Held).into_iter().chain(of(Turn::Snapshot)) {
        sources.end(number)?;
    }
    let shared = of(Turn::Shared);
    let mut instant = None;
    if !shared.is_empty() {
        instant = Some(sources.share_an_instant(&shared, run)?);
    }
    for number in shared {
        sources.end(number)?;
    }
    let unused = of(Turn::Unused);
    for number in &unused {
        sources.end(*number)?;
    }
    // All were taken before the first was copied, and none was let go before the shared instant.
    let taken = unused
        .iter()
        .filter_map(|number| sources.held[*number].as_ref());
    let instant = instant.or(taken.map(|held| held.proof.instant).max());
    for number in unused {
        if let (Some(instant), Some(held)) = (instant, &mut sources.held[number]) {
            held.proof.instant = instant;
        }
    }
    let missing = || Error::new(Kind::Failed, "a source was not copied");
    let held = sources.held.into_iter();
    held.map(|held| held.ok_or_else(missing)).collect()
}

struct Sources<'a> {
    /// Those that were not let go.
    stills: Vec<Option<Box<dyn Still>>>,
    held: Vec<Option<Held>>,
    copier: &'a mut dyn Copier,
    progress: &'a dyn Progress,
}

impl Sources<'_> {
    /// Copies what a source has until it waits for the instant, or has nothing left. Whether there was
    /// anything.
    fn copy(&mut self, number: usize) -> Result<bool> {
        let mut has_copied = false;
        while let Some(still) = &mut self.stills[number] {
            match still.next(self.progress)? {
                Next::Pass(pass) => self.copier.pass(number, pass)?,
                Next::Ready | Next::Over => break,
            }
            self.copier.passed(&**still)?;
            has_copied = true;
        }
        Ok(has_copied)
    }

    /// Copies the rest of a source, and lets it go.
    fn end(&mut self, number: usize) -> Result<()> {
        self.copy(number)?;
        let Some(still) = self.stills[number].take() else {
            return Ok(());
        };
        let used = still.surveys().iter().map(|survey| survey.bytes).collect();
        let proof = still.finish(self.progress)?;
        self.held[number] = Some(Held { proof, used });
        Ok(())
    }

    /// Gives all their turn until none has anything left to copy.
    fn copy_rounds(&mut self, numbers: &[usize]) -> Result<()> {
        for _ in 0..MOST_LAPS {
            let mut has_copied = false;
            for number in numbers {
                has_copied |= self.copy(*number)?;
            }
            // Nobody made the only one wait.
            if !has_copied || numbers.len() == 1 {
                break;
            }
        }
        Ok(())
    }

    fn share_an_instant(&mut self, numbers: &[usize], run: &Session) -> Result<jiff::Timestamp> {
        run.expect_freezes(1);
        loop {
            self.copy_rounds(numbers)?;
            run.before_freeze(self.progress)?;
            for number in numbers {
                let Some(still) = &mut self.stills[*number] else {
                    continue;
                };
                if let Some(pass) = still.last_round(self.progress)? {
                    self.copier.pass(*number, pass)?;
                }
                self.copier.passed(&**still)?;
            }
            let mut sources: Vec<_> = self
                .stills
                .iter_mut()
                .enumerate()
                .filter(|(number, _)| numbers.contains(number))
                .filter_map(|(_, still)| still.as_mut()?.at_instant())
                .collect();
            if let Some(instant) = instant::take(&mut sources, run, self.progress)? {
                return Ok(instant);
            }
        }
    }
}
