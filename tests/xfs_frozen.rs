//! XFS that is frozen while programs change files in place. Its log then looks as if something had to be
//! replayed, and nothing has: every used block of a copy is what it is after the log was replayed.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use holdstill::error::Kind;
use holdstill::extent::{Extent, ExtentSet};
use holdstill::freeze::survey::{Mode, Survey};
use holdstill::fs::{self, Condition, DirtyReason, Opened};
use holdstill::image::manifest::{Blocks, Grade};
use holdstill_platform::buffer::Buffer;
use holdstill_platform::device::{Access, Disk};

use crate::common::volume::{
    copy, digests, direct_copy, ext4, free_by_fsmap, map, open, poisoned_file, populate,
};
use crate::common::walking::walk;
use crate::common::{
    self, FileSource, LoopDevice, Mount, Rng, count, needs_root, run, seed, sparse_file,
};

const SIZE: u64 = 320 << 20;

const LOG_IS_LIVE: Condition = Condition::Dirty {
    reason: DirtyReason::Log,
};

/// A mounted XFS, with something in it.
struct Volume {
    // Taken down in this order.
    mount: Mount,
    device: LoopDevice,
    dir: tempfile::TempDir,
}

impl Volume {
    fn new(mkfs: &str, options: &str) -> Self {
        let dir = common::temp_dir();
        let file = dir.path().join("volume");
        sparse_file(&file, SIZE);
        let device = LoopDevice::attach_with(&file, &["--direct-io=on"]);
        let mut args: Vec<&str> = vec!["-q", "-f"];
        args.extend(mkfs.split_whitespace());
        args.push(device.path().to_str().unwrap());
        run("mkfs.xfs", args);
        let mount = Mount::new(device.path(), &dir.path().join("live"), "xfs", options);
        populate(mount.dir(), &mut Rng(seed() | 1), 12 << 20);
        for (_, change) in CHANGES {
            change(mount.dir(), 0);
        }
        Self { mount, device, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Freezes and thaws, so that the log is covered.
    fn cover(&self) {
        drop(self.mount.freeze());
    }

    /// What is on the device now.
    fn copy(&self, name: &str) -> PathBuf {
        let copy = self.path(name);
        direct_copy(self.device.path(), &copy);
        copy
    }

    /// Unmounts, and mounts again.
    fn remount(self, options: &str) -> Self {
        self.remount_after(options, |_| ())
    }

    /// The same, with a look at what is on the device in between.
    fn remount_after(self, options: &str, look: impl FnOnce(&Path)) -> Self {
        let Self { mount, device, dir } = self;
        drop(mount);
        look(&dir.path().join("volume"));
        let mount = Mount::new(device.path(), &dir.path().join("live"), "xfs", options);
        Self { mount, device, dir }
    }

    fn shut_down(&self) {
        let dir = self.mount.dir().to_str().unwrap();
        run("xfs_io", ["-x", "-c", "shutdown -f", dir]);
    }
}

/// Something that changes files in place.
type Change = fn(&Path, u64);

const CHANGES: &[(&str, Change)] = &[
    ("touch", touch),
    ("overwrite", overwrite),
    ("direct", overwrite_directly),
    ("mapped", overwrite_mapped),
    ("sqlite", commit),
];

/// The file that is changed: 1 MiB, from the first time on.
fn scratch(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    if !path.exists() {
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
    }
    path
}

fn touch(dir: &Path, _: u64) {
    let path = scratch(dir, "touched");
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now()).unwrap();
    file.sync_all().unwrap();
}

fn overwrite(dir: &Path, number: u64) {
    let path = scratch(dir, "overwritten");
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let content = [number as u8; 4096];
    file.write_all_at(&content, number % 256 * 4096).unwrap();
    file.sync_data().unwrap();
}

fn overwrite_directly(dir: &Path, number: u64) {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(scratch(dir, "direct"))
        .unwrap();
    let mut content = Buffer::new(4096);
    content.fill(number as u8);
    file.write_all_at(&content, number % 256 * 4096).unwrap();
}

fn overwrite_mapped(dir: &Path, number: u64) {
    let path = scratch(dir, "mapped");
    let write = format!("mwrite -S {} {} 4096", number % 256, number % 256 * 4096);
    let path = path.to_str().unwrap();
    let commands = ["-c", "mmap -rw 0 1m", "-c", &write, "-c", "msync -s"];
    run("xfs_io", commands.into_iter().chain([path]));
}

fn commit(dir: &Path, number: u64) {
    let database = dir.join("database");
    let script = format!(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
         CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, value);
         INSERT OR REPLACE INTO t VALUES ({}, {number});",
        number % 10
    );
    run("sqlite3", [database.to_str().unwrap(), &script]);
}

