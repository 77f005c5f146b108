//! The map of btrfs, on one device and on several, against the tools that make and check it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{self, Condition, DirtyReason, Opened};
use holdstill::read_at::ReadAt;

use crate::common::volume::{
    copy, digests, digests_in_ext4, direct_copy, ext4, map, poison, poisoned_file, populate, walk,
};
use crate::common::{
    FileSource, LoopDevice, Mount, Rng, count, holdstill as program, needs_root, output, run, seed,
    shell, sparse_file, temp_dir,
};

/// Bytes of a device: not a whole number of sectors. Large tree blocks take large chunks, and none
/// becomes smaller than 256 MiB.
fn size_for(making: &Making) -> u64 {
    let is_large = making.options.contains("65536") || making.after.contains("resize");
    let mib = match is_large {
        true => 512,
        false => 256,
    };
    (mib << 20) + 3 * 512
}

/// How a filesystem is made.
struct Making {
    name: &'static str,
    devices: usize,
    /// For `mkfs.btrfs`.
    options: &'static str,
    /// For `mount`.
    mount: &'static str,
    /// Run on the first device, `$1`, before the first mount.
    before: &'static str,
    /// Run in the folder where it is mounted, `$1`, when it is full.
    after: &'static str,
}

const fn making(name: &'static str, devices: usize, options: &'static str) -> Making {
    Making {
        name,
        devices,
        options,
        mount: "",
        before: "",
        after: "",
    }
}

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

/// Devices of one filesystem over files, attached.
struct Scene {
    dir: tempfile::TempDir,
    loops: Vec<LoopDevice>,
}

impl Scene {
    fn make(making: &Making) -> Self {
        let dir = temp_dir();
        let mut loops = Vec::new();
        for number in 1..=making.devices {
            let file = dir.path().join(format!("device{number}"));
            sparse_file(&file, size_for(making));
            loops.push(LoopDevice::attach(&file));
        }
        let mut args: Vec<OsString> = vec!["-q".into(), "-f".into(), "-L".into(), "label".into()];
        args.extend(making.options.split_whitespace().map(OsString::from));
        args.extend(loops.iter().map(|device| device.path().into()));
        run("mkfs.btrfs", args);
        let scene = Self { dir, loops };
        if !making.before.is_empty() {
            let device = scene.loops[0].path().display();
            shell(format!("set -- {device}; {} > /dev/null", making.before));
        }
        scene
    }

    fn mount(&self, options: &str) -> Mount {
        mount(&self.loops, &self.dir.path().join("mnt"), options)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        forget(&self.loops);
    }
}

/// Makes the kernel forget devices: it would take them for parts of what comes next.
fn forget(loops: &[LoopDevice]) {
    for device in loops {
        let args = ["device", "scan", "--forget"].map(Path::new);
        output("btrfs", args.into_iter().chain([device.path()]));
    }
}

fn mount(loops: &[LoopDevice], dir: &Path, options: &str) -> Mount {
    let others = loops[1..].iter();
    let mut options: Vec<String> = others
        .map(|device| format!("device={}", device.path().display()))
        .chain((!options.is_empty()).then(|| options.to_owned()))
        .collect();
    options.sort();
    Mount::new(loops[0].path(), dir, "btrfs", &options.join(","))
}

/// Fills a mounted filesystem with everything that allocates in its own way.
fn fill(dir: &Path, rng: &mut Rng, bytes: u64) {
    let script = |text: &str| shell(format!("set -- {}; cd $1; {text}", dir.display()));
    populate(dir, rng, bytes / 4);
    script("btrfs -q subvolume create sub; btrfs -q subvolume create gone");
    populate(&dir.join("sub"), rng, bytes / 2);
    populate(&dir.join("gone"), rng, bytes / 8);
    script("head -c 1M /dev/urandom > sub/large; sync -f .");
    script("btrfs -q subvolume snapshot -r sub snapshot; btrfs -q subvolume create sub/nested");
    populate(&dir.join("sub/nested"), rng, bytes / 8);
    script(
        "mkdir packed; btrfs property set packed compression zstd
        seq 300000 > packed/numbers
        mkdir plain; chattr +C plain; head -c 600K /dev/urandom > plain/written; sync -f .
        head -c 20K /dev/urandom | dd of=plain/written conv=notrunc bs=4K seek=7 status=none
        head -c 1 /dev/urandom | dd of=sub/large conv=notrunc bs=1 seek=500001 status=none
        fallocate -l 2M room; head -c 70K /dev/urandom | dd of=room conv=notrunc bs=4K seek=9 status=none
        cp --reflink=always sub/large sub/nested/shared
        rm -rf sub/folder3; btrfs -q subvolume delete gone; sync -f .; rm -rf folder5",
    );
}

