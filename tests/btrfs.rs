//! The map of btrfs, on one device and on several, against the tools that make and check it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{self, Condition, DirtyReason, Opened};
use holdstill::read_at::ReadAt;

use crate::common::btrfs::{
    Making, Scene, fill, forget, is_known, making, mount, number_after, size_for,
};
use crate::common::btrfs_chunks::{copies_of, printed_chunks};
use crate::common::volume::{
    digests, digests_in_ext4, direct_copy, ext4, map, poison, poisoned_file, populate,
};
use crate::common::walking::walk;
use crate::common::{
    FileSource, LoopDevice, Mount, Rng, count, holdstill as program, needs_root, run, seed, shell,
    sparse_file, temp_dir,
};

/// Every profile, kind of checksum and feature at least once.
const EACH_ONCE: &[Making] = &[
    Making {
        after: "btrfs quota enable $1; btrfs quota rescan -w $1",
        ..making("default, with quotas", 1, "")
    },
    making("mixed, xxhash", 1, "-M --csum xxhash"),
    Making {
        before: "yes | btrfstune -m $1",
        ..making(
            "64k, sha256, metadata UUID, data dup",
            1,
            "-n 65536 --csum sha256 -d dup",
        )
    },
    Making {
        mount: "space_cache=v1",
        ..making(
            "4k, blake2, single, as it once was",
            1,
            "-n 4096 --csum blake2 -m single -O ^no-holes,^extref,^skinny-metadata -R ^free-space-tree",
        )
    },
    Making {
        after: "btrfs filesystem resize -32M $1; btrfs balance start -f -mconvert=single,limit=1 $1",
        ..making("smaller than its device, two profiles", 1, "")
    },
    making("raid1", 2, "-d raid1 -m raid1"),
    making("raid0 and dup", 3, "-d raid0 -m dup"),
    making("raid10", 4, "-d raid10 -m raid10"),
    making("block group tree", 2, "-O block-group-tree -d raid0"),
    Making {
        after: "btrfs balance start -dconvert=single,limit=1 $1",
        ..making("raid1c3 and raid1c4", 4, "-d raid1c3 -m raid1c4")
    },
];

/// The same one by one.
const ALL: &[Making] = &[
    making("default", 1, ""),
    making("xxhash", 1, "--csum xxhash"),
    making("sha256", 1, "--csum sha256"),
    making("blake2", 1, "--csum blake2"),
    making("mixed", 1, "-M"),
    making("mixed, dup", 1, "-M -d dup -m dup"),
    making("4k", 1, "-n 4096"),
    making("64k", 1, "-n 65536"),
    making("single", 1, "-m single -d single"),
    making("data dup", 1, "-d dup"),
    making("quota", 1, "-R quota"),
    making("simple quotas", 1, "-O squota"),
    making("block group tree", 1, "-O block-group-tree"),
    making("no free-space tree", 1, "-R ^free-space-tree"),
    Making {
        mount: "space_cache=v1",
        ..making("cache files", 1, "-R ^free-space-tree")
    },
    making("no skinny metadata", 1, "-O ^skinny-metadata"),
    making("holes, few references", 1, "-O ^no-holes,^extref"),
    Making {
        before: "yes | btrfstune -m $1",
        ..making("metadata UUID", 1, "")
    },
    Making {
        before: "yes | btrfstune -u -f $1",
        ..making("another UUID", 1, "")
    },
    making("raid1 of 3", 3, "-d raid1 -m raid1"),
    making("raid0 of 2", 2, "-d raid0 -m raid0"),
    making("raid0 of 4", 4, "-d raid0 -m raid1"),
    making("raid10 of 4, 64k", 4, "-d raid10 -m raid10 -n 65536"),
    making("raid1c3", 3, "-d raid1c3 -m raid1c3"),
    making("raid1c4", 4, "-d raid1c4 -m raid1c4"),
    making("one after the other", 3, "-d single -m raid1"),
    making("mixed raid1", 2, "-M -d raid1 -m raid1"),
    Making {
        after: "btrfs device remove 2 $1",
        ..making("one removed", 2, "-d single -m dup")
    },
    Making {
        after: "btrfs balance start -f -dconvert=raid1 -mconvert=raid0 $1",
        ..making("converted", 2, "-d single -m raid1")
    },
];

