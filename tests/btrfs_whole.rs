//! What of btrfs is copied as a whole, because its map is not understood or must not be trusted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use holdstill::fs::{self, Opened};
use holdstill::read_at::ReadAt;

use crate::common::btrfs::{
    Scene, change_super, filled, forget, making, number_after, patch, why_all_blocks,
};
use crate::common::btrfs_chunks::{copies_of, printed_chunks};
use crate::common::volume::{copy, map};
use crate::common::walking::walk;
use crate::common::{FileSource, Mount, Rng, holdstill as program, needs_root, run, seed};

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
    let copies = copies_of(&printed_chunks(&[file]), logical);
    copies.into_iter().map(|(_, place)| place).collect()
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
    let mut devices = scene.loops.iter().map(|device| {
        let source = FileSource::open(device.path());
        Arc::new(source) as Arc<dyn ReadAt>
    });
    let named = devices.next().unwrap();
    let others: Vec<_> = devices.collect();
    match fs::open_with(named.as_ref(), &others).unwrap() {
        Opened::AllBlocks { why, .. } => assert!(why.contains("RAID5"), "{why}"),
        other => panic!("{other:?}"),
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
    let inspected = program::run(["inspect".as_ref(), &*single, "--json".as_ref()]);
    let inspected = inspected.expect(0).last();
    assert_eq!(inspected["used_bytes"], serde_json::Value::Null);
    let warning = inspected["warnings"][0].as_str().unwrap();
    assert!(warning.contains("wrong checksum"), "{warning}");
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
