//! The map of XFS, and the state of its log, against the tools that make and check them.

use std::path::{Path, PathBuf};

use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::Condition;
use holdstill::units::ByteLen;

use crate::common::volume::{copy, digests, map, poison, populate};
use crate::common::{LoopDevice, Mount, Rng, needs_root, output, run, seed, sparse_file, temp_dir};

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
fn prototype(dir: &Path) -> String {
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
    populate(&tree, &mut rng, 8 << 20);
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
    for &(name, options) in FEATURES {
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
