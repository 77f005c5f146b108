//! What the guard process is made with. Nothing here allocates but [`socket_pair`].

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// Flags of recvmsg(2): the connection is a stream, so a message is asked for whole. (Descriptors that
/// come with it stay open in programs that are started later, but the guard closes all before that.)
pub(crate) const RECEIVE: libc::c_int = libc::MSG_WAITALL;

/// Two ends of a connection. It need not keep messages apart: both ends know how long they are, and never
/// more than one is on its way.
pub(crate) fn socket_pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::empty(),
    )?;
    for end in [&pair.0, &pair.1] {
        super::close_on_exec(end)?;
        let on: libc::c_int = 1;
        // Older kernels do not know MSG_NOSIGNAL.
        // SAFETY: an open socket, and an option that is one integer.
        let set = unsafe {
            libc::setsockopt(
                end.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NOSIGPIPE,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        Errno::result(set)?;
    }
    Ok(pair)
}

/// The highest number of a signal: `NSIG` of sys/signal.h counts 0.
pub(crate) fn last_signal() -> libc::c_int {
    31
}

/// Processes are called like their program.
pub(crate) fn set_name(_: &CStr) {}

/// There are no control groups here.
pub(crate) fn outermost_groups() -> Vec<CString> {
    Vec::new()
}

/// See [`outermost_groups`].
pub(crate) fn group_that_could_not_be_left(_: i32) -> Option<String> {
    None
}

/// Closes the descriptors from `first` to `last`, one by one. The caller must own them, and use none of
/// them any more.
pub(crate) fn close_range(first: libc::c_uint, last: libc::c_uint) -> bool {
    // SAFETY: takes nothing, and answers how many descriptors there can be.
    let end = unsafe { libc::getdtablesize() };
    for fd in first..end.cast_unsigned().min(last.saturating_add(1)) {
        // SAFETY: an integer; whose descriptor it is is the caller's to know.
        unsafe { libc::close(fd.cast_signed()) };
    }
    true
}
