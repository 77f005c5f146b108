//! `track` under heavy writers: the copy is compared, block by block, with the whole device as it was
//! inside the freeze, and its files with what their writers had written by then.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdstill::extent::Extent;
use holdstill::freeze::CowRoom;
use holdstill::freeze::session::Hooks;
use holdstill::fs;
use holdstill::pipeline::read::OnReadError;
use holdstill::pipeline::store::Compression;
use holdstill::progress::{Event, Progress, Stop};
use holdstill::read_at::ReadAt;
use holdstill::units::{ByteLen, Offset};
use holdstill::verbs::backup::{self, Options};
use holdstill_platform::buffer::Buffer;
use holdstill_platform::device::{Access, Disk};

use crate::common::holdstill::run as holdstill;
use crate::common::live::{LiveWriter, judge, patiently};
use crate::common::volume::{check_frozen_ext4, poisoned_file, populate};
use crate::common::{
    self, LoopDevice, Mount, Partition, Rng, needs_root, run, sparse_file, threads,
};

/// Length of the volumes.
fn size() -> u64 {
    match common::count(1, 20) {
        20.. => 1 << 30,
        _ => 512 << 20,
    }
}

/// Length of those with a swap file: so large that mke2fs chooses blocks of 4 KiB.
const SWAP_VOLUME: u64 = 600 << 20;

/// Length of the partitions beside them.
const NEIGHBOUR: u64 = 16 << 20;

/// Reads the whole device while it is frozen.
struct Oracle {
    device: Disk,
    content: Mutex<Buffer>,
    /// CLOCK_MONOTONIC inside the freeze, in nanoseconds.
    instant: AtomicU64,
    took: Mutex<Duration>,
}

impl Oracle {
    fn new(device: &Path) -> Self {
        let device = Disk::open(device, Access::Read).unwrap();
        let mut content = Buffer::new(size() as usize);
        // The memory must be there before the freeze.
        content.fill(1);
        Self {
            device,
            content: Mutex::new(content),
            instant: AtomicU64::new(0),
            took: Mutex::default(),
        }
    }
}

impl Progress for Oracle {
    fn event(&self, event: &Event<'_>) {
        if let Event::Warning(text) = event {
            panic!("an unexpected warning: {text}");
        }
    }

    fn total(&self, _: ByteLen) {}
    fn advance(&self, _: ByteLen) {}

    fn stop(&self) -> Option<Stop> {
        None
    }

    fn while_frozen(&self) {
        let begin = Instant::now();
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
        let nanoseconds = now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64;
        self.instant.store(nanoseconds, Ordering::Relaxed);
        let mut content = self.content.lock().unwrap();
        for (number, piece) in content.chunks_mut(4 << 20).enumerate() {
            self.device
                .read_exact_at(piece, (number * (4 << 20)) as u64)
                .unwrap();
        }
        *self.took.lock().unwrap() = begin.elapsed();
    }
}

/// What the oracle saw, as parsers read it.
struct Seen<'a>(&'a [u8]);

