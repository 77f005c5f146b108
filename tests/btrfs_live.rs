//! A mounted, busy btrfs is imaged at one commit: everything the copy shows is compared with the
//! original as it was inside the freeze, and judged by the filesystem's own tools and by its writers'
//! journals.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use holdstill::freeze::CowRoom;
use holdstill::freeze::session::Hooks;
use holdstill::pipeline::read::OnReadError;
use holdstill::pipeline::store::Compression;
use holdstill::progress::{Event, Progress, Stop};
use holdstill::units::ByteLen;
use holdstill::verbs::backup::{self, Options};
use holdstill_platform::buffer::Buffer;
use holdstill_platform::device::{Access, Disk};

use crate::common::btrfs::{Making, Scene, is_known, making};
use crate::common::btrfs_live::{Copy, Live, assert_no_subvolume_of_ours, id_of, told};
use crate::common::btrfs_writers::{Commits, Writing};
use crate::common::holdstill as program;
use crate::common::live::{Judgement, clock, patiently};
use crate::common::volume::{digests, direct_copy};
use crate::common::{self, LoopDevice, Mount, Rng, count, needs_root, run, seed, shell, threads};

/// Length of a device, and what lies on it before the writers come.
const SIZE: u64 = 768 << 20;
const BYTES: u64 = 100 << 20;

/// As most have it: one device, two copies of the metadata, compressed.
const USUAL: Making = Making {
    mount: "compress=zstd:1",
    ..making("usual", 1, "-m dup -d single")
};

/// Reads the whole device while it is frozen.
struct Oracle {
    device: Disk,
    content: Mutex<Buffer>,
    /// CLOCK_MONOTONIC inside the freeze, in nanoseconds.
    instant: AtomicU64,
}

impl Oracle {
    fn new(device: &Path) -> Self {
        let device = Disk::open(device, Access::Read).unwrap();
        let mut content = Buffer::new(SIZE as usize);
        // The memory must be there before the freeze.
        content.fill(1);
        Self {
            device,
            content: Mutex::new(content),
            instant: AtomicU64::new(0),
        }
    }

    /// The device as it was, as a file.
    fn save(&self, path: &Path) {
        let file = common::sparse_file(path, SIZE);
        let content = self.content.lock().unwrap();
        for (number, piece) in content.chunks(1 << 20).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, (number << 20) as u64).unwrap();
            }
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
        self.instant.store(clock(), Ordering::Relaxed);
        let mut content = self.content.lock().unwrap();
        for (number, piece) in content.chunks_mut(4 << 20).enumerate() {
            let at = (number * (4 << 20)) as u64;
            self.device.read_exact_at(piece, at).unwrap();
        }
    }
}

fn options(source: &Path, image: &Path) -> Options {
    Options {
        sources: vec![source.display().to_string()],
        recursive: false,
        output: Some(image.to_owned()),
        freeze: Some(holdstill::freeze::step::BTRFS),
        no_freeze: false,
        cow: CowRoom::default(),
        compression: Compression::Zstd(1),
        all_blocks: false,
        on_read_error: OnReadError::Fail,
        force: false,
        bounds: threads(3),
        hooks: Hooks::default(),
        run_id: uuid::Uuid::new_v4().simple().to_string(),
    }
}

/// All there is in a filesystem, in all its subvolumes: the digest of each file, and a line of what else
/// is known of each name. Changes nothing.
fn all_of(file: &Path, dir: &Path) -> (BTreeMap<PathBuf, String>, String) {
    let copy = Copy::attach(&[file.to_owned()], dir);
    let mounted = copy.mount("ro");
    let script = "cd %; find . ! -inum 2 -printf '%p %y %m %U %G %s %T@ %C@ %n %i %b %l\\n' | sort";
    let names = shell(script.replacen('%', &mounted.dir().display().to_string(), 1));
    (digests(mounted.dir()), names)
}

