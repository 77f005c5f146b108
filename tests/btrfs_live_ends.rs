//! What a run on a mounted btrfs refuses, what ends it before its time, and what it finds out at its
//! end: then there is no image, nothing stays frozen, and no subvolume is left.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::btrfs::{Making, making};
use crate::common::btrfs_live::{Live, told};
use crate::common::btrfs_writers::Writing;
use crate::common::holdstill as program;
use crate::common::volume::populate;
use crate::common::{
    self, LoopDevice, Mount, Rng, count, needs_root, output, run, seed, shell, sparse_file, spawn,
};

const SIZE: u64 = 768 << 20;
const BYTES: u64 = 100 << 20;

const USUAL: Making = making("usual", 1, "-m dup -d single");

/// A command on a mounted filesystem; its standard output.
fn btrfs(live: &Live, command: &str) -> String {
    shell(command.replace("MOUNT", &live.dir().display().to_string()))
}

/// A run that streams while the command is started on its source: it must find that out, and say so.
fn is_found_out(making: &Making, command: &str) {
    println!("{command}");
    let live = Live::make(making, SIZE, seed(), BYTES);
    // One more, to replace or add.
    let file = live.path("spare");
    sparse_file(&file, SIZE);
    let spare = LoopDevice::attach(&file);
    let image = live.path("image.still");
    let mut streaming = live.slow_backup(&image, "10M");
    let mut command = command.replace("SPARE", &spare.path().display().to_string());
    for (number, device) in live.scene.loops.iter().enumerate() {
        let device = device.path().display().to_string();
        command = command.replace(&format!("DEVICE{}", number + 1), &device);
    }
    btrfs(&live, &command);
    let went_on = streaming.goes_on();
    let (code, last) = streaming.end();
    assert_eq!(code, Some(3), "{last}");
    println!("went on: {went_on}; {last}");
    assert!(last["hint"].is_string(), "{last}");
    live.assert_no_image(&image);
    live.assert_nothing_left(last["run_id"].as_str());
    // And again, when that is over.
    let report = live.backup(&image, &[]).expect(0).last();
    told(&report);
    drop(live);
    drop(spare);
}

#[test]
fn privileged_what_moves_pinned_blocks_meanwhile_is_found_out() {
    needs_root!();
    is_found_out(&USUAL, "btrfs -q balance start --full-balance MOUNT");
    is_found_out(&USUAL, "btrfs -q balance start -m -f MOUNT");
    let two = making("two", 2, "-m raid1 -d single");
    is_found_out(
        &two,
        "btrfs -q balance start -mconvert=dup -f MOUNT; btrfs device remove DEVICE2 MOUNT",
    );
    is_found_out(&two, "btrfs replace start -B -f DEVICE1 SPARE MOUNT");
    is_found_out(&USUAL, "btrfs replace start -B -f DEVICE1 SPARE MOUNT");
}

/// Refused with what is in the way, and nothing is left.
fn is_refused(live: &Live, word: &str) {
    let image = live.path("image.still");
    let run = live.backup(&image, &[]).expect(3);
    let message = run.last()["message"].as_str().unwrap().to_lowercase();
    assert!(message.contains(word), "{run}");
    live.assert_no_image(&image);
    live.assert_nothing_left(run.last()["run_id"].as_str());
}

#[test]
fn privileged_a_balance_is_refused() {
    needs_root!();
    let live = Live::make(&USUAL, SIZE, seed(), 2 * BYTES);
    // One after the other: some run meets one at its beginning, others find one out later.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                btrfs(&live, "btrfs -q balance start --full-balance MOUNT || true");
            }
        });
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for number in 0..count(3, 10) {
                let image = live.path(&format!("image{number}.still"));
                live.backup(&image, &["--rate", "50M"]).expect(3);
                live.assert_no_image(&image);
            }
        }));
        stop.store(true, Ordering::Relaxed);
        ended.unwrap();
    });
    live.assert_nothing_left(None);
    // One that rests.
    let mut tries = 0;
    while !btrfs(&live, "btrfs balance status MOUNT || true").contains("paused") {
        tries += 1;
        assert!(tries < 100, "no balance could be paused in time");
        btrfs(
            &live,
            "btrfs -q balance start --bg --full-balance MOUNT; sleep 0.05
            btrfs balance pause MOUNT 2>/dev/null || true",
        );
    }
    is_refused(&live, "balance");
    btrfs(&live, "btrfs balance cancel MOUNT");
    let report = live.backup(&live.path("image.still"), &[]).expect(0).last();
    told(&report);
}

/// Swap space in use is written past the filesystem, and its subvolume cannot be pinned.
#[test]
fn privileged_active_swap_space_is_refused() {
    needs_root!();
    struct Swap(PathBuf);
    impl Drop for Swap {
        fn drop(&mut self) {
            output("swapoff", [&self.0]);
        }
    }
    let dir = common::temp_dir_on_disk();
    let [file, image] = ["device", "image.still"].map(|name| dir.path().join(name));
    sparse_file(&file, 512 << 20);
    let device = LoopDevice::attach_with(&file, &["--direct-io=on"]);
    run("mkfs.btrfs", [Path::new("-q"), device.path()]);
    let mount = Mount::new(device.path(), &dir.path().join("mounted"), "btrfs", "");
    populate(mount.dir(), &mut Rng(seed() | 1), 10 << 20);
    let swap = mount.dir().join("swap");
    run(
        "btrfs",
        ["filesystem", "mkswapfile", "--size", "32M"]
            .map(Path::new)
            .into_iter()
            .chain([&*swap]),
    );
    run("swapon", [&swap]);
    let active = Swap(swap);
    let args = ["backup", "--json", "--freeze", "btrfs", "-o"].map(Path::new);
    let backup = || program::run(args.into_iter().chain([&*image, mount.dir()]));
    let refused = backup().expect(3).last();
    let text = format!("{} {}", refused["message"], refused["hint"]);
    assert!(text.contains("swap"), "{refused}");
    assert!(!image.exists());
    crate::common::btrfs_live::assert_no_subvolume_of_ours(mount.dir());
    drop(active);
    told(&backup().expect(0).last());
    common::btrfs::forget(&[device]);
}

