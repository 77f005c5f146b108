//! A mounted btrfs as a source: by whichever name, it is the whole filesystem; but for the folder of a
//! subvolume, which is that subvolume alone.

use std::path::{Path, PathBuf};

use holdstill::source::{Medium, Source, whole};
use serde_json::Value;

use crate::common::btrfs::{Scene, making, mount};
use crate::common::{Mount, holdstill as program, needs_root, run, shell};

/// Three subvolumes, one within another, none of which is mounted yet.
fn make(devices: usize) -> Scene {
    let options = match devices {
        1 => "",
        _ => "-d raid1 -m raid1",
    };
    let scene = Scene::make(&making("", devices, options));
    let mount = scene.mount("");
    shell(format!(
        "cd {}; for name in @ @home @home/user; do btrfs -q subvolume create $name; done
        mkdir @/folder",
        mount.dir().display()
    ));
    drop(mount);
    scene
}

fn number_of(path: &Path) -> String {
    run(
        "lsblk",
        ["--nodeps", "-no", "MAJ:MIN"]
            .map(Path::new)
            .into_iter()
            .chain([path]),
    )
    .trim()
    .to_owned()
}

/// The device a name is resolved to, where that is said to be mounted, and its other devices.
fn resolve(path: &Path) -> (PathBuf, Option<PathBuf>, Vec<PathBuf>) {
    let source = Source::resolve(path.to_str().unwrap()).unwrap();
    let Medium::Device(device) = &source.medium else {
        panic!("{source:?}");
    };
    assert_eq!(device.number.to_string(), number_of(&source.path));
    let others = whole::siblings(&source).unwrap();
    (
        source.path,
        source.mount.map(|mount| mount.point),
        others.into_iter().map(|source| source.path).collect(),
    )
}

fn inspect(path: &Path) -> Value {
    program::run(["inspect".as_ref(), path, "--json".as_ref()])
        .expect(0)
        .last()
}

/// What speaks against a step, as `inspect` says.
fn objection(inspected: &Value, step: &str) -> String {
    let ladder = inspected["ladder"].as_array().unwrap();
    let found = ladder.iter().find(|report| report["step"] == step);
    found.unwrap()["objection"].as_str().unwrap().to_owned()
}

#[test]
fn privileged_the_mount_of_a_subvolume_names_the_whole_filesystem() {
    needs_root!();
    let scene = make(1);
    let device = scene.loops[0].path().to_owned();
    let at = |name: &str, options: &str| Mount::new(&device, &scene.path(name), "btrfs", options);
    let root = at("root", "subvol=@");
    let home = at("home dir", "subvol=@home");
    let expected = |point: &Path| (device.clone(), Some(point.to_owned()), Vec::new());
    for mount in [&root, &home] {
        assert_eq!(resolve(mount.dir()), expected(mount.dir()));
    }
    // All of it is mounted nowhere: any place will do for the device.
    assert_eq!(resolve(&device), expected(root.dir()));
    assert_eq!(resolve(&scene.path("device1")), expected(root.dir()));
    {
        // Where all of it is mounted it is seen best.
        let whole = at("whole", "subvolid=5");
        assert_eq!(resolve(&device), expected(whole.dir()));
        assert_eq!(resolve(root.dir()), expected(root.dir()));
    }

    // What only looks like a mount of a subvolume is none.
    let image = scene.path("image");
    let backup = |source: &Path, more: &[&str]| {
        let args = ["backup".as_ref(), "-o".as_ref(), &*image, source];
        program::run(args.into_iter().chain(more.iter().map(Path::new)))
    };
    let folder = scene.path("folder");
    std::fs::create_dir(&folder).unwrap();
    run(
        "mount",
        [Path::new("--bind"), &root.dir().join("folder"), &folder],
    );
    let bound = backup(&folder, &[]);
    run("umount", [&folder]);
    bound.expect(2).says("only a folder");
    let folder = root.dir().join("folder");
    backup(&folder, &[]).expect(2).says("not a mount point");

    // No step takes it for something else than it is.
    for source in [root.dir(), &device] {
        let inspected = inspect(source);
        assert_eq!(inspected["fs"], "btrfs");
        assert_eq!(inspected["mounted_at"].as_str(), root.dir().to_str());
        assert!(objection(&inspected, "offline").contains("mounted at"));
        assert!(objection(&inspected, "track").contains("mounted btrfs"));
        for step in ["track", "hold", "dm", "offline", "lvm", "zfs"] {
            backup(source, &["--freeze", step]).expect(3);
        }
    }
    assert!(!image.exists());
    drop((root, home));
    // Naming it twice, in whichever way, is naming it once.
    let file = scene.path("device1").display().to_string();
    let ended = backup(&device, &[&file, "--json"]).expect(0).last();
    assert_eq!(ended["grade"], "clean");
    assert_eq!(ended["volumes"].as_array().unwrap().len(), 1);
}

