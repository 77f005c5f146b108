//! What proves that a source held still: others write to it, or below it, or thaw it, at the worst
//! moment, and there must be no image, or one of a single instant.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use holdstill::error::{Kind, Result};
use holdstill::freeze::CowRoom;
use holdstill::freeze::session::Hooks;
use holdstill::freeze::step::{self, AnyStep};
use holdstill::image::manifest::Grade;
use holdstill::pipeline::read::OnReadError;
use holdstill::pipeline::store::Compression;
use holdstill::progress::{Event, Progress, Stop};
use holdstill::units::ByteLen;
use holdstill::verbs::backup::{self, Options, Report};
use holdstill_platform::buffer::Buffer;

use crate::common::holdstill as program;
use crate::common::volume::populate;
use crate::common::{
    self, LoopDevice, Mount, Partition, Rng, command, needs_root, run, shell, sparse_file, spawn,
    threads,
};

/// Length of the device, and of the filesystem at its start. What lies past the end of the filesystem
/// is always copied, and harms nobody who writes to it.
const DEVICE: u64 = 96 << 20;
const FILESYSTEM: u64 = 64 << 20;

/// Somebody who writes numbers to blocks past the end of the filesystem, in order, one after another:
/// what was copied of them at one instant is a beginning of that.
const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;
const START: u64 = 72 << 20;

fn numbered(number: u64) -> Buffer {
    let mut block = Buffer::new(BLOCK);
    for word in block.chunks_mut(8) {
        word.copy_from_slice(&number.to_le_bytes());
    }
    block
}

fn write_number(to: &File, number: u64) {
    let at = START + (number - 1) % BLOCKS * BLOCK as u64;
    to.write_all_at(&numbered(number), at).expect("a write");
}

fn open_for_writing(path: &Path, is_direct: bool) -> File {
    let flags = if is_direct { libc::O_DIRECT } else { 0 };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    options.open(path).expect("a writer")
}

/// How many numbers had been written at the instant of this copy; or why it is of none.
fn instant_of(copy: &Path) -> std::result::Result<u64, String> {
    let file = File::open(copy).unwrap();
    let mut blocks = vec![0; BLOCK * BLOCKS as usize];
    file.read_exact_at(&mut blocks, START).unwrap();
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let mut numbers = Vec::new();
    for block in blocks.chunks(BLOCK) {
        let number = word(&block[..8]);
        if block.chunks(8).any(|bytes| word(bytes) != number) {
            return Err(format!("a block of several numbers, {number} among them"));
        }
        numbers.push(number);
    }
    let last = numbers.iter().copied().max().unwrap();
    for (at, number) in (0u64..).zip(&numbers) {
        // The last number up to `last` that belongs to this block.
        let rounds = (last + BLOCKS - 1 - at) / BLOCKS;
        let expected = if rounds == 0 {
            0
        } else {
            (rounds - 1) * BLOCKS + at + 1
        };
        if *number != expected {
            return Err(format!(
                "after {last} writes, block {at} has {number}, not {expected}"
            ));
        }
    }
    Ok(last)
}

#[test]
fn the_oracle_knows_an_instant_from_a_mixture() {
    let dir = common::temp_dir();
    let path = dir.path().join("copy");
    sparse_file(&path, DEVICE);
    let file = open_for_writing(&path, false);
    assert_eq!(instant_of(&path), Ok(0));
    for number in 1..=BLOCKS + 7 {
        write_number(&file, number);
        assert_eq!(instant_of(&path), Ok(number));
    }
    write_number(&file, BLOCKS + 9);
    assert!(instant_of(&path).is_err());
}

/// A device with a small filesystem on it.
struct Scene {
    dir: tempfile::TempDir,
    device: LoopDevice,
    file: PathBuf,
}

