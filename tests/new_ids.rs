//! `--new-ids`: a copy of a btrfs that lives beside its original.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::btrfs::{
    Scene, change_super, check, fill, filled, forget, ids, making, mount, patch,
};
use crate::common::holdstill::{self as program, Run};
use crate::common::scene::{assert_no_signature, onto_a_liar};
use crate::common::volume::{copy, digests, ext4};
use crate::common::{
    FileSource, LoopDevice, Mount, Rng, count, needs_root, run, seed, sparse_file, spawn, temp_dir,
};
use holdstill::read_at::ReadAt;

fn restore<'a>(image: &Path, more: impl IntoIterator<Item = &'a OsStr>) -> Run {
    let args = ["restore", "--yes", "--json"].map(OsString::from);
    let more = more.into_iter().map(OsString::from);
    program::run(args.into_iter().chain([image.into()]).chain(more))
}

fn new_uuid(report: &Value, index: usize) -> String {
    report["targets"][index]["new_uuid"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn privileged_a_copy_with_new_ids_is_mounted_beside_its_original() {
    needs_root!();
    let mut rng = Rng(seed());
    for checksum in ["crc32c", "xxhash", "sha256", "blake2"] {
        println!("{checksum}");
        let options = format!("--csum {checksum}");
        let (scene, file) = filled(options.leak(), &mut rng);
        let [image, again] = ["image", "again"].map(|name| scene.path(name));
        let backup = |source: &Path, image: &Path| {
            program::run(["backup".as_ref(), source, "-o".as_ref(), image]).expect(0);
        };
        backup(&file, &image);
        let (old, _) = ids(&file, 2);
        let target_file = scene.path("target");
        sparse_file(&target_file, FileSource::open(&file).len().0);
        let target = LoopDevice::attach(&target_file);
        let source = LoopDevice::attach(&file);
        let original = Mount::new(source.path(), &scene.path("original"), "btrfs", "");
        let twin = restore(&image, [target.path().as_os_str()]).expect(3);
        assert!(twin.last()["hint"].as_str().unwrap().contains("--new-ids"));
        let args = [target.path().as_os_str(), "--new-ids".as_ref()];
        let report = restore(&image, args.into_iter().chain(["--verify".as_ref()])).expect(0);
        let new = new_uuid(&report.last(), 0);
        assert_ne!(new, old);
        assert_eq!(ids(target.path(), 2), (new.clone(), old.clone()));
        check(target.path());
        {
            let copy = Mount::new(target.path(), &scene.path("copy"), "btrfs", "");
            assert_eq!(digests(copy.dir()), digests(original.dir()));
            let shown = run("btrfs", ["filesystem", "show", &new]);
            assert!(
                shown.contains(target.path().to_str().unwrap()) && !shown.contains(&old),
                "{shown}"
            );
            std::fs::write(copy.dir().join("new"), "of the copy").unwrap();
            std::fs::write(original.dir().join("new"), "of the original").unwrap();
        }
        drop(original);
        check(target.path());
        check(source.path());
        // What the kernel has written since has kept them.
        assert_eq!(ids(target.path(), 2), (new.clone(), old.clone()));
        assert_eq!(ids(source.path(), 2), (old.clone(), old.clone()));

        // The copy of a copy: the UUID of the metadata is still that of the first.
        backup(target.path(), &again);
        let third = scene.path("third");
        let report = restore(&again, [third.as_os_str(), "--new-ids".as_ref()]).expect(0);
        let newest = new_uuid(&report.last(), 0);
        assert!(![&old, &new].contains(&&newest));
        assert_eq!(ids(&third, 2), (newest, old.clone()));
        check(&third);
        forget(&[target, source]);
    }
}

#[test]
fn privileged_all_devices_of_a_filesystem_get_the_same_id() {
    needs_root!();
    let mut scene = Scene::make(&making("", 2, "-d raid0 -m raid1"));
    {
        let mount = scene.mount("");
        fill(mount.dir(), &mut Rng(seed()), 3 << 20);
    }
    let image = scene.path("image");
    let backup = ["backup", "-o"].map(Path::new).into_iter();
    program::run(backup.chain([&*image, scene.loops[0].path()])).expect(0);
    let original = scene.mount("");
    let targets = [1, 2].map(|n| {
        let file = scene.path(&format!("target{n}"));
        sparse_file(&file, FileSource::open(&scene.path("device1")).len().0);
        LoopDevice::attach(&file)
    });
    let maps: Vec<OsString> = (1..)
        .zip(&targets)
        .map(|(n, target)| format!("--map={n}={}", target.path().display()).into())
        .collect();
    let one = [maps[0].as_os_str(), "--new-ids".as_ref()];
    let ended = restore(&image, one).expect(3).last();
    let message = ended["message"].as_str().unwrap();
    assert!(message.contains("volume 2 is left out"), "{message}");
    let both = maps.iter().map(OsString::as_os_str);
    let options = ["--new-ids", "--verify"].map(OsStr::new);
    let report = restore(&image, both.chain(options)).expect(0).last();
    let new = new_uuid(&report, 0);
    assert_eq!(new, new_uuid(&report, 1));
    {
        let copy = mount(&targets, &scene.path("copy"), "");
        assert_eq!(digests(copy.dir()), digests(original.dir()));
        let shown = run("btrfs", ["filesystem", "show", &new]);
        assert!(shown.contains("Total devices 2"), "{shown}");
        std::fs::write(copy.dir().join("new"), "of the copy").unwrap();
        std::fs::write(original.dir().join("new"), "of the original").unwrap();
    }
    drop(original);
    check(scene.loops[1].path());
    // `btrfs check` (6.2) counts the devices of the original to the copy, also after `btrfstune -m`.
    forget(&scene.loops);
    scene.loops.clear();
    check(targets[1].path());
    forget(&targets);
}

#[test]
fn privileged_clones_and_streams_get_new_ids() {
    needs_root!();
    let (scene, file) = filled("", &mut Rng(seed()));
    let (old, _) = ids(&file, 2);
    let [target, clone] = ["target", "clone"].map(|name| scene.path(name));
    let mut writer = program::command(["backup".as_ref(), &*file, "-o".as_ref(), "-".as_ref()]);
    writer.stdout(Stdio::piped());
    let mut child = spawn(&mut writer);
    let args = ["restore", "--new-ids", "-"].map(Path::new);
    let mut reader = program::command(args.into_iter().chain([&*target]));
    reader.stdin(child.stdout.take().unwrap());
    let text = program::finish(reader).expect(0);
    program::wait(&writer, child).expect(0);
    let (new, metadata) = ids(&target, 2);
    assert_eq!(metadata, old);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains(&format!("the new UUID {new}")), "{text}");
    check(&target);

    let source = LoopDevice::attach(&file);
    let args = ["clone", "--new-ids", "--verify", "--json"].map(Path::new);
    let clone_it = |more: &str| {
        let more = [Path::new(more), source.path(), &*clone];
        program::run(args.into_iter().chain(more))
    };
    let planned = clone_it("--dry-run").expect(0).last();
    assert_eq!(planned["actions"][0]["new_ids"], true);
    assert!(!clone.exists());
    let report = clone_it("--quiet").expect(0).last();
    let new = report["new_uuid"].as_str().unwrap().to_owned();
    assert_eq!(report["warnings"].as_array().unwrap().len(), 0, "{report}");
    assert_eq!(ids(&clone, 2), (new, old));
    check(&clone);
    forget(&[source]);
}

#[test]
fn privileged_a_mounted_filesystem_is_cloned_to_a_neighbour() {
    needs_root!();
    let scene = Scene::make(&making("", 1, ""));
    let mounted = scene.mount("");
    fill(mounted.dir(), &mut Rng(seed()), 3 << 20);
    run("sync", [Path::new("-f"), mounted.dir()]);
    let file = scene.path("target");
    sparse_file(&file, FileSource::open(&scene.path("device1")).len().0);
    let target = LoopDevice::attach(&file);
    let clone = |more: &str| {
        let args = ["clone", "--yes", "--json", more].map(Path::new);
        program::run(args.into_iter().chain([mounted.dir(), target.path()]))
    };
    clone("--quiet").expect(3);
    let report = clone("--new-ids").expect(0).last();
    let (new, _) = ids(target.path(), 2);
    assert_eq!(report["new_uuid"], new.as_str());
    check(target.path());
    {
        let copy = Mount::new(target.path(), &scene.path("copy"), "btrfs", "");
        assert_eq!(digests(copy.dir()), digests(mounted.dir()));
    }
    drop(mounted);
    forget(&[target]);
}

/// The third copy of the superblock is 256 GiB behind the start.
#[test]
fn privileged_the_last_copy_is_changed_too() {
    needs_root!();
    let dir = temp_dir();
    let [file, image, target] = ["source", "image", "target"].map(|name| dir.path().join(name));
    sparse_file(&file, 257 << 30);
    run(
        "mkfs.btrfs",
        ["-q", "-K"].map(Path::new).into_iter().chain([&*file]),
    );
    let (old, _) = ids(&file, 3);
    program::run(["backup".as_ref(), &*file, "-o".as_ref(), &image]).expect(0);
    let options = ["--new-ids", "--verify"].map(OsStr::new);
    let report = restore(&image, options.into_iter().chain([target.as_os_str()])).expect(0);
    assert_eq!(ids(&target, 3), (new_uuid(&report.last(), 0), old));
    check(&target);
}

#[test]
fn privileged_what_cannot_have_new_ids_is_refused() {
    needs_root!();
    let (scene, file) = filled("", &mut Rng(seed()));
    let [image, target, other, changed] =
        ["image", "target", "other", "changed"].map(|name| scene.path(name));
    let backup = |sources: &[&Path]| {
        let args = ["backup", "--force", "-o"].map(Path::new).into_iter();
        program::run(args.chain([&*image]).chain(sources.iter().copied())).expect(0);
    };
    // Not btrfs, known before anything is written.
    ext4(&other, 8 << 20, "", None);
    backup(&[&other]);
    std::fs::write(&target, vec![7; 8 << 20]).unwrap();
    let options = [target.as_os_str(), "--new-ids".as_ref()];
    let ended = restore(&image, options).expect(3).last();
    let message = ended["message"].as_str().unwrap();
    assert!(message.contains("volume 1 is ext4"), "{message}");
    assert!(std::fs::read(&target).unwrap() == vec![7; 8 << 20]);
    let args = ["clone", "--new-ids", "--yes"].map(Path::new).into_iter();
    let ended = program::run(args.chain([&*other, &target])).expect(3);
    ended.says("the source is ext4");
    assert!(std::fs::read(&target).unwrap() == vec![7; 8 << 20]);
    std::fs::remove_file(&target).unwrap();
    // One of several is not.
    backup(&[&file, &other]);
    let maps =
        [(1, &target), (2, &changed)].map(|(n, path)| format!("--map={n}={}", path.display()));
    let options = [maps[0].as_ref(), maps[1].as_ref(), OsStr::new("--new-ids")];
    restore(&image, options).expect(3);
    assert!(!target.exists());
    // Not both.
    backup(&[&file]);
    let options = ["--new-ids", "--allow-twin"].map(OsStr::new);
    restore(&image, options.into_iter().chain([target.as_os_str()])).expect(2);
    assert!(!target.exists());

    // Known only when all is written: another change has not ended; the first superblock is damaged.
    sparse_file(&target, FileSource::open(&file).len().0);
    let refuse = |text: &str| {
        backup(&[&changed]);
        let options = [target.as_os_str(), "--new-ids".as_ref()];
        let ended = restore(&image, options).expect(3).last();
        let message = ended["message"].as_str().unwrap();
        assert!(message.contains(text), "{message}");
        assert_no_signature(&target);
    };
    copy(&file, &changed);
    change_super(&changed, 0x38, &(1u64 << 36).to_le_bytes());
    refuse("another change");
    copy(&file, &changed);
    patch(&changed, (64 << 10) + 0x12b, b"x");
    refuse("first superblock is damaged");
}

#[test]
fn privileged_new_ids_do_not_hide_what_reads_back_as_something_else() {
    needs_root!();
    let (scene, file) = filled("", &mut Rng(seed()));
    let [image, target] = ["image", "target"].map(|name| scene.path(name));
    program::run(["backup".as_ref(), &*file, "-o".as_ref(), &image]).expect(0);
    let args = ["restore", "--verify", "--new-ids"].map(Path::new);
    let size = FileSource::open(&file).len().0;
    onto_a_liar(args.into_iter().chain([&*image, &target]), &target, size);
}

/// The first superblock of a target is none, or has the new UUID, whenever the restore is killed; and
/// when it is there, everything is.
#[test]
fn privileged_a_killed_restore_never_shows_the_old_id() {
    needs_root!();
    let mut rng = Rng(seed());
    let (scene, file) = filled("", &mut rng);
    let [image, target] = ["image", "target"].map(|name| scene.path(name));
    program::run(["backup".as_ref(), &*file, "-o".as_ref(), &image]).expect(0);
    let (old, _) = ids(&file, 2);
    // It holds the original before.
    let first = |target: &Path| {
        let mut superblock = vec![0; 4096];
        File::open(target)
            .unwrap()
            .read_exact_at(&mut superblock, 64 << 10)
            .unwrap();
        superblock
    };
    let fsid = |superblock: &[u8]| {
        let bytes: [u8; 16] = superblock[0x20..0x30].try_into().unwrap();
        uuid::Uuid::from_bytes(bytes).to_string()
    };
    copy(&file, &target);
    let original = first(&target);
    assert_eq!(fsid(&original), old);
    let args = ["restore", "--yes", "--new-ids"].map(PathBuf::from);
    let args = args.into_iter().chain([image, target.clone()]);
    let begun = Instant::now();
    program::run(args.clone()).expect(0);
    let mut whole = begun.elapsed();
    let mut left = count(12, 100);
    let (mut none, mut renewed) = (0, 0);
    while left > 0 {
        copy(&file, &target);
        let mut child = spawn(&mut program::command(args.clone()));
        // Most often near the end, where superblocks are written.
        let micros = whole.as_micros() as u64;
        let from = micros * [0, 7, 8, 9][left as usize % 4] / 10;
        let delay = from + rng.below((micros * 11 / 10 - from).max(1));
        std::thread::sleep(Duration::from_micros(delay));
        child.kill().unwrap();
        if child.wait().unwrap().signal() == Some(9) {
            left -= 1;
        } else {
            whole = whole * 9 / 10;
        }
        let superblock = first(&target);
        if superblock == original {
            // Killed before it began.
        } else if superblock.iter().all(|byte| *byte == 0) {
            assert_no_signature(&target);
            none += 1;
        } else {
            assert_ne!(fsid(&superblock), old);
            assert_eq!(ids(&target, 2), (fsid(&superblock), old.clone()));
            check(&target);
            renewed += 1;
        }
    }
    println!("{none} without a signature, {renewed} whole");
    assert!(none > 0);
}
