//! The map of ext2, ext3 and ext4 against the tools that make and check them.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use holdstill::error::{Error, Kind};
use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{self, Condition, DirtyReason, Opened};
use holdstill::read_at::ReadAt;
use holdstill::units::{ByteLen, Offset};

use crate::common::volume::{
    copy, digests, digests_in_ext4, direct_copy, ext4, map, open, poison, populate,
};
use crate::common::walking::walk;
use crate::common::{
    FileSource, LoopDevice, Mount, Rng, count, needs_root, output, run, seed, temp_dir,
};

/// How `mkfs` is called to get every arrangement of metadata and every feature.
const FEATURES: &[(&str, &str)] = &[
    ("default", ""),
    ("1k", "-b 1024"),
    ("2k", "-b 2048 -g 4096"),
    ("4k_small_groups", "-b 4096 -g 2048"),
    ("64k", "-b 65536 -F"),
    ("32bit", "-b 4096 -g 2048 -O ^64bit"),
    ("meta_bg", "-b 1024 -g 512 -N 4096 -O meta_bg,^resize_inode"),
    (
        "meta_bg_32bit",
        "-b 1024 -g 256 -N 4096 -O meta_bg,^resize_inode,^64bit",
    ),
    (
        "meta_bg_no_flex",
        "-b 1024 -g 512 -N 4096 -O meta_bg,^resize_inode,^flex_bg",
    ),
    ("no_flex_bg", "-b 1024 -O ^flex_bg"),
    ("flex_of_4", "-b 1024 -G 4"),
    ("packed_meta_blocks", "-b 1024 -E packed_meta_blocks=1"),
    ("uninit_bg", "-b 1024 -O uninit_bg,^metadata_csum"),
    (
        "uninit_bg_no_flex",
        "-b 1024 -O uninit_bg,^metadata_csum,^flex_bg",
    ),
    ("no_checksums", "-b 1024 -O ^metadata_csum,^uninit_bg"),
    ("metadata_csum_seed", "-b 1024 -O metadata_csum_seed"),
    ("bigalloc", "-O bigalloc -C 65536"),
    ("bigalloc_small", "-O bigalloc -C 16384"),
    ("bigalloc_1k", "-b 1024 -O bigalloc -C 8192"),
    (
        "sparse_super2",
        "-b 1024 -O sparse_super2 -E num_backup_sb=2",
    ),
    (
        "sparse_super2_one",
        "-b 1024 -O sparse_super2,^resize_inode -E num_backup_sb=1",
    ),
    (
        "sparse_super2_none",
        "-b 1024 -O sparse_super2,^resize_inode -E num_backup_sb=0",
    ),
    ("all_backups", "-b 1024 -O ^sparse_super,^resize_inode"),
    ("no_journal", "-b 1024 -O ^has_journal"),
    (
        "no_journal_uninit",
        "-b 1024 -O ^has_journal,uninit_bg,^metadata_csum",
    ),
    ("ext2", "-t ext2"),
    ("ext2_old", "-t ext2 -r 0"),
    ("ext3", "-t ext3"),
    ("orphan_file", "-O orphan_file"),
    ("inline_data", "-I 256 -O inline_data"),
    ("large_inodes", "-I 1024"),
    ("large_dir", "-O large_dir"),
    ("ea_inode", "-O ea_inode"),
    ("casefold", "-O casefold"),
    ("verity", "-O verity"),
    ("encrypt", "-O encrypt"),
    ("quota", "-O quota"),
    ("project", "-O quota,project"),
    ("fast_commit", "-O fast_commit"),
    ("mmp", "-O mmp"),
    ("stable_inodes", "-O stable_inodes"),
    ("room_to_grow", "-b 1024 -E resize=2000000"),
    ("no_resize_inode", "-O ^resize_inode"),
    (
        "eager_tables",
        "-b 1024 -E lazy_itable_init=0,lazy_journal_init=0",
    ),
    ("few_inodes", "-b 1024 -N 1024"),
];

/// What many kernels do not mount: blocks larger than a page, names without case, quotas.
const NOT_MOUNTED: &[&str] = &["64k", "casefold", "quota", "project"];

/// Not a whole number of groups, nor of blocks.
const SIZE: u64 = (96 << 20) + 3 * 4096 + 512;

