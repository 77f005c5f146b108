//! The guard's own process. It is forked, not executed, so nothing in here allocates, locks or
//! panics: all it needs was prepared before, and it talks to the kernel alone.

use std::ffi::{CStr, CString};
use std::os::fd::{IntoRawFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;

use super::LeftoverKind;
use super::wire::{self, Ask, Counts, MAX_NAME, Reply, Request, hook};
use crate::btrfs;
use crate::dm::Takeover;
use crate::freeze;
use crate::memory::Arena;
use crate::os;
use crate::urgent::become_urgent;

/// Freezes watched at a time.
pub(super) const SLOTS: usize = 64;

/// Things to remove at a time.
pub(super) const ENTRIES: usize = 64;

/// Commands that undo something.
pub(super) const UNDOS: usize = 64;

/// How often an overdue filesystem that is not frozen yet is tried again, in milliseconds.
const RETRY_MS: i32 = 10;

/// Real-time priority: above what an administrator gives to ordinary real-time work (1 to 20 or
/// so), below the kernel's own watchdogs.
const PRIORITY: i32 = 50;

/// How long to wait before a command that failed is tried again, in milliseconds.
const UNDO_RETRY_MS: i32 = 200;

/// How much stack is touched beforehand, in bytes.
const STACK: usize = 64 << 10;

/// A program with its arguments and environment, ready for `execve(2)`.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Keeps alive what the pointers below point to.
    _strings: Vec<CString>,
    program: *const libc::c_char,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    deadline: Duration,
    /// The descriptor that what it prints goes to.
    pub(super) output: RawFd,
}

impl Prepared {
    pub(super) fn new(args: Vec<CString>, env: Vec<CString>, deadline: Duration) -> Self {
        let pointers = |strings: &[CString]| {
            let mut pointers: Vec<_> = strings.iter().map(|string| string.as_ptr()).collect();
            pointers.push(std::ptr::null());
            pointers
        };
        let argv = pointers(&args);
        let envp = pointers(&env);
        let mut strings = args;
        strings.extend(env);
        Self {
            program: argv.first().copied().unwrap_or(std::ptr::null()),
            argv,
            envp,
            _strings: strings,
            deadline,
            output: 2,
        }
    }

    fn nanoseconds(&self) -> u64 {
        nanoseconds(self.deadline)
    }
}

/// Something to undo, ready to be.
#[derive(Debug)]
pub(super) struct PreparedUndo {
    pub(super) way: PreparedWay,
    pub(super) patience: Duration,
}

/// How.
#[derive(Debug)]
pub(super) enum PreparedWay {
    Command(Prepared),
    /// In this process, with memory to work in.
    Takeover(Takeover, Arena),
}

/// What happens to a command at its deadline.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WhenLate {
    Kill,
    /// It goes on by itself: a tool killed while it has a device suspended would leave it so.
    LeaveIt,
}

/// A freeze that the run has announced.
#[derive(Clone, Copy)]
struct Slot {
    /// The mount point; negative: free.
    fd: RawFd,
    /// CLOCK_MONOTONIC, nanoseconds.
    deadline: u64,
    /// Counts up with each freeze that was announced. What lies on something else is frozen before that and
    /// must be thawed after it: its thaw writes.
    order: u64,
    /// We ended it.
    thawed: bool,
}

/// Something to remove.
#[derive(Clone, Copy)]
struct Entry {
    /// Its folder; negative: free.
    folder: RawFd,
    name: [u8; MAX_NAME + 1],
    kind: LeftoverKind,
}

struct Child<'a> {
    socket: RawFd,
    slots: [Slot; SLOTS],
    /// How many freezes were announced so far.
    armed: u64,
    entries: [Entry; ENTRIES],
    hook: Option<&'a Prepared>,
    hook_owed: bool,
    hook_ran: bool,
    undo: &'a mut [PreparedUndo],
    undo_owed: [bool; UNDOS],
    done: Counts,
}