/// A subvolume where none is mounted is that subvolume alone, and not both at once.
#[test]
fn privileged_the_folder_of_a_subvolume_names_that_alone() {
    needs_root!();
    let scene = make(1);
    let device = scene.loops[0].path().to_owned();
    let at = |name: &str, options: &str| Mount::new(&device, &scene.path(name), "btrfs", options);
    let whole = at("whole", "subvolid=5");
    let home = at("home dir", "subvol=@home");
    let of_whole = |name: &str| whole.dir().join(name);
    let id = |folder: &Path| -> u64 {
        let args = ["inspect-internal", "rootid"].map(Path::new);
        let id = run("btrfs", args.into_iter().chain([folder]));
        id.trim().parse().unwrap()
    };
    let user = home.dir().join("user");
    for (folder, path) in [
        (of_whole("@"), "@"),
        (of_whole("@home"), "@home"),
        (of_whole("@home/user"), "@home/user"),
        (user.clone(), "@home/user"),
    ] {
        let source = Source::resolve(folder.to_str().unwrap()).unwrap();
        assert_eq!(source.path, device);
        let subvolume = source.subvolume.unwrap();
        assert_eq!((subvolume.id, &*subvolume.path), (id(&folder), path));
    }
    // Of what is mounted, by whichever subvolume, all is named.
    for folder in [whole.dir(), home.dir()] {
        let source = Source::resolve(folder.to_str().unwrap()).unwrap();
        assert_eq!(source.subvolume, None);
    }

    let image = scene.path("image");
    let backup = |sources: &[&Path]| {
        let args = ["backup", "--force", "--json", "-o"].map(Path::new);
        let places = std::iter::once(&*image).chain(sources.iter().copied());
        program::run(args.into_iter().chain(places))
    };
    // What is named as a whole already is not named again.
    for sources in [
        [whole.dir(), &*of_whole("@home")],
        [home.dir(), &user],
        [&device, &user],
    ] {
        let ended = backup(&sources).expect(0).last();
        assert_eq!(ended["volumes"].as_array().unwrap().len(), 1, "{ended}");
        let shown = program::run([Path::new("inspect"), &image, "--json".as_ref()]);
        let shown = shown.expect(0).last();
        let volume = &shown["manifest"]["volumes"][0];
        assert!(volume["subvolume"].is_null(), "{shown}");
        std::fs::remove_file(&image).unwrap();
    }
    for sources in [
        [&*of_whole("@home"), whole.dir()],
        [&*of_whole("@home"), &device],
        [&*of_whole("@home"), &*of_whole("@")],
        [&*of_whole("@home"), &user],
    ] {
        let ended = backup(&sources).expect(2).last();
        let message = ended["message"].as_str().unwrap();
        assert!(message.contains("one subvolume or all"), "{ended}");
        assert!(!image.exists());
    }
    // By two names it is the same one.
    let ended = backup(&[&of_whole("@home/user"), &user]).expect(0).last();
    assert_eq!(ended["volumes"].as_array().unwrap().len(), 1, "{ended}");
    let shown = program::run([Path::new("inspect"), &image, "--json".as_ref()]);
    let shown = shown.expect(0).last();
    let volume = &shown["manifest"]["volumes"][0];
    assert_eq!(volume["subvolume"]["path"], "@home/user", "{shown}");
}

#[test]
fn privileged_a_mounted_filesystem_is_all_its_devices() {
    needs_root!();
    let scene = make(3);
    let devices: Vec<_> = scene
        .loops
        .iter()
        .map(|device| device.path().to_owned())
        .collect();
    let mounted = mount(&scene.loops, &scene.path("home"), "subvol=@home");
    let point = mounted.dir();
    // One of them is shown where the mounts are listed, the others are not.
    for device in &devices {
        let others: Vec<_> = devices.iter().filter(|other| *other != device).collect();
        let (path, at, siblings) = resolve(device);
        assert_eq!((&path, at.as_deref()), (device, Some(point)));
        assert_eq!(siblings.iter().collect::<Vec<_>>(), others);
    }
    let (path, at, siblings) = resolve(point);
    assert_eq!(at.as_deref(), Some(point));
    let mut all = [siblings, vec![path]].concat();
    all.sort();
    let mut expected = devices.clone();
    expected.sort();
    assert_eq!(all, expected);
    let image = scene.path("image");
    for source in [point, &devices[0], &devices[2]] {
        let inspected = inspect(source);
        assert_eq!(inspected["siblings"].as_array().unwrap().len(), 2);
        assert_eq!(inspected["mounted_at"].as_str(), point.to_str());
        let args = ["backup", "--force", "--json", "-o"].map(Path::new);
        let ended = program::run(args.into_iter().chain([&*image, source]));
        let ended = ended.expect(0).last();
        assert_eq!(ended["freeze"], "btrfs");
        assert_eq!(ended["volumes"].as_array().unwrap().len(), 3, "{ended}");
    }
    drop(mounted);
    let (_, at, siblings) = resolve(&devices[1]);
    assert_eq!((at, siblings.len()), (None, 2));
}