fn make(image: &Path, options: &str, from: Option<&Path>) {
    ext4(image, SIZE, options, from);
}

/// A number from `dumpe2fs -h`.
fn header(image: &Path, name: &str) -> u64 {
    let text = run("dumpe2fs", [Path::new("-h"), image]);
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.trim_start_matches(':').trim().parse().ok())
        .unwrap_or_else(|| panic!("no {name} in:\n{text}"))
}

/// What `dumpe2fs` calls free.
fn free_by_dumpe2fs(image: &Path) -> ExtentSet {
    let block = header(image, "Block size");
    let text = run("dumpe2fs", [image]);
    let cluster = text
        .lines()
        .find_map(|line| line.strip_prefix("Cluster size:"))
        .map_or(block, |size| size.trim().parse().unwrap());
    let mut free = ExtentSet::new();
    for line in text
        .lines()
        .filter_map(|line| line.strip_prefix("  Free blocks: "))
    {
        for range in line.split(", ").filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let [first, last] = [first, last].map(|n| n.trim().parse::<u64>().unwrap() * block);
            free.insert(Extent::new(first, last - first + cluster));
        }
    }
    free
}

/// The map frees just what `dumpe2fs` calls free; without it the filesystem is whole.
fn check(name: &str, image: &Path, scratch: &Path) -> PathBuf {
    let map = map(image);
    assert_eq!(map.condition, Condition::Clean, "{name}");
    assert_eq!(map.walk.warnings, [""; 0], "{name}");
    assert_eq!(map.free(), free_by_dumpe2fs(image), "{name}");
    let free = header(image, "Free blocks") * header(image, "Block size");
    assert_eq!(map.walk.used.0 + free, SIZE, "{name}");

    let poisoned = scratch.join(format!("{name}.poisoned"));
    copy(image, &poisoned);
    poison(&poisoned, &map.used, ByteLen(SIZE));
    let fsck = output("e2fsck", [Path::new("-fn"), &poisoned]);
    assert!(
        fsck.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&fsck.stdout)
    );
    poisoned
}

