//! Btrfs on several devices, and twice on one machine.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use holdstill::read_at::ReadAt;

use crate::common::btrfs::{Scene, fill, filled, forget, making};
use crate::common::{
    FileSource, LoopDevice, Mount, Rng, holdstill as program, needs_root, run, seed, sparse_file,
    spawn,
};

#[test]
fn privileged_devices_are_imaged_together_or_by_themselves() {
    needs_root!();
    let mut rng = Rng(seed());
    let mut scene = Scene::make(&making("", 3, "-d raid1 -m raid1"));
    let [first, second] = [0, 1].map(|n| scene.loops[n].path().to_owned());
    let image = scene.path("image");
    let backup = |more: &[&Path]| {
        let args = [
            "backup".as_ref(),
            "-o".as_ref(),
            &*image,
            "--force".as_ref(),
            "--json".as_ref(),
        ];
        program::run(args.into_iter().chain(more.iter().copied()))
    };
    {
        let mount = scene.mount("");
        fill(mount.dir(), &mut rng, 3 << 20);
        // Whichever is named: all are in use, and imaged together.
        for device in [&first, &second] {
            backup(&[device, "--freeze=offline".as_ref()]).expect(3);
            let report = backup(&[device]).expect(0).last();
            assert_eq!(report["freeze"], "btrfs");
            let volumes = report["volumes"].as_array().unwrap();
            assert_eq!(volumes.len(), 3);
            assert_eq!(volumes[0]["path"].as_str(), device.to_str());
        }
    }
    // Naming two of them is naming all of them once; what is named comes first.
    let hooked = scene.path("hooked");
    let hook = PathBuf::from(format!("--post-freeze=echo >> {}", hooked.display()));
    let report = backup(&[&second, &first, &hook]).expect(0).last();
    assert_eq!(std::fs::read_to_string(&hooked).unwrap(), "\n");
    let volumes = report["volumes"].as_array().unwrap();
    let paths: Vec<_> = volumes
        .iter()
        .map(|volume| volume["path"].as_str().unwrap())
        .collect();
    let third = scene.loops[2].path().to_str().unwrap().to_owned();
    assert_eq!(
        paths,
        [second.to_str().unwrap(), first.to_str().unwrap(), &third]
    );
    let inspected = program::run(["inspect".as_ref(), &*image, "--json".as_ref()])
        .expect(0)
        .last();
    for volume in inspected["manifest"]["volumes"].as_array().unwrap() {
        assert_eq!(volume["group"], volume["uuid"]);
    }
    let inspected = program::run(["inspect".as_ref(), &*first, "--json".as_ref()])
        .expect(0)
        .last();
    assert_eq!(
        inspected["siblings"].as_array().unwrap().len(),
        2,
        "{inspected}"
    );
    assert_eq!(inspected["used_bytes"], volumes[1]["used_bytes"]);

    // What is not restored is missed.
    let target = scene.path("target");
    let ended = program::run([
        "restore".as_ref(),
        &*image,
        "--map".as_ref(),
        &PathBuf::from(format!("2={}", target.display())),
    ]);
    ended.expect(0).says("volume 1 is not restored");

    // A clone has one target.
    let clone = scene.path("clone");
    let ended = program::run(["clone".as_ref(), &*first, &clone, "--yes".as_ref()]);
    ended.expect(3).says("3 devices");
    // Somebody writes to another device than the one that is named.
    {
        let _writer = OpenOptions::new().write(true).open(&second).unwrap();
        backup(&[&first]).expect(3);
    }
    // Or comes while they are copied.
    let slowly = ["backup", "--force", "--json", "--rate", "8M", "-o"].map(Path::new);
    let mut command = program::command(slowly.into_iter().chain([&*image, &*first]));
    let mut child = spawn(&mut command);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().expect("another line").unwrap();
    while !next().contains("\"progress\"") {}
    {
        let file = OpenOptions::new().read(true).write(true).open(&second);
        let file = file.unwrap();
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, 0).unwrap();
        file.write_all_at(&sector, 0).unwrap();
        file.sync_all().unwrap();
    }
    let mut last = next();
    while !last.contains("\"error\"") {
        last = next();
    }
    assert!(
        last.contains("somebody may have written to the source"),
        "{last}"
    );
    assert_eq!(child.wait().unwrap().code(), Some(3));

    // One is missing: what is named is copied whole, and said not to be whole.
    forget(&scene.loops);
    scene.loops.pop();
    let report = backup(&[&first]).expect(0).last();
    assert_eq!(report["grade"], "crash");
    assert_eq!(report["volumes"].as_array().unwrap().len(), 1);
    let warning = report["warnings"][0].as_str().unwrap();
    assert!(warning.contains("one of the 3 devices"), "{warning}");
}

#[test]
fn privileged_a_twin_is_refused() {
    needs_root!();
    let (scene, file) = filled("", &mut Rng(seed()));
    let image = scene.path("image");
    let (target, clone) = (scene.path("target"), scene.path("clone"));
    program::run(["backup".as_ref(), &*file, "-o".as_ref(), &image]).expect(0);
    let restore = |target: &Path, more: &[&str]| {
        let args = ["restore".as_ref(), "--yes".as_ref(), &*image, target];
        program::run(args.into_iter().chain(more.iter().map(Path::new)))
    };
    sparse_file(&clone, FileSource::open(&file).len().0);
    let device = LoopDevice::attach(&clone);
    // The only one that is visible.
    restore(device.path(), &[]).expect(0);
    // Onto itself.
    restore(device.path(), &[]).expect(0);
    // A file that is not attached is not visible.
    restore(&target, &[]).expect(0);
    let other = LoopDevice::attach(&file);
    let name = other.path().to_str().unwrap();
    for place in [device.path(), &clone] {
        restore(place, &[])
            .expect(3)
            .says("must not be there twice")
            .says(name);
        restore(place, &["--dry-run"]).expect(3);
    }
    let ended = program::run([
        "clone".as_ref(),
        other.path(),
        device.path(),
        "--yes".as_ref(),
    ]);
    ended.expect(3).says("must not be there twice");
    let args = ["clone".as_ref(), other.path(), &*target, "--yes".as_ref()];
    program::run(args).expect(0);
    {
        let _mount = Mount::new(other.path(), &scene.path("mnt"), "btrfs", "");
        restore(device.path(), &[]).expect(3);
    }
    restore(device.path(), &["--allow-twin"]).expect(0);
    // The copies of a superblock that are left of one that was there are not one.
    run("wipefs", ["-q", "-a", name]);
    restore(device.path(), &[]).expect(0);
    restore(&clone, &[]).expect(0);
    let source = device.path();
    let args = ["clone", "--yes", "--allow-twin"].map(Path::new);
    program::run(args.into_iter().chain([source, other.path()])).expect(0);
    forget(&[device, other]);
}
