//! Several sources of one run share an instant: what was written to one of them only after something had
//! reached another is never in the image without that.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::holdstill as program;
use crate::common::volume::populate;
use crate::common::{self, LoopDevice, Mount, Partition, Rng, needs_root, run, sparse_file, spawn};

/// Enough for mkfs.xfs.
const SIZE: u64 = 320 << 20;

/// What is written to in turns, one number after the other.
const SLOTS: u64 = 64;
const SLOT: u64 = 4096;

fn mkfs(fs: &str, node: &Path) {
    let force = if fs == "ext4" { "-F" } else { "-f" };
    run(
        &format!("mkfs.{fs}"),
        [Path::new("-q"), Path::new(force), node],
    );
}

/// Filesystems with something on them, mounted. Taken down in this order.
struct Scene {
    mounts: Vec<Mount>,
    _partitions: Vec<Partition>,
    _loops: Vec<LoopDevice>,
    dir: tempfile::TempDir,
    nodes: Vec<PathBuf>,
}

impl Scene {
    /// With these filesystems: each on a disk of its own, or on partitions of one.
    fn new(kinds: &[&str], is_one_disk: bool) -> Self {
        let dir = common::temp_dir();
        let disk = |name: &str, size| {
            let file = dir.path().join(name);
            sparse_file(&file, size);
            LoopDevice::attach_with(&file, &["--direct-io=on"])
        };
        let (mut loops, mut partitions, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
        let count = kinds.len() as u64;
        if is_one_disk {
            let device = disk("disk", count * SIZE + (1 << 20));
            for number in 0..count {
                let start = 2048 + number * (SIZE / 512);
                let number = u32::try_from(number).unwrap() + 1;
                let partition = Partition::add(device.path(), number, start, SIZE / 512);
                nodes.push(partition.node().to_owned());
                partitions.push(partition);
            }
            loops.push(device);
        } else {
            for number in 0..count {
                let device = disk(&format!("disk-{number}"), SIZE);
                nodes.push(device.path().to_owned());
                loops.push(device);
            }
        }
        let mut mounts = Vec::new();
        for (fs, (number, node)) in kinds.iter().zip((1..).zip(&nodes)) {
            mkfs(fs, node);
            let mount = Mount::new(node, &dir.path().join(format!("live-{number}")), fs, "");
            populate(mount.dir(), &mut Rng(number), 8 << 20);
            File::create(mount.dir().join("log"))
                .unwrap()
                .write_all_at(&vec![0; (SLOTS * SLOT) as usize], 0)
                .unwrap();
            mounts.push(mount);
        }
        Self {
            mounts,
            _partitions: partitions,
            _loops: loops,
            dir,
            nodes,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self, volume: usize) -> File {
        let path = self.mounts[volume].dir().join("log");
        OpenOptions::new().write(true).open(path).unwrap()
    }

    /// A backup of all, by these step options.
    fn backup(&self, image: &Path, more: &[&str]) -> program::Run {
        let mut args = vec![
            "backup".as_ref(),
            "--json".as_ref(),
            "-o".as_ref(),
            image.as_os_str(),
        ];
        args.extend(self.nodes.iter().map(|node| node.as_os_str()));
        args.extend(more.iter().map(Path::new).map(Path::as_os_str));
        program::run(args)
    }

    /// Restores all; what they are in then.
    fn restore(&self, image: &Path) -> Vec<PathBuf> {
        let mut args = vec![
            "restore".to_owned(),
            "--yes".to_owned(),
            image.display().to_string(),
        ];
        let mut copies = Vec::new();
        for number in 1..=self.nodes.len() {
            let copy = self.path(&format!("copy-{number}"));
            let _ = fs::remove_file(&copy);
            args.extend(["--map".to_owned(), format!("{number}={}", copy.display())]);
            copies.push(copy);
        }
        program::run(&args).expect(0);
        copies
    }
}

/// The number that was written last to a restored log, of which all before have to be there.
fn last_number(copy: &Path, dir: &Path, fs: &str) -> u64 {
    let device = LoopDevice::attach_with(copy, &["-r"]);
    let options = if fs == "xfs" {
        "ro,nouuid,norecovery"
    } else {
        "ro,noload"
    };
    let mount = Mount::new(device.path(), dir, fs, options);
    let log = File::open(mount.dir().join("log")).unwrap();
    let mut numbers = Vec::new();
    for slot in 0..SLOTS {
        let mut word = [0; 8];
        log.read_exact_at(&mut word, slot * SLOT).unwrap();
        numbers.push(u64::from_le_bytes(word));
    }
    let last = numbers.iter().copied().max().unwrap();
    for (slot, number) in (0..).zip(numbers) {
        let expected = (last + SLOTS - slot) / SLOTS * SLOTS + slot;
        let expected = expected.saturating_sub(SLOTS);
        assert!(
            number == expected || (number == 0 && expected == slot && last < SLOTS),
            "after {last}, slot {slot} has {number}, not {expected}"
        );
    }
    last
}

/// Writes numbers, each to the first file, then to the second, and on only when it is on disk.
fn ping_pong(files: [File; 2], is_over: &AtomicBool, written: &AtomicU64) {
    let mut number = 0_u64;
    while !is_over.load(Ordering::Relaxed) {
        number += 1;
        for file in &files {
            file.write_all_at(&number.to_le_bytes(), number % SLOTS * SLOT)
                .unwrap();
            file.sync_all().unwrap();
        }
        written.store(number, Ordering::Relaxed);
    }
}

#[test]
fn privileged_no_write_is_there_without_the_one_before_it_elsewhere() {
    needs_root!();
    let (mut smallest, mut largest) = (u64::MAX, 0);
    for is_one_disk in [true, false] {
        let kinds = ["ext4", "xfs"];
        let scene = Scene::new(&kinds, is_one_disk);
        for number in 0..common::count(2, 20) {
            let image = scene.path("image");
            let _ = fs::remove_file(&image);
            // From the first to the second, and the other way round.
            let mut order = [scene.log(0), scene.log(1)];
            if number % 2 == 1 {
                order.reverse();
            }
            for log in &order {
                log.write_all_at(&vec![0; (SLOTS * SLOT) as usize], 0)
                    .unwrap();
            }
            let (is_over, written) = (AtomicBool::new(false), AtomicU64::new(0));
            let done = std::thread::scope(|scope| {
                scope.spawn(|| ping_pong(order, &is_over, &written));
                while written.load(Ordering::Relaxed) < SLOTS {
                    std::thread::yield_now();
                }
                let done = scene.backup(&image, &["--freeze", "track"]);
                is_over.store(true, Ordering::Relaxed);
                done
            });
            let result = done.expect(0).last();
            let volumes = result["volumes"].as_array().unwrap();
            assert_eq!(volumes[0]["instant"], volumes[1]["instant"], "{result}");
            let all = written.load(Ordering::Relaxed);
            let copies = scene.restore(&image);
            let mut last = Vec::new();
            for (copy, fs) in copies.iter().zip(kinds) {
                last.push(last_number(copy, &scene.path("copied"), fs));
            }
            if number % 2 == 1 {
                last.reverse();
            }
            assert!(
                last[0] == last[1] || last[0] == last[1] + 1,
                "one disk: {is_one_disk}, run {number}: {last:?} of {all}"
            );
            smallest = smallest.min(last[0]);
            largest = largest.max(last[0]);
        }
    }
    println!("numbers {smallest} to {largest}");
    assert!(smallest >= SLOTS, "the writer had begun");
}

/// Lines of a run that say this.
fn events<'a>(lines: &'a [Value], event: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["event"] == event).collect()
}

