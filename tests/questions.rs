//! The question before something is overwritten: what it shows, and that every refusal comes before it.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::holdstill::run;
use crate::common::scene::{SIZE, Scene};
use crate::common::volume::{ext4, poisoned_file};
use crate::common::{
    LoopDevice, Mount, command, needs_root, run as tool, sparse_file, spawn, temp_dir,
};

/// Restore and clone of a scene onto a target, without `--yes`.
fn both<'a>(scene: &'a Scene, target: &'a Path) -> [[&'a Path; 3]; 2] {
    [
        [Path::new("restore"), &scene.image, target],
        [Path::new("clone"), &scene.source, target],
    ]
}

/// A device with an ext4 on it that was in use once, with a label that a terminal would obey.
fn used_once(scene: &Scene) -> (LoopDevice, PathBuf) {
    let file = scene.path("old disk");
    ext4(&file, SIZE, "", None);
    tool(
        "tune2fs",
        [Path::new("-L"), Path::new("\x1b[31mred"), &file],
    );
    let device = LoopDevice::attach(&file);
    let point = scene.path("last point");
    let mount = Mount::new(device.path(), &point, "ext4", "");
    std::fs::write(mount.dir().join("file"), "content").unwrap();
    drop(mount);
    (device, point)
}

#[test]
fn privileged_what_would_be_overwritten_is_shown() {
    needs_root!();
    let scene = Scene::new();
    let (device, point) = used_once(&scene);
    let shown = [
        "ext4 `\\u{1b}[31mred`, 24.0 MiB, ".to_owned(),
        " used, last mounted at ".to_owned() + point.to_str().unwrap(),
        ", last written at 20".to_owned(),
        "/old disk".to_owned(),
    ];
    for args in both(&scene, device.path()) {
        let refused = run(args).expect(2);
        for text in &shown {
            assert!(refused.stderr.contains(text.as_str()), "{text}: {refused}");
        }
        let dry = run(args.into_iter().chain([Path::new("--dry-run")])).expect(0);
        let dry = String::from_utf8(dry.stdout).unwrap();
        for text in &shown {
            assert!(dry.contains(text.as_str()), "{text}: {dry}");
        }
        let options = ["--dry-run", "--json"].map(Path::new);
        let json = run(args.into_iter().chain(options)).expect(0).last();
        let now = &json["actions"][0]["now"];
        assert_eq!(now["fs"], "ext4");
        assert_eq!(now["label"], "\x1b[31mred");
        assert_eq!(now["size"], SIZE);
        assert!(
            now["used_bytes"]
                .as_u64()
                .is_some_and(|used| used > 0 && used < SIZE)
        );
        assert_eq!(now["last_mounted_at"], point.to_str().unwrap());
        let times = ["last_mounted", "last_written"].map(|name| now[name].as_str().unwrap());
        for time in times {
            time.parse::<jiff::Timestamp>().unwrap();
        }
        assert!(now["model"].as_str().unwrap().ends_with("/old disk"));
    }
}

#[test]
fn privileged_the_partitions_of_a_disk_are_shown() {
    needs_root!();
    let scene = Scene::new();
    let disk = scene.path("disk");
    sparse_file(&disk, SIZE);
    let device = LoopDevice::attach(&disk);
    let partition = crate::common::Partition::add(device.path(), 1, 2048, 20480);
    tool(
        "mkfs.ext4",
        ["-q", "-L", "inside", partition.node().to_str().unwrap()],
    );
    let refused = run(both(&scene, device.path())[0]).expect(2);
    let name = partition.node().display();
    let text = format!("{name}: ext4 `inside`, 10.0 MiB");
    assert!(refused.stderr.contains(&text), "{refused}");
}

/// At a terminal, which `script` is.
#[test]
fn privileged_the_question_at_a_terminal_shows_it() {
    needs_root!();
    let scene = Scene::new();
    let (device, point) = used_once(&scene);
    let ask = |answer: &str| {
        let line = format!(
            "{} clone {} {}",
            env!("CARGO_BIN_EXE_holdstill"),
            scene.source.display(),
            device.path().display()
        );
        let mut program = command("script", ["-q", "-e", "-c", &line, "/dev/null"]);
        program.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn(&mut program);
        let mut stdin = child.stdin.take().unwrap();
        writeln!(stdin, "{answer}").unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(point.to_str().unwrap()), "{text}");
        assert!(text.contains("ext4 `\\u{1b}[31mred`"), "{text}");
        assert!(text.contains("Type `yes` to go on"), "{text}");
        output.status.code()
    };
    let before = std::fs::read(scene.path("old disk")).unwrap();
    assert_eq!(ask("no"), Some(3));
    assert!(before == std::fs::read(scene.path("old disk")).unwrap());
    assert_eq!(ask("yes"), Some(0));
    tool("e2fsck", [Path::new("-fn"), device.path()]);
}

