//! Signatures of what a target held before, outside of what a copy writes: they are cleared, and said.
//! `blkid` and `wipefs` are the judges.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::holdstill::{command, run, same_bytes};
use crate::common::volume::ext4;
use crate::common::{output, run as tool, sparse_file, spawn, temp_dir};

const SIZE: u64 = 24 << 20;
const MIB: u64 = 1 << 20;
/// Size of a larger target.
const LARGER: u64 = 72 * MIB;

/// What `blkid` finds on a file, its name left out.
fn blkid(path: &Path) -> String {
    let found = output("blkid", [Path::new("-p"), path]);
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    let text = text
        .split_once(": ")
        .map_or("", |(_, rest)| rest)
        .to_owned();
    format!("{:?} {text}", found.status.code())
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

/// A file of `size` bytes with something at `at`.
fn with(path: &Path, size: u64, at: u64, bytes: &[u8]) {
    sparse_file(path, size);
    put(path, at, bytes);
}

/// The superblock of an md array at byte `at`, which its device is otherwise empty for.
fn md(at: u64) -> Vec<u8> {
    let mut bytes = vec![0; 256];
    bytes[..8].copy_from_slice(b"\xfc\x4e\x2b\xa9\x01\0\0\0");
    bytes[16..32].fill(7);
    bytes[144..152].copy_from_slice(&(at / 512).to_le_bytes());
    let sum: u64 = bytes
        .chunks_exact(4)
        .map(|word| u64::from(u32::from_le_bytes(word.try_into().unwrap())))
        .sum();
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    bytes[216..220].copy_from_slice(&(sum as u32).to_le_bytes());
    bytes
}

/// Uberblocks of ZFS, one after another.
fn uberblocks() -> Vec<u8> {
    let mut bytes = vec![0; 128 << 10];
    for at in (0..bytes.len()).step_by(1024) {
        bytes[at..at + 8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
    }
    bytes
}

/// The second header of a LUKS2 container.
fn luks2_second(dir: &Path, at: u64) -> Vec<u8> {
    let path = dir.join("luks");
    sparse_file(&path, 32 * MIB);
    let size = format!("{}k", at >> 10);
    let fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let args = ["luksFormat", "--batch-mode", "--luks2-metadata-size", &size]
        .into_iter()
        .chain(fast)
        .chain(["--key-file", "/usr/include/linux/can.h"]);
    tool("cryptsetup", args.map(Path::new).chain([path.as_path()]));
    let mut header = vec![0; at as usize];
    File::open(&path)
        .unwrap()
        .read_exact_at(&mut header, at)
        .unwrap();
    header
}

/// What an old target holds, how large it is, and where; all of it is something that `blkid` finds, except
/// where nothing is said of that.
fn leftovers(dir: &Path, size: u64) -> Vec<(&'static str, u64, Vec<u8>)> {
    let mut drbd = vec![0; 4096];
    drbd[60..64].copy_from_slice(&0x8374_026b_u32.to_be_bytes());
    vec![
        ("VMFS volume member", MIB, b"\x0d\xd0\x01\xc0".to_vec()),
        ("VMFS", 2 * MIB, b"\x5e\xf1\xab\x2f".to_vec()),
        ("second LUKS2 header", 2 * MIB, luks2_second(dir, 2 * MIB)),
        ("second LUKS2 header", 4 * MIB, luks2_second(dir, 4 * MIB)),
        ("ZFS label", size - (128 << 10), uberblocks()),
        ("ZFS label", size - (384 << 10), uberblocks()),
        ("md 1.0", size - 8192, md(size - 8192)),
        ("DRBD", size - 4096, drbd),
        (
            "Promise RAID",
            size - 3087 * 512,
            b"Promise Technology, Inc.".to_vec(),
        ),
    ]
}

#[test]
fn what_blkid_would_find_beside_the_copy_is_cleared_and_said() {
    let dir = temp_dir();
    let [source, image, target] = ["source", "image", "target"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "-L copy", None);
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    let expected = blkid(&source);
    assert!(expected.contains("copy"), "{expected}");
    // One as large as the volume, and a larger one.
    for size in [SIZE, LARGER] {
        for (name, at, bytes) in leftovers(dir.path(), size) {
            println!("{name} at {at} of {size}");
            let from_image = [Path::new("restore"), &image, &target, Path::new("--yes")];
            let from_source = [Path::new("clone"), &source, &target, Path::new("--yes")];
            for args in [from_image, from_source] {
                with(&target, size, at, &bytes);
                // It looks for ZFS on nothing smaller than 64 MiB.
                if name != "ZFS label" || size == LARGER {
                    assert_ne!(blkid(&target), "Some(2) ", "{name}: not a signature");
                }
                run(args).expect(0).says(name).says("was cleared");
                assert_eq!(blkid(&target), expected);
                let found = tool("wipefs", [Path::new("--no-act"), &target]);
                assert_eq!(found.lines().count(), 2, "{found}");
            }
        }
    }
    // Where there was nothing, nothing is said.
    sparse_file(&target, SIZE);
    let clean = run([Path::new("restore"), &image, &target, Path::new("--yes")]).expect(0);
    assert!(!clean.stderr.contains("cleared"), "{clean}");
}

/// Mirrors of the superblock of a btrfs, which its tools restore it from.
#[test]
fn mirrors_of_an_old_btrfs_are_cleared() {
    let dir = temp_dir();
    let [source, old, target] = ["source", "old", "target"].map(|part| dir.path().join(part));
    const LARGE: u64 = 128 << 20;
    ext4(&source, SIZE, "", None);
    sparse_file(&old, LARGE);
    tool("mkfs.btrfs", [Path::new("-q"), &old]);
    tool("cp", [Path::new("--sparse=always"), &old, &target]);
    run([Path::new("clone"), &source, &target, Path::new("--yes")])
        .expect(0)
        .says("mirror of a btrfs superblock at byte 67108928");
    let mut magic = [0; 8];
    File::open(&target)
        .unwrap()
        .read_exact_at(&mut magic, (64 << 20) + 64)
        .unwrap();
    assert_eq!(magic, [0; 8]);
    // Its own ones are written, and of them nothing is said.
    for _ in 0..2 {
        let run = run([Path::new("clone"), &old, &target, Path::new("--yes")]).expect(0);
        assert!(!run.stderr.contains("cleared"), "{run}");
        File::open(&target)
            .unwrap()
            .read_exact_at(&mut magic, (64 << 20) + 64)
            .unwrap();
        assert_eq!(&magic, b"_BHRfS_M");
    }
}

/// From it, partitioning tools would bring back a table that is gone.
#[test]
fn a_backup_table_at_the_end_of_a_larger_target_is_cleared() {
    let dir = temp_dir();
    let [source, target] = ["source", "target"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", None);
    for sector in [512, 4096] {
        let at = LARGER - sector;
        with(&target, LARGER, at, b"EFI PART");
        run([Path::new("clone"), &source, &target, Path::new("--yes")])
            .expect(0)
            .says(&format!("backup GPT at byte {at}"));
        let mut end = vec![1; sector as usize];
        File::open(&target)
            .unwrap()
            .read_exact_at(&mut end, at)
            .unwrap();
        assert!(end.iter().all(|byte| *byte == 0));
    }
}

/// A target that is larger than its volume: whatever is past the volume's end is of the time before.
#[test]
fn past_the_end_of_a_small_volume_nothing_stays() {
    let dir = temp_dir();
    let [source, target] = ["source", "target"].map(|part| dir.path().join(part));
    ext4(&source, 512 << 10, "-b 1024", None);
    let header = luks2_second(dir.path(), 512 << 10);
    with(&target, SIZE, 512 << 10, &header);
    assert_ne!(blkid(&target), "Some(2) ");
    run([Path::new("clone"), &source, &target, Path::new("--yes")]).expect(0);
    assert_eq!(blkid(&target), blkid(&source));
}

/// What is restored has a signature of its own where others write at once: killed meanwhile, it must not look
/// like a container that is complete.
#[test]
fn a_killed_restore_leaves_no_second_header_of_its_own() {
    let dir = temp_dir();
    let [image, target] = ["image", "target"].map(|part| dir.path().join(part));
    luks2_second(dir.path(), 2 * MIB);
    let source = dir.path().join("luks");
    put(&source, 16 * MIB, &vec![7; 16 << 20]);
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    sparse_file(&target, 32 * MIB);
    let mut program = command([Path::new("restore"), &image, &target]);
    program.args(["--yes", "--rate", "4M", "--threads", "1"]);
    let mut child = spawn(&mut program);
    let file = File::open(&target).unwrap();
    let mut byte = [0];
    while byte != [7] && child.try_wait().unwrap().is_none() {
        file.read_exact_at(&mut byte, 18 * MIB).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().code(), None, "it was not killed");
    assert_eq!(blkid(&target), "Some(2) ");
    let args = [Path::new("restore"), &image, &target];
    run(args.into_iter().chain(["--yes", "--verify"].map(Path::new))).expect(0);
    assert!(same_bytes(&source, &target));
}

/// Killed while the copy is being written, nothing is there that looks like something, old or new.
#[test]
fn a_killed_restore_leaves_no_old_signature() {
    let dir = temp_dir();
    let [source, image] = ["source", "image"].map(|part| dir.path().join(part));
    let tree = Path::new("/usr/include/linux");
    ext4(&source, SIZE, "", Some(tree));
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    for (name, at, bytes) in leftovers(dir.path(), LARGER) {
        println!("{name} at {at}");
        let target: PathBuf = dir.path().join("target");
        with(&target, LARGER, at, &bytes);
        let mut program = command([Path::new("restore"), &image, &target]);
        program.args(["--yes", "--rate", "4M", "--threads", "1"]);
        let mut child = spawn(&mut program);
        // The first write comes after the old signatures are gone.
        let file = File::open(&target).unwrap();
        let mut bytes = vec![0; (SIZE - 2 * MIB) as usize];
        loop {
            file.read_exact_at(&mut bytes, MIB).unwrap();
            let copied = bytes.windows(7).any(|text| text == b"#define");
            if copied || child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(blkid(&target), "Some(2) ", "{name}");
    }
}
