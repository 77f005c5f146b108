//! A path that was looked up once. Whoever examines a path and opens it by name afterwards may open
//! something else: in a folder of somebody else every name may change in between. So the folder and what
//! is in it are held from the first look on, and everything is done by them.
//!
//! A symbolic link is followed only where it belongs to root or to this user, as the kernel follows links
//! in /tmp (`fs.protected_symlinks`, proc_sys_fs(5)): any other may lead anywhere by the next moment.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use crate::error::{Context, Error, Result};
use crate::mounts::Place;
use crate::node::{DeviceNumber, FileId, Node};
use crate::os;

/// Mode of everything made: a copy holds all that its source held.
const MODE: u32 = 0o600;

/// What a path leads to, and the folder it is in.
#[derive(Debug)]
pub struct Located {
    path: PathBuf,
    folder: Folder,
    name: OsString,
    found: Option<(os::located::Found, Node)>,
}

impl Located {
    /// Looks a path up. It need not exist; its folder must.
    ///
    /// # Errors
    /// `InvalidInput` for a symbolic link of another user; else what `openat(2)` says.
    pub fn of(path: &Path) -> Result<Self> {
        let looked_up = os::located::look_up(path).context("cannot look up", path)?;
        let found = match looked_up.found {
            Some(found) => {
                let metadata = found.metadata().context("cannot look at", path)?;
                let node = Node::from_metadata(path.to_owned(), &metadata)?;
                Some((found, node))
            }
            None => None,
        };
        let folder = Folder {
            file: looked_up.folder,
            path: path.to_owned(),
        };
        Ok(Self {
            path: path.to_owned(),
            folder,
            name: looked_up.name,
            found,
        })
    }

    /// The path that was looked up.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is there, if anything is.
    pub fn node(&self) -> Option<&Node> {
        self.found.as_ref().map(|(_, node)| node)
    }

    /// The folder that the last link leads to.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The name in that folder.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Opens what was found, whatever has its name now.
    ///
    /// # Errors
    /// `NotFound` if nothing was there; else what `open(2)` says.
    pub fn open(&self, options: &OpenOptions) -> Result<File> {
        let found = self.found.as_ref().ok_or(io::ErrorKind::NotFound);
        found
            .map_err(io::Error::from)
            .and_then(|(found, _)| found.open(options))
            .context("cannot open", &self.path)
    }

    /// Refuses to make anything where device nodes belong: below /dev, or on a devtmpfs wherever it is
    /// mounted. A device that is not there is a wrong name, and a file of that name would fill memory.
    ///
    /// # Errors
    /// `InvalidInput` there; else if the mount of the folder cannot be found.
    pub fn refuse_among_devices(&self) -> Result<()> {
        match self.folder.is_for_devices()? {
            false => Ok(()),
            true => Err(Error::new(
                "cannot create",
                &self.path,
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "there is no such device, and no file is made among devices (lsblk lists the devices \
                     there are)",
                ),
            )),
        }
    }

    /// Makes the file, which must not exist, for reading and writing.
    ///
    /// # Errors
    /// As [`refuse_among_devices`](Self::refuse_among_devices); `AlreadyExists`; what `openat(2)` says.
    pub fn create(&self) -> Result<File> {
        self.refuse_among_devices()?;
        self.folder
            .create(&self.name)
            .context("cannot create", &self.path)
    }

    /// Whether this is `name` in `folder`.
    pub(crate) fn is_in(&self, folder: &Folder, name: &OsStr) -> bool {
        let [own, other] = [&self.folder, folder].map(|folder| id_of(&folder.file).ok());
        self.name == name && own.is_some() && own == other
    }
}

/// A folder that is held, whatever its path leads to meanwhile.
#[derive(Debug)]
pub struct Folder {
    file: File,
    /// Of something in it, for messages.
    path: PathBuf,
}

