//! What the guard process is made with. What it calls itself does not allocate.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

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

/// The files by which a process joins the outermost control group of each hierarchy that is mounted
/// (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cgroups.rst).
pub(crate) fn outermost_groups() -> Vec<CString> {
    let mounts = super::mounts::of_this_process().unwrap_or_default();
    let groups = mounts
        .iter()
        .filter(|mount| matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2") && mount.is_whole());
    let joins = groups.map(|mount| mount.point.join("cgroup.procs"));
    joins
        .filter_map(|join| CString::new(join.as_os_str().as_bytes()).ok())
        .collect()
}

/// See [`crate::guard::Guard::shared_group`].
pub(crate) fn group_that_could_not_be_left(pid: i32) -> Option<String> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let guards = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    // The root of a namespace looks like the outermost group, and lies within another one.
    let namespace = std::fs::read_link("/proc/self/ns/cgroup").ok();
    let is_outside = namespace.is_none_or(|it| it == Path::new(INITIAL_NAMESPACE));
    let mut shared = own
        .lines()
        .filter(|line| guards.lines().any(|other| other == *line));
    shared.find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next()?, fields.next()?);
        let mut controllers = controllers.split(',');
        let is_dangerous = controllers.any(|it| DANGEROUS.contains(&it));
        (is_dangerous && (group != "/" || !is_outside)).then(|| group.to_owned())
    })
}

/// Hierarchies by whose groups processes are frozen or killed. The one of version 2 has no name.
const DANGEROUS: [&str; 4] = ["", "freezer", "memory", "name=systemd"];

/// The namespace of control groups that the machine starts with: `PROC_CGROUP_INIT_INO` of
/// include/linux/proc_ns.h.
const INITIAL_NAMESPACE: &str = "cgroup:[4026531835]";
