//! The guard: a second process that thaws, runs the post-freeze hook and removes what must go when
//! the run dies, is killed, or is stopped while a filesystem is frozen.
//!
//! It is forked before the run does anything else, ignores every signal it can, is locked in memory
//! and runs at real-time priority. Before each freeze the run arms it; it thaws when the run's end
//! of their socket closes (which happens only after a FIFREEZE that the dying run was in has
//! returned), when the deadline passes, or when it has heard nothing of the run for a while. It thaws only what was armed, so a freeze of the
//! administrator's stays. Since only one of the two can thaw, the run knows from its own FITHAW
//! whether the freeze held: "not frozen" means it did not.
//!
//! As root it leaves the control groups of the run for the outermost ones, so that what pauses or kills
//! a container or a unit of systemd (the freezer, `cgroup.kill`, running out of a group's memory) does
//! not reach both.
//!
//! What it cannot help against: both processes killed; a FIFREEZE that hangs in the kernel.

mod child;
mod wire;

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::command::{self, Ending};
use crate::dm::Takeover;
use crate::error::{Context, Error, Result};
use crate::freeze::{FreezeError, MountPoint};
use crate::memory::Arena;
use crate::os;
use crate::signals::NoStop;
use wire::{Ask, Counts, Reply, Request};

/// How long the guard may take to answer before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// And how long at first, when nothing is frozen and it still locks in memory what it inherited: in a
/// process of gigabytes on a busy host that takes its time.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// A command to run once after the freeze, whatever happens to the run.
#[derive(Clone, Debug)]
pub struct Hook {
    /// Run by `/bin/sh -c`.
    pub script: OsString,
    /// Variables added to the environment we have.
    pub env: Vec<(OsString, OsString)>,
    /// How long it may run before it is killed.
    pub deadline: Duration,
    /// Where what it prints goes instead of standard error.
    pub output: Option<Arc<File>>,
}

/// How something that a run makes is taken away: a snapshot. The guard cannot prepare that later, so it is
/// named before there is anything to take away.
#[derive(Clone, Debug)]
pub struct Undo {
    /// What it takes away, by a name that nothing else of the run has.
    pub name: String,
    /// How.
    pub way: Way,
    /// For how long it is tried: what it takes away may be busy, or about to be made.
    pub patience: Duration,
}

/// How something is undone.
#[derive(Clone, Debug)]
pub enum Way {
    /// By a command: program, with its whole path, and arguments.
    Command(Vec<OsString>),
    /// By giving a mapped device its table back.
    Takeover(Takeover),
}

/// What a guard is given for its life.
#[derive(Debug, Default)]
pub struct Config<'a> {
    /// The post-freeze hook.
    pub hook: Option<Hook>,
    /// What may have to be taken away.
    pub undo: Vec<Undo>,
    /// Descriptors that the guard keeps open: the lock that says the run is alive.
    pub keep: Vec<BorrowedFd<'a>>,
}

/// What a guard has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// How many freezes it ended.
    pub thawed: u32,
    /// How the hook ended, if the guard ran it.
    pub hook: Option<HookEnd>,
    /// How many files, folders and other things it removed.
    pub removed: u32,
    /// How many it could not remove.
    pub left: u32,
}

/// How the hook ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookEnd {
    /// It ran.
    Ran(Ending),
    /// It could not be started: error number.
    NotStarted(i32),
}

/// Something registered to be removed should the run die.
#[derive(Debug)]
#[must_use = "to be handed to `forget` once it is gone"]
pub struct Leftover(u32);

/// An [`Undo`] that is owed from now on.
#[derive(Debug)]
#[must_use = "to be handed to `forget_undo` once it is done"]
pub struct Owed(u32);

/// What is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftoverKind {
    /// A file: `unlink`.
    File,
    /// An empty folder, or a trace instance: `rmdir`.
    Folder,
    /// A subvolume of a btrfs, with all that is in it.
    Subvolume,
}

/// A running guard. Dropped with all its freezes, it does whatever is left to do and ends.
#[derive(Debug)]
pub struct Guard(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// One request and its answer at a time.
    socket: Mutex<Option<OwnedFd>>,
    /// It did not answer, or what it answered made no sense.
    lost: AtomicBool,
    pid: Pid,
    /// Names of what may have to be taken away, in the guard's order.
    undo: Vec<String>,
    hook_deadline: Duration,
    /// How long the guard may work when all is over.
    work: Duration,
}