/// Runs the guard in the forked child until the run ends, then ends the process. `kept` are sorted
/// descriptors that stay open, `socket` among them; `groups` the files by which to join other control
/// groups.
pub(super) fn run(
    socket: RawFd,
    kept: &[RawFd],
    groups: &[CString],
    hook: Option<&Prepared>,
    undo: &mut [PreparedUndo],
) -> ! {
    settle(kept, groups);
    let mut child = Child {
        socket,
        slots: [Slot {
            fd: -1,
            deadline: 0,
            order: 0,
            thawed: false,
        }; SLOTS],
        armed: 0,
        entries: [Entry {
            folder: -1,
            name: [0; MAX_NAME + 1],
            kind: LeftoverKind::File,
        }; ENTRIES],
        hook,
        hook_owed: false,
        hook_ran: false,
        undo,
        undo_owed: [false; UNDOS],
        done: Counts::default(),
    };
    child.serve();
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

impl Child<'_> {
    /// Answers requests until the run finishes or dies.
    fn serve(&mut self) {
        loop {
            let timeout = self.thaw_overdue();
            match wire::wait(self.socket, timeout) {
                Ok(false) => continue,
                Ok(true) => {}
                Err(_) => break,
            }
            let Ok(Some((request, fd))) = wire::receive::<Request>(self.socket) else {
                break;
            };
            let fd = fd.map(IntoRawFd::into_raw_fd);
            let ask = request.ask();
            if ask == Some(Ask::Finish) {
                self.finish();
                self.reply(0, 0);
                return;
            }
            let (errno, id) = match self.answer(ask, &request, fd) {
                Ok(id) => (0, id),
                Err(errno) => {
                    if let Some(fd) = fd {
                        close(fd);
                    }
                    (errno as i32, 0)
                }
            };
            self.reply(errno, id);
        }
        self.finish();
    }

    fn reply(&self, errno: i32, id: u32) {
        let reply = Reply {
            errno,
            id,
            report: self.done,
        };
        // If nobody listens any more, the next look at the socket says so.
        let _ = wire::send(self.socket, &reply, None);
    }

    fn answer(
        &mut self,
        ask: Option<Ask>,
        request: &Request,
        fd: Option<RawFd>,
    ) -> Result<u32, Errno> {
        match ask.ok_or(Errno::EBADMSG)? {
            Ask::Ping | Ask::Finish => Ok(0),
            Ask::Arm => {
                let fd = fd.ok_or(Errno::EBADF)?;
                let (id, slot) = find(&mut self.slots, |slot| slot.fd < 0)?;
                self.armed += 1;
                *slot = Slot {
                    fd,
                    deadline: request.value,
                    order: self.armed,
                    thawed: false,
                };
                Ok(id)
            }
            Ask::Beat => {
                at(&mut self.slots, request.id)?.deadline = request.value;
                Ok(0)
            }
            Ask::Disarm => {
                let slot = at(&mut self.slots, request.id)?;
                close(slot.fd);
                slot.fd = -1;
                Ok(0)
            }
            Ask::File | Ask::Folder | Ask::Subvolume => {
                let folder = fd.ok_or(Errno::EBADF)?;
                let (id, entry) = find(&mut self.entries, |entry| entry.folder < 0)?;
                *entry = Entry {
                    folder,
                    name: request.name(),
                    kind: match ask {
                        Some(Ask::Folder) => LeftoverKind::Folder,
                        Some(Ask::Subvolume) => LeftoverKind::Subvolume,
                        _ => LeftoverKind::File,
                    },
                };
                Ok(id)
            }
            Ask::Forget => {
                let entry = at(&mut self.entries, request.id)?;
                close(entry.folder);
                entry.folder = -1;
                Ok(0)
            }
            Ask::OweUndo | Ask::ForgetUndo => {
                *at(&mut self.undo_owed, request.id)? = ask == Some(Ask::OweUndo);
                Ok(0)
            }
            Ask::Owe => {
                self.hook_owed = true;
                // Owed again after it ran: it runs again.
                self.hook_ran = false;
                Ok(0)
            }
            Ask::Hook => {
                self.run_hook();
                Ok(0)
            }
        }
    }

    /// Thaws everything once anything is past its deadline: the thaw of one alone may wait for that of what
    /// it lies on. How long the guard may sleep then, in milliseconds.
    fn thaw_overdue(&mut self) -> i32 {
        let open = |slot: &&Slot| slot.fd >= 0 && !slot.thawed;
        let Some(first) = self.slots.iter().filter(open).map(|it| it.deadline).min() else {
            return -1;
        };
        let now = wire::monotonic();
        if now < first {
            return i32::try_from((first - now).div_ceil(1_000_000)).unwrap_or(i32::MAX);
        }
        self.thaw_all();
        match self.slots.iter().any(|slot| open(&slot)) {
            // Not frozen yet: the run was stopped before its FIFREEZE, or that takes long.
            true => RETRY_MS,
            false => -1,
        }
    }

    /// Thaws whatever is frozen, the latest first.
    fn thaw_all(&mut self) {
        let mut before = u64::MAX;
        loop {
            let slots = self.slots.iter_mut();
            let left = slots.filter(|slot| slot.fd >= 0 && !slot.thawed && slot.order < before);
            let Some(slot) = left.max_by_key(|slot| slot.order) else {
                return;
            };
            before = slot.order;
            if freeze::thaw(slot.fd).is_ok() {
                slot.thawed = true;
                self.done.thawed += 1;
            }
        }
    }

    /// The run is over, one way or the other: thaw, run the hook, remove, undo.
    fn finish(&mut self) {
        // The run's descriptors were closed after its last system call returned, so everything is
        // either frozen now or will not be. A signal cannot interrupt: all are ignored.
        self.thaw_all();
        for slot in &mut self.slots {
            if slot.fd >= 0 {
                close(slot.fd);
                slot.fd = -1;
            }
        }
        if self.hook_owed {
            self.run_hook();
        }
        for at in 0..ENTRIES {
            let Some(entry) = self.entries.get(at).filter(|entry| entry.folder >= 0) else {
                continue;
            };
            let removed = remove(entry);
            self.count(removed);
        }
        // The latest first: it may stand on an earlier one.
        let undo = std::mem::take(&mut self.undo);
        for (prepared, at) in undo.iter_mut().zip(0..UNDOS).rev() {
            if self.undo_owed.get(at) == Some(&true) {
                let undone = self.undo(prepared);
                self.count(undone);
            }
        }
    }

    fn count(&mut self, removed: bool) {
        match removed {
            true => self.done.removed += 1,
            false => self.done.left += 1,
        }
    }

    /// Undoes something, again and again until that succeeds: it may be busy still, or may not be there
    /// yet because the tool that makes it has outlived the run. Whether it did.
    fn undo(&mut self, prepared: &mut PreparedUndo) -> bool {
        let end = wire::monotonic().saturating_add(nanoseconds(prepared.patience));
        loop {
            let undone = match &mut prepared.way {
                PreparedWay::Command(command) => {
                    self.run(command, WhenLate::LeaveIt) == (hook::EXITED, 0)
                }
                PreparedWay::Takeover(takeover, room) => takeover.undo(room.bytes_mut()).is_ok(),
            };
            if undone {
                return true;
            }
            if wire::monotonic() >= end {
                return false;
            }
            sleep_ms(UNDO_RETRY_MS);
        }
    }

    /// Runs the hook to its end or deadline, unless it ran already since it was owed.
    fn run_hook(&mut self) {
        let Some(hook) = self.hook.filter(|_| !self.hook_ran) else {
            return;
        };
        self.hook_owed = false;
        self.hook_ran = true;
        (self.done.hook, self.done.hook_value) = self.run(hook, WhenLate::Kill);
    }

    /// Runs a command to its end or deadline: how it ended, as the reply says it.
    fn run(&mut self, prepared: &Prepared, when_late: WhenLate) -> (u32, i32) {
        // SAFETY: the child of this single-threaded process calls nothing but the kernel until it
        // executes the command.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return (hook::NOT_STARTED, Errno::last_raw());
        }
        if pid == 0 {
            execute(prepared);
        }
        let end = wire::monotonic().saturating_add(prepared.nanoseconds());
        let mut late = false;
        let mut status = 0;
        loop {
            // SAFETY: waits for our own child; `status` is memory for its status.
            let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
            if waited == pid {
                break;
            }
            if waited < 0 && Errno::last() != Errno::EINTR {
                return (hook::NOT_STARTED, Errno::last_raw());
            }
            if !late && wire::monotonic() >= end {
                if when_late == WhenLate::LeaveIt {
                    return (hook::LATE, 0);
                }
                late = true;
                // SAFETY: the group of our own child, not yet waited for.
                unsafe { libc::kill(-pid, libc::SIGKILL) };
                // SAFETY: as above; it may not have made its group yet.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            self.thaw_overdue();
            sleep_ms(RETRY_MS / 2);
        }
        if late {
            (hook::LATE, 0)
        } else if libc::WIFEXITED(status) {
            (hook::EXITED, libc::WEXITSTATUS(status))
        } else {
            (hook::KILLED, libc::WTERMSIG(status))
        }
    }
}

