//! Volumes with filesystems for the tests: filled, mapped, poisoned, compared.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use holdstill::extent::{Extent, ExtentSet};
use holdstill::fs::{self, Condition, Filesystem, Opened, Walk};
use holdstill::read_at::ReadAt;
use holdstill::units::ByteLen;

use super::walking::walk;
use super::{FileSource, Rng, run, sparse_file};

/// What a free byte is overwritten with, to show that nobody needs it.
const POISON: u8 = 0xa5;

/// A volume's map, in whole.
#[derive(Debug)]
pub(crate) struct Map {
    pub(crate) used: ExtentSet,
    pub(crate) walk: Walk,
    pub(crate) condition: Condition,
    pub(crate) volume: Extent,
}

impl Map {
    /// What is free, ascending.
    pub(crate) fn free(&self) -> ExtentSet {
        let mut free = ExtentSet::new();
        for gap in self.used.gaps(self.volume) {
            free.insert(gap);
        }
        free
    }
}

/// Makes an ext4 (or what `-t` in `options` says) in a new file of `size` bytes, with the content of
/// the folder `from`.
pub(crate) fn ext4(image: &Path, size: u64, options: &str, from: Option<&Path>) {
    sparse_file(image, size);
    let mut args = vec![OsStr::new("-q"), OsStr::new("-F")];
    if !options.split_whitespace().any(|option| option == "-t") {
        args.extend([OsStr::new("-t"), OsStr::new("ext4")]);
    }
    args.extend(options.split_whitespace().map(OsStr::new));
    if let Some(from) = from {
        args.extend([OsStr::new("-d"), from.as_os_str()]);
    }
    args.push(image.as_os_str());
    run("mke2fs", args);
}

/// The digests of all files in an ext4 image, without mounting it.
pub(crate) fn digests_in_ext4(image: &Path, scratch: &Path) -> BTreeMap<PathBuf, String> {
    let out = tempfile::tempdir_in(scratch).expect("a folder");
    let dump = format!("rdump / {}", out.path().display());
    run(
        "debugfs",
        [OsStr::new("-R"), OsStr::new(&dump), image.as_os_str()],
    );
    digests(out.path())
}

/// A file of `size` bytes that are all poison.
pub(crate) fn poisoned_file(path: &Path, size: u64) {
    sparse_file(path, size);
    poison(path, &ExtentSet::new(), ByteLen(size));
}

/// Opens the filesystem on a file or device, which must have a map.
pub(crate) fn open(source: &dyn ReadAt) -> Box<dyn Filesystem> {
    match fs::open(source).expect("opens") {
        Opened::Known(filesystem) => filesystem,
        other => panic!("no map: {other:?}"),
    }
}

/// The map of a file or device.
pub(crate) fn map(path: &Path) -> Map {
    let source = FileSource::open(path);
    let filesystem = open(&source);
    let (used, walk) = walk(filesystem.as_ref(), &source);
    Map {
        used,
        walk: walk.unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        condition: filesystem.condition(),
        volume: Extent::new(0, source.len().0),
    }
}

/// Overwrites every byte outside of `used`.
pub(crate) fn poison(path: &Path, used: &ExtentSet, size: ByteLen) {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .expect("the image");
    let block = vec![POISON; 1 << 20];
    for gap in used.gaps(Extent::new(0, size.0)) {
        let mut at = gap.start.0;
        while at < gap.end().0 {
            let len = (gap.end().0 - at).min(block.len() as u64) as usize;
            file.write_all_at(&block[..len], at).expect("poisons");
            at += len as u64;
        }
    }
}

/// Fills a folder with files of all sizes, sparse ones, preallocated ones, folders and links, and
/// removes some again: about `bytes` of content.
pub(crate) fn populate(dir: &Path, rng: &mut Rng, bytes: u64) {
    let mut written = 0;
    let mut number = 0;
    let mut content = vec![0; 1 << 20];
    while written < bytes {
        let folder = dir.join(format!("folder{}", number % 7));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join(format!("file{number}"));
        let len = match rng.below(10) {
            0..5 => rng.below(6000),
            5..9 => rng.below(200_000),
            _ => rng.below(1 << 20),
        };
        let part = &mut content[..len as usize];
        rng.fill(part);
        let file = File::create(&path).expect("a file");
        let offset = if rng.below(5) == 0 {
            rng.below(1 << 22)
        } else {
            0
        };
        file.write_all_at(part, offset).expect("content");
        written += len + 4096;
        match number % 11 {
            3 => std::fs::remove_file(&path).expect("removed"),
            5 => file.set_len(len / 2).expect("cut"),
            7 => std::os::unix::fs::symlink("nowhere", path.with_extension("link"))
                .expect("a symbolic link"),
            9 => std::fs::hard_link(&path, path.with_extension("twin")).expect("a hard link"),
            _ => {}
        }
        number += 1;
    }
}

/// The digest of every file below `dir`, and the target of every symbolic link.
pub(crate) fn digests(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut digests = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let kind = path.symlink_metadata().expect("metadata").file_type();
            let name = path.strip_prefix(dir).expect("below").to_owned();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_symlink() {
                let target = std::fs::read_link(&path).expect("a link");
                digests.insert(name, target.to_string_lossy().into_owned());
            } else if kind.is_file() {
                let mut hasher = blake3::Hasher::new();
                let mut file = File::open(&path).expect("a file");
                std::io::copy(&mut file, &mut hasher).expect("content");
                digests.insert(name, hasher.finalize().to_string());
            }
        }
    }
    digests
}

/// Copies a file, keeping its holes.
pub(crate) fn copy(from: &Path, to: &Path) {
    run("cp", [Path::new("--sparse=always"), from, to]);
}

/// Copies a device past its page cache.
pub(crate) fn direct_copy(device: &Path, to: &Path) {
    let from = format!("if={}", device.display());
    let to = format!("of={}", to.display());
    run(
        "dd",
        [
            "iflag=direct",
            "bs=512K",
            "conv=sparse",
            "status=none",
            &from,
            &to,
        ],
    );
}

/// What the kernel itself calls free in a mounted filesystem (`FS_IOC_GETFSMAP`, owner
/// `FMR_OWN_FREE`).
pub(crate) fn free_by_fsmap(dir: &Path) -> ExtentSet {
    let text = run(
        "xfs_io",
        ["-r", "-c", "fsmap -m", dir.to_str().expect("a path")],
    );
    let mut free = ExtentSet::new();
    for line in text.lines().filter(|line| line.contains(",special_0:1,")) {
        let fields: Vec<&str> = line.split(',').collect();
        let [first, last] = [fields[3], fields[4]].map(|n| n.parse::<u64>().expect("a sector"));
        free.insert(Extent::new(first * 512, (last + 1 - first) * 512));
    }
    free
}

/// Checks a copy of an ext4 that was frozen while it was written to: sound as it is, or but for files
/// that were being removed, which are then freed as mounting it would.
#[track_caller]
pub(crate) fn check_frozen_ext4(copy: &Path) {
    let superblock = run("dumpe2fs", [Path::new("-h"), copy]);
    let has_orphans = superblock.contains("First orphan inode");
    let how = if has_orphans { "-fp" } else { "-fn" };
    run("e2fsck", [Path::new(how), copy]);
}
