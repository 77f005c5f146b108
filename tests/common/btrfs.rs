//! Btrfs for the tests: made in all its kinds, on one device or several, mounted and filled.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use holdstill::fs::{self, Opened};

use super::volume::populate;
use super::{FileSource, LoopDevice, Mount, Rng, output, run, shell, sparse_file, temp_dir};

/// How a filesystem is made.
pub(crate) struct Making {
    pub(crate) name: &'static str,
    pub(crate) devices: usize,
    /// For `mkfs.btrfs`.
    pub(crate) options: &'static str,
    /// For `mount`.
    pub(crate) mount: &'static str,
    /// Run on the first device, `$1`, before the first mount.
    pub(crate) before: &'static str,
    /// Run in the folder where it is mounted, `$1`, when it is full.
    pub(crate) after: &'static str,
}

pub(crate) const fn making(name: &'static str, devices: usize, options: &'static str) -> Making {
    Making {
        name,
        devices,
        options,
        mount: "",
        before: "",
        after: "",
    }
}

/// Whether the installed tools know its features.
pub(crate) fn is_known(making: &Making) -> bool {
    let known = output("mkfs.btrfs", ["-O", "list-all"]);
    let known = String::from_utf8_lossy(&[known.stdout, known.stderr].concat()).into_owned();
    let new = ["block-group-tree", "squota"];
    let mut asked = new.iter().filter(|name| making.options.contains(**name));
    let unknown = asked.find(|name| !known.contains(**name));
    if let Some(name) = unknown {
        println!("skipped, mkfs.btrfs does not know {name}");
    }
    unknown.is_none()
}

/// Bytes of a device: not a whole number of sectors. Large tree blocks take large chunks, and none
/// becomes smaller than 256 MiB.
pub(crate) fn size_for(making: &Making) -> u64 {
    let is_large = making.options.contains("65536") || making.after.contains("resize");
    let mib = match is_large {
        true => 512,
        false => 256,
    };
    (mib << 20) + 3 * 512
}

/// Devices of one filesystem over files, attached.
pub(crate) struct Scene {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) loops: Vec<LoopDevice>,
}

impl Scene {
    pub(crate) fn make(making: &Making) -> Self {
        Self::make_sized(making, size_for(making))
    }

    /// The same with devices of so many bytes.
    pub(crate) fn make_sized(making: &Making, size: u64) -> Self {
        Self::make_in(temp_dir(), making, size)
    }

    /// The same in this folder.
    pub(crate) fn make_in(dir: tempfile::TempDir, making: &Making, size: u64) -> Self {
        let mut loops = Vec::new();
        for number in 1..=making.devices {
            let file = dir.path().join(format!("device{number}"));
            sparse_file(&file, size);
            loops.push(LoopDevice::attach(&file));
        }
        let mut args: Vec<OsString> = vec!["-q".into(), "-f".into(), "-L".into(), "label".into()];
        args.extend(making.options.split_whitespace().map(OsString::from));
        args.extend(loops.iter().map(|device| device.path().into()));
        run("mkfs.btrfs", args);
        let scene = Self { dir, loops };
        if !making.before.is_empty() {
            let device = scene.loops[0].path().display();
            shell(format!("set -- {device}; {} > /dev/null", making.before));
        }
        scene
    }

    pub(crate) fn mount(&self, options: &str) -> Mount {
        mount(&self.loops, &self.dir.path().join("mnt"), options)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        forget(&self.loops);
    }
}

/// Makes the kernel forget devices: it would take them for parts of what comes next.
pub(crate) fn forget(loops: &[LoopDevice]) {
    for device in loops {
        let args = ["device", "scan", "--forget"].map(Path::new);
        output("btrfs", args.into_iter().chain([device.path()]));
    }
}

pub(crate) fn mount(loops: &[LoopDevice], dir: &Path, options: &str) -> Mount {
    let others = loops[1..].iter();
    let mut options: Vec<String> = others
        .map(|device| format!("device={}", device.path().display()))
        .chain((!options.is_empty()).then(|| options.to_owned()))
        .collect();
    options.sort();
    Mount::new(loops[0].path(), dir, "btrfs", &options.join(","))
}