impl Folder {
    /// Looks a folder up, as [`Located::of`] does.
    ///
    /// # Errors
    /// As there.
    pub fn of(path: &Path) -> Result<Self> {
        let looked_up = os::located::open_folder(path).context("cannot look up", path)?;
        Ok(Self {
            file: looked_up,
            path: path.to_owned(),
        })
    }

    fn is_for_devices(&self) -> Result<bool> {
        let place = Place::of_open(&self.file, &self.path)?;
        let Place { mount, path, .. } = &place;
        let dev = Path::new("/dev");
        // Another filesystem below, such as the memory at /dev/shm, takes files as ever.
        let is_other = mount.point.starts_with(dev) && mount.point != dev;
        let is_special = ["devtmpfs", "devfs", "devpts", "mqueue", "hugetlbfs"];
        Ok(is_special.contains(&mount.fs_type.as_str()) || (path.starts_with(dev) && !is_other))
    }

    /// Its path just now.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn path(&self) -> Result<PathBuf> {
        os::located::path_of(&self.file).context("cannot find the folder of", &self.path)
    }

    /// Makes a file that must not exist, for reading and writing. A link of that name counts as existing.
    ///
    /// # Errors
    /// What `openat(2)` says.
    pub fn create(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(MODE as _);
        Ok(openat(&self.file, name, flags, mode)?.into())
    }

    /// A new file without a name, for reading and writing.
    ///
    /// # Errors
    /// What `open(2)` says; `Unsupported` where there is no such thing.
    pub(crate) fn create_nameless(&self) -> io::Result<File> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(MODE);
        os::linux_only::open_nameless(&options, &os::located::node_of(&self.file))
    }

    /// Gives a file without a name one that must not exist.
    pub(crate) fn link(&self, file: &File, name: &OsStr) -> io::Result<()> {
        let own = os::located::node_of(file);
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        linkat(nix::fcntl::AT_FDCWD, &own, &self.file, name, follow)?;
        Ok(())
    }

    /// Renames within the folder, over what is there.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        nix::fcntl::renameat(&self.file, from, &self.file, to)?;
        Ok(())
    }

    /// Renames within the folder without replacing.
    pub(crate) fn rename_new(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        match os::output::rename_new(&self.file, from, to) {
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) => {
                // Nothing of that kind here (NFS, old FAT): the check before the rename leaves a gap of
                // microseconds, which a second writer of the same name would have to hit.
                if self.entry(to)?.is_some() {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                self.rename(from, to)
            }
            other => Ok(other?),
        }
    }

    /// Which file has this name; a link is not followed. `None` if there is none.
    ///
    /// # Errors
    /// What `fstatat(2)` says.
    pub fn entry(&self, name: &OsStr) -> io::Result<Option<FileId>> {
        match fstatat(&self.file, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            #[allow(clippy::unnecessary_cast)] // their widths differ between systems
            Ok(found) => Ok(Some(FileId {
                filesystem: DeviceNumber::from_raw(found.st_dev as u64),
                inode: found.st_ino as u64,
            })),
            Err(nix::errno::Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes a name if it is this file's; whether it was.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, name: &OsStr, is_meant: impl Fn(FileId) -> bool) -> io::Result<bool> {
        if !self.entry(name)?.is_some_and(is_meant) {
            return Ok(false);
        }
        match unlinkat(&self.file, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(nix::errno::Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The same once more.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            path: self.path.clone(),
        })
    }

    /// Brings its names to stable storage.
    pub(crate) fn sync(&self) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let open = openat(&self.file, ".", flags, Mode::empty())?;
        File::from(open).sync_all()
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// How a file that exists is opened for reading and writing, without waiting for whoever holds a lease.
pub fn for_writing(options: &mut OpenOptions) -> &OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
}

/// Which file is open.
pub(crate) fn id_of(file: &File) -> io::Result<FileId> {
    let metadata = file.metadata()?;
    Ok(FileId {
        filesystem: DeviceNumber::from_raw(metadata.dev()),
        inode: metadata.ino(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{needs_root, run, scratch};

    fn refusal(path: &Path) -> String {
        let error = Located::of(path).and_then(|located| located.create());
        let error = error.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        error.to_string()
    }

    #[test]
    fn what_was_found_is_opened_whatever_has_its_name_then() {
        let dir = scratch();
        let [file, aside, other] = ["file", "aside", "other"].map(|name| dir.path().join(name));
        std::fs::write(&file, "meant").unwrap();
        std::fs::write(&other, "not meant").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("./file", &link).unwrap();
        let located = Located::of(&link).unwrap();
        assert_eq!(located.name(), "file");
        std::fs::rename(&file, &aside).unwrap();
        std::os::unix::fs::symlink(&other, &file).unwrap();
        let mut opened = located.open(OpenOptions::new().read(true)).unwrap();
        assert_eq!(io::read_to_string(&mut opened).unwrap(), "meant");
        let id = id_of(&opened).unwrap();
        let folder = located.folder();
        assert!(
            !folder
                .remove(OsStr::new("file"), |found| found == id)
                .unwrap()
        );
        assert!(
            folder
                .remove(OsStr::new("aside"), |found| found == id)
                .unwrap()
        );
        assert!(other.exists() && file.is_symlink());
    }

    #[test]
    fn what_is_not_there_is_made_in_the_folder_that_was_found() {
        let dir = scratch();
        let [folder, moved, elsewhere] =
            ["folder", "moved", "elsewhere"].map(|n| dir.path().join(n));
        std::fs::create_dir(&folder).unwrap();
        std::fs::create_dir(&elsewhere).unwrap();
        let located = Located::of(&folder.join("new")).unwrap();
        assert!(located.node().is_none());
        std::fs::rename(&folder, &moved).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &folder).unwrap();
        located.create().unwrap();
        assert!(moved.join("new").exists() && !elsewhere.join("new").exists());
        for missing in ["nowhere/new", "moved/new/below", "nowhere/"] {
            assert!(Located::of(&dir.path().join(missing)).is_err(), "{missing}");
        }
        assert!(Located::of(Path::new("/")).unwrap().node().is_some());
        let own = Located::of(Path::new("/proc/self/fd/0")).unwrap();
        assert!(own.node().is_some());
    }

    #[test]
    fn nothing_is_made_among_devices_but_in_shared_memory() {
        let dir = scratch();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/holdstill-mistyped", &link).unwrap();
        let folder = dir.path().join("dev");
        std::os::unix::fs::symlink("/dev", &folder).unwrap();
        for path in [
            Path::new("/dev/holdstill-mistyped"),
            &link,
            &folder.join("holdstill-mistyped"),
        ] {
            assert!(refusal(path).contains("no such device"), "{path:?}");
        }
        assert!(!Path::new("/dev/holdstill-mistyped").exists());
        if dir.path().starts_with("/dev/shm") {
            Located::of(&dir.path().join("file"))
                .unwrap()
                .create()
                .unwrap();
        }
    }

    #[test]
    fn privileged_a_devtmpfs_is_known_wherever_it_is_mounted() {
        needs_root!();
        let dir = scratch();
        let point = dir.path().join("nodes");
        std::fs::create_dir(&point).unwrap();
        run("mount", ["-t", "devtmpfs", "none", point.to_str().unwrap()]);
        let refused = Located::of(&point.join("holdstill-mistyped")).and_then(|it| it.create());
        run("umount", [&point]);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn privileged_a_link_of_somebody_else_is_not_followed() {
        needs_root!();
        let dir = scratch();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "x").unwrap();
        let link = dir.path().join("link");
        for target in [&victim, dir.path()] {
            std::os::unix::fs::symlink(target, &link).unwrap();
            std::os::unix::fs::lchown(&link, Some(65534), Some(65534)).unwrap();
            for path in [link.clone(), link.join("victim")] {
                let error = Located::of(&path).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
            }
            std::fs::remove_file(&link).unwrap();
        }
    }
}