/// The files of the original as it was in the freeze, and those of the copy, are the same.
fn compare_all(frozen: &Path, copy: &Path, dir: &Path) {
    let (expected, expected_names) = all_of(frozen, dir);
    let (files, names) = all_of(copy, dir);
    assert!(expected.len() > 500, "only {} files", expected.len());
    for (name, digest) in &expected {
        assert_eq!(files.get(name), Some(digest), "{}", name.display());
    }
    assert_eq!(files.len(), expected.len());
    for (name, expected) in names.lines().zip(expected_names.lines()) {
        assert_eq!(name, expected);
    }
    assert_eq!(names.len(), expected_names.len());
}

/// One run by the library, with an oracle inside the freeze.
fn exact_by_library(seed: u64, commits_all_the_while: bool) {
    let live = Live::busy(&USUAL, SIZE, seed, BYTES, Writing::InPlaceToo);
    let oracle = Oracle::new(live.scene.loops[0].path());
    let image = live.path("image.still");
    let options = options(live.dir(), &image);
    let rest = Duration::from_millis(30);
    let commits = commits_all_the_while.then(|| Commits::begin(live.dir(), rest));
    let report = patiently(|| backup::run(&options, &oracle));
    drop(commits);
    live.assert_nothing_left(Some(&options.run_id));
    let report = serde_json::to_value(&report).unwrap();
    let told = told(&report);
    assert!(told.is_frozen, "{report}");
    let instant = oracle.instant.load(Ordering::Relaxed);
    assert!(instant > 0, "nobody told of the freeze");
    let away = live.put_away();
    let restored = away.restore(&image, &report);
    std::fs::remove_file(&image).unwrap();

    let frozen = away.path("frozen");
    oracle.save(&frozen);
    drop(oracle);
    compare_all(&frozen, &restored[0], &away.path("copied"));
    std::fs::remove_file(frozen).unwrap();
    away.judge(&restored, &told, Some(Judgement::Monotonic(instant)));
}

/// What can be imaged with these options: without a freeze, no file that is overwritten in place.
fn writing(more: &[&str]) -> Writing {
    match more.contains(&"--no-freeze") {
        true => Writing::OnlyCopied,
        false => Writing::InPlaceToo,
    }
}

/// Does once more what an error says to try again, as a user would, five times at most. Also CLOCK_MONOTONIC
/// before and after the last time.
fn tried(run: impl Fn() -> program::Run) -> (u64, program::Run, u64) {
    let mut tries = 0;
    loop {
        tries += 1;
        let begin = clock();
        let done = run();
        let end = clock();
        let last = done.last();
        let hint = last["hint"].as_str().unwrap_or_default();
        if done.code() != Some(3) || !hint.contains("try again") || tries == 5 {
            return (begin, done, end);
        }
        println!("once more: {}", last["message"]);
    }
}

/// One run by the command line.
fn exact_by_command(making: &Making, size: u64, seed: u64, more: &[&str]) {
    println!("{}:", making.name);
    let live = Live::busy(making, size, seed, BYTES, writing(more));
    let image = live.path("image.still");
    let (begin, run, end) = tried(|| live.backup(&image, more));
    let report = run.expect(0).last();
    live.assert_nothing_left(report["run_id"].as_str());
    let told = told(&report);
    assert_eq!(told.is_frozen, !more.contains(&"--no-freeze"), "{report}");
    let is_quiet = report["warnings"].as_array().unwrap().is_empty();
    assert_eq!(is_quiet, told.is_frozen, "{report}");
    let how = match told.is_frozen {
        true => Judgement::Realtime(told.instant),
        false => Judgement::Crash { begin, end },
    };
    let away = live.put_away();
    let restored = away.restore(&image, &report);
    std::fs::remove_file(&image).unwrap();
    away.judge(&restored, &told, Some(how));
}

#[test]
fn privileged_a_busy_btrfs_is_imaged_as_it_was_at_the_freeze() {
    needs_root!();
    let seed = seed();
    for number in 0..count(3, 20) {
        let seed = seed.wrapping_add(number);
        match number % 3 {
            0 => exact_by_library(seed, false),
            1 => exact_by_library(seed, true),
            _ => exact_by_command(&USUAL, SIZE, seed, &[]),
        }
    }
}

