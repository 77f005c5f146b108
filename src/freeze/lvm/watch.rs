//! Watching over a snapshot while it is read: how full it is, or its pool.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use holdstill_platform::lvm::{self, Fill, LogicalVolume, PoolFill, Snapshot};
use holdstill_platform::node::DeviceNumber;

use super::{most_extents, percent};
use crate::error::{Error, Kind, Result};
use crate::freeze::CowRoom;

/// How often to look.
const NAP: Duration = Duration::from_millis(100);

/// A thick snapshot is extended when so full, and given up when so full and nothing is left to extend
/// it with; in percent.
const EXTEND_AT: u64 = 60;
const GIVE_UP_AT: u64 = 96;

/// A pool so full is given up: writers need what is left. In percent.
const MOST_DATA: u64 = 98;
const MOST_METADATA: u64 = 95;

/// What is watched.
#[derive(Clone, Debug)]
pub(super) enum Watching {
    /// The copy-on-write store of a thick snapshot.
    Thick {
        volume: LogicalVolume,
        snapshot: Snapshot,
        /// Extents to add each time; 0: the user said how much it gets.
        step: u64,
        /// Where to add them.
        on: Option<PathBuf>,
    },
    /// The pool of a thin one.
    Thin {
        snapshot: Snapshot,
        pool: DeviceNumber,
    },
    /// A thin one whose pool is not known: the kernel says so when it cannot be read.
    Nothing { snapshot: Snapshot },
}

impl Watching {
    pub(super) fn of(volume: &LogicalVolume, snapshot: &Snapshot, cow: &CowRoom) -> Result<Self> {
        let snapshot = snapshot.clone();
        if volume.kind == lvm::Kind::Thick {
            let step = match cow.size {
                Some(_) => 0,
                None => most_extents(volume).div_ceil(8),
            };
            return Ok(Self::Thick {
                volume: volume.clone(),
                snapshot,
                step,
                on: cow.device.clone(),
            });
        }
        Ok(match lvm::pool_of(snapshot.device)? {
            Some((pool, _)) => Self::Thin { snapshot, pool },
            None => Self::Nothing { snapshot },
        })
    }

    fn snapshot(&self) -> &Snapshot {
        match self {
            Self::Thick { snapshot, .. } | Self::Thin { snapshot, .. } => snapshot,
            Self::Nothing { snapshot } => snapshot,
        }
    }

    /// One look: why the snapshot must be given up, if it must. With `may_extend`, a thick one is
    /// extended when that is due, until that fails once.
    fn look(&self, may_extend: Option<&mut bool>) -> Result<Option<String>> {
        match self {
            Self::Nothing { .. } => Ok(None),
            Self::Thin { pool, .. } => thin_trouble(*pool),
            Self::Thick {
                volume,
                snapshot,
                step,
                on,
            } => {
                let full = match lvm::fill(snapshot.device)? {
                    Fill::Used { sectors, of } => percent((sectors, of)),
                    Fill::Lost => {
                        return Ok(Some("it overflowed, and what it held is lost".to_owned()));
                    }
                };
                let Some(may_extend) = may_extend.filter(|_| full >= EXTEND_AT) else {
                    return Ok(None);
                };
                if *may_extend && *step > 0 {
                    let now = LogicalVolume::of_name(&volume.group, &volume.name)?;
                    let free = now.map_or(0, |now| now.free_extents);
                    let extended = match free.min(*step) {
                        0 => false,
                        extents => snapshot.extend(extents, on.as_deref()).is_ok(),
                    };
                    if extended {
                        return Ok(None);
                    }
                    *may_extend = false;
                }
                Ok((full >= GIVE_UP_AT)
                    .then(|| format!("it is {full} % full, and there is no room to extend it")))
            }
        }
    }
}

fn thin_trouble(pool: DeviceNumber) -> Result<Option<String>> {
    let PoolFill {
        data,
        metadata,
        is_writable,
        ..
    } = lvm::pool_fill(pool)?;
    Ok(if !is_writable {
        Some("its pool has no room left and takes no more writes".to_owned())
    } else if percent(data) >= MOST_DATA {
        Some(format!("{} % of its pool's data are in use", percent(data)))
    } else if percent(metadata) >= MOST_METADATA {
        Some(format!(
            "{} % of its pool's metadata are in use",
            percent(metadata)
        ))
    } else {
        None
    })
}

/// A thread that looks at a snapshot every now and then.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    watching: Watching,
    /// Why the snapshot was given up.
    trouble: OnceLock<String>,
    is_over: Mutex<bool>,
    wake: Condvar,
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// If no thread can be started, or the snapshot is lost already.
    pub(super) fn start(watching: Watching) -> Result<Self> {
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
        self.shared.trouble.get().map_or(Ok(()), |why| {
            Err(
                Error::new(Kind::NoSpace, format!("the snapshot was given up: {why}"))
                    .on(&self.shared.watching.snapshot().name)
                    .hint("make room, or image it when less is written (a thick one: --cow-size)"),
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
            let _ = self.shared.trouble.set(why);
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
                    let _ = self.trouble.set(why);
                    return;
                }
                Err(error) => {
                    let _ = self.trouble.set(error.to_string());
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
