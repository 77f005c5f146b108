//! APFS: what is in use, by the tools of others, by containers written for the purpose, and after
//! damage.

#![allow(
    clippy::single_range_in_vec_init,
    reason = "runs of blocks, of which there may be one"
)]

use std::os::unix::fs::FileExt;
use std::path::Path;

use holdstill::error::{Kind as ErrorKind, Result};
use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{self, Condition, DirtyReason, Opened};
use holdstill::read_at::ReadAt;
use holdstill::units::{ByteLen, Offset};

use crate::common::apfs::{Container, Places, Shape, seal};
use crate::common::volume::{map, open, poisoned_file};
use crate::common::walking::walk;
use crate::common::{Rng, count, holdstill as program, output, run, seed, sparse_file, temp_dir};

/// A container by the tool of others; it makes none below some 130 MiB.
fn mkapfs(path: &Path, size: u64) {
    sparse_file(path, size);
    run("mkapfs", [Path::new("-L"), Path::new("label"), path]);
}

/// What the checker says of a container, and whether that is nothing.
fn apfsck(path: &Path) -> (bool, String) {
    let found = output("apfsck", [Path::new("-c"), path]);
    let text = [found.stdout, found.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (found.status.success(), text)
}

/// What `partclone.apfs` calls used.
fn used_by_partclone(path: &Path, scratch: &Path) -> ExtentSet {
    let domain = scratch.join("domain");
    let args = ["-D", "-q", "-L", "/dev/null", "-s"].map(Path::new);
    let more = [path, Path::new("-O"), &domain];
    run("partclone.apfs", args.into_iter().chain(more));
    let text = std::fs::read_to_string(&domain).unwrap();
    let mut used = ExtentSet::new();
    // `0x00000000  0x01751000  +`
    for line in text.lines().filter(|line| line.ends_with('+')) {
        let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
        let mut words = line.split_whitespace().map(number);
        used.insert(Extent::new(words.next().unwrap(), words.next().unwrap()));
    }
    used
}

/// Overwrites what is free, of large gaps only the first and the last MiB.
fn poison_edges(path: &Path, used: &ExtentSet, size: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    for gap in used.gaps(Extent::new(0, size)) {
        let len = gap.len.0.min(1 << 20);
        let poison = vec![0xa5; len as usize];
        file.write_all_at(&poison, gap.start.0).unwrap();
        file.write_all_at(&poison, gap.end().0 - len).unwrap();
    }
}

#[test]
fn the_map_is_that_of_others_and_all_that_is_needed() {
    let dir = temp_dir();
    for size in [
        160 << 20,
        (1 << 30) + 8192,
        40 << 30,
        1 << 40,
        (6 << 40) - (1 << 20),
    ] {
        println!("{size} bytes");
        let path = dir.path().join("container");
        mkapfs(&path, size);
        let map = map(&path);
        assert_eq!(map.condition, Condition::Clean);
        assert_eq!(map.walk.warnings, [""; 0]);
        // It takes block 0 for the bitmap of a chunk that needs none.
        let theirs = used_by_partclone(&path, dir.path());
        for run in map.used.runs() {
            assert_eq!(theirs.gaps(*run).next(), None);
        }
        let chunk = Extent::new(0, 128 << 20);
        let [ours, theirs] = [&map.used, &theirs].map(|used| used.gaps(chunk).collect::<Vec<_>>());
        assert_eq!(ours, theirs);
        // It finds fault with its own large ones.
        let before = apfsck(&path);
        assert!(before.0 || size > 1 << 40, "{}", before.1);
        poison_edges(&path, &map.used, size);
        assert_eq!(apfsck(&path), before);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_container_comes_back_onto_a_poisoned_file() {
    const SIZE: u64 = 300 << 20;
    let dir = temp_dir();
    let [source, image, target] =
        ["source", "image.still", "target"].map(|name| dir.path().join(name));
    // The file is somewhat larger than the container on it.
    mkapfs(&source, SIZE);
    let tail = vec![7; 5 << 10];
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&source)
        .unwrap();
    file.write_all_at(&tail, SIZE).unwrap();
    drop(file);
    let size = SIZE + tail.len() as u64;
    let used = map(&source).walk.used.0;
    assert!(used < 40 << 20, "{used}");

    let args = [Path::new("backup"), Path::new("--json"), &source];
    let args = args.into_iter().chain([Path::new("-o"), &image]);
    let report = program::run(args).expect(0).last();
    let volume = &report["volumes"][0];
    assert_eq!(volume["fs"], "apfs");
    assert_eq!(volume["grade"], "clean");
    assert_eq!(volume["used_bytes"], used);
    poisoned_file(&target, size);
    program::run([Path::new("restore"), Path::new("--yes"), &image, &target]).expect(0);
    assert_eq!(apfsck(&target), (true, String::new()));
    let mut copied = vec![0; tail.len()];
    let copy = std::fs::File::open(&target).unwrap();
    copy.read_exact_at(&mut copied, SIZE).unwrap();
    assert_eq!(copied, tail);
}

fn runs(rng: &mut Rng, container: &Container) -> Vec<std::ops::Range<u64>> {
    let (from, to) = (container.free_from(), container.shape.blocks);
    let mut runs: Vec<_> = (0..12)
        .map(|_| {
            let start = from + rng.below(to - from);
            start..(start + 1 + rng.below(200)).min(to)
        })
        .collect();
    // The very last one.
    runs.push(to - 1..to);
    runs
}

fn assert_map(container: &Container) {
    let filesystem = open(container);
    let unmounted = container.written[&0] == container.written[&container.places.superblock];
    let condition = match unmounted {
        true => Condition::Clean,
        false => Condition::Interrupted,
    };
    assert_eq!(filesystem.condition(), condition);
    let (used, walked) = walk(filesystem.as_ref(), container);
    assert_eq!(walked.unwrap().warnings, [""; 0]);
    assert_eq!(used, container.used);
}

#[test]
fn every_block_size_and_ring_is_read() {
    let mut rng = Rng(seed());
    for block_size in [4096, 8192, 16384, 32768, 65536] {
        for (descriptors, data, maps) in [(8, 16, 1), (7, 5, 2), (11, 3, 3)] {
            let shape = Shape {
                block_size,
                blocks: 40_000 + rng.below(700_000),
                descriptors,
                data,
                maps,
                has_cabs: false,
            };
            println!("{shape:?}");
            let first = Container::new(shape, 1 + rng.below(1 << 40), &[]);
            let mut container = Container::new(shape, first.xid, &runs(&mut rng, &first));
            assert_map(&container);
            // Around both rings, block 0 staying as it is.
            for _ in 0..2 * descriptors {
                let runs = runs(&mut rng, &container);
                container.commit(&runs);
                assert_map(&container);
            }
        }
    }
}

#[test]
fn what_was_not_unmounted_is_imaged_by_its_map_and_graded_so() {
    let shape = Shape {
        blocks: 4000,
        ..Shape::SMALL
    };
    let mut container = Container::new(shape, 20, &[2000..2010]);
    container.commit(&[2500..2600]);
    assert_map(&container);
    let dir = temp_dir();
    let [source, image] = ["source", "image.still"].map(|name| dir.path().join(name));
    for (unmounted, grade) in [(false, "crash"), (true, "clean")] {
        if unmounted {
            let newest = container.written[&container.places.superblock].clone();
            container.written.insert(0, newest);
            assert_map(&container);
        }
        std::fs::write(&source, container.bytes()).unwrap();
        let args = ["backup", "--json", "-o"].map(Path::new);
        let args = args.into_iter().chain([image.as_path(), &source]);
        let report = program::run(args).expect(0).last();
        std::fs::remove_file(&image).unwrap();
        assert_eq!(report["volumes"][0]["grade"], grade);
        assert_eq!(report["volumes"][0]["used_bytes"], container.used.bytes().0);
        let warns = report["warnings"].to_string().contains("not unmounted");
        assert_eq!(warns, !unmounted, "{report}");
        let inspected = program::run([Path::new("inspect"), &source]).expect(0);
        let says = inspected
            .to_string()
            .contains("dirty: it was not unmounted");
        assert_eq!(says, !unmounted, "{inspected}");
    }
}

#[test]
fn cib_address_blocks_are_followed() {
    let mut rng = Rng(seed());
    // More CIBs than fit into one CAB; the last of each is not full.
    for (block_size, blocks) in [
        (4096, (9 << 40) / 4096 + 77),
        (4096, (17 << 40) / 4096),
        (8192, (150 << 40) / 8192 + 1),
        (4096, 50_000),
    ] {
        let shape = Shape {
            block_size,
            blocks,
            descriptors: 8,
            data: 16,
            maps: 1,
            has_cabs: true,
        };
        println!("{shape:?}");
        let first = Container::new(shape, 5, &[]);
        let mut container = Container::new(shape, 5, &runs(&mut rng, &first));
        assert_map(&container);
        let again = runs(&mut rng, &container);
        container.commit(&again);
        assert_map(&container);

        // One that is damaged costs what it describes, and no more.
        let per_cab = (block_size - 40) / 8 * ((block_size - 40) / 32) * block_size * 8;
        let cab = container.places.cabs.len() - 1;
        container.flip(container.places.cabs[cab], 50);
        let filesystem = open(&container);
        let (used, walked) = walk(filesystem.as_ref(), &container);
        let warnings = walked.unwrap().warnings;
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let start = cab as u64 * per_cab * block_size;
        let end = blocks * block_size;
        let mut expected = container.used.clone();
        expected.insert(Extent::new(start, end - start));
        assert_eq!(used, expected);
    }
}

#[test]
fn what_is_damaged_in_the_map_is_in_use_as_a_whole() {
    let mut rng = Rng(seed());
    let shape = Shape {
        blocks: 150_000,
        ..Shape::SMALL
    };
    let first = Container::new(shape, 9, &[]);
    let whole = Container::new(shape, 9, &runs(&mut rng, &first));
    let chunk = shape.block_size * 8;
    let extent = |start: u64, end: u64| {
        let [start, end] = [start, end].map(|block| block.min(shape.blocks) * shape.block_size);
        Extent::new(start, end - start)
    };
    let check = |damaged: &Container, lost: Extent, what: &str| {
        let filesystem = open(damaged);
        assert_eq!(filesystem.condition(), Condition::Clean);
        let (used, walked) = walk(filesystem.as_ref(), damaged);
        let warnings = walked.unwrap().warnings;
        assert!(
            warnings.len() == 1 && warnings[0].contains(what),
            "{warnings:?}"
        );
        let mut expected = whole.used.clone();
        expected.insert(lost);
        assert_eq!(used, expected, "{what}");
    };
    for (number, bitmap) in &whole.places.bitmaps {
        let mut damaged = whole.clone();
        damaged.flip(*bitmap, rng.below(600) as usize);
        check(
            &damaged,
            extent(number * chunk, (number + 1) * chunk),
            "by its bitmap",
        );
        // An older one, with other counts.
        let mut damaged = whole.clone();
        damaged
            .written
            .insert(*bitmap, vec![0; shape.block_size as usize]);
        check(
            &damaged,
            extent(number * chunk, (number + 1) * chunk),
            "by its bitmap",
        );
    }
    let [cib] = whole.places.cibs[..] else {
        panic!("not one CIB")
    };
    let mut damaged = whole.clone();
    damaged.flip(cib, 1000);
    check(&damaged, extent(0, shape.blocks), "checksum");
    let forgeries: &[(usize, u64, &str)] = &[
        // Index, count, the first chunk's transaction, start, count and bitmap.
        (32, 3, "another one"),
        (36, 2, "another one"),
        (16, 10, "newer than its checkpoint"),
        (40, 10, "newer than what describes it"),
        (48, 32768, "make no sense"),
        (56, 100, "make no sense"),
        (64, 1 << 50, "behind the container's end"),
        (64, 0, "free blocks by its bitmap"),
    ];
    for (at, number, what) in forgeries {
        let mut damaged = whole.clone();
        damaged.forge(cib, |block| {
            let len = if *at < 40 && *at != 16 || *at == 56 {
                4
            } else {
                8
            };
            block[*at..at + len].copy_from_slice(&number.to_le_bytes()[..len]);
        });
        let lost = if *at < 40 {
            extent(0, shape.blocks)
        } else {
            extent(0, chunk)
        };
        check(&damaged, lost, what);
    }
    // Chunks that agree with their bitmaps, but not with the sum.
    let mut damaged = whole.clone();
    damaged.forge_spaceman(|object| object[72] ^= 1);
    let (_, walked) = walk(open(&damaged).as_ref(), &damaged);
    assert_eq!(walked.unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn what_the_container_needs_is_in_use_whatever_its_bitmap_says() {
    let mut container = Container::new(Shape::SMALL, 3, &[30_000..30_100]);
    let (_, bitmap) = container.places.bitmaps[0];
    let [cib] = container.places.cibs[..] else {
        panic!("not one CIB")
    };
    // The rings and the internal pool are free by the bitmap, and used by nobody else.
    let pool = 33..container.free_from() - 4;
    let block = container.written.get_mut(&bitmap).unwrap();
    let mut freed = 0;
    for bit in pool {
        let mask = 1 << (bit % 8);
        freed += u32::from(block[bit as usize / 8] & mask != 0);
        block[bit as usize / 8] &= !mask;
    }
    container.forge(cib, |block| {
        let free = u32::from_le_bytes(block[60..64].try_into().unwrap());
        block[60..64].copy_from_slice(&(free + freed).to_le_bytes());
    });
    container.forge_spaceman(|object| {
        let free = u64::from_le_bytes(object[72..80].try_into().unwrap()) + u64::from(freed);
        object[72..80].copy_from_slice(&free.to_le_bytes());
    });
    assert_map(&container);
}

/// A change of a container.
type Damage = fn(&mut Container, &Places);

#[test]
fn a_torn_newest_checkpoint_is_not_trusted_and_the_older_one_counts() {
    let torn: &[(&str, Damage)] = &[
        ("superblock", |container, newest| {
            container.flip(newest.superblock, 200);
        }),
        ("superblock lost", |container, newest| {
            container.written.remove(&newest.superblock);
        }),
        ("superblock is noise", |container, newest| {
            container
                .written
                .insert(newest.superblock, vec![0x5a; 4096]);
        }),
        ("map", |container, newest| {
            container.flip(newest.maps[0], 70);
        }),
        ("map lost", |container, newest| {
            container.written.remove(&newest.maps[0]);
        }),
        ("map of another", |container, newest| {
            container.forge(newest.maps[0], |block| block[16] ^= 1);
        }),
        ("map without an end", |container, newest| {
            container.forge(newest.maps[0], |block| block[32] = 0);
        }),
        ("spaceman", |container, newest| {
            container.flip(newest.spaceman[1], 600);
        }),
        ("spaceman is an older one", |container, newest| {
            container.written.insert(newest.spaceman[0], vec![0; 4096]);
        }),
        ("spaceman of the one before", |container, _| {
            // Whole, and in the right place, but the newer one was never written.
            container.forge_spaceman(|object| object[16] -= 1);
        }),
        ("object map", |container, newest| {
            container.flip(newest.omap[0], 60);
        }),
        ("tree of the object map", |container, newest| {
            container.flip(newest.omap[1], 60);
        }),
    ];
    let shape = Shape {
        blocks: 4000,
        ..Shape::SMALL
    };
    for (name, damage) in torn {
        println!("{name}");
        let mut container = Container::new(shape, 20, &[2000..2010]);
        container.commit(&[2000..2020]);
        let older = container.used.clone();
        container.commit(&[3000..3020]);
        let places = container.places.clone();
        damage(&mut container, &places);
        let filesystem = open(&container);
        let dirty = Condition::Dirty {
            reason: DirtyReason::Checkpoint,
        };
        assert_eq!(filesystem.condition(), dirty);
        let (used, walked) = walk(filesystem.as_ref(), &container);
        assert_eq!(walked.unwrap().warnings, [""; 0]);
        assert_eq!(used, older);

        // All blocks are copied, and the grade says why.
        let dir = temp_dir();
        let [source, image, target] =
            ["source", "image.still", "target"].map(|name| dir.path().join(name));
        std::fs::write(&source, container.bytes()).unwrap();
        let args = ["backup", "--json", "-o"].map(Path::new);
        let args = args.into_iter().chain([image.as_path(), &source]);
        let report = program::run(args).expect(0).last();
        assert_eq!(report["volumes"][0]["grade"], "crash");
        assert!(
            report["warnings"].to_string().contains("newest checkpoint"),
            "{report}"
        );
        poisoned_file(&target, container.len().0);
        program::run([Path::new("restore"), Path::new("--yes"), &image, &target]).expect(0);
        assert!(std::fs::read(&target).unwrap() == container.bytes());
    }
    // None is whole.
    let mut container = Container::new(Shape::SMALL, 20, &[]);
    container.flip(container.places.spaceman[0], 40);
    assert!(why_all_blocks(&container).contains("none of its checkpoints is whole"));
    container.flip(container.places.superblock, 40);
    assert!(why_all_blocks(&container).contains("none of its checkpoints has a superblock"));
}

fn why_all_blocks(source: &dyn ReadAt) -> String {
    match fs::open(source).unwrap() {
        Opened::AllBlocks { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

/// Changes both the first superblock and the newest.
fn forge_superblocks(container: &mut Container, at: usize, bytes: &[u8]) {
    for address in [0, container.places.superblock] {
        container.forge(address, |block| {
            block[at..at + bytes.len()].copy_from_slice(bytes);
        });
    }
}

#[test]
fn what_is_not_understood_is_copied_as_a_whole() {
    let whole = Container::new(Shape::SMALL, 20, &[20_000..20_010]);
    let forgeries: &[(usize, &[u8], &str)] = &[
        (36, &[0x01, 0x10], "block size"),
        (36, &[0, 8], "block size"),
        (40, &[0, 0, 0, 1], "larger than the volume"),
        (56, &[1], "features unknown"),
        (65, &[2], "features unknown"),
        (107, &[0x80], "not contiguous"),
        (111, &[0x80], "not contiguous"),
        (106, &[0xff], "checkpoint areas"),
        (112, &[0], "checkpoint areas"),
        (124, &[9], "checkpoint areas"),
    ];
    for (at, bytes, why) in forgeries {
        let mut container = whole.clone();
        forge_superblocks(&mut container, *at, bytes);
        let found = why_all_blocks(&container);
        assert!(found.contains(why), "{at}: {found}");
    }
    let mut container = whole.clone();
    container.flip(0, 300);
    assert!(why_all_blocks(&container).contains("first superblock"));
    // The two differ.
    for (at, byte) in [(36, 0x20), (40, 1), (72, 1), (104, 1), (112, 2)] {
        let mut container = whole.clone();
        container.forge(container.places.superblock, |block| block[at] ^= byte);
        assert!(why_all_blocks(&container).contains("none of its checkpoints is whole"));
    }
    let mut container = whole.clone();
    container.forge(container.places.superblock, |block| block[57] ^= 1);
    assert!(why_all_blocks(&container).contains("differ in their features"));
}

#[test]
fn a_fusion_set_is_refused_by_name() {
    let whole = Container::new(Shape::SMALL, 20, &[]);
    let dir = temp_dir();
    let [source, image] = ["source", "image.still"].map(|name| dir.path().join(name));
    for (at, bytes) in [(65, &[1][..]), (0x500, b"set")] {
        let mut container = whole.clone();
        forge_superblocks(&mut container, at, bytes);
        let error = fs::open(&container).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotApplicable);
        std::fs::write(&source, container.bytes()).unwrap();
        let args = [Path::new("backup"), &source, Path::new("-o"), &image];
        let run = program::run(args);
        assert_eq!(run.code(), Some(3), "{run}");
        assert!(run.to_string().contains("Fusion"), "{run}");
        assert!(!image.exists());
    }
}

/// Finds the newest volume superblock of a container that has one volume.
fn volume_superblock(bytes: &[u8]) -> usize {
    let blocks = (0..bytes.len()).step_by(4096);
    let found = blocks.filter(|at| &bytes[at + 32..at + 36] == b"APSB");
    found
        .max_by_key(|at| bytes[at + 16..at + 24].to_vec())
        .expect("a volume")
}

#[test]
fn inspect_lists_volumes() {
    const SIZE: u64 = 160 << 20;
    let dir = temp_dir();
    let path = dir.path().join("container");
    mkapfs(&path, SIZE);
    let inspect = |path: &Path| {
        let args = [Path::new("inspect"), Path::new("--json"), path];
        program::run(args).expect(0).last()
    };
    let report = inspect(&path);
    assert_eq!(report["fs"], "apfs");
    assert_eq!(report["condition"], "clean");
    let volume = &report["volumes"][0];
    assert_eq!(volume["name"], "label");
    assert_eq!(volume["roles"].to_string(), "[]");
    assert_eq!(volume["encrypted"], false);
    assert_eq!(volume["sealed"], false);
    assert_eq!(volume["snapshots"].to_string(), "[]");
    assert!(report["volumes"][1].is_null());

    let bytes = std::fs::read(&path).unwrap();
    let at = volume_superblock(&bytes);
    let mut block = bytes[at..at + 4096].to_vec();
    // Sealed, not unencrypted, for data, and a name that is not meant for a terminal.
    block[56] |= 0x20;
    block[264] &= !1;
    block[964] = 0x40;
    block[704..712].copy_from_slice(b"\x1b[2Jname");
    seal(&mut block);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&block, at as u64).unwrap();
    let report = inspect(&path);
    let volume = &report["volumes"][0];
    assert_eq!(volume["roles"].to_string(), "[\"data\"]");
    assert_eq!(volume["encrypted"], true);
    assert_eq!(volume["sealed"], true);
    let text = program::run([Path::new("inspect"), &path]).expect(0);
    let text = text.to_string();
    assert!(text.contains("(data, encrypted, sealed)"), "{text}");
    assert!(!text.contains('\x1b'), "{text}");

    // A volume that cannot be read does not make the map untrue.
    block[100] ^= 1;
    file.write_all_at(&block, at as u64).unwrap();
    let report = inspect(&path);
    assert_eq!(report["volumes"].to_string(), "[]");
    assert!(
        report["warnings"].to_string().contains("volumes"),
        "{report}"
    );
    assert!(report["used_bytes"].is_u64());
}

/// A container one block of which is something else.
struct Lost<'a> {
    base: &'a [u8],
    at: u64,
}

impl ReadAt for Lost<'_> {
    fn len(&self) -> ByteLen {
        ReadAt::len(self.base)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        self.base.read_exact_at(buf, offset)?;
        let whole = Extent::new(offset.0, buf.len() as u64);
        if let Some(lost) = whole.intersect(Extent::new(self.at, 4096)) {
            let start = lost.start.since(offset).as_usize();
            buf[start..start + lost.len.as_usize()].fill(0xff);
        }
        Ok(())
    }
}

#[test]
fn whatever_block_is_lost_no_less_is_in_use() {
    let dir = temp_dir();
    let path = dir.path().join("container");
    mkapfs(&path, 160 << 20);
    let whole = map(&path);
    let bytes = std::fs::read(&path).unwrap();
    let blocks: Vec<u64> = (0..whole.used.runs()[0].end().0).step_by(4096).collect();
    for at in Rng(seed()).some(&blocks, count(400, u64::MAX)) {
        let lost = Lost {
            base: &bytes,
            at: *at,
        };
        match fs::open(&lost).unwrap() {
            Opened::Known(filesystem) if filesystem.condition().is_settled() => {
                let (used, walked) = walk(filesystem.as_ref(), &lost);
                if walked.is_ok() {
                    for run in whole.used.runs() {
                        assert_eq!(used.gaps(*run).next(), None, "without the block at {at}");
                    }
                }
            }
            // Block 0 has the magic.
            other => assert!(
                !matches!(other, Opened::NoMap(_))
                    && (*at == 0 || !matches!(other, Opened::Unknown)),
                "{other:?}"
            ),
        }
    }
}
