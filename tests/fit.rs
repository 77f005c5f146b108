//! Whether a copy can be used on its target: sectors and sizes are compared before anything is written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use holdstill::destination::Candidate;
use holdstill::destination::fit::Fit;
use holdstill::error::Kind;
use holdstill::fs::Needs;
use holdstill::units::{ByteLen, Offset};
use holdstill_platform::device::{Access, Disk};

use crate::common::holdstill::{Run, run};
use crate::common::scene::assert_no_signature;
use crate::common::volume::{digests, ext4, poisoned_file};
use crate::common::{LoopDevice, Mount, needs_root, run as tool, sparse_file, temp_dir};

const SIZE: u64 = 24 << 20;
const XFS_SIZE: u64 = 320 << 20;

/// A folder with a source, its image, and a poisoned target that is a device.
struct Scene {
    dir: tempfile::TempDir,
    source: PathBuf,
    image: PathBuf,
}

impl Scene {
    fn new(make: impl FnOnce(&Path)) -> Self {
        let dir = temp_dir();
        let [source, image] = ["source", "image"].map(|part| dir.path().join(part));
        make(&source);
        Self { dir, source, image }
    }

    fn backup(&self) -> serde_json::Value {
        self.backup_of(&self.source)
    }

    fn backup_of(&self, source: &Path) -> serde_json::Value {
        let args = [Path::new("backup"), source, Path::new("-o"), &self.image];
        run(args).expect(0);
        let inspect = ["inspect", "--json"].map(Path::new);
        run(inspect.into_iter().chain([self.image.as_path()]))
            .expect(0)
            .last()["manifest"]["volumes"][0]
            .clone()
    }

    /// A new device of `size` bytes, full of poison, with sectors of `sector` bytes.
    fn device(&self, size: u64, sector: u32) -> (PathBuf, LoopDevice) {
        let file = self.dir.path().join("target");
        poisoned_file(&file, size);
        let device = LoopDevice::attach_with(&file, &["--sector-size", &sector.to_string()]);
        (file, device)
    }

    fn restore(&self, target: &Path, options: &[&str]) -> Run {
        let args = [
            Path::new("restore"),
            &self.image,
            target,
            Path::new("--yes"),
        ];
        run(args.into_iter().chain(options.iter().map(Path::new)))
    }

    fn clone_to(&self, target: &Path, options: &[&str]) -> Run {
        let args = [Path::new("clone"), &self.source, target, Path::new("--yes")];
        run(args.into_iter().chain(options.iter().map(Path::new)))
    }

    /// Both verbs refuse, even without `--yes`, and write nothing.
    #[track_caller]
    fn is_refused(&self, file: &Path, target: &Path, text: &str) {
        let image = [Path::new("restore"), &self.image, target];
        let source = [Path::new("clone"), &self.source, target];
        for args in [image, source] {
            run(args).expect(3).says(text);
            run(args.into_iter().chain([Path::new("--dry-run")]))
                .expect(3)
                .says(text);
        }
        self.restore(target, &[]).expect(3).says(text);
        self.clone_to(target, &[]).expect(3).says(text);
        assert!(is_poison(file), "something was written");
    }
}

fn is_poison(file: &Path) -> bool {
    let bytes = std::fs::read(file).unwrap();
    bytes.iter().all(|byte| *byte == 0xa5)
}

/// A protective MBR and the header of an empty GPT, as on sectors of so many bytes.
fn gpt(disk: &Path, size: u64, sector: usize) {
    sparse_file(disk, size);
    let mut bytes = vec![0; 2 * sector];
    bytes[450] = 0xee;
    bytes[454..458].copy_from_slice(&1u32.to_le_bytes());
    bytes[458..462].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    let header = &mut bytes[sector..sector + 92];
    header[..12].copy_from_slice(b"EFI PART\0\0\x01\0");
    header[12..16].copy_from_slice(&92u32.to_le_bytes());
    header[24..32].copy_from_slice(&1u64.to_le_bytes());
    let crc = crc32fast::hash(header);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    let file = OpenOptions::new().write(true).open(disk).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
}