/// An image on the filesystem that it is made of would wait for the thaw, for ever.
#[test]
fn privileged_an_image_on_its_own_source_does_no_harm() {
    needs_root!();
    let live = Live::make(&USUAL, SIZE, seed(), BYTES / 4);
    let image = live.dir().join("image.still");
    let run = live.backup(&image, &[]).expect(3);
    live.assert_no_image(&image);
    live.assert_nothing_left(run.last()["run_id"].as_str());
    let run = live.backup(&image, &["--no-freeze"]);
    assert!([Some(0), Some(3)].contains(&run.code()), "{run}");
    live.assert_nothing_left(run.last()["run_id"].as_str());
    if run.code() == Some(0) {
        program::run([Path::new("verify"), &image]).expect(0);
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < end, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(pid: u32, name: &str) {
    // It may have ended by itself.
    output("kill", ["-s", name, &pid.to_string()]);
}

fn guard_of(pid: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// The source can be written to and has only its own subvolumes, at once or in a moment.
fn wait_until_undone(live: &Live) {
    wait_until("it is thawed", || {
        let file = live.dir().join("still-writable").display().to_string();
        let args = ["10", "sh", "-c", "echo > $0 && sync -f $0", &file];
        output("timeout", args).status.success()
    });
    let list = || btrfs(live, "btrfs subvolume list -a MOUNT; ls -A MOUNT");
    wait_until("its snapshots are gone", || !list().contains(".holdstill"));
    live.assert_nothing_left(None);
}

fn begin(live: &Live, image: &Path, more: &[&str]) -> Child {
    let mut command = program::command(live.backup_args(image, more));
    spawn(command.stdout(Stdio::null()).stderr(Stdio::null()))
}

#[test]
fn privileged_killed_at_any_moment_it_leaves_no_subvolume() {
    needs_root!();
    let seed = seed();
    let mut random = Rng(seed | 1);
    let live = Live::busy(&USUAL, SIZE, seed, BYTES / 2, Writing::InPlaceToo);
    let image = live.path("image.still");
    let begun = Instant::now();
    live.backup(&image, &[]).expect(0);
    let whole = begun.elapsed().as_millis() as u64;
    std::fs::remove_file(&image).unwrap();
    for number in 0..count(6, 100) {
        let mut child = begin(&live, &image, &[]);
        std::thread::sleep(Duration::from_millis(random.below(whole)));
        let with_guard = number % 3 == 2;
        if let (true, Some(guard)) = (with_guard, guard_of(child.id())) {
            signal(child.id(), "STOP");
            signal(guard, "KILL");
        }
        signal(child.id(), "KILL");
        let ended = child.wait().unwrap();
        if with_guard {
            program::run(["cleanup"]).expect(0);
        }
        if ended.success() {
            std::fs::remove_file(&image).unwrap();
        }
        wait_until_undone(&live);
        live.assert_no_image(&image);
    }
    program::run(["cleanup"]).expect(0);
    let report = live.backup(&image, &[]).expect(0).last();
    let told = told(&report);
    let away = live.put_away();
    let restored = away.restore(&image, &report);
    away.judge(&restored, &told, None);
}

#[test]
fn privileged_asked_to_end_it_leaves_no_subvolume() {
    needs_root!();
    let live = Live::make(&USUAL, SIZE, seed(), BYTES / 2);
    let image = live.path("image.still");
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 143)] {
        let streaming = live.slow_backup(&image, "4M");
        signal(streaming.pid(), name);
        let (ended, last) = streaming.end();
        assert_eq!(ended, Some(code), "{last}");
        live.assert_no_image(&image);
        live.assert_nothing_left(last["run_id"].as_str());
    }
    // Without its guard, which has nothing to undo any more, it either ends or is whole.
    let streaming = live.slow_backup(&image, "4M");
    signal(guard_of(streaming.pid()).expect("a guard"), "KILL");
    let (ended, last) = streaming.end();
    match ended {
        Some(0) => drop(program::run([Path::new("verify"), &image]).expect(0)),
        ended => {
            assert_eq!(ended, Some(1), "{last}");
            live.assert_no_image(&image);
        }
    }
    program::run(["cleanup"]).expect(0);
    live.assert_nothing_left(last["run_id"].as_str());
}

/// Two at once: each either is whole or gives way to the other.
#[test]
fn privileged_two_runs_on_one_btrfs_do_no_harm() {
    needs_root!();
    let live = Live::busy(&USUAL, SIZE, seed(), BYTES / 2, Writing::InPlaceToo);
    let images = [1, 2].map(|number| live.path(&format!("image{number}.still")));
    let children: Vec<Child> = images
        .iter()
        .map(|image| begin(&live, image, &[]))
        .collect();
    let mut whole = 0;
    for (mut child, image) in children.into_iter().zip(&images) {
        match child.wait().unwrap().code() {
            Some(0) => {
                whole += 1;
                program::run([Path::new("verify"), image]).expect(0);
            }
            Some(3) => assert!(!image.exists()),
            other => panic!("ended with {other:?}"),
        }
    }
    assert!(whole > 0, "both gave way");
    live.assert_nothing_left(None);
}
