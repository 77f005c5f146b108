//! What must not be done is refused, and what cannot be done fails: with the right exit code, in two
//! lines, and with nothing changed or left behind.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::holdstill::{command, finish, listing, run, run_from, same_bytes};
use crate::common::scene::{SIZE, Scene, assert_no_signature, backup_to};
use crate::common::volume::copy;
use crate::common::{
    LoopDevice, Mount, Partition, Rng, command as tool_command, needs_root, run as tool, seed,
    sparse_file, spawn, temp_dir_on_disk,
};

#[test]
fn wrong_command_lines_are_usage_errors() {
    let scene = Scene::new();
    let [source, image] = [&scene.source, &scene.image].map(|path| path.to_str().unwrap());
    let cases: &[&[&str]] = &[
        &["frobnicate"],
        &["backup"],
        &["backup", source],
        &["backup", "-o", "x"],
        &["backup", source, "-o"],
        &["backup", source, "-o", "x", "--frobnicate"],
        &["backup", source, "-o", "x", "--freeze", "nonsense"],
        &["backup", source, "-o", "x", "--allow-inconsistent"],
        &["backup", source, "-o", "x", "--memory", "15M"],
        &["backup", source, "-o", "x", "--compress", "nonsense"],
        &["backup", source, "-o", "x", "--on-read-error", "nonsense"],
        &["backup", source, "-o", "x", "--threads", "-1"],
        &["backup", source, "-o", "x", "--progress", "nonsense"],
        &["restore"],
        &["restore", image],
        &["restore", image, "x", "y"],
        &["restore", image, "--volume", "1"],
        &["restore", "-", "x", "--verify"],
        &["verify"],
        &["verify", image, image],
        &["verify", image, "--volume", "1"],
        &["inspect"],
        &["inspect", source, image],
    ];
    for args in cases {
        let before = scene.state();
        let mut plain = command(*args);
        plain.current_dir(scene.dir.path());
        finish(plain).expect(2);
        let mut json = command(args.iter().chain(&["--json"]));
        json.current_dir(scene.dir.path());
        let report = finish(json).expect(2).last();
        assert_eq!(report["kind"], "usage", "{args:?}");
        assert!(before == scene.state(), "{args:?}");
    }
    // Where the image would have gone to standard output, so does no error.
    let report = run(["backup", "--json", "--nonsense", source, "-o", "-"]).expect(2);
    assert_eq!(report.stdout, b"");
    for help in [&["--help"][..], &["backup", "--help"], &["--version"]] {
        assert!(!run(help).expect(0).stdout.is_empty());
    }
}

#[test]
fn sources_that_are_none_are_refused() {
    let scene = Scene::new();
    let out = scene.path("out");
    let dir = scene.dir.path();
    let cases: [(&Path, i32, &str); 6] = [
        (Path::new("/dev/shm/never/was"), 1, "/dev/shm/never/was"),
        (Path::new("never-was"), 1, "/dev/sda1"),
        (dir, 2, "mount"),
        (Path::new("/proc"), 3, "proc"),
        (Path::new("/dev/null"), 2, "/dev/null"),
        (Path::new("/dev/tty"), 2, "/dev/tty"),
    ];
    for (source, code, text) in cases {
        scene.refuses(code, text, backup_to(source, &out));
    }
    let fifo = scene.path("fifo");
    tool("mkfifo", [&fifo]);
    scene.refuses(2, "fifo", backup_to(&fifo, &out));
    // One wrong source among good ones.
    let args = ["backup", "-o"].map(Path::new).into_iter();
    let all = [out.as_path(), &scene.source, Path::new("/never/was")];
    scene.refuses(1, "/never/was", args.chain(all));
    let writer = OpenOptions::new().write(true).open(&scene.source).unwrap();
    scene.refuses(3, "offline", offline(&scene.source, &out));
    scene.refuses(3, "hold still", backup_to(&scene.source, &out));
    drop(writer);
}