fn open_frozen(source: &FileSource) -> Box<dyn fs::Filesystem> {
    match fs::open_frozen(source).unwrap() {
        Opened::Known(filesystem) => filesystem,
        other => panic!("no map: {other:?}"),
    }
}

/// What a copy is to whoever holds its filesystem frozen.
fn if_frozen(copy: &Path) -> Condition {
    open_frozen(&FileSource::open(copy)).condition()
}

/// What it is to anybody else.
fn if_not(copy: &Path) -> Condition {
    let source = FileSource::open(copy);
    let condition = open(&source).condition();
    let Opened::Known(mounted) = fs::open_mounted(&source).unwrap() else {
        panic!("no map");
    };
    assert_eq!(mounted.condition(), condition);
    condition
}

/// A record of the log: where it lies in the volume, how long it is with its headers, its place in the
/// log, and its tail's.
#[derive(Clone, Copy, Debug)]
struct Record {
    at: u64,
    len: u64,
    lsn: u64,
    tail: u64,
}

/// Where the log lies, and its records from the oldest on.
fn log_of(image: &Path) -> (Extent, Vec<Record>) {
    let file = File::open(image).unwrap();
    let mut superblock = [0; 512];
    file.read_exact_at(&mut superblock, 0).unwrap();
    let be32 = |bytes: &[u8], at: usize| {
        u64::from(u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()))
    };
    let be64 = |bytes: &[u8], at: usize| be32(bytes, at) << 32 | be32(bytes, at + 4);
    let (block, group) = (be32(&superblock, 4), be32(&superblock, 84));
    let (start, shift) = (be64(&superblock, 48), superblock[124]);
    let first = (start >> shift) * group + (start & ((1 << shift) - 1));
    let log = Extent::new(first * block, be32(&superblock, 96) * block);
    let mut content = vec![0; log.len.0 as usize];
    file.read_exact_at(&mut content, log.start.0).unwrap();
    let headers = content.chunks_exact(512).enumerate();
    let mut records: Vec<Record> = headers
        .filter(|(number, header)| {
            // What the kernel clears ahead of the head are records without content.
            be32(header, 0) == 0xfeed_babe
                && be32(header, 12) != 0
                && be32(header, 20) == *number as u64
        })
        .map(|(number, header)| Record {
            at: log.start.0 + number as u64 * 512,
            len: (be32(header, 320).div_ceil(32 << 10).max(1) + be32(header, 12).div_ceil(512))
                * 512,
            lsn: be64(header, 16),
            tail: be64(header, 24),
        })
        .collect();
    records.sort_by_key(|record| record.lsn);
    (log, records)
}

