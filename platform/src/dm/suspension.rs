//! When a mapped device is suspended: between freezing the filesystem on it and the swap of its table,
//! while a tool makes a snapshot.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crate::error::{Context, Result};
use crate::node::DeviceNumber;
use crate::urgent::become_urgent;

/// How often to look.
const NAP: Duration = Duration::from_micros(100);

/// Real-time priority of the thread that looks: on a busy machine it would else come too late.
const PRIORITY: i32 = 10;

/// That a device was suspended, as far as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspended {
    /// A moment within the last suspension: nothing was written to the device just then.
    pub at: SystemTime,
    /// From the first sight of any suspension to the first sight of its end, all together.
    pub total: Duration,
}

/// Looks at a mapped device all the time (`dm/suspended`,
/// Documentation/ABI/testing/sysfs-block-dm).
#[derive(Debug)]
pub struct SuspensionWatch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<Suspended>>,
}

impl SuspensionWatch {
    /// Begins to look.
    ///
    /// # Errors
    /// If it is no mapped device.
    pub fn start(device: DeviceNumber) -> Result<Self> {
        let path = PathBuf::from(format!("/sys/dev/block/{device}/dm/suspended"));
        let file = File::open(&path).context("cannot open", &path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("holdstill-dm".to_owned())
            .spawn(move || look(&file, &told))
            .context("cannot start", "a thread")?;
        Ok(Self { stop, thread })
    }

    /// What was seen; `None` if it was never seen suspended.
    pub fn finish(self) -> Option<Suspended> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().ok().flatten()
    }
}

fn look(file: &File, stop: &AtomicBool) -> Option<Suspended> {
    if let Err(errno) = become_urgent(PRIORITY) {
        log::debug!("no real-time priority: {errno}");
    }
    let mut seen: Option<Suspended> = None;
    let mut since: Option<Instant> = None;
    loop {
        let is_last = stop.load(Ordering::Acquire);
        let mut value = [0];
        let is_suspended = file.read_at(&mut value, 0).is_ok() && value == *b"1";
        match (is_suspended, since) {
            (true, None) => {
                since = Some(Instant::now());
                let total = seen.map_or(Duration::ZERO, |seen| seen.total);
                let at = SystemTime::now();
                seen = Some(Suspended { at, total });
            }
            (false, Some(begin)) => {
                since = None;
                if let Some(seen) = &mut seen {
                    seen.total += begin.elapsed();
                }
            }
            _ => {}
        }
        if is_last {
            return seen;
        }
        std::thread::sleep(NAP);
    }
}
