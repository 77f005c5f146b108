//! Real-time priority for one thread (sched_setscheduler(2)), where it is granted: one that must be in
//! time would else wait for its turn on a busy machine.

use nix::errno::Errno;

/// Gives the calling thread this real-time priority; threads and processes it starts have an ordinary
/// one. Allocates nothing.
pub(crate) fn become_urgent(priority: i32) -> Result<(), Errno> {
    // SAFETY: integers only; some C libraries have more of them than the priority.
    let mut param: libc::sched_param = unsafe { std::mem::zeroed() };
    param.sched_priority = priority;
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: one initialized struct; 0 is the calling thread. Through the system call: musl's own
    // function refuses.
    let set = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const param) };
    Errno::result(set).map(drop)
}
