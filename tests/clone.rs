//! `clone --verify`: what was written is read back, and what reads back as something else is found.

use std::path::Path;

use crate::common::holdstill::{listing, run, same_bytes};
use crate::common::scene::onto_a_liar;
use crate::common::volume::{ext4, populate};
use crate::common::{LoopDevice, Mount, Rng, needs_root, run as tool, seed, temp_dir};

const SIZE: u64 = 24 << 20;

fn clone_onto_a_liar(source: &Path, target: &Path) {
    let clone = [Path::new("clone"), source, target].into_iter();
    onto_a_liar(clone.chain([Path::new("--verify")]), target, SIZE);
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
