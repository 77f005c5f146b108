//! Damaged and malicious filesystems: nothing panics, hangs or takes memory without bound, and
//! where there are checksums, damage never makes a used block free.

use std::path::Path;

use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{self, Opened};
use holdstill::units::ByteLen;

use crate::common::apfs::{Container, Shape, seal};
use crate::common::volume::populate;
use crate::common::walking::{Bounded, Changed, Patch, walk};
use crate::common::{Rng, count, run, seed, sparse_file, temp_dir};

/// A volume and where its metadata lies.
struct Victim {
    name: &'static str,
    bytes: Vec<u8>,
    metadata: Vec<Extent>,
    used: ExtentSet,
    /// All metadata has checksums.
    is_checked: bool,
}

/// Something to write in place of a number.
const NASTY: &[u32] = &[
    0,
    1,
    2,
    7,
    8,
    255,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX - 1,
    u32::MAX,
];

/// One small change of something on the volume, mostly of metadata.
fn patch(victim: &Victim, rng: &mut Rng) -> Patch {
    let places = &victim.metadata;
    let place = places[rng.below(places.len() as u64) as usize];
    // Mostly where the fields are.
    let within = if rng.below(3) > 0 {
        place.len.0.min(512)
    } else {
        place.len.0
    };
    let at = place.start.0 + rng.below(within);
    let old = |at: u64, len: usize| {
        let from = at.min(victim.bytes.len() as u64 - len as u64) as usize;
        victim.bytes[from..from + len].to_vec()
    };
    match rng.below(5) {
        0 => (at, vec![old(at, 1)[0] ^ 1 << rng.below(8)]),
        1 => {
            let at = at & !3;
            let number = NASTY[rng.below(NASTY.len() as u64) as usize];
            let bytes = if rng.below(2) == 0 {
                number.to_le_bytes()
            } else {
                number.to_be_bytes()
            };
            (at, bytes.to_vec())
        }
        2 => {
            let at = at & !1;
            let number = NASTY[rng.below(NASTY.len() as u64) as usize] as u16;
            let bytes = if rng.below(2) == 0 {
                number.to_le_bytes()
            } else {
                number.to_be_bytes()
            };
            (at, bytes.to_vec())
        }
        3 => {
            let mut noise = vec![0; 1 + rng.below(64) as usize];
            rng.fill(&mut noise);
            (at, noise)
        }
        _ => {
            // A piece of other metadata: blocks that are whole, but in the wrong place.
            let other = places[rng.below(places.len() as u64) as usize];
            let len = [4, 512, 1024, 4096][rng.below(4) as usize];
            (at & !511, old(other.start.0, len))
        }
    }
}

/// Walks a changed volume; what a caller could come to believe is free must be free.
fn attack(victim: &Victim, source: &Changed<'_>, is_damage: bool) {
    let source = Bounded::new(source);
    for opened in [fs::open(&source), fs::open_frozen(&source)] {
        let Ok(Opened::Known(filesystem)) = opened else {
            continue;
        };
        let _ = filesystem.volumes(&source);
        let (used, result) = walk(filesystem.as_ref(), &source);
        if result.is_err() || !is_damage || !filesystem.condition().is_settled_if_frozen() {
            continue;
        }
        for run in victim.used.runs() {
            let lost = used.gaps(*run).next();
            assert_eq!(lost, None, "{}: a used block became free", victim.name);
        }
    }
}

/// The same; says what was changed should it fail.
fn survive(victim: &Victim, source: &Changed<'_>, seed: u64, is_damage: bool) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        attack(victim, source, is_damage);
    }));
    assert!(
        result.is_ok(),
        "failed on {}, HOLDSTILL_SEED={seed}: {:?}",
        victim.name,
        source.patches
    );
}