fn xfs(sector: u32) -> impl FnOnce(&Path) {
    move |path| {
        sparse_file(path, XFS_SIZE);
        let sector = format!("size={sector}");
        let args = ["-q", "-s", &sector].map(Path::new);
        tool("mkfs.xfs", args.into_iter().chain([path]));
    }
}

fn mkfs(tool_name: &'static str, options: &'static [&'static str]) -> impl FnOnce(&Path) {
    move |path| {
        sparse_file(path, SIZE);
        let options = options.iter().map(Path::new);
        tool(tool_name, options.chain([path]));
    }
}

#[test]
fn privileged_content_for_small_sectors_is_refused_on_large_ones() {
    needs_root!();
    let small: [(&str, u64, Scene); 6] = [
        ("xfs", XFS_SIZE, Scene::new(xfs(512))),
        (
            "ext4",
            SIZE,
            Scene::new(|path| ext4(path, SIZE, "-b 1024", None)),
        ),
        ("vfat", SIZE, Scene::new(mkfs("mkfs.vfat", &[]))),
        ("exfat", SIZE, Scene::new(mkfs("mkfs.exfat", &[]))),
        (
            "partition table",
            SIZE,
            Scene::new(|path| gpt(path, SIZE, 512)),
        ),
        (
            "sectors of 512 bytes",
            SIZE,
            Scene::new(|path| poisoned_file(path, SIZE)),
        ),
    ];
    for (text, size, scene) in small {
        println!("{text}");
        scene.backup();
        let (file, device) = scene.device(size, 4096);
        scene.is_refused(&file, device.path(), text);
        // On request it is written all the same, and is then what it was.
        scene
            .restore(device.path(), &["--allow-unusable", "--verify"])
            .expect(0);
        scene
            .clone_to(device.path(), &["--allow-unusable", "--verify"])
            .expect(0);
    }
}

#[test]
fn privileged_content_for_large_sectors_is_mounted_from_them() {
    needs_root!();
    let large: [(&str, u64, Scene); 3] = [
        ("xfs", XFS_SIZE, Scene::new(xfs(4096))),
        (
            "ext4",
            SIZE,
            Scene::new(|path| {
                ext4(
                    path,
                    SIZE,
                    "-b 4096",
                    Some(Path::new("/usr/include/linux/can")),
                )
            }),
        ),
        (
            "btrfs",
            128 << 20,
            Scene::new(|path| {
                sparse_file(path, 128 << 20);
                tool("mkfs.btrfs", [Path::new("-q"), path]);
            }),
        ),
    ];
    for (fs, size, scene) in large {
        println!("{fs}");
        let volume = scene.backup();
        assert_eq!(volume["sector_size"], 4096);
        assert_eq!(volume["logical_sector"], 512);
        let (_, device) = scene.device(size, 4096);
        scene.restore(device.path(), &[]).expect(0);
        drop(Mount::new(
            device.path(),
            &scene.dir.path().join("mounted"),
            fs,
            "",
        ));
        scene.clone_to(device.path(), &["--allow-twin"]).expect(0);
        drop(Mount::new(
            device.path(),
            &scene.dir.path().join("mounted"),
            fs,
            "",
        ));
    }
}

#[test]
fn privileged_a_partition_table_for_large_sectors_is_refused_on_small_ones() {
    needs_root!();
    let scene = Scene::new(|path| gpt(path, SIZE, 4096));
    let disk = LoopDevice::attach_with(&scene.source, &["--sector-size", "4096"]);
    let volume = scene.backup_of(disk.path());
    assert_eq!(volume["fs"], "partitions");
    assert_eq!(volume["sector_size"], 4096);
    drop(disk);
    let (file, device) = scene.device(SIZE, 512);
    scene.is_refused(&file, device.path(), "sectors of 4096 bytes");
    drop(device);
    let (_, device) = scene.device(SIZE, 4096);
    scene.restore(device.path(), &[]).expect(0);
    // A file has no sectors of its own.
    drop(device);
    scene
        .restore(&scene.dir.path().join("target"), &[])
        .expect(0);
}

/// An MBR does not say what sectors it is for: those of its disk.
#[test]
fn privileged_an_mbr_is_for_the_sectors_of_its_disk() {
    needs_root!();
    let scene = Scene::new(|path| {
        sparse_file(path, SIZE);
        let mut sector = [0; 512];
        sector[450] = 0x83;
        sector[454..458].copy_from_slice(&256u32.to_le_bytes());
        sector[458..462].copy_from_slice(&1024u32.to_le_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&sector, 0).unwrap();
    });
    let disk = LoopDevice::attach_with(&scene.source, &["--sector-size", "4096"]);
    assert_eq!(scene.backup_of(disk.path())["sector_size"], 4096);
    drop(disk);
    let (_, device) = scene.device(SIZE, 512);
    scene
        .restore(device.path(), &[])
        .expect(3)
        .says("partition table");
}

/// The device is larger than the filesystem by a part of a block, as partitions often are.
#[test]
fn privileged_a_target_that_holds_all_of_the_filesystem_is_large_enough() {
    needs_root!();
    const TAIL: u64 = 3 << 10;
    let scene = Scene::new(|path| {
        ext4(
            path,
            SIZE,
            "-b 4096",
            Some(Path::new("/usr/include/linux/can")),
        );
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(SIZE + TAIL)
            .unwrap();
    });
    let volume = scene.backup();
    assert_eq!(volume["size"], SIZE + TAIL);
    assert_eq!(volume["smallest_target"], SIZE);
    let (_, device) = scene.device(SIZE, 512);
    for restored in [true, false] {
        match restored {
            true => scene.restore(device.path(), &["--verify"]).expect(0),
            false => scene.clone_to(device.path(), &["--verify"]).expect(0),
        };
        tool("e2fsck", [Path::new("-fn"), device.path()]);
        let mount = Mount::new(
            device.path(),
            &scene.dir.path().join("mounted"),
            "ext4",
            "ro",
        );
        assert_eq!(
            digests(mount.dir()),
            digests(Path::new("/usr/include/linux/can"))
        );
    }
    let verify = [Path::new("verify"), &scene.image, Path::new("--against")];
    run(verify.into_iter().chain([device.path()])).expect(0);
    drop(device);
    let (file, device) = scene.device(SIZE - 512, 512);
    scene.is_refused(&file, device.path(), "too small");
    run(verify.into_iter().chain([device.path()])).expect(4);
}

/// A filesystem in use may have grown after the image said how small a target may be.
#[test]
fn a_filesystem_that_does_not_end_with_its_target_is_not_made_visible() {
    let dir = temp_dir();
    let [source, target] = ["source", "target"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", None);
    let geometry = Disk::open(&source, Access::Read).unwrap().geometry();
    let needs = Needs {
        sector: None,
        smallest: ByteLen(SIZE - 8192),
        largest: None,
    };
    let fit = Fit::of_source(&geometry, None, needs);
    poisoned_file(&target, SIZE - 4096);
    let candidate = Candidate::examine(&target, &fit, false).unwrap();
    let written = candidate.take(false).unwrap().begin().unwrap();
    let content = std::fs::read(&source).unwrap();
    for (piece, at) in content.chunks(1 << 20).zip((0..).step_by(1 << 20)) {
        written.write(Offset(at), piece).unwrap();
    }
    // Content that there is no room for is not left out in silence.
    let error = written.write(Offset(SIZE - 4096), &[1; 4096]).unwrap_err();
    assert_eq!(error.kind(), Kind::TooSmall);
    let error = written.finish(false).unwrap_err();
    assert_eq!(error.kind(), Kind::TooSmall);
    assert_no_signature(&target);
}

/// Nobody knows whose it is.
#[test]
fn content_behind_the_end_of_a_filesystem_needs_room() {
    let scene = Scene::new(|path| {
        ext4(path, SIZE, "-b 4096", None);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(b"something", SIZE + 1024).unwrap();
        file.set_len(SIZE + 2048).unwrap();
    });
    assert_eq!(scene.backup()["smallest_target"], SIZE + 2048);
    let target = scene.dir.path().join("target");
    poisoned_file(&target, SIZE);
    scene.is_refused(&target, &target, "too small");
}

#[test]
fn each_filesystem_says_what_it_needs() {
    const TAIL: u64 = 8192;
    let made: [(&str, Option<u64>, u64, Scene); 6] = [
        ("vfat", Some(512), TAIL, Scene::new(mkfs("mkfs.vfat", &[]))),
        (
            "exfat",
            Some(512),
            TAIL,
            Scene::new(mkfs("mkfs.exfat", &[])),
        ),
        (
            "ntfs",
            Some(4096),
            TAIL,
            Scene::new(mkfs("mkfs.ntfs", &["-q", "-F", "-f"])),
        ),
        (
            "swap",
            Some(4096),
            TAIL,
            Scene::new(mkfs("mkswap", &["-q"])),
        ),
        (
            "f2fs",
            Some(4096),
            TAIL,
            Scene::new(|path| {
                sparse_file(path, 64 << 20);
                tool("mkfs.f2fs", [Path::new("-q"), path]);
            }),
        ),
        (
            "crypto_LUKS",
            None,
            0,
            Scene::new(mkfs(
                "cryptsetup",
                &[
                    "luksFormat",
                    "--batch-mode",
                    "--pbkdf",
                    "pbkdf2",
                    "--pbkdf-force-iterations",
                    "1000",
                    "--key-file",
                    "/usr/include/linux/can.h",
                ],
            )),
        ),
    ];
    for (fs, sector, tail, scene) in made {
        println!("{fs}");
        let file = File::options().write(true).open(&scene.source).unwrap();
        let size = file.metadata().unwrap().len();
        file.set_len(size + TAIL).unwrap();
        drop(file);
        let volume = scene.backup();
        assert_eq!(volume["fs"], fs);
        assert_eq!(volume["sector_size"].as_u64(), sector);
        let smallest = volume["smallest_target"].as_u64().unwrap();
        assert_eq!(smallest, size + TAIL - tail);
    }
}

/// md of version 1.0 is found by the end of its device.
#[test]
fn what_is_found_by_the_end_of_its_device_is_refused_on_a_larger_one() {
    let scene = Scene::new(|path| {
        poisoned_file(path, SIZE);
        let at = SIZE - 8192;
        let mut superblock = [0; 256];
        superblock[..8].copy_from_slice(b"\xfc\x4e\x2b\xa9\x01\0\0\0");
        superblock[144..152].copy_from_slice(&(at / 512).to_le_bytes());
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&superblock, at).unwrap();
    });
    let volume = scene.backup();
    assert_eq!(volume["fs"], "linux_raid_member");
    assert_eq!(volume["largest_target"], SIZE);
    let target = scene.dir.path().join("target");
    poisoned_file(&target, SIZE + 4096);
    scene.is_refused(&target, &target, "at the end of its device");
    scene.restore(&target, &["--allow-unusable"]).expect(0);
    poisoned_file(&target, SIZE);
    scene.restore(&target, &[]).expect(0);
}

#[test]
fn of_a_gpt_on_a_larger_disk_the_user_is_told_where_its_backup_is() {
    let scene = Scene::new(|path| gpt(path, SIZE, 512));
    scene.backup();
    let target = scene.dir.path().join("target");
    poisoned_file(&target, SIZE + 4096);
    scene.restore(&target, &[]).expect(0).says("sgdisk");
    scene.clone_to(&target, &[]).expect(0).says("sgdisk");
    poisoned_file(&target, SIZE);
    let run = scene.restore(&target, &[]).expect(0);
    assert!(!run.stderr.contains("sgdisk"), "{run}");
}
