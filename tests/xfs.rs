//! The map of XFS, and the state of its log, against the tools that make and check them.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use holdstill::error::Kind;
use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{self, Condition, DirtyReason, Opened};
use holdstill::units::ByteLen;

use crate::common::volume::{
    copy, digests, direct_copy, free_by_fsmap, map, open, poison, populate,
};
use crate::common::walking::walk;
use crate::common::{
    FileSource, LoopDevice, Mount, Rng, count, needs_root, output, run, seed, sparse_file, temp_dir,
};

/// How `mkfs` is called to get every arrangement of metadata and every feature.
const FEATURES: &[(&str, &str)] = &[
    ("default", ""),
    ("1k", "-b size=1024"),
    ("2k", "-b size=2048"),
    ("64k", "-b size=65536"),
    ("many_groups", "--unsupported -d agcount=18"),
    ("sectors_of_4k", "-s size=4096"),
    ("rmapbt", "-m rmapbt=1"),
    (
        "rmapbt_many_groups",
        "--unsupported -m rmapbt=1 -d agcount=9",
    ),
    ("no_reflink", "-m reflink=0"),
    ("no_finobt", "-m finobt=0,inobtcount=0"),
    ("no_inobtcount", "-m inobtcount=0"),
    ("no_bigtime", "-m bigtime=0"),
    ("nrext64", "-i nrext64=1"),
    ("no_sparse_inodes", "-i sparse=0"),
    ("large_inodes", "-i size=2048"),
    ("log_stripe", "-l su=65536"),
    ("log_stripe_largest", "-l su=262144"),
    ("stripe", "-d su=65536,sw=4,agcount=4"),
    ("large_directories", "-n size=65536"),
    ("meta_uuid", ""),
    ("v4", "-m crc=0"),
    ("v4_512", "-m crc=0 -b size=512"),
    ("v4_log_v1", "-m crc=0 -l version=1"),
    ("v4_exact_count", "-m crc=0 -l lazy-count=0"),
];

/// Not a whole number of blocks.
const SIZE: u64 = (320 << 20) + 3 * 4096 + 512;

fn make(image: &Path, name: &str, options: &str, from: Option<&Path>) {
    sparse_file(image, SIZE);
    let mut args: Vec<&str> = vec!["-q", "-f"];
    args.extend(options.split_whitespace());
    if let Some(from) = from {
        args.extend(["-p", from.to_str().unwrap()]);
    }
    args.push(image.to_str().unwrap());
    run("mkfs.xfs", args);
    if name == "meta_uuid" {
        run("xfs_admin", ["-U", "generate", image.to_str().unwrap()]);
    }
}

/// A prototype file, as `mkfs.xfs -p` wants it, of a folder.
pub(crate) fn prototype(dir: &Path) -> String {
    fn folder(dir: &Path, text: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let kind = path.symlink_metadata().unwrap().file_type();
            let name = path.file_name().unwrap().to_str().unwrap();
            if kind.is_dir() {
                text.push_str(&format!("{name} d--755 0 0\n"));
                folder(&path, text);
                text.push_str("$\n");
            } else if kind.is_file() {
                text.push_str(&format!("{name} ---644 0 0 {}\n", path.display()));
            }
        }
    }
    let mut text = "/none\n0 0\nd--755 0 0\n".to_owned();
    folder(dir, &mut text);
    text.push_str("$\n");
    text
}

/// A number that `xfs_db` prints.
fn field(image: &Path, structure: &str, name: &str) -> u64 {
    let print = format!("print {name}");
    let text = run(
        "xfs_db",
        ["-r", "-c", structure, "-c", &print, image.to_str().unwrap()],
    );
    let value = text.trim().strip_prefix(&format!("{name} = "));
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("{text}"))
}