#[test]
fn the_map_is_what_dumpe2fs_says_for_every_feature() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    populate(&tree, &mut rng, 8 << 20);
    let files = digests(&tree).len();
    for &(name, options) in FEATURES {
        println!("{name}");
        let image = dir.path().join(name);
        make(&image, options, Some(&tree));
        if options.contains("quota") {
            // mke2fs does not count what it copies: exit status 1 is "corrected".
            let fsck = output("e2fsck", [Path::new("-fy"), &image]);
            assert!(matches!(fsck.status.code(), Some(0 | 1)), "{fsck:?}");
        }
        let poisoned = check(name, &image, dir.path());
        // Against the image, not the tree: debugfs does not write every sparse file as it was.
        let [before, after] = [&image, &poisoned].map(|image| digests_in_ext4(image, dir.path()));
        assert_eq!(before.len(), files, "{name}");
        assert_eq!(before, after, "{name}");
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
    for &(name, options) in rng.clone().some(FEATURES, count(15, 1000)) {
        if NOT_MOUNTED.contains(&name) {
            continue;
        }
        println!("{name}");
        let image = dir.path().join(name);
        make(&image, options, None);
        let fs = if options.starts_with("-t ext2") {
            "ext2"
        } else {
            "ext4"
        };
        let expected = {
            let device = LoopDevice::attach(&image);
            let mount = Mount::new(device.path(), &mount_point, fs, "");
            populate(mount.dir(), &mut rng, 20 << 20);
            if !options.starts_with("-t") {
                let large = mount.dir().join("preallocated");
                run("fallocate", ["-l", "3M", large.to_str().unwrap()]);
            }
            digests(mount.dir())
        };
        let poisoned = check(name, &image, dir.path());
        {
            let device = LoopDevice::attach_with(&poisoned, &["--read-only"]);
            let mount = Mount::new(device.path(), &mount_point, fs, "ro");
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
    // Just below what an ext4 could hold as a file.
    let size = (16 << 40) - (1 << 30);
    ext4(&image, size, "-E lazy_journal_init=1", None);
    let map = map(&image);
    assert_eq!(map.walk.warnings, [""; 0]);
    let free = header(&image, "Free blocks") * header(&image, "Block size");
    assert_eq!(map.walk.used.0 + free, map.volume.len.0);
    assert_eq!(map.free().bytes().0, free);
}

#[test]
fn a_filesystem_that_was_grown_is_mapped() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    let path = image.to_str().unwrap();
    for options in [
        "",
        "-b 1024",
        "-b 1024 -O ^resize_inode,meta_bg",
        "-O bigalloc",
        "-b 1024 -E resize=100000",
    ] {
        make(&image, options, Some(Path::new("/usr/include/linux")));
        run("truncate", ["-s", "700M", path]);
        run("e2fsck", ["-fp", path]);
        run("resize2fs", ["-f", path]);
        // resize2fs miscounts the last group with bigalloc: exit status 1 is "corrected".
        let fsck = output("e2fsck", ["-fy", path]);
        assert!(
            matches!(fsck.status.code(), Some(0 | 1)),
            "{options}: {fsck:?}"
        );
        let map = map(&image);
        assert_eq!(map.walk.warnings, [""; 0], "{options}");
        assert_eq!(map.free(), free_by_dumpe2fs(&image), "{options}");
    }
}

#[test]
fn privileged_mounted_frozen_and_unmounted_are_told_apart() {
    needs_root!();
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let dirty = |reason| Condition::Dirty { reason };
    for (name, options, mounted, frozen) in [
        (
            "journal",
            "-b 1024",
            dirty(DirtyReason::Log),
            Condition::Clean,
        ),
        (
            "no_journal",
            "-b 1024 -O ^has_journal",
            dirty(DirtyReason::NotUnmounted),
            dirty(DirtyReason::NotUnmounted),
        ),
        (
            "orphan_file",
            "-O orphan_file",
            dirty(DirtyReason::Log),
            Condition::Clean,
        ),
        (
            "fast_commit",
            "-O fast_commit",
            dirty(DirtyReason::Log),
            Condition::Clean,
        ),
        (
            "bigalloc",
            "-O bigalloc",
            dirty(DirtyReason::Log),
            Condition::Clean,
        ),
    ] {
        println!("{name}");
        let image = dir.path().join("image");
        make(&image, options, None);
        let device = LoopDevice::attach(&image);
        let copies =
            ["mounted", "frozen", "orphans", "unmounted"].map(|name| dir.path().join(name));
        let (expected, orphan);
        {
            let mount = Mount::new(device.path(), &dir.path().join("mnt"), "ext4", "");
            populate(mount.dir(), &mut rng, 10 << 20);
            run("sync", ["-f", mount.dir().to_str().unwrap()]);
            direct_copy(device.path(), &copies[0]);
            expected = digests(mount.dir());
            {
                let _frozen = mount.freeze();
                direct_copy(device.path(), &copies[1]);
            }
            orphan = std::fs::File::create(mount.dir().join("orphan")).unwrap();
            orphan.write_all_at(&vec![7; 3 << 20], 0).unwrap();
            std::fs::remove_file(mount.dir().join("orphan")).unwrap();
            {
                let _frozen = mount.freeze();
                direct_copy(device.path(), &copies[2]);
            }
            drop(orphan);
        }
        direct_copy(device.path(), &copies[3]);
        drop(device);

        let conditions = copies
            .each_ref()
            .map(|copy| open_frozen(&FileSource::open(copy)).condition());
        let orphans = match frozen {
            Condition::Clean => dirty(DirtyReason::Orphans),
            other => other,
        };
        assert_eq!(
            conditions,
            [mounted, frozen, orphans, Condition::Clean],
            "{name}"
        );
        assert!(!mounted.is_settled(), "{name}");
        for condition in &conditions[1..] {
            assert!(condition.is_settled_if_frozen(), "{name}: {condition:?}");
        }

        // What was frozen is whole without what its map calls free, also with orphans.
        for copy in &copies[1..3] {
            let source = FileSource::open(copy);
            let (used, result) = walk(open_frozen(&source).as_ref(), &source);
            assert_eq!(result.unwrap().warnings, [""; 0], "{name}");
            let mut free = ExtentSet::new();
            used.gaps(Extent::new(0, source.len().0))
                .for_each(|gap| free.insert(gap));
            assert_eq!(free, free_by_dumpe2fs(copy), "{name}");
            poison(copy, &used, source.len());
            let device = LoopDevice::attach(copy);
            let mount = Mount::new(device.path(), &dir.path().join("mnt"), "ext4", "");
            assert_eq!(digests(mount.dir()), expected, "{name}");
            drop(mount);
            drop(device);
            // Without a journal there is no list of orphans, and they stay for e2fsck to free.
            let leaks = name == "no_journal" && copy == &copies[2];
            let (how, expected) = if leaks { ("-fy", 1) } else { ("-fn", 0) };
            let fsck = output("e2fsck", [Path::new(how), copy]);
            assert_eq!(fsck.status.code(), Some(expected), "{name}: {fsck:?}");
        }
    }
}

fn open_frozen(source: &dyn ReadAt) -> Box<dyn fs::Filesystem> {
    match fs::open_frozen(source).unwrap() {
        Opened::Known(filesystem) => filesystem,
        other => panic!("{other:?}"),
    }
}

/// A small filesystem in memory, after changing some of its bytes.
fn altered(options: &str, change: impl FnOnce(&Path)) -> Vec<u8> {
    let dir = temp_dir();
    let image = dir.path().join("image");
    make(&image, options, Some(Path::new("/usr/include/linux")));
    change(&image);
    std::fs::read(&image).unwrap()
}

fn patch(image: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Sets a field of the superblock, its checksum included.
fn set_super_value(image: &Path, field: &str, value: &str) {
    let request = format!("set_super_value {field} {value}");
    run("debugfs", ["-w", "-R", &request, image.to_str().unwrap()]);
}

/// A volume with an unreadable block.
struct Broken<'a>(&'a [u8], Extent);

impl ReadAt for Broken<'_> {
    fn len(&self) -> ByteLen {
        ReadAt::len(self.0)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> holdstill::error::Result<()> {
        match self.1.intersect(Extent::new(offset.0, buf.len() as u64)) {
            Some(_) => Err(Error::new(Kind::Io, "unreadable").at(offset)),
            None => self.0.read_exact_at(buf, offset),
        }
    }
}

#[test]
fn a_group_whose_bitmap_cannot_be_read_is_used_as_a_whole() {
    const GROUP: u64 = 3;
    let mut block = 0;
    let volume = altered("-b 1024 -O ^flex_bg,^metadata_csum,^uninit_bg", |image| {
        block = bitmap_block(image, GROUP) * 1024
    });
    let source = Broken(&volume, Extent::new(block, 1024));
    let (used, result) = walk(open(&source).as_ref(), &source);
    let warnings = result.unwrap().warnings;
    assert!(
        warnings[0].contains("group 3 cannot be read"),
        "{warnings:?}"
    );
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let group = Extent::new((8192 * GROUP + 1) * 1024, 8192 * 1024);
    assert_eq!(used.gaps(group).count(), 0);
    // Where signatures may be, there could be another one.
    let start = Broken(&volume, Extent::new(2048 + 4096, 1024));
    match fs::open(&start).unwrap() {
        Opened::AllBlocks { info, .. } => assert_eq!(info.kind, fs::Kind::Ext4),
        other => panic!("{other:?}"),
    }
    let nothing = Broken(&volume, Extent::new(0, SIZE));
    assert_eq!(fs::open(&nothing).unwrap_err().kind(), Kind::Io);
}

/// The block of the bitmap of a group.
fn bitmap_block(image: &Path, group: u64) -> u64 {
    let text = run("dumpe2fs", [image]);
    let at = text.find(&format!("Group {group}:")).unwrap();
    let rest = text[at..].split_once("Block bitmap at ").unwrap().1;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap();
    digits.parse().unwrap()
}

#[test]
fn a_group_whose_bitmap_is_wrong_is_used_as_a_whole() {
    const GROUP: u64 = 1;
    for options in ["-b 1024", "-b 1024 -O ^metadata_csum,^uninit_bg"] {
        let volume = altered(options, |image| {
            // Falsely free: a block of the group's own superblock copy.
            patch(image, bitmap_block(image, GROUP) * 1024, &[0xfe]);
        });
        let (used, result) = walk(open(&volume).as_ref(), &volume);
        let warnings = result.unwrap().warnings;
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("group 1"), "{warnings:?}");
        let group = Extent::new((8192 + 1) * 1024, 8192 * 1024);
        assert_eq!(used.gaps(group).count(), 0);
        assert!(used.bytes() < ByteLen(SIZE));
    }
}

