//! What is restored is what was backed up: filesystems, raw content, streams, several volumes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use holdstill::extent::Extent;
use holdstill::image::format::BLOCK;
use holdstill::units::{ByteLen, Offset};

use crate::common::holdstill::{command, finish, run, run_from, same_bytes, wait};
use crate::common::scene::onto_a_liar;
use crate::common::volume::{digests, digests_in_ext4, ext4, map, poison, poisoned_file, populate};
use crate::common::{
    LoopDevice, Mount, Rng, needs_root, output, run as tool, seed, sparse_file, spawn, table,
    temp_dir,
};

/// Not a whole number of groups, nor of blocks.
const SIZE: u64 = (64 << 20) + 3 * 4096 + 512;

/// Filesystems of all block sizes, and how their images are compressed.
const FILESYSTEMS: &[(&str, &str, &str)] = &[
    ("default", "", "zstd:1"),
    ("1k", "-b 1024", "none"),
    ("2k", "-b 2048 -g 4096", "zstd:3"),
    ("64k", "-b 65536 -F", "zstd"),
    ("bigalloc", "-O bigalloc -C 65536", "none"),
    ("meta_bg", "-b 1024 -O meta_bg,^resize_inode", "zstd:-7"),
    ("inline_data", "-I 256 -O inline_data", "zstd:19"),
    ("ext3", "-t ext3", "zstd:3"),
    ("ext2", "-t ext2 -b 1024", "zstd:1"),
];

fn assert_restored(name: &str, source: &Path, target: &Path) {
    let map = map(source);
    let [source_file, target_file] = [source, target].map(|path| File::open(path).unwrap());
    for run in map.used.runs() {
        let mut at = run.start.0;
        while at < run.end().0 {
            let len = (run.end().0 - at).min(1 << 20) as usize;
            let (mut one, mut other) = (vec![0; len], vec![0; len]);
            source_file.read_exact_at(&mut one, at).unwrap();
            target_file.read_exact_at(&mut other, at).unwrap();
            assert!(one == other, "{name}: bytes from {at} on differ");
            at += len as u64;
        }
    }
    let fsck = output("e2fsck", [Path::new("-fn"), target]);
    assert!(
        fsck.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&fsck.stdout)
    );
}

/// What is free in the source, but for the first and last MiB, which are always written. An image knows no
/// blocks smaller than [`BLOCK`].
fn assert_only_used_blocks_were_written(name: &str, source: &Path, target: &Path) {
    let map = map(source);
    let file = File::open(target).unwrap();
    let mut seen = 0;
    for gap in map.free().runs() {
        let behind_head = Extent::between(
            gap.start.max(Offset(1 << 20)).align_up(BLOCK),
            gap.end()
                .min(Offset(map.volume.len.0 - (1 << 20)))
                .align_down(BLOCK)
                .max(Offset(1 << 20)),
        );
        if behind_head.is_empty() {
            continue;
        }
        let mut bytes = vec![0; behind_head.len.0 as usize];
        file.read_exact_at(&mut bytes, behind_head.start.0).unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == 0xa5),
            "{name}: free space at {} was written",
            behind_head.start
        );
        seen += bytes.len();
    }
    assert!(seen > 0, "{name}: nothing was free");
}