/// What is in use on each device, by what the filesystem's own tools print of its trees.
fn used_by_dump_tree(devices: &[&Path]) -> Vec<ExtentSet> {
    let dump = |tree: &str| {
        let args = ["inspect-internal", "dump-tree", "-t", tree].map(Path::new);
        run("btrfs", args.into_iter().chain(devices.iter().copied()))
    };
    let of_super = |device: &Path, name: &str| {
        let args = ["inspect-internal", "dump-super"].map(Path::new);
        let text = run("btrfs", args.into_iter().chain([device]));
        let mut lines = text.lines();
        lines
            .find_map(|line| number_after(line, name))
            .unwrap_or_else(|| panic!("no {name}: {text}"))
    };
    let node = of_super(devices[0], "nodesize");
    let ids: Vec<u64> = devices
        .iter()
        .map(|device| of_super(device, "dev_item.devid"))
        .collect();
    let mut used: Vec<ExtentSet> = devices
        .iter()
        .map(|device| {
            let len = FileSource::open(device).len().0;
            let total = of_super(device, "dev_item.total_bytes");
            let mut used = ExtentSet::new();
            used.insert(Extent::new(0, 1 << 20));
            for copy in [64 << 20, 256 << 30] {
                if copy < total {
                    used.insert(Extent::new(copy, 4096));
                }
            }
            used.insert(Extent::new(total, len - total));
            used
        })
        .collect();
    let chunks = printed_chunks(devices);
    let mut add = |devid: u64, at: u64, len: u64| {
        let index = ids.iter().position(|id| *id == devid).unwrap();
        used[index].insert(Extent::new(at, len));
    };
    for line in dump("extent").lines() {
        // Keys stand in other lines, too: of nodes, and of what a listed block begins with.
        let item = line.trim_start().starts_with("item ").then_some(line);
        let Some((_, key)) = item.and_then(|line| line.split_once(" key (")) else {
            continue;
        };
        let words: Vec<&str> = key.split([' ', ')']).collect();
        let start: u64 = words[0].parse().unwrap_or(0);
        let len = match words[1] {
            "EXTENT_ITEM" => words[2].parse().unwrap(),
            "METADATA_ITEM" => node,
            _ => continue,
        };
        // Sector by sector, as simple as can be.
        for address in (start..start + len).step_by(4096) {
            for (devid, place) in copies_of(&chunks, address) {
                add(devid, place, 4096);
            }
        }
    }
    used
}

/// Our map of each device.
fn maps(devices: &[&Path]) -> Vec<ExtentSet> {
    let sources: Vec<Arc<dyn ReadAt>> = devices
        .iter()
        .map(|path| Arc::new(FileSource::open(path)) as Arc<dyn ReadAt>)
        .collect();
    let one = |own: usize| {
        let others = sources.iter().enumerate().filter(|(n, _)| *n != own);
        let others: Vec<_> = others.map(|(_, source)| Arc::clone(source)).collect();
        let opened = fs::open_with(sources[own].as_ref(), &others).unwrap();
        let Opened::Known(filesystem) = opened else {
            panic!("{opened:?}");
        };
        assert_eq!(filesystem.condition(), Condition::Clean);
        let (used, result) = walk(filesystem.as_ref(), sources[own].as_ref());
        assert_eq!(result.unwrap().warnings, [""; 0]);
        used
    };
    (0..sources.len()).map(one).collect()
}

/// Bytes in use by the kernel's account, each copy counted.
fn used_by_kernel(dir: &Path) -> u64 {
    let args = ["filesystem", "usage", "-b"].map(Path::new);
    let text = run("btrfs", args.into_iter().chain([dir]));
    let line = text.lines().find_map(|line| number_after(line, "Used:"));
    line.unwrap_or_else(|| panic!("{text}"))
}