impl ReadAt for Seen<'_> {
    fn len(&self) -> ByteLen {
        ReadAt::len(self.0)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> holdstill::error::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

fn options(source: &Path, image: &Path) -> Options {
    Options {
        sources: vec![source.display().to_string()],
        recursive: false,
        output: Some(image.to_owned()),
        freeze: None,
        cow: CowRoom::default(),
        compression: Compression::Zstd(1),
        no_freeze: false,
        all_blocks: false,
        on_read_error: OnReadError::Fail,
        force: false,
        bounds: threads(3),
        hooks: Hooks::default(),
        run_id: uuid::Uuid::new_v4().simple().to_string(),
    }
}

/// One run on a disk of its own; see [`track_on`].
fn track_once(fs_type: &str, seed: u64, orphans: bool) -> (f64, f64) {
    let dir = common::temp_dir();
    let file = dir.path().join("volume");
    sparse_file(&file, size());
    let device = LoopDevice::attach_with(&file, &["--direct-io=on"]);
    track_on(device.path(), dir.path(), fs_type, seed, orphans)
}

/// One run under heavy writers; the milliseconds of the final freeze and of all, without the oracle's.
fn track_on(device: &Path, dir: &Path, fs_type: &str, seed: u64, orphans: bool) -> (f64, f64) {
    let quiet = if fs_type == "xfs" {
        ["-q", "-f"]
    } else {
        ["-q", "-F"]
    };
    run(
        &format!("mkfs.{fs_type}"),
        quiet
            .iter()
            .map(|arg| (*arg).to_owned())
            .chain([device.display().to_string()]),
    );
    let mount = Mount::new(device, &dir.join("live"), fs_type, "");
    populate(&mount.dir().join("ballast"), &mut Rng(seed | 1), size() / 2);
    let writer_options: &[&str] = if orphans { &["--orphans"] } else { &[] };
    let journal = dir.join("journal");
    let writer = LiveWriter::start(&mount.dir().join("busy"), &journal, seed, writer_options);
    let oracle = Oracle::new(device);
    let image = dir.join("image.still");
    let report = patiently(|| backup::run(&options(mount.dir(), &image), &oracle));
    writer.stop();
    assert_eq!(
        (report.freeze.as_str(), report.grade.name()),
        ("track", "frozen")
    );

    let copy = dir.join("copy");
    poisoned_file(&copy, size());
    common::holdstill::run([
        "restore",
        "--yes",
        image.to_str().unwrap(),
        copy.to_str().unwrap(),
    ])
    .expect(0);
    let content = oracle
        .content
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    compare_used_blocks(&content, &copy);
    let reopened = dir.join("reopened");
    judge_files(
        fs_type,
        &copy,
        &reopened,
        &journal,
        oracle.instant.load(Ordering::Relaxed),
        orphans,
    );

    let oracle_ms = oracle.took.lock().unwrap().as_secs_f64() * 1000.0;
    let last = report.freezes.last().expect("the final freeze");
    let all: f64 = report.freezes.iter().map(|freeze| freeze.freeze_ms).sum();
    println!(
        "{fs_type}: final freeze {:.0} ms (drain {:.1}, read {:.0} of which oracle {oracle_ms:.0}), all {:.0} ms",
        last.freeze_ms - oracle_ms,
        last.drain_ms,
        last.read_ms,
        all - oracle_ms
    );
    (last.freeze_ms - oracle_ms, all - oracle_ms)
}

/// Every block that the frozen filesystem itself calls used is in the copy as it was on the device.
fn compare_used_blocks(seen: &[u8], copy: &Path) {
    let seen = Seen(seen);
    let fs::Opened::Known(filesystem) = fs::open_frozen(&seen).unwrap() else {
        panic!("the frozen device holds no filesystem");
    };
    assert!(
        filesystem.condition().is_settled_if_frozen(),
        "{:?}",
        filesystem.condition()
    );
    let copy = Disk::open(copy, Access::Read).unwrap();
    let mut got = Buffer::new(1 << 20);
    let mut blocks = 0;
    let walk = filesystem.walk_used(&seen, &mut |extent: Extent| {
        let mut at = extent.start.0;
        while at < extent.end().0 {
            let len = (extent.end().0 - at).min(got.len() as u64) as usize;
            copy.read_exact_at(&mut got[..len], at).unwrap();
            let expected = &seen.0[at as usize..at as usize + len];
            for (number, (got, expected)) in got[..len]
                .chunks(4096)
                .zip(expected.chunks(4096))
                .enumerate()
            {
                assert!(
                    got == expected,
                    "block {} differs",
                    at / 4096 + number as u64
                );
                blocks += 1;
            }
            at += len as u64;
        }
        Ok(())
    });
    assert_eq!(walk.unwrap().warnings, Vec::<String>::new());
    assert!(
        blocks > size() / 4096 / 3,
        "only {blocks} blocks were compared"
    );
}

/// The files are those of the instant, and the filesystem is sound.
fn judge_files(
    fs_type: &str,
    copy: &Path,
    point: &Path,
    journal: &Path,
    instant: u64,
    orphans: bool,
) {
    if fs_type == "ext4" && !orphans {
        check_frozen_ext4(copy);
    }
    let device = LoopDevice::attach(copy);
    let options = if fs_type == "xfs" { "nouuid" } else { "" };
    let mount = Mount::new(device.path(), point, fs_type, options);
    judge(&mount.dir().join("busy"), journal, Some(instant));
    drop(mount);
    match fs_type {
        "xfs" => run("xfs_repair", ["-n", device.path().to_str().unwrap()]),
        _ => run("e2fsck", ["-f", "-n", device.path().to_str().unwrap()]),
    };
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn track_many(fs_type: &str) {
    let seed = common::seed();
    let runs = common::count(1, 20);
    let times: Vec<_> = (0..runs)
        .map(|number| track_once(fs_type, seed.wrapping_add(number), false))
        .collect();
    let last = median(times.iter().map(|times| times.0).collect());
    let all = median(times.iter().map(|times| times.1).collect());
    println!(
        "{fs_type}: {runs} of {runs} exact; median of the final freeze {last:.0} ms, of all {all:.0} ms"
    );
}

#[test]
fn privileged_a_busy_ext4_is_copied_as_it_was_at_the_freeze() {
    needs_root!();
    track_many("ext4");
}

#[test]
fn privileged_a_busy_xfs_is_copied_as_it_was_at_the_freeze() {
    needs_root!();
    track_many("xfs");
}

/// Writes to a device, block by block, until told to stop.
fn write_without_pause(device: &Path, stop: &AtomicBool) {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(device)
        .unwrap();
    let block = Buffer::new(4096);
    let blocks = NEIGHBOUR / 4096;
    for at in (0..blocks).cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        file.write_all_at(&block, at * 4096).unwrap();
    }
}

#[test]
fn privileged_a_busy_partition_between_neighbours_that_never_pause() {
    needs_root!();
    let seed = common::seed();
    // One of them is enough where the rest is done once, too.
    let both = ["ext4", "xfs"].into_iter().cycle();
    let runs = common::count(1, 2) as usize;
    for fs_type in both.skip(seed as usize % 2).take(runs) {
        let dir = common::temp_dir();
        let file = dir.path().join("disk");
        sparse_file(&file, size() + 2 * NEIGHBOUR);
        let disk = LoopDevice::attach_with(&file, &["--direct-io=on"]);
        let [len, short] = [size(), NEIGHBOUR].map(|bytes| bytes / 512);
        let below = Partition::add(disk.path(), 1, 0, short);
        let ours = Partition::add(disk.path(), 2, short, len);
        let above = Partition::add(disk.path(), 3, short + len, short);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for neighbour in [&below, &above] {
                let stop = &stop;
                scope.spawn(move || write_without_pause(neighbour.node(), stop));
            }
            let tracked = std::panic::catch_unwind(|| {
                track_on(ours.node(), dir.path(), fs_type, seed, false);
            });
            stop.store(true, Ordering::Relaxed);
            tracked.unwrap();
        });
    }
}

