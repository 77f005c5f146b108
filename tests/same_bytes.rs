//! What is read and what is written must not be the same bytes, whatever they are called.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::common::holdstill::{command, finish, run, same_bytes};
use crate::common::scene::{SIZE, Scene, backup_to};
use crate::common::volume::copy;
use crate::common::{LoopDevice, Mount, Partition, needs_root, output, run as tool};

fn clone(source: &Path, target: &Path) -> [PathBuf; 4] {
    let [clone, yes] = ["clone", "--yes"].map(PathBuf::from);
    [clone, yes, source.to_owned(), target.to_owned()]
}

/// Runs it with its standard output appended to a file, which nobody else has open: it must be refused.
#[track_caller]
fn refused_when_printing_to(file: &Path, args: &[PathBuf]) {
    let script = format!("exec \"$0\" \"$@\" >> {}", file.display());
    let program = [
        PathBuf::from("-c"),
        script.into(),
        env!("CARGO_BIN_EXE_holdstill").into(),
    ];
    let refused = output("bash", program.iter().chain(args));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(3), "{args:?}: {said}");
    assert!(
        said.contains("standard output is the source itself"),
        "{said}"
    );
}

#[test]
fn privileged_a_source_is_known_by_its_bytes() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.path("disk");
    copy(&scene.source, &file);
    let twin = scene.path("twin");
    std::fs::hard_link(&file, &twin).unwrap();
    let device = LoopDevice::attach(&file);
    // Read-only, or the source would be refused as one that others can write to.
    let shifted = LoopDevice::attach_with(&file, &["--read-only", "--offset", "1048576"]);
    let above = LoopDevice::attach_with(device.path(), &["--read-only"]);
    let all = [&file, &twin, device.path(), shifted.path(), above.path()].map(Path::to_owned);
    for source in &all[..3] {
        for target in &all {
            scene.refuses(3, "the source itself", clone(source, target));
        }
        for output in [&file, &twin] {
            scene.refuses(3, "the source itself", backup_to(source, output));
        }
        let before = scene.state();
        refused_when_printing_to(&file, &clone(source, &scene.path("fresh")));
        let backup = ["backup", "-o", "-"].map(PathBuf::from).into_iter();
        let backup: Vec<_> = backup.chain([source.clone()]).collect();
        refused_when_printing_to(&twin, &backup);
        assert!(before == scene.state(), "{source:?}");
    }
    drop(above);
    drop(shifted);
    drop(device);
    let shifted = LoopDevice::attach_with(&file, &["--offset", "1048576"]);
    for target in [&file, &twin] {
        scene.refuses(3, "the source itself", clone(shifted.path(), target));
        scene.refuses(3, "the source itself", backup_to(shifted.path(), target));
    }
    drop(shifted);
    let device = LoopDevice::attach(&file);

    // Mounted, and a partition of the disk.
    let mount = Mount::new(device.path(), &scene.path("point"), "ext4", "");
    for source in [mount.dir(), device.path(), &file] {
        let run = run(backup_to(source, &file)).expect(3);
        assert!(run.stderr.contains("the source itself"), "{run}");
        run_refused_clone(source, &twin);
    }
    drop(mount);
    let partition = Partition::add(device.path(), 1, 2048, 8192);
    scene.refuses(3, "the source itself", backup_to(partition.node(), &file));
    scene.refuses(3, "the source itself", clone(partition.node(), &file));
    scene.refuses(
        3,
        "the source itself",
        clone(device.path(), partition.node()),
    );
}

fn run_refused_clone(source: &Path, target: &Path) {
    run(clone(source, target))
        .expect(3)
        .says("the source itself");
}

#[test]
fn privileged_neighbours_on_one_disk_are_not_the_same_bytes() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.target(32 << 20);
    let disk = LoopDevice::attach(&file);
    let one = Partition::add(disk.path(), 1, 2048, 16384);
    let other = Partition::add(disk.path(), 2, 20480, 16384);
    tool("mke2fs", [Path::new("-qF"), one.node()]);
    run(clone(one.node(), other.node())).expect(0);
    tool("e2fsck", [Path::new("-fn"), other.node()]);
    // Both in one run: their disk is locked once.
    let both = scene.path("both");
    let backup = [Path::new("backup"), one.node(), other.node()];
    run(backup.into_iter().chain([Path::new("-o"), &both])).expect(0);
    let maps = [(1, &other), (2, &one)].map(|(n, to)| format!("{n}={}", to.node().display()));
    let restore = ["restore", "--yes", both.to_str().unwrap()].into_iter();
    run(restore.chain(["--map", &maps[0], "--map", &maps[1]])).expect(0);
    tool("e2fsck", [Path::new("-fn"), one.node()]);
}

#[test]
fn an_image_is_not_restored_onto_itself() {
    let scene = Scene::new();
    let twin = scene.path("twin");
    std::fs::hard_link(&scene.image, &twin).unwrap();
    scene.refuses(3, "the image itself", scene.restore_to(&twin));
    let before = scene.state();
    let args = ["restore", "--yes", "-"].map(PathBuf::from).into_iter();
    let mut stream = command(args.chain([twin.clone()]));
    stream.stdin(File::open(&scene.image).unwrap());
    finish(stream).expect(3).says("the image itself");
    assert!(before == scene.state());
}

#[test]
fn privileged_an_image_below_a_loop_device_is_the_image() {
    needs_root!();
    let scene = Scene::new();
    let padded = scene.path("padded");
    copy(&scene.image, &padded);
    let device = LoopDevice::attach(&scene.image);
    scene.refuses(3, "the image itself", scene.restore_to(device.path()));
    let verify = ["verify", "--against"].map(Path::new);
    let [verify, against] = verify;
    let args = [verify, &scene.image, against, device.path()];
    scene.refuses(3, "the image itself", args);
}

#[test]
fn two_volumes_do_not_go_to_the_same_bytes() {
    let scene = Scene::new();
    let [second, both] = ["second", "both"].map(|name| scene.path(name));
    copy(&scene.source, &second);
    let backup = [Path::new("backup"), &scene.source, &second];
    run(backup.into_iter().chain([Path::new("-o"), &both])).expect(0);
    let [target, twin] = [scene.target(SIZE), scene.path("twin")];
    std::fs::hard_link(&target, &twin).unwrap();
    let map = |number: u32, path: &Path| format!("{number}={}", path.display());
    let maps = |other: &Path| {
        let args = ["restore", "--yes", both.to_str().unwrap(), "--map"].map(str::to_owned);
        let maps = [map(1, &target), "--map".to_owned(), map(2, other)];
        args.into_iter().chain(maps).collect::<Vec<_>>()
    };
    scene.refuses(3, "the target of volume 1", maps(&twin));
    let other = scene.path("other");
    run(maps(&other)).expect(0);
    assert!(same_bytes(&second, &other));
}