/// Nothing is wrong with a filesystem, and its files are what they should be.
fn check_whole(loops: &[LoopDevice], dir: &Path, expected: &BTreeMap<PathBuf, String>) {
    let args = ["check", "--readonly", "--check-data-csum"].map(Path::new);
    run("btrfs", args.into_iter().chain([loops[0].path()]));
    {
        let mount = mount(loops, dir, "ro");
        let args = ["scrub", "start", "-B", "-r"].map(Path::new);
        let scrub = run("btrfs", args.into_iter().chain([mount.dir()]));
        assert!(scrub.contains("no errors found"), "{scrub}");
        assert_eq!(&digests(mount.dir()), expected);
    }
    forget(loops);
}

/// Makes, fills, images and restores a filesystem, if the installed tools know its features.
fn check(making: &Making, rng: &mut Rng, bytes: u64) {
    println!("{}", making.name);
    if !is_known(making) {
        return;
    }
    let size = size_for(making);
    let mut scene = Scene::make(making);
    let (expected, used) = {
        let mount = scene.mount(making.mount);
        fill(mount.dir(), rng, bytes);
        if !making.after.is_empty() {
            let dir = mount.dir().display();
            shell(format!("set -- {dir}; {{ {}; }} > /dev/null", making.after));
        }
        let expected = digests(mount.dir());
        run("sync", [Path::new("-f"), mount.dir()]);
        (expected, used_by_kernel(mount.dir()))
    };
    // One may have been removed.
    let is_member = |path: &&Path| fs::member(&FileSource::open(path)).unwrap().is_some();
    let paths = scene.loops.iter().map(LoopDevice::path);
    let devices: Vec<&Path> = paths.filter(is_member).collect();
    let ours = maps(&devices);
    assert_eq!(ours, used_by_dump_tree(&devices), "{}", making.name);

    let image = scene.path("image");
    let args = [
        "backup".as_ref(),
        devices[0],
        "-o".as_ref(),
        &image,
        "--json".as_ref(),
    ];
    let report = program::run(args).expect(0).last();
    assert_eq!(
        (&report["grade"], &report["freeze"]),
        (&"clean".into(), &"offline".into())
    );
    assert_eq!(report["warnings"], serde_json::json!([]));
    let volumes = report["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), devices.len());
    for (volume, ours) in volumes.iter().zip(&ours) {
        assert_eq!(volume["used_bytes"], ours.bytes().0);
        assert_eq!(
            (&volume["fs"], &volume["label"]),
            (&"btrfs".into(), &"label".into())
        );
    }
    // Reserved, superblocks, and what is behind the end of a smaller filesystem, are not counted.
    let fixed: u64 = ours
        .iter()
        .map(|used| {
            let end = used.runs().last().filter(|run| run.end().0 == size);
            (1 << 20) + 4096 + end.map_or(0, |run| run.len.0)
        })
        .sum();
    let copied: u64 = ours.iter().map(|used| used.bytes().0).sum();
    assert!(
        copied - fixed <= used + used / 50,
        "{copied}, {fixed}, {used}"
    );

    let count = devices.len();
    forget(&scene.loops);
    scene.loops.clear();
    let mut args: Vec<OsString> = vec!["restore".into(), "--yes".into(), "--verify".into()];
    args.push(image.clone().into());
    let mut targets = Vec::new();
    for number in 1..=count {
        let target = scene.path(&format!("target{number}"));
        poisoned_file(&target, size);
        args.extend([
            "--map".into(),
            format!("{number}={}", target.display()).into(),
        ]);
        targets.push(target);
    }
    program::run(args).expect(0);
    let loops: Vec<LoopDevice> = targets
        .iter()
        .map(|path| LoopDevice::attach(path))
        .collect();
    check_whole(&loops, &scene.path("mnt"), &expected);
}

/// Each of [`EACH_ONCE`] with one device, or with several.
fn check_each_once(is_one: bool) {
    let mut rng = Rng(seed());
    for making in EACH_ONCE {
        if (making.devices == 1) == is_one {
            check(making, &mut rng, count(5, 40) << 20);
        }
    }
}

#[test]
fn privileged_the_map_is_what_dump_tree_says_and_a_restore_is_whole() {
    needs_root!();
    check_each_once(true);
}

#[test]
fn privileged_so_it_is_on_several_devices() {
    needs_root!();
    check_each_once(false);
}

#[test]
fn privileged_every_feature_by_itself() {
    needs_root!();
    let mut rng = Rng(seed());
    for making in rng.clone().some(ALL, count(1, 1000)) {
        check(making, &mut rng, count(5, 40) << 20);
    }
}

#[test]
fn a_sparse_volume_has_its_third_superblock() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    sparse_file(&image, (256 << 30) + (9 << 20));
    let args = ["-q", "-K"].map(Path::new).into_iter();
    run("mkfs.btrfs", args.chain([&*image]));
    let ours = maps(&[&image]);
    assert_eq!(ours, used_by_dump_tree(&[&image]));
    assert!(ours[0].covers(Extent::new(256 << 30, 4096)));
    assert!(ours[0].bytes().0 < 16 << 20);
}