impl Guard {
    /// Forks the guard. To be called at the very start of a run, while this process is small and
    /// has one thread: the guard locks in memory what it inherits.
    ///
    /// # Errors
    /// If the process cannot fork, or the guard does not answer; a command with a zero byte; more
    /// to take away than a guard remembers.
    pub fn spawn(config: Config<'_>) -> Result<Self> {
        let hook_deadline = config
            .hook
            .as_ref()
            .map_or(Duration::ZERO, |hook| hook.deadline);
        let patience: Duration = config.undo.iter().map(|undo| undo.patience).sum();
        if config.undo.len() > child::UNDOS {
            let why = format!("it remembers {} things to undo at most", child::UNDOS);
            return Err(Error::other("cannot start", "the guard process", why));
        }
        let names = config.undo.iter().map(|undo| undo.name.clone()).collect();
        let output = config.hook.as_ref().and_then(|hook| hook.output.clone());
        let hook = config.hook.map(prepare).transpose()?;
        let mut undo: Vec<_> = config
            .undo
            .into_iter()
            .map(prepare_undo)
            .collect::<Result<_>>()?;
        let (ours, theirs) =
            os::guard::socket_pair().context("cannot start", "the guard process")?;
        let mut kept: Vec<_> = config.keep.iter().map(AsRawFd::as_raw_fd).collect();
        kept.push(theirs.as_raw_fd());
        let groups = os::guard::outermost_groups();
        kept.extend(output.as_ref().map(AsRawFd::as_raw_fd));
        kept.sort_unstable();
        // SAFETY: the child runs `child::run`, which allocates nothing, takes no lock and never
        // returns, so the state of other threads (in tests) does not matter to it.
        match unsafe { fork() }.context("cannot start", "the guard process")? {
            ForkResult::Child => {
                child::run(theirs.as_raw_fd(), &kept, &groups, hook.as_ref(), &mut undo)
            }
            ForkResult::Parent { child } => {
                drop(theirs);
                let guard = Self(Arc::new(Inner {
                    socket: Mutex::new(Some(ours)),
                    lost: AtomicBool::new(false),
                    pid: child,
                    undo: names,
                    hook_deadline,
                    work: hook_deadline + patience,
                }));
                guard.ping(START_PATIENCE)?;
                Ok(guard)
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.0.pid.as_raw()
    }

    /// The control group that the guard shares with this process because it could not leave it, if there
    /// is one: whatever freezes or kills that group does so to both, and nobody thaws.
    pub fn shared_group(&self) -> Option<String> {
        os::guard::group_that_could_not_be_left(self.pid())
    }

    /// Whether the guard lives and answers. To be called between the steps of a run.
    ///
    /// # Errors
    /// `BrokenPipe` if it was killed; `TimedOut` if it was stopped.
    pub fn check(&self) -> Result<()> {
        self.ping(PATIENCE)
    }

    fn ping(&self, patience: Duration) -> Result<()> {
        self.0
            .ask(&Request::new(Ask::Ping), None, patience)
            .map(drop)
            .context("no answer from", "the guard process")
    }

    /// Has the guard remove `name` in `folder` should the run die. Register first, create then.
    ///
    /// # Errors
    /// If `name` is no plain file name, the guard is lost, or has too much to remember already.
    pub fn register(
        &self,
        folder: impl AsFd,
        name: &OsStr,
        kind: LeftoverKind,
    ) -> Result<Leftover> {
        let ask = match kind {
            LeftoverKind::File => Ask::File,
            LeftoverKind::Folder => Ask::Folder,
            LeftoverKind::Subvolume => Ask::Subvolume,
        };
        let request = Request::named(ask, name.as_bytes())
            .ok_or_else(|| Error::other("cannot register", name, "no plain file name"))?;
        let reply = self
            .0
            .ask(&request, Some(folder.as_fd()), PATIENCE)
            .context("cannot register", name)?;
        Ok(Leftover(reply.id))
    }

    /// The leftover is gone, or has become what it was meant to be.
    ///
    /// # Errors
    /// If the guard is lost.
    pub fn forget(&self, leftover: Leftover) -> Result<()> {
        let mut request = Request::new(Ask::Forget);
        request.id = leftover.0;
        self.0
            .ask(&request, None, PATIENCE)
            .map(drop)
            .context("no answer from", "the guard process")
    }

    /// From now on the guard carries out the [`Undo`] of this name when the run ends, until
    /// [`forget_undo`](Self::forget_undo). To be called before there is anything to undo.
    ///
    /// # Errors
    /// If it was not configured, or the guard is lost.
    pub fn owe_undo(&self, name: &str) -> Result<Owed> {
        let unknown = || Error::other("cannot register", name, "it was not announced");
        let at = self.0.undo.iter().position(|undo| undo == name);
        let at = at
            .and_then(|at| u32::try_from(at).ok())
            .ok_or_else(unknown)?;
        let mut request = Request::new(Ask::OweUndo);
        request.id = at;
        self.0
            .ask(&request, None, PATIENCE)
            .context("cannot register", name)?;
        Ok(Owed(at))
    }

    /// It was undone.
    ///
    /// # Errors
    /// If the guard is lost.
    pub fn forget_undo(&self, owed: Owed) -> Result<()> {
        let mut request = Request::new(Ask::ForgetUndo);
        request.id = owed.0;
        self.0
            .ask(&request, None, PATIENCE)
            .map(drop)
            .context("no answer from", "the guard process")
    }

    /// From now on the hook runs once (once more, if it ran) whatever happens: to be called before the
    /// pre-freeze hook is.
    ///
    /// # Errors
    /// If the guard is lost.
    pub fn owe_hook(&self) -> Result<()> {
        self.0
            .ask(&Request::new(Ask::Owe), None, PATIENCE)
            .map(drop)
            .context("no answer from", "the guard process")
    }

    /// Has the guard run the hook now, unless it ran before, and waits for its end. `None` if there
    /// is no hook.
    ///
    /// # Errors
    /// If the guard is lost: the run then has to run the hook itself.
    pub fn run_hook(&self) -> Result<Option<HookEnd>> {
        let patience = PATIENCE + self.0.hook_deadline;
        let reply = self
            .0
            .ask(&Request::new(Ask::Hook), None, patience)
            .context("no answer from", "the guard process")?;
        Ok(Report::from(reply.report).hook)
    }

    /// What the guard has done so far.
    ///
    /// # Errors
    /// If it is lost.
    pub fn report(&self) -> Result<Report> {
        self.0
            .ask(&Request::new(Ask::Ping), None, PATIENCE)
            .map(|reply| reply.report.into())
            .context("no answer from", "the guard process")
    }

    /// Has the guard do what is left to do, and waits until it has ended.
    ///
    /// # Errors
    /// If it is lost.
    pub fn finish(self) -> Result<Report> {
        let patience = PATIENCE + self.0.work;
        self.0
            .ask(&Request::new(Ask::Finish), None, patience)
            .map(|reply| reply.report.into())
            .context("no answer from", "the guard process")
    }

    /// Makes ready all that a freeze needs memory for: to be called before anything is frozen.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn ready(&self) -> io::Result<Ready> {
        Ok(Ready {
            guard: Arc::clone(&self.0),
            heart: Heart::start(&self.0)?,
        })
    }
}

/// All that one freeze needs.
#[derive(Debug)]
pub struct Ready {
    guard: Arc<Inner>,
    heart: Heart,
}

impl Ready {
    /// Freezes the filesystem at `mount`, to be thawed by [`Frozen::thaw`] or by the guard once
    /// `deadline` has passed since now. Between the two the caller neither writes, logs, allocates
    /// nor waits for anybody who might. Starts no thread.
    ///
    /// # Errors
    /// Nothing is frozen then.
    pub fn freeze(
        self,
        mount: &Arc<MountPoint>,
        deadline: Duration,
    ) -> std::result::Result<Frozen, FreezeError> {
        let Self { guard, heart } = self;
        let deadline = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        let deadline = wire::monotonic().saturating_add(deadline);
        let mut request = Request::new(Ask::Arm);
        request.value = next_beat(deadline);
        let slot = match guard.ask(&request, Some(mount.as_fd()), PATIENCE) {
            Ok(reply) => reply.id,
            Err(error) => return Err(FreezeError::GuardLost(error)),
        };
        heart.beat(slot, deadline);
        let no_stop = NoStop::begin();
        let begin = Instant::now();
        let frozen = mount.freeze();
        let since = Instant::now();
        if let Err(errno) = frozen {
            // At once: until then the guard would thaw somebody else's freeze if we died.
            let _ = guard.disarm(slot);
            return Err(FreezeError::from_freeze(errno));
        }
        Ok(Frozen {
            guard,
            mount: mount.clone(),
            slot,
            begin,
            since,
            is_frozen: true,
            heart,
            _no_stop: no_stop,
        })
    }
}

impl Inner {
    fn disarm(&self, slot: u32) -> io::Result<()> {
        let mut request = Request::new(Ask::Disarm);
        request.id = slot;
        self.ask(&request, None, PATIENCE).map(drop)
    }