/// Usage, safety, confirmation: what is refused is refused before anybody is asked.
#[test]
fn privileged_every_refusal_of_a_target_comes_before_the_question() {
    needs_root!();
    let scene = Scene::new();
    let refuses = |text: &str, target: &Path| {
        for args in both(&scene, target) {
            println!("{args:?}");
            scene.refuses(3, text, args);
            scene.refuses(3, text, args.into_iter().chain([Path::new("--dry-run")]));
        }
    };
    let file = scene.path("target");
    poisoned_file(&file, SIZE - 4096);
    refuses("too small", &file);
    poisoned_file(&file, SIZE);
    let writer = OpenOptions::new().write(true).open(&file).unwrap();
    refuses("in use", &file);
    drop(writer);
    let read_only = LoopDevice::attach_with(&file, &["--read-only"]);
    refuses("read-only", read_only.path());
    drop(read_only);
    let large = LoopDevice::attach_with(&file, &["--sector-size", "4096"]);
    let small = Scene::new();
    ext4(&small.source, SIZE, "-b 1024", None);
    small.refuses(3, "1024", [Path::new("clone"), &small.source, large.path()]);
    drop(large);
    ext4(&file, SIZE, "", None);
    let device = LoopDevice::attach(&file);
    let mount = Mount::new(device.path(), &scene.path("mounted"), "ext4", "");
    refuses("mounted", device.path());
    refuses("mounted", &file);
    drop(mount);
    drop(device);
    scene.refuses(
        3,
        "source",
        [Path::new("clone"), &scene.source, &scene.source],
    );
    let device = LoopDevice::attach(&scene.source);
    scene.refuses(
        3,
        "source",
        [Path::new("clone"), &scene.source, device.path()],
    );
    scene.refuses(
        3,
        "image",
        [Path::new("restore"), &scene.image, &scene.image],
    );
    // What the source says no to.
    let writer = OpenOptions::new().write(true).open(device.path()).unwrap();
    scene.refuses(3, "hold still", [Path::new("clone"), device.path(), &file]);
    drop(writer);
    for step in ["lvm", "zfs", "btrfs", "track", "dm", "hold"] {
        let args = ["clone", "--freeze", step].map(Path::new);
        scene.refuses(
            3,
            "does not apply",
            args.into_iter().chain([device.path(), &file]),
        );
    }
    let torn = ["clone", "--freeze", "none"].map(Path::new);
    scene.refuses(3, "torn", torn.into_iter().chain([device.path(), &file]));
    let mount = Mount::new(device.path(), &scene.path("mounted"), "ext4", "");
    let no_freeze = ["clone", "--no-freeze"].map(Path::new);
    scene.refuses(
        3,
        "--no-freeze",
        no_freeze.into_iter().chain([mount.dir(), &file]),
    );
    // A file of the very filesystem that would be frozen.
    let inside = mount.dir().join("inside");
    for name in ["inside", "new"] {
        sparse_file(&inside, SIZE);
        let target = mount.dir().join(name);
        scene.refuses(
            3,
            "on the source",
            [Path::new("clone"), mount.dir(), &target],
        );
        let dry = [
            Path::new("clone"),
            mount.dir(),
            &target,
            Path::new("--dry-run"),
        ];
        scene.refuses(3, "on the source", dry);
    }
    std::fs::remove_file(&inside).unwrap();
    let new_ids = ["clone", "--new-ids"].map(Path::new);
    scene.refuses(
        3,
        "new ids",
        new_ids.into_iter().chain([mount.dir(), &file]),
    );
    drop(mount);
    drop(device);
    // One of two targets is enough.
    let both = scene.path("both");
    let args = ["backup", "-o"].map(Path::new).into_iter();
    let other = scene.path("other");
    ext4(&other, SIZE, "", None);
    run(args.chain([both.as_path(), &scene.source, &other])).expect(0);
    let small = scene.path("small");
    poisoned_file(&small, SIZE / 2);
    let map = |n: u32, to: &Path| OsString::from(format!("--map={n}={}", to.display()));
    let args = [
        OsString::from("restore"),
        both.into(),
        map(1, &file),
        map(2, &small),
    ];
    scene.refuses(3, "too small", args);
}

#[test]
fn privileged_a_twin_is_refused_before_the_question() {
    needs_root!();
    let dir = temp_dir();
    let [source, image, target] = ["source", "image", "target"].map(|part| dir.path().join(part));
    sparse_file(&source, 128 << 20);
    tool("mkfs.btrfs", [Path::new("-q"), &source]);
    let shown = LoopDevice::attach(&source);
    run([Path::new("backup"), shown.path(), Path::new("-o"), &image]).expect(0);
    poisoned_file(&target, 128 << 20);
    let device = LoopDevice::attach(&target);
    run([Path::new("restore"), &image, device.path()])
        .expect(3)
        .says("must not be there twice");
    run([Path::new("clone"), shown.path(), device.path()])
        .expect(3)
        .says("must not be there twice");
}

/// What was typed is judged before what it would do.
#[test]
fn usage_comes_before_safety() {
    let scene = Scene::new();
    let target = scene.target(SIZE);
    let torn = ["--freeze", "none"].map(Path::new);
    let clone = [Path::new("clone"), &scene.source, &target];
    let args = clone.into_iter().chain(torn);
    scene.refuses(
        2,
        "--cow-size",
        args.chain(["--cow-size", "1M"].map(Path::new)),
    );
    let backup = [Path::new("backup"), &scene.source, Path::new("-o"), &target];
    let args = backup.into_iter().chain(torn);
    scene.refuses(2, "foo", args.chain(["--compress", "foo"].map(Path::new)));
}