#[test]
fn a_filesystem_converted_from_ext4_is_mapped_and_goes_back() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    populate(&tree, &mut Rng(seed()), 6 << 20);
    ext4(&image, 256 << 20, "-b 4096", Some(&tree));
    let expected = digests_in_ext4(&image, dir.path());
    run("btrfs-convert", [Path::new("--no-progress"), &image]);
    let ours = maps(&[&image]);
    assert_eq!(ours, used_by_dump_tree(&[&image]));
    poison(&image, &ours[0], FileSource::open(&image).len());
    let args = ["check", "--readonly", "--check-data-csum"].map(Path::new);
    run("btrfs", args.into_iter().chain([&*image]));
    // Back to what it was: all of that has to be there, too.
    run("btrfs-convert", [Path::new("--rollback"), &image]);
    run("e2fsck", [Path::new("-fn"), &image]);
    assert_eq!(digests_in_ext4(&image, dir.path()), expected);
}

#[test]
fn privileged_a_log_is_not_passed_over() {
    needs_root!();
    let scene = Scene::make(&making("", 1, ""));
    let copied = scene.path("copied");
    let frozen = scene.path("frozen");
    let written = {
        let mount = scene.mount("commit=300");
        populate(mount.dir(), &mut Rng(seed()), 2 << 20);
        run("sync", [Path::new("-f"), mount.dir()]);
        let file = File::create(mount.dir().join("flushed")).unwrap();
        let mut content = vec![0; 5 << 20];
        Rng(seed()).fill(&mut content);
        file.write_all_at(&content, 0).unwrap();
        file.sync_all().unwrap();
        direct_copy(scene.loops[0].path(), &copied);
        {
            let _frozen = mount.freeze();
            direct_copy(scene.loops[0].path(), &frozen);
        }
        blake3::hash(&content).to_string()
    };
    let conditions = [&copied, &frozen].map(|path| {
        let Opened::Known(filesystem) = fs::open(&FileSource::open(path)).unwrap() else {
            panic!();
        };
        filesystem.condition()
    });
    let reason = DirtyReason::Log;
    assert_eq!(conditions, [Condition::Dirty { reason }, Condition::Clean]);
    let used = map(&frozen);
    assert_eq!(used.walk.warnings, [""; 0]);
    poison(&frozen, &used.used, used.volume.len);

    let image = scene.path("image");
    let ended = program::run(["backup".as_ref(), &*copied, "-o".as_ref(), &image]);
    ended
        .expect(0)
        .says("would have to be replayed")
        .says("all blocks");
    let target = scene.path("target");
    poisoned_file(&target, size_for(&making("", 1, "")));
    program::run(["restore".as_ref(), "--yes".as_ref(), &*image, &target]).expect(0);
    forget(&scene.loops);
    let mut scene = scene;
    scene.loops.clear();
    // With its log, or frozen: what was flushed is there.
    for file in [&target, &frozen] {
        let device = LoopDevice::attach(file);
        {
            let mount = Mount::new(device.path(), &scene.path("mnt"), "btrfs", "");
            assert_eq!(digests(mount.dir())[Path::new("flushed")], written);
            let args = ["scrub", "start", "-B"].map(Path::new);
            let scrub = run("btrfs", args.into_iter().chain([mount.dir()]));
            assert!(scrub.contains("no errors found"), "{scrub}");
        }
        forget(&[device]);
    }
}