fn run_all(victims: &[Victim], tries: u64) {
    let seed = seed();
    for victim in victims {
        for number in 0..tries {
            let mut rng = Rng(seed.wrapping_add(number));
            // One change of checked metadata is damage. Several could be a forgery: whole blocks
            // may come to lie in each other's places.
            let changes = if rng.below(2) == 0 {
                1
            } else {
                1 + rng.below(6)
            };
            let patches: Vec<_> = (0..changes).map(|_| patch(victim, &mut rng)).collect();
            let len = victim.bytes.len() as u64;
            let len = if rng.below(20) == 0 {
                rng.below(len)
            } else {
                len
            };
            let source = Changed {
                base: &victim.bytes,
                len: ByteLen(len),
                patches,
                broken: (rng.below(8) == 0).then(|| {
                    let places = &victim.metadata;
                    let place = places[rng.below(places.len() as u64) as usize];
                    Extent::new(place.start.0 & !4095, 4096)
                }),
            };
            let is_damage = victim.is_checked && changes == 1;
            survive(victim, &source, seed.wrapping_add(number), is_damage);
        }
    }
}

fn victim(
    name: &'static str,
    is_checked: bool,
    make: impl FnOnce(&Path),
    places: impl FnOnce(&[u8]) -> Vec<Extent>,
) -> Victim {
    let dir = temp_dir();
    let image = dir.path().join("image");
    make(&image);
    let bytes = std::fs::read(&image).unwrap();
    let Ok(Opened::Known(filesystem)) = fs::open(&bytes) else {
        panic!("{name} does not open");
    };
    let (used, result) = walk(filesystem.as_ref(), &bytes);
    assert_eq!(result.unwrap().warnings, [""; 0], "{name}");
    let metadata = places(&bytes);
    Victim {
        name,
        bytes,
        metadata,
        used,
        is_checked,
    }
}

#[test]
fn ext4() {
    let dir = temp_dir();
    let tree = dir.path().join("tree");
    populate(&tree, &mut Rng(1), 4 << 20);
    let kinds: &[(&str, bool, &str)] = &[
        ("checked", true, "-b 1024"),
        (
            "checked, 32 bit, meta_bg",
            true,
            "-b 1024 -g 512 -N 2048 -O ^64bit,meta_bg,^resize_inode",
        ),
        ("uninit_bg", false, "-b 1024 -O ^metadata_csum,uninit_bg"),
        (
            "plain",
            false,
            "-b 1024 -O ^metadata_csum,^uninit_bg,^64bit",
        ),
        (
            "bigalloc",
            false,
            "-b 1024 -O ^metadata_csum,^uninit_bg,bigalloc",
        ),
        (
            "meta_bg",
            false,
            "-b 1024 -g 512 -N 2048 -O ^metadata_csum,meta_bg,^resize_inode",
        ),
        ("mmp", true, "-b 4096 -g 1024 -O mmp"),
    ];
    let victims: Vec<_> = kinds
        .iter()
        .map(|&(name, is_checked, options)| {
            let make = |image: &Path| {
                sparse_file(image, 32 << 20);
                let mut args = vec!["-q", "-t", "ext4", "-d", tree.to_str().unwrap()];
                args.extend(options.split_whitespace());
                args.push(image.to_str().unwrap());
                run("mke2fs", args);
            };
            let places = |bytes: &[u8]| {
                let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                let block = 1024u64 << number(1024 + 0x18);
                let descs = (1024 / block + 1) * block;
                let mut places = vec![Extent::new(1024, 1024), Extent::new(1024, 1024)];
                places.push(Extent::new(descs, 1024));
                // Group descriptors begin with the block of the bitmap.
                for desc in bytes[descs as usize..][..1024].chunks(32) {
                    let bitmap = u64::from(u32::from_le_bytes(desc[..4].try_into().unwrap()));
                    if bitmap > 0 && (bitmap + 1) * block <= bytes.len() as u64 {
                        places.push(Extent::new(bitmap * block, block));
                    }
                }
                places
            };
            victim(name, is_checked, make, places)
        })
        .collect();
    run_all(&victims, count(300, 20_000));
}