#[test]
fn privileged_many_share_one_freeze_and_the_hooks_stand_around_it() {
    needs_root!();
    let scene = Scene::new(&["ext4", "xfs", "btrfs"], false);
    let (image, log) = (scene.path("image"), scene.path("log"));
    // Nobody uses this one: it is read after the hooks.
    let unused = scene.path("unused");
    sparse_file(&unused, 24 << 20);
    run("mkfs.ext4", [Path::new("-q"), &unused]);
    let (pre, post) = (
        format!("echo pre >>{0}", log.display()),
        format!("echo post >>{0}", log.display()),
    );
    let done = scene.backup(
        &image,
        &[
            unused.to_str().unwrap(),
            "--pre-freeze",
            &pre,
            "--post-freeze",
            &post,
        ],
    );
    let done = done.expect(0);
    let lines = done.json();
    assert_eq!(fs::read_to_string(&log).unwrap(), "pre\npost\n");
    assert_eq!(events(&lines, "frozen").len(), 1);
    let result = done.last();
    let instants: Vec<_> = result["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["instant"])
        .collect();
    assert_eq!(instants.len(), 4);
    assert!(
        instants.iter().all(|instant| *instant == instants[0]),
        "{result}"
    );
    let last: Vec<_> = result["freezes"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|it| it["purpose"] == "final")
        .collect();
    assert_eq!(last.len(), 3, "{result}");
    assert_eq!(result["grade"], "clean", "{result}");
    for copy in &scene.restore(&image)[..1] {
        run("e2fsck", [Path::new("-fn"), copy]);
    }
}

#[test]
fn privileged_what_has_an_instant_of_its_own_is_told() {
    needs_root!();
    let scene = Scene::new(&["ext4", "ext4"], false);
    let image = scene.path("image");
    let log = scene.path("log");
    let (pre, post) = (
        format!("echo pre >>{0}", log.display()),
        format!("echo post >>{0}", log.display()),
    );
    let done = scene.backup(
        &image,
        &[
            "--freeze",
            "hold",
            "--pre-freeze",
            &pre,
            "--post-freeze",
            &post,
        ],
    );
    let result = done.expect(0).last();
    let volumes = result["volumes"].as_array().unwrap();
    assert_ne!(volumes[0]["instant"], volumes[1]["instant"], "{result}");
    let warnings = result["warnings"].to_string();
    assert!(warnings.contains("not of one instant"), "{warnings}");
    assert_eq!(fs::read_to_string(&log).unwrap(), "pre\npost\n");
}

/// Whether a file can be made there soon.
fn is_writable(dir: &Path) -> bool {
    let file = dir.join("canary");
    common::output("timeout", [Path::new("30"), Path::new("touch"), &file])
        .status
        .success()
}

/// An ext4 in a file on an XFS, both in use.
struct Nested {
    inner: Mount,
    inner_device: LoopDevice,
    outer: Scene,
}

impl Nested {
    fn new() -> Self {
        let outer = Scene::new(&["xfs"], false);
        let file = outer.mounts[0].dir().join("inner");
        // Written, so that XFS has to allocate nothing when it is written to again.
        fs::write(&file, vec![1; 64 << 20]).unwrap();
        let inner_device = LoopDevice::attach(&file);
        mkfs("ext4", inner_device.path());
        let inner = Mount::new(inner_device.path(), &outer.path("inner"), "ext4", "");
        populate(inner.dir(), &mut Rng(9), 8 << 20);
        Self {
            inner,
            inner_device,
            outer,
        }
    }

    /// A backup of both, the one below first or last.
    fn command(&self, image: &Path, is_inner_first: bool, step: &str) -> std::process::Command {
        let mut nodes = [self.outer.nodes[0].as_path(), self.inner_device.path()];
        if is_inner_first {
            nodes.reverse();
        }
        let mut command = program::command(["backup", "--freeze", step, "--force", "-o"]);
        command.arg(image).args(nodes);
        command
    }
}

/// Keeps files in a folder changing until it is dropped.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn scribble(dir: &Path, is_over: &AtomicBool) {
    let mut rng = Rng(common::seed() | 1);
    while !is_over.load(Ordering::Relaxed) {
        let file = dir.join(format!("file-{}", rng.below(20)));
        let bytes = vec![rng.below(256) as u8; rng.below(100_000) as usize];
        let _ = fs::write(&file, bytes);
        if rng.below(4) == 0 {
            let _ = File::open(&file).and_then(|file| file.sync_all());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn privileged_what_lies_on_another_source_neither_hangs_nor_stays_frozen() {
    needs_root!();
    let nested = Nested::new();
    let image = nested.outer.path("image");
    let mut rng = Rng(common::seed() | 1);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _busy = Busy(&is_over);
        for dir in [nested.inner.dir(), nested.outer.mounts[0].dir()] {
            let is_over = &is_over;
            scope.spawn(move || scribble(dir, is_over));
        }
        for is_inner_first in [true, false] {
            let mut command = nested.command(&image, is_inner_first, "track");
            let child = spawn(&mut command);
            program::wait(&command, child).expect(0);
            let copies = [1, 2].map(|number| nested.outer.path(&format!("copy-{number}")));
            for (copy, number) in copies.iter().zip(1..) {
                let _ = fs::remove_file(copy);
                let args = [
                    "restore",
                    "--yes",
                    image.to_str().unwrap(),
                    "--volume",
                    &format!("{number}"),
                    copy.to_str().unwrap(),
                ];
                program::run(args).expect(0);
            }
            let inner = &copies[usize::from(!is_inner_first)];
            run("e2fsck", [Path::new("-fn"), inner]);
            // Its log is to be replayed, as after every freeze.
            let outer = LoopDevice::attach(&copies[usize::from(is_inner_first)]);
            drop(Mount::new(
                outer.path(),
                &nested.outer.path("copied"),
                "xfs",
                "nouuid",
            ));
            run("xfs_repair", [Path::new("-n"), outer.path()]);
        }
        for number in 0..common::count(4, 20) {
            let mut command = nested.command(&image, number % 2 == 0, "track");
            let mut child = spawn(&mut command);
            std::thread::sleep(Duration::from_millis(rng.below(1500)));
            child.kill().unwrap();
            child.wait().unwrap();
            for dir in [nested.outer.mounts[0].dir(), nested.inner.dir()] {
                assert!(is_writable(dir), "{} stays frozen", dir.display());
            }
        }
    });
    program::run(["cleanup"]).expect(0);
}

#[test]
fn privileged_what_lies_on_another_is_thawed_by_cleanup_and_never_held_with_it() {
    needs_root!();
    let nested = Nested::new();
    let image = nested.outer.path("image");
    for is_inner_first in [true, false] {
        let mut command = nested.command(&image, is_inner_first, "hold");
        let child = spawn(&mut command);
        program::wait(&command, child).expect(3).says("it lies on");
    }
    // As by a run whose guard was killed with it.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let freeze = |mount: &Mount| {
        let device = fs::metadata(mount.dir()).unwrap().dev();
        let device = format!("{}:{}", libc::major(device), libc::minor(device));
        let sequence = fs::read_to_string(format!("/sys/dev/block/{device}/diskseq"));
        json!({
            "point": mount.dir(),
            "device": device,
            "sequence": sequence.ok().map(|it| it.trim().to_owned()),
            "boot": boot.trim(),
        })
    };
    let id = "0123456789abcdef0123456789abcdef";
    let file = PathBuf::from(format!("/var/lib/holdstill/{id}.json"));
    let (inner, outer) = (&nested.inner, &nested.outer.mounts[0]);
    let freezes = [freeze(inner), freeze(outer)];
    let record = json!({ "pid": 1, "begun": "2026-01-01T00:00:00Z", "freezes": freezes });
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, record.to_string()).unwrap();
    for mount in [inner, outer] {
        run("fsfreeze", [Path::new("-f"), mount.dir()]);
    }
    let done = program::run(["--json", "cleanup"]).expect(0).last();
    let thawed = [outer, inner].map(|mount| mount.dir().display().to_string());
    assert_eq!(done["thawed"], json!(thawed), "{done}");
    for mount in [outer, inner] {
        let dir = mount.dir();
        assert!(is_writable(dir), "{} stays frozen", dir.display());
    }
    assert!(!file.exists());
}
