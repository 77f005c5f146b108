//! Child programs: the system's tools, and the hooks of the user.
//!
//! A tool is looked up in a fixed list of folders and runs without a shell, with a cleared
//! environment and the C locale. Every child has a deadline, a process group of its own (Ctrl-C on
//! our terminal is ours to handle, not the tool's) and a bound on what is kept of its output.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::error::{Context, Error, Result};

mod streaming;

pub use streaming::{Streaming, said_in, unnamed_file};

/// Where the system keeps its tools. Nothing else is ever searched.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The same, as the children get it.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment of a tool. LVM's would else complain of every descriptor they inherit.
pub(crate) const ENVIRONMENT: [(&str, &str); 3] = [
    ("PATH", PATH),
    ("LC_ALL", "C"),
    ("LVM_SUPPRESS_FD_WARNINGS", "1"),
];

/// How long a child may run if nothing else was said.
const DEADLINE: Duration = Duration::from_secs(60);

/// How much is kept of each of its two outputs if nothing else was said, in bytes.
const LIMIT: usize = 16 << 20;

/// What is said of a child that failed.
pub(crate) const FAILED: &str = "failed";

/// How much of what a failed tool says is shown: lines, and characters of each.
const MOST_LINES: usize = 20;
const MOST_CHARS: usize = 300;

/// How long a child that is asked to end may take to.
const GRACE: Duration = Duration::from_secs(2);

/// How long to sleep at most before looking whether the child has ended.
const TICK: Duration = Duration::from_millis(10);

/// A child program about to be run.
#[derive(Debug)]
pub struct Tool {
    program: PathBuf,
    command: Command,
    input: Vec<u8>,
    deadline: Duration,
    limit: usize,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this exit code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// It was still running at its deadline and was killed.
    Deadline,
    /// It was ended because the caller did not want to wait any longer.
    Stopped,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::Deadline => write!(f, "killed at its deadline"),
            Self::Stopped => write!(f, "ended before it was done"),
        }
    }
}

/// What a child did and said.
#[derive(Clone, Debug)]
pub struct Output {
    program: PathBuf,
    /// How it ended.
    pub ending: Ending,
    /// What it printed on standard output, up to the limit.
    pub stdout: Vec<u8>,
    /// What it printed on standard error, up to the limit.
    pub stderr: Vec<u8>,
    /// Whether it printed more than was kept.
    pub truncated: bool,
}

impl Output {
    /// Whether it ended by itself with exit code 0.
    pub fn success(&self) -> bool {
        self.ending == Ending::Exit(0)
    }

    /// The output of a child that must have succeeded.
    ///
    /// # Errors
    /// How it ended and, a line each, what it said on standard error; or that its output was cut.
    pub fn checked(self) -> Result<Self> {
        match self.success() && !self.truncated {
            true => Ok(self),
            false => Err(self.failed()),
        }
    }

    /// The error that says how it ended and, a line each, what it said on standard error.
    pub fn failed(self) -> Error {
        let mut why = self.ending.to_string();
        if self.success() {
            why = "it printed more than can be taken".to_owned();
        } else {
            // All of it: the reason is seldom on the same line.
            let said = String::from_utf8_lossy(&self.stderr);
            let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
            for line in lines.by_ref().take(MOST_LINES) {
                why.push('\n');
                why.extend(line.chars().take(MOST_CHARS));
            }
            if lines.next().is_some() {
                why.push_str("\n...");
            }
        }
        Error::other(FAILED, self.program, why)
    }
}

impl Tool {
    /// The system's tool of this name.
    ///
    /// # Errors
    /// `NotFound` if it is not installed.
    pub fn find(name: &str) -> Result<Self> {
        Self::find_in(&FOLDERS.map(Path::new), name)
    }

