//! `--dry-run` says no where the run would, and tells how much there is to do; and what grades tell of
//! content that nothing here can read.

use std::path::Path;

use crate::common::holdstill::{listing, run};
use crate::common::volume::populate;
use crate::common::{self, LoopDevice, Mount, Rng, needs_root, sparse_file};

const SIZE: u64 = 64 << 20;

fn device(dir: &Path, name: &str) -> LoopDevice {
    let file = dir.join(name);
    sparse_file(&file, SIZE);
    LoopDevice::attach(&file)
}

#[test]
fn privileged_a_dry_run_refuses_what_the_run_would_and_tells_how_much_there_is() {
    needs_root!();
    let dir = common::temp_dir();
    let one = device(dir.path(), "one");
    common::run("mkfs.ext4", ["-q", one.path().to_str().unwrap()]);
    let mounted = Mount::new(one.path(), &dir.path().join("m"), "ext4", "rw");
    populate(mounted.dir(), &mut Rng(1), 8 << 20);
    let source = mounted.dir().to_str().unwrap();
    let before = listing(dir.path());
    // The folder is missing; the output lies on the source; it is missing itself.
    let missing = dir.path().join("nowhere/image");
    let inside = mounted.dir().join("image");
    for (source, output, code) in [
        (source, missing.as_path(), 1),
        (source, inside.as_path(), 3),
        ("/dev/nowhere", &dir.path().join("image"), 1),
    ] {
        let args = ["backup", source, "-o", output.to_str().unwrap()];
        run(args.iter().chain(&["--dry-run"])).expect(code);
        run(args).expect(code);
    }
    let image = dir.path().join("image");
    let args = ["backup", source, "-o", image.to_str().unwrap(), "--json"];
    let planned = run(args.iter().chain(&["--dry-run"])).expect(0).last();
    assert_eq!(listing(dir.path()), before);
    let about = planned["actions"][0]["used_bytes"].as_u64().unwrap();
    assert!(planned["actions"][0]["free_bytes"].as_u64().unwrap() > 0);
    let made = run(args).expect(0).last();
    let used = made["used_bytes"].as_u64().unwrap();
    // What the filesystem calls free does not count, and little else is not copied.
    assert!(about > used / 2 && about < used * 2, "{about} of {used}");
    // Of a device that is not mounted, its map tells.
    drop(mounted);
    let args = [
        "backup",
        one.path().to_str().unwrap(),
        "-o",
        image.to_str().unwrap(),
        "--force",
        "--json",
    ];
    let planned = run(args.iter().chain(&["--dry-run"])).expect(0).last();
    let made = run(args).expect(0).last();
    assert_eq!(planned["actions"][0]["used_bytes"], made["used_bytes"]);
}

#[test]
fn privileged_an_image_that_may_not_fit_is_told_before_the_copy() {
    needs_root!();
    let dir = common::temp_dir();
    let one = device(dir.path(), "one");
    common::run("mkfs.ext4", ["-q", one.path().to_str().unwrap()]);
    let mounted = Mount::new(one.path(), &dir.path().join("m"), "ext4", "rw");
    populate(mounted.dir(), &mut Rng(1), 8 << 20);
    drop(mounted);
    let narrow = dir.path().join("narrow");
    std::fs::create_dir(&narrow).unwrap();
    common::run(
        "mount",
        [
            "-t",
            "tmpfs",
            "-o",
            "size=4M",
            "narrow",
            narrow.to_str().unwrap(),
        ],
    );
    let narrow = Mount::of(&narrow);
    let image = narrow.dir().join("image");
    run([
        "backup",
        one.path().to_str().unwrap(),
        "-o",
        image.to_str().unwrap(),
    ])
    .expect(1)
    .says("it may not fit");
    assert!(listing(narrow.dir()).is_empty());
}

#[test]
fn privileged_what_nothing_here_can_read_is_of_an_unknown_grade_and_spoils_no_other() {
    needs_root!();
    let dir = common::temp_dir();
    let (one, fat, swap) = (
        device(dir.path(), "one"),
        device(dir.path(), "fat"),
        device(dir.path(), "swap"),
    );
    let node = |device: &LoopDevice| device.path().to_str().unwrap().to_owned();
    common::run("mkfs.ext4", ["-q", &node(&one)]);
    common::run("mkfs.vfat", [&node(&fat)]);
    common::run("mkswap", [&node(&swap)]);
    let image = dir.path().join("image");
    let image = image.to_str().unwrap();
    let made = run([
        "backup",
        &node(&one),
        &node(&fat),
        &node(&swap),
        "-o",
        image,
        "--json",
    ])
    .expect(0)
    .last();
    let grades: Vec<_> = (0..3)
        .map(|n| made["volumes"][n]["grade"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(grades, ["clean", "unknown", "unknown"]);
    assert_eq!(made["grade"], "unknown");
    let warnings = made["warnings"].as_array().unwrap();
    assert!(
        warnings
            .iter()
            .all(|it| it.as_str().unwrap().starts_with("/dev/loop")),
        "{warnings:?}"
    );
    let target = dir.path().join("target");
    let restored = run([
        "restore",
        image,
        target.to_str().unwrap(),
        "--volume",
        "1",
        "--json",
    ])
    .expect(0)
    .last();
    assert_eq!(restored["grade"], "clean");
    assert_eq!(
        restored["warnings"].as_array().unwrap().len(),
        0,
        "{restored}"
    );
    let restored = run([
        "restore",
        image,
        target.to_str().unwrap(),
        "--volume",
        "2",
        "--yes",
        "--json",
    ])
    .expect(0)
    .last();
    assert_eq!(restored["grade"], "unknown");
}

#[test]
fn privileged_several_tracked_sources_go_into_one_image() {
    needs_root!();
    let dir = common::temp_dir();
    let devices: Vec<_> = ["one", "two", "three"]
        .iter()
        .map(|name| device(dir.path(), name))
        .collect();
    let mounts: Vec<_> = devices
        .iter()
        .enumerate()
        .map(|(n, device)| {
            common::run("mkfs.ext4", ["-q", device.path().to_str().unwrap()]);
            let mounted = Mount::new(
                device.path(),
                &dir.path().join(format!("m{n}")),
                "ext4",
                "rw",
            );
            populate(mounted.dir(), &mut Rng(n as u64 + 1), 4 << 20);
            mounted
        })
        .collect();
    let image = dir.path().join("image");
    let mut args = vec![
        "backup",
        "--freeze",
        "track",
        "-o",
        image.to_str().unwrap(),
        "--json",
    ];
    args.extend(mounts.iter().map(|mounted| mounted.dir().to_str().unwrap()));
    let made = run(args).expect(0).last();
    assert_eq!(made["grade"], "frozen");
    assert_eq!(made["volumes"].as_array().unwrap().len(), 3);
    let instances = Path::new("/sys/kernel/tracing/instances");
    let left = if instances.is_dir() {
        listing(instances)
    } else {
        Vec::new()
    };
    let id = made["run_id"].as_str().unwrap();
    assert!(
        left.iter().all(|name| !name.to_string_lossy().contains(id)),
        "{left:?}"
    );
}
