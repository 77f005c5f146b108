//! A test that does not end is ended, with what it started, and named; the others go on.
//!
//! The helpers that tests begin with call [`watch`]. When a test's time is up, the programs it started are
//! killed: it mostly waits for one of them, and fails. One that still runs a minute later hangs by itself;
//! a thread cannot be ended, so then the whole test program is, after what tests have frozen is thawed.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a test may take, in seconds, unless `HOLDSTILL_TEST_LIMIT` says otherwise.
const LIMIT: u64 = 600;

/// How long a test has to fail once its programs are killed.
const GRACE: Duration = Duration::from_secs(60);

struct Test {
    since: Instant,
    /// The programs it started, some of which have ended.
    children: Vec<u32>,
    is_killed: bool,
}

/// The tests that run, by name.
static TESTS: Mutex<BTreeMap<String, Test>> = Mutex::new(BTreeMap::new());

fn tests() -> MutexGuard<'static, BTreeMap<String, Test>> {
    TESTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread of a test: dropped at the test's end.
struct Watched(String);

impl Drop for Watched {
    fn drop(&mut self) {
        tests().remove(&self.0);
    }
}

thread_local! {
    static WATCHED: RefCell<Option<Watched>> = const { RefCell::new(None) };
}

/// Watches the test that this thread is, if it is one and is not watched yet.
pub(crate) fn watch() {
    static WATCHDOG: Once = Once::new();
    // The threads that tests start have no names.
    let thread = std::thread::current();
    let Some(name) = thread.name().filter(|name| name.contains("::")) else {
        return;
    };
    WATCHED.with_borrow_mut(|watched| {
        if watched.is_some() {
            return;
        }
        let test = Test {
            since: Instant::now(),
            children: Vec::new(),
            is_killed: false,
        };
        tests().insert(name.to_owned(), test);
        *watched = Some(Watched(name.to_owned()));
    });
    WATCHDOG.call_once(|| {
        let limit = std::env::var("HOLDSTILL_TEST_LIMIT").map_or(LIMIT, |limit| {
            let limit = limit.parse();
            limit.expect("HOLDSTILL_TEST_LIMIT is a number of seconds")
        });
        std::thread::spawn(move || guard(Duration::from_secs(limit)));
    });
}

/// Counts a program among those that this thread's test started.
pub(crate) fn started(pid: u32) {
    watch();
    WATCHED.with_borrow(|watched| {
        let mut tests = tests();
        if let Some(test) = watched.as_ref().and_then(|it| tests.get_mut(&it.0)) {
            test.children.push(pid);
        }
    });
}

/// Looks every second who is over time.
fn guard(limit: Duration) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        for (name, test) in tests().iter_mut() {
            let passed = test.since.elapsed();
            if passed > limit && !test.is_killed {
                test.is_killed = true;
                say(&format!(
                    "{name} has not ended within {} s: what it started is killed",
                    limit.as_secs()
                ));
                kill_all(descendants(&test.children));
            } else if passed > limit + GRACE {
                say(&format!(
                    "{name} hangs by itself: this run of all tests ends here"
                ));
                give_up();
            }
        }
    }
}

/// Past the capture of what tests print: nobody else may come to show it.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "\nwatchdog: {text}");
}

fn give_up() -> ! {
    let all: Vec<u32> = parents().into_keys().collect();
    kill_all(descendants(&all));
    // Else it could not end: a thread that waits for a frozen filesystem hears no signal.
    for line in std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
    {
        if let Some(dir) = line
            .split(' ')
            .nth(4)
            .filter(|dir| dir.contains("/holdstill-test-"))
        {
            let _ = Command::new("fsfreeze").args(["--unfreeze", dir]).status();
        }
    }
    std::process::abort();
}

/// All processes and whose children they are.
fn parents() -> BTreeMap<u32, u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| {
        let stat =
            std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
        // The name before it may hold anything.
        let (_, fields) = stat.rsplit_once(')')?;
        Some((pid, fields.split_whitespace().nth(1)?.parse().ok()?))
    })
    .collect()
}

/// Those of `children` that are ours still, and all below them.
fn descendants(children: &[u32]) -> BTreeSet<u32> {
    let parents = parents();
    let is_ours = |pid: &&u32| parents.get(pid) == Some(&std::process::id());
    let mut found: BTreeSet<u32> = children.iter().filter(is_ours).copied().collect();
    loop {
        let below = |(pid, parent): (&u32, &u32)| found.contains(parent).then_some(*pid);
        let more: Vec<u32> = parents.iter().filter_map(below).collect();
        let before = found.len();
        found.extend(more);
        if found.len() == before {
            return found;
        }
    }
}

fn kill_all(pids: BTreeSet<u32>) {
    for pid in pids {
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
}
