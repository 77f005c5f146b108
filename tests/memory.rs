//! Peak memory does not grow with the volume: huge volumes, fragmented ones, and a few gigabytes.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::holdstill::{command, wait};
use crate::common::scene::backup_to;
use crate::common::volume::{ext4, map};
use crate::common::{Rng, count, run as tool, seed, sparse_file, spawn, temp_dir};

/// What a run may take, in KiB.
const LIMIT: u64 = 128 << 10;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Runs the program, which must take no more than [`LIMIT`]. The kernel keeps the peak, which only
/// grows: the last value seen lacks at most what the last moment added.
fn frugal(what: &str, args: &[PathBuf]) {
    within(what, args, LIMIT);
}

fn within(what: &str, args: &[PathBuf], limit: u64) {
    let mut program = command(args);
    let begun = Instant::now();
    let mut child = spawn(program.args(["--progress", "none"]));
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|line| line.split_whitespace().next()) {
            peak = kib.parse().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let run = wait(&program, child).expect(0);
    assert!(peak > 0, "{what}: never seen: {run}");
    println!(
        "{what}: {} MiB, {:.1} s",
        peak >> 10,
        begun.elapsed().as_secs_f64()
    );
    assert!(peak <= limit, "{what} took {peak} KiB");
}

/// The same with a bound that is named.
fn bounded(what: &str, args: &[PathBuf], memory: &str, limit: u64) {
    let bound = ["--threads", "64", "--memory", memory].map(PathBuf::from);
    within(what, &[args, &bound].concat(), limit);
}

/// Backs up, verifies and restores a volume.
fn check(name: &str, dir: &Path, source: &Path) {
    let [image, target] = ["image", "target"].map(|part| dir.join(part));
    frugal(&format!("{name}: backup"), &backup_to(source, &image));
    let verify = ["verify".into(), image.clone()];
    frugal(&format!("{name}: verify"), &verify);
    let restore = ["restore".into(), image.clone(), target.clone()];
    frugal(&format!("{name}: restore"), &restore);
    let against = [&verify[..], &["--against".into(), target.clone()]].concat();
    frugal(&format!("{name}: compare"), &against);
    std::fs::remove_file(target).unwrap();
    let target = dir.join("clone");
    let clone = ["clone".into(), source.to_owned(), target.clone()];
    frugal(&format!("{name}: clone"), &clone);
    std::fs::remove_file(image).unwrap();
    std::fs::remove_file(target).unwrap();
}

#[test]
fn sixteen_tebibytes_of_ext4_fit() {
    let dir = temp_dir();
    let source = dir.path().join("source");
    // As few copies of the group descriptors as possible: each is 8 MiB.
    let options = "-b 4096 -N 1000000 -O sparse_super2 -E num_backup_sb=1,nodiscard -J size=16";
    ext4(&source, 16 * TIB - 4096, options, None);
    check("16 TiB of ext4", dir.path(), &source);
}

#[test]
fn sixteen_tebibytes_of_xfs_fit() {
    let dir = temp_dir();
    let source = dir.path().join("source");
    sparse_file(&source, 16 * TIB);
    let options = ["-q", "-K", "-l", "size=64m"].map(Path::new);
    tool("mkfs.xfs", options.into_iter().chain([source.as_path()]));
    check("16 TiB of XFS", dir.path(), &source);
}

/// Every other block of some groups is in use: as many runs as there can be.
#[test]
fn a_fragmented_map_fits() {
    let dir = temp_dir();
    let source = dir.path().join("source");
    // No checksums, so that the bitmaps can be filled in by hand.
    let options = "-b 4096 -N 1000000 -O sparse_super2,^metadata_csum,^uninit_bg,^resize_inode \
                   -E num_backup_sb=1,nodiscard -J size=16";
    ext4(&source, 8 * TIB, options, None);
    let groups = count(8, 64);
    fragment(&source, groups);
    let runs = map(&source).used.runs().len() as u64;
    assert!(runs > groups * 10_000, "only {runs} runs");
    check("8 TiB in fragments", dir.path(), &source);
}