fn find<T>(all: &mut [T], is_free: impl Fn(&T) -> bool) -> Result<(u32, &mut T), Errno> {
    let mut free = all.iter_mut().enumerate().filter(|(_, one)| is_free(one));
    let (id, one) = free.next().ok_or(Errno::ENOSPC)?;
    Ok((u32::try_from(id).map_err(|_| Errno::ENOSPC)?, one))
}

fn at<T>(all: &mut [T], id: u32) -> Result<&mut T, Errno> {
    let id = usize::try_from(id).map_err(|_| Errno::EINVAL)?;
    all.get_mut(id).ok_or(Errno::EINVAL)
}

/// Removes a file, an empty folder or a subvolume; whether it is gone. A trace instance is busy until the
/// kernel has let go of the readers of the dead run.
fn remove(entry: &Entry) -> bool {
    let Ok(name) = CStr::from_bytes_until_nul(&entry.name) else {
        return false;
    };
    let unlink = |flags| {
        // SAFETY: a terminated name.
        let removed = unsafe { libc::unlinkat(entry.folder, name.as_ptr(), flags) };
        Errno::result(removed).map(drop)
    };
    for _ in 0..200 {
        let removed = match entry.kind {
            LeftoverKind::File => unlink(0),
            LeftoverKind::Folder => unlink(libc::AT_REMOVEDIR),
            LeftoverKind::Subvolume => btrfs::delete_subvolume(entry.folder, name),
        };
        match removed {
            Ok(()) | Err(Errno::ENOENT) => return true,
            Err(Errno::EBUSY | Errno::EINTR) => sleep_ms(RETRY_MS),
            Err(_) => return false,
        }
    }
    false
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn sleep_ms(milliseconds: i32) {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: libc::c_long::from(milliseconds) * 1_000_000,
    };
    // SAFETY: one initialized timespec; the time left is not asked for.
    unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
}