impl Scene {
    fn new(fs: &str) -> Self {
        let dir = common::temp_dir();
        let file = dir.path().join("disk");
        sparse_file(&file, DEVICE);
        let device = LoopDevice::attach_with(&file, &["--direct-io=on"]);
        let node = device.path().to_str().unwrap();
        match fs {
            "ext4" => run(
                "mkfs.ext4",
                [
                    "-q",
                    "-F",
                    "-b",
                    "4096",
                    node,
                    &format!("{}k", FILESYSTEM >> 10),
                ],
            ),
            "none" => String::new(),
            other => panic!("no options for {other}"),
        };
        if fs != "none" {
            let mounted = Mount::new(device.path(), &dir.path().join("filling"), fs, "rw");
            populate(mounted.dir(), &mut Rng(1), 8 << 20);
        }
        Self { dir, device, file }
    }

    fn mount(&self) -> Mount {
        Mount::new(self.device.path(), &self.dir.path().join("m"), "ext4", "rw")
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn options(&self, step: AnyStep) -> Options {
        Options {
            sources: vec![self.device.path().display().to_string()],
            recursive: false,
            output: Some(self.image()),
            freeze: Some(step),
            cow: CowRoom::default(),
            compression: Compression::Zstd(1),
            no_freeze: false,
            all_blocks: false,
            on_read_error: OnReadError::Fail,
            force: false,
            bounds: threads(2),
            hooks: Hooks::default(),
            run_id: uuid::Uuid::new_v4().simple().to_string(),
        }
    }
}

/// Does something once: inside the last freeze, or after the first bytes were copied.
struct Meddler<'a> {
    act: Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>,
    in_freeze: bool,
}

impl<'a> Meddler<'a> {
    fn new(in_freeze: bool, act: impl FnOnce() + Send + 'a) -> Self {
        Self {
            act: Mutex::new(Some(Box::new(act))),
            in_freeze,
        }
    }

    fn act(&self) {
        let act = self.act.lock().unwrap().take();
        if let Some(act) = act {
            act();
        }
    }
}

impl Progress for Meddler<'_> {
    fn event(&self, _: &Event<'_>) {}
    fn total(&self, _: ByteLen) {}

    fn advance(&self, _: ByteLen) {
        if !self.in_freeze {
            self.act();
        }
    }

    fn stop(&self) -> Option<Stop> {
        None
    }

    fn while_frozen(&self) {
        if self.in_freeze {
            self.act();
        }
    }
}

/// One backup in the midst of which `act` happens.
fn meddled(scene: &Scene, step: AnyStep, act: impl FnOnce() + Send) -> Result<Report> {
    let meddler = Meddler::new(step == step::TRACK, act);
    let report = backup::run(&scene.options(step), &meddler);
    let is_done = meddler.act.lock().unwrap().is_none();
    assert!(is_done, "{step}: nothing was done: {report:?}");
    report
}

fn assert_refused(scene: &Scene, step: AnyStep, what: &str, act: impl FnOnce() + Send) {
    let report = meddled(scene, step, act);
    match report {
        Err(error) => assert_eq!(error.kind(), Kind::Inconsistent, "{step}, {what}: {error}"),
        Ok(report) => panic!("{step}, {what}: graded {:?}", report.grade),
    }
    assert!(!scene.image().exists(), "{step}, {what}");
}

/// A process that has a file open for writing until it is dropped.
struct Holder(Child);

