//! The JSON lines that other programs build on: for each event, the fields it has, which may grow in
//! number but never change their names.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::common::holdstill;
use crate::common::{self, LoopDevice, Mount, needs_root, run, sparse_file};

/// Every event and its fields, beside `v`, `event`, `time` and `run_id`, which all have.
const PROMISED: [(&str, &[&str]); 8] = [
    ("plan", &["plan"]),
    ("frozen", &["instant"]),
    ("progress", &["done_bytes", "eta_s", "rate", "total_bytes"]),
    (
        "thawed",
        &["drain_ms", "freeze_ms", "purpose", "read_ms", "thaw_ms"],
    ),
    ("warning", &["message"]),
    ("error", &["exit_code", "hint", "kind", "message"]),
    (
        "result",
        &[
            "content_id",
            "elapsed_s",
            "freeze",
            "freeze_ms",
            "freezes",
            "grade",
            "image",
            "image_id",
            "instant",
            "stored_bytes",
            "used_bytes",
            "volumes",
            "warnings",
        ],
    ),
    (
        "volume of a result",
        &[
            "fs",
            "grade",
            "label",
            "n",
            "path",
            "size",
            "unreadable",
            "used_bytes",
            "uuid",
        ],
    ),
];

fn promised(event: &str) -> Vec<String> {
    let found = PROMISED.iter().find(|(name, _)| *name == event);
    let (_, fields) = found.unwrap_or_else(|| panic!("an event nobody promised: {event}"));
    fields.iter().map(|field| (*field).to_owned()).collect()
}

fn fields(line: &Value) -> Vec<String> {
    let common = ["v", "event", "time", "run_id"];
    let all = line.as_object().unwrap().keys();
    all.filter(|name| !common.contains(&name.as_str()))
        .cloned()
        .collect()
}

fn check(lines: &[Value], seen: &mut BTreeMap<String, usize>) {
    for line in lines {
        let event = line["event"].as_str().unwrap();
        let fields = fields(line);
        for field in promised(event) {
            assert!(fields.contains(&field), "{event} lacks {field}: {line}");
        }
        *seen.entry(event.to_owned()).or_default() += 1;
    }
}

#[test]
fn privileged_every_event_has_its_fields() {
    needs_root!();
    let dir = common::temp_dir();
    let path = |name: &str| dir.path().join(name);
    let mut seen = BTreeMap::new();

    sparse_file(&path("volume"), 64 << 20);
    let device = LoopDevice::attach(&path("volume"));
    run("mkfs.ext4", [Path::new("-q"), device.path()]);
    let mount = Mount::new(device.path(), &path("live"), "ext4", "");
    std::fs::write(mount.dir().join("file"), vec![7; 6 << 20]).unwrap();
    let source = mount.dir().to_str().unwrap();
    let image = path("image.still");
    let args = [
        "backup",
        source,
        "--freeze",
        "track",
        "--rate",
        "4M",
        "--json",
        "-o",
        image.to_str().unwrap(),
    ];
    let lines = holdstill::run(args).expect(0).json();
    check(&lines, &mut seen);
    let result = lines.last().unwrap();
    let volume = fields(&result["volumes"][0]);
    for field in promised("volume of a result") {
        assert!(volume.contains(&field), "a volume lacks {field}");
    }

    // Something that no filesystem vouches for, and something that is not there.
    std::fs::write(path("raw"), vec![9; 8192]).unwrap();
    let (raw, other) = (path("raw"), path("other.still"));
    let args = [
        "backup",
        raw.to_str().unwrap(),
        "--json",
        "-o",
        other.to_str().unwrap(),
    ];
    check(&holdstill::run(args).expect(0).json(), &mut seen);
    check(
        &holdstill::run(["inspect", "/no/such/thing", "--json"])
            .expect(1)
            .json(),
        &mut seen,
    );

    for (event, _) in PROMISED.iter().filter(|(event, _)| !event.contains(' ')) {
        assert!(seen.contains_key(*event), "{event} never came: {seen:?}");
    }
}

#[test]
fn the_version_tells_what_this_build_can_do() {
    let line = holdstill::run(["--version", "--json"]).expect(0).last();
    assert_eq!(line["version"], env!("CARGO_PKG_VERSION"));
    let names = |field: &str| {
        line[field]
            .as_array()
            .unwrap()
            .iter()
            .map(|name| name.as_str().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names("steps"),
        [
            "offline", "zfs", "btrfs", "lvm", "track", "apfs", "dm", "hold", "none"
        ]
    );
    assert!(names("used_block_filesystems").contains(&"apfs"));
    assert_eq!(
        names("auto_steps"),
        ["offline", "zfs", "btrfs", "lvm", "track"]
    );
    assert_eq!(line["format_versions"], serde_json::json!([1]));
}

#[test]
fn a_dry_run_changes_nothing() {
    let dir = common::temp_dir();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, vec![9; 8192]).unwrap();
    let (image, target) = (dir.path().join("image.still"), dir.path().join("target"));
    let (raw, image, target) = (
        raw.to_str().unwrap(),
        image.to_str().unwrap(),
        target.to_str().unwrap(),
    );
    let line = holdstill::run(["backup", raw, "-o", image, "--dry-run", "--json"])
        .expect(0)
        .last();
    assert_eq!(
        (&line["dry_run"], &line["actions"][0]["step"]),
        (&Value::from(true), &Value::from("offline"))
    );
    holdstill::run(["clone", raw, target, "--dry-run"]).expect(0);
    assert_eq!(holdstill::listing(dir.path()), ["raw"]);
    holdstill::run(["backup", raw, "-o", image]).expect(0);
    holdstill::run(["restore", image, target, "--dry-run"]).expect(0);
    assert!(!Path::new(target).exists());
    // What the real thing would refuse, a dry run refuses, too.
    holdstill::run(["backup", raw, "-o", image, "--dry-run"]).expect(3);
}

#[test]
fn completions_and_man_pages_are_made() {
    for shell in ["bash", "zsh", "fish"] {
        let made = holdstill::run(["completions", shell]).expect(0);
        assert!(
            String::from_utf8_lossy(&made.stdout).contains("on-read-error"),
            "{shell}"
        );
    }
    let dir = common::temp_dir();
    holdstill::run(["man", dir.path().to_str().unwrap()]).expect(0);
    let pages = holdstill::listing(dir.path());
    assert!(
        pages.iter().any(|page| page == "holdstill-backup.1"),
        "{pages:?}"
    );
}