#[test]
fn xfs() {
    let dir = temp_dir();
    let tree = dir.path().join("tree");
    populate(&tree, &mut Rng(2), 4 << 20);
    let kinds: &[(&str, bool, &str)] = &[
        ("version 5", true, "-b size=4096"),
        ("version 5, fragmented", true, "-b size=1024 -m rmapbt=1"),
        ("version 4", false, "-m crc=0 -b size=512"),
        ("version 4, log version 1", false, "-m crc=0 -l version=1"),
    ];
    let victims: Vec<_> = kinds
        .iter()
        .map(|&(name, is_checked, options)| {
            let mut planted = Vec::new();
            let make = |image: &Path| {
                sparse_file(image, 64 << 20);
                let proto = dir.path().join("proto");
                std::fs::write(&proto, crate::xfs::prototype(&tree)).unwrap();
                let mut args = vec!["-q", "-f", "--unsupported", "-d", "agcount=3"];
                args.extend(options.split_whitespace());
                args.extend(["-p", proto.to_str().unwrap(), image.to_str().unwrap()]);
                run("mkfs.xfs", args);
                if !is_checked {
                    // A tree of several levels, which mkfs does not make.
                    let mut bytes = std::fs::read(image).unwrap();
                    let blocks = u32::from_be_bytes(bytes[84..88].try_into().unwrap());
                    let runs = crate::xfs::random_runs(&mut Rng(3), blocks, 200);
                    planted = crate::xfs::plant_tree(&mut bytes, &runs, 8);
                    std::fs::write(image, bytes).unwrap();
                }
            };
            let places = |bytes: &[u8]| {
                let number = |at: usize| {
                    u64::from(u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()))
                };
                let block = number(4);
                let (group_blocks, groups) = (number(84), number(88));
                let mut places = vec![Extent::new(0, 272), Extent::new(0, 272)];
                for group in 0..groups {
                    let start = group * group_blocks * block;
                    places.push(Extent::new(start + 512, 224));
                    places.push(Extent::new(start + 1024, 512));
                    places.push(Extent::new(start + 1536, 512));
                    let root = number(start as usize + 512 + 16);
                    places.push(Extent::new(start + root * block, block));
                }
                let log_start = u64::from_be_bytes(bytes[48..56].try_into().unwrap());
                let shift = bytes[124];
                let log = (log_start >> shift) * group_blocks + (log_start & ((1 << shift) - 1));
                places.push(Extent::new(log * block, 2048));
                places.push(Extent::new(log * block, number(96) * block));
                places
            };
            let mut victim = victim(name, is_checked, make, places);
            let block = u64::from(u32::from_be_bytes(victim.bytes[4..8].try_into().unwrap()));
            for number in planted {
                victim
                    .metadata
                    .push(Extent::new(u64::from(number) * block, block));
            }
            victim
        })
        .collect();
    run_all(&victims, count(300, 20_000));
}

/// Small btrfs with trees of more than one level, all with CRC-32C.
fn btrfs_victims() -> Vec<Victim> {
    let dir = temp_dir();
    let tree = dir.path().join("tree");
    populate(&tree, &mut Rng(3), 1 << 20);
    let mut content = vec![0; 5000];
    for number in 0..300 {
        Rng(number).fill(&mut content);
        std::fs::write(tree.join(format!("small{number}")), &content).unwrap();
    }
    let kinds: &[(&str, &str)] = &[
        ("mixed", "-M"),
        ("single", "-m single -n 4096"),
        ("dup", "-m dup -n 4096"),
    ];
    let victims = kinds.iter().map(|&(name, options)| {
        let make = |image: &Path| {
            sparse_file(image, 32 << 20);
            let mut args = vec!["-q", "--rootdir", tree.to_str().unwrap()];
            args.extend(options.split_whitespace());
            args.push(image.to_str().unwrap());
            run("mkfs.btrfs", args);
        };
        victim(name, true, make, btrfs_metadata)
    });
    victims.collect()
}

