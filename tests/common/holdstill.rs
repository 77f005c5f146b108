//! Runs the real program and holds it to what every run promises: a known exit code, errors of two
//! lines at most, JSON lines that are whole, and never a panic.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use std::sync::Once;

use nix::sys::signal::{SigHandler, Signal, signal};
use serde_json::Value;

use super::spawn;

/// Exit codes that stand for an error.
const ERRORS: [i32; 6] = [1, 2, 3, 4, 130, 143];

/// The program, not started yet: with no input, and its output caught.
pub(crate) fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    default_signals();
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdstill"));
    command
        .args(args)
        .env("LC_ALL", "C")
        .env_remove("RUST_LOG")
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Signals that a caller of the tests ignores (a background job, `nohup`) would be ignored by the
/// program, too, as they should: so the tests begin with the default.
fn default_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for number in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: the default runs no code of ours.
            unsafe { signal(number, SigHandler::SigDfl) }.expect("a default signal");
        }
    });
}

/// Runs the program to its end.
pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    finish(command(args))
}

/// Runs the program with a file as its standard input.
pub(crate) fn run_from<S: AsRef<OsStr>>(input: &Path, args: impl IntoIterator<Item = S>) -> Run {
    let mut command = command(args);
    command.stdin(File::open(input).expect("the input"));
    finish(command)
}

/// Starts what was prepared and waits for its end.
pub(crate) fn finish(mut command: Command) -> Run {
    let child = spawn(&mut command);
    wait(&command, child)
}

/// Waits for the end of a program that was started from `command`.
pub(crate) fn wait(command: &Command, child: Child) -> Run {
    let output = child.wait_with_output().expect("the program ends");
    Run::new(command.get_args().map(OsStr::to_owned).collect(), output)
}

/// A run that has ended.
#[derive(Debug)]
pub(crate) struct Run {
    args: Vec<OsString>,
    status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    is_json: bool,
}

impl Run {
    fn new(args: Vec<OsString>, output: Output) -> Self {
        let run = Self {
            is_json: args.iter().any(|arg| arg == "--json"),
            args,
            status: output.status,
            stdout: output.stdout,
            stderr: String::from_utf8(output.stderr).expect("standard error is UTF-8"),
        };
        for sign in ["panicked", "stack backtrace", "RUST_BACKTRACE", "\x1b"] {
            assert!(!run.stderr.contains(sign), "{run}");
        }
        run
    }

    /// The exit code, if it was not a signal that ended it.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// It must have ended with this exit code, and shown what belongs to that.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.status.code(),
            Some(code),
            "signal {:?}: {self}",
            self.status.signal()
        );
        if self.is_json {
            self.check_json(code);
        } else if ERRORS.contains(&code) {
            self.check_error();
        } else {
            assert!(!self.stderr.contains("holdstill: "), "{self}");
        }
        self
    }

    /// Its standard error must contain this.
    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "no {text:?}: {self}");
        self
    }

    /// An error is the last thing shown: one line, and perhaps a second one that begins with blanks.
    #[track_caller]
    fn check_error(&self) {
        let lines: Vec<&str> = self.stderr.lines().collect();
        let errors: Vec<usize> = (0..lines.len())
            .filter(|&number| lines[number].starts_with("holdstill: "))
            .collect();
        let [error] = errors[..] else {
            panic!("not one error: {self}")
        };
        // What a tool has said is further in.
        let said = |line: &&&str| line.starts_with("    ");
        let more = &lines[error + 1..];
        match &more[more.iter().take_while(said).count()..] {
            [] => {}
            [hint] => assert!(hint.starts_with("  "), "{self}"),
            _ => panic!("more than two lines: {self}"),
        }
        let others = lines[..error]
            .iter()
            .all(|line| !line.starts_with("  ") && !line.is_empty());
        assert!(others, "{self}");
    }

    #[track_caller]
    fn check_json(&self, code: i32) {
        let lines = self.json();
        let run_id = &lines[0]["run_id"];
        assert!(run_id.as_str().is_some_and(|id| id.len() >= 8), "{self}");
        for (number, line) in lines.iter().enumerate() {
            assert_eq!(line["v"], 1, "{self}");
            assert_eq!(&line["run_id"], run_id, "{self}");
            let time = line["time"].as_str().expect("a time");
            time.parse::<jiff::Timestamp>()
                .unwrap_or_else(|error| panic!("{time}: {error}"));
            let event = line["event"].as_str().expect("an event");
            let is_end = ["result", "error"].contains(&event);
            assert_eq!(is_end, number + 1 == lines.len(), "{self}");
            match event {
                "progress" => {
                    assert!(line["done_bytes"].is_u64() && line["total_bytes"].is_u64());
                    assert!(line["rate"].is_u64(), "{self}");
                    assert!(line["eta_s"].is_null() || line["eta_s"].is_f64(), "{self}");
                }
                "warning" => assert!(line["message"].is_string(), "{self}"),
                _ => {}
            }
        }
        let last = lines.last().expect("a last line");
        assert_eq!(last["event"] == "error", ERRORS.contains(&code), "{self}");
        if last["event"] == "error" {
            assert_eq!(last["exit_code"], code, "{self}");
            assert!(last["kind"].is_string() && last["message"].is_string());
            assert!(last["hint"].is_string() || last["hint"].is_null());
        }
    }

    /// All JSON lines. They are on standard error when the image is on standard output.
    #[track_caller]
    pub(crate) fn json(&self) -> Vec<Value> {
        let text = if self.is_stdout_taken() {
            self.stderr.as_str()
        } else {
            assert_eq!(self.stderr, "", "beside JSON: {self}");
            std::str::from_utf8(&self.stdout).expect("JSON is UTF-8")
        };
        let lines = text.lines().map(|line| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))
        });
        let lines: Vec<Value> = lines.collect();
        assert!(!lines.is_empty(), "no JSON: {self}");
        lines
    }

    /// The last JSON line.
    #[track_caller]
    pub(crate) fn last(&self) -> Value {
        self.json().pop().expect("a last line")
    }

    fn is_stdout_taken(&self) -> bool {
        let output = |pair: &[OsString]| pair[0] == "-o" && pair[1] == "-";
        let is_restore = self.args.first().is_some_and(|verb| verb == "restore");
        let is_place = |arg: &&OsString| !arg.to_string_lossy().starts_with("--");
        // The verb, the image, the target.
        let target = self.args.iter().filter(is_place).nth(2);
        let is_target = |arg: &OsString| arg.to_string_lossy().ends_with("=-");
        let is_to_stdout = target.is_some_and(|target| target == "-");
        let is_raw = is_restore && (is_to_stdout || self.args.iter().any(is_target));
        self.args.windows(2).any(output) || is_raw
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} ended with {}\n{}",
            self.args, self.status, self.stderr
        )?;
        if !self.is_stdout_taken() {
            write!(f, "{}", String::from_utf8_lossy(&self.stdout))?;
        }
        Ok(())
    }
}

/// Everything in a folder, sorted: to show that nothing was left behind.
pub(crate) fn listing(dir: &Path) -> Vec<OsString> {
    let entries = std::fs::read_dir(dir).expect("a folder");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    names
}

/// Whether two files or devices hold the same bytes over the length of the first.
pub(crate) fn same_bytes(one: &Path, other: &Path) -> bool {
    let [mut one, mut other] = [one, other].map(|path| File::open(path).expect("opens"));
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let got = one.read(&mut a).expect("reads");
        if got == 0 {
            return true;
        }
        if other.read_exact(&mut b[..got]).is_err() || a[..got] != b[..got] {
            return false;
        }
    }
}
