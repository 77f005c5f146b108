//! How the library tells what it does: it never prints.

use crate::error::{Error, Kind, Result};
use crate::image::damage::Damage;
use crate::image::manifest::FreezeTimes;
use crate::units::ByteLen;

/// Something worth telling while a run goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// What is going to happen, in a few words.
    Plan(&'a str),
    /// The source holds still from now on, or its writes are being tracked up to the instant.
    Frozen {
        /// The instant (RFC 3339).
        instant: &'a str,
    },
    /// Writers go on.
    Thawed(&'a FreezeTimes),
    /// Something the user should know.
    Warning(&'a str),
    /// What a command of the user printed.
    Hook {
        /// `pre` or `post`.
        phase: &'a str,
        /// Lines, as they were printed.
        output: &'a str,
    },
    /// Part of an image is damaged, and reading goes on behind it.
    Damaged(&'a Damage),
}

/// Listens to a run. Called from several threads.
pub trait Progress: Sync {
    /// Something happened.
    fn event(&self, event: &Event<'_>);

    /// About how many bytes there are to do; may be said again when more is known.
    fn total(&self, bytes: ByteLen);

    /// So many more bytes are done.
    fn advance(&self, bytes: ByteLen);

    /// Whether the run was asked to end, and how.
    fn stop(&self) -> Option<Stop>;

    /// Called while a tracked source is frozen for the last time and everything of it was read, right
    /// before it thaws. Must not allocate, write or wait. For tests, which compare the source with
    /// its copy at that very instant.
    fn while_frozen(&self) {}

    /// While something is frozen (from a call with `true` to one with `false`; there can be several at a
    /// time), nothing may be written to what might lie on it: a terminal, a log. What is to be shown
    /// then has to wait. Called right before a freeze and right after the thaw; where a run fails in between,
    /// it thaws on its way out without this call.
    fn hush(&self, _is_frozen: bool) {}

    /// Shorthand for a warning.
    fn warn(&self, text: &str) {
        self.event(&Event::Warning(text));
    }

    /// Ends the run if it was asked to.
    ///
    /// # Errors
    /// [`Kind::Interrupted`] or [`Kind::Terminated`] if so.
    fn check(&self) -> Result<()> {
        match self.stop() {
            None => Ok(()),
            Some(Stop::Interrupt) => Err(Error::new(Kind::Interrupted, "interrupted")),
            Some(Stop::Terminate) => Err(Error::new(Kind::Terminated, "asked to end")),
        }
    }
}

/// How a run was asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By the user at the terminal (SIGINT).
    Interrupt,
    /// By the system (SIGTERM, SIGHUP).
    Terminate,
}

/// Listens to nothing and never ends a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: &Event<'_>) {}
    fn total(&self, _: ByteLen) {}
    fn advance(&self, _: ByteLen) {}
    fn stop(&self) -> Option<Stop> {
        None
    }
}