#[test]
fn privileged_a_busy_btrfs_on_two_devices_is_one_commit() {
    needs_root!();
    let seed = seed();
    let making = Making {
        mount: "compress=zstd:1",
        ..making("raid1-raid0", 2, "-m raid1 -d raid0")
    };
    for number in 0..count(1, 20) {
        exact_by_command(&making, SIZE / 2, seed.wrapping_add(number), &[]);
    }
}

#[test]
fn privileged_busy_filesystems_of_all_kinds_are_imaged() {
    needs_root!();
    let mut rng = Rng(seed());
    let kinds = [
        making("xxhash", 1, "-m dup --csum xxhash"),
        making("sha256", 1, "-m single --csum sha256"),
        making("blake2", 1, "-m dup --csum blake2"),
        making("mixed", 1, "--mixed -m dup -d dup"),
        making("block-group-tree", 1, "-m dup -O block-group-tree"),
        making("data-dup", 1, "-m dup -d dup"),
        making("four-kib-nodes", 1, "-m dup -n 4096"),
        Making {
            mount: "space_cache=v1",
            ..making("space-cache-v1", 1, "-m dup -R ^free-space-tree")
        },
        making("raid1", 2, "-m raid1 -d raid1"),
        making("raid1c3", 3, "-m raid1c3 -d single"),
        making("raid10", 4, "-m raid10 -d raid10"),
    ];
    for kind in rng.some(&kinds, count(3, kinds.len() as u64)) {
        if !is_known(kind) {
            continue;
        }
        // DUP takes twice the room; mirrors half of all devices.
        let size = match kind.devices {
            1 => SIZE * 5 / 4,
            _ => SIZE,
        };
        exact_by_command(kind, size, rng.next_u64(), &[]);
    }
}

#[test]
fn privileged_without_a_freeze_it_is_as_after_a_crash() {
    needs_root!();
    let seed = seed();
    for number in 0..count(1, 20) {
        exact_by_command(&USUAL, SIZE, seed.wrapping_add(number), &["--no-freeze"]);
    }
}

#[test]
fn privileged_a_busy_btrfs_goes_through_a_pipe() {
    needs_root!();
    let live = Live::busy(&USUAL, SIZE, seed(), BYTES, Writing::InPlaceToo);
    let image = live.path("image.still");
    let args = live.backup_args(Path::new("-"), &[]);
    let run = program::run(args).expect(0);
    let report = run.last();
    std::fs::write(&image, &run.stdout).unwrap();
    drop(run);
    live.assert_nothing_left(report["run_id"].as_str());
    let told = told(&report);
    let away = live.put_away();
    let target = away.path("restored1");
    let args = [
        Path::new("restore"),
        Path::new("--yes"),
        Path::new("-"),
        &target,
    ];
    program::run_from(&image, args).expect(0);
    program::run([Path::new("verify"), &image]).expect(0);
    away.judge(&[target], &told, None);
}

#[test]
fn privileged_a_busy_btrfs_is_cloned() {
    needs_root!();
    let seed = seed();
    for more in [&[][..], &["--no-freeze"]] {
        let live = Live::busy(&USUAL, SIZE, seed, BYTES / 2, writing(more));
        let target = live.path("restored1");
        let args = ["clone", "--freeze", "btrfs", "--verify", "--yes", "--json"].map(Path::new);
        let places = [live.dir(), &target];
        let (begin, run, end) = tried(|| {
            let more = more.iter().map(Path::new);
            program::run(args.into_iter().chain(places).chain(more))
        });
        let report = run.expect(0).last();
        live.assert_nothing_left(report["run_id"].as_str());
        assert_eq!(report["verified"], true);
        let told = told(&report);
        let how = match told.is_frozen {
            true => Judgement::Realtime(told.instant),
            false => Judgement::Crash { begin, end },
        };
        let away = live.put_away();
        away.judge(&[target], &told, Some(how));
    }
}