/// A backup of a source that must not be in use.
fn offline(source: &Path, image: &Path) -> impl Iterator<Item = PathBuf> {
    let named = ["--freeze", "offline"].map(PathBuf::from);
    backup_to(source, image).into_iter().chain(named)
}

#[test]
fn privileged_a_filesystem_without_a_disk_is_refused() {
    needs_root!();
    let scene = Scene::new();
    let memory = Mount::new(
        Path::new("tmpfs"),
        &scene.path("memory"),
        "tmpfs",
        "size=1m",
    );
    let args = backup_to(memory.dir(), &scene.path("out"));
    scene.refuses(3, "tmpfs", args);
    let below = memory.dir().join("folder");
    std::fs::create_dir(&below).unwrap();
    let hint = memory.dir().to_str().unwrap().to_owned();
    scene.refuses(2, &hint, backup_to(&below, &scene.path("out")));
}

#[test]
fn outputs_that_would_hurt_are_refused() {
    let scene = Scene::new();
    let [source, image] = [&scene.source, &scene.image];
    scene.refuses(3, "the source itself", backup_to(source, source));
    let [link, twin] = ["link", "twin"].map(|name| scene.path(name));
    std::os::unix::fs::symlink(source, &link).unwrap();
    std::fs::hard_link(source, &twin).unwrap();
    scene.refuses(3, "the source itself", backup_to(source, &link));
    scene.refuses(3, "the source itself", backup_to(source, &twin));
    let args = backup_to(source, image).into_iter();
    scene.refuses(3, "--force", args.filter(|arg| arg != Path::new("--force")));
    scene.refuses(3, "folder", backup_to(source, scene.dir.path()));
    scene.refuses(
        1,
        "nowhere",
        backup_to(source, &scene.path("nowhere/image")),
    );
    scene.refuses(1, "image/image", backup_to(source, &image.join("image")));

    scene.refuses(3, "the image itself", scene.restore_to(image));
    scene.refuses(2, "dev/null", scene.restore_to(Path::new("/dev/null")));
    scene.refuses(2, "device or a file", scene.restore_to(scene.dir.path()));
    scene.refuses(
        1,
        "nowhere",
        scene.restore_to(&scene.path("nowhere/target")),
    );
    scene.refuses(1, "image/target", scene.restore_to(&image.join("target")));
}

#[test]
fn targets_that_do_not_fit_or_are_written_to_are_refused() {
    let scene = Scene::new();
    let target = scene.target(SIZE - 512);
    let report = scene.refuses(3, "too small", scene.restore_to(&target));
    assert!(report.stderr.contains(&SIZE.to_string()), "{report}");
    let target = scene.target(SIZE);
    let writer = OpenOptions::new().write(true).open(&target).unwrap();
    let pid = std::process::id().to_string();
    scene.refuses(3, &pid, scene.restore_to(&target));
    drop(writer);
    // The same as JSON.
    let args = scene.restore_to(&scene.target(512)).into_iter();
    let report = run(args.chain([PathBuf::from("--json")])).expect(3).last();
    assert_eq!(report["kind"], "too_small");
}

