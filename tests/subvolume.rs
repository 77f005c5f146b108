//! An image of one subvolume: what of its btrfs has no data is gone after a restore.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::common::btrfs::{Scene, check, fill, forget, ids, making, mount};
use crate::common::holdstill as program;
use crate::common::reseal::{records, reseal};
use crate::common::scene::assert_no_signature;
use crate::common::volume::{digests, populate};
use crate::common::{
    FileSource, LoopDevice, Mount, Rng, needs_root, run, seed, shell, sparse_file, spawn,
};
use holdstill::read_at::ReadAt;

/// What files are full of whose data an image of one subvolume would not hold.
const UNWANTED: &[u8; 16] = b"of no use here!\n";

/// Fills a folder with files whose data is not wanted.
fn fill_unwanted(dir: &Path, files: u32) {
    for number in 0..files {
        let bytes = UNWANTED.repeat(4096 * (1 + number as usize % 40) / 16);
        std::fs::write(dir.join(format!("unwanted{number}")), bytes).unwrap();
    }
}

/// Overwrites all data that is not wanted, so that only metadata is left of it.
fn take_unwanted_data(device: &Path) -> usize {
    let file = File::options().read(true).write(true).open(device).unwrap();
    let len = FileSource::open(device).len().0;
    let unwanted = UNWANTED.repeat(4096 / 16);
    let (mut taken, mut bytes) = (0, vec![0; 1 << 20]);
    let mut at = 0;
    while at < len {
        let some = (len - at).min(1 << 20) as usize;
        file.read_exact_at(&mut bytes[..some], at).unwrap();
        for (number, block) in bytes[..some].chunks(4096).enumerate() {
            if block == unwanted {
                file.write_all_at(&[0xa5; 4096], at + number as u64 * 4096)
                    .unwrap();
                taken += 1;
            }
        }
        at += some as u64;
    }
    file.sync_all().unwrap();
    taken
}

/// Makes an image of a whole filesystem one of one subvolume: what its manifests say of it takes the
/// room of what they say about where it came from.
fn make_partial(image: &Path, id: u64, path: &str) {
    let mut bytes = std::fs::read(image).unwrap();
    for at in records(&bytes) {
        if bytes[at + 4] != 1 {
            continue;
        }
        let number =
            |from: usize| u32::from_le_bytes(bytes[from..from + 4].try_into().unwrap()) as usize;
        let begin = at + 96 + number(at + 48) * 8 + number(at + 52) * 32 + number(at + 64);
        let end = begin + number(at + 60);
        let mut manifest: Value = serde_json::from_slice(&bytes[begin..end]).unwrap();
        for name in ["run_id", "tool", "created"] {
            manifest[name] = "".into();
        }
        for (n, volume) in (1..).zip(manifest["volumes"].as_array_mut().unwrap()) {
            volume["path"] = format!("{n}").into();
            volume["subvolume"] = serde_json::json!({ "id": id, "path": path });
        }
        let mut text = manifest.to_string().into_bytes();
        assert!(text.len() <= end - begin, "no room");
        text.resize(end - begin, b' ');
        bytes[begin..end].copy_from_slice(&text);
    }
    // Incompatible, bit 4.
    bytes[40] |= 1 << 4;
    reseal(&mut bytes);
    std::fs::write(image, bytes).unwrap();
}

fn id_of(subvolume: &Path) -> u64 {
    let args = ["inspect-internal", "rootid"].map(Path::new);
    let id = run("btrfs", args.into_iter().chain([subvolume]));
    id.trim().parse().unwrap()
}

/// The paths of all subvolumes.
fn subvolumes(mount: &Mount) -> Vec<String> {
    let args = ["subvolume", "list"].map(Path::new).into_iter();
    let text = run("btrfs", args.chain([mount.dir()]));
    let paths = text
        .lines()
        .map(|line| line.split_once(" path ").unwrap().1);
    paths.map(str::to_owned).collect()
}

/// Access, change and mode of every folder: removing something from one changes it.
fn folders(dir: &Path) -> String {
    shell(format!(
        "cd {}; find . -xdev -type d -printf '%p %m %T@\\n' | sort",
        dir.display()
    ))
}

