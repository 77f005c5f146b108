//! What goes wrong on the way: full outputs, failing disks, writers that come in between, missing
//! privileges, questions and odd names. Nothing half-made is left, and nothing looks whole.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::holdstill::{Run, command, finish, listing, run, run_from, same_bytes, wait};
use crate::common::scene::{SIZE, Scene, assert_no_signature, backup_to};
use crate::common::volume::{copy, ext4, map, poisoned_file};
use crate::common::{
    LoopDevice, Mount, Rng, command as tool_command, needs_root, run as tool, sparse_file, spawn,
    temp_dir,
};

/// Runs the program under a limit on the size of files, in KiB.
fn limited(kib: u64, args: &[PathBuf]) -> Run {
    let program = command([""; 0]).get_program().to_owned();
    let script = format!("ulimit -f {kib}; exec \"$0\" \"$@\"");
    let mut command = tool_command("bash", ["-c", &script]);
    command.arg(program).args(args);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    finish(command)
}

/// A volume that does not compress.
fn noise(path: &Path, len: usize) {
    let mut bytes = vec![0; len];
    Rng(7).fill(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_full_output_leaves_nothing() {
    let scene = Scene::new();
    let source = scene.path("noise");
    noise(&source, 8 << 20);
    let args = backup_to(&source, Path::new("/dev/full"));
    let report = scene.refuses(1, "/dev/full", args);
    assert!(report.stderr.contains("No space"), "{report}");

    let before = scene.state();
    for image in [scene.path("fresh"), scene.image.clone()] {
        limited(1000, &backup_to(&source, &image))
            .expect(1)
            .says("too large");
        assert!(before == scene.state(), "something was left or lost");
    }
    let fresh = scene.path("target");
    limited(1000, &scene.restore_to(&fresh)).expect(1);
    assert!(before == scene.state(), "something was left");
    // What exists and may not grow need not grow.
    poisoned_file(&fresh, SIZE);
    limited(1000, &scene.restore_to(&fresh))
        .expect(1)
        .says("too large");
    assert_no_signature(&fresh);
}

#[test]
fn privileged_a_full_filesystem_leaves_nothing() {
    needs_root!();
    let scene = Scene::new();
    let source = scene.path("noise");
    noise(&source, 8 << 20);
    let small = Mount::new(Path::new("tmpfs"), &scene.path("small"), "tmpfs", "size=2m");
    let image = small.dir().join("image");
    let report = scene.refuses(1, "No space", backup_to(&source, &image));
    assert!(report.stderr.contains("image"), "{report}");
    assert_eq!(listing(small.dir()), [""; 0]);
    std::fs::write(&image, "old").unwrap();
    scene.refuses(1, "No space", backup_to(&source, &image));
    assert_eq!(std::fs::read(&image).unwrap(), b"old");
    std::fs::remove_file(&image).unwrap();
    let args = backup_to(&source, &image).into_iter();
    let report = run(args.chain([PathBuf::from("--json")])).expect(1).last();
    assert_eq!(report["kind"], "no_space");

    // A new target is removed; one that was there holds no filesystem.
    let big = scene.path("big");
    run(backup_to(&source, &big)).expect(0);
    let target = small.dir().join("target");
    run([Path::new("restore"), &big, &target])
        .expect(1)
        .says("No space");
    assert_eq!(listing(small.dir()), [""; 0]);
    sparse_file(&target, 8 << 20);
    tool("mke2fs", [Path::new("-q"), Path::new("-F"), &target]);
    let args = [Path::new("restore"), Path::new("--yes"), &big, &target];
    run(args).expect(1).says("No space");
    assert_no_signature(&target);
    std::fs::remove_file(&target).unwrap();

    // The same below a loop device: there it is an I/O error.
    sparse_file(&target, 8 << 20);
    let device = LoopDevice::attach(&target);
    tool("mke2fs", [Path::new("-q"), Path::new("-F"), device.path()]);
    let args = [
        Path::new("restore"),
        Path::new("--yes"),
        &big,
        device.path(),
    ];
    run(args).expect(1).says(device.path().to_str().unwrap());
    assert_no_signature(device.path());
}

/// A loop device whose file ends in the middle: what lies behind cannot be read.
fn failing(file: &Path, good: u64) -> LoopDevice {
    let device = LoopDevice::attach(file);
    let file = OpenOptions::new().write(true).open(file).unwrap();
    file.set_len(good).unwrap();
    device
}

#[test]
fn privileged_unreadable_blocks_fail_or_become_zeros_that_are_listed() {
    needs_root!();
    let scene = Scene::new();
    let [disk, image, target] = ["disk", "out", "target"].map(|name| scene.path(name));
    // The last 100 blocks of a volume of noise, and of the files of a filesystem.
    let whole = scene.path("whole");
    noise(&whole, 6 << 20);
    copy(&whole, &disk);
    let good = (6 << 20) - 100 * 4096;
    let device = failing(&disk, good);
    let before = listing(scene.dir.path());
    run(backup_to(device.path(), &image))
        .expect(1)
        .says("--on-read-error zero");
    assert_eq!(listing(scene.dir.path()), before);
    let zero = ["--on-read-error", "zero", "--json"].map(PathBuf::from);
    let made = run(backup_to(device.path(), &image).into_iter().chain(zero))
        .expect(5)
        .last();
    let lost = json!([[good, 100 * 4096]]);
    assert_eq!(made["volumes"][0]["unreadable"], lost);
    let inspected = run([Path::new("inspect"), Path::new("--json"), &image]).expect(0);
    assert_eq!(
        inspected.last()["trailer"]["volumes"][0]["unreadable"],
        lost
    );
    let warning = "could not be read from its source";
    run([Path::new("verify"), &image]).expect(0).says(warning);
    poisoned_file(&target, 6 << 20);
    run([Path::new("restore"), Path::new("--yes"), &image, &target])
        .expect(0)
        .says(warning);
    let mut expected = std::fs::read(&whole).unwrap();
    expected[good as usize..].fill(0);
    assert!(std::fs::read(&target).unwrap() == expected);
    drop(device);

    // A filesystem, of which some file's blocks cannot be read.
    copy(&scene.source, &disk);
    let map = map(&scene.source);
    let last = map.used.runs().last().unwrap();
    let good = (last.start.0 + last.len.0 / 2) / 4096 * 4096;
    let device = failing(&disk, good);
    run(backup_to(device.path(), &image)).expect(1);
    let args = ["--on-read-error", "zero"].map(PathBuf::from);
    let report = run(backup_to(device.path(), &image).into_iter().chain(args)).expect(5);
    let text = String::from_utf8(report.stdout.clone()).unwrap();
    assert!(text.contains("could not be read"), "{text}");
}

/// Starts a backup that takes a while, and waits until it copies.
struct Slow {
    command: Command,
    child: std::process::Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Slow {
    fn backup(source: &Path, image: &Path) -> Self {
        let mut command = command(backup_to(source, image));
        command.args(["--json", "--threads", "1", "--compress", "zstd:19"]);
        let mut child = spawn(&mut command);
        let stdout = child.stdout.take().unwrap();
        let mut slow = Self {
            command,
            child,
            lines: BufReader::new(stdout),
        };
        loop {
            let line = slow.line();
            let done = line["done_bytes"].as_u64().unwrap_or(0);
            if done > 0 {
                assert!(done < line["total_bytes"].as_u64().unwrap(), "too fast");
                return slow;
            }
            assert_ne!(line["event"], "result", "too fast");
            assert_ne!(line["event"], "error", "{line}");
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Waits for its end; its last line.
    #[track_caller]
    fn ends_with(mut self, code: i32) -> Value {
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).unwrap();
        let run = wait(&self.command, self.child);
        assert_eq!(run.code(), Some(code), "{rest}{run}");
        serde_json::from_str(rest.lines().last().unwrap()).unwrap()
    }
}

/// Text that zstd takes its time for: three chunks of it.
fn slow_source(path: &Path) {
    let text = std::fs::read("/proc/kallsyms").unwrap();
    let chunks = text.iter().copied().cycle().take(9 << 20);
    std::fs::write(path, chunks.collect::<Vec<u8>>()).unwrap();
}

#[test]
fn a_writer_that_comes_while_a_file_is_copied_spoils_it() {
    let scene = Scene::new();
    let source = scene.path("slow");
    slow_source(&source);
    let before = scene.state();
    for image in [scene.path("out"), scene.image.clone()] {
        let slow = Slow::backup(&source, &image);
        // A writer that waits until the copy is done would not spoil it.
        let writer = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&source);
        assert_eq!(
            writer.unwrap_err().kind(),
            std::io::ErrorKind::WouldBlock,
            "the lease holds it off"
        );
        let report = slow.ends_with(3);
        assert_eq!(report["kind"], "inconsistent");
        assert!(before == scene.state(), "something was left or lost");
    }
}

#[test]
fn privileged_a_writer_that_comes_while_a_device_is_copied_spoils_it() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.path("slow");
    slow_source(&file);
    let device = LoopDevice::attach(&file);
    let image = scene.path("out");
    let before = listing(scene.dir.path());
    let slow = Slow::backup(device.path(), &image);
    let writer = OpenOptions::new().write(true).open(device.path()).unwrap();
    writer.write_all_at(&[1; 4096], 4096).unwrap();
    // Not flushed: it lies in the cache of the device.
    let report = slow.ends_with(3);
    assert_eq!(report["kind"], "inconsistent");
    assert_eq!(listing(scene.dir.path()), before);
}

/// The device goes away, or shrinks to nothing, in the middle.
#[test]
fn privileged_a_device_that_vanishes_fails_the_run() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.path("slow");
    slow_source(&file);
    let device = LoopDevice::attach(&file);
    let image = scene.path("out");
    let before = listing(scene.dir.path());
    let slow = Slow::backup(device.path(), &image);
    let file = OpenOptions::new().write(true).open(&file).unwrap();
    file.set_len(0).unwrap();
    tool("losetup", [Path::new("--set-capacity"), device.path()]);
    let report = slow.ends_with(1);
    assert_eq!(report["kind"], "io");
    assert_eq!(listing(scene.dir.path()), before);
}

#[test]
fn privileged_without_privileges_files_work_and_devices_say_why_not() {
    needs_root!();
    let scene = Scene::new();
    let home = scene.path("home");
    std::fs::create_dir(&home).unwrap();
    let program = home.join("holdstill");
    std::fs::copy(command([""; 0]).get_program(), &program).unwrap();
    let source = home.join("source");
    copy(&scene.source, &source);
    for path in [scene.dir.path(), &home, &source] {
        tool("chown", [OsStr::new("nobody"), path.as_os_str()]);
    }
    let nobody = |args: &[PathBuf]| {
        let user = ["--reuid=nobody", "--regid=nogroup", "--clear-groups"];
        let mut command = tool_command("setpriv", user);
        command.arg(&program).args(args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        finish(command)
    };
    let [image, target] = ["image", "target"].map(|name| home.join(name));
    nobody(&backup_to(&source, &image)).expect(0);
    nobody(&["verify".into(), image.clone()]).expect(0);
    nobody(&["restore".into(), image.clone(), target.clone()]).expect(0);
    nobody(&[
        "restore".into(),
        "--yes".into(),
        image.clone(),
        target.clone(),
    ])
    .expect(0);
    nobody(&["inspect".into(), source.clone()]).expect(0);
    assert!(same_bytes(&scene.source, &target));

    let file = scene.path("disk");
    poisoned_file(&file, SIZE);
    let device = LoopDevice::attach(&file);
    let out = home.join("out");
    let restore = ["restore".into(), "--yes".into(), image.clone()];
    let to_device = [&restore[..], &[device.path().to_owned()]].concat();
    let runs = [
        nobody(&backup_to(device.path(), &out)),
        nobody(&to_device),
        nobody(&["inspect".into(), device.path().to_owned()]),
        nobody(&[
            "verify".into(),
            image.clone(),
            "--against".into(),
            device.path().to_owned(),
        ]),
    ];
    for run in runs {
        let run = run.expect(1).says("Permission denied");
        run.says("as root");
    }
    assert!(!out.exists());
    // Somebody else's files.
    let private = scene.path("private");
    copy(&scene.source, &private);
    tool("chmod", [OsStr::new("0600"), private.as_os_str()]);
    nobody(&backup_to(&private, &out)).expect(1).says("private");
    nobody(&[&restore[..], std::slice::from_ref(&private)].concat()).expect(1);
    assert!(same_bytes(&scene.source, &private));
    std::fs::create_dir(scene.path("closed")).unwrap();
    nobody(&backup_to(&source, &scene.path("closed/image"))).expect(1);
    tool("chmod", [OsStr::new("0444"), target.as_os_str()]);
    nobody(&[&restore[..], std::slice::from_ref(&target)].concat()).expect(1);
    assert!(same_bytes(&scene.source, &target));
}

/// Answers the question that a terminal is asked.
fn answered(answer: &str, image: &Path, target: &Path) -> (Option<i32>, String) {
    let program = command([""; 0]).get_program().to_owned();
    let line = format!(
        "{} restore --progress none {} {}",
        program.to_str().unwrap(),
        image.display(),
        target.display()
    );
    let options = ["--quiet", "--return", "--command", &line, "/dev/null"];
    let mut script = tool_command("script", options);
    let mut script = spawn(script.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut input = script.stdin.take().unwrap();
    input.write_all(answer.as_bytes()).unwrap();
    // Open until the end: the terminal must not hang up.
    let mut shown = String::new();
    let mut stdout = script.stdout.take().unwrap();
    stdout.read_to_string(&mut shown).unwrap();
    drop(input);
    (script.wait().unwrap().code(), shown)
}

#[test]
fn what_exists_is_overwritten_only_after_a_yes() {
    let scene = Scene::new();
    let target = scene.target(SIZE);
    let args = scene.restore_to(&target);
    let without = || args.iter().filter(|arg| arg.as_os_str() != "--yes");
    scene.refuses(2, "--yes", without());
    let json = run(without().chain([&PathBuf::from("--json")]))
        .expect(2)
        .last();
    assert_eq!(json["kind"], "confirm");
    let stream = ["restore".into(), "-".into(), target.clone()];
    run_from(&scene.image, stream).expect(2);

    let before = scene.state();
    for no in ["no\n", "\n", "y\n", "YES\n", "\u{4}"] {
        let (code, shown) = answered(no, &scene.image, &target);
        assert_eq!(code, Some(3), "{no:?}: {shown}");
        assert!(before == scene.state(), "{no:?}");
        assert!(shown.contains("overwritten"), "{shown}");
    }
    let (code, shown) = answered("yes\n", &scene.image, &target);
    assert_eq!(code, Some(0), "{shown}");
    assert!(before != scene.state());
    assert_eq!(map(&target).used, map(&scene.source).used);
}

/// Names with line breaks, escape sequences and bytes that are no text.
#[test]
fn odd_names_are_handled_and_shown_escaped() {
    let dir = temp_dir();
    let names: [&[u8]; 5] = [
        b"new\nline",
        b"esc\x1b[31mape",
        "right\u{202e}left".as_bytes(),
        b"blank and 'quote\"",
        b"-dash",
    ];
    for name in names {
        let name = OsStr::from_bytes(name);
        println!("{name:?}");
        let inner = dir.path().join(name);
        std::fs::create_dir(&inner).unwrap();
        let [source, image, target] = ["source", "image", "target"].map(|part| inner.join(part));
        ext4(&source, 4 << 20, "", None);
        let texts = [
            run(backup_to(&source, &image)).expect(0),
            run([Path::new("verify"), &image]).expect(0),
            run([Path::new("inspect"), &image]).expect(0),
            run([Path::new("inspect"), &source]).expect(0),
            run([Path::new("restore"), &image, &target]).expect(0),
            run(backup_to(&inner, &image)).expect(2),
            run([Path::new("verify"), &source]).expect(4),
        ];
        for run in texts {
            for text in [&String::from_utf8(run.stdout.clone()).unwrap(), &run.stderr] {
                for bad in ["\x1b", "\u{202e}", "new\nline"] {
                    assert!(!text.contains(bad), "{run}");
                }
            }
        }
        assert!(same_bytes(&source, &target));
        let args = ["inspect", "--json"].map(Path::new);
        let report = run(args.into_iter().chain([source.as_path()]))
            .expect(0)
            .last();
        assert_eq!(report["path"], source.to_str().unwrap());
    }
    // A label that would paint the terminal.
    let [source, image] = ["source", "image"].map(|part| dir.path().join(part));
    ext4(&source, 4 << 20, "", None);
    let label = OsStr::from_bytes(b"\x1b[31m\nred");
    tool("tune2fs", [OsStr::new("-L"), label, source.as_os_str()]);
    run(backup_to(&source, &image)).expect(0);
    for what in [&source, &image] {
        let shown = run([Path::new("inspect"), what]).expect(0).stdout;
        let shown = String::from_utf8(shown).unwrap();
        assert!(shown.contains("[31m") && !shown.contains('\x1b'), "{shown}");
        assert!(!shown.contains("\nred"), "{shown}");
    }
    // Bytes that are no text at all.
    let [odd_image, target] =
        [&b"\xff.image"[..], b"\xff\xfe"].map(|name| dir.path().join(OsStr::from_bytes(name)));
    run(backup_to(&source, &odd_image)).expect(0);
    run([Path::new("verify"), &odd_image]).expect(0);
    run([Path::new("restore"), &odd_image, &target]).expect(0);
    run([
        Path::new("verify"),
        &odd_image,
        Path::new("--against"),
        &target,
    ])
    .expect(0);
}

/// An early end of a pipe is the end of the run.
#[test]
fn a_pipe_that_ends_early_is_no_image() {
    let scene = Scene::new();
    let whole = std::fs::read(&scene.image).unwrap();
    for len in [
        0,
        1,
        4096,
        whole.len() / 2,
        whole.len() - 4096,
        whole.len() - 1,
    ] {
        println!("{len}");
        let target = scene.path("target");
        for args in [
            vec![PathBuf::from("verify"), "-".into()],
            vec!["restore".into(), "-".into(), target.clone()],
        ] {
            let mut command = command(args);
            command.stdin(Stdio::piped());
            let mut child = spawn(&mut command);
            let mut pipe = child.stdin.take().unwrap();
            // It may well be gone before all is written.
            let _ = pipe.write_all(&whole[..len]);
            drop(pipe);
            wait(&command, child).expect(4);
            assert!(!target.exists());
        }
    }
}
