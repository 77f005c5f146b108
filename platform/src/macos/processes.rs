//! What processes have open for writing, by libproc (bsd/sys/proc_info.h).
//!
//! A file that was mapped into memory and closed is not seen. The kernel looks at each open file as stat(2)
//! does, and so may have to wait for a server that does not answer.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::in_use::{User, Users};
use crate::node::{DeviceNumber, FileId};

/// `PROC_ALL_PIDS`.
const ALL_PIDS: u32 = 1;
/// `PROC_PIDFDVNODEPATHINFO`.
const VNODE_PATH: libc::c_int = 2;
/// `FWRITE` of bsd/sys/fcntl.h.
const FWRITE: u32 = 2;
/// Room for what appears between two questions.
const SPARE: usize = 64;

/// `struct proc_fileinfo`.
#[repr(C)]
#[derive(Clone, Copy)]
struct FileInfo {
    open_flags: u32,
    status: u32,
    offset: i64,
    kind: i32,
    guard_flags: u32,
}

/// `struct vnode_fdinfowithpath`.
#[repr(C)]
#[derive(Clone, Copy)]
struct OpenFile {
    file: FileInfo,
    vnode: libc::vnode_info_path,
}

const _: () = assert!(size_of::<FileInfo>() == 24 && size_of::<OpenFile>() == 24 + 152 + 1024);

/// Something that a process has open for writing.
pub(super) struct Open {
    pub(super) file: FileId,
    /// Which device, if it is the node of one.
    pub(super) device: Option<DeviceNumber>,
}

/// The processes, but for this one and those in `ignore`, that have something of this kind open for
/// writing; each with the first such thing.
pub(super) fn writers(ignore: &[i32], is_meant: &dyn Fn(&Open) -> bool) -> Result<Users> {
    let mut found = Users::default();
    let own = std::process::id().cast_signed();
    for pid in pids()? {
        // 0 is the kernel itself.
        if pid <= 0 || pid == own || ignore.contains(&pid) {
            continue;
        }
        match writer(pid, is_meant) {
            Ok(writer) => found.users.extend(writer),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                found.hidden_processes += 1;
            }
            // It ended meanwhile.
            Err(_) => {}
        }
    }
    Ok(found)
}

fn writer(pid: i32, is_meant: &dyn Fn(&Open) -> bool) -> io::Result<Option<User>> {
    for fd in descriptors(pid)? {
        if fd.proc_fdtype != libc::PROX_FDTYPE_VNODE.cast_unsigned() {
            continue;
        }
        // Closed meanwhile: nothing.
        let Some(info) = open_file(pid, fd.proc_fd) else {
            continue;
        };
        if info.file.open_flags & FWRITE == 0 {
            continue;
        }
        let stat = &info.vnode.vip_vi.vi_stat;
        let kind = stat.vst_mode & libc::S_IFMT;
        let number = |raw: u32| DeviceNumber::from_raw(u64::from(raw));
        let open = Open {
            file: FileId {
                filesystem: number(stat.vst_dev),
                inode: stat.vst_ino,
            },
            device: matches!(kind, libc::S_IFBLK | libc::S_IFCHR).then(|| number(stat.vst_rdev)),
        };
        if is_meant(&open) {
            return Ok(Some(User::Writer {
                pid,
                command: command(pid),
                path: path(&info.vnode),
                mapped: false,
            }));
        }
    }
    Ok(None)
}

fn pids() -> Result<Vec<i32>> {
    let listed = list(0, |room: *mut i32, bytes| {
        // SAFETY: null, or memory of so many bytes, which the kernel fills with whole integers.
        unsafe { libc::proc_listpids(ALL_PIDS, 0, room.cast(), bytes) }
    });
    listed.map_err(|error| Error::new("cannot read", "the list of processes", error))
}

fn descriptors(pid: i32) -> io::Result<Vec<libc::proc_fdinfo>> {
    let none = libc::proc_fdinfo {
        proc_fd: 0,
        proc_fdtype: 0,
    };
    list(none, |room: *mut libc::proc_fdinfo, bytes| {
        // SAFETY: null, or memory of so many bytes, which the kernel fills with whole structs.
        unsafe { libc::proc_pidinfo(pid, libc::PROC_PIDLISTFDS, 0, room.cast(), bytes) }
    })
}

/// Asks for a list: `ask` gets room and its length in bytes, and answers how many bytes were filled, or,
/// without room, how many that takes. None were filled where it failed, too.
fn list<T: Clone>(
    empty: T,
    ask: impl Fn(*mut T, libc::c_int) -> libc::c_int,
) -> io::Result<Vec<T>> {
    let fill = |room: *mut T, bytes: libc::c_int| {
        Errno::clear();
        match usize::try_from(ask(room, bytes)) {
            Ok(bytes) if bytes > 0 => Ok(bytes / size_of::<T>()),
            _ if Errno::last_raw() == 0 => Ok(0),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let mut room = fill(std::ptr::null_mut(), 0)? + SPARE;
    loop {
        let mut all = vec![empty.clone(); room];
        let bytes = all.len() * size_of::<T>();
        let bytes = libc::c_int::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let count = fill(all.as_mut_ptr(), bytes)?;
        if count < all.len() {
            all.truncate(count);
            return Ok(all);
        }
        room = room.saturating_mul(2);
    }
}

fn open_file(pid: i32, fd: i32) -> Option<OpenFile> {
    let mut info = std::mem::MaybeUninit::<OpenFile>::zeroed();
    let bytes = size_of::<OpenFile>() as libc::c_int;
    // SAFETY: memory for one struct, which outlives the call.
    let filled =
        unsafe { libc::proc_pidfdinfo(pid, fd, VNODE_PATH, info.as_mut_ptr().cast(), bytes) };
    // SAFETY: integers and arrays of them, all zeroed or written by the kernel.
    (filled == bytes).then(|| unsafe { info.assume_init() })
}

fn command(pid: i32) -> String {
    let mut name = [0u8; 256];
    // SAFETY: memory of so many bytes.
    unsafe { libc::proc_name(pid, name.as_mut_ptr().cast(), name.len() as u32) };
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn path(vnode: &libc::vnode_info_path) -> PathBuf {
    let chars = vnode.vip_path.as_flattened();
    let bytes: Vec<u8> = chars.iter().map(|char| char.cast_unsigned()).collect();
    let text = CStr::from_bytes_until_nul(&bytes).map_or(bytes.as_slice(), CStr::to_bytes);
    OsStr::from_bytes(text).into()
}