/// The step that nobody named, by the device's name; and what the image tells of it.
#[test]
fn privileged_it_is_chosen_by_itself_and_the_image_proves_it() {
    needs_root!();
    let live = Live::busy(&USUAL, SIZE, seed(), BYTES / 2, Writing::InPlaceToo);
    let image = live.path("image.still");
    let device = live.scene.loops[0].path().to_owned();
    let inspected = program::run([Path::new("inspect"), Path::new("--json"), live.dir()]);
    assert_eq!(inspected.expect(0).last()["step"], "btrfs");
    let args = ["backup", "--json", "-o"].map(Path::new);
    let run = program::run(args.into_iter().chain([&*image, &*device]));
    let report = run.expect(0).last();
    let told = told(&report);
    live.assert_nothing_left(report["run_id"].as_str());
    let inspected = program::run([Path::new("inspect"), Path::new("--json"), &image]);
    let inspected = inspected.expect(0).last();
    let commit = &inspected["trailer"]["commits"][0];
    assert_eq!(commit["generation"], told.generation, "{inspected}");
    assert_eq!(commit["fsid"], told.fsid.as_str(), "{inspected}");
    let text = program::run([Path::new("inspect"), &image])
        .expect(0)
        .stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains(&told.generation.to_string()), "{text}");
    program::run([Path::new("verify"), &image]).expect(0);
    let away = live.put_away();
    let restored = away.restore(&image, &report);
    program::run([
        Path::new("verify"),
        &image,
        Path::new("--against"),
        &restored[0],
    ])
    .expect(0);
    away.judge(&restored, &told, None);
}

/// What the program relies on while it streams must bear everything that moves no pinned block.
#[test]
fn privileged_what_moves_nothing_pinned_does_no_harm() {
    needs_root!();
    let live = Live::busy(&USUAL, SIZE, seed(), BYTES, Writing::InPlaceToo);
    let script = |text: &str| shell(format!("set -- {}; cd $1; {text}", live.dir().display()));
    script("btrfs -q subvolume snapshot -r static foreign; btrfs -q subvolume snapshot var also");
    let image = live.path("image.still");
    let mut streaming = live.slow_backup(&image, "8M");
    script(
        "btrfs -q subvolume delete foreign also
        btrfs -q filesystem defragment -r -czstd -f . || true
        fstrim .
        for number in 1 2 3; do
            head -c 3M static/large >home/same-$number
            cp --reflink=always static/large var/same-$number
        done
        sync -f .
        for number in 1 2 3; do
            xfs_io -c 'dedupe static/large 0 0 3M' home/same-$number >/dev/null
            cp --reflink=always static/shared home/ballast/over-$number
        done
        rm -r home/ballast/folder1 home/nested/ballast var/ballast/folder2
        sync -f .; sync -f .",
    );
    assert!(streaming.goes_on(), "it was too fast to prove anything");
    let (code, report) = streaming.end();
    assert_eq!(code, Some(0), "{report}");
    live.assert_nothing_left(report["run_id"].as_str());
    let told = told(&report);
    let mut away = live.put_away();
    away.subvolumes
        .extend(["also", "foreign"].map(str::to_owned));
    away.subvolumes.sort();
    let restored = away.restore(&image, &report);
    let (files, _) = all_of(&restored[0], &away.path("copied"));
    let of = |name: &str| -> BTreeMap<PathBuf, String> {
        let below = files.iter().filter_map(|(path, digest)| {
            let path = path.strip_prefix(name).ok()?;
            Some((path.to_owned(), digest.clone()))
        });
        below.collect()
    };
    assert!(
        of("foreign") == of("static"),
        "of what was deleted meanwhile"
    );
    away.judge(&restored, &told, None);
}

