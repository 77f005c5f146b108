//! tracefs: where it is, and the files in it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::{Context, Error, Result};
use crate::os::linux_only;
use crate::private_mount;

/// Where tracefs is usually mounted.
pub(super) const USUAL: &str = "/sys/kernel/tracing";

/// `TRACEFS_MAGIC` of include/uapi/linux/magic.h.
const MAGIC: i64 = 0x7472_6163;

/// All our instances are called so, followed by the run's id.
pub const PREFIX: &str = "holdstill-";

/// tracefs, mounted where everybody sees it or, if nobody has mounted it, for us alone: then it has
/// no place among the mounts and is gone with the last descriptor.
#[derive(Debug)]
pub struct Tracefs {
    pub(super) root: File,
    pub(super) instances: File,
    is_private: bool,
}

impl Tracefs {
    /// Finds tracefs or mounts it privately.
    ///
    /// # Errors
    /// `Unsupported` if this kernel has none, `PermissionDenied` without root or under
    /// lockdown=confidentiality.
    pub fn open() -> Result<Self> {
        let (root, is_private) = match File::open(USUAL) {
            Ok(root) if is_tracefs(&root) => (root, false),
            _ => (
                private_mount::open_root(c"tracefs", &[]).context("cannot mount", "tracefs")?,
                true,
            ),
        };
        // Lockdown from the start leaves the folder empty; later, its files there but closed
        // (`tracing_check_open_get_tr` of kernel/trace/trace.c), though folders can be made.
        let not_allowed = |error: Error| match error.source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {
                let why =
                    "the kernel does not allow tracing (no root, or lockdown=confidentiality)";
                let source = io::Error::new(io::ErrorKind::PermissionDenied, why);
                Error::new("cannot use", "tracefs", source)
            }
            _ => error,
        };
        let instances = open_folder(&root, "instances").map_err(not_allowed)?;
        open(&root, "events/header_page", OFlag::O_RDONLY).map_err(not_allowed)?;
        Ok(Self {
            root,
            instances,
            is_private,
        })
    }

    /// Whether it is mounted for us alone.
    pub fn is_private(&self) -> bool {
        self.is_private
    }

    /// The folder of the instances, to register one with a guard before it is made.
    pub fn instances(&self) -> BorrowedFd<'_> {
        self.instances.as_fd()
    }

    /// The names of all instances of ours, of live and dead runs.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        names(&self.instances, "instances").map(|mut names| {
            names.retain(|name| name.starts_with(PREFIX));
            names
        })
    }

    /// Removes an instance of a dead run; whether there was one.
    ///
    /// # Errors
    /// If it is not ours by name, or in use.
    pub fn remove(&self, name: &str) -> Result<bool> {
        if !name.starts_with(PREFIX) || name.contains('/') {
            return Err(Error::other("cannot remove", name, "not one of ours"));
        }
        match unlinkat(&self.instances, name, UnlinkatFlags::RemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(Error::new("cannot remove the trace instance", name, errno)),
        }
    }
}

/// The instance of a run.
pub fn instance_name(run_id: &str) -> String {
    format!("{PREFIX}{run_id}")
}

fn is_tracefs(folder: &File) -> bool {
    linux_only::magic(folder) == Ok(MAGIC)
}

pub(super) fn open(folder: &File, path: &str, flags: OFlag) -> Result<File> {
    openat(folder, path, flags | OFlag::O_CLOEXEC, Mode::empty())
        .map(File::from)
        .context("cannot open", in_tracefs(path))
}

pub(super) fn open_folder(folder: &File, path: &str) -> Result<File> {
    open(folder, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
}

pub(super) fn read(folder: &File, path: &str) -> Result<String> {
    let mut file = open(folder, path, OFlag::O_RDONLY)?;
    // Some of these files give nothing after the first read, however little that took.
    let mut bytes = vec![0; 64 << 10];
    let mut length = 0;
    loop {
        let room = bytes.get_mut(length..).unwrap_or_default();
        match file.read(room).context("cannot read", in_tracefs(path))? {
            0 => break,
            more => length += more,
        }
    }
    bytes.truncate(length);
    String::from_utf8(bytes).map_err(|_| Error::invalid("cannot read", in_tracefs(path), "no text"))
}

pub(super) fn write(folder: &File, path: &str, value: &str) -> Result<()> {
    open(folder, path, OFlag::O_WRONLY)?
        .write_all(value.as_bytes())
        .context("cannot write", in_tracefs(path))
}

fn in_tracefs(path: &str) -> PathBuf {
    Path::new("tracefs").join(path)
}

/// The names in a folder, sorted.
pub(super) fn names(folder: &File, what: &str) -> Result<Vec<String>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir =
        Dir::openat(folder, ".", flags, Mode::empty()).context("cannot read", in_tracefs(what))?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry.context("cannot read", in_tracefs(what))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if OsStr::new(&name) != "." && OsStr::new(&name) != ".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