/// The number behind a name in a line of text.
fn number_after(line: &str, name: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    words.find(|word| *word == name)?;
    words.next()?.parse().ok()
}

/// A chunk as it is printed.
struct PrintedChunk {
    logical: std::ops::Range<u64>,
    profile: String,
    /// Device and place of each stripe.
    places: Vec<(u64, u64)>,
}

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
    let mut chunks: Vec<PrintedChunk> = Vec::new();
    for line in dump("chunk").lines() {
        if let Some((_, start)) = line.split_once(" CHUNK_ITEM ") {
            let start = start.split(')').next().unwrap().parse().unwrap();
            chunks.push(PrintedChunk {
                logical: start..start,
                profile: String::new(),
                places: Vec::new(),
            });
        } else if let Some(len) = number_after(line, "length") {
            let chunk = chunks.last_mut().unwrap();
            let (_, kind) = line.split_once(" type ").unwrap();
            chunk.logical.end += len;
            chunk.profile = kind.split('|').next_back().unwrap().to_lowercase();
        } else if line.trim_start().starts_with("stripe ") {
            let place = ["devid", "offset"].map(|name| number_after(line, name).unwrap());
            chunks.last_mut().unwrap().places.push((place[0], place[1]));
        }
    }
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
        let mut chunks = chunks.iter();
        let chunk = chunks.find(|chunk| chunk.logical.contains(&start));
        let PrintedChunk {
            logical,
            profile,
            places,
        } = chunk.unwrap();
        let count = places.len() as u64;
        // Sector by sector, as simple as can be.
        for at in (start..start + len).step_by(4096) {
            let offset = at - logical.start;
            let (piece, within) = (offset >> 16, offset & 0xffff);
            match profile.as_str() {
                "raid0" => {
                    let (devid, place) = places[(piece % count) as usize];
                    add(devid, place + ((piece / count) << 16) + within, 4096);
                }
                "raid10" => {
                    let columns = count / 2;
                    let column = (piece % columns) as usize;
                    for (devid, place) in &places[2 * column..2 * column + 2] {
                        add(*devid, place + ((piece / columns) << 16) + within, 4096);
                    }
                }
                "single" | "dup" | "raid1" | "raid1c3" | "raid1c4" => {
                    for (devid, place) in places {
                        add(*devid, place + offset, 4096);
                    }
                }
                other => panic!("profile {other}"),
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
    let known = output("mkfs.btrfs", ["-O", "list-all"]);
    let known = String::from_utf8_lossy(&[known.stdout, known.stderr].concat()).into_owned();
    let new = ["block-group-tree", "squota"];
    if let Some(name) = new.iter().find(|name| making.options.contains(*name))
        && !known.contains(name)
    {
        println!("skipped, mkfs.btrfs does not know {name}");
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

/// One device, filled, whose superblock and trees tests then change; kept as a file.
fn filled(options: &'static str, rng: &mut Rng) -> (Scene, PathBuf) {
    let mut scene = Scene::make(&making("", 1, options));
    {
        let mount = scene.mount("");
        fill(mount.dir(), rng, 3 << 20);
    }
    forget(&scene.loops);
    scene.loops.clear();
    let file = scene.path("device1");
    (scene, file)
}

fn patch(file: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Changes the first superblock of a filesystem with CRC-32C, its checksum included.
fn change_super(file: &Path, offset: usize, bytes: &[u8]) {
    let opened = File::open(file).unwrap();
    let mut block = vec![0; 4096];
    opened.read_exact_at(&mut block, 64 << 10).unwrap();
    block[offset..offset + bytes.len()].copy_from_slice(bytes);
    let sum = crc32c::crc32c(&block[32..]);
    block[..4].copy_from_slice(&sum.to_le_bytes());
    patch(file, 64 << 10, &block);
}

/// Why all blocks of a file are copied.
fn why_all_blocks(file: &Path) -> String {
    match fs::open(&FileSource::open(file)).unwrap() {
        Opened::AllBlocks { info, why } => {
            assert_eq!(info.kind, fs::Kind::Btrfs);
            why
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn privileged_what_is_not_understood_is_copied_as_a_whole() {
    needs_root!();
    let (scene, file) = filled("", &mut Rng(seed()));
    let changed = scene.path("changed");
    let copy_number = |bit: u32| (1u64 << bit).to_le_bytes();
    for (offset, bytes, expected) in [
        (0xbc, copy_number(12), "zoned"),
        (0xbc, copy_number(13), "incompatible 0x2000"),
        (0xbc, copy_number(14), "incompatible 0x4000"),
        (0xbc, copy_number(17), "incompatible 0x20000"),
        (0xb4, copy_number(4), "read-only compatible 0x10"),
        (0xbc, copy_number(8), "of an old kind"),
        (0x38, copy_number(32), "seed"),
        (0x38, copy_number(33), "metadata alone"),
        (0x38, copy_number(50), "flags unknown"),
        (0x88, 2u64.to_le_bytes(), "one of the 2 devices"),
        (0x70, (1u64 << 40).to_le_bytes(), "larger than the volume"),
    ] {
        copy(&file, &changed);
        // The size of the device is in its own item.
        let offset = if expected.starts_with("larger") {
            0xc9 + 8
        } else {
            offset
        };
        change_super(&changed, offset, &bytes);
        let why = why_all_blocks(&changed);
        assert!(why.contains(expected), "{why}");
    }
    copy(&file, &changed);
    patch(&changed, (64 << 10) + 0x12b, b"x");
    assert!(why_all_blocks(&changed).contains("damaged, or older"));
    patch(&changed, 64 << 20, &[0; 4096]);
    assert!(why_all_blocks(&changed).contains("checksum"));
    // A bad copy alone does not matter.
    copy(&file, &changed);
    patch(&changed, 64 << 20, &[0; 4096]);
    let before = map(&file);
    let after = map(&changed);
    assert_eq!(before.used, after.used);
    assert_eq!(after.walk.warnings.len(), 1, "{:?}", after.walk.warnings);
}

/// The logical address of the root of a tree.
fn root_of(file: &Path, tree: &str) -> u64 {
    let args = ["inspect-internal", "dump-tree", "-t", tree].map(Path::new);
    let text = run("btrfs", args.into_iter().chain([file]));
    let mut lines = text.lines();
    let root = lines.find_map(|line| number_after(line, "leaf").or(number_after(line, "node")));
    root.unwrap_or_else(|| panic!("{text}"))
}

/// Where a tree block lies on the only device.
fn places_of(file: &Path, logical: u64) -> Vec<u64> {
    let logical = PathBuf::from(logical.to_string());
    let text = run("btrfs-map-logical", [Path::new("-l"), &logical, file]);
    let lines = text.lines();
    lines
        .map(|line| number_after(line, "physical").unwrap())
        .collect()
}

/// Changes the leaf that is all of a tree, its checksum (a CRC-32C) included.
fn change_leaf(file: &Path, tree: &str, change: impl FnOnce(&mut [u8])) {
    let mut block = vec![0; 16 << 10];
    let places = places_of(file, root_of(file, tree));
    let opened = File::open(file).unwrap();
    opened.read_exact_at(&mut block, places[0]).unwrap();
    assert_eq!(block[0x64], 0, "it has more levels");
    change(&mut block);
    let sum = crc32c::crc32c(&block[32..]);
    block[..4].copy_from_slice(&sum.to_le_bytes());
    for place in places {
        patch(file, place, &block);
    }
}

#[test]
fn privileged_what_has_not_ended_is_copied_as_a_whole() {
    needs_root!();
    let (scene, file) = filled("", &mut Rng(seed()));
    let changed = scene.path("changed");
    let key = |objectid: u64, kind: u8| [&objectid.to_le_bytes()[..], &[kind], &[0; 8]].concat();
    // The last item of the root tree becomes that of a balance.
    copy(&file, &changed);
    change_leaf(&changed, "root", |leaf| {
        let count = u32::from_le_bytes(leaf[0x60..0x64].try_into().unwrap()) as usize;
        let last = &mut leaf[0x65 + 25 * (count - 1)..][..17];
        assert!(u64::from_le_bytes(last[..8].try_into().unwrap()) < -4i64 as u64);
        last.copy_from_slice(&key(-4i64 as u64, 248));
    });
    assert!(why_all_blocks(&changed).contains("balance"));
    // The statistics of the device become its replacement: started, finished.
    for (state, is_refused) in [(1u64, true), (4, true), (2, false)] {
        copy(&file, &changed);
        change_leaf(&changed, "dev", |leaf| {
            assert_eq!(&leaf[0x65..0x65 + 9], &key(0, 249)[..9]);
            leaf[0x65..0x65 + 17].copy_from_slice(&key(0, 250));
            let data = u32::from_le_bytes(leaf[0x65 + 17..][..4].try_into().unwrap()) as usize;
            leaf[0x65 + data + 32..][..8].copy_from_slice(&state.to_le_bytes());
        });
        if is_refused {
            assert!(why_all_blocks(&changed).contains("replacement"));
        } else {
            map(&changed);
        }
    }
    // A stripe that its device does not know.
    copy(&file, &changed);
    change_leaf(&changed, "dev", |leaf| {
        let second = 0x65 + 25;
        let data = u32::from_le_bytes(leaf[second + 17..][..4].try_into().unwrap()) as usize;
        leaf[0x65 + data + 24] ^= 1;
    });
    assert!(why_all_blocks(&changed).contains("no chunk"));
}

#[test]
fn privileged_seeds_and_parity_are_copied_as_a_whole() {
    needs_root!();
    let mut scene = Scene::make(&making("", 2, "-d single -m single"));
    let first = scene.loops[0].path().to_owned();
    run(
        "btrfs",
        ["device", "scan", "--forget"]
            .map(Path::new)
            .into_iter()
            .chain([scene.loops[1].path()]),
    );
    run(
        "mkfs.btrfs",
        ["-q", "-f"].map(Path::new).into_iter().chain([&*first]),
    );
    run(
        "btrfstune",
        ["-S", "1"].map(Path::new).into_iter().chain([&*first]),
    );
    assert!(why_all_blocks(&first).contains("seed"));
    {
        let mount = Mount::new(&first, &scene.path("mnt"), "btrfs", "");
        let args = ["device", "add", "-f"].map(Path::new).into_iter();
        run("btrfs", args.chain([scene.loops[1].path(), mount.dir()]));
        run(
            "mount",
            ["-o", "remount,rw"]
                .map(Path::new)
                .into_iter()
                .chain([mount.dir()]),
        );
    }
    let why = why_all_blocks(scene.loops[1].path());
    assert!(why.contains("seed") || why.contains("devices"), "{why}");
    forget(&scene.loops);
    scene.loops.clear();

    let scene = Scene::make(&making("", 3, "-d raid5 -m raid1"));
    let image = scene.path("image");
    let args = [
        "backup".as_ref(),
        scene.loops[0].path(),
        "-o".as_ref(),
        &image,
        "--json".as_ref(),
    ];
    let report = program::run(args).expect(0).last();
    assert_eq!(report["grade"], "crash");
    assert_eq!(report["volumes"].as_array().unwrap().len(), 3);
    for warning in report["warnings"].as_array().unwrap() {
        assert!(warning.as_str().unwrap().contains("RAID5"), "{warning}");
    }
}

#[test]
fn privileged_a_bad_copy_of_a_tree_block_is_made_up_for_by_the_other() {
    needs_root!();
    let (scene, file) = filled("-m dup", &mut Rng(seed()));
    let (single_scene, single) = filled("-m single", &mut Rng(seed()));
    let expected = map(&file);
    let places = |file: &Path| places_of(file, root_of(file, "extent"));
    let copies = places(&file);
    assert_eq!(copies.len(), 2);
    for place in &copies {
        let changed = scene.path("changed");
        copy(&file, &changed);
        patch(&changed, place + 150, b"bad");
        assert_eq!(map(&changed).used, expected.used);
        patch(&changed, copies[0] + 150, b"bad");
        patch(&changed, copies[1] + 150, b"bad");
        let source = FileSource::open(&changed);
        let Opened::Known(filesystem) = fs::open(&source).unwrap() else {
            panic!();
        };
        let (_, result) = walk(filesystem.as_ref(), &source);
        let error = result.unwrap_err();
        assert_eq!(error.kind(), holdstill::error::Kind::Damaged);
        assert!(error.to_string().contains("wrong checksum"), "{error}");
    }
    // The whole program then copies all blocks, and says so.
    let place = places(&single)[0];
    patch(&single, place + 150, b"bad");
    let image = single_scene.path("image");
    let report = program::run([
        "backup".as_ref(),
        &*single,
        "-o".as_ref(),
        &image,
        "--json".as_ref(),
    ]);
    let report = report.expect(0).last();
    assert_eq!(report["grade"], "crash");
    assert!(
        report["warnings"][0]
            .as_str()
            .unwrap()
            .contains("all blocks are copied")
    );
    let target = single_scene.path("target");
    let args = ["restore".as_ref(), "--yes".as_ref(), &*image, &target];
    program::run(args).expect(0);
    assert!(program::same_bytes(&single, &target));
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
        // Whichever is named: all are in use.
        for device in [&first, &second] {
            backup(&[device]).expect(3);
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