/// What only a subvolume refers to that is being deleted may be gone before it is copied. It is said then,
/// and once the deletion has ended, nothing is missing.
#[test]
fn privileged_a_subvolume_that_is_being_deleted_does_no_harm() {
    needs_root!();
    let live = Live::make(&USUAL, SIZE, seed(), BYTES / 2);
    let script = |text: &str| shell(format!("set -- {}; cd $1; {text}", live.dir().display()));
    script(
        "btrfs -q subvolume create doomed
        for number in $(seq 400); do head -c 300K /dev/urandom >doomed/$number; done
        sync -f .",
    );
    let doomed = id_of(live.dir(), "doomed");
    // Open, it stays until the cleaner comes by while we stream.
    let open = std::fs::File::open(live.dir().join("doomed")).unwrap();
    script("btrfs -q subvolume delete -c doomed");
    let image = live.path("image.still");
    let mut streaming = live.slow_backup(&image, "8M");
    drop(open);
    let wait = format!("mount -o remount .; timeout 60 btrfs subvolume sync . {doomed}");
    script(&wait);
    assert!(streaming.goes_on(), "it was too fast to prove anything");
    let (code, report) = streaming.end();
    assert_eq!(code, Some(0), "{report}");
    let told = told(&report);
    let away = live.put_away();
    let restored = away.restore(&image, &report);
    let copy = Copy::attach(&restored, &away.path("copied"));
    let is_whole = copy.checked().is_ok();
    println!("whole at once: {is_whole}; {}", report["warnings"]);
    let is_said = !report["warnings"].as_array().unwrap().is_empty();
    assert!(is_whole || is_said, "what is missing is not said: {report}");
    let mounted = copy.mount("");
    assert_no_subvolume_of_ours(mounted.dir());
    drop(mounted);
    copy.check();
    drop(copy);
    away.judge_written(&restored, &told, None);
}

/// Most systems mount a subvolume, not the top level.
#[test]
fn privileged_of_what_is_mounted_by_a_subvolume_all_is_imaged() {
    needs_root!();
    let live = Live::make(&USUAL, SIZE, seed(), BYTES / 2);
    let device = live.scene.loops[0].path().to_owned();
    let image = live.path("image.still");
    let (report, told) = live.unmounted(|| {
        let dir = live.path("home-alone");
        let mounted = Mount::new(&device, &dir, "btrfs", "subvol=home");
        let args = ["backup", "--freeze", "btrfs", "--json", "-o"].map(Path::new);
        let run = program::run(args.into_iter().chain([&*image, mounted.dir()]));
        let report = run.expect(0).last();
        let told = told(&report);
        (report, told)
    });
    live.assert_nothing_left(report["run_id"].as_str());
    let away = live.put_away();
    let restored = away.restore(&image, &report);
    away.judge(&restored, &told, None);
}

