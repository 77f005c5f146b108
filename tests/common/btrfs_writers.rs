//! A btrfs of several subvolumes that is kept busy in all ways that matter to a copy of it, and whose
//! writers' journals judge the copy afterwards.
//!
//! ```text
//! home            a subvolume that is written to
//! home/nested     another one, below it
//! home/nested/inplace   files that are never copied on write (`chattr +C`)
//! var             another one
//! static          a subvolume that nobody changes
//! snapshot        a read-only snapshot of home as it was before the writers came
//! ```

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::live::{Judgement, LiveWriter, judge_in};
use super::volume::populate;
use super::{Rng, run, shell};

/// All subvolumes, by their paths.
pub(crate) const SUBVOLUMES: [&str; 5] = ["home", "home/nested", "snapshot", "static", "var"];

/// Where the changers write, the top level included.
const CHANGED: [&str; 4] = ["", "home", "var", "home/nested"];

/// Files that a changer has at most.
const FILES: u64 = 40;

/// Makes the subvolumes, with about so many bytes in all of them.
pub(crate) fn lay_out(dir: &Path, rng: &mut Rng, bytes: u64) {
    let script = |text: &str| shell(format!("set -- {}; cd $1; {text}", dir.display()));
    script("for one in home home/nested var static; do btrfs -q subvolume create $one; done");
    populate(&dir.join("home/ballast"), rng, bytes / 4);
    populate(&dir.join("home/nested/ballast"), rng, bytes / 8);
    populate(&dir.join("var/ballast"), rng, bytes / 8);
    populate(&dir.join("static"), rng, bytes / 2);
    populate(&dir.join("top"), rng, bytes / 16);
    script(
        "seq 400000 > static/numbers
        head -c 3M /dev/urandom > static/large; cp --reflink=always static/large static/shared
        mkdir static/plain; chattr +C static/plain; head -c 2M /dev/urandom > static/plain/written
        fallocate -l 3M static/room
        head -c 70K /dev/urandom | dd of=static/room conv=notrunc bs=4K seek=9 status=none
        sync -f .; btrfs -q subvolume snapshot -r home snapshot
        mkdir home/nested/inplace; chattr +C home/nested/inplace; sync -f .",
    );
}

/// Which files the writers write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writing {
    /// Also files without copy-on-write.
    InPlaceToo,
    /// Only files that are copied on write.
    OnlyCopied,
}

/// The folders that one journal tells of, below the mount point.
struct Ledger {
    dirs: &'static [&'static str],
    /// Of `live-writer run`.
    options: &'static [&'static str],
    name: &'static str,
}

const LEDGERS: [Ledger; 2] = [
    Ledger {
        dirs: &["home/ledger", "var/ledger"],
        options: &["--budget", "24", "--direct", "2", "--pair", "2"],
        name: "journal-across",
    },
    Ledger {
        dirs: &["home/nested/inplace"],
        options: &[
            "--budget",
            "12",
            "--buffered",
            "1",
            "--append",
            "1",
            "--churn",
            "1",
            "--pair",
            "1",
        ],
        name: "journal-inplace",
    },
];

impl Ledger {
    /// Those that are written.
    fn of(writing: Writing) -> &'static [Self] {
        match writing {
            Writing::InPlaceToo => &LEDGERS,
            Writing::OnlyCopied => &LEDGERS[..1],
        }
    }
}

/// Journals of writers that have ended.
#[derive(Clone, Debug)]
pub(crate) struct Journals {
    dir: PathBuf,
    writing: Writing,
}

impl Journals {
    /// Judges a copy; what was found, or what is wrong.
    pub(crate) fn judge(&self, copy: &Path, how: Judgement) -> Result<String, String> {
        let mut found = String::new();
        for ledger in Ledger::of(self.writing) {
            let dirs: Vec<PathBuf> = ledger.dirs.iter().map(|dir| copy.join(dir)).collect();
            let dirs: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
            found += &self.judge_one(&dirs, ledger.name, how)?;
        }
        Ok(found)
    }

    /// Judges what was written across two subvolumes, in these folders.
    pub(crate) fn judge_across(&self, dirs: [&Path; 2], how: Judgement) -> Result<String, String> {
        self.judge_one(&dirs, LEDGERS[0].name, how)
    }

    /// Judges what was written in one subvolume, in this folder.
    pub(crate) fn judge_inplace(&self, dir: &Path, how: Judgement) -> Result<String, String> {
        self.judge_one(&[dir], LEDGERS[1].name, how)
    }

    fn judge_one(&self, dirs: &[&Path], name: &str, how: Judgement) -> Result<String, String> {
        judge_in(dirs, &self.dir.join(name), how).map_err(|wrong| format!("{name}:\n{wrong}"))
    }
}

/// Writers at work; they end when this is dropped.
pub(crate) struct Writers {
    ledgers: Vec<LiveWriter>,
    changers: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    journals: Journals,
}

