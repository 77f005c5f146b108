//! Removing all that is in a subvolume, however deep its folders lie in each other: a folder that is
//! not empty is moved up first, so that never more than three are open.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Subvolume;
use crate::error::{Context, Error};

/// Names read from a folder at once.
const BATCH: usize = 4096;

/// `FS_IMMUTABLE_FL`, `FS_APPEND_FL` of include/uapi/linux/fs.h: they keep things from being removed.
const FIXED: libc::c_int = 0x10 | 0x20;

mod ioctl {
    // Both are declared with a long and take an int.
    nix::ioctl_read!(get_flags, b'f', 1, libc::c_long);
    nix::ioctl_write_ptr!(set_flags, b'f', 2, libc::c_long);
}

impl Subvolume {
    /// Removes everything in it but the folders on the path `keep`, and what is in the last of them;
    /// an empty path keeps nothing. What is left may only be removed if no subvolume is in it. `check`
    /// is asked again and again whether to go on.
    ///
    /// # Errors
    /// What the kernel says, or `check`.
    pub fn empty<E: From<Error>>(
        &self,
        keep: &Path,
        check: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let root = self.open_folder(Path::new(""))?;
        let trash_name = make_trash(&root)?;
        let trash = Folder::open(&root, &trash_name)?;
        let mut moved = 0;
        let mut folder = Folder(root.try_clone().context("cannot open", "a folder")?);
        folder.release()?;
        let mut kept = keep.iter().peekable();
        let mut is_root = true;
        loop {
            let name = kept.next();
            let is_trash = |other: &OsStr| is_root && other == trash_name;
            let is_ours = |other: &OsStr| Some(other) == name || is_trash(other);
            while folder.clear_some(&is_ours, &trash, &mut moved)? {
                check()?;
            }
            match name {
                Some(name) if kept.peek().is_some() => {
                    folder = Folder::open(&folder.0, name)?;
                    folder.release()?;
                    is_root = false;
                }
                _ => break,
            }
        }
        loop {
            let entries = trash.entries(&|_| false)?;
            if entries.is_empty() {
                break;
            }
            for (name, _) in entries {
                let inner = Folder::open(&trash.0, &name)?;
                inner.release()?;
                while inner.clear_some(&|_| false, &trash, &mut moved)? {
                    check()?;
                }
                trash.remove(&name, true)?;
            }
        }
        drop(trash);
        Folder(root).remove(&trash_name, true)?;
        Ok(())
    }
}

/// Makes a folder with a name that nothing else has.
fn make_trash(root: &File) -> Result<OsString, Error> {
    for number in 0u64.. {
        let name = OsString::from(format!(".holdstill-{number}"));
        match mkdirat(root, name.as_os_str(), Mode::S_IRWXU) {
            Err(Errno::EEXIST) => {}
            made => return made.map(|()| name).context("cannot make a folder in", "it"),
        }
    }
    Err(Error::other(
        "cannot make a folder in",
        "it",
        "no name is free",
    ))
}

/// An open folder.
struct Folder(File);

impl Folder {
    fn open(parent: &File, name: &OsStr) -> Result<Self, Error> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let folder = openat(parent, name, flags, Mode::empty());
        folder
            .map(|folder| Self(folder.into()))
            .context("cannot open", Path::new(name))
    }

    /// Some names in it, but for those that are left out, and whether they are folders. None if there
    /// are no others.
    fn entries(
        &self,
        is_left_out: &dyn Fn(&OsStr) -> bool,
    ) -> Result<Vec<(OsString, bool)>, Error> {
        let fail = "cannot read a folder";
        // A folder of its own: reading moves the position.
        let again = Self::open(&self.0, OsStr::new("."))?;
        let mut dir = Dir::from_fd(again.0.into()).context(fail, ".")?;
        let mut found = Vec::new();
        for entry in dir.iter() {
            let entry = entry.context(fail, ".")?;
            let name = OsString::from_vec(entry.file_name().to_bytes().to_vec());
            if name == "." || name == ".." || is_left_out(&name) {
                continue;
            }
            found.push((name, entry.file_type() == Some(Type::Directory)));
            if found.len() == BATCH {
                break;
            }
        }
        Ok(found)
    }

    /// Removes some of what is in it, or moves it to `trash`; whether there was anything.
    fn clear_some(
        &self,
        is_left_out: &dyn Fn(&OsStr) -> bool,
        trash: &Self,
        moved: &mut u64,
    ) -> Result<bool, Error> {
        let entries = self.entries(is_left_out)?;
        for (name, is_folder) in &entries {
            // A folder where a snapshot does not hold a subvolume can be removed only.
            match self.remove(name, *is_folder) {
                Err(error) if *is_folder && error.errno() == Some(libc::ENOTEMPTY) => {
                    *moved += 1;
                    let new = PathBuf::from(moved.to_string());
                    let old = Path::new(name);
                    with_flags_cleared(&self.0, name, || renameat(&self.0, old, &trash.0, &new))
                        .context("cannot move", old)?;
                }
                done => done?,
            }
        }
        Ok(!entries.is_empty())
    }

    fn remove(&self, name: &OsStr, is_folder: bool) -> Result<(), Error> {
        let flags = match is_folder {
            true => UnlinkatFlags::RemoveDir,
            false => UnlinkatFlags::NoRemoveDir,
        };
        with_flags_cleared(&self.0, name, || unlinkat(&self.0, name, flags))
            .context("cannot remove", Path::new(name))
    }

    /// Lets things be removed from it.
    fn release(&self) -> Result<(), Error> {
        clear_flags(&self.0)
            .map(drop)
            .context("cannot change", "a folder")
    }
}

/// Does something with an entry of a folder, once more if flags of the entry forbid it.
fn with_flags_cleared(
    folder: &File,
    name: &OsStr,
    act: impl Fn() -> nix::Result<()>,
) -> nix::Result<()> {
    match act() {
        Err(Errno::EPERM) => {}
        done => return done,
    }
    let name = CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL)?;
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let entry = openat(folder, name.as_c_str(), flags, Mode::empty())?;
    clear_flags(&File::from(entry))?;
    act()
}

/// Clears the flags that keep something from being changed; what was cleared.
pub(super) fn clear_flags(file: &File) -> nix::Result<libc::c_int> {
    let flags = get_flags(file)?;
    if flags & FIXED != 0 {
        put_flags(file, flags & !FIXED)?;
    }
    Ok(flags & FIXED)
}

/// Sets flags again.
pub(super) fn set_flags(file: &File, flags: libc::c_int) -> nix::Result<()> {
    match flags {
        0 => Ok(()),
        _ => put_flags(file, get_flags(file)? | flags),
    }
}

fn get_flags(file: &File) -> nix::Result<libc::c_int> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the request writes an int, whatever its number says, into memory for one.
    unsafe { ioctl::get_flags(file.as_fd().as_raw_fd(), (&raw mut flags).cast()) }?;
    Ok(flags)
}

fn put_flags(file: &File, flags: libc::c_int) -> nix::Result<()> {
    // SAFETY: the request reads an int, whatever its number says.
    unsafe { ioctl::set_flags(file.as_fd().as_raw_fd(), (&raw const flags).cast()) }.map(drop)
}