#[test]
fn filesystems_come_back_onto_a_poisoned_file() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    populate(&tree, &mut rng, 8 << 20);
    for &(name, options, compress) in FILESYSTEMS {
        println!("{name}, {compress}");
        let [source, image, target] =
            ["source", "image", "target"].map(|part| dir.path().join(format!("{name}.{part}")));
        ext4(&source, SIZE, options, Some(&tree));
        // What is free must neither be stored nor be needed.
        poison(&source, &map(&source).used, ByteLen(SIZE));
        let args = ["backup", "--json", "--compress", compress];
        let report =
            run(args
                .map(Path::new)
                .into_iter()
                .chain([source.as_path(), Path::new("-o"), &image]))
            .expect(0)
            .last();
        assert_eq!(report["grade"], "clean", "{name}");
        assert_eq!(report["used_bytes"], map(&source).walk.used.0, "{name}");
        run([Path::new("verify"), &image]).expect(0);
        poisoned_file(&target, SIZE);
        run([Path::new("restore"), Path::new("--yes"), &image, &target]).expect(0);
        assert_restored(name, &source, &target);
        assert_only_used_blocks_were_written(name, &source, &target);
        let before = digests_in_ext4(&source, dir.path());
        assert!(before.len() > 20, "{name}: hardly any files");
        assert_eq!(before, digests_in_ext4(&target, dir.path()), "{name}");
        let against = [Path::new("verify"), &image, Path::new("--against"), &target];
        run(against).expect(0);
        for path in [source, image, target] {
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn privileged_filesystems_come_back_from_device_to_device() {
    needs_root!();
    let mut rng = Rng(seed());
    let dir = temp_dir();
    for (size, sectors, options) in [
        (SIZE, &[][..], ""),
        (SIZE - 512, &["--sector-size", "4096"], "-b 4096"),
        (SIZE, &[], "-b 1024 -O ^has_journal"),
    ] {
        let [source, target] = ["source", "target"].map(|part| dir.path().join(part));
        sparse_file(&source, size);
        poisoned_file(&target, size);
        let source = LoopDevice::attach_with(&source, sectors);
        let target = LoopDevice::attach_with(&target, sectors);
        let mut args = vec!["-q", "-t", "ext4"];
        args.extend(options.split_whitespace());
        args.push(source.path().to_str().unwrap());
        tool("mke2fs", args);
        let mounted = dir.path().join("mounted");
        let before = {
            let mount = Mount::new(source.path(), &mounted, "ext4", "");
            populate(mount.dir(), &mut rng, 12 << 20);
            digests(mount.dir())
        };
        let image = dir.path().join("image");
        run([Path::new("backup"), source.path(), Path::new("-o"), &image]).expect(0);
        run([
            Path::new("restore"),
            Path::new("--yes"),
            Path::new("--verify"),
            &image,
            target.path(),
        ])
        .expect(0);
        assert_restored(options, source.path(), target.path());
        assert_only_used_blocks_were_written(options, source.path(), target.path());
        let against = [Path::new("verify"), &image, Path::new("--against")];
        run(against.into_iter().chain([target.path()])).expect(0);
        let mount = Mount::new(target.path(), &mounted, "ext4", "");
        assert_eq!(before, digests(mount.dir()), "{options}");
        std::fs::remove_file(image).unwrap();
    }
}

#[test]
fn a_target_that_reads_back_as_something_else_is_found() {
    let dir = temp_dir();
    let [source, image, target] = ["source", "image", "target"].map(|part| dir.path().join(part));
    let mut rng = Rng(seed() | 1);
    let mut bytes = vec![0; 24 << 20];
    rng.fill(&mut bytes);
    std::fs::write(&source, &bytes).unwrap();
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    let args = ["restore", "--verify"].map(Path::new).into_iter();
    onto_a_liar(args.chain([&*image, &*target]), &target, bytes.len() as u64);
    run([Path::new("restore"), &image, &target, Path::new("--yes")]).expect(0);
    assert!(same_bytes(&source, &target));
}

/// From program to program through pipes, without a file between.
#[test]
fn streams_go_from_backup_to_restore_and_verify() {
    let dir = temp_dir();
    let [source, target] = ["source", "target"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", Some(Path::new("/usr/include/linux")));
    let mut writer = command([
        Path::new("backup"),
        &source,
        Path::new("-o"),
        Path::new("-"),
    ]);
    let mut writing = spawn(&mut writer);
    let pipe = writing.stdout.take().unwrap();
    let mut reader = command([Path::new("restore"), Path::new("-"), &target]);
    reader.stdin(Stdio::from(pipe));
    finish(reader).expect(0);
    let written = wait(&writer, writing).expect(0);
    assert!(written.stderr.contains("image id"), "{written}");
    assert_restored("stream", &source, &target);

    // The same into a file, as a shell would do it.
    let image = dir.path().join("image");
    writer.stdout(File::create(&image).unwrap());
    finish(writer).expect(0);
    run_from(&image, ["verify", "-"]).expect(0);
    run([Path::new("verify"), &image]).expect(0);
    let args = ["verify", "-", "--against"].map(Path::new);
    run_from(&image, args.into_iter().chain([target.as_path()])).expect(0);
    let args = ["restore", "--yes", "-"].map(Path::new);
    run_from(&image, args.into_iter().chain([target.as_path()])).expect(0);
    assert_restored("file stream", &source, &target);
}

#[test]
fn what_no_filesystem_is_comes_back_whole_and_sparse() {
    let dir = temp_dir();
    let mut rng = Rng(seed());
    let [source, image] = ["source", "image"].map(|part| dir.path().join(part));
    let size = (256 << 20) + 512;
    let file = sparse_file(&source, size);
    let mut noise = vec![0; 300_000];
    for offset in [5 << 20, (100 << 20) + 4096 * 3, size - 300_000] {
        rng.fill(&mut noise);
        file.write_all_at(&noise, offset).unwrap();
    }
    // Zeros that are stored in the source, not a hole.
    file.write_all_at(&vec![0; 4 << 20], 50 << 20).unwrap();
    drop(file);
    let report = run([
        Path::new("backup"),
        Path::new("--json"),
        &source,
        Path::new("-o"),
        &image,
    ])
    .expect(0)
    .last();
    assert_eq!(report["grade"], "unknown");
    assert_eq!(report["volumes"][0]["fs"], serde_json::Value::Null);
    let used = report["used_bytes"].as_u64().unwrap();
    assert!(used < 6 << 20, "holes are counted as used: {used}");
    assert!(report["stored_bytes"].as_u64().unwrap() < 2 << 20);
    assert!(!report["warnings"].as_array().unwrap().is_empty());
    run([Path::new("verify"), &image]).expect(0).says("unknown");

    let fresh = dir.path().join("fresh");
    run([Path::new("restore"), &image, &fresh]).expect(0);
    assert!(same_bytes(&source, &fresh));
    let metadata = fresh.metadata().unwrap();
    assert_eq!(metadata.len(), size);
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    assert!(metadata.blocks() * 512 < 4 << 20, "it is not sparse");

    let poisoned = dir.path().join("poisoned");
    poisoned_file(&poisoned, size);
    run([Path::new("restore"), Path::new("--yes"), &image, &poisoned]).expect(0);
    assert!(same_bytes(&source, &poisoned), "zeros were not written");
}

#[test]
fn every_size_comes_back() {
    let dir = temp_dir();
    let mut rng = Rng(seed());
    let sizes = [
        0,
        1,
        511,
        512,
        4095,
        4096,
        4608,
        65_536 + 512,
        (1 << 20) - 512,
        1 << 20,
        (1 << 20) + 512,
        (1 << 20) + 4096 + 512,
        (3 << 20) + 17,
    ];
    for (number, size) in sizes.into_iter().enumerate() {
        println!("{size}");
        let [source, image, fresh, poisoned] = ["source", "image", "fresh", "poisoned"]
            .map(|part| dir.path().join(format!("{size}.{part}")));
        let mut bytes = vec![0; size];
        rng.fill(&mut bytes);
        std::fs::write(&source, &bytes).unwrap();
        let compress = ["zstd", "none"][number % 2];
        let args = ["backup", "--compress", compress, "-o"].map(Path::new);
        run(args.into_iter().chain([image.as_path(), &source])).expect(0);
        run([Path::new("verify"), &image]).expect(0);
        run([Path::new("restore"), &image, &fresh]).expect(0);
        assert_eq!(std::fs::read(&fresh).unwrap(), bytes);
        poisoned_file(&poisoned, size as u64);
        run([Path::new("restore"), Path::new("--yes"), &image, &poisoned]).expect(0);
        assert!(std::fs::read(&poisoned).unwrap() == bytes, "{size}");
        run([Path::new("verify"), &image, Path::new("--against"), &source]).expect(0);
    }
}

/// A larger target keeps its size and what lies behind the volume, but for signatures at its end.
#[test]
fn a_larger_file_keeps_its_size() {
    let dir = temp_dir();
    let [source, image, target] = ["source", "image", "target"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", None);
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    let larger = SIZE + (5 << 20) + 512;
    poisoned_file(&target, larger);
    run([Path::new("restore"), Path::new("--yes"), &image, &target]).expect(0);
    assert_eq!(target.metadata().unwrap().len(), larger);
    assert_restored("larger", &source, &target);
    let file = File::open(&target).unwrap();
    let mut behind = vec![0; 4 << 20];
    file.read_exact_at(&mut behind, SIZE).unwrap();
    assert!(behind.iter().all(|byte| *byte == 0xa5), "not ours to write");
}

#[test]
fn several_volumes_are_told_apart() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    let sources: Vec<PathBuf> = ["one", "two", "three"]
        .map(|name| dir.path().join(name))
        .into();
    ext4(
        &sources[0],
        20 << 20,
        "-L first",
        Some(Path::new("/usr/include/linux/can")),
    );
    std::fs::write(&sources[1], vec![7; 70_000]).unwrap();
    ext4(&sources[2], 16 << 20, "-b 1024 -L third", None);
    let args = ["backup", "--json", "-o"].map(Path::new);
    let report = run(args
        .into_iter()
        .chain([image.as_path()])
        .chain(sources.iter().map(PathBuf::as_path)))
    .expect(0)
    .last();
    assert_eq!(report["grade"], "unknown", "the worst of all");
    for (n, source) in (1..).zip(&sources) {
        let volume = &report["volumes"][n - 1];
        assert_eq!(volume["n"], n);
        assert_eq!(volume["path"], source.to_str().unwrap());
        assert_eq!(volume["size"], source.metadata().unwrap().len());
    }
    assert_eq!(report["volumes"][2]["label"], "third");
    assert_eq!(report["volumes"][0]["grade"], "clean");
    run([Path::new("verify"), &image]).expect(0);

    let target = dir.path().join("target");
    let restore = |options: &[&str]| {
        let options = options.iter().map(Path::new);
        run([Path::new("restore"), &image].into_iter().chain(options))
    };
    restore(&[target.to_str().unwrap()])
        .expect(2)
        .says("--volume");
    restore(&["--volume", "4", target.to_str().unwrap()]).expect(2);
    restore(&["--volume", "0", target.to_str().unwrap()]).expect(2);
    assert!(!target.exists());
    restore(&["--volume", "2", target.to_str().unwrap()]).expect(0);
    assert!(same_bytes(&sources[1], &target));
    assert_eq!(target.metadata().unwrap().len(), 70_000);

    let [first, third] = ["first", "third"].map(|name| dir.path().join(name));
    let maps = [(3, &third), (1, &first)].map(|(n, path)| format!("{n}={}", path.display()));
    restore(&["--map", &maps[0], "--map", &maps[1], "--verify"]).expect(0);
    for (source, target) in [(&sources[0], &first), (&sources[2], &third)] {
        assert_restored("map", source, target);
        assert_eq!(
            digests_in_ext4(source, dir.path()),
            digests_in_ext4(target, dir.path())
        );
    }
    for wrong in ["3", "0=x", "x=y", "=", "-1=x", "9=x"] {
        restore(&["--map", wrong]).expect(2);
    }
    restore(&["--map", &maps[0], "--map", &maps[0], "--yes"]).expect(2);
    let twice = format!("1={}", third.display());
    restore(&["--map", &maps[0], "--map", &twice, "--yes"]).expect(2);
    restore(&["--map", &maps[0], third.to_str().unwrap()]).expect(2);
    restore(&[]).expect(2);
    assert_restored("untouched", &sources[2], &third);

    let against = |n: &str, path: &Path| {
        run([
            Path::new("verify"),
            &image,
            Path::new("--volume"),
            Path::new(n),
            Path::new("--against"),
            path,
        ])
    };
    against("1", &first).expect(0);
    against("2", &sources[1]).expect(0);
    against("1", &third).expect(4);
    against("4", &third).expect(2);
    run([Path::new("verify"), &image, Path::new("--against"), &third])
        .expect(2)
        .says("--volume");
}

#[test]
fn options_of_restore_do_what_they_say() {
    let dir = temp_dir();
    let [source, image, target] = ["source", "image", "target"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", Some(Path::new("/usr/include/linux")));
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    let restore = |options: &[&str]| {
        let args = ["restore", "--yes", image.to_str().unwrap()];
        run(args
            .iter()
            .chain(options)
            .chain([&target.to_str().unwrap()]))
    };
    // Discarded first: what is free is a hole afterwards.
    poisoned_file(&target, SIZE);
    restore(&["--discard"]).expect(0);
    assert_restored("discard", &source, &target);
    let used = map(&source).walk.used.0;
    assert!(target.metadata().unwrap().blocks() * 512 <= used + (1 << 20));

    for threads in ["1", "2", "16"] {
        poisoned_file(&target, SIZE);
        restore(&["--threads", threads, "--verify"]).expect(0);
        assert_restored(threads, &source, &target);
    }
    for threads in ["0", "257", "many"] {
        restore(&["--threads", threads]).expect(2);
    }

    let report = restore(&["--json", "--verify"]).expect(0);
    let events: Vec<_> = report
        .json()
        .iter()
        .map(|line| line["event"].clone())
        .collect();
    assert!(events.contains(&"plan".into()), "{report}");
    let report = report.last();
    assert_eq!(report["verified"], true);
    assert_eq!(report["grade"], "clean");
    assert_eq!(report["targets"][0]["n"], 1);
    assert_eq!(report["targets"][0]["path"], target.to_str().unwrap());
    let shown = restore(&["--quiet"]).expect(0);
    assert_eq!((shown.stdout.len(), shown.stderr.as_str()), (0, ""));
}

/// A symbolic link leads to what is restored to, and stays.
#[test]
fn links_are_followed() {
    let dir = temp_dir();
    let [source, image, real, link] =
        ["source", "image", "real", "link"].map(|part| dir.path().join(part));
    std::fs::write(&source, vec![3; 10_000]).unwrap();
    let [source_link, image_link] = ["s", "i"].map(|name| dir.path().join(name));
    std::os::unix::fs::symlink(&source, &source_link).unwrap();
    std::os::unix::fs::symlink(&image, &image_link).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    std::fs::write(&image, "an old image").unwrap();
    let args = ["backup", "--force", "-o"].map(Path::new);
    run(args.into_iter().chain([image_link.as_path(), &source_link])).expect(0);
    assert!(image_link.is_symlink() && !image.is_symlink());
    std::fs::write(&real, vec![1; 10_000]).unwrap();
    run([Path::new("restore"), Path::new("--yes"), &image_link, &link]).expect(0);
    assert!(link.is_symlink());
    assert!(same_bytes(&source, &real));
}

#[test]
fn privileged_a_device_larger_than_the_volume_loses_old_signatures() {
    needs_root!();
    let dir = temp_dir();
    let [source, image, file] = ["source", "image", "file"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", None);
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    poisoned_file(&file, 96 << 20);
    let target = LoopDevice::attach(&file);
    // A partition table has a copy of itself in the last sectors.
    table::gpt(target.path());
    let args = ["restore", "--yes", "--verify"].map(Path::new);
    run(args.into_iter().chain([image.as_path(), target.path()])).expect(0);
    assert_restored("device", &source, target.path());
    let found = tool("wipefs", [Path::new("--noheadings"), target.path()]);
    assert!(found.contains("ext4") && !found.contains("gpt"), "{found}");

    // Discarding leaves holes in the file behind the loop device.
    let options = ["restore", "--yes", "--discard"].map(Path::new);
    run(options.into_iter().chain([image.as_path(), target.path()])).expect(0);
    assert_restored("discarded device", &source, target.path());
    let kept = OpenOptions::new().read(true).open(&file).unwrap();
    assert!(kept.metadata().unwrap().blocks() * 512 < 64 << 20);
}