impl Writers {
    /// Starts them in what [`lay_out`] made, with journals in the folder `journals`. They all write
    /// when this returns.
    pub(crate) fn start(dir: &Path, journals: &Path, seed: u64, writing: Writing) -> Self {
        std::fs::create_dir_all(journals).expect("a folder for journals");
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Self {
            ledgers: Vec::new(),
            changers: Vec::new(),
            stop: Arc::clone(&stop),
            journals: Journals {
                dir: journals.to_owned(),
                writing,
            },
        };
        for ledger in Ledger::of(writing) {
            let dirs: Vec<PathBuf> = ledger.dirs.iter().map(|name| dir.join(name)).collect();
            let dirs: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
            let journal = journals.join(ledger.name);
            let writer = LiveWriter::start_in(&dirs, &journal, seed, ledger.options);
            writers.ledgers.push(writer);
        }
        for number in 0..CHANGED.len() {
            let mut changer = Changer::new(dir, number, seed, writing);
            let stop = Arc::clone(&stop);
            let thread = std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // What is deleted while it is pinned is there until the cleaner has come by.
                    if is_nearly_full(&changer.dirs[0]) {
                        std::thread::sleep(Duration::from_millis(50));
                        continue;
                    }
                    changer.change();
                    std::thread::sleep(Duration::from_micros(500));
                }
            });
            writers.changers.push(thread);
        }
        std::thread::sleep(Duration::from_secs(1));
        writers
    }

    /// Ends them.
    ///
    /// # Panics
    /// If one of them has failed meanwhile.
    pub(crate) fn stop(mut self) -> Journals {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.ledgers.drain(..) {
            writer.stop();
        }
        for changer in self.changers.drain(..) {
            changer.join().expect("a changer that did not fail");
        }
        self.journals.clone()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for changer in self.changers.drain(..) {
            let _ = changer.join();
        }
    }
}

/// Whether less than a third of a filesystem is free.
fn is_nearly_full(dir: &Path) -> bool {
    let stat = nix::sys::statvfs::statvfs(dir).expect("a filesystem");
    stat.blocks_available() * 3 < stat.blocks()
}

/// Somebody who has everything written out again and again: one commit after the other.
pub(crate) struct Commits {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Commits {
    /// Begins, with a rest of so long between two.
    pub(crate) fn begin(dir: &Path, rest: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (dir, stopped) = (dir.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                run("sync", [Path::new("-f"), &dir]);
                std::thread::sleep(rest);
            }
        });
        let thread = Some(thread);
        Self { thread, stop }
    }
}

impl Drop for Commits {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Changes files of its own in one subvolume, and shares their extents with the others.
struct Changer {
    rng: Rng,
    /// Where it may make files: its own folder first, then those in the other subvolumes.
    dirs: Vec<PathBuf>,
    writing: Writing,
    content: Vec<u8>,
}

impl Changer {
    fn new(top: &Path, number: usize, seed: u64, writing: Writing) -> Self {
        let places = CHANGED.iter().cycle().skip(number).take(CHANGED.len());
        let dirs: Vec<PathBuf> = places
            .map(|place| top.join(place).join(format!("changer{number}")))
            .collect();
        for dir in &dirs {
            std::fs::create_dir_all(dir.join("inplace")).expect("a folder");
            run("chattr", [Path::new("+C"), &dir.join("inplace")]);
        }
        let mut rng = Rng(seed ^ (number as u64 + 1));
        let mut content = vec![0; 256 << 10];
        rng.fill(&mut content[..128 << 10]);
        Self {
            rng,
            dirs,
            writing,
            content,
        }
    }

    fn some_file(&mut self) -> PathBuf {
        let dir = self.rng.below(self.dirs.len() as u64) as usize;
        let number = self.rng.below(FILES / 4);
        self.dirs[dir].join(format!("file{number}"))
    }

    fn open(path: &Path) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.open(path).expect("a file to change")
    }

    /// Some bytes: half of all can be compressed.
    fn bytes(&mut self, most: u64) -> &[u8] {
        let from = self.rng.below((self.content.len() as u64) - most) as usize;
        let len = 1 + self.rng.below(most - 1) as usize;
        let first = self.rng.next_u64().to_le_bytes();
        self.content[from..from + 8].copy_from_slice(&first);
        &self.content[from..from + len]
    }

    fn change(&mut self) {
        let path = self.some_file();
        let at = self.rng.below(64 << 10);
        match self.rng.below(16) {
            0..4 => {
                let file = File::create(&path).expect("a new file");
                file.write_all_at(self.bytes(64 << 10), 0).expect("writes");
            }
            4..6 => {
                let _ = std::fs::remove_file(&path);
            }
            6..9 => Self::open(&path)
                .write_all_at(self.bytes(16 << 10), at)
                .expect("overwrites"),
            9 => Self::open(&path).sync_all().expect("fsync"),
            10..12 => {
                let shared = self.some_file();
                if shared != path {
                    share(
                        &Self::open(&path),
                        &File::create(shared).expect("a new file"),
                    );
                }
            }
            12..14 if self.writing == Writing::OnlyCopied => {}
            12..14 => {
                // 1 MiB, of which some is not written yet, in place.
                let file = Self::open(&self.dirs[0].join("inplace/file"));
                let block = self.rng.below(256) * 4096;
                let bytes = self.bytes(64 << 10);
                file.write_all_at(bytes, block).expect("writes in place");
                if block.is_multiple_of(5) {
                    file.sync_data().expect("fsync");
                }
            }
            14 => {
                let path = path.with_extension("room");
                let _ = std::fs::remove_file(&path);
                allocate(&Self::open(&path), 512 << 10);
            }
            _ => {
                let path = path.with_extension("room");
                let file = Self::open(&path);
                let bytes = self.bytes(32 << 10);
                file.write_all_at(bytes, at * 4).expect("writes into room");
                if at.is_multiple_of(3) {
                    file.set_len(at * 2).expect("cuts");
                }
            }
        }
    }
}

/// Makes a file share all extents of another (`FICLONE`).
fn share(from: &File, to: &File) {
    // SAFETY: the request takes a descriptor as its number, and both are open.
    let done = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    let error = std::io::Error::last_os_error();
    // A file that is in place shares with none that is not.
    assert!(
        done == 0 || error.kind() == std::io::ErrorKind::InvalidInput,
        "{error}"
    );
}

/// Allocates extents that are not written yet.
fn allocate(file: &File, len: i64) {
    // SAFETY: the descriptor is open, and no memory is passed.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
