//! What a backup writes, and what it says of it.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::common::holdstill::{Run, command, finish, listing, run, wait};
use crate::common::volume::{ext4, map};
use crate::common::{run as tool, spawn, temp_dir};

const SIZE: u64 = (48 << 20) + 512;

fn source(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    ext4(
        &source,
        SIZE,
        "-L home",
        Some(Path::new("/usr/include/linux")),
    );
    source
}

fn backup(source: &Path, image: &Path, options: &[&str]) -> Run {
    let options = options.iter().map(Path::new);
    let args = [Path::new("backup"), source, Path::new("-o"), image];
    run(args.into_iter().chain(options))
}

#[test]
fn an_image_appears_whole_under_its_name_and_alone() {
    let dir = temp_dir();
    let source = source(dir.path());
    let image = dir.path().join("image");
    let shown = backup(&source, &image, &[]).expect(0);
    assert_eq!(listing(dir.path()), ["image", "source"]);
    let mode = image.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(
        text.contains("grade clean") && text.contains("content id"),
        "{text}"
    );
    // A name without a folder.
    let mut here = command(["backup", "source", "-o", "other"]);
    here.current_dir(dir.path());
    // Not a path by its first character: nothing else is called so either.
    let run = finish(here);
    run.expect(0);
    assert_eq!(listing(dir.path()), ["image", "other", "source"]);
}

#[test]
fn the_report_has_every_field_that_is_promised() {
    let dir = temp_dir();
    let source = source(dir.path());
    let image = dir.path().join("image");
    let run = backup(&source, &image, &["--json"]).expect(0);
    let events: Vec<_> = run
        .json()
        .iter()
        .map(|line| line["event"].clone())
        .collect();
    assert!(events.contains(&"plan".into()), "{run}");
    let report = run.last();
    assert_eq!(report["image"], image.to_str().unwrap());
    assert_eq!(report["image_id"].as_str().unwrap().len(), 32);
    assert_eq!(report["content_id"].as_str().unwrap().len(), 64);
    assert_eq!(report["grade"], "clean");
    assert_eq!(report["freeze"], "offline");
    assert!(report["instant"].as_str().unwrap().ends_with('Z'));
    assert_eq!(report["freeze_ms"], 0.0);
    assert_eq!(report["freezes"], serde_json::json!([]));
    assert_eq!(report["used_bytes"], map(&source).walk.used.0);
    assert_eq!(report["stored_bytes"], image.metadata().unwrap().len());
    assert!(report["elapsed_s"].as_f64().unwrap() > 0.0);
    assert_eq!(report["warnings"], serde_json::json!([]));
    let volume = &report["volumes"][0];
    assert_eq!(volume["n"], 1);
    assert_eq!(volume["path"], source.to_str().unwrap());
    assert_eq!(volume["fs"], "ext4");
    assert_eq!(volume["label"], "home");
    let uuid = tool(
        "blkid",
        ["-p", "-s", "UUID", "-o", "value", source.to_str().unwrap()],
    );
    assert_eq!(volume["uuid"], uuid.trim());
    assert_eq!(volume["size"], SIZE);
    assert_eq!(volume["used_bytes"], report["used_bytes"]);
    assert_eq!(volume["grade"], "clean");
    assert_eq!(volume["unreadable"], serde_json::json!([]));
}

/// The same content has the same id, however it is stored; the files themselves differ.
#[test]
fn the_content_id_depends_on_the_content_alone() {
    let dir = temp_dir();
    let source = source(dir.path());
    let report = |number: usize, options: &[&str]| {
        let image = dir.path().join(number.to_string());
        let options = [&["--json"], options].concat();
        let made = backup(&source, &image, &options).expect(0).last();
        let checked = run([Path::new("verify"), Path::new("--json"), &image])
            .expect(0)
            .last();
        assert_eq!(made["content_id"], checked["content_id"]);
        assert_eq!(made["image_id"], checked["image_id"]);
        made
    };
    let ways: [&[&str]; 6] = [
        &[],
        &["--compress", "none"],
        &["--compress", "none", "--threads", "1"],
        &["--compress", "zstd:3", "--threads", "7"],
        &["--compress", "zstd:9"],
        &["--compress", "zstd:-3"],
    ];
    let reports: Vec<_> = (0..).zip(ways).map(|(n, way)| report(n, way)).collect();
    for (number, other) in reports.iter().enumerate().skip(1) {
        assert_eq!(reports[0]["content_id"], other["content_id"], "{number}");
        assert_ne!(reports[0]["image_id"], other["image_id"], "{number}");
    }
    assert!(reports[1]["stored_bytes"].as_u64() > reports[0]["stored_bytes"].as_u64());
    for wrong in ["zstd:20", "zstd:x", "gzip", "zstd:", "none:1", ""] {
        let image = dir.path().join("never");
        backup(&source, &image, &["--compress", wrong]).expect(2);
        assert!(!image.exists(), "{wrong}");
    }
}