impl Holder {
    fn of(path: &Path) -> Self {
        let script = format!("exec 3<>{}; echo open; exec sleep 1000", path.display());
        let mut child = command("/bin/sh", ["-c", &script]);
        let mut child = spawn(child.stdout(Stdio::piped()));
        let mut line = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn fsfreeze(option: &str, dir: &Path) {
    run("fsfreeze", [option, dir.to_str().unwrap()]);
}

#[test]
fn privileged_a_frozen_source_that_is_written_to_is_no_source() {
    needs_root!();
    let scene = Scene::new("ext4");
    let mounted = scene.mount();
    let node = scene.device.path();
    for step in [step::TRACK, step::HOLD] {
        let undisturbed = meddled(&scene, step, || {}).unwrap();
        assert_eq!(undisturbed.grade, Grade::Frozen);
        std::fs::remove_file(scene.image()).unwrap();

        assert_refused(&scene, step, "the device, past the cache", || {
            write_number(&open_for_writing(node, true), 1);
        });
        assert_refused(&scene, step, "the file below", || {
            let file = open_for_writing(&scene.file, false);
            write_number(&file, 2);
        });
        assert_refused(&scene, step, "the file below, mapped", || {
            write_mapped(&scene.file);
        });
        assert_refused(
            &scene,
            step,
            "the file below, changed without being opened",
            || {
                shell(format!(
                    "truncate -s +4K {0}; truncate -s -4K {0}",
                    scene.file.display()
                ));
            },
        );
        assert_refused(&scene, step, "by a second loop device", || {
            let second = LoopDevice::attach(&scene.file);
            write_number(&open_for_writing(second.path(), false), 3);
        });
        assert_refused(&scene, step, "thawed, written to, and frozen again", || {
            fsfreeze("-u", mounted.dir());
            std::fs::write(mounted.dir().join("x"), "x").unwrap();
            File::open(mounted.dir().join("x"))
                .unwrap()
                .sync_all()
                .unwrap();
            fsfreeze("-f", mounted.dir());
        });
        assert_refused(&scene, step, "thawed", || fsfreeze("-u", mounted.dir()));
        let mut holder = None;
        assert_refused(&scene, step, "somebody has it open at the end", || {
            holder = Some(Holder::of(node));
        });
        drop(holder);
        let mut holder = None;
        assert_refused(&scene, step, "somebody has the file below open", || {
            holder = Some(Holder::of(&scene.file));
        });
        drop(holder);
        // And nothing of all that is held against the next one.
        let undisturbed = meddled(&scene, step, || {}).unwrap();
        assert_eq!(undisturbed.grade, Grade::Frozen, "{step}");
        std::fs::remove_file(scene.image()).unwrap();
    }
}

fn write_mapped(file: &Path) {
    let script = "import mmap,sys; f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); m[int(sys.argv[2])]=7; m.close()";
    run(
        "python3",
        ["-c", script, file.to_str().unwrap(), &START.to_string()],
    );
}

#[test]
fn privileged_what_is_written_below_an_offline_source_is_noticed() {
    needs_root!();
    let scene = Scene::new("ext4");
    let node = scene.device.path();
    let step = step::OFFLINE;
    let undisturbed = meddled(&scene, step, || {}).unwrap();
    assert_eq!(undisturbed.grade, Grade::Clean);
    std::fs::remove_file(scene.image()).unwrap();

    assert_refused(&scene, step, "the device", || {
        write_number(&open_for_writing(node, false), 1);
    });
    assert_refused(&scene, step, "the file below", || {
        write_number(&open_for_writing(&scene.file, false), 2);
    });
    assert_refused(&scene, step, "the file below, mapped", || {
        write_mapped(&scene.file)
    });
    assert_refused(&scene, step, "by a second loop device", || {
        let second = LoopDevice::attach(&scene.file);
        write_number(&open_for_writing(second.path(), false), 3);
    });
    assert_refused(&scene, step, "a second loop device, mounted", || {
        let second = LoopDevice::attach(&scene.file);
        drop(Mount::new(
            second.path(),
            &scene.dir.path().join("second"),
            "ext4",
            "rw",
        ));
    });
    let mut holder = None;
    assert_refused(&scene, step, "somebody has the file open", || {
        holder = Some(Holder::of(&scene.file));
    });
    drop(holder);
    let switch = format!(
        "/sys/block/{}/queue/iostats",
        node.file_name().unwrap().display()
    );
    assert_refused(&scene, step, "while nothing is counted", || {
        std::fs::write(&switch, "0").unwrap();
        write_number(&open_for_writing(node, true), 4);
        std::fs::write(&switch, "1").unwrap();
    });
    assert_refused(
        &scene,
        step,
        "while nothing is counted, out of sight",
        || {
            // A sysfs of another network namespace is another filesystem.
            let own = scene.dir.path().join("sys");
            std::fs::create_dir_all(&own).unwrap();
            let set = |value| {
                shell(format!(
                    "unshare --net --mount sh -c 'mount -t sysfs own {} && echo {value} >{}{switch}'",
                    own.display(),
                    own.display(),
                    switch = switch.strip_prefix("/sys").unwrap()
                ))
            };
            set(0);
            write_number(&open_for_writing(node, true), 5);
            // What we read meanwhile is not counted either.
            let _ = File::open(&scene.file).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            set(1);
        },
    );
    let undisturbed = meddled(&scene, step, || {}).unwrap();
    assert_eq!(undisturbed.grade, Grade::Clean);
}

#[test]
fn privileged_an_overlay_above_the_file_is_noticed() {
    needs_root!();
    // An overlay cannot lie on another one, as the root of a container does.
    let dir = common::temp_dir();
    let upper = dir.path().join("upper");
    for folder in ["upper", "lower", "work", "merged"] {
        std::fs::create_dir(dir.path().join(folder)).unwrap();
    }
    let file = upper.join("disk");
    sparse_file(&file, DEVICE);
    let options = format!(
        "lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work",
        dir.path().display()
    );
    let merged = dir.path().join("merged");
    run(
        "mount",
        [
            "-t",
            "overlay",
            "-o",
            &options,
            "overlay",
            merged.to_str().unwrap(),
        ],
    );
    let merged = Mount::of(&merged);
    let device = LoopDevice::attach(&file);
    run("mkfs.ext4", ["-q", device.path().to_str().unwrap()]);
    let scene = Scene { dir, device, file };
    let report = meddled(&scene, step::OFFLINE, || {});
    assert_eq!(
        report.unwrap().grade,
        Grade::Crash,
        "a way in that cannot be watched"
    );
    std::fs::remove_file(scene.image()).unwrap();
    assert_refused(&scene, step::OFFLINE, "through the overlay", || {
        write_number(&open_for_writing(&merged.dir().join("disk"), false), 1);
    });
}

#[test]
fn privileged_a_partition_is_not_written_past_unnoticed() {
    needs_root!();
    let scene = Scene::new("none");
    let partition = Partition::add(scene.device.path(), 1, 2048, 65536);
    let neighbour = Partition::add(scene.device.path(), 2, 67584, 16384);
    run("mkfs.ext4", ["-q", partition.node().to_str().unwrap()]);
    let options = Options {
        sources: vec![partition.node().display().to_string()],
        ..scene.options(step::OFFLINE)
    };
    let write = |to: &Path| {
        let file = open_for_writing(to, true);
        file.write_all_at(&numbered(1), 4 << 20).unwrap();
    };
    let busy = Meddler::new(false, || write(neighbour.node()));
    assert_eq!(backup::run(&options, &busy).unwrap().grade, Grade::Clean);
    std::fs::remove_file(scene.image()).unwrap();
    let past = Meddler::new(false, || write(scene.device.path()));
    let error = backup::run(&options, &past).unwrap_err();
    assert_eq!(error.kind(), Kind::Inconsistent, "{error}");
}

#[test]
fn privileged_nobody_writes_to_what_is_mounted_read_only() {
    needs_root!();
    let scene = Scene::new("ext4");
    let mounted = scene.mount();
    let image = scene.image();
    // By an error that stops it, as it would on a bad disk.
    run(
        "mount",
        ["-o", "remount,ro", mounted.dir().to_str().unwrap()],
    );
    let args = [
        "backup",
        scene.device.path().to_str().unwrap(),
        "-o",
        image.to_str().unwrap(),
        "--json",
    ];
    let result = program::run(args).expect(0).last();
    assert_eq!(result["freeze"], "offline");
    assert_eq!(result["grade"], "clean");
    std::fs::remove_file(&image).unwrap();
    assert_refused(
        &scene,
        step::OFFLINE,
        "mounted read-write meanwhile",
        || {
            run(
                "mount",
                ["-o", "remount,rw", mounted.dir().to_str().unwrap()],
            );
        },
    );
    drop(mounted);

    // Stopped by an error.
    let mounted = Mount::new(
        scene.device.path(),
        &scene.dir.path().join("m"),
        "ext4",
        "errors=remount-ro",
    );
    std::fs::write(mounted.dir().join("file"), "x").unwrap();
    let name = scene
        .device
        .path()
        .file_name()
        .unwrap()
        .display()
        .to_string();
    std::fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "stop").unwrap();
    let step = &program::run(["inspect", scene.device.path().to_str().unwrap(), "--json"])
        .expect(0)
        .last()["step"];
    assert_eq!(step, "offline");
    let result = program::run(args).expect(0).last();
    assert_eq!(result["grade"], "crash", "it has errors");
}

/// Others at work at random moments while the program runs: whoever it was, there is no image, or it
/// is of one instant.
fn at_random(step: &str, how: &str, seed: u64) -> bool {
    let scene = Scene::new(if step == "offline" { "none" } else { "ext4" });
    let mounted = (step != "offline").then(|| scene.mount());
    let mut rng = Rng(seed);
    let image = scene.image();
    let args = [
        "backup".as_ref(),
        scene.device.path().as_os_str(),
        "--freeze".as_ref(),
        step.as_ref(),
        "-o".as_ref(),
        image.as_os_str(),
        "--threads".as_ref(),
        "2".as_ref(),
    ];
    let mut backup = program::command(args);
    let child = spawn(&mut backup);
    std::thread::sleep(Duration::from_millis(rng.below(250)));
    let is_over = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let lasts = Duration::from_millis(5 + rng.below(200));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let begin = std::time::Instant::now();
            let second = (how == "loop").then(|| LoopDevice::attach(&scene.file));
            let (to, is_direct) = match (how, &second) {
                ("loop", Some(second)) => (second.path(), true),
                ("file", _) => (scene.file.as_path(), false),
                _ => (scene.device.path(), true),
            };
            let to = open_for_writing(to, is_direct);
            while !is_over.load(Ordering::Relaxed) && begin.elapsed() < lasts {
                let number = written.fetch_add(1, Ordering::Relaxed) + 1;
                write_number(&to, number);
                if let ("thaw", Some(mounted), 0) = (how, &mounted, number % 16) {
                    // Whoever thaws and freezes as it likes.
                    let dir = mounted.dir().to_str().unwrap();
                    shell(format!("exec 2>/dev/null; set +e; fsfreeze -u {dir}; echo x >>{dir}/x; fsfreeze -f {dir}; fsfreeze -u {dir}; true"));
                }
            }
        });
        let done = program::wait(&backup, child);
        is_over.store(true, Ordering::Relaxed);
        let code = done.code();
        // 4: what was read while others changed it contradicts itself.
        assert!(matches!(code, Some(0 | 1 | 3 | 4)), "seed {seed}: {code:?}");
    });
    if !image.exists() {
        return false;
    }
    let copy = scene.dir.path().join("copy");
    program::run(["restore".as_ref(), image.as_os_str(), copy.as_os_str()]).expect(0);
    if let Err(why) = instant_of(&copy) {
        panic!("{step}, {how}, seed {seed}: torn: {why}");
    }
    true
}

#[test]
fn privileged_no_image_is_torn_whoever_writes_and_whenever() {
    needs_root!();
    let seed = common::seed();
    for step in ["track", "hold", "offline"] {
        for how in ["device", "loop", "file", "thaw"] {
            if step == "offline" && how == "thaw" {
                continue;
            }
            let rounds = common::count(2, 40);
            let images = (0..rounds)
                .filter(|round| at_random(step, how, seed + round))
                .count();
            println!("{step}, {how}: {images} images of {rounds}, seed {seed}, none torn");
        }
    }
}
