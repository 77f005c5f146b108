//! Changes of metadata: files created, written, truncated, renamed, linked, removed, allocated,
//! punched and given attributes, all in one folder.
//!
//! Odd writes are such changes, one system call each. Every even write stores its own number in an
//! attribute of the folder, which tells the checker where it is. A model in memory chooses the next
//! change and knows what the folder holds after it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, XattrFlags, fallocate, fsetxattr, getxattr, setxattr};

use crate::check::Found;
use crate::config::{Config, Thread};
use crate::content::{fill, mix};
use crate::journal::Timeline;
use crate::run::Task;

/// Names in the folder.
const NAMES: u64 = 24;

/// Bytes a file can grow to.
const MAX: u64 = 128 << 10;

/// The folder's attribute that holds the number of the last even write.
const MARK: &str = "user.mark";

/// The attribute that files are given.
const NOTE: &str = "user.note";

/// One change. Names are numbers; `key` decides the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    Create(u8),
    Write(u8, u64, Vec<u8>),
    Truncate(u8, u64),
    Rename(u8, u8),
    Link(u8, u8),
    Unlink(u8),
    Allocate(u8, u64, u64),
    Zero(u8, u64, u64),
    Punch(u8, u64, u64),
    Note(u8, Vec<u8>),
    Sync(u8),
    Mark(u64),
}

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Inode {
    data: Vec<u8>,
    note: Vec<u8>,
}

/// What the folder holds after `n` writes.
#[derive(Clone, Debug, Default)]
struct Model {
    n: u64,
    names: BTreeMap<u8, u64>,
    inodes: BTreeMap<u64, Inode>,
    mark: u64,
}

fn bytes(len: u64, key: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    fill(&mut bytes, key);
    bytes
}

impl Model {
    /// The next change.
    fn next(&self, config: &Config, thread: usize) -> Change {
        let seq = self.n + 1;
        if seq.is_multiple_of(2) {
            return Change::Mark(seq);
        }
        let random = |what: u64| mix(config.seed ^ what, thread as u64, seq);
        let a = (random(1) % NAMES) as u8;
        let b = (random(2) % NAMES) as u8;
        let offset = random(3) % (MAX / 2);
        let len = 1 + random(4) % (MAX / 2);
        let Some(inode) = self.names.get(&a) else {
            return Change::Create(a);
        };
        match random(5) % 16 {
            0 | 1 => Change::Truncate(a, offset),
            2 | 3 if a != b => Change::Rename(a, b),
            4 if !self.names.contains_key(&b) => Change::Link(a, b),
            5 | 6 => Change::Unlink(a),
            7 => Change::Allocate(a, offset, len),
            8 => Change::Zero(a, offset, len),
            9 | 10 => Change::Punch(a, offset, len),
            11 => Change::Note(a, bytes(1 + len % 500, random(6))),
            12 if seq % 8 == 1 => Change::Sync(a),
            // Mostly onto the end, sometimes into the middle or past a hole.
            13 => {
                let end = self.inodes.get(inode).map_or(0, |inode| inode.data.len());
                Change::Write(a, (end as u64).min(MAX / 2), bytes(len, random(6)))
            }
            _ => Change::Write(a, offset, bytes(len, random(6))),
        }
    }

    fn data(&mut self, name: u8) -> Option<&mut Vec<u8>> {
        let inode = self.names.get(&name)?;
        self.inodes.get_mut(inode).map(|inode| &mut inode.data)
    }

    fn unlink(&mut self, name: u8) {
        if let Some(inode) = self.names.remove(&name)
            && !self.names.values().any(|other| *other == inode)
        {
            self.inodes.remove(&inode);
        }
    }

