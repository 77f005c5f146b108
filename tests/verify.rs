//! `verify` by itself and against a device.

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::holdstill::{Run, run, run_from};
use crate::common::temp_dir;
use crate::common::volume::{copy, ext4, map};

const SIZE: u64 = 24 << 20;

fn against(image: &Path, other: &Path, options: &[&str]) -> Run {
    let options = options.iter().map(Path::new);
    let args = [Path::new("verify"), image, Path::new("--against"), other];
    run(args.into_iter().chain(options))
}

#[test]
fn only_a_difference_in_used_blocks_counts() {
    let dir = temp_dir();
    let [source, image, other] = ["source", "image", "other"].map(|part| dir.path().join(part));
    ext4(
        &source,
        SIZE,
        "-b 4096",
        Some(Path::new("/usr/include/linux/can")),
    );
    run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
    against(&image, &source, &[]).expect(0);

    copy(&source, &other);
    let map = map(&source);
    let change = |offset: u64| {
        let file = std::fs::File::options().read(true).write(true).open(&other);
        let file = file.unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[!byte[0]], offset).unwrap();
    };
    change(map.free().runs()[0].start.0 + 5);
    against(&image, &other, &[]).expect(0);
    let used = map.used.runs().last().unwrap().end().0 - 1;
    for offset in [used, 1025] {
        change(offset);
        let block = format!("at byte {}", offset / 4096 * 4096);
        against(&image, &other, &[]).expect(4).says(&block);
        let report = against(&image, &other, &["--json"]).expect(4).last();
        assert_eq!(report["kind"], "mismatch");
        change(offset);
    }
    against(&image, &other, &[]).expect(0);

    // A larger device may hold more; a smaller one cannot be equal.
    let file = std::fs::File::options().write(true).open(&other).unwrap();
    file.set_len(SIZE + 4096).unwrap();
    against(&image, &other, &[]).expect(0);
    file.set_len(SIZE - 512).unwrap();
    against(&image, &other, &[]).expect(4).says("smaller");
    against(&image, Path::new("/nowhere"), &[]).expect(1);
    against(&image, dir.path(), &[]).expect(1);
}

#[test]
fn the_report_names_the_image() {
    let dir = temp_dir();
    let [source, image] = ["source", "image"].map(|part| dir.path().join(part));
    ext4(&source, SIZE, "", None);
    let args = ["backup", "--json", "-o"].map(Path::new);
    let made = run(args.into_iter().chain([image.as_path(), &source]))
        .expect(0)
        .last();
    let report = run([Path::new("verify"), Path::new("--json"), &image])
        .expect(0)
        .last();
    assert_eq!(report["image"], image.to_str().unwrap());
    for field in ["image_id", "content_id", "grade", "stored_bytes"] {
        assert_eq!(report[field], made[field], "{field}");
    }
    assert_eq!(report["root_hash"].as_str().unwrap().len(), 64);
    assert_eq!(report["warnings"], serde_json::json!([]));
    let streamed = run_from(&image, ["verify", "--json", "-", "--threads", "1"])
        .expect(0)
        .last();
    assert_eq!(streamed["root_hash"], report["root_hash"]);
    let text = run([Path::new("verify"), &image]).expect(0).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("every byte is whole"), "{text}");
    let compared = against(&image, &source, &["--json"]).expect(0).last();
    assert_eq!(compared["against"], source.to_str().unwrap());
}