/// What `xfs_db` calls free, with the blocks of the free lists, and how many bytes those have.
fn free_by_xfs_db(image: &Path) -> (ExtentSet, u64) {
    let block = field(image, "sb 0", "blocksize");
    let group = field(image, "sb 0", "agblocks");
    let text = run("xfs_db", ["-r", "-c", "freesp -d", image.to_str().unwrap()]);
    let mut free = ExtentSet::new();
    for line in text.lines().skip(1) {
        let numbers: Vec<u64> = line
            .split_whitespace()
            .map_while(|n| n.parse().ok())
            .collect();
        if let [ag, start, len] = numbers[..] {
            free.insert(Extent::new((ag * group + start) * block, len * block));
        } else {
            // A histogram follows.
            break;
        }
    }
    let listed: u64 = (0..field(image, "sb 0", "agcount"))
        .map(|ag| field(image, &format!("agf {ag}"), "flcount"))
        .sum();
    (free, listed * block)
}

/// The map frees just what `xfs_db` calls free, but for the free lists; without it the filesystem
/// is whole.
fn check(name: &str, image: &Path, scratch: &Path) -> PathBuf {
    let map = map(image);
    assert_eq!(map.condition, Condition::Clean, "{name}");
    assert_eq!(map.walk.warnings, [""; 0], "{name}");
    let free = map.free();
    let (expected, listed) = free_by_xfs_db(image);
    for run in free.runs() {
        assert_eq!(expected.gaps(*run).count(), 0, "{name}: {run:?} is used");
    }
    assert_eq!(free.bytes().0 + listed, expected.bytes().0, "{name}");

    let poisoned = scratch.join(format!("{name}.poisoned"));
    copy(image, &poisoned);
    poison(&poisoned, &map.used, ByteLen(SIZE));
    let repair = output("xfs_repair", [Path::new("-n"), &poisoned]);
    assert!(repair.status.success(), "{name}: {repair:?}");
    poisoned
}

#[test]
fn the_map_is_what_xfs_db_says_for_every_feature() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    // Of larger trees `mkfs` fails for some seeds (createname error, no space left on device).
    populate(&tree, &mut rng, 3 << 20);
    let proto = dir.path().join("proto");
    std::fs::write(&proto, prototype(&tree)).unwrap();
    for &(name, options) in FEATURES {
        println!("{name}");
        let image = dir.path().join(name);
        make(&image, name, options, Some(&proto));
        let poisoned = check(name, &image, dir.path());
        std::fs::remove_file(&image).unwrap();
        std::fs::remove_file(&poisoned).unwrap();
    }
}

#[test]
fn privileged_the_map_is_right_after_the_kernel_wrote() {
    needs_root!();
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let mount_point = dir.path().join("mnt");
    for &(name, options) in rng.clone().some(FEATURES, count(8, 1000)) {
        // Version 4 is gone from new kernels.
        if name.starts_with("v4") {
            continue;
        }
        println!("{name}");
        let image = dir.path().join(name);
        make(&image, name, options, None);
        let expected = {
            let device = LoopDevice::attach(&image);
            let mount = Mount::new(device.path(), &mount_point, "xfs", "");
            populate(mount.dir(), &mut rng, 40 << 20);
            let large = mount.dir().join("preallocated");
            run("fallocate", ["-l", "3M", large.to_str().unwrap()]);
            digests(mount.dir())
        };
        let poisoned = check(name, &image, dir.path());
        {
            let device = LoopDevice::attach_with(&poisoned, &["--read-only"]);
            let mount = Mount::new(device.path(), &mount_point, "xfs", "ro,norecovery");
            assert_eq!(digests(mount.dir()), expected, "{name}");
        }
        std::fs::remove_file(&image).unwrap();
        std::fs::remove_file(&poisoned).unwrap();
    }
}

