//! Locks that mean "this run is alive" or "this filesystem is being frozen": `flock(2)` on files of
//! one folder. They go with the process, however it ends.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Result};

/// Where the locks of this machine are.
pub const FOLDER: &str = crate::os::LOCKS;

/// Somebody asking [`is_held`] takes the lock for a moment: so long is it tried again.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// A lock that we hold until it is dropped. A forked child that keeps the descriptor keeps the lock.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    locked: Flock<File>,
}

impl Lock {
    /// Takes the lock `name` in `folder`, which is made if it is missing (mode 0700); `None` if
    /// somebody else holds it.
    ///
    /// # Errors
    /// If the folder or file cannot be made.
    pub fn take(folder: &Path, name: &str) -> Result<Option<Self>> {
        check_name(folder, name)?;
        make_folder(folder)?;
        let path = folder.join(name);
        for attempt in 0.. {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(&path)
                .context("cannot open the lock", &path)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) if is_still_there(&locked, &path)? => {
                    return Ok(Some(Self { path, locked }));
                }
                // The holder removed the file between our two steps: a new one is needed.
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) if attempt < TRIES => std::thread::sleep(PAUSE),
                Err((_, Errno::EWOULDBLOCK)) => break,
                Err((_, errno)) => return Err(Error::new("cannot lock", path, errno)),
            }
        }
        Ok(None)
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.locked.as_fd()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before it is unlocked, so that nobody locks a file that is about to go.
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Whether somebody holds the lock `name` in `folder`.
///
/// # Errors
/// If it cannot be looked at.
pub fn is_held(folder: &Path, name: &str) -> Result<bool> {
    check_name(folder, name)?;
    let path = folder.join(name);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::new("cannot open the lock", path, error)),
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(false),
        Err((_, Errno::EWOULDBLOCK)) => Ok(true),
        Err((_, errno)) => Err(Error::new("cannot look at the lock", path, errno)),
    }
}

/// Makes a folder for us alone, with its parents.
pub(crate) fn make_folder(folder: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .context("cannot make the folder", folder)
}

/// Names of locks and records become file names: letters, digits, `-`, `_`, `:` only.
pub(crate) fn check_name(folder: &Path, name: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_:".contains(c);
    if (1..=100).contains(&name.len()) && name.chars().all(fine) {
        return Ok(());
    }
    let why = format!("{name:?} cannot be a file name here");
    Err(Error::other("cannot use", folder, why))
}

fn is_still_there(file: &File, path: &Path) -> Result<bool> {
    let ours = file.metadata().context("cannot look at", path)?;
    Ok(std::fs::metadata(path).is_ok_and(|there| there.ino() == ours.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Role, scratch};

    #[test]
    fn one_holder_at_a_time_and_nothing_left() {
        let dir = scratch();
        let folder = dir.path().join("run/holdstill");
        assert!(!is_held(&folder, "a").unwrap());
        let lock = Lock::take(&folder, "a").unwrap().unwrap();
        assert!(is_held(&folder, "a").unwrap());
        assert!(Lock::take(&folder, "a").unwrap().is_none());
        assert!(!is_held(&folder, "b").unwrap());
        drop(lock);
        assert!(!is_held(&folder, "a").unwrap());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        for bad in ["", "..", "a/b", "a b", &"x".repeat(101)] {
            assert!(Lock::take(&folder, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_lock_of_a_killed_process_is_free() {
        let dir = scratch();
        let role = Role::start("lock::tests::role_holds", &[dir.path()]);
        assert!(is_held(dir.path(), "a").unwrap());
        drop(role);
        assert!(!is_held(dir.path(), "a").unwrap());
        assert!(Lock::take(dir.path(), "a").unwrap().is_some());
    }

    #[test]
    fn role_holds() {
        let Some(args) = Role::args() else { return };
        let _lock = Lock::take(&args[0], "a").unwrap().unwrap();
        Role::ready_until_told();
    }

    #[test]
    fn many_takers_one_holder() {
        let dir = scratch();
        let held = std::sync::atomic::AtomicU32::new(0);
        let taken = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let Some(lock) = Lock::take(dir.path(), "a").unwrap() else {
                            continue;
                        };
                        let others = held.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        assert_eq!(others, 0);
                        taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        held.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert!(taken.into_inner() > 50);
    }
}
