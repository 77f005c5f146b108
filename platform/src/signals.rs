//! Being asked to stop: SIGINT, SIGTERM and SIGHUP set a flag that the work looks at between two
//! steps, so that everything is thawed and removed on the way out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::unistd::Pid;

use crate::error::{Context, Result};

/// The signals that ask to stop.
const STOPPING: [(Signal, StopSignal); 3] = [
    (Signal::SIGINT, StopSignal::Interrupt),
    (Signal::SIGTERM, StopSignal::Terminate),
    (Signal::SIGHUP, StopSignal::HangUp),
];

/// Which signal asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal is gone.
    HangUp,
}

/// Whether we were asked to stop. Clones share one flag.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// Takes over SIGINT, SIGTERM and SIGHUP; those that were ignored when we were started
    /// (`nohup`, a background job of a plain shell) stay ignored. SIGPIPE is ignored: a reader that
    /// goes away is seen as `BrokenPipe` by the next write. SIGXFSZ no longer kills: a file that may
    /// not grow (`ulimit -f`) is seen as `FileTooLarge` by the write. SIGTSTP waits while something is
    /// frozen. Children start with the default for all
    /// of them but those the user had ignored.
    ///
    /// # Errors
    /// What `sigaction(2)` says.
    pub fn install() -> Result<Self> {
        let stop = Self::default();
        for (number, name) in STOPPING {
            if is_ignored(number).context("cannot look at the signal", number.as_str())? {
                continue;
            }
            signal_hook::flag::register_usize(number as i32, stop.0.clone(), name as usize + 1)
                .context("cannot take over the signal", number.as_str())?;
        }
        if !is_ignored(Signal::SIGTSTP).context("cannot look at the signal", "SIGTSTP")? {
            // SAFETY: the handler calls what may be called in one: atomics, and kill(2).
            unsafe { signal_hook::low_level::register(Signal::SIGTSTP as i32, stop_unless_frozen) }
                .context("cannot take over the signal", "SIGTSTP")?;
        }
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }
            .context("cannot ignore the signal", "SIGPIPE")?;
        // A handler that nobody asks, not `SIG_IGN`: children must start with the default.
        signal_hook::flag::register(Signal::SIGXFSZ as i32, Arc::default())
            .context("cannot take over the signal", "SIGXFSZ")?;
        Ok(stop)
    }

    /// The last signal that asked to stop, if one did.
    pub fn asked(&self) -> Option<StopSignal> {
        let value = self.0.load(Ordering::Relaxed);
        STOPPING
            .iter()
            .map(|(_, name)| *name)
            .find(|name| *name as usize + 1 == value)
    }

    /// Asks to stop as the signal would.
    pub fn ask(&self, by: StopSignal) {
        self.0.store(by as usize + 1, Ordering::Relaxed);
    }
}

/// How many filesystems are frozen just now.
static FROZEN: AtomicUsize = AtomicUsize::new(0);

/// Whether a stop waits for their thaw.
static STOP_WAITS: AtomicBool = AtomicBool::new(false);

/// While this exists, a stop by the terminal (SIGTSTP: Ctrl-Z) waits: a process that is stopped thaws
/// nothing.
#[derive(Debug)]
pub(crate) struct NoStop(());

impl NoStop {
    pub(crate) fn begin() -> Self {
        FROZEN.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for NoStop {
    fn drop(&mut self) {
        if FROZEN.fetch_sub(1, Ordering::SeqCst) == 1 && STOP_WAITS.swap(false, Ordering::SeqCst) {
            stop();
        }
    }
}

/// The handler of SIGTSTP.
fn stop_unless_frozen() {
    match FROZEN.load(Ordering::SeqCst) {
        0 => stop(),
        _ => STOP_WAITS.store(true, Ordering::SeqCst),
    }
}

/// Does what the signal does by default.
fn stop() {
    let _ = signal_hook::low_level::emulate_default_handler(Signal::SIGTSTP as i32);
}

/// An abort, as of an allocation that failed, ends the program with one more line and exit code 1, as every
/// failure does. What is frozen is thawed by the guard, which sees that we are gone.
pub fn end_on_abort() {
    extern "C" fn end(_: libc::c_int) {
        let said = b"holdstill: it had to end at once: memory may be short (--threads and --memory bound it)\n";
        // SAFETY: both may be called in a signal handler; the bytes are a constant.
        unsafe {
            libc::write(2, said.as_ptr().cast(), said.len());
            libc::_exit(1);
        }
    }
    // SAFETY: the handler calls nothing but the kernel, and does not return.
    let _ = unsafe { signal(Signal::SIGABRT, SigHandler::Handler(end)) };
}

/// Whether there is a process of this number, dead perhaps and not waited for.
pub fn is_process(pid: u32) -> bool {
    // Zero and what is negative mean groups of processes.
    let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0);
    pid.is_some_and(|pid| kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH))
}

/// Whether this process ignores a signal.
fn is_ignored(number: Signal) -> std::io::Result<bool> {
    let mut old = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: no new action is given, and `old` is memory for the one that is written.
    let result = unsafe { libc::sigaction(number as i32, std::ptr::null(), old.as_mut_ptr()) };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: zeroed before, and written by the C library.
    let old = unsafe { old.assume_init() };
    Ok(old.sa_sigaction == libc::SIG_IGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Tool;
    use crate::testing::Role;
    use nix::sys::signal::kill;
    use nix::unistd::Pid;

    #[test]
    fn each_signal_is_told_apart() {
        for (number, name) in STOPPING {
            let mut role = Role::start("signals::tests::role_waits", &[]);
            kill(Pid::from_raw(role.pid()), number).unwrap();
            assert_eq!(role.expect("asked"), format!("{name:?}"));
        }
    }

    #[test]
    fn role_waits() {
        if Role::args().is_none() {
            return;
        }
        // Whoever runs the tests may ignore them, as a job in the background does.
        for (number, _) in STOPPING {
            // SAFETY: the default runs no code of ours.
            unsafe { signal(number, SigHandler::SigDfl) }.unwrap();
        }
        let stop = Stop::install().unwrap();
        assert_eq!(stop.asked(), None);
        Role::say("ready");
        while stop.asked().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Role::say(&format!("asked {:?}", stop.asked().unwrap()));
    }

    #[test]
    fn what_was_ignored_stays_ignored_and_children_start_fresh() {
        let mut role = Role::start("signals::tests::role_ignores", &[]);
        // SigIgn of the shell that the role ran: bit n-1 stands for signal n.
        let ignored = u64::from_str_radix(&role.expect("child ignores"), 16).unwrap();
        assert_eq!(ignored & (1 << 12), 0, "SIGPIPE is back in children");
        assert_ne!(ignored & 1, 0, "SIGHUP, ignored by the user, stays so");
        assert_eq!(ignored & (1 << 14), 0);
        kill(Pid::from_raw(role.pid()), Signal::SIGHUP).unwrap();
        kill(Pid::from_raw(role.pid()), Signal::SIGTERM).unwrap();
        assert_eq!(role.expect("asked"), "Terminate");
    }

    #[test]
    fn role_ignores() {
        if Role::args().is_none() {
            return;
        }
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }.unwrap();
        let stop = Stop::install().unwrap();
        let script = "sed -n 's/^SigIgn:[[:space:]]*//p' /proc/self/status";
        let output = Tool::shell(script).run().unwrap().stdout;
        Role::say("ready");
        let mask = String::from_utf8(output).unwrap();
        Role::say(&format!("child ignores {}", mask.trim()));
        while stop.asked().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Role::say(&format!("asked {:?}", stop.asked().unwrap()));
    }
}
