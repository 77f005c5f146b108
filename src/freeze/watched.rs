//! Watching over a snapshot while it is read: it may run full, and what it held is lost then.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use holdstill_platform::device::Disk;

use crate::error::{Error, Kind, Result};
use crate::freeze::survey::Survey;
use crate::freeze::{Next, OnePass, Pass, Proof, Purpose, Still};
use crate::image::manifest::FreezeTimes;
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// How often to look.
const NAP: Duration = Duration::from_millis(100);

/// What is watched.
pub(super) trait Watching: fmt::Debug + Send + Sync {
    /// What the snapshot is called.
    fn name(&self) -> &str;

    /// One look: why the snapshot must be given up, if it must. `may_extend` comes with the looks taken
    /// while it is read: then one that is nearly full is extended, until that fails once, or given up.
    /// Without it, only what is lost already counts.
    ///
    /// # Errors
    /// If it cannot be looked at, or shows the instant no more.
    fn look(&self, may_extend: Option<&mut bool>) -> Result<Option<String>>;
}

/// A share in percent, rounded up.
pub(super) fn percent((used, of): (u64, u64)) -> u64 {
    used.saturating_mul(100).div_ceil(of.max(1))
}

/// A thread that looks at a snapshot every now and then.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    watching: Box<dyn Watching>,
    /// Why the snapshot was given up.
    trouble: OnceLock<(Kind, String)>,
    is_over: Mutex<bool>,
    wake: Condvar,
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// If no thread can be started, or the snapshot is lost already.
    pub(super) fn start(watching: Box<dyn Watching>) -> Result<Self> {
        let shared = Arc::new(Shared {
            watching,
            trouble: OnceLock::new(),
            is_over: Mutex::new(false),
            wake: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("holdstill-watch".to_owned())
            .spawn(move || theirs.run())
            .map_err(|error| Error::io("cannot start a thread", error))?;
        let watch = Self {
            shared,
            thread: Some(thread),
        };
        watch.look()?;
        Ok(watch)
    }

    /// Whether the snapshot was given up, as far as is known. Costs nothing.
    ///
    /// # Errors
    /// [`Kind::NoSpace`] if so.
    pub(super) fn check(&self) -> Result<()> {
        self.shared.trouble.get().map_or(Ok(()), |(kind, why)| {
            Err(
                Error::new(*kind, format!("the snapshot was given up: {why}"))
                    .on(self.shared.watching.name())
                    .hint("make room, or image it when less is written (but for a thin pool: --cow-size)"),
            )
        })
    }

    /// Looks right now.
    ///
    /// # Errors
    /// As [`check`](Self::check), or if the snapshot cannot be looked at.
    pub(super) fn look(&self) -> Result<()> {
        self.check()?;
        if let Some(why) = self.shared.watching.look(None)? {
            let _ = self.shared.trouble.set((Kind::NoSpace, why));
        }
        self.check()
    }
}

impl Shared {
    fn run(&self) {
        let mut may_extend = true;
        let mut is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        while !*is_over {
            drop(is_over);
            match self.watching.look(Some(&mut may_extend)) {
                Ok(None) => {}
                Ok(Some(why)) => {
                    let _ = self.trouble.set((Kind::NoSpace, why));
                    return;
                }
                Err(error) => {
                    let _ = self.trouble.set((error.kind(), error.to_string()));
                    return;
                }
            }
            is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.wake.wait_timeout(is_over, NAP);
            is_over = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *self
            .shared
            .is_over
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A snapshot's device, as long as the snapshot is whole.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) disk: Disk,
    pub(super) watch: Watch,
}

impl Watched {
    /// A pass over the snapshot, if there is one left.
    pub(super) fn pass<'a>(
        &'a self,
        survey: &'a Survey,
        purpose: Option<Purpose>,
    ) -> Result<Option<Pass<'a>>> {
        self.watch.look()?;
        Ok(purpose.map(|purpose| Pass {
            volume: 0,
            source: self,
            walk: Box::new(move |sink| {
                survey.walk(&self.disk, &mut |run| {
                    self.watch.check()?;
                    sink(run)
                })
            }),
            purpose,
        }))
    }
}

impl ReadAt for Watched {
    fn len(&self) -> ByteLen {
        ReadAt::len(&self.disk)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        self.watch.check()?;
        let read = ReadAt::read_exact_at(&self.disk, buf, offset);
        // A snapshot that overflows fails to be read everywhere at once: that is not a bad block.
        read.or_else(|error| self.watch.look().and(Err(error)))
    }
}

/// What a run has made, and takes away again.
pub(super) trait Undo: fmt::Debug {
    /// Takes it away; once that is done, does nothing.
    ///
    /// # Errors
    /// If it is still there.
    fn undo(&mut self) -> Result<()>;
}

/// A source whose snapshot is read.
#[derive(Debug)]
pub(super) struct WatchedSnapshot<M> {
    pub(super) source: Watched,
    pub(super) survey: Survey,
    pub(super) instant: jiff::Timestamp,
    pub(super) freezes: Vec<FreezeTimes>,
    pub(super) passes: OnePass,
    // Dropped last: it is undone when nobody reads the snapshot any more.
    pub(super) made: M,
}

impl<M: Undo> Still for WatchedSnapshot<M> {
    fn surveys(&self) -> &[Survey] {
        std::slice::from_ref(&self.survey)
    }

    fn next(&mut self, _: &dyn Progress) -> Result<Next<'_>> {
        let purpose = self.passes.next();
        Ok(self.source.pass(&self.survey, purpose)?.into())
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let Self {
            source,
            survey,
            instant,
            freezes,
            mut made,
            ..
        } = *self;
        // After the last read: whatever was read before, the snapshot was whole then.
        source.watch.look()?;
        drop(source);
        if let Err(error) = made.undo() {
            progress.warn(&format!("the snapshot could not be removed: {error}"));
        }
        Ok(Proof {
            grade: survey.grade,
            instant,
            freezes,
            commit: None,
        })
    }
}
