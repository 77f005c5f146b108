//! Messages between a run and its guard, and how they travel. Nothing here allocates: one end runs
//! in a forked child, and some of it while a filesystem is frozen.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::os::guard::RECEIVE;

/// Longest name of something to remove, in bytes (NAME_MAX).
pub(super) const MAX_NAME: usize = 255;

/// What the run asks for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Answer, nothing else.
    Ping,
    /// Thaw the descriptor that comes along if we die, or at the time `value`.
    Arm,
    /// Thaw slot `id` at the time `value` instead: we are alive.
    Beat,
    /// Forget slot `id`: it is thawed.
    Disarm,
    /// Remove the file `name` of the folder that comes along, if we die.
    File,
    /// The same for an empty folder.
    Folder,
    /// The same for a subvolume.
    Subvolume,
    /// Forget entry `id`.
    Forget,
    /// Carry out undo `id` once the run is over.
    OweUndo,
    /// Forget undo `id`: it was done.
    ForgetUndo,
    /// Run the hook once, if we die.
    Owe,
    /// Run the hook now, unless it ran.
    Hook,
    /// Do what is left to do, answer, and go.
    Finish,
}

/// All of them, in the order of their numbers.
const ASKS: [Ask; 13] = [
    Ask::Ping,
    Ask::Arm,
    Ask::Beat,
    Ask::Disarm,
    Ask::File,
    Ask::Folder,
    Ask::Subvolume,
    Ask::Forget,
    Ask::OweUndo,
    Ask::ForgetUndo,
    Ask::Owe,
    Ask::Hook,
    Ask::Finish,
];

/// One request.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    ask: u32,
    /// Slot, entry or undo.
    pub(super) id: u32,
    /// CLOCK_MONOTONIC, in nanoseconds.
    pub(super) value: u64,
    name_len: u64,
    name: [u8; MAX_NAME + 1],
}

/// One answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reply {
    /// Error number, or 0.
    pub(super) errno: i32,
    /// Slot or entry.
    pub(super) id: u32,
    pub(super) report: Counts,
}

/// What the guard has done so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Freezes that the guard ended.
    pub(super) thawed: u32,
    /// See [`hook`].
    pub(super) hook: u32,
    /// Its exit code, signal or error number.
    pub(super) hook_value: i32,
    /// Files, folders and other things removed.
    pub(super) removed: u32,
    /// Those that could not be removed.
    pub(super) left: u32,
}

/// What became of the hook; 0: it did not run.
pub(super) mod hook {
    pub(crate) const EXITED: u32 = 1;
    pub(crate) const KILLED: u32 = 2;
    pub(crate) const LATE: u32 = 3;
    pub(crate) const NOT_STARTED: u32 = 4;
}

impl Request {
    pub(super) fn new(ask: Ask) -> Self {
        Self {
            ask: ask as u32,
            id: 0,
            value: 0,
            name_len: 0,
            name: [0; MAX_NAME + 1],
        }
    }

    /// With a file name; `None` if it is empty, too long, or no plain name.
    pub(super) fn named(ask: Ask, name: &[u8]) -> Option<Self> {
        let plain = !name.is_empty() && !name.contains(&b'/') && !name.contains(&0);
        if !plain || name == b"." || name == b".." {
            return None;
        }
        let mut request = Self::new(ask);
        request.name.get_mut(..name.len())?.copy_from_slice(name);
        if name.len() > MAX_NAME {
            return None;
        }
        request.name_len = name.len() as u64;
        Some(request)
    }

    pub(super) fn ask(&self) -> Option<Ask> {
        ASKS.get(usize::try_from(self.ask).ok()?).copied()
    }

    /// The name, ended by a zero byte.
    pub(super) fn name(&self) -> [u8; MAX_NAME + 1] {
        let mut name = self.name;
        name[MAX_NAME] = 0;
        name
    }
}

/// A struct of plain integers without padding, sent as its bytes.
///
/// # Safety
/// Every byte belongs to an integer field, and every bit pattern is a value.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: u32, u32, u64, u64, 256 bytes: 280 bytes without padding.
unsafe impl Plain for Request {}
// SAFETY: seven 32-bit integers.
unsafe impl Plain for Reply {}

const _: () = assert!(size_of::<Request>() == 280 && size_of::<Reply>() == 28);

/// Room for one descriptor beside a message.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends one message, and a descriptor if there is one.
pub(super) fn send<T: Plain>(socket: RawFd, message: &T, fd: Option<RawFd>) -> Result<(), Errno> {
    // SAFETY: `Plain` promises that all bytes are initialized.
    let bytes =
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(message).cast(), size_of::<T>()) };
    let part = IoSlice::new(bytes);
    let mut control = Control([0; 64]);
    let mut header = empty_header();
    header.msg_iov = std::ptr::from_ref(&part).cast_mut().cast();
    header.msg_iovlen = 1;
    if let Some(fd) = fd {
        header.msg_control = (&raw mut control).cast();
        // SAFETY: pure arithmetic on a small constant.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as _;
        // SAFETY: the header's control buffer is 64 aligned bytes, more than CMSG_SPACE(4), so the
        // first control header and its four bytes of data lie within it.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(first).cast::<RawFd>().write_unaligned(fd);
        }
    }
    loop {
        // SAFETY: `header` points to one initialized buffer and an initialized control block.
        let sent = unsafe { libc::sendmsg(socket, &raw const header, libc::MSG_NOSIGNAL) };
        match Errno::result(sent) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Receives one message; `None` when the other end is closed.
pub(super) fn receive<T: Plain>(socket: RawFd) -> Result<Option<(T, Option<OwnedFd>)>, Errno> {
    let mut message = MaybeUninit::<T>::zeroed();
    let mut part = libc::iovec {
        iov_base: message.as_mut_ptr().cast(),
        iov_len: size_of::<T>(),
    };
    let mut control = Control([0; 64]);
    let mut header = empty_header();
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of::<Control>() as _;
    let received = loop {
        // SAFETY: `header` points to memory for one `T` and for the control block.
        let received = unsafe { libc::recvmsg(socket, &raw mut header, RECEIVE) };
        match Errno::result(received) {
            Ok(received) => break received.cast_unsigned(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    };
    let mut fd = None;
    // SAFETY: the kernel has filled the control block and set its length; SCM_RIGHTS data begins
    // with a descriptor that is now ours. Our peer sends one at most.
    unsafe {
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        if !first.is_null()
            && (*first).cmsg_level == libc::SOL_SOCKET
            && (*first).cmsg_type == libc::SCM_RIGHTS
        {
            let raw = libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned();
            fd = Some(OwnedFd::from_raw_fd(raw));
        }
    }
    if received == 0 {
        return Ok(None);
    }
    if received != size_of::<T>() {
        return Err(Errno::EBADMSG);
    }
    // SAFETY: zeroed before, and `Plain` promises that any bytes are a value.
    Ok(Some((unsafe { message.assume_init() }, fd)))
}

fn empty_header() -> libc::msghdr {
    // SAFETY: null pointers and zero lengths are an empty header. (Its private padding differs
    // between C libraries, so it cannot be written out.)
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(super) fn monotonic() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: memory for one timespec. The clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + nanoseconds
}

/// Waits until `socket` can be read or is closed, at most `milliseconds`; whether it is.
pub(super) fn wait(socket: RawFd, milliseconds: i32) -> Result<bool, Errno> {
    let mut fd = libc::pollfd {
        fd: socket,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one initialized pollfd.
    match Errno::result(unsafe { libc::poll(&raw mut fd, 1, milliseconds) }) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}
