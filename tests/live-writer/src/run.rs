//! The run: prepares the folder, starts the threads, and stops them at the end.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::config::{Config, Kind};
use crate::journal::Recorder;
use crate::{about, append, churn, orphans, pair, random, sqlite};

/// The folder in which nameless files are made.
const ORPHANS: &str = "orphans";

/// What a thread needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    /// The thread's index.
    pub(crate) index: usize,
    /// Its file or folder.
    pub(crate) path: PathBuf,
    /// The other file of a pair.
    pub(crate) second: PathBuf,
    /// The run's configuration.
    pub(crate) config: Arc<Config>,
    /// Where it reports to.
    pub(crate) journal: Recorder,
    stop: Arc<AtomicBool>,
    started: Arc<Vec<AtomicBool>>,
}

/// `f_type` of a btrfs (statfs(2)).
const BTRFS_SUPER_MAGIC: i64 = 0x9123_683e;

impl Task {
    /// Whether it is time to stop.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Rests between two writes, if the run is a light one, or while a btrfs is nearly full: there, what is
    /// overwritten while a snapshot has it is freed only some time later.
    pub(crate) fn pause(&self) {
        if self.config.light {
            std::thread::sleep(Duration::from_millis(20));
        }
        while self.is_short_of_room() && !self.stopped() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn is_short_of_room(&self) -> bool {
        rustix::fs::statfs(&self.path)
            .is_ok_and(|stat| stat.f_type == BTRFS_SUPER_MAGIC && stat.f_bavail * 5 < stat.f_blocks)
    }

    /// Says that the thread has written.
    pub(crate) fn progressed(&self) {
        if let Some(started) = self.started.get(self.index) {
            started.store(true, Ordering::Relaxed);
        }
    }
}

/// Writes into the folders `dirs` until `stop` is set or `duration` is over. Prints `running` once
/// every thread has written and the files are durable.
///
/// # Errors
/// If anything at all fails: what was not written as planned cannot be judged.
pub(crate) fn run(
    dirs: &[PathBuf],
    journal: &Path,
    config: Config,
    with_orphans: bool,
    duration: Option<Duration>,
    stop: &Arc<AtomicBool>,
) -> io::Result<()> {
    for dir in dirs {
        std::fs::create_dir_all(dir).map_err(|error| about("cannot create", dir, &error))?;
    }
    let recorder = Recorder::create(journal, &config)?;
    let threads = config.threads();
    let base = Task {
        index: threads.len(),
        path: dirs[0].join(ORPHANS),
        second: PathBuf::new(),
        config: Arc::new(config),
        journal: recorder,
        stop: Arc::clone(stop),
        started: Arc::new(threads.iter().map(|_| AtomicBool::new(false)).collect()),
    };

    let mut tasks = Vec::new();
    for thread in &threads {
        let task = Task {
            index: thread.index,
            path: thread.place(dirs),
            second: thread.second_place(dirs),
            journal: base.journal.for_thread(thread.index),
            ..base.clone()
        };
        match thread.kind {
            Kind::Buffered | Kind::Direct | Kind::Mmap => random::prepare(&task),
            Kind::Append => append::prepare(&task),
            Kind::Churn => churn::prepare(&task),
            Kind::Sqlite => sqlite::prepare(&task),
            Kind::Pair => pair::prepare(&task),
        }
        .map_err(|error| about("cannot prepare", &task.path, &error))?;
        tasks.push((thread.kind, task));
    }
    if with_orphans {
        orphans::prepare(&base)?;
    }
    for dir in dirs {
        rustix::fs::syncfs(std::fs::File::open(dir)?)?;
    }

    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (kind, task) in &tasks {
            running.push(scope.spawn(|| {
                let result = match kind {
                    Kind::Buffered | Kind::Direct | Kind::Mmap => random::run(task, *kind),
                    Kind::Append => append::run(task),
                    Kind::Churn => churn::run(task),
                    Kind::Sqlite => sqlite::run(task),
                    Kind::Pair => pair::run(task),
                };
                finish(task, result)
            }));
        }
        if with_orphans {
            running.push(scope.spawn(|| finish(&base, orphans::run(&base))));
        }
        let begin = Instant::now();
        let mut announced = false;
        while !base.stopped() {
            if !announced && base.started.iter().all(|one| one.load(Ordering::Relaxed)) {
                announced = true;
                // Nobody listening is no reason to stop.
                let _ = writeln!(io::stdout(), "running").and_then(|()| io::stdout().flush());
            }
            if duration.is_some_and(|duration| begin.elapsed() >= duration) {
                stop.store(true, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut result = Ok(());
        for thread in running {
            let ended = thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
            result = result.and(ended);
        }
        result
    })
}

/// A thread that failed stops the others.
fn finish(task: &Task, result: io::Result<()>) -> io::Result<()> {
    result.map_err(|error| {
        task.stop.store(true, Ordering::Relaxed);
        about("writing failed", &task.path, &error)
    })
}