#[test]
fn a_sparse_volume_of_nearly_16_tib_is_mapped() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    sparse_file(&image, (16 << 40) - (1 << 30));
    run(
        "mkfs.xfs",
        ["-q", "-l", "size=100m", image.to_str().unwrap()],
    );
    let map = map(&image);
    assert_eq!(map.walk.warnings, [""; 0]);
    let (expected, listed) = free_by_xfs_db(&image);
    assert_eq!(map.free().bytes().0 + listed, expected.bytes().0);
    assert!(map.walk.used < ByteLen::mib(200), "{}", map.walk.used);
}

/// Whether `xfs_logprint` calls the log clean.
fn log_is_clean(image: &Path) -> bool {
    let text = run("xfs_logprint", [Path::new("-t"), image]);
    let is_clean = text.contains("state: <CLEAN>");
    assert!(is_clean || text.contains("state: <DIRTY>"), "{text}");
    is_clean
}

#[test]
fn a_log_made_anew_is_clean() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    let path = image.to_str().unwrap();
    for options in ["", "-l su=65536", "-m crc=0", "-m crc=0 -l version=1"] {
        make(&image, "anew", options, None);
        for round in 0..3 {
            if round == 1 {
                run("xfs_repair", ["-L", path]);
            } else {
                run("xfs_admin", ["-U", "generate", path]);
            }
            assert!(log_is_clean(&image), "{options} {round}");
            let condition = open(&FileSource::open(&image)).condition();
            assert_eq!(condition, Condition::Clean, "{options} {round}");
        }
    }
}

/// Logs of every kind, some so small that they go round within a test; and how they are mounted.
const LOGS: &[(&str, &str, &str)] = &[
    ("default", "", ""),
    ("small", "--unsupported -l size=8m", ""),
    ("small_stripe", "--unsupported -l size=8m,su=65536", ""),
    ("largest_stripe", "-l su=262144", ""),
    (
        "small_sectors_of_4k",
        "--unsupported -s size=4096 -l size=12m",
        "",
    ),
    ("large_blocks", "-b size=65536", ""),
    ("rmapbt", "-m rmapbt=1", ""),
    ("small_64k", "--unsupported -l size=8m", "logbsize=64k"),
    (
        "small_stripe_128k",
        "--unsupported -l size=8m,su=65536",
        "logbsize=128k",
    ),
    ("small_256k", "--unsupported -l size=8m", "logbsize=256k"),
    (
        "stripe_256k",
        "-d su=65536,sw=4,agcount=4 -l su=32768",
        "logbsize=256k",
    ),
];

/// Something that fills the log.
fn churn(dir: &Path, rng: &mut Rng, rounds: u64) {
    for round in 0..rounds {
        let folder = dir.join(format!("churn{}", rng.below(5)));
        std::fs::create_dir_all(&folder).unwrap();
        for number in 0..40 {
            std::fs::write(folder.join(format!("{round}.{number}")), [7; 5000]).unwrap();
        }
        if rng.below(2) == 0 {
            std::fs::remove_dir_all(&folder).unwrap();
        }
        run("sync", ["-f", dir.to_str().unwrap()]);
    }
}