/// Does something as soon as the first freeze is over.
struct AfterMap<F>(Mutex<Option<F>>);

impl<F: FnOnce() + Send> Progress for AfterMap<F> {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Warning(text) => panic!("an unexpected warning: {text}"),
            Event::Thawed(times) if times.purpose == "map" => {
                let act = self.0.lock().unwrap().take();
                act.expect("the first freeze comes once")();
            }
            _ => {}
        }
    }

    fn total(&self, _: ByteLen) {}
    fn advance(&self, _: ByteLen) {}

    fn stop(&self) -> Option<Stop> {
        None
    }
}

/// Images a volume with a swap file that has something in all its pages. After the first freeze, `act`
/// is done with the file; in the end `judge` gets the copy's, and what the header was.
fn track_swap(fs_type: &str, act: impl FnOnce(&Path) + Send, judge: impl FnOnce(&Path, &[u8])) {
    let dir = common::temp_dir_on_disk();
    let file = dir.path().join("volume");
    sparse_file(&file, SWAP_VOLUME);
    let device = LoopDevice::attach_with(&file, &["--direct-io=on"]);
    let force = if fs_type == "xfs" { "-f" } else { "-F" };
    let node = device.path().to_str().unwrap();
    run(&format!("mkfs.{fs_type}"), ["-q", force, node]);
    let mount = Mount::new(device.path(), &dir.path().join("live"), fs_type, "");
    let mut bytes = vec![0; 64 << 20];
    let mut random = Rng(common::seed());
    random.fill(&mut bytes);
    std::fs::write(mount.dir().join("data"), &bytes[..8 << 20]).unwrap();
    let swap = mount.dir().join("swap");
    std::fs::write(&swap, &bytes).unwrap();
    run("chmod", ["600", swap.to_str().unwrap()]);
    run("mkswap", [&swap]);
    let header = std::fs::read(&swap).unwrap()[..4096].to_vec();
    run("swapon", [&swap]);
    let image = dir.path().join("image.still");
    let hook = AfterMap(Mutex::new(Some(|| act(&swap))));
    let report = backup::run(&options(mount.dir(), &image), &hook);
    // Swapped to or not by now.
    common::output("swapoff", [&swap]);
    assert_eq!(report.unwrap().freeze, "track");

    let copy = dir.path().join("copy");
    poisoned_file(&copy, SWAP_VOLUME);
    let [from, to] = [&image, &copy].map(|path| path.to_str().unwrap());
    common::holdstill::run(["restore", "--yes", from, to]).expect(0);
    if fs_type == "ext4" {
        check_frozen_ext4(&copy);
    }
    let device = LoopDevice::attach(&copy);
    let how = if fs_type == "xfs" { "nouuid" } else { "" };
    let copied = Mount::new(device.path(), &dir.path().join("copied"), fs_type, how);
    assert!(std::fs::read(copied.dir().join("data")).unwrap() == bytes[..8 << 20]);
    judge(&copied.dir().join("swap"), &header);
}

