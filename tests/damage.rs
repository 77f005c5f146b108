//! Damage to real images, by the bit and by the byte: `verify` finds all of it, and `restore` never
//! writes wrong data in silence.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::holdstill::{run, run_from};
use crate::common::scene::{SIZE, Scene, assert_no_signature, backup_to};
use crate::common::volume::poisoned_file;
use crate::common::{Rng, count, seed};

/// Images of a real filesystem, compressed and not.
fn images(scene: &Scene) -> [PathBuf; 2] {
    ["zstd:1", "none"].map(|compress| {
        let image = scene.path(compress);
        let how = ["--compress", compress].map(PathBuf::from);
        run(backup_to(&scene.source, &image).into_iter().chain(how)).expect(0);
        image
    })
}

/// Verifies and restores what is damaged; both must see it, and leave no filesystem.
fn assert_found(image: &Path, target: &Path, what: &str) {
    let verified = run([Path::new("verify"), image]);
    assert_eq!(verified.code(), Some(4), "{what}: {verified}");
    run_from(image, ["verify", "-"]).expect(4);
    let restored = run([Path::new("restore"), Path::new("--yes"), image, target]);
    assert_eq!(restored.code(), Some(4), "{what}: {restored}");
    assert_no_signature(target);
}

#[test]
fn every_flipped_bit_of_an_image_is_found() {
    let mut rng = Rng(seed());
    let scene = Scene::new();
    let target = scene.target(SIZE);
    for image in images(&scene) {
        let file = std::fs::File::options().read(true).write(true).open(&image);
        let file = file.unwrap();
        let bits = file.metadata().unwrap().len() * 8;
        for _ in 0..count(25, 1000) {
            let bit = rng.below(bits);
            let mut byte = [0];
            file.read_exact_at(&mut byte, bit / 8).unwrap();
            let damaged = byte[0] ^ 1 << (bit % 8);
            file.write_all_at(&[damaged], bit / 8).unwrap();
            assert_found(&image, &target, &format!("bit {bit} of {bits}"));
            file.write_all_at(&byte, bit / 8).unwrap();
        }
        run([Path::new("verify"), &image]).expect(0);
    }
}

#[test]
fn every_truncation_of_an_image_is_found() {
    let mut rng = Rng(seed());
    let scene = Scene::new();
    let target = scene.target(SIZE);
    for image in images(&scene) {
        let bytes = std::fs::read(&image).unwrap();
        let cut = scene.path("cut");
        for number in 0..count(10, 100) {
            // Also at the borders of blocks, where records begin and end.
            let mut len = rng.below(bytes.len() as u64) as usize;
            if number % 2 == 0 {
                len -= len % 4096;
            }
            std::fs::write(&cut, &bytes[..len]).unwrap();
            assert_found(&cut, &target, &format!("cut at {len}"));
        }
    }
}

/// Damage to a target after it was restored is found by comparing.
#[test]
fn every_flipped_bit_of_a_restored_volume_is_found() {
    let mut rng = Rng(seed());
    let scene = Scene::new();
    let target = scene.path("target");
    poisoned_file(&target, SIZE);
    run(scene.restore_to(&target)).expect(0);
    let used = crate::common::volume::map(&scene.source).used;
    let against = [
        Path::new("verify"),
        &scene.image,
        Path::new("--against"),
        &target,
    ];
    run(against).expect(0);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&target);
    let file = file.unwrap();
    for _ in 0..count(20, 500) {
        let mut at = rng.below(used.bytes().0);
        let run_with_it = used.runs().iter().find(|run| {
            let is_here = at < run.len.0;
            if !is_here {
                at -= run.len.0;
            }
            is_here
        });
        let offset = run_with_it.unwrap().start.0 + at;
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << rng.below(8)], offset)
            .unwrap();
        run(against).expect(4);
        file.write_all_at(&byte, offset).unwrap();
    }
    run(against).expect(0);
}