/// A filesystem with `outer/way/kept`, and much that is in the way of taking everything else away.
fn build(dir: &Path, rng: &mut Rng) -> BTreeMap<PathBuf, String> {
    let script = |text: &str| shell(format!("cd {}; {text}", dir.display()));
    fill(dir, rng, 2 << 20);
    script(
        "btrfs -q subvolume create outer; mkdir outer/way outer/.holdstill-0 outer/way/.holdstill-0
        btrfs -q subvolume create outer/way/kept
        btrfs -q subvolume create outer/way/other; btrfs -q subvolume create outer/way/other/inner
        mkdir .holdstill-0 .holdstill-1; touch .holdstill-1/file",
    );
    fill_unwanted(dir, 50);
    fill_unwanted(&dir.join("outer/way/.holdstill-0"), 50);
    fill_unwanted(&dir.join("outer/way/other/inner"), 50);
    populate(&dir.join("outer/way/kept"), rng, 4 << 20);
    script(
        "cd outer/way/kept; mkdir holder fixed
        btrfs -q subvolume create holder/nested; btrfs -q subvolume create fixed/nested
        chattr +i fixed; touch -d 2001-01-01 holder
        cd ../../..
        # What cannot just be removed: fixed, read-only, very deep, of every kind, and the default.
        mkdir -p fixed/inside; touch fixed/file; chattr +i fixed/file fixed/inside fixed; touch log; chattr +a log
        mkfifo pipe; mknod null c 1 3; ln -s nowhere link
        btrfs -q subvolume snapshot outer copy; btrfs -q subvolume snapshot -r outer copy/again
        btrfs -q subvolume create ro; btrfs -q subvolume create ro/in; btrfs property set ro ro true
        btrfs property set outer ro true
        btrfs subvolume set-default copy
        mkdir deep; cd deep
        name=$(printf %0200d 0)
        for _ in $(seq 60); do mkdir $name; cd $name; done; touch bottom",
    );
    fill_unwanted(&dir.join("copy"), 50);
    run("sync", [Path::new("-f"), dir]);
    let mut kept = digests(&dir.join("outer/way/kept"));
    // Subvolumes in it are others.
    kept.retain(|path, _| !path.to_string_lossy().contains("/nested/"));
    kept
}

fn restore<'a>(image: &Path, more: impl IntoIterator<Item = &'a OsStr>) -> program::Run {
    let args = ["restore", "--yes", "--json"].map(OsString::from);
    let more = more.into_iter().map(OsString::from);
    program::run(args.into_iter().chain([image.into()]).chain(more))
}

/// Nothing but the kept subvolume is on a restored target.
fn assert_pruned(mount: &Mount, kept: &BTreeMap<PathBuf, String>, dirs: &str) {
    assert_eq!(subvolumes(mount), ["outer", "outer/way/kept"]);
    let find = |dir: &str| {
        shell(format!(
            "cd {}/{dir}; find . -mindepth 1 -maxdepth 1 | sort",
            mount.dir().display()
        ))
    };
    assert_eq!(find(""), "./outer\n");
    assert_eq!(find("outer"), "./way\n");
    assert_eq!(find("outer/way"), "./kept\n");
    let restored = mount.dir().join("outer/way/kept");
    assert_eq!(digests(&restored), *kept);
    assert_eq!(folders(&restored), dirs);
    let args = ["property", "get"].map(Path::new).into_iter();
    let outer = mount.dir().join("outer");
    let text = run("btrfs", args.chain([&*outer, "ro".as_ref()]));
    assert_eq!(text.trim(), "ro=true");
    let args = ["subvolume", "get-default"].map(Path::new).into_iter();
    let text = run("btrfs", args.chain([mount.dir()]));
    assert_eq!(text.trim(), "ID 5 (FS_TREE)");
    assert!(shell(format!("lsattr -d {}/fixed", restored.display())).contains('i'));
}

/// Folders of the subvolume that is kept, those of its subvolumes left out.
fn folders_kept(dir: &Path) -> String {
    let all = folders(&dir.join("outer/way/kept"));
    let own = all.lines().filter(|line| !line.contains("/nested "));
    own.map(|line| format!("{line}\n")).collect()
}