fn close(fd: RawFd) {
    // SAFETY: only ever called on descriptors that came to this process for it alone.
    unsafe { libc::close(fd) };
}

/// Makes a bare guard of a fresh fork. What a kernel or container does not grant is done without:
/// each step only makes a bad day less likely.
fn settle(kept: &[RawFd], groups: &[CString]) {
    for group in groups {
        // 0: whoever writes it.
        write_to(group, b"0");
    }
    // SAFETY: system calls with constants and addresses of locals or statics, in a process with one
    // thread. None of them touches memory that Rust owns elsewhere.
    unsafe {
        libc::setsid();
        for signal in 1..=os::guard::last_signal() {
            if signal != libc::SIGCHLD {
                libc::signal(signal, libc::SIG_IGN);
            }
        }
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        if null >= 0 {
            libc::dup2(null, 0);
            libc::dup2(null, 1);
        }
    }
    os::guard::set_name(c"holdstill-guard");
    close_all_but(kept);
    write_to(c"/proc/self/oom_score_adj", b"-1000");
    let _ = become_urgent(PRIORITY);
    touch_stack();
    // SAFETY: locks this process's own memory.
    unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
}

#[inline(never)]
fn touch_stack() {
    let mut stack = [0u8; STACK];
    std::hint::black_box(&mut stack);
}

/// Closes every descriptor but standard error and the sorted ones given, so that pipes, locks and
/// devices of the run do not stay open with us.
fn close_all_but(kept: &[RawFd]) {
    let mut first: libc::c_uint = 3;
    for &fd in kept {
        let Ok(fd) = libc::c_uint::try_from(fd) else {
            continue;
        };
        if fd >= first {
            close_range(first, fd);
            first = fd + 1;
        }
    }
    close_range(first, libc::c_uint::MAX);
}

/// Closes the descriptors from `first` to below `end`.
fn close_range(first: libc::c_uint, end: libc::c_uint) {
    if first >= end {
        return;
    }
    if os::guard::close_range(first, end - 1) {
        return;
    }
    // Before Linux 5.9.
    let mut limit = libc::rlimit {
        rlim_cur: 1024,
        rlim_max: 1024,
    };
    // SAFETY: memory for one rlimit.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    let last = u64::from(end).min(limit.rlim_cur);
    for fd in u64::from(first)..last {
        if let Ok(fd) = RawFd::try_from(fd) {
            close(fd);
        }
    }
}

fn write_to(path: &CStr, bytes: &[u8]) {
    // SAFETY: a terminated path and an initialized buffer; the descriptor is closed again.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, bytes.as_ptr().cast(), bytes.len());
            libc::close(fd);
        }
    }
}

/// Becomes the command.
fn execute(command: &Prepared) -> ! {
    // SAFETY: in the fresh child of a single-threaded process; the vectors end with null pointers
    // and point to strings that live as long as they do.
    unsafe {
        libc::setpgid(0, 0);
        for signal in 1..=os::guard::last_signal() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
        // Never to standard output: that may be the image.
        libc::dup2(command.output, 2);
        libc::dup2(2, 1);
    }
    write_to(c"/proc/self/oom_score_adj", b"0");
    // The guard's locks and folders are not the command's.
    close_range(3, libc::c_uint::MAX);
    // SAFETY: see above.
    unsafe {
        libc::execve(
            command.program,
            command.argv.as_ptr(),
            command.envp.as_ptr(),
        );
        libc::_exit(127)
    }
}