/// Every block that a frozen filesystem calls used is in its copy what it is after the log was replayed,
/// but for the log itself and the superblock with its counters.
fn assert_as_replayed(frozen: &Path) {
    let source = FileSource::open(frozen);
    let (used, walked) = walk(open_frozen(&source).as_ref(), &source);
    assert_eq!(walked.unwrap().warnings, [""; 0]);
    let replayed = frozen.with_extension("replayed");
    copy(frozen, &replayed);
    {
        let device = LoopDevice::attach(&replayed);
        drop(Mount::new(
            device.path(),
            &frozen.with_extension("mnt"),
            "xfs",
            "nouuid",
        ));
    }
    run("xfs_repair", [Path::new("-n"), &replayed]);
    let after = map(&replayed);
    assert_eq!(after.condition, Condition::Clean);
    assert!(after.used == used, "the map changed");
    let mut unchanged = ExtentSet::new();
    let (log, _) = log_of(frozen);
    for run in used.runs() {
        unchanged.insert(*run);
    }
    let [before, after] = [frozen, &replayed].map(|path| File::open(path).unwrap());
    let mut blocks = 0;
    for run in unchanged.runs() {
        let mut at = run.start.0.max(512);
        while at < run.end().0 {
            let end = run.end().0.min((at / 4096 + 1) * 4096);
            let piece = Extent::new(at, end - at);
            let [mut one, mut other] = [[0; 4096]; 2];
            let len = (end - at) as usize;
            before.read_exact_at(&mut one[..len], at).unwrap();
            after.read_exact_at(&mut other[..len], at).unwrap();
            let is_same = one[..len] == other[..len];
            assert!(
                is_same || piece.intersect(log).is_some(),
                "{piece:?} differs"
            );
            blocks += 1;
            at = end;
        }
    }
    assert!(blocks > 1000, "only {blocks} blocks were compared");
    std::fs::remove_file(&replayed).unwrap();
}

/// How logs are made and written, with buffers of all sizes.
const LOGS: &[(&str, &str)] = &[
    ("", ""),
    ("-m reflink=0,rmapbt=1", "logbsize=64k"),
    ("-l su=65536", "logbsize=128k"),
    ("-b size=1024", "logbsize=256k"),
    ("-s size=4096", ""),
];

#[test]
fn privileged_a_freeze_after_single_changes_in_place_is_seen_by_who_made_it() {
    needs_root!();
    let mut rng = Rng(seed());
    let logs = rng.clone().some(LOGS, count(2, 5));
    for &(mkfs, options) in logs {
        let volume = Volume::new(mkfs, options);
        for (name, change) in CHANGES {
            println!("{mkfs} {options} {name}");
            let tries = 1 + rng.below(3);
            volume.cover();
            for number in 0..tries {
                change(volume.mount.dir(), 1 + number);
            }
            let free = {
                let _frozen = volume.mount.freeze();
                volume.copy("frozen");
                free_by_fsmap(volume.mount.dir())
            };
            let frozen = volume.path("frozen");
            if *name == "touch" {
                assert_eq!(if_not(&frozen), LOG_IS_LIVE);
            }
            assert_eq!(if_frozen(&frozen), Condition::Frozen);
            let source = FileSource::open(&frozen);
            let (used, _) = walk(open_frozen(&source).as_ref(), &source);
            let mut found = ExtentSet::new();
            used.gaps(Extent::new(0, SIZE))
                .for_each(|gap| found.insert(gap));
            assert_eq!(found, free, "not the kernel's map");
            assert_as_replayed(&frozen);
        }
    }
}

#[test]
fn privileged_a_freeze_right_after_a_log_was_replayed_is_seen() {
    needs_root!();
    for (mkfs, options) in [("", ""), ("", "logbsize=256k")] {
        let volume = Volume::new(mkfs, options);
        volume.cover();
        // One record of more than a freeze would take for its own.
        for number in 0..50 {
            std::fs::write(volume.mount.dir().join(format!("new{number}")), [1; 100]).unwrap();
        }
        volume.shut_down();
        let volume = volume.remount(options);
        let frozen = {
            let _frozen = volume.mount.freeze();
            volume.copy("frozen")
        };
        assert_eq!(if_not(&frozen), LOG_IS_LIVE);
        assert_eq!(if_frozen(&frozen), Condition::Frozen);
        assert_as_replayed(&frozen);
    }
}

/// Whether the last record of the log goes round its end.
fn wraps(image: &Path) -> bool {
    let (log, records) = log_of(image);
    let last = records.last().unwrap();
    last.at + last.len > log.end().0
}