#[test]
fn privileged_only_the_wanted_subvolume_is_left() {
    needs_root!();
    let mut scene = Scene::make(&making("", 1, ""));
    let (kept, dirs, id);
    {
        let mount = scene.mount("");
        kept = build(mount.dir(), &mut Rng(seed()));
        dirs = folders_kept(mount.dir());
        id = id_of(&mount.dir().join("outer/way/kept"));
    }
    let source = scene.loops[0].path().to_owned();
    assert!(take_unwanted_data(&source) > 1000);
    let (old, _) = ids(&source, 2);
    let image = scene.path("image");
    program::run(["backup".as_ref(), &*source, "-o".as_ref(), &image]).expect(0);
    make_partial(&image, id, "outer/way/kept");
    program::run([Path::new("verify"), &image]).expect(0);
    let shown = program::run([Path::new("inspect"), &image]).expect(0);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("only subvolume outer/way/kept"), "{shown}");

    // A raw file, which is created; the original is there.
    let target = scene.path("target");
    let report = restore(&image, [target.as_os_str(), "--verify".as_ref()])
        .expect(0)
        .last();
    assert_eq!(report["targets"][0]["subvolume"]["id"], id);
    assert_eq!(report["targets"][0]["subvolume"]["path"], "outer/way/kept");
    let attached = ["--associated".as_ref(), target.as_os_str()];
    assert_eq!(run("losetup", attached), "");
    forget(&scene.loops);
    scene.loops.clear();
    assert_eq!(ids(&target, 2), (old.clone(), old.clone()));
    assert_eq!(
        run(
            "btrfs",
            [Path::new("filesystem"), "label".as_ref(), &target]
        )
        .trim(),
        "label"
    );
    check(&target);
    {
        let device = LoopDevice::attach(&target);
        let mount = Mount::new(device.path(), &scene.path("mnt"), "btrfs", "");
        assert_pruned(&mount, &kept, &dirs);
        drop(mount);
        forget(&[device]);
    }

    // A device, beside the mounted original.
    let original = LoopDevice::attach(&scene.path("device1"));
    let mounted = Mount::new(original.path(), &scene.path("original"), "btrfs", "");
    let device = LoopDevice::attach(&target);
    restore(&image, [device.path().as_os_str()]).expect(3);
    let options = [device.path().as_os_str(), "--new-ids".as_ref()];
    let report = restore(&image, options).expect(0).last();
    let new = report["targets"][0]["new_uuid"].as_str().unwrap();
    assert_eq!(ids(device.path(), 2), (new.to_owned(), old.clone()));
    check(device.path());
    {
        let mount = Mount::new(device.path(), &scene.path("mnt"), "btrfs", "");
        assert_pruned(&mount, &kept, &dirs);
    }
    // A twin, as asked for.
    let options = [device.path().as_os_str(), "--allow-twin".as_ref()];
    restore(&image, options).expect(0);
    assert_eq!(ids(device.path(), 2), (old.clone(), old));
    drop(mounted);
    forget(&[device, original]);
}

#[test]
fn privileged_a_subvolume_of_several_devices_is_restored() {
    needs_root!();
    let mut scene = Scene::make(&making("", 2, "-d raid0 -m raid1"));
    let (kept, dirs, id);
    {
        let mount = scene.mount("");
        kept = build(mount.dir(), &mut Rng(seed()));
        dirs = folders_kept(mount.dir());
        id = id_of(&mount.dir().join("outer/way/kept"));
    }
    let paths: Vec<PathBuf> = scene.loops.iter().map(|it| it.path().to_owned()).collect();
    assert!(
        paths
            .iter()
            .map(|path| take_unwanted_data(path))
            .sum::<usize>()
            > 1000
    );
    let image = scene.path("image");
    program::run(["backup".as_ref(), &*paths[0], "-o".as_ref(), &image]).expect(0);
    make_partial(&image, id, "outer/way/kept");
    let original = scene.mount("subvolid=5");
    // One to a device, the other to a file.
    let files = [1, 2].map(|n| scene.path(&format!("target{n}")));
    for file in &files {
        sparse_file(file, FileSource::open(&scene.path("device1")).len().0);
    }
    let first = LoopDevice::attach(&files[0]);
    let maps = [first.path(), &files[1]].map(Path::display);
    let maps: Vec<String> = (1..)
        .zip(maps)
        .map(|(n, path)| format!("--map={n}={path}"))
        .collect();
    let ended = restore(&image, [maps[0].as_ref(), OsStr::new("--new-ids")])
        .expect(3)
        .last();
    assert!(
        ended["message"]
            .as_str()
            .unwrap()
            .contains("volume 2 is left out")
    );
    let options = [maps[0].as_ref(), maps[1].as_ref(), OsStr::new("--new-ids")];
    let report = restore(&image, options).expect(0).last();
    assert_eq!(
        report["targets"][0]["new_uuid"],
        report["targets"][1]["new_uuid"]
    );
    drop(original);
    forget(&scene.loops);
    scene.loops.clear();
    let targets = [first, LoopDevice::attach(&files[1])];
    check(targets[0].path());
    {
        let mount = mount(&targets, &scene.path("mnt"), "");
        assert_pruned(&mount, &kept, &dirs);
    }
    check(targets[1].path());
    forget(&targets);
}