#[test]
fn privileged_devices_in_use_are_refused() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.target(SIZE);
    let device = LoopDevice::attach(&file);
    let name = device.path().to_str().unwrap();
    let image = scene.path("out");
    scene.refuses(3, "not to a folder or a block device", {
        backup_to(&scene.source, device.path())
    });

    // Mounted, here or in another mount namespace.
    tool("mke2fs", [Path::new("-q"), Path::new("-F"), device.path()]);
    let point = scene.path("point");
    let mount = Mount::new(device.path(), &point, "ext4", "");
    let shown = point.to_str().unwrap();
    for path in [device.path(), &file] {
        scene.refuses(3, shown, scene.restore_to(path));
        scene.refuses(3, shown, offline(path, &image));
    }
    scene.refuses(3, shown, offline(&point, &image));
    drop(mount);
    let script = format!("mount {name} {shown}; echo; read");
    let mut elsewhere = tool_command("unshare", ["--mount", "bash", "-c", &script]);
    let mut elsewhere = spawn(elsewhere.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut line = String::new();
    let stdout = elsewhere.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    scene.refuses(3, "namespace", scene.restore_to(device.path()));
    scene.refuses(3, "namespace", backup_to(device.path(), &image));
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();

    // A file behind a loop device is in use if that is, and only then.
    run(scene.restore_to(&file)).expect(0);

    // Open for writing by somebody else.
    let writer = OpenOptions::new().write(true).open(device.path()).unwrap();
    let pid = std::process::id().to_string();
    for path in [device.path(), &file] {
        scene.refuses(3, &pid, scene.restore_to(path));
        scene.refuses(3, &pid, backup_to(path, &image));
    }
    drop(writer);

    // Another loop device on top of it.
    let top = LoopDevice::attach(device.path());
    let top_name = top.path().to_str().unwrap().strip_prefix("/dev/").unwrap();
    scene.refuses(3, top_name, scene.restore_to(device.path()));
    scene.refuses(3, top_name, backup_to(device.path(), &image));
    drop(top);

    // Swap space.
    let on_disk = temp_dir_on_disk();
    let swap = on_disk.path().join("swap");
    sparse_file(&swap, SIZE);
    let swap = LoopDevice::attach(&swap);
    tool("mkswap", [swap.path()]);
    tool("swapon", [swap.path()]);
    let runs = [
        scene.restore_to(swap.path()).to_vec(),
        backup_to(swap.path(), &image).to_vec(),
    ]
    .map(run);
    tool("swapoff", [swap.path()]);
    for run in runs {
        run.expect(3).says("swap");
    }
    drop(swap);

    // Too small, and write-protected.
    drop(device);
    let small = scene.target(SIZE - 4096);
    let device = LoopDevice::attach(&small);
    scene.refuses(3, "too small", scene.restore_to(device.path()));
    drop(device);
    let file = scene.target(SIZE);
    let device = LoopDevice::attach(&file);
    tool("blockdev", [Path::new("--setro"), device.path()]);
    let refused = run(scene.restore_to(device.path()));
    // It would stay so for whoever gets the loop device next.
    tool("blockdev", [Path::new("--setrw"), device.path()]);
    refused.expect(3).says("read-only");
    drop(device);
    let device = LoopDevice::attach_with(&file, &["--read-only"]);
    scene.refuses(3, "read-only", scene.restore_to(device.path()));
    assert_eq!(listing(scene.dir.path()).len(), 4);
}

/// A partition makes its disk busy, and a disk its partitions.
#[test]
fn privileged_a_disk_with_a_mounted_partition_is_in_use() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.target(64 << 20);
    let disk = LoopDevice::attach(&file);
    let partition = Partition::add(disk.path(), 1, 2048, 60_000);
    tool(
        "mke2fs",
        [Path::new("-q"), Path::new("-F"), partition.node()],
    );
    let mount = Mount::new(partition.node(), &scene.path("point"), "ext4", "");
    for path in [disk.path(), partition.node()] {
        scene.refuses(3, "point", scene.restore_to(path));
        scene.refuses(3, "point", offline(path, &scene.path("out")));
    }
    drop(mount);
    let other = Partition::add(disk.path(), 2, 70_000, 60_000);
    let writer = OpenOptions::new().write(true).open(disk.path()).unwrap();
    scene.refuses(3, "process", scene.restore_to(other.node()));
    drop(writer);
    run(scene.restore_to(other.node())).expect(0);
}

