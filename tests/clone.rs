//! `clone --verify`: what was written is read back, and what reads back as something else is found.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::holdstill::{command, listing, run, same_bytes, wait};
use crate::common::scene::assert_no_signature;
use crate::common::volume::{ext4, poisoned_file, populate};
use crate::common::{LoopDevice, Mount, Rng, needs_root, run as tool, seed, spawn, temp_dir};

const SIZE: u64 = 24 << 20;

/// Where a test damages its target: not in what is written last.
const MIDDLE: Range<usize> = 2 << 20..20 << 20;

/// A target that does not hold what was written to it: while the rest is still being copied, a block
/// that has arrived is changed. The clone must end with 4.
fn clone_onto_a_liar(source: &Path, target: &Path) {
    poisoned_file(target, SIZE);
    let args = [Path::new("clone"), source, target].into_iter();
    let options = ["--verify", "--yes", "--rate", "12M", "--threads", "1"].map(Path::new);
    let mut program = command(args.chain(options));
    let child = spawn(&mut program);
    // Not for writing yet: a target that somebody writes to is refused.
    let file = File::open(target).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let mut bytes = vec![0; MIDDLE.len()];
    let damaged = loop {
        assert!(Instant::now() < end, "nothing was ever copied");
        file.read_exact_at(&mut bytes, MIDDLE.start as u64).unwrap();
        let mut blocks = bytes.chunks(4096);
        let is_copied = |block: &[u8]| block.iter().any(|byte| *byte != 0xa5);
        if let Some(number) = blocks.position(is_copied) {
            break number * 4096;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let file = OpenOptions::new().write(true).open(target).unwrap();
    let damaged_at = (MIDDLE.start + damaged) as u64;
    file.write_all_at(&[bytes[damaged] ^ 1], damaged_at)
        .unwrap();
    wait(&program, child)
        .expect(4)
        .says("4.0 KiB (4096 bytes) differ")
        .says(&damaged_at.to_string());
    assert_no_signature(target);
}

/// A raw file that is in use from end to end.
fn full_source(path: &Path) {
    let mut rng = Rng(seed() | 1);
    let bytes: Vec<u8> = (0..SIZE / 8)
        .flat_map(|_| rng.next_u64().to_le_bytes())
        .collect();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_was_cloned_is_read_back() {
    let dir = temp_dir();
    let [source, target] = ["source", "target"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", Some(Path::new("/usr/include/linux")));
    let args = [Path::new("clone"), &source, &target].into_iter();
    let options = ["--verify", "--json"].map(Path::new);
    let json = run(args.clone().chain(options)).expect(0).last();
    assert_eq!(json["verified"], true);
    tool("e2fsck", [Path::new("-fn"), &target]);
    std::fs::remove_file(&target).unwrap();
    let json = run(args.chain([Path::new("--json")])).expect(0).last();
    assert_eq!(json["verified"], false);
}

#[test]
fn a_target_that_reads_back_as_something_else_is_found() {
    let dir = temp_dir();
    let [source, target] = ["source", "target"].map(|part| dir.path().join(part));
    full_source(&source);
    clone_onto_a_liar(&source, &target);
    std::fs::remove_file(&target).unwrap();
    run([Path::new("clone"), &source, &target, Path::new("--verify")]).expect(0);
    assert!(same_bytes(&source, &target));
    assert_eq!(listing(dir.path()), ["source", "target"]);
}

/// The same of a mounted volume, whose writes are tracked.
#[test]
fn privileged_a_live_clone_is_read_back() {
    needs_root!();
    let dir = temp_dir();
    let [file, target] = ["volume", "target"].map(|part| dir.path().join(part));
    ext4(&file, SIZE, "", None);
    let device = LoopDevice::attach(&file);
    let mount = Mount::new(device.path(), &dir.path().join("live"), "ext4", "");
    // So much that the block in the middle is in use.
    populate(mount.dir(), &mut Rng(seed() | 1), 16 << 20);
    clone_onto_a_liar(mount.dir(), &target);
}
