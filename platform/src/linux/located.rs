//! Looking a path up once, component by component (path_resolution(7)), by descriptors that can be used
//! for nothing else (`O_PATH`, open(2)) and are opened again through /proc/self/fd.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use super::linux_only;

/// Links followed at most (`MAXSYMLINKS`).
const MOST_LINKS: u32 = 40;

/// `PROC_SUPER_MAGIC` of include/uapi/linux/magic.h.
const PROC: i64 = 0x9fa0;

/// Where a path leads.
pub(crate) struct LookedUp {
    /// The folder of its last component.
    pub(crate) folder: File,
    /// Its last component, links followed.
    pub(crate) name: OsString,
    pub(crate) found: Option<Found>,
}

/// What was found there.
#[derive(Debug)]
pub(crate) struct Found(File);

impl Found {
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        self.0.metadata()
    }

    pub(crate) fn open(&self, options: &OpenOptions) -> io::Result<File> {
        options.open(node_of(&self.0))
    }
}

/// The name by which the kernel knows an open file of ours.
pub(crate) fn node_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The path of an open folder just now.
pub(crate) fn path_of(file: &File) -> io::Result<PathBuf> {
    std::fs::read_link(node_of(file))
}

/// Looks a path up. A link on the way that belongs to neither root nor this user is `InvalidInput`.
pub(crate) fn look_up(path: &Path) -> io::Result<LookedUp> {
    let start = if path.is_absolute() { "/" } else { "." };
    let mut folder = open_at(AT_FDCWD, OsStr::new(start), OFlag::O_DIRECTORY)?;
    let mut ahead = components(path.as_os_str());
    let mut links = 0;
    while let Some(name) = ahead.pop() {
        let is_last = ahead.is_empty();
        let at = |folder: File, found| LookedUp {
            folder,
            name: name.clone(),
            found,
        };
        let file = match open_at(&folder, &name, OFlag::O_NOFOLLOW) {
            Err(Errno::ENOENT) if is_last => return Ok(at(folder, None)),
            file => file?,
        };
        let metadata = file.metadata()?;
        if !metadata.is_symlink() {
            if is_last {
                return Ok(at(folder, Some(Found(file))));
            }
            folder = file;
            continue;
        }
        links += 1;
        if links > MOST_LINKS {
            return Err(Errno::ELOOP.into());
        }
        if linux_only::magic(&file)? == PROC {
            // A link of the kernel's own (/proc/self/fd/1): its text is not where it leads.
            let file = open_at(&folder, &name, OFlag::empty())?;
            if is_last {
                return Ok(at(folder, Some(Found(file))));
            }
            folder = file;
            continue;
        }
        refuse_strangers(&metadata)?;
        let text = readlinkat(&file, "")?;
        if text.as_bytes().starts_with(b"/") {
            folder = open_at(AT_FDCWD, OsStr::new("/"), OFlag::O_DIRECTORY)?;
        }
        ahead.extend(components(&text));
    }
    let found = Some(Found(folder.try_clone()?));
    let name = OsString::from(".");
    Ok(LookedUp {
        folder,
        name,
        found,
    })
}

/// Looks a folder up, in the same way.
pub(crate) fn open_folder(path: &Path) -> io::Result<File> {
    Ok(look_up(&path.join("."))?.folder)
}

/// The components of a path, the last one first. What ends with a slash ends in a folder.
fn components(path: &OsStr) -> Vec<OsString> {
    let parts = path.as_bytes().split(|&byte| byte == b'/');
    let mut parts: Vec<_> = parts.filter(|part| !part.is_empty()).collect();
    if path.as_bytes().ends_with(b"/") {
        parts.push(b".");
    }
    let parts = parts.into_iter().rev();
    parts
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect()
}

fn open_at(folder: impl std::os::fd::AsFd, name: &OsStr, flags: OFlag) -> nix::Result<File> {
    let flags = flags | OFlag::O_PATH | OFlag::O_CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?.into())
}

fn refuse_strangers(link: &Metadata) -> io::Result<()> {
    if link.uid() == 0 || link.uid() == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!(
            "a symbolic link on the way belongs to user {}, who can change where it leads; name what it \
             leads to",
            link.uid()
        ),
    ))
}