    /// Sends a request and waits for the answer. Allocates nothing unless it fails.
    fn ask(
        &self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> io::Result<Reply> {
        let socket = match self.socket.lock() {
            Ok(socket) => socket,
            Err(poisoned) => poisoned.into_inner(),
        };
        let Some(socket) = socket
            .as_ref()
            .filter(|_| !self.lost.load(Ordering::Relaxed))
        else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let answer = exchange(socket.as_raw_fd(), request, fd, patience);
        match answer {
            Ok(reply) if reply.errno == 0 => Ok(reply),
            Ok(reply) => Err(io::Error::from_raw_os_error(reply.errno)),
            Err(error) => {
                // A late answer would be taken for that of the next request.
                self.lost.store(true, Ordering::Relaxed);
                Err(error)
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let socket = match self.socket.get_mut() {
            Ok(socket) => socket,
            Err(poisoned) => poisoned.into_inner(),
        };
        drop(socket.take());
        // It ends once it has done its work. One that is stopped is left to itself.
        let end = Instant::now() + PATIENCE + self.work;
        while Instant::now() < end {
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(nix::sys::wait::WaitStatus::StillAlive) | Err(Errno::EINTR) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => return,
            }
        }
    }
}

/// A frozen filesystem. Dropped, it is thawed.
#[derive(Debug)]
#[must_use = "dropping it thaws"]
pub struct Frozen {
    guard: Arc<Inner>,
    mount: Arc<MountPoint>,
    slot: u32,
    begin: Instant,
    since: Instant,
    is_frozen: bool,
    heart: Heart,
    _no_stop: NoStop,
}

/// How long a freeze took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// The FIFREEZE call: writers begin to wait somewhere within it.
    pub freeze_call: Duration,
    /// From its return to the begin of the thaw.
    pub held: Duration,
    /// The FITHAW call.
    pub thaw_call: Duration,
    /// Whether the guard still lived at the end. If not, the freeze held all the same, but nothing
    /// watches over the next one.
    pub guard_alive: bool,
}

impl Thawed {
    /// All the time that writers may have waited.
    pub fn total(&self) -> Duration {
        self.freeze_call + self.held + self.thaw_call
    }
}

impl Frozen {
    /// How long the FIFREEZE call took.
    pub fn freeze_call(&self) -> Duration {
        self.since - self.begin
    }

