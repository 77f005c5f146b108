//! What the guard process is made with. Nothing here allocates but [`socket_pair`].

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// Flags of recvmsg(2).
pub(crate) const RECEIVE: libc::c_int = libc::MSG_CMSG_CLOEXEC;

/// Two ends of a connection that keeps messages apart.
pub(crate) fn socket_pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// The highest number of a signal.
pub(crate) fn last_signal() -> libc::c_int {
    libc::SIGRTMAX()
}

/// Names the calling process, for lists of processes.
pub(crate) fn set_name(name: &CStr) {
    // SAFETY: a terminated string, of which the kernel copies 16 bytes at most.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Closes the descriptors from `first` to `last`, if the kernel can do that at once (Linux 5.9). The
/// caller must own them, and use none of them any more.
pub(crate) fn close_range(first: libc::c_uint, last: libc::c_uint) -> bool {
    // SAFETY: integers only; whose descriptors they are is the caller's to know.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) == 0 }
}
