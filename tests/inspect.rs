//! `inspect` of sources and images: what it says, and that it changes nothing.

use std::path::Path;

use crate::common::holdstill::{Run, run};
use crate::common::volume::{ext4, map};
use crate::common::{LoopDevice, Mount, needs_root, sparse_file, temp_dir};

const SIZE: u64 = 24 << 20;

fn inspect(what: &Path) -> Run {
    run([Path::new("inspect"), Path::new("--json"), what])
}

#[test]
fn a_source_is_described() {
    let dir = temp_dir();
    let source = dir.path().join("source");
    ext4(&source, SIZE, "-L data", None);
    let before = std::fs::read(&source).unwrap();
    let run_of = inspect(&source).expect(0);
    assert_eq!(run_of.json().len(), 1, "one result and nothing else");
    let report = run_of.last();
    assert_eq!(report["what"], "source");
    assert_eq!(report["path"], source.to_str().unwrap());
    assert_eq!(report["size"], SIZE);
    assert_eq!(report["fs"], "ext4");
    assert_eq!(report["label"], "data");
    assert_eq!(report["condition"], "clean");
    assert_eq!(report["used_bytes"], map(&source).walk.used.0);
    assert_eq!(report["step"], "offline");
    let text = run([Path::new("inspect"), &source]).expect(0).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.contains("ext4 `data`") && text.contains("`offline`"),
        "{text}"
    );
    assert!(std::fs::read(&source).unwrap() == before, "it was changed");
}

#[test]
fn what_is_no_filesystem_is_described_too() {
    let dir = temp_dir();
    let source = dir.path().join("source");
    sparse_file(&source, 1 << 20);
    let report = inspect(&source).expect(0).last();
    assert_eq!(report["fs"], serde_json::Value::Null);
    assert_eq!(report["condition"], "unknown");
    std::fs::write(&source, "").unwrap();
    assert_eq!(inspect(&source).expect(0).last()["size"], 0);
    inspect(&dir.path().join("nothing")).expect(1);
    inspect(dir.path()).expect(2);
    inspect(Path::new("/dev/null")).expect(2);
}

#[test]
fn an_image_is_described() {
    let dir = temp_dir();
    let [source, image] = ["source", "image"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "-L data", None);
    let args = ["backup", "--json", "-o"].map(Path::new);
    let made = run(args.into_iter().chain([image.as_path(), &source]))
        .expect(0)
        .last();
    let report = inspect(&image).expect(0).last();
    assert_eq!(report["what"], "image");
    for field in ["image", "image_id", "stored_bytes"] {
        assert_eq!(report[field], made[field], "{field}");
    }
    assert_eq!(report["trailer"]["content_id"], made["content_id"]);
    assert_eq!(report["trailer"]["freeze"], "offline");
    let volume = &report["manifest"]["volumes"][0];
    assert_eq!(volume["label"], "data");
    assert_eq!(volume["size"], SIZE);
    let text = run([Path::new("inspect"), &image]).expect(0).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.contains("holdstill image") && text.contains("volume 1"),
        "{text}"
    );
}

#[test]
fn privileged_a_mounted_source_names_what_speaks_against_each_step() {
    needs_root!();
    let dir = temp_dir();
    let file = dir.path().join("source");
    ext4(&file, SIZE, "", None);
    let device = LoopDevice::attach(&file);
    let mounted = dir.path().join("mounted");
    let mount = Mount::new(device.path(), &mounted, "ext4", "");
    for source in [device.path(), mount.dir(), &file] {
        let report = inspect(source).expect(0).last();
        assert_eq!(report["path"], device.path().to_str().unwrap());
        assert_eq!(report["mounted_at"], mounted.to_str().unwrap());
        assert_eq!(report["ladder"][0]["step"], "offline");
        let objection = report["ladder"][0]["objection"].as_str().unwrap();
        assert!(objection.contains(mounted.to_str().unwrap()), "{objection}");
    }
    drop(mount);
    let report = inspect(device.path()).expect(0).last();
    assert_eq!(report["step"], "offline");
    assert_eq!(report["condition"], "clean");
}