/// Superblocks, and whatever looks like a tree block of the filesystem and has the right checksum: older
/// ones, too.
fn btrfs_metadata(bytes: &[u8]) -> Vec<Extent> {
    const SUPER: usize = 64 << 10;
    let uuid = &bytes[SUPER + 0x20..][..16];
    let node = u32::from_le_bytes(bytes[SUPER + 0x94..][..4].try_into().unwrap()) as usize;
    let is_block = |at: usize| {
        let block = bytes.get(at..at + node)?;
        let sum = u32::from_le_bytes(block[..4].try_into().unwrap());
        (&block[0x20..0x30] == uuid && crc32c::crc32c(&block[32..]) == sum).then_some(())
    };
    let mut places = vec![Extent::new(SUPER as u64, 4096); 8];
    places.push(Extent::new(64 << 20, 4096));
    places.retain(|place| place.end().0 <= bytes.len() as u64);
    let blocks = (1 << 20..bytes.len())
        .step_by(4096)
        .filter(|at| is_block(*at).is_some());
    for at in blocks {
        // Root, extent, chunk and device tree: what the map is made of, more often than the rest.
        let owner = u64::from_le_bytes(bytes[at + 0x58..][..8].try_into().unwrap());
        let times = if owner <= 4 { 5 } else { 1 };
        places.extend(vec![Extent::new(at as u64, node as u64); times]);
    }
    places
}

#[test]
fn btrfs() {
    run_all(&btrfs_victims(), count(300, 20_000));
}

/// Changes that checksums cannot tell, for `forge` makes them right again.
fn run_forged(victims: &[Victim], tries: u64, forge: fn(&Victim, &mut Rng) -> Vec<Patch>) {
    let seed = seed();
    for victim in victims {
        for number in 0..tries {
            let mut rng = Rng(seed.wrapping_add(number));
            let source = Changed {
                base: &victim.bytes,
                len: ByteLen(victim.bytes.len() as u64),
                patches: forge(victim, &mut rng),
                broken: None,
            };
            survive(victim, &source, seed.wrapping_add(number), false);
        }
    }
}

fn forge_btrfs(victim: &Victim, rng: &mut Rng) -> Vec<Patch> {
    let mut bytes: Vec<Patch> = Vec::new();
    for _ in 0..1 + rng.below(3) {
        let places = &victim.metadata;
        let place = places[rng.below(places.len() as u64) as usize];
        let old = |place: Extent| {
            let start = place.start.0 as usize;
            victim.bytes[start..start + place.len.0 as usize].to_vec()
        };
        let mut block = old(place);
        let within = block.len() - 8;
        // Mostly where headers and the first entries are.
        let at = match rng.below(3) {
            0 => rng.below(within as u64),
            1 => 0x20 + rng.below(0x100),
            _ => 0x58 + rng.below(0x60),
        } as usize;
        match rng.below(5) {
            0 => block[at] ^= 1 << rng.below(8),
            1 => {
                let number = NASTY[rng.below(NASTY.len() as u64) as usize];
                block[at..at + 4].copy_from_slice(&number.to_le_bytes());
            }
            2 => {
                // The address, generation or first key of another block, or of itself.
                let other = places[rng.below(places.len() as u64) as usize];
                let from = [0x30, 0x50, 0x65][rng.below(3) as usize];
                let field = &old(other)[from..from + 8];
                block[at..at + 8].copy_from_slice(field);
            }
            3 => {
                // A pointer of a node leads elsewhere, loops included.
                let other = places[rng.below(places.len() as u64) as usize];
                let pointer = 0x65 + 17 + 33 * rng.below(8) as usize;
                block[pointer..pointer + 8].copy_from_slice(&old(other)[0x30..0x38]);
            }
            _ => {
                // Another block's content under this one's address.
                let other = places[rng.below(places.len() as u64) as usize];
                let address = block[0x30..0x38].to_vec();
                let len = block.len().min(other.len.0 as usize);
                block[..len].copy_from_slice(&old(other)[..len]);
                block[0x30..0x38].copy_from_slice(&address);
            }
        }
        let sum = crc32c::crc32c(&block[32..]);
        block[..4].copy_from_slice(&sum.to_le_bytes());
        // In all copies: else the other one would be taken.
        let copies = places.iter().filter(|other| old(**other) == old(place));
        bytes.extend(copies.map(|copy| (copy.start.0, block.clone())));
    }
    bytes
}