/// Fills a mounted filesystem with everything that allocates in its own way.
pub(crate) fn fill(dir: &Path, rng: &mut Rng, bytes: u64) {
    let script = |text: &str| shell(format!("set -- {}; cd $1; {text}", dir.display()));
    populate(dir, rng, bytes / 4);
    script("btrfs -q subvolume create sub; btrfs -q subvolume create gone");
    populate(&dir.join("sub"), rng, bytes / 2);
    populate(&dir.join("gone"), rng, bytes / 8);
    script("head -c 1M /dev/urandom > sub/large; sync -f .");
    script("btrfs -q subvolume snapshot -r sub snapshot; btrfs -q subvolume create sub/nested");
    populate(&dir.join("sub/nested"), rng, bytes / 8);
    script(
        "mkdir packed; btrfs property set packed compression zstd
        seq 300000 > packed/numbers
        mkdir plain; chattr +C plain; head -c 600K /dev/urandom > plain/written; sync -f .
        head -c 20K /dev/urandom | dd of=plain/written conv=notrunc bs=4K seek=7 status=none
        head -c 1 /dev/urandom | dd of=sub/large conv=notrunc bs=1 seek=500001 status=none
        fallocate -l 2M room; head -c 70K /dev/urandom | dd of=room conv=notrunc bs=4K seek=9 status=none
        cp --reflink=always sub/large sub/nested/shared
        rm -rf sub/folder3; btrfs -q subvolume delete gone; sync -f .; rm -rf folder5",
    );
}

/// One device, filled, whose superblock and trees tests then change; kept as a file.
pub(crate) fn filled(options: &'static str, rng: &mut Rng) -> (Scene, PathBuf) {
    let mut scene = Scene::make(&making("", 1, options));
    {
        let mount = scene.mount("");
        fill(mount.dir(), rng, 3 << 20);
    }
    forget(&scene.loops);
    scene.loops.clear();
    let file = scene.path("device1");
    (scene, file)
}

/// The number behind a name in a line of text.
pub(crate) fn number_after(line: &str, name: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    words.find(|word| *word == name)?;
    words.next()?.parse().ok()
}

pub(crate) fn patch(file: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Changes the first superblock of a filesystem with CRC-32C, its checksum included.
pub(crate) fn change_super(file: &Path, offset: usize, bytes: &[u8]) {
    let opened = File::open(file).unwrap();
    let mut block = vec![0; 4096];
    opened.read_exact_at(&mut block, 64 << 10).unwrap();
    block[offset..offset + bytes.len()].copy_from_slice(bytes);
    let sum = crc32c::crc32c(&block[32..]);
    block[..4].copy_from_slice(&sum.to_le_bytes());
    patch(file, 64 << 10, &block);
}

/// What a superblock and its copies say: UUID and UUID of the metadata.
pub(crate) fn ids(device: &Path, copies: usize) -> (String, String) {
    let args = ["inspect-internal", "dump-super", "-f", "-a"].map(Path::new);
    let text = run("btrfs", args.into_iter().chain([device]));
    let all = |name: &str| {
        let lines = text.lines();
        let values = lines.filter_map(|line| line.strip_prefix(name)?.split_whitespace().next());
        values.map(str::to_owned).collect::<Vec<_>>()
    };
    // The checksum, the magic, and the UUID of the metadata in the device item.
    assert_eq!(text.matches("[match]").count(), 3 * copies, "{text}");
    let [fsid, metadata] = ["fsid", "metadata_uuid"].map(|name| {
        let values = all(name);
        assert_eq!(values.len(), copies, "{text}");
        let values = BTreeSet::from_iter(values);
        assert_eq!(values.len(), 1, "{text}");
        values.into_iter().next().unwrap()
    });
    (fsid, metadata)
}

/// Metadata and data of a filesystem that is not mounted are what their checksums say.
pub(crate) fn check(device: &Path) {
    let args = ["check", "--check-data-csum"].map(Path::new);
    run("btrfs", args.into_iter().chain([device]));
}

/// Why all blocks of a file are copied.
pub(crate) fn why_all_blocks(file: &Path) -> String {
    match fs::open(&FileSource::open(file)).unwrap() {
        Opened::AllBlocks { info, why } => {
            assert_eq!(info.kind, fs::Kind::Btrfs);
            why
        }
        other => panic!("{other:?}"),
    }
}