#[test]
fn a_filesystem_that_contradicts_itself_has_no_map() {
    let wrong_total = altered("-b 1024", |image| {
        set_super_value(image, "free_blocks_count", "1234");
    });
    let wrong_descriptor = altered("-b 1024", |image| {
        // A reserved byte of the second descriptor.
        patch(image, 2 * 1024 + 64 + 0x3c, &[1]);
    });
    for volume in [wrong_total, wrong_descriptor] {
        let (_, result) = walk(open(&volume).as_ref(), &volume);
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "{error}");
    }
}

#[test]
fn what_is_not_understood_is_copied_as_a_whole() {
    let all_blocks = |volume: &[u8]| match fs::open(&volume.to_vec()).unwrap() {
        Opened::AllBlocks { why, .. } => why,
        other => panic!("{other:?}"),
    };
    let checksum = altered("-b 1024", |image| patch(image, 1024 + 0x78, b"label"));
    assert!(all_blocks(&checksum).contains("checksum"));
    let plain = "-b 1024 -O ^metadata_csum,^uninit_bg";
    for (field, name) in [
        (0x60, "incompatible 0x40000000"),
        (0x64, "compatible 0x40000000"),
    ] {
        let unknown = altered(plain, |image| {
            let old = FileSource::open(image)
                .read_vec_at(Offset(1024 + field), ByteLen(4))
                .unwrap();
            patch(image, 1024 + field + 3, &[old[3] | 0x40]);
        });
        assert!(
            all_blocks(&unknown).contains(name),
            "{}",
            all_blocks(&unknown)
        );
    }
    let whole = altered(plain, |_| {});
    let cut = &whole[..whole.len() / 2];
    assert!(all_blocks(cut).contains("larger than the volume"));
    for (field, value) in [
        ("blocks_per_group", "8"),
        ("inodes_per_group", "7"),
        ("first_data_block", "5"),
        ("log_block_size", "9"),
        ("inode_size", "100"),
    ] {
        let offset = match field {
            "blocks_per_group" => 0x20,
            "inodes_per_group" => 0x28,
            "first_data_block" => 0x14,
            "log_block_size" => 0x18,
            _ => 0x58,
        };
        let mut volume = whole.clone();
        let number: u16 = value.parse().unwrap();
        volume[1024 + offset..][..2].copy_from_slice(&number.to_le_bytes());
        assert!(all_blocks(&volume).contains("no sense"), "{field}");
    }
}