    /// Makes the change.
    fn step(&mut self, change: &Change) {
        self.n += 1;
        match change {
            Change::Create(name) => {
                self.names.insert(*name, self.n);
                self.inodes.insert(self.n, Inode::default());
            }
            Change::Write(name, offset, bytes) => {
                if let Some(data) = self.data(*name) {
                    let at = *offset as usize;
                    data.resize(data.len().max(at + bytes.len()), 0);
                    data[at..at + bytes.len()].copy_from_slice(bytes);
                }
            }
            Change::Truncate(name, len) => {
                if let Some(data) = self.data(*name) {
                    data.resize(*len as usize, 0);
                }
            }
            Change::Rename(from, to) => {
                // Between two links of one file, rename does nothing.
                if self.names.get(from) != self.names.get(to)
                    && let Some(inode) = self.names.get(from).copied()
                {
                    self.unlink(*to);
                    self.names.remove(from);
                    self.names.insert(*to, inode);
                }
            }
            Change::Link(from, to) => {
                if let Some(inode) = self.names.get(from).copied() {
                    self.names.insert(*to, inode);
                }
            }
            Change::Unlink(name) => self.unlink(*name),
            Change::Allocate(name, offset, len) => {
                if let Some(data) = self.data(*name) {
                    data.resize(data.len().max((offset + len) as usize), 0);
                }
            }
            Change::Zero(name, offset, len) => {
                if let Some(data) = self.data(*name) {
                    let (from, to) = (*offset as usize, (offset + len) as usize);
                    data.resize(data.len().max(to), 0);
                    data[from..to].fill(0);
                }
            }
            Change::Punch(name, offset, len) => {
                if let Some(data) = self.data(*name) {
                    let end = data.len();
                    let (from, to) = (*offset as usize, (offset + len) as usize);
                    data[from.min(end)..to.min(end)].fill(0);
                }
            }
            Change::Note(name, note) => {
                if let Some(inode) = self.names.get(name)
                    && let Some(inode) = self.inodes.get_mut(inode)
                {
                    inode.note.clone_from(note);
                }
            }
            Change::Sync(_) => {}
            Change::Mark(seq) => self.mark = *seq,
        }
    }

    /// How the folder at `path` differs from this; after a crash, in all but its files' bytes, which
    /// nobody made durable.
    fn differences(&self, path: &Path, after_crash: bool) -> io::Result<Vec<String>> {
        let mut wrong = Vec::new();
        let mut have = BTreeSet::new();
        for entry in std::fs::read_dir(path)? {
            have.insert(entry?.file_name());
        }
        let expected: BTreeSet<_> = self.names.keys().map(|n| file_name(*n).into()).collect();
        for name in have.symmetric_difference(&expected) {
            let what = if have.contains(name) { "is" } else { "is not" };
            wrong.push(format!("{} {what} there", name.display()));
        }
        for (name, inode) in &self.names {
            let file = path.join(file_name(*name));
            let Some(inode_is) = self.inodes.get(inode) else {
                continue;
            };
            if !have.contains(OsStr::new(&file_name(*name))) {
                continue;
            }
            let data = std::fs::read(&file)?;
            if after_crash {
                // Nothing is promised of them.
            } else if data.len() != inode_is.data.len() {
                wrong.push(format!(
                    "{} is {} bytes long instead of {}",
                    file_name(*name),
                    data.len(),
                    inode_is.data.len()
                ));
            } else if let Some(at) = data.iter().zip(&inode_is.data).position(|(a, b)| a != b) {
                wrong.push(format!("{} differs at byte {at}", file_name(*name)));
            }
            let links = self.names.values().filter(|other| *other == inode).count() as u64;
            if file.metadata()?.nlink() != links {
                wrong.push(format!("{} does not have {links} links", file_name(*name)));
            }
            if attribute(&file, NOTE)? != inode_is.note {
                wrong.push(format!("{} has another attribute", file_name(*name)));
            }
        }
        Ok(wrong)
    }
}

fn file_name(name: u8) -> String {
    format!("file-{name}")
}