/// The judges themselves: they find nothing wrong with a copy that was taken in a freeze, and find out
/// what was copied without, or from snapshots taken one after the other.
#[test]
fn privileged_the_judges_know_an_instant_from_a_smear() {
    needs_root!();
    let live = Live::busy(&USUAL, SIZE, seed(), BYTES / 2, Writing::InPlaceToo);
    let device = live.scene.loops[0].path().to_owned();
    let [frozen, copied] = ["frozen", "copied"].map(|name| live.path(name));
    let torn: Vec<PathBuf> = (0..count(2, 5))
        .map(|number| live.path(&format!("torn{number}")))
        .collect();
    for torn in &torn {
        direct_copy(&device, torn);
    }
    let snapshots: Vec<PathBuf> = (0..count(6, 20))
        .map(|number| live.dir().join(format!("at{number}")))
        .collect();
    for at in &snapshots {
        let script = "set -- %1 %2; mkdir $2; for one in home var home/nested; do
            btrfs -q subvolume snapshot -r $1/$one $2/${one#*/}; done";
        let script = script.replace("%1", &live.dir().display().to_string());
        shell(script.replace("%2", &at.display().to_string()));
    }
    let instant = {
        let _frozen = live.mount.freeze();
        let instant = clock();
        direct_copy(&device, &frozen);
        instant
    };
    let away = live.put_away();

    let copy = Copy::attach(&[frozen], &copied);
    copy.check();
    let mounted = copy.mount("");
    let found = away
        .journals()
        .judge(mounted.dir(), Judgement::Monotonic(instant));
    found.unwrap_or_else(|wrong| panic!("{wrong}"));
    let early = Judgement::Monotonic(instant - 1_000_000_000);
    let wrong = away.journals().judge(mounted.dir(), early);
    assert!(wrong.is_err(), "of another instant");
    let (mut across, mut inplace) = (0, 0);
    for at in &snapshots {
        let at = mounted.dir().join(at.file_name().unwrap());
        let dirs = [&*at.join("home/ledger"), &*at.join("var/ledger")];
        let journals = away.journals();
        across += u64::from(journals.judge_across(dirs, Judgement::OneInstant).is_err());
        let dir = at.join("nested/inplace");
        inplace += u64::from(journals.judge_inplace(&dir, Judgement::OneInstant).is_err());
    }
    let all = snapshots.len();
    println!("of {all} snapshots one after the other {across} are wrong, {inplace} by themselves");
    assert!(
        across > 0 && inplace > 0,
        "all snapshots passed for an instant"
    );
    drop(mounted);
    drop(copy);

    let is_found = |torn: &PathBuf| {
        let copy = Copy::attach(std::slice::from_ref(torn), &copied);
        let is_sound = copy.checked().is_ok();
        let Some(mounted) = copy.try_mount() else {
            return true;
        };
        let verdict = away.journals().judge(mounted.dir(), Judgement::OneInstant);
        println!(
            "copied without a freeze: check {is_sound}, journals {}",
            verdict.is_ok()
        );
        verdict.is_err()
    };
    assert!(torn.iter().any(is_found), "copies without a freeze passed");
}

/// What `--crash` of live-writer allows is what a commit without a freeze holds: no less, no more.
#[test]
fn privileged_the_judges_know_what_a_crash_allows() {
    needs_root!();
    // A file on XFS is cloned in no time.
    let outer = common::temp_dir();
    let disk = outer.path().join("disk");
    common::sparse_file(&disk, 3 << 30);
    let disk = LoopDevice::attach(&disk);
    run("mkfs.xfs", [Path::new("-q"), disk.path()]);
    let mounted = Mount::new(disk.path(), &outer.path().join("mounted"), "xfs", "");
    let dir = tempfile::tempdir_in(mounted.dir()).unwrap();
    let scene = Scene::make_in(dir, &USUAL, SIZE);
    let mut live = Live::over(scene, USUAL.mount, seed(), BYTES / 4);
    live.write(Writing::OnlyCopied);
    let crashes: Vec<_> = (0..count(3, 20))
        .map(|number| {
            let [from, to] = ["device1", &format!("crash{number}")].map(|name| live.path(name));
            let begin = clock();
            run("sync", [Path::new("-f"), live.dir()]);
            run("cp", [Path::new("--reflink=always"), &from, &to]);
            (to, begin, clock())
        })
        .collect();
    let away = live.put_away();
    let mut smears = 0;
    for (file, begin, end) in crashes {
        run(
            "btrfs",
            ["rescue", "zero-log"]
                .map(Path::new)
                .into_iter()
                .chain([&*file]),
        );
        let copy = Copy::attach(std::slice::from_ref(&file), &away.path("copied"));
        copy.check();
        let mounted = copy.mount("");
        let judge = |how| away.journals().judge(mounted.dir(), how);
        judge(Judgement::Crash { begin, end }).unwrap_or_else(|wrong| panic!("{wrong}"));
        smears += u64::from(judge(Judgement::OneInstant).is_err());
        // Earlier than it began, or later than it ended.
        let second = 1_000_000_000;
        let early = Judgement::Crash {
            begin,
            end: begin - second,
        };
        assert!(judge(early).is_err(), "of another time");
        let late = Judgement::Crash {
            begin: end + second / 4,
            end: end + second,
        };
        assert!(judge(late).is_err(), "of another time");
        drop(mounted);
        drop(copy);
        std::fs::remove_file(file).unwrap();
    }
    assert!(smears > 0, "without a freeze all show one instant");
}