#[test]
fn errors_and_orphans_make_it_dirty() {
    for (field, value, reason) in [
        ("state", "3", DirtyReason::Errors),
        ("state", "0", DirtyReason::Unchecked),
        ("last_orphan", "12", DirtyReason::Orphans),
    ] {
        let volume = altered("-b 1024", |image| set_super_value(image, field, value));
        assert_eq!(
            open(&volume).condition(),
            Condition::Dirty { reason },
            "{field}={value}"
        );
    }
}

#[test]
fn a_journal_on_another_device_is_refused_by_name() {
    let volume = altered("-b 1024", |image| {
        set_super_value(image, "journal_inum", "0")
    });
    let error = fs::open(&volume).unwrap_err();
    assert_eq!(error.kind(), Kind::NotApplicable);
    assert!(error.to_string().contains("journal"), "{error}");
}

#[test]
fn multiple_mount_protection_is_heeded() {
    let idle = altered("-b 1024 -O mmp", |_| {});
    assert!(matches!(fs::open(&idle), Ok(Opened::Known(_))));
    let busy = altered("-b 1024 -O mmp", |image| {
        let block = header(image, "MMP block number");
        patch(image, block * 1024 + 4, &77u32.to_le_bytes());
        patch(image, block * 1024 + 16, b"otherhost\0");
    });
    let error = fs::open(&busy).unwrap_err();
    assert_eq!(error.kind(), Kind::InUse);
    assert!(error.to_string().contains("otherhost"), "{error}");
    assert!(matches!(fs::open_frozen(&busy), Ok(Opened::Known(_))));
}