#[test]
fn privileged_a_freeze_is_told_from_a_crash_wherever_the_log_stands() {
    needs_root!();
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let mount_point = dir.path().join("mnt");
    let (frozen, crashed) = (dir.path().join("frozen"), dir.path().join("crashed"));
    let dirty = Condition::Dirty {
        reason: DirtyReason::Log,
    };
    for &(name, options, mount_options) in LOGS {
        let image = dir.path().join(name);
        make(&image, name, options, None);
        let device = LoopDevice::attach(&image);
        for round in 0..count(2, 30) {
            println!("{name} {round}");
            // A freeze: the map is what the kernel says, and without the rest all is there.
            let expected = {
                let mount = Mount::new(device.path(), &mount_point, "xfs", mount_options);
                let rounds = 1 + rng.below(8);
                churn(mount.dir(), &mut rng, rounds);
                populate(
                    &mount.dir().join(format!("round{round}")),
                    &mut rng,
                    1 << 20,
                );
                // A file that is deleted and still open.
                let orphan = std::fs::File::create(mount.dir().join("orphan")).unwrap();
                orphan.write_all_at(&vec![1; 300_000], 0).unwrap();
                std::fs::remove_file(mount.dir().join("orphan")).unwrap();
                let free = {
                    let _frozen = mount.freeze();
                    direct_copy(device.path(), &frozen);
                    free_by_fsmap(mount.dir())
                };
                let map = map(&frozen);
                assert_eq!(map.condition, Condition::Frozen, "{name}");
                assert_eq!(map.walk.warnings, [""; 0], "{name}");
                // The kernel calls the blocks of the free lists used, as the map does.
                assert_eq!(map.free(), free, "{name}");
                poison(&frozen, &map.used, map.volume.len);
                digests(mount.dir())
            };
            {
                let device = LoopDevice::attach(&frozen);
                let mount = Mount::new(device.path(), &mount_point, "xfs", "nouuid");
                assert_eq!(digests(mount.dir()), expected, "{name}");
            }
            run("xfs_repair", [Path::new("-n"), &frozen]);

            // A clean unmount, and a crash.
            let is_clean = |image: &Path| {
                let condition = open(&FileSource::open(image)).condition();
                assert_eq!(condition == Condition::Clean, log_is_clean(image), "{name}");
                condition
            };
            direct_copy(device.path(), &crashed);
            assert_eq!(is_clean(&crashed), Condition::Clean, "{name}");
            {
                let mount = Mount::new(device.path(), &mount_point, "xfs", mount_options);
                let rounds = 1 + rng.below(8);
                churn(mount.dir(), &mut rng, rounds);
                std::fs::write(mount.dir().join("last"), [9; 9000]).unwrap();
                run(
                    "xfs_io",
                    ["-x", "-c", "shutdown -f", mount.dir().to_str().unwrap()],
                );
            }
            direct_copy(device.path(), &crashed);
            assert_eq!(is_clean(&crashed), dirty, "{name}");
        }
    }
}

/// A small filesystem in memory, after changing some of its bytes.
fn altered(options: &str, change: impl FnOnce(&Path)) -> Vec<u8> {
    let dir = temp_dir();
    let image = dir.path().join("image");
    make(&image, "altered", options, None);
    change(&image);
    std::fs::read(&image).unwrap()
}