/// An image of a subvolume that takes a moment to be left alone.
fn slow(scene: &Scene) -> PathBuf {
    let id;
    {
        let mount = scene.mount("");
        shell(format!(
            "cd {}; btrfs -q subvolume create kept; head -c 1M /dev/urandom > kept/file
            for a in $(seq 40); do mkdir $a; for b in $(seq 100); do echo $a > $a/$b; done; done
            for a in $(seq 200); do btrfs -q subvolume snapshot kept s$a; done",
            mount.dir().display()
        ));
        id = id_of(&mount.dir().join("kept"));
    }
    let image = scene.path("image");
    let args = ["backup", "-o"].map(Path::new).into_iter();
    program::run(args.chain([&*image, scene.loops[0].path()])).expect(0);
    make_partial(&image, id, "kept");
    image
}

fn first_superblock(target: &Path) -> Vec<u8> {
    let mut superblock = vec![0; 4096];
    let file = File::open(target).unwrap();
    file.read_exact_at(&mut superblock, 64 << 10).unwrap();
    superblock
}

/// Starts a restore and waits until it begins to remove what is not wanted.
fn begin(command: &mut Command, target: &Path) -> std::process::Child {
    let mut child = spawn(command);
    while !first_superblock(target)[0x40..].starts_with(b"_BHRfS_M") {
        if let Some(status) = child.try_wait().unwrap() {
            let mut said = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut said)
                .unwrap();
            panic!("it never began: {status}: {said}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

#[test]
fn privileged_a_restore_of_a_subvolume_that_ends_early_is_not_taken_for_one() {
    needs_root!();
    let mut scene = Scene::make(&making("", 1, ""));
    let image = slow(&scene);
    let (old, _) = ids(scene.loops[0].path(), 2);
    forget(&scene.loops);
    scene.loops.clear();
    let file = scene.path("target");
    let size = FileSource::open(&scene.path("device1")).len().0;
    sparse_file(&file, size);
    let device = LoopDevice::attach(&file);
    for target in [device.path(), &file] {
        let args = ["restore", "--yes"].map(PathBuf::from);
        let args = args.into_iter().chain([image.clone(), target.to_owned()]);
        let fresh = || {
            sparse_file(&file, size);
            run(
                "dd",
                [
                    "if=/dev/zero",
                    "bs=1M",
                    "count=1",
                    "conv=notrunc,fsync",
                    &format!("of={}", target.display()),
                ],
            );
        };
        // Interrupted.
        for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
            fresh();
            let mut command = program::command(args.clone());
            let child = begin(&mut command, target);
            kill(Pid::from_raw(child.id() as i32), signal).unwrap();
            program::wait(&command, child).expect(code);
            assert_no_signature(target);
        }
        // Killed: what is left has an id of its own, and says what it is.
        fresh();
        let mut child = begin(&mut program::command(args.clone()), target);
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        let shown = run("blkid", [Path::new("-p"), target]);
        assert!(
            shown.contains("holdstill: not restored yet") && !shown.contains(&old),
            "{shown}"
        );
        // The next one begins from the start.
        program::run(args).expect(0);
        assert_eq!(ids(target, 2), (old.clone(), old.clone()));
        check(target);
    }

    // What it names is not there.
    make_partial(&image, 4711, "none");
    let args = ["restore", "--yes"].map(Path::new).into_iter();
    let ended = program::run(args.chain([&*image, device.path()]));
    ended.expect(1).says("holds no subvolume 4711");
    assert_no_signature(device.path());
    let fresh = scene.path("fresh");
    program::run([Path::new("restore"), &image, &fresh]).expect(1);
    assert!(!fresh.exists());
    forget(&[device]);
}

/// Wherever the wanted one lies: the top level itself, right below it as the default, read-only with
/// another inside. From a stream, and from a damaged image.
#[test]
fn privileged_every_subvolume_can_be_the_wanted_one() {
    needs_root!();
    let mut scene = Scene::make(&making("", 1, ""));
    let mut wanted = Vec::new();
    {
        let mount = scene.mount("");
        let dir = mount.dir();
        fill(dir, &mut Rng(seed()), 2 << 20);
        shell(format!(
            "cd {}; btrfs -q subvolume create ro; echo text > ro/file; btrfs -q subvolume create ro/in
            btrfs property set ro ro true; btrfs subvolume set-default sub; sync -f .",
            dir.display()
        ));
        for path in ["", "sub", "sub/nested", "snapshot", "ro", "ro/in"] {
            let root = dir.join(path);
            let all = ["sub", "sub/nested", "snapshot", "ro", "ro/in"].map(Path::new);
            let path = Path::new(path);
            let inside = |other: &Path| other != path && other.starts_with(path);
            let others = all.into_iter().filter(|other| inside(other));
            let others: Vec<PathBuf> = others.map(|it| dir.join(it)).collect();
            let mut kept = digests(&root);
            kept.retain(|file, _| {
                !others
                    .iter()
                    .any(|other| root.join(file).starts_with(other))
            });
            let path = path.to_str().unwrap();
            wanted.push((path, id_of(&root), kept));
        }
    }
    let image = scene.path("image");
    let args = ["backup", "-o"].map(Path::new).into_iter();
    program::run(args.chain([&*image, scene.loops[0].path()])).expect(0);
    forget(&scene.loops);
    scene.loops.clear();
    let target = scene.path("target");
    for (path, id, kept) in wanted {
        println!("{path}");
        make_partial(&image, id, path);
        let args = ["restore", "--yes", "-"].map(Path::new).into_iter();
        program::run_from(&image, args.chain([&*target])).expect(0);
        check(&target);
        let device = LoopDevice::attach(&target);
        let mount = Mount::new(device.path(), &scene.path("mnt"), "btrfs", "subvolid=5");
        assert_eq!(digests(&mount.dir().join(path)), kept);
        let parts = Path::new(path)
            .ancestors()
            .filter(|it| !it.as_os_str().is_empty());
        let mut left: Vec<String> = parts.map(|it| it.display().to_string()).collect();
        left.sort();
        assert_eq!(subvolumes(&mount), left);
        let args = ["subvolume", "get-default"].map(Path::new).into_iter();
        let default = run("btrfs", args.chain([mount.dir()]));
        let expected = if path.starts_with("sub") {
            "path sub"
        } else {
            "FS_TREE"
        };
        assert!(default.contains(expected), "{default}");
        if path.starts_with("ro") {
            let args = ["property", "get"].map(Path::new).into_iter();
            let text = run(
                "btrfs",
                args.chain([&*mount.dir().join("ro"), "ro".as_ref()]),
            );
            assert_eq!(text.trim(), "ro=true");
        }
        drop(mount);
        forget(&[device]);
    }

    // What is damaged is not mounted: all is written that is whole, and that is said.
    let mut bytes = std::fs::read(&image).unwrap();
    let data = records(&bytes)
        .into_iter()
        .find(|at| bytes[at + 4] == 2)
        .unwrap();
    let next = records(&bytes).into_iter().find(|at| *at > data).unwrap();
    bytes[next - 16] ^= 1;
    std::fs::write(&image, bytes).unwrap();
    std::fs::remove_file(&target).unwrap();
    program::run([Path::new("restore"), &image, &target]).expect(4);
    assert!(!target.exists());
    let args = ["restore", "--salvage"].map(Path::new).into_iter();
    let ended = program::run(args.chain([&*image, &target])).expect(4);
    ended.says("all subvolumes are there, and the data of one");
    assert!(target.exists());
}