/// An extended attribute; empty if there is none.
fn attribute(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let mut value = vec![0; 4096];
    match getxattr(path, name, &mut value[..]) {
        Ok(len) => {
            value.truncate(len);
            Ok(value)
        }
        Err(rustix::io::Errno::NODATA) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// Makes the change in the folder at `path`.
fn execute(path: &Path, change: &Change) -> io::Result<()> {
    let file = |name: &u8| path.join(file_name(*name));
    let open = |name: &u8| OpenOptions::new().write(true).open(file(name));
    match change {
        Change::Create(name) => File::create_new(file(name)).map(|_| ()),
        Change::Write(name, offset, bytes) => {
            let written = open(name)?.write_at(bytes, *offset)?;
            if written == bytes.len() {
                Ok(())
            } else {
                Err(io::Error::other("a write was done in part"))
            }
        }
        Change::Truncate(name, len) => open(name)?.set_len(*len),
        Change::Rename(from, to) => std::fs::rename(file(from), file(to)),
        Change::Link(from, to) => std::fs::hard_link(file(from), file(to)),
        Change::Unlink(name) => std::fs::remove_file(file(name)),
        Change::Allocate(name, offset, len) => Ok(fallocate(
            open(name)?,
            FallocateFlags::empty(),
            *offset,
            *len,
        )?),
        Change::Zero(name, offset, len) => Ok(fallocate(
            open(name)?,
            FallocateFlags::ZERO_RANGE,
            *offset,
            *len,
        )?),
        Change::Punch(name, offset, len) => Ok(fallocate(
            open(name)?,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            *offset,
            *len,
        )?),
        Change::Note(name, note) => Ok(fsetxattr(open(name)?, NOTE, note, XattrFlags::empty())?),
        Change::Sync(name) => open(name)?.sync_all(),
        Change::Mark(seq) => Ok(setxattr(
            path,
            MARK,
            &seq.to_le_bytes(),
            XattrFlags::empty(),
        )?),
    }
}

/// Makes the empty folder.
pub(crate) fn prepare(task: &Task) -> io::Result<()> {
    std::fs::create_dir(&task.path)?;
    execute(&task.path, &Change::Mark(0))
}

/// Changes things until it is told to stop.
pub(crate) fn run(task: &Task) -> io::Result<()> {
    let mut model = Model::default();
    while !task.stopped() {
        let change = model.next(&task.config, task.index);
        let seq = model.n + 1;
        task.journal.begun(seq)?;
        execute(&task.path, &change).map_err(|error| {
            let change = format!("{change:?}");
            io::Error::other(format!("{change:.60}: {error}"))
        })?;
        task.journal.returned(seq)?;
        model.step(&change);
        task.progressed();
        task.pause();
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    Ok(())
}

/// Which prefix of the changes the folder at `path` holds.
pub(crate) fn check(
    path: &Path,
    config: &Config,
    thread: &Thread,
    timeline: &Timeline,
    after_crash: bool,
) -> Result<Found, Vec<String>> {
    let result = (|| {
        let mark = attribute(path, MARK)?;
        let mark = <[u8; 8]>::try_from(&mark[..])
            .map(u64::from_le_bytes)
            .map_err(|_| io::Error::other("the folder has no mark"))?;
        if mark > timeline.begun_count() {
            return Err(io::Error::other(format!(
                "holds change {mark}, which was never begun"
            )));
        }
        let mut model = Model::default();
        while model.n < mark {
            let change = model.next(config, thread.index);
            model.step(&change);
        }
        // After the mark at most one more change can be there; it may be one that is not seen.
        let wrong = model.differences(path, after_crash)?;
        let change = model.next(config, thread.index);
        model.step(&change);
        let more =
            model.n <= timeline.begun_count() && model.differences(path, after_crash)?.is_empty();
        Ok(match (wrong.is_empty(), more) {
            (true, more) => Ok(Found {
                seen: mark,
                whole: mark + u64::from(more),
            }),
            (false, true) => Ok(Found::whole(mark + 1)),
            (false, false) => Err(wrong
                .into_iter()
                .map(|what| format!("after change {mark}: {what}"))
                .collect()),
        })
    })();
    result.unwrap_or_else(|error: io::Error| Err(vec![error.to_string()]))
}