#[test]
fn privileged_the_last_record_is_read_wherever_the_log_ends() {
    needs_root!();
    for options in ["logbsize=32k", "logbsize=64k", "logbsize=256k"] {
        let mut volume = Volume::new("--unsupported -l size=8m", options);
        let mut wrapped = 0;
        // Again, should all that were looked at end just where the log does.
        for round in 0.. {
            assert!(round < 20, "{options}: no last record wraps");
            // Nearly to the end, and then over it step by step.
            loop {
                let (log, records) = log_of(&volume.path("volume"));
                let left = log.end().0 - records.last().unwrap().at;
                if left < 100 << 10 {
                    break;
                }
                let dir = volume.mount.dir().join("filler");
                std::fs::create_dir(&dir).unwrap();
                for number in 0..left >> 13 {
                    File::create(dir.join(number.to_string())).unwrap();
                }
                touch(volume.mount.dir(), 0);
                std::fs::remove_dir_all(dir).unwrap();
                touch(volume.mount.dir(), 0);
            }
            while {
                let (log, records) = log_of(&volume.path("volume"));
                records.last().unwrap().at > log.start.0 + (2 << 20)
            } {
                for _ in 0..3 {
                    touch(volume.mount.dir(), 0);
                    let _frozen = volume.mount.freeze();
                    assert_eq!(if_frozen(&volume.path("volume")), Condition::Frozen);
                    wrapped += u64::from(wraps(&volume.path("volume")));
                }
                volume = volume.remount_after(options, |image| {
                    wait_until_clean(image);
                    wrapped += u64::from(wraps(image));
                });
            }
            if wrapped > 0 {
                break;
            }
        }
    }
}