/// Sets every other free bit of so many groups of an ext4 without checksums, all over the volume.
fn fragment(image: &Path, groups: u64) {
    const BLOCK: u64 = 4096;
    const DESCRIPTOR: u64 = 64;
    let file = OpenOptions::new().read(true).write(true).open(image);
    let file = file.unwrap();
    let all = 8 * TIB / (BLOCK * BLOCK * 8);
    let u32_at = |offset: u64| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u32::from_le_bytes(bytes)
    };
    let mut taken = 0;
    for number in 0..groups {
        // The descriptors follow the superblock's block: bitmap at 0 and 0x20, free blocks at 0xc.
        let descriptor = BLOCK + (number * (all / groups) + 7) * DESCRIPTOR;
        let bitmap = u64::from(u32_at(descriptor)) | u64::from(u32_at(descriptor + 0x20)) << 32;
        let mut bits = vec![0; BLOCK as usize];
        file.read_exact_at(&mut bits, bitmap * BLOCK).unwrap();
        let mut set = 0;
        for byte in &mut bits {
            set += (0x55 & !*byte).count_ones();
            *byte |= 0x55;
        }
        file.write_all_at(&bits, bitmap * BLOCK).unwrap();
        let free = u32_at(descriptor + 0xc) - set;
        file.write_all_at(&free.to_le_bytes()[..2], descriptor + 0xc)
            .unwrap();
        taken += set;
    }
    // The superblock counts them too: s_free_blocks_count_lo at 0xc.
    let free = u32_at(1024 + 0xc) - taken;
    file.write_all_at(&free.to_le_bytes(), 1024 + 0xc).unwrap();
}

#[test]
fn gibibytes_fit() {
    let size = count(1, 3) * GIB;
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = dir.path().join("source");
    let file = sparse_file(&source, size);
    let mut bytes = vec![0; 16 << 20];
    rng.fill(&mut bytes);
    for number in 0..size / bytes.len() as u64 {
        // Half noise, half text, so that nothing is alike.
        let len = bytes.len();
        bytes[..len / 2].rotate_left(4099);
        bytes[len / 2..].fill(number as u8);
        file.write_all_at(&bytes, number * len as u64).unwrap();
    }
    drop(file);
    check("GiBs", dir.path(), &source);
    let image = dir.path().join("image");
    for (compress, limit) in [
        ("none", 32 << 10),
        ("zstd:1", 48 << 10),
        ("zstd:3", 64 << 10),
    ] {
        let how = ["--compress", compress].map(PathBuf::from);
        let backup = [&backup_to(&source, &image)[..], &how].concat();
        bounded(
            &format!("GiBs: backup with {compress} in 16 MiB"),
            &backup,
            "16M",
            limit,
        );
        let target = dir.path().join("target");
        let restore = ["restore".into(), image.clone(), target.clone()];
        let what = format!("GiBs: restore with {compress}");
        bounded(&format!("{what} in 16 MiB"), &restore, "16M", limit);
        std::fs::remove_file(&target).unwrap();
        frugal(&what, &restore);
        std::fs::remove_file(&target).unwrap();
        let verify = ["verify".into(), image.clone()];
        bounded(
            &format!("GiBs: verify with {compress} in 16 MiB"),
            &verify,
            "16M",
            limit,
        );
    }
    for compress in ["none", "zstd:3"] {
        let image = dir.path().join("image");
        let how = ["--compress", compress].map(PathBuf::from);
        let args = [&backup_to(&source, &image)[..], &how].concat();
        frugal(&format!("GiBs: backup with {compress}"), &args);
        frugal(
            &format!("GiBs: verify with {compress}"),
            &["verify".into(), image],
        );
    }
}
