//! Run records: what a run is about to create or freeze, on disk before it does, so that it can be
//! undone after a power cut.
//!
//! A record is a file of opaque bytes, `ID.json`, replaced as a whole and fsynced together with its
//! folder. The run holds the lock of the same name while it lives.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::lock::{self, Lock};

/// Where the records of this machine are.
pub const FOLDER: &str = crate::os::RECORDS;

/// What tells this start of the machine from others, where the system says.
pub fn this_boot() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// A larger record is not one of ours, in bytes.
const MAX_LEN: u64 = 1 << 20;

/// The folder of the records, and that of their locks.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
    locks: PathBuf,
}

/// The record of a live run: ours. Dropped without [`remove`](Self::remove) it stays, as that of a
/// dead run.
#[derive(Debug)]
pub struct Record {
    records: Records,
    id: String,
    lock: Lock,
}

/// A record found on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The run's id.
    pub id: String,
    /// What it wrote last.
    pub content: Vec<u8>,
    /// Whether the run, or the guard that holds its lock, still lives.
    pub is_alive: bool,
}

impl Default for Records {
    /// Those of this machine.
    fn default() -> Self {
        Self::new(FOLDER, lock::FOLDER)
    }
}

impl Records {
    /// Records in one folder and their locks in another, made when first needed.
    pub fn new(folder: impl Into<PathBuf>, locks: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            locks: locks.into(),
        }
    }

    /// Begins the record of a new run: takes its lock, then writes `content`. When this returns,
    /// the record survives a power cut.
    ///
    /// # Errors
    /// `AlreadyExists` if there is a run of this id; whatever making the files says.
    pub fn create(&self, id: &str, content: &[u8]) -> Result<Record> {
        let path = self.path(id)?;
        lock::make_folder(&self.folder)?;
        let exists = |what: &Path| {
            let source = io::ErrorKind::AlreadyExists;
            Error::new("cannot begin the run", what, source)
        };
        let lock = Lock::take(&self.locks, id)?.ok_or_else(|| exists(&path))?;
        if path.exists() {
            return Err(exists(&path));
        }
        let record = Record {
            records: self.clone(),
            id: id.to_owned(),
            lock,
        };
        record.update(content)?;
        Ok(record)
    }

    /// All records, sorted by id. What is left of one that was being written first, and whose run
    /// is dead, is removed: nothing was created before it was whole.
    ///
    /// # Errors
    /// If a record cannot be read.
    pub fn list(&self) -> Result<Vec<Found>> {
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::new("cannot read", &self.folder, error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.context("cannot read", &self.folder)?.path();
            let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else {
                continue;
            };
            if lock::check_name(&self.folder, id).is_err() {
                continue;
            }
            let extension = path.extension().and_then(|extension| extension.to_str());
            match extension {
                Some("json") => {
                    if let Some(content) = read(&path)? {
                        found.push(Found {
                            id: id.to_owned(),
                            content,
                            is_alive: lock::is_held(&self.locks, id)?,
                        });
                    }
                }
                Some("new") if !lock::is_held(&self.locks, id)? => remove(&path)?,
                _ => {}
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    /// Removes the record of a dead run, for good.
    ///
    /// # Errors
    /// `ResourceBusy` if the run is alive; whatever removing says.
    pub fn remove_dead(&self, id: &str) -> Result<()> {
        let path = self.path(id)?;
        let _lock = Lock::take(&self.locks, id)?.ok_or_else(|| {
            let source = io::ErrorKind::ResourceBusy;
            Error::new("cannot remove the record of a live run", &path, source)
        })?;
        self.remove(&path)
    }

    fn path(&self, id: &str) -> Result<PathBuf> {
        lock::check_name(&self.folder, id)?;
        Ok(self.folder.join(format!("{id}.json")))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        remove(path)?;
        remove(&path.with_extension("new"))?;
        self.sync_folder()
    }

    fn sync_folder(&self) -> Result<()> {
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .context("cannot sync", &self.folder)
    }
}

impl Record {
    /// The run's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The lock that says this run is alive; a guard process keeps it open.
    pub fn lock(&self) -> &Lock {
        &self.lock
    }

    /// Replaces the content. When this returns, the new one survives a power cut; before, the old.
    ///
    /// # Errors
    /// Whatever writing says; the old content stays.
    pub fn update(&self, content: &[u8]) -> Result<()> {
        let path = self.records.path(&self.id)?;
        let new = path.with_extension("new");
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&new)
            .and_then(|mut file| {
                file.write_all(content)?;
                file.sync_all()
            })
            .context("cannot write", &new)?;
        std::fs::rename(&new, &path).context("cannot write", &path)?;
        self.records.sync_folder()
    }

    /// Removes it: everything it speaks of is gone.
    ///
    /// # Errors
    /// Whatever removing says.
    pub fn remove(self) -> Result<()> {
        self.records.remove(&self.records.path(&self.id)?)
    }
}

/// The content of a record; `None` if it went meanwhile.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_LEN + 1).read_to_end(&mut content));
    match read {
        Ok(len) if len as u64 > MAX_LEN => Err(Error::invalid("cannot read", path, "too long")),
        Ok(_) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::new("cannot read", path, error)),
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::new("cannot remove", path, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Role, scratch};

    fn records(dir: &Path) -> Records {
        Records::new(dir.join("lib"), dir.join("run"))
    }

    #[test]
    fn a_record_lives_and_goes_with_its_run() {
        let dir = scratch();
        let records = records(dir.path());
        assert_eq!(records.list().unwrap(), []);
        let record = records.create("b", b"{1}").unwrap();
        let error = records.create("b", b"").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        let other = records.create("a", b"").unwrap();
        record.update(b"{2}").unwrap();
        let found = records.list().unwrap();
        let ids: Vec<_> = found.iter().map(|found| found.id.as_str()).collect();
        assert_eq!(ids, ["a", "b"]);
        assert_eq!(found[1].content, b"{2}");
        assert!(found[1].is_alive);
        let error = records.remove_dead("b").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        record.remove().unwrap();
        other.remove().unwrap();
        assert_eq!(records.list().unwrap(), []);
        assert_eq!(
            std::fs::read_dir(dir.path().join("lib")).unwrap().count(),
            0
        );
        assert_eq!(
            std::fs::read_dir(dir.path().join("run")).unwrap().count(),
            0
        );
    }

    #[test]
    fn a_killed_run_leaves_its_record_and_no_life() {
        let dir = scratch();
        let records = records(dir.path());
        let role = Role::start("records::tests::role_runs", &[dir.path()]);
        assert!(records.list().unwrap()[0].is_alive);
        drop(role);
        std::fs::write(dir.path().join("lib/half.new"), "{").unwrap();
        std::fs::write(dir.path().join("lib/strange name.json"), "{").unwrap();
        let found = records.list().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].content.as_slice(), found[0].is_alive),
            (&b"x"[..], false)
        );
        assert!(!dir.path().join("lib/half.new").exists());
        // A dead run's id is not taken over: its record is still needed.
        assert!(records.create("a", b"").is_err());
        records.remove_dead("a").unwrap();
        assert_eq!(records.list().unwrap(), []);
        assert!(records.create("../a", b"").is_err());
    }

    #[test]
    fn role_runs() {
        let Some(args) = Role::args() else { return };
        let _record = records(&args[0]).create("a", b"x").unwrap();
        Role::ready_until_told();
    }
}