#[test]
fn privileged_of_a_swap_file_the_header_is_copied() {
    needs_root!();
    for fs_type in ["ext4", "xfs"] {
        track_swap(
            fs_type,
            |_| (),
            |copy, header| {
                let content = std::fs::read(copy).unwrap();
                assert_eq!(content.len(), 64 << 20);
                assert!(&content[..4096] == header);
                assert!(content[4096..].iter().all(|byte| *byte == 0), "{fs_type}");
                run("swapon", [copy]);
                run("swapoff", [copy]);
            },
        );
    }
}

/// What a file holds on the disk: the page cache knows nothing of what was swapped to it.
fn read_past_the_cache(path: &Path) -> Vec<u8> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(path)
        .unwrap();
    let mut bytes = Buffer::new(file.metadata().unwrap().len() as usize);
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.to_vec()
}

/// Blocks that were swap space at first and are not in the end are copied like all others.
#[test]
fn privileged_a_swap_file_that_is_given_up_meanwhile_is_copied() {
    needs_root!();
    let mut bytes = vec![0; 64 << 20];
    Rng(common::seed()).fill(&mut bytes);
    for fs_type in ["ext4", "xfs"] {
        // Not written to any more: no trace tells of it.
        let before = Mutex::new(Vec::new());
        track_swap(
            fs_type,
            |swap| {
                run("swapoff", [swap]);
                *before.lock().unwrap() = read_past_the_cache(swap);
            },
            |copy, _| assert!(std::fs::read(copy).unwrap() == *before.lock().unwrap()),
        );
        // Written over.
        track_swap(
            fs_type,
            |swap| {
                run("swapoff", [swap]);
                std::fs::write(swap, &bytes).unwrap();
            },
            |copy, _| assert!(std::fs::read(copy).unwrap() == bytes),
        );
    }
}

#[test]
fn privileged_files_deleted_while_open_do_no_harm() {
    needs_root!();
    let seed = common::seed();
    for fs_type in ["ext4", "xfs"] {
        track_once(fs_type, seed, true);
    }
}

/// A file that is deleted after it was copied and before the instant: nothing of it reaches the target,
/// which reads exactly as the image says.
#[test]
fn privileged_what_is_deleted_before_the_instant_does_not_reach_a_target() {
    needs_root!();
    let dir = common::temp_dir();
    let path = |name: &str| dir.path().join(name);
    sparse_file(&path("volume"), 128 << 20);
    let device = LoopDevice::attach(&path("volume"));
    run(
        "mke2fs",
        ["-q", "-t", "ext4", device.path().to_str().unwrap()],
    );
    let mount = Mount::new(device.path(), &path("live"), "ext4", "");
    let mark = b"was deleted before the instant..".repeat(128);
    let secret = mount.dir().join("secret");
    let doomed = || {
        let file = std::fs::File::create(&secret).unwrap();
        (0..1000).for_each(|n| file.write_all_at(&mark, n << 12).unwrap());
        file.sync_all().unwrap();
    };
    // A clone onto an existing target tries the hook once before: that must not be the one that deletes.
    let hook = format!(
        "if [ -e {0}.tried ] || [ ! -e {1} ]; then rm {2}; else touch {0}.tried; fi",
        path("hook").display(),
        path("cloned").display(),
        secret.display()
    );
    let live = mount.dir().to_str().unwrap();
    let options = ["--freeze", "track", "--json", "--pre-freeze", &hook];
    let is_marked = |path: &Path| {
        let content = std::fs::read(path).unwrap();
        content.chunks(4096).any(|block| block == mark)
    };
    doomed();
    let image = path("image");
    let output = ["backup", "-o", image.to_str().unwrap(), live];
    let report = holdstill(output.into_iter().chain(options))
        .expect(0)
        .last();
    // The image itself holds it: passes are only ever added.
    let [restored, cloned] = ["restored", "cloned"].map(path);
    holdstill([
        Path::new("restore"),
        Path::new("--verify"),
        &image,
        &restored,
    ])
    .expect(0);
    assert!(!is_marked(&restored));
    let again = [
        Path::new("backup"),
        Path::new("--all-blocks"),
        Path::new("--json"),
    ];
    let again = again.into_iter().chain([&*restored, Path::new("-o")]);
    let again = holdstill(again.chain([&*path("again")])).expect(0).last();
    assert_eq!(again["content_id"], report["content_id"]);
    for verify in [&["--yes"][..], &["--yes", "--verify"]] {
        let _ = std::fs::remove_file(path("hook.tried"));
        doomed();
        poisoned_file(&cloned, 128 << 20);
        let args = ["clone", live, cloned.to_str().unwrap()];
        holdstill(
            args.into_iter()
                .chain(options)
                .chain(verify.iter().copied()),
        )
        .expect(0);
        assert!(!is_marked(&cloned));
    }
}