#[test]
fn all_blocks_are_copied_when_asked() {
    let dir = temp_dir();
    let source = source(dir.path());
    // Something that lies in free space.
    let free = map(&source).free();
    let gap = free.runs().iter().rfind(|gap| gap.len.0 > 8192).unwrap();
    let file = File::options().write(true).open(&source).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 4096], gap.start.0).unwrap();
    drop(file);
    let [some, all, target] = ["some", "all", "target"].map(|name| dir.path().join(name));
    let some = backup(&source, &some, &["--json"]).expect(0).last();
    let whole = backup(&source, &all, &["--json", "--all-blocks"])
        .expect(0)
        .last();
    assert_eq!(whole["grade"], "clean");
    assert_ne!(some["content_id"], whole["content_id"]);
    run([Path::new("restore"), &all, &target]).expect(0);
    assert!(crate::common::holdstill::same_bytes(&source, &target));
}

#[test]
fn an_old_image_makes_place_only_when_asked() {
    let dir = temp_dir();
    let source = source(dir.path());
    let image = dir.path().join("image");
    std::fs::write(&image, "old").unwrap();
    backup(&source, &image, &[]).expect(3).says("--force");
    assert_eq!(std::fs::read(&image).unwrap(), b"old");
    backup(&source, &image, &["--force"]).expect(0);
    let mode = image.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    run([Path::new("verify"), &image]).expect(0);
    assert_eq!(listing(dir.path()), ["image", "source"]);
}

/// Pipes and character devices are written to, and stay what they are.
#[test]
fn pipes_and_devices_are_streams() {
    let dir = temp_dir();
    let source = source(dir.path());
    backup(&source, Path::new("/dev/null"), &[]).expect(0);
    let null = Path::new("/dev/null").metadata().unwrap();
    assert!(null.file_type().is_char_device());

    let pipe = dir.path().join("pipe");
    tool("mkfifo", [&pipe]);
    let path = pipe.clone();
    let reader = std::thread::spawn(move || {
        let mut image = Vec::new();
        File::open(path).unwrap().read_to_end(&mut image).unwrap();
        image
    });
    backup(&source, &pipe, &[]).expect(0);
    assert!(pipe.metadata().unwrap().file_type().is_fifo());
    let image = dir.path().join("image");
    std::fs::write(&image, reader.join().unwrap()).unwrap();
    run([Path::new("verify"), &image]).expect(0);

    // And the other way round: an image read from a pipe by its name.
    let mut feeding = command([Path::new("backup"), &source, Path::new("-o"), &pipe]);
    let feeder = spawn(&mut feeding);
    run([Path::new("verify"), &pipe]).expect(0);
    wait(&feeding, feeder).expect(0);
}

/// What goes to standard error, and what to standard output, when the image goes there.
#[test]
fn reports_make_way_for_an_image_on_standard_output() {
    let dir = temp_dir();
    let source = source(dir.path());
    let run = backup(&source, Path::new("-"), &["--json"]).expect(0);
    assert_eq!(run.last()["stored_bytes"], run.stdout.len());
    assert_eq!(run.last()["image"], "-");
    let quiet = backup(&source, Path::new("-"), &["--quiet"]).expect(0);
    assert_eq!(quiet.stderr, "");
    assert_eq!(quiet.stdout.len(), run.stdout.len());
}