fn patch(image: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Sets a field with its checksum.
fn write_field(image: &Path, structure: &str, field: &str, value: &str) {
    let write = format!("write {field} {value}");
    run(
        "xfs_db",
        ["-x", "-c", structure, "-c", &write, image.to_str().unwrap()],
    );
}

/// Changes bytes of the superblock and sets its checksum anew.
fn alter_superblock(volume: &mut [u8], offset: usize, change: impl FnOnce(&mut [u8])) {
    let sector = &mut volume[..512];
    change(&mut sector[offset..]);
    sector[224..228].fill(0);
    let crc = crc32c::crc32c(sector).to_le_bytes();
    sector[224..228].copy_from_slice(&crc);
}

#[test]
fn a_group_whose_tree_is_wrong_is_used_as_a_whole() {
    type Change = fn(&Path);
    let changes: &[(&str, &str, Change)] = &[
        ("checksum of block", "", |image| {
            patch(image, 4096 + 4000, &[1])
        }),
        ("its AGF is wrong", "", |image| patch(image, 512 + 60, &[1])),
        ("its AGI is wrong", "", |image| {
            patch(image, 1024 + 60, &[1])
        }),
        ("its AGFL is wrong", "", |image| {
            patch(image, 1536 + 60, &[1])
        }),
        ("it claims 20000 free blocks", "", |image| {
            write_field(image, "agf 0", "longest", "19000");
            write_field(image, "agf 0", "freeblks", "20000");
        }),
        ("is none", "-m crc=0", |image| patch(image, 4096 + 5, &[1])),
        ("overfull", "-m crc=0", |image| {
            patch(image, 4096 + 6, &[0xff])
        }),
        ("do not ascend", "-m crc=0", |image| {
            patch(image, 4096 + 16, &[0xff])
        }),
        ("do not ascend", "-m crc=0", |image| {
            patch(image, 4096 + 19, &[0])
        }),
        ("do not follow", "-m crc=0", |image| {
            patch(image, 4096 + 8, &[0])
        }),
        ("goes on", "-m crc=0", |image| patch(image, 4096 + 12, &[0])),
        ("leaves it", "-m crc=0", |image| {
            write_field(image, "agf 0", "bnoroot", "4000000")
        }),
        ("levels", "-m crc=0", |image| {
            write_field(image, "agf 0", "bnolevel", "77")
        }),
        ("is none", "-m crc=0", |image| {
            write_field(image, "agf 0", "bnolevel", "2")
        }),
    ];
    for &(expected, options, change) in changes {
        let volume = altered(options, change);
        let (used, result) = walk(open(&volume).as_ref(), &volume);
        let warnings = result.unwrap().warnings;
        assert_eq!(warnings.len(), 1, "{expected}: {warnings:?}");
        assert!(
            warnings[0].contains("group 0") && warnings[0].contains(expected),
            "{warnings:?}"
        );
        let group = Extent::new(0, (SIZE / 4096 / 4) * 4096);
        assert_eq!(used.gaps(group).count(), 0, "{expected}");
        assert!(used.bytes() < ByteLen(SIZE / 2), "{expected}");
    }
}

#[test]
fn a_filesystem_that_contradicts_itself_has_no_map() {
    let volume = altered("", |image| write_field(image, "sb 0", "fdblocks", "1234"));
    let (_, result) = walk(open(&volume).as_ref(), &volume);
    assert_eq!(result.unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn what_is_not_understood_is_copied_as_a_whole() {
    let mut volume = altered("", |_| {});
    let good = volume[..512].to_vec();
    let why = |volume: &Vec<u8>| match fs::open(volume).unwrap() {
        Opened::AllBlocks { why, .. } => why,
        other => panic!("{other:?}"),
    };
    volume[108..113].copy_from_slice(b"label");
    assert!(why(&volume).contains("checksum"));
    for (name, offset, value) in [
        ("block or sector size", 4, 1u8),
        ("larger than the volume", 8, 1),
        ("allocation groups", 84, 1),
        ("allocation groups", 88, 1),
        ("log", 48, 1),
        ("block or sector size", 102, 3),
        ("version 6", 101, 0xb6),
        ("read-only compatible 0x40000000", 212, 0x40),
        ("incompatible 0x40000000", 216, 0x40),
    ] {
        volume[..512].copy_from_slice(&good);
        alter_superblock(&mut volume, offset, |bytes| bytes[0] = value);
        assert!(why(&volume).contains(name), "{name}: {}", why(&volume));
    }
}

#[test]
fn what_is_on_other_devices_is_refused_by_name() {
    let dir = temp_dir();
    let (data, other) = (dir.path().join("data"), dir.path().join("other"));
    for (option, name) in [("-l", "logdev"), ("-r", "rtdev")] {
        sparse_file(&data, SIZE);
        sparse_file(&other, SIZE);
        let device = format!("{name}={},size=300m", other.display());
        run(
            "mkfs.xfs",
            ["-q", "-f", option, &device, data.to_str().unwrap()],
        );
        let error = fs::open(&FileSource::open(&data)).unwrap_err();
        assert_eq!(error.kind(), Kind::NotApplicable);
        let expected = if name == "logdev" {
            "external log"
        } else {
            "realtime"
        };
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn unfinished_business_makes_it_dirty() {
    let mut volume = altered("", |_| {});
    let good = volume[..512].to_vec();
    for (reason, offset, bits) in [
        (DirtyReason::InProgress, 126, 1),
        (DirtyReason::NeedsRepair, 219, 1 << 4),
    ] {
        volume[..512].copy_from_slice(&good);
        alter_superblock(&mut volume, offset, |byte| byte[0] |= bits);
        assert_eq!(open(&volume).condition(), Condition::Dirty { reason });
    }
    drop(volume);
    let log = |image: &Path| {
        let group = field(image, "sb 0", "agblocks");
        let start = field(image, "sb 0", "logstart");
        let shift = field(image, "sb 0", "agblklog");
        ((start >> shift) * group + (start & ((1 << shift) - 1))) * 4096
    };
    // The unmount record: its flag, its UUID, its length.
    let no_unmount = altered("", |image| patch(image, log(image) + 512 + 9, &[0]));
    let foreign = altered("", |image| patch(image, log(image) + 304, &[0xee; 16]));
    let longer = altered("", |image| patch(image, log(image) + 12, &[1]));
    for (name, volume, reason) in [
        ("no unmount", no_unmount, DirtyReason::Log),
        ("foreign", foreign, DirtyReason::LogDamaged),
        ("longer", longer, DirtyReason::LogDamaged),
    ] {
        assert_eq!(
            open(&volume).condition(),
            Condition::Dirty { reason },
            "{name}"
        );
    }
    let zeroed = altered("", |image| patch(image, log(image), &[0; 4096]));
    assert_eq!(open(&zeroed).condition(), Condition::Clean);
}

/// Replaces the free-space tree of group 0 of a version 4 filesystem, which has no checksums, by
/// one of `runs`, its blocks at the end of the group and no fuller than `fill` records. The
/// blocks of the tree.
pub(crate) fn plant_tree(volume: &mut [u8], runs: &[(u32, u32)], fill: usize) -> Vec<u32> {
    let get = |volume: &[u8], at: usize| u32::from_be_bytes(volume[at..at + 4].try_into().unwrap());
    let block_size = get(volume, 4) as usize;
    let last = get(volume, 84) - 1;
    let mut planted = Vec::new();
    let mut level: Vec<(u32, u32, u32)> = runs.iter().map(|&(at, len)| (at, len, 0)).collect();
    let mut depth = 0u16;
    loop {
        let capacity = (block_size - 16) / if depth == 0 { 8 } else { 12 };
        let parts: Vec<_> = level.chunks(fill.clamp(2, capacity)).collect();
        let first = last - planted.len() as u32;
        let block_of = |index: usize| first - index as u32;
        let mut above = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let block = block_of(index);
            let right = if index + 1 < parts.len() {
                block_of(index + 1)
            } else {
                u32::MAX
            };
            let left = if index > 0 {
                block_of(index - 1)
            } else {
                u32::MAX
            };
            let bytes = &mut volume[block as usize * block_size..][..block_size];
            bytes.fill(0);
            bytes[..4].copy_from_slice(b"ABTB");
            bytes[4..6].copy_from_slice(&depth.to_be_bytes());
            bytes[6..8].copy_from_slice(&(part.len() as u16).to_be_bytes());
            bytes[8..12].copy_from_slice(&left.to_be_bytes());
            bytes[12..16].copy_from_slice(&right.to_be_bytes());
            for (n, (at, len, child)) in part.iter().enumerate() {
                bytes[16 + 8 * n..][..4].copy_from_slice(&at.to_be_bytes());
                bytes[20 + 8 * n..][..4].copy_from_slice(&len.to_be_bytes());
                if depth > 0 {
                    bytes[16 + 8 * capacity + 4 * n..][..4].copy_from_slice(&child.to_be_bytes());
                }
            }
            above.push((part[0].0, part[0].1, block));
        }
        planted.extend((0..parts.len()).map(block_of));
        depth += 1;
        if above.len() == 1 {
            break;
        }
        level = above;
    }
    let free: u32 = runs.iter().map(|run| run.1).sum();
    let longest = runs.iter().map(|run| run.1).max().unwrap();
    let agf = 512;
    let before = get(volume, agf + 52);
    let total = u64::from_be_bytes(volume[144..152].try_into().unwrap());
    let total = total - u64::from(before) + u64::from(free);
    volume[144..152].copy_from_slice(&total.to_be_bytes());
    for (at, value) in [
        (16, *planted.last().unwrap()),
        (28, u32::from(depth)),
        (52, free),
        (56, longest),
    ] {
        volume[agf + at..][..4].copy_from_slice(&value.to_be_bytes());
    }
    planted
}

/// Random runs that leave out the start and the end of a group of `blocks` blocks.
pub(crate) fn random_runs(rng: &mut Rng, blocks: u32, runs: u64) -> Vec<(u32, u32)> {
    let room = u64::from(blocks) - 4000;
    let stride = room / runs;
    (0..runs)
        .map(|n| {
            let gap = rng.below(stride / 2);
            let len = 1 + rng.below(stride - gap);
            ((20 + n * stride + gap) as u32, len as u32)
        })
        .collect()
}

#[test]
fn a_tree_with_more_runs_than_are_kept_is_walked() {
    let mut rng = Rng(seed());
    let options = "--unsupported -m crc=0 -b size=512 -d agcount=1";
    let mut volume = altered(options, |_| {});
    let blocks = u32::from_be_bytes(volume[84..88].try_into().unwrap());
    // Behind the log, which mkfs puts in the middle.
    let log = u64::from_be_bytes(volume[48..56].try_into().unwrap());
    let log_end = log as u32 + u32::from_be_bytes(volume[96..100].try_into().unwrap());
    let mut runs = Vec::new();
    let mut at = 20;
    while at < blocks - 6000 {
        let len = 1 + rng.below(2) as u32;
        if at + len <= log as u32 || at >= log_end {
            runs.push((at, len));
        }
        at += len + 1;
    }
    assert!(runs.len() > 1 << 17, "{}", runs.len());
    plant_tree(&mut volume, &runs, 10_000);
    let (used, result) = walk(open(&volume).as_ref(), &volume);
    assert_eq!(result.unwrap().warnings, [""; 0]);
    let group = Extent::new(0, u64::from(blocks) * 512);
    let found = used
        .gaps(group)
        .map(|gap| (gap.start.0 / 512, gap.len.0 / 512));
    assert!(
        found.eq(runs
            .iter()
            .map(|&(at, len)| (u64::from(at), u64::from(len))))
    );
}

#[test]
fn trees_of_any_height_are_walked() {
    let mut rng = Rng(seed());
    for options in ["-m crc=0", "-m crc=0 -b size=512"] {
        let mut volume = altered(options, |_| {});
        let get = |at: usize| u32::from_be_bytes(volume[at..at + 4].try_into().unwrap());
        let (block, blocks) = (u64::from(get(4)), get(84));
        for _ in 0..count(10, 200) {
            let number = 1 + rng.below(3000);
            let runs = random_runs(&mut rng, blocks, number);
            let fill = [3, 4, 10, 10_000][rng.below(4) as usize];
            plant_tree(&mut volume, &runs, fill);
            let (used, result) = walk(open(&volume).as_ref(), &volume);
            assert_eq!(
                result.unwrap().warnings,
                [""; 0],
                "{options} {number} by {fill}"
            );
            let group = Extent::new(0, u64::from(blocks) * block);
            let mut expected = ExtentSet::new();
            for (at, len) in runs {
                expected.insert(Extent::new(u64::from(at) * block, u64::from(len) * block));
            }
            let mut free = ExtentSet::new();
            used.gaps(group).for_each(|gap| free.insert(gap));
            assert_eq!(free, expected, "{options} {number} by {fill}");
        }
    }
}
