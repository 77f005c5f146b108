//! A program that keeps a filesystem busy while it is imaged, and judges the copy afterwards.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use holdstill::error::{Kind, Result};
use holdstill::verbs::backup::Report;

use super::{command, output, spawn};

/// The program, built once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let args = ["build", "--quiet", "--release", "--package", "live-writer"];
        let status = std::process::Command::new(cargo).args(args).status();
        assert!(status.expect("cargo").success(), "cannot build live-writer");
        // This test lies in TARGET/PROFILE/deps.
        let test = std::env::current_exe().expect("our own path");
        let target = test.ancestors().nth(3).expect("the target folder");
        target.join("release/live-writer")
    })
}

/// Writers at work in a folder; stopped when dropped.
#[derive(Debug)]
pub(crate) struct LiveWriter {
    child: Child,
    journal: PathBuf,
}

impl LiveWriter {
    /// Starts to write into `dir`, with the journal elsewhere, and waits until every writer has
    /// written. `options` as of `live-writer run`.
    pub(crate) fn start(dir: &Path, journal: &Path, seed: u64, options: &[&str]) -> Self {
        std::fs::create_dir_all(dir).expect("a folder to write into");
        let writer = Self::start_in(&[dir], journal, seed, options);
        // Long enough for every thread to have written much.
        std::thread::sleep(Duration::from_secs(1));
        writer
    }

    /// The same in several folders in turn, without waiting for more than the first writes.
    pub(crate) fn start_in(dirs: &[&Path], journal: &Path, seed: u64, options: &[&str]) -> Self {
        let mut run = command(program().to_str().expect("a path of text"), ["run"]);
        run.args(dirs)
            .arg("--journal")
            .arg(journal)
            .arg("--seed")
            .arg(seed.to_string());
        run.args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = spawn(&mut run);
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its output");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let writer = Self {
            child,
            journal: journal.to_owned(),
        };
        assert_eq!(line, "running\n", "live-writer does not get to work");
        writer
    }

    /// Ends the writers and waits until the journal is whole.
    ///
    /// # Panics
    /// If they failed meanwhile.
    pub(crate) fn stop(mut self) {
        run_kill(&self.child, "TERM");
        let status = self.child.wait().expect("live-writer ends");
        assert!(status.success(), "live-writer failed: {status}");
    }

    /// Lets it write for a moment, and then rest for a second, until `act` is done.
    pub(crate) fn in_bursts<T>(&self, act: impl FnOnce() -> T) -> T {
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(100));
                    run_kill(&self.child, "STOP");
                    std::thread::sleep(Duration::from_secs(1));
                    run_kill(&self.child, "CONT");
                }
            });
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
            is_done.store(true, Ordering::Relaxed);
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Its journal.
    pub(crate) fn journal(&self) -> PathBuf {
        self.journal.clone()
    }
}

impl Drop for LiveWriter {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn run_kill(child: &Child, signal: &str) {
    let pid = child.id().to_string();
    super::run("kill", ["-s", signal, &pid]);
}

/// Does what a user would do whom an error tells to try again: on a busy machine the guard may thaw
/// before a witness has read everything, or a disk may never pause. Five times at most; any other
/// error is the last.
///
/// # Panics
/// With that error.
pub(crate) fn patiently(mut run: impl FnMut() -> Result<Report>) -> Report {
    let mut tries = 0;
    loop {
        tries += 1;
        match run() {
            Ok(report) => return report,
            Err(error)
                if tries < 5
                    && error.kind() == Kind::Inconsistent
                    && error
                        .get_hint()
                        .is_some_and(|hint| hint.contains("try again")) =>
            {
                println!("once more: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn clock() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// How a copy is judged.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Judgement {
    /// It must show one instant.
    OneInstant,
    /// It must show this one: nanoseconds of CLOCK_MONOTONIC inside the freeze.
    Monotonic(u64),
    /// The same of CLOCK_REALTIME.
    Realtime(u64),
    /// It was taken without a freeze, between two moments of CLOCK_MONOTONIC: what was durable before
    /// them is there, and what the kernel keeps in order is.
    Crash { begin: u64, end: u64 },
}

/// Judges a copy of the folder: it must show one instant, and none but `instant` (nanoseconds of
/// CLOCK_MONOTONIC inside the freeze), if that is known.
///
/// # Panics
/// With what is wrong.
pub(crate) fn judge(dir: &Path, journal: &Path, instant: Option<u64>) {
    let how = instant.map_or(Judgement::OneInstant, Judgement::Monotonic);
    judge_in(&[dir], journal, how).unwrap_or_else(|wrong| panic!("the copy is wrong:\n{wrong}"));
}

/// Judges the copies of the folders that were written into; what was found, or what is wrong.
pub(crate) fn judge_in(
    dirs: &[&Path],
    journal: &Path,
    how: Judgement,
) -> std::result::Result<String, String> {
    let mut args = vec!["check".to_owned()];
    args.extend(dirs.iter().map(|dir| dir.display().to_string()));
    args.extend(["--journal".to_owned(), journal.display().to_string()]);
    let mut between = |begin: u64, end: u64, more: &[&str]| {
        let [begin, end] = [begin, end].map(|at| at.to_string());
        let window = ["--frozen-begin", &begin, "--frozen-end", &end];
        args.extend(window.iter().chain(more).map(|arg| (*arg).to_owned()));
    };
    match how {
        Judgement::OneInstant => {}
        Judgement::Monotonic(at) => between(at, at, &["--exact"]),
        Judgement::Realtime(at) => between(at, at, &["--exact", "--realtime"]),
        Judgement::Crash { begin, end } => between(begin, end, &["--crash"]),
    }
    let output = output(program().to_str().expect("a path of text"), &args);
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    match output.status.success() {
        true => Ok(said),
        false => Err(said),
    }
}