    /// How long it is frozen by now.
    pub fn held(&self) -> Duration {
        self.since.elapsed()
    }

    /// Thaws.
    ///
    /// # Errors
    /// [`FreezeError::DidNotHold`] if it was no longer frozen: whatever was read is worthless.
    pub fn thaw(mut self) -> std::result::Result<Thawed, FreezeError> {
        let held = self.since.elapsed();
        let begin = Instant::now();
        self.is_frozen = false;
        self.heart.rest();
        let thawed = self.mount.thaw();
        let thaw_call = begin.elapsed();
        match thawed {
            Ok(()) => {}
            Err(Errno::EINVAL) => {
                let _ = self.guard.disarm(self.slot);
                return Err(FreezeError::DidNotHold);
            }
            // Stays armed: the guard tries again at the deadline.
            Err(errno) => return Err(FreezeError::Failed(errno.into())),
        }
        Ok(Thawed {
            freeze_call: self.freeze_call(),
            held,
            thaw_call,
            guard_alive: self.guard.disarm(self.slot).is_ok(),
        })
    }
}

/// While something is frozen, a thread tells the guard every now and then that this process runs. A
/// process that was stopped, or whose control group was frozen, does not, and the guard thaws soon.
#[derive(Debug)]
struct Heart {
    pulse: Arc<Pulse>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is told.
#[derive(Debug, Default)]
struct Pulse {
    /// It has a freeze to speak for.
    is_beating: AtomicBool,
    is_over: AtomicBool,
    slot: AtomicU32,
    /// CLOCK_MONOTONIC, nanoseconds.
    deadline: AtomicU64,
}

/// How often the guard is told, and how long it waits for that.
const BEAT: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(5);

/// Until when the guard waits for the next beat; never longer than until the deadline.
fn next_beat(deadline: u64) -> u64 {
    let silence = u64::try_from(SILENCE.as_nanos()).unwrap_or(u64::MAX);
    wire::monotonic().saturating_add(silence).min(deadline)
}

impl Heart {
    /// Starts the thread, which rests until the first [`beat`](Self::beat).
    fn start(guard: &Arc<Inner>) -> io::Result<Self> {
        let guard = Arc::clone(guard);
        let pulse = Arc::<Pulse>::default();
        let told = Arc::clone(&pulse);
        let run = move || {
            while !told.is_over.load(Ordering::Acquire) {
                std::thread::park_timeout(BEAT);
                if told.is_over.load(Ordering::Acquire) {
                    return;
                }
                if !told.is_beating.load(Ordering::Acquire) {
                    continue;
                }
                let mut request = Request::new(Ask::Beat);
                request.id = told.slot.load(Ordering::Relaxed);
                request.value = next_beat(told.deadline.load(Ordering::Relaxed));
                if guard.ask(&request, None, PATIENCE).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("holdstill-beat".to_owned());
        Ok(Self {
            thread: Some(thread.spawn(run)?),
            pulse,
        })
    }

    /// From now on the guard is told that the freeze in this slot goes on, until its deadline.
    fn beat(&self, slot: u32, deadline: u64) {
        self.pulse.slot.store(slot, Ordering::Relaxed);
        self.pulse.deadline.store(deadline, Ordering::Relaxed);
        self.pulse.is_beating.store(true, Ordering::Release);
    }

    /// No more beats. Does not wait for the thread.
    fn rest(&self) {
        self.pulse.is_over.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.rest();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.is_frozen && matches!(self.mount.thaw(), Ok(()) | Err(Errno::EINVAL)) {
            let _ = self.guard.disarm(self.slot);
        }
    }
}

impl From<Counts> for Report {
    fn from(counts: Counts) -> Self {
        let value = counts.hook_value;
        Self {
            thawed: counts.thawed,
            hook: match counts.hook {
                wire::hook::EXITED => Some(HookEnd::Ran(Ending::Exit(value))),
                wire::hook::KILLED => Some(HookEnd::Ran(Ending::Signal(value))),
                wire::hook::LATE => Some(HookEnd::Ran(Ending::Deadline)),
                wire::hook::NOT_STARTED => Some(HookEnd::NotStarted(value)),
                _ => None,
            },
            removed: counts.removed,
            left: counts.left,
        }
    }
}

fn exchange(
    socket: i32,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
    patience: Duration,
) -> io::Result<Reply> {
    wire::send(socket, request, fd.map(|fd| fd.as_raw_fd()))?;
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        if wire::wait(socket, left)? {
            break;
        }
        if left == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    match wire::receive::<Reply>(socket)? {
        Some((reply, _)) => Ok(reply),
        None => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// Makes everything ready for `execve(2)`.
fn prepare(hook: Hook) -> Result<child::Prepared> {
    let args = vec!["/bin/sh".into(), "-c".into(), hook.script];
    let inherited = std::env::vars_os()
        .filter(|(name, _)| !hook.env.iter().any(|(ours, _)| ours == name))
        .collect::<Vec<_>>();
    let env = inherited.into_iter().chain(hook.env.iter().cloned());
    let mut prepared = prepared(args, env, hook.deadline)?;
    prepared.output = hook.output.as_ref().map_or(2, AsRawFd::as_raw_fd);
    Ok(prepared)
}

fn prepare_undo(undo: Undo) -> Result<child::PreparedUndo> {
    let env = command::ENVIRONMENT.map(|(name, value)| (name.into(), value.into()));
    Ok(child::PreparedUndo {
        way: match undo.way {
            Way::Command(words) => {
                child::PreparedWay::Command(prepared(words, env, undo.patience)?)
            }
            Way::Takeover(takeover) => {
                let room = Arena::new(takeover.room())?;
                child::PreparedWay::Takeover(takeover, room)
            }
        },
        patience: undo.patience,
    })
}

fn prepared(
    args: Vec<OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    deadline: Duration,
) -> Result<child::Prepared> {
    let program = args.first().cloned().unwrap_or_default();
    let string = |bytes: Vec<u8>| {
        CString::new(bytes).map_err(|_| Error::other("cannot run", &program, "a zero byte in it"))
    };
    let env = env.into_iter().map(|(name, value)| {
        let mut variable = name.into_vec();
        variable.push(b'=');
        variable.extend(value.into_vec());
        string(variable)
    });
    let env = env.collect::<Result<Vec<_>>>()?;
    let args = args.into_iter().map(|arg| string(arg.into_vec()));
    let args = args.collect::<Result<Vec<_>>>()?;
    Ok(child::Prepared::new(args, env, deadline))
}

#[cfg(test)]
mod tests;