    /// The tool of this name in the first of these folders that has it.
    pub(crate) fn find_in(folders: &[&Path], name: &str) -> Result<Self> {
        let program = folders
            .iter()
            .map(|folder| folder.join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| {
                let folders: Vec<_> = folders
                    .iter()
                    .map(|folder| folder.to_string_lossy())
                    .collect();
                let why = format!("not in {}", folders.join(":"));
                let why = io::Error::new(io::ErrorKind::NotFound, why);
                Error::new("cannot find the tool", name, why)
            })?;
        let mut command = Command::new(&program);
        command.env_clear().envs(ENVIRONMENT);
        Ok(Self::new(program, command))
    }

    /// A line of shell from the user, run by `/bin/sh -c` with the environment the user gave us.
    pub fn shell(script: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script.as_ref());
        Self::new(script.as_ref().into(), command)
    }

    fn new(program: PathBuf, command: Command) -> Self {
        Self {
            program,
            command,
            input: Vec::new(),
            deadline: DEADLINE,
            limit: LIMIT,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What it reads from standard input; nothing, if not given.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// How long it may run.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How many bytes of each of its two outputs are kept; the rest is read and thrown away.
    #[must_use]
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Its name and arguments, for messages.
    pub fn words(&self) -> Vec<OsString> {
        let args = self.command.get_args().map(OsStr::to_owned);
        std::iter::once(self.command.get_program().to_owned())
            .chain(args)
            .collect()
    }

    /// Runs it to its end or its deadline.
    ///
    /// # Errors
    /// If it cannot be started or watched. How it ended is in the output: see
    /// [`Output::checked`].
    pub fn run(self) -> Result<Output> {
        self.run_unless(&|| false)
    }

    /// Runs it to its end or its deadline, unless `stop` says that nobody wants to wait for it any more:
    /// then it and all that it has started are asked to end (SIGTERM), and soon made to.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_unless(mut self, stop: &dyn Fn() -> bool) -> Result<Output> {
        let with_input = !self.input.is_empty();
        self.command
            .stdin(if with_input {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let child = self.command.spawn().context("cannot run", &self.program)?;
        let mut running = Running(child);
        let end = Instant::now() + self.deadline;
        watch(&mut running.0, &self.input, self.limit, end, stop)
            .map(|watched| watched.into_output(self.program.clone()))
            .context("cannot watch", &self.program)
    }
}

/// A child that does not outlive us, should watching it fail.
#[derive(Debug)]
struct Running(Child);

impl Running {
    fn kill(child: &mut Child) {
        Self::signal(child, Signal::SIGKILL);
        let _ = child.kill();
    }

    /// Its children too. The group exists as long as the child was not waited for.
    fn signal(child: &Child, signal: Signal) {
        let _ = killpg(Pid::from_raw(child.id().cast_signed()), signal);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            Self::kill(&mut self.0);
            let _ = self.0.wait();
        }
    }
}

/// One of the outputs of a child.
struct Pipe<R> {
    stream: Option<R>,
    kept: Vec<u8>,
    truncated: bool,
    limit: usize,
}

impl<R: Read + AsFd> Pipe<R> {
    fn new(stream: Option<R>, limit: usize) -> io::Result<Self> {
        if let Some(stream) = &stream {
            set_nonblocking(stream.as_fd())?;
        }
        Ok(Self {
            stream,
            kept: Vec::new(),
            truncated: false,
            limit,
        })
    }

    /// Reads all that is there now.
    fn drain(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16384];
        while let Some(stream) = &mut self.stream {
            match stream.read(&mut buffer) {
                Ok(0) => self.stream = None,
                Ok(read) => {
                    let room = (self.limit - self.kept.len()).min(read);
                    self.truncated |= room < read;
                    self.kept
                        .extend_from_slice(buffer.get(..room).unwrap_or_default());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

struct Watched {
    ending: Ending,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
}

impl Watched {
    fn into_output(self, program: PathBuf) -> Output {
        Output {
            program,
            ending: self.ending,
            stdout: self.stdout,
            stderr: self.stderr,
            truncated: self.truncated,
        }
    }
}

fn watch(
    child: &mut Child,
    mut input: &[u8],
    limit: usize,
    end: Instant,
    stop: &dyn Fn() -> bool,
) -> io::Result<Watched> {
    let mut stdin = child.stdin.take();
    if let Some(stdin) = &stdin {
        set_nonblocking(stdin.as_fd())?;
    }
    let mut stdout = Pipe::new(child.stdout.take(), limit)?;
    let mut stderr = Pipe::new(child.stderr.take(), limit)?;
    let mut late = false;
    let mut how = loop {
        if let Some(pipe) = &mut stdin {
            match pipe.write(input) {
                Ok(written) => input = input.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // It does not want to hear the rest.
                Err(_) => input = &[],
            }
            if input.is_empty() {
                stdin = None;
            }
        }
        stdout.drain()?;
        stderr.drain()?;
        if stop() {
            end_all(child, &mut stdout, &mut stderr)?;
            break Ending::Stopped;
        }
        if let Some(status) = child.try_wait()? {
            break ending(status);
        }
        if !late && Instant::now() >= end {
            late = true;
            Running::kill(child);
        }
        wait_for_output(
            stdout.stream.as_ref().map(AsFd::as_fd),
            stderr.stream.as_ref().map(AsFd::as_fd),
        )?;
    };
    // Only what is there already: a daemon it left behind may keep the pipes open for ever.
    stdout.drain()?;
    stderr.drain()?;
    if late {
        how = Ending::Deadline;
    }
    Ok(Watched {
        ending: how,
        truncated: stdout.truncated || stderr.truncated,
        stdout: stdout.kept,
        stderr: stderr.kept,
    })
}

/// Ends a child and all that it has started. Whether some of them are left is seen by its pipes, which
/// they inherit: the child itself must not be waited for before, or its group could be another's.
fn end_all<R: Read + AsFd, S: Read + AsFd>(
    child: &mut Child,
    stdout: &mut Pipe<R>,
    stderr: &mut Pipe<S>,
) -> io::Result<ExitStatus> {
    Running::signal(child, Signal::SIGTERM);
    let end = Instant::now() + GRACE;
    while Instant::now() < end && (stdout.stream.is_some() || stderr.stream.is_some()) {
        wait_for_output(
            stdout.stream.as_ref().map(AsFd::as_fd),
            stderr.stream.as_ref().map(AsFd::as_fd),
        )?;
        stdout.drain()?;
        stderr.drain()?;
    }
    Running::kill(child);
    child.wait()
}

fn wait_for_output(
    stdout: Option<BorrowedFd<'_>>,
    stderr: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut fds: Vec<_> = [stdout, stderr]
        .into_iter()
        .flatten()
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    // Once both pipes are closed the end is near: look more often.
    let tick = if fds.is_empty() { TICK / 10 } else { TICK };
    let timeout = PollTimeout::try_from(tick).unwrap_or(PollTimeout::ZERO);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn ending(status: ExitStatus) -> Ending {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ending::Exit(code),
        (None, Some(signal)) => Ending::Signal(signal),
        (None, None) => Ending::Exit(-1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Output {
        Tool::shell(script).run().unwrap()
    }

    #[test]
    fn a_tool_has_a_clean_environment_and_a_fixed_path() {
        let output = Tool::find("env").unwrap().env("X", "y z").run().unwrap();
        let said = String::from_utf8(output.checked().unwrap().stdout).unwrap();
        let mut lines: Vec<_> = said.lines().collect();
        lines.sort_unstable();
        let path = format!("PATH={PATH}");
        let expected = ["LC_ALL=C", "LVM_SUPPRESS_FD_WARNINGS=1", &path, "X=y z"];
        assert_eq!(lines, expected);
        let missing = Tool::find("holdstill-no-such-tool").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn endings_are_told_apart_and_explained() {
        assert_eq!(shell("exit 7").ending, Ending::Exit(7));
        assert_eq!(shell("kill -9 $$").ending, Ending::Signal(9));
        let failed = shell("echo one >&2; echo two >&2; echo >&2; exit 3");
        let error = failed.checked().unwrap_err();
        assert!(
            error.to_string().ends_with("exit code 3\none\ntwo"),
            "{error}"
        );
        let failed = shell("seq 100 >&2; exit 1").checked().unwrap_err();
        let failed = failed.to_string();
        assert!(failed.ends_with("\n19\n20\n..."), "{failed}");
    }

    #[test]
    fn at_the_deadline_the_whole_group_dies() {
        let script = "trap '' TERM INT HUP; sleep 1000 & echo $!; wait; wait";
        let output = Tool::shell(script)
            .deadline(Duration::from_millis(300))
            .run()
            .unwrap();
        assert_eq!(output.ending, Ending::Deadline);
        let sleeper = String::from_utf8(output.stdout).unwrap();
        let sleeper = Pid::from_raw(sleeper.trim().parse().unwrap());
        // It is dead, or on its way to be reaped by its new parent.
        let dead = || match std::fs::read_to_string(format!("/proc/{sleeper}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        while !dead() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_child_nobody_wants_to_wait_for_ends_with_all_it_started() {
        for script in [
            "echo $$; sleep 1000",
            "echo $$; sleep 1000 & wait",
            "trap 'echo tidied up; exit 0' TERM; echo $$; sleep 1000 & wait",
            "trap '' TERM; echo $$; sleep 1000 & wait; wait; wait",
        ] {
            let begun = Instant::now();
            let stop = || begun.elapsed() > Duration::from_millis(200);
            let output = Tool::shell(script).run_unless(&stop).unwrap();
            assert_eq!(output.ending, Ending::Stopped, "{script}");
            let said = String::from_utf8(output.stdout).unwrap();
            assert_eq!(said.contains("tidied up"), script.contains("tidied up"));
            let group: i32 = said.lines().next().unwrap().parse().unwrap();
            // They are dead, or on their way to be reaped by their new parent.
            while is_alive(group) {
                std::thread::yield_now();
            }
        }
    }

    /// Whether a process of a group is more than a zombie.
    fn is_alive(group: i32) -> bool {
        let stats = std::fs::read_dir("/proc").unwrap().flatten();
        let stats =
            stats.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
        let fields = stats.filter_map(|stat| Some(stat.rsplit_once(") ")?.1.to_owned()));
        let mut fields = fields.map(|rest| rest.split(' ').map(str::to_owned).collect::<Vec<_>>());
        fields.any(|rest| rest[2] == group.to_string() && rest[0] != "Z" && rest[0] != "X")
    }

    #[test]
    fn a_daemon_left_behind_does_not_hold_us() {
        let output = shell("(sleep 5 & echo $!)");
        assert!(output.success());
        let pid = String::from_utf8(output.stdout).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap());
        // Still running: run() did not wait for it.
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    }

    #[test]
    fn output_is_bounded_and_a_full_pipe_does_not_block() {
        let output =
            Tool::shell("head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2; echo end >&2")
                .limit(1000)
                .run()
                .unwrap();
        assert_eq!((output.stdout.len(), output.stderr.len()), (1000, 1000));
        assert!(output.success() && output.truncated);
        assert!(output.checked().is_err());
    }

    #[test]
    fn input_arrives_whole_and_is_not_forced_on_anybody() {
        let input: Vec<u8> = (0..500_000u32).map(|at| at.to_le_bytes()[0]).collect();
        let output = Tool::find("cat").unwrap().input(input.clone()).run();
        assert!(output.unwrap().stdout == input);
        let output = Tool::find("true").unwrap().input(input).run().unwrap();
        assert!(output.success());
        assert_eq!(Tool::find("cat").unwrap().run().unwrap().stdout, b"");
    }
}