#[test]
fn btrfs_with_forged_metadata() {
    run_forged(&btrfs_victims(), count(300, 20_000), forge_btrfs);
}

/// Containers by the tool of others and written for the purpose, small enough for memory.
fn apfs_victims() -> Vec<Victim> {
    let shape = Shape {
        blocks: 9000,
        ..Shape::SMALL
    };
    let written = |shape: Shape, image: &Path| {
        let mut container = Container::new(shape, 7, &[3000..3003, 4000..4700]);
        for commit in 0..5 {
            container.commit(&[3000..3003, 5000 + commit * 10..5500, 8999..9000]);
        }
        std::fs::write(image, container.bytes()).unwrap();
    };
    let with_cabs = Shape {
        has_cabs: true,
        maps: 2,
        ..shape
    };
    vec![
        victim(
            "by mkapfs",
            true,
            |image| {
                sparse_file(image, 160 << 20);
                run("mkapfs", [image]);
            },
            apfs_metadata,
        ),
        victim(
            "several checkpoints",
            true,
            |image| written(shape, image),
            apfs_metadata,
        ),
        victim(
            "with CABs",
            true,
            |image| written(with_cabs, image),
            apfs_metadata,
        ),
    ]
}

/// All objects: whatever has the right checksum, or would have it with what follows. Bitmaps have none,
/// and a change that leaves as many bits set cannot be told.
fn apfs_metadata(bytes: &[u8]) -> Vec<Extent> {
    const BLOCK: usize = 4096;
    let mut places = Vec::new();
    for at in (0..bytes.len()).step_by(BLOCK) {
        let kind = u32::from_le_bytes(bytes[at + 24..at + 28].try_into().unwrap());
        let len = [BLOCK, 2 * BLOCK].into_iter().find(|len| {
            let mut object = bytes.get(at..at + len).unwrap_or_default().to_vec();
            let is_object = !object.is_empty() && object[..8] != [0; 8];
            if is_object {
                seal(&mut object);
            }
            is_object && object[..8] == bytes[at..at + 8]
        });
        if let Some(len) = len {
            // What the map is made of, more often than the rest.
            let times = if matches!(kind & 0xffff, 1 | 5 | 6 | 7 | 12) {
                5
            } else {
                1
            };
            places.extend(vec![Extent::new(at as u64, len as u64); times]);
        }
    }
    assert!(places.len() > 20, "{}", places.len());
    places
}

#[test]
fn apfs() {
    run_all(&apfs_victims(), count(300, 10_000));
}

fn forge_apfs(victim: &Victim, rng: &mut Rng) -> Vec<Patch> {
    let mut patches: Vec<Patch> = Vec::new();
    for _ in 0..1 + rng.below(3) {
        let place = victim.metadata[rng.below(victim.metadata.len() as u64) as usize];
        let start = place.start.0 as usize;
        let mut object = victim.bytes[start..start + place.len.0 as usize].to_vec();
        // Mostly where headers and the first entries are.
        let at = match rng.below(3) {
            0 => 8 + rng.below(object.len() as u64 - 16),
            1 => 8 + rng.below(0x90),
            _ => 0x20 + rng.below(0x60),
        } as usize;
        match rng.below(3) {
            0 => object[at] ^= 1 << rng.below(8),
            1 => {
                let number = NASTY[rng.below(NASTY.len() as u64) as usize];
                let at = at & !3;
                object[at..at + 4].copy_from_slice(&number.to_le_bytes());
            }
            _ => {
                // The address of another object.
                let other = rng.below(victim.metadata.len() as u64) as usize;
                let address = victim.metadata[other].start.0 / 4096;
                let at = at & !7;
                object[at..at + 8].copy_from_slice(&address.to_le_bytes());
            }
        }
        seal(&mut object);
        patches.push((place.start.0, object));
    }
    patches
}

#[test]
fn apfs_with_forged_metadata() {
    run_forged(&apfs_victims(), count(300, 10_000), forge_apfs);
}