/// An unmounted filesystem may live on for a moment in the mount namespace of another process.
fn wait_until_clean(image: &Path) {
    for _ in 0..100 {
        if if_not(image) == Condition::Clean {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("not clean after an unmount");
}

fn patch(image: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Gives a record another tail, and takes its checksum away: none is as good as a right one.
fn set_tail(image: &Path, record: Record, tail: u64) {
    patch(image, record.at + 24, &tail.to_be_bytes());
    patch(image, record.at + 32, &[0; 4]);
}

#[test]
fn privileged_what_no_freeze_leaves_is_dirty_also_to_who_made_one() {
    needs_root!();
    let volume = Volume::new("", "");
    let dir = volume.mount.dir();
    volume.cover();
    touch(dir, 1);
    assert_eq!(if_frozen(&volume.copy("one")), LOG_IS_LIVE, "one change");
    touch(dir, 2);
    assert_eq!(if_frozen(&volume.copy("two")), LOG_IS_LIVE, "two changes");
    let frozen = {
        let _frozen = volume.mount.freeze();
        volume.copy("frozen")
    };
    touch(dir, 3);
    let thawed = volume.copy("thawed");
    assert_eq!(if_frozen(&thawed), LOG_IS_LIVE, "a change after the freeze");
    assert_eq!(if_frozen(&frozen), Condition::Frozen);

    let (_, records) = log_of(&frozen);
    let [.., first, second, last] = records[..] else {
        panic!("{records:?}");
    };
    assert_eq!(last.tail, second.lsn);
    set_tail(&frozen, last, second.lsn);
    assert_eq!(if_frozen(&frozen), Condition::Frozen);
    set_tail(&frozen, last, first.lsn);
    assert_eq!(if_frozen(&frozen), LOG_IS_LIVE, "two records of changes");
    // The same place in another round.
    set_tail(&frozen, last, second.lsn + (1 << 32));
    assert_eq!(if_frozen(&frozen), LOG_IS_LIVE, "not that record");
    set_tail(&frozen, last, second.lsn);

    // A superblock that is not the last in the log.
    let mut sector = vec![0; 512];
    File::open(&frozen)
        .unwrap()
        .read_exact_at(&mut sector, 0)
        .unwrap();
    assert_eq!(sector[240..248], last.lsn.to_be_bytes());
    sector[240..248].copy_from_slice(&first.lsn.to_be_bytes());
    sector[224..228].fill(0);
    let crc = crc32c::crc32c(&sector).to_le_bytes();
    sector[224..228].copy_from_slice(&crc);
    patch(&frozen, 0, &sector);
    assert_eq!(if_frozen(&frozen), LOG_IS_LIVE, "an older superblock");
}

/// A volume that a power cut left with a change that is not in its place, and a log that looks like that
/// of a freeze.
fn like_a_freeze(volume: &Volume) -> PathBuf {
    let dir = volume.mount.dir();
    volume.cover();
    touch(dir, 1);
    // Writes the superblock, to the log and to its place.
    run(
        "xfs_io",
        ["-x", "-c", "label -s likeness", dir.to_str().unwrap()],
    );
    volume.copy("cut")
}

#[test]
fn privileged_a_power_cut_that_looks_like_a_freeze_is_one_to_nobody_who_made_none() {
    needs_root!();
    let volume = Volume::new("", "");
    let cut = like_a_freeze(&volume);
    // It could fool one who would hold it frozen: nobody can, with this in the log.
    assert_eq!(if_frozen(&cut), Condition::Frozen);
    assert_eq!(if_not(&cut), LOG_IS_LIVE);
    drop(volume);

    let dir = common::temp_dir();
    let cut_again = dir.path().join("cut");
    {
        let volume = Volume::new("", "");
        copy(&like_a_freeze(&volume), &cut_again);
    }
    let device = LoopDevice::attach(&cut_again);
    let options = "ro,norecovery";
    let mount = Mount::new(device.path(), &dir.path().join("live"), "xfs", options);
    for step in ["hold", "track"] {
        println!("{step}");
        let report = backup(mount.dir(), step, &dir.path().join(step), &[]);
        assert_eq!(report["grade"], "crash");
        let warnings = report["warnings"].to_string();
        assert!(warnings.contains("all blocks are copied"), "{warnings}");
    }
}

/// Images the mounted filesystem; its report.
fn backup(source: &Path, step: &str, image: &Path, more: &[&str]) -> serde_json::Value {
    let [source, image] = [source, image].map(|path| path.to_str().unwrap());
    let args = ["backup", source, "--freeze", step, "-o", image, "--json"];
    common::holdstill::run(args.iter().chain(more))
        .expect(0)
        .last()
}

/// Changes made again and again, until it is dropped.
fn while_changing<T>(dir: &Path, change: Change, act: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0.. {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                change(dir, number);
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        is_over.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn privileged_what_is_written_in_place_meanwhile_does_not_spoil_the_image() {
    needs_root!();
    for (name, change) in CHANGES {
        let volume = Volume::new("", "");
        let dir = volume.mount.dir();
        // A covered log, and then one change before the freeze at least.
        let mount = dir.display();
        let hook = format!("fsfreeze -f {mount}; fsfreeze -u {mount}; touch {mount}/touched");
        for round in 0..count(1, 4) {
            for step in ["track", "hold"] {
                println!("{name} {step} {round}");
                let image = volume.path("image.still");
                let more = ["--force", "--pre-freeze", &hook];
                let report = while_changing(dir, *change, || backup(dir, step, &image, &more));
                assert_eq!(report["grade"], "frozen", "{report}");
                assert_eq!(report["warnings"].to_string(), "[]");
                let used = report["used_bytes"].as_u64().unwrap();
                assert!(used < SIZE / 2, "{report}");

                let restored = volume.path("restored");
                poisoned_file(&restored, SIZE);
                let [from, to] = [&image, &restored].map(|path| path.to_str().unwrap());
                common::holdstill::run(["restore", from, to, "--yes", "--quiet"]).expect(0);
                assert_as_replayed(&restored);
                // The files of an orderly whole.
                let device = LoopDevice::attach(&restored);
                let copied = Mount::new(device.path(), &volume.path("copied"), "xfs", "nouuid");
                assert!(digests(copied.dir()).len() > 20);
                let database = copied.dir().join("database");
                let check = ["PRAGMA integrity_check"];
                let said = run(
                    "sqlite3",
                    [database.to_str().unwrap()].into_iter().chain(check),
                );
                assert_eq!(said, "ok\n");
            }
        }
    }
}

#[test]
fn privileged_a_volume_that_was_shut_down_is_never_taken_for_frozen() {
    needs_root!();
    for step in ["hold", "track"] {
        let volume = Volume::new("", "");
        volume.cover();
        touch(volume.mount.dir(), 1);
        volume.shut_down();
        let image = volume.path("image.still");
        let [source, to] = [volume.device.path(), &image].map(|path| path.to_str().unwrap());
        let ended = common::holdstill::run(["backup", source, "--freeze", step, "-o", to]);
        assert_ne!(ended.code(), Some(0), "{ended}");
        assert!(!image.exists());
    }
}

/// Surveys a file as if we held its filesystem frozen.
fn survey(image: &Path, mode: Mode) -> holdstill::error::Result<Survey> {
    Survey::of_frozen(&Disk::open(image, Access::Read).unwrap(), mode, false)
}

fn assert_not_frozen(image: &Path) {
    let disk = Disk::open(image, Access::Read).unwrap();
    let errors = [
        survey(image, Mode::Writable).unwrap_err(),
        Survey::why_unsettled(&disk, Mode::Writable).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), Kind::Inconsistent, "{error}");
    }
    // Mounted read-only, no freeze would change that.
    let read_only = survey(image, Mode::ReadOnly).unwrap();
    assert_eq!(
        (read_only.grade, read_only.blocks),
        (Grade::Crash, Blocks::All)
    );
    assert!(
        Survey::why_unsettled(&disk, Mode::ReadOnly)
            .unwrap()
            .is_some()
    );
}

#[test]
fn privileged_an_xfs_whose_log_goes_on_under_our_freeze_is_refused() {
    needs_root!();
    let volume = Volume::new("", "");
    volume.cover();
    touch(volume.mount.dir(), 1);
    assert_not_frozen(&volume.copy("running"));
    let (log, records) = log_of(&volume.copy("damaged"));
    // What a freeze cannot mend is copied as a whole.
    let damaged = volume.path("damaged");
    patch(&damaged, records.last().unwrap().at + 512, &[0xff; 8]);
    assert!(log.end().0 > records.last().unwrap().at);
    let survey = survey(&damaged, Mode::Writable).unwrap();
    assert_eq!((survey.grade, survey.blocks), (Grade::Crash, Blocks::All));
}

/// The kernel covers such a log without writing to it, or not: it can end in anything.
#[test]
fn without_lazy_counters_a_log_does_not_show_a_freeze() {
    let dir = common::temp_dir();
    let image = dir.path().join("image");
    sparse_file(&image, SIZE);
    let options = ["-q", "-m", "crc=0", "-l", "lazy-count=0"].map(Path::new);
    run("mkfs.xfs", options.into_iter().chain([&*image]));
    assert_eq!(if_not(&image), Condition::Clean);
    let reason = DirtyReason::Unproven;
    assert_eq!(if_frozen(&image), Condition::Dirty { reason });
    let survey = survey(&image, Mode::Writable).unwrap();
    assert_eq!((survey.grade, survey.blocks), (Grade::Crash, Blocks::All));
}

/// Sets bits of the superblock of an ext4 without checksums.
fn set_bits(image: &Path, offset: u64, bits: u8) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(image)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1024 + offset).unwrap();
    file.write_all_at(&[byte[0] | bits], 1024 + offset).unwrap();
}

#[test]
fn an_ext4_whose_journal_goes_on_under_our_freeze_is_refused() {
    let dir = common::temp_dir();
    let image = dir.path().join("image");
    let make = |incompat: u8, state: u8| {
        ext4(&image, 64 << 20, "-O ^metadata_csum", None);
        set_bits(&image, 96, incompat);
        set_bits(&image, 58, state);
    };
    // needs_recovery.
    make(4, 0);
    assert_not_frozen(&image);
    // Errors that it found in itself stay, also when it is frozen.
    for incompat in [0, 4] {
        make(incompat, 2);
        let survey = survey(&image, Mode::Writable).unwrap();
        assert_eq!((survey.grade, survey.blocks), (Grade::Crash, Blocks::All));
    }
    // Without a journal, a freeze does not show; that it is mounted read-only does.
    ext4(&image, 64 << 20, "-O ^has_journal,^metadata_csum", None);
    patch(&image, 1024 + 58, &[0, 0]);
    let grades = [Mode::Writable, Mode::ReadOnly].map(|mode| survey(&image, mode).unwrap().grade);
    assert_eq!(grades, [Grade::Frozen, Grade::Crash]);
}