#[test]
fn what_is_no_whole_image_is_told_apart() {
    let scene = Scene::new();
    let mut rng = Rng(seed());
    let whole = std::fs::read(&scene.image).unwrap();
    let mut noise = vec![0; 100_000];
    rng.fill(&mut noise);
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    let mut newer = whole.clone();
    newer[8] ^= 0x40;
    let longer = [whole.as_slice(), b"x"].concat();
    let twice = [whole.as_slice(), &whole].concat();
    let middle = whole.len() / 2;
    let cases: [(&str, &[u8]); 10] = [
        ("empty", &[]),
        ("text", b"this is no image\n"),
        ("noise", &noise),
        ("filesystem", &std::fs::read(&scene.source).unwrap()),
        ("half", &whole[..middle]),
        ("almost", &whole[..whole.len() - 1]),
        ("flipped", &flipped),
        ("newer", &newer),
        ("longer", &longer),
        ("twice", &twice),
    ];
    let bad = scene.path("bad");
    for (name, bytes) in cases {
        println!("{name}");
        std::fs::write(&bad, bytes).unwrap();
        scene.refuses(4, "bad", [Path::new("verify"), &bad]);
        let report = run([Path::new("verify"), Path::new("--json"), &bad])
            .expect(4)
            .last();
        let kind = report["kind"].as_str().unwrap().to_owned();
        let kinds = ["not_an_image", "damaged", "truncated", "incompatible"];
        assert!(kinds.contains(&kind.as_str()), "{name}: {kind}");
        run_from(&bad, ["verify", "-"]).expect(4);
        // A file that did not exist does not exist afterwards.
        let fresh = scene.path("fresh");
        scene.refuses(4, "bad", [Path::new("restore"), &bad, &fresh]);
        run_from(&bad, [Path::new("restore"), Path::new("-"), &fresh]).expect(4);
        assert!(!fresh.exists(), "{name}");
        // What existed holds no filesystem afterwards, or is untouched.
        let target = scene.path("target");
        copy(&scene.source, &target);
        run([Path::new("restore"), Path::new("--yes"), &bad, &target]).expect(4);
        if !same_bytes(&scene.source, &target) {
            assert_no_signature(&target);
        }
        std::fs::remove_file(&target).unwrap();
        if !["not_an_image", "truncated"].contains(&kind.as_str()) {
            run([Path::new("inspect"), &bad]).expect(if name == "flipped" { 0 } else { 4 });
        }
    }
    let missing = scene.path("missing");
    scene.refuses(1, "missing", [Path::new("verify"), &missing]);
    let target = scene.target(SIZE);
    scene.refuses(1, "missing", [Path::new("restore"), &missing, &target]);
    scene.refuses(
        1,
        "image/x",
        [Path::new("verify"), &scene.dir.path().join("image/x")],
    );
}

/// What nobody may be asked to hold still is copied only on the user's word, and called torn for ever.
#[test]
fn a_source_that_moves_is_copied_only_when_that_is_allowed() {
    let scene = Scene::new();
    let _writer = OpenOptions::new().write(true).open(&scene.source).unwrap();
    let out = scene.path("out");
    let backup = backup_to(&scene.source, &out);
    scene.refuses(3, "open for writing", &backup);
    let with = |more: &[&str]| {
        let more = more.iter().map(PathBuf::from);
        backup.iter().cloned().chain(more).collect::<Vec<_>>()
    };
    scene.refuses(3, "--allow-inconsistent", with(&["--freeze", "none"]));
    let torn = ["--freeze", "none", "--allow-inconsistent"];
    run(with(&torn)).expect(0).says("torn");
    let report = run(with(&[&torn[..], &["--json"]].concat())).expect(0);
    assert_eq!(report.last()["grade"], "torn");
    let report = run([Path::new("inspect"), &out, Path::new("--json")]).expect(0);
    assert_eq!(report.last()["trailer"]["grade"], "torn");
    run([Path::new("verify"), &out]).expect(0).says("is torn");
    let target = scene.path("target");
    run([Path::new("restore"), &out, &target]).expect(0);
    assert!(same_bytes(&scene.source, &target));
    std::fs::remove_file(&target).unwrap();
    let clone = [Path::new("clone"), &scene.source, &target].into_iter();
    let clone = clone.chain(torn.map(Path::new));
    run(clone.clone()).expect(0).says("torn");
    std::fs::remove_file(&target).unwrap();
    let compared = clone.chain([Path::new("--verify")]);
    run(compared).expect(3).says("cannot be compared");
    assert_eq!(listing(scene.dir.path()), ["image", "out", "source"]);
}
