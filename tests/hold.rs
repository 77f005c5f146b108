//! `hold` and its guard: whatever happens to a run, nothing stays frozen and nothing is left behind.
//!
//! A rate keeps the source frozen long enough to do harm to the run meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::common::holdstill::{self, listing};
use crate::common::volume::{digests, populate};
use crate::common::{self, LoopDevice, Mount, Rng, needs_root, run, sparse_file, spawn};

/// A small mounted volume.
struct Volume {
    // Taken down in this order.
    mount: Mount,
    device: LoopDevice,
    dir: tempfile::TempDir,
}

impl Volume {
    fn new(fs_type: &str) -> Self {
        let dir = common::temp_dir();
        let file = dir.path().join("volume");
        sparse_file(&file, 320 << 20);
        let device = LoopDevice::attach(&file);
        let force = if fs_type == "xfs" { "-f" } else { "-F" };
        run(
            &format!("mkfs.{fs_type}"),
            ["-q", force, device.path().to_str().unwrap()],
        );
        let mount = Mount::new(device.path(), &dir.path().join("live"), fs_type, "");
        populate(mount.dir(), &mut Rng(common::seed() | 1), 24 << 20);
        Self { mount, device, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A backup that stays frozen for some ten seconds, and is so when this returns.
    fn slow_hold(&self, more: &[&str]) -> Child {
        let image = self.path("image.still");
        let mut args = vec![
            "backup",
            self.mount.dir().to_str().unwrap(),
            "--freeze",
            "hold",
            "--rate",
            "2M",
            "-o",
        ];
        args.push(image.to_str().unwrap());
        args.extend(more);
        args.push("--json");
        let mut child = spawn(&mut holdstill::command(args));
        // Read, or it would wait for us.
        let mut output = child.stdout.take().unwrap();
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        common::wait_until_frozen(self.mount.dir(), &mut child);
        child
    }

    /// Nothing was made under the image's name or beside it.
    fn assert_no_image(&self) {
        let left = listing(self.dir.path());
        assert!(
            left.iter()
                .all(|name| !name.to_string_lossy().contains("still")),
            "{left:?}"
        );
    }
}

/// A second freeze of a frozen filesystem is refused; one that succeeds is undone at once. Not to be
/// asked while a run may be about to freeze.
fn is_frozen(dir: &Path) -> bool {
    let froze = common::output("fsfreeze", [Path::new("--freeze"), dir]);
    if froze.status.success() {
        run("fsfreeze", [Path::new("--unfreeze"), dir]);
    }
    !froze.status.success()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    // Generous: how fast it is, is not what is tested.
    let end = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < end, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(pid: u32, name: &str) {
    run("kill", ["-s", name, &pid.to_string()]);
}

/// The guard: the one process that holdstill started.
fn guard_of(child: &Child) -> u32 {
    let pid = child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children
        .split_whitespace()
        .next()
        .expect("a guard")
        .parse()
        .unwrap()
}

fn has_record(pid: u32) -> bool {
    let Ok(records) = fs::read_dir("/var/lib/holdstill") else {
        return false;
    };
    let wanted = format!("\"pid\":{pid},");
    records
        .flatten()
        .any(|record| fs::read_to_string(record.path()).is_ok_and(|text| text.contains(&wanted)))
}

#[test]
fn privileged_a_held_volume_is_copied_whole() {
    needs_root!();
    for fs_type in ["ext4", "xfs"] {
        let volume = Volume::new(fs_type);
        let expected = digests(volume.mount.dir());
        let image = volume.path("image.still");
        let log = volume.path("hooks");
        let hook = format!(
            "echo $HOLDSTILL_PHASE $HOLDSTILL_SOURCE >> {}",
            log.display()
        );
        let source = volume.mount.dir().to_str().unwrap();
        let json = holdstill::run([
            "backup",
            source,
            "--freeze",
            "hold",
            "--json",
            "--pre-freeze",
            &hook,
            "--post-freeze",
            &hook,
            "-o",
            image.to_str().unwrap(),
        ])
        .expect(0)
        .last();
        assert_eq!(
            (json["grade"].as_str(), json["freeze"].as_str()),
            (Some("frozen"), Some("hold"))
        );
        assert!(json["freeze_ms"].as_f64().unwrap() > 0.0);
        assert_eq!(
            fs::read_to_string(&log).unwrap(),
            format!("pre {source}\npost {source}\n")
        );
        assert!(!is_frozen(volume.mount.dir()));

        let copy = volume.path("copy");
        holdstill::run([
            "restore",
            image.to_str().unwrap(),
            copy.to_str().unwrap(),
            "--verify",
        ])
        .expect(0);
        let options = if fs_type == "xfs" { "nouuid" } else { "" };
        let device = LoopDevice::attach(&copy);
        let restored = Mount::new(device.path(), &volume.path("restored"), fs_type, options);
        assert_eq!(digests(restored.dir()), expected);
    }
}

#[test]
fn privileged_a_failing_pre_hook_freezes_nothing() {
    needs_root!();
    let volume = Volume::new("ext4");
    let log = volume.path("hooks");
    let post = format!("echo post >> {}", log.display());
    let image = volume.path("image.still");
    holdstill::run([
        "backup",
        volume.mount.dir().to_str().unwrap(),
        "--freeze",
        "hold",
        "--pre-freeze",
        "exit 7",
        "--post-freeze",
        &post,
        "-o",
        image.to_str().unwrap(),
    ])
    .expect(1)
    .says("exit code 7");
    // It was started, so whatever it did must be undone.
    assert_eq!(fs::read_to_string(&log).unwrap(), "post\n");
    volume.assert_no_image();
}

#[test]
fn privileged_killed_while_frozen_the_guard_thaws_and_runs_the_hook() {
    needs_root!();
    let volume = Volume::new("ext4");
    let log = volume.path("hooks");
    let post = format!("echo post >> {}", log.display());
    let mut child = volume.slow_hold(&["--post-freeze", &post]);
    let pid = child.id();
    signal(pid, "KILL");
    child.wait().unwrap();
    wait_until("it is thawed", || !is_frozen(volume.mount.dir()));
    wait_until("the hook ran", || {
        fs::read_to_string(&log).is_ok_and(|text| text == "post\n")
    });
    volume.assert_no_image();
    wait_until("the record of the dead run is cleaned up", || {
        holdstill::run(["cleanup"]).expect(0);
        !has_record(pid)
    });
}

#[test]
fn privileged_guard_and_run_killed_cleanup_thaws() {
    needs_root!();
    let volume = Volume::new("xfs");
    let mut child = volume.slow_hold(&[]);
    let pid = child.id();
    // The guard first, and the run before it can notice.
    signal(pid, "STOP");
    signal(guard_of(&child), "KILL");
    signal(pid, "KILL");
    child.wait().unwrap();
    assert!(is_frozen(volume.mount.dir()));
    assert!(has_record(pid));
    // Another test may be cleaning up, too: what counts is the outcome.
    holdstill::run(["cleanup"]).expect(0);
    assert!(!is_frozen(volume.mount.dir()));
    assert!(!has_record(pid));
    volume.assert_no_image();
}

#[test]
fn privileged_without_its_guard_a_run_still_thaws() {
    needs_root!();
    let volume = Volume::new("ext4");
    let child = volume.slow_hold(&[]);
    signal(guard_of(&child), "KILL");
    let ended = child.wait_with_output().unwrap();
    assert!(matches!(ended.status.code(), Some(0 | 1)), "{ended:?}");
    assert!(!is_frozen(volume.mount.dir()));
    holdstill::run(["cleanup"]).expect(0);
}

#[test]
fn privileged_signals_thaw_and_leave_nothing() {
    needs_root!();
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 143)] {
        let volume = Volume::new("ext4");
        let child = volume.slow_hold(&[]);
        let pid = child.id();
        signal(pid, name);
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(code));
        assert!(!is_frozen(volume.mount.dir()));
        assert!(!has_record(pid));
        volume.assert_no_image();
    }
}

#[test]
fn privileged_a_second_run_and_cleanup_leave_a_live_run_alone() {
    needs_root!();
    let volume = Volume::new("ext4");
    let child = volume.slow_hold(&[]);
    let other = volume.path("other.img");
    let source = volume.mount.dir().to_str().unwrap();
    holdstill::run([
        "backup",
        source,
        "--freeze",
        "hold",
        "-o",
        other.to_str().unwrap(),
    ])
    .expect(3)
    .says("another run of holdstill keeps it frozen");
    holdstill::run(["cleanup"]).expect(0);
    assert!(is_frozen(volume.mount.dir()));
    let ended = child.wait_with_output().unwrap();
    assert!(
        ended.status.success(),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert!(!is_frozen(volume.mount.dir()));
}

/// Stopped for good while frozen: the guard hears nothing and thaws, and the run then knows.
#[test]
fn privileged_stopped_while_frozen_it_thaws_soon() {
    needs_root!();
    let volume = Volume::new("ext4");
    let child = volume.slow_hold(&[]);
    signal(child.id(), "STOP");
    wait_until("the guard thaws", || !is_frozen(volume.mount.dir()));
    signal(child.id(), "CONT");
    let ended = child.wait_with_output().unwrap();
    assert_eq!(
        ended.status.code(),
        Some(3),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    volume.assert_no_image();
}

#[test]
fn privileged_what_would_wait_for_itself_is_refused() {
    needs_root!();
    let volume = Volume::new("ext4");
    let source = volume.mount.dir().to_str().unwrap().to_owned();
    let inside = format!("{source}/image.still");
    for step in ["hold", "track"] {
        holdstill::run(["backup", &source, "--freeze", step, "-o", &inside])
            .expect(3)
            .says("the output lies on the source itself");
        // A copy on standard output that goes there, too.
        let file = fs::File::create(volume.mount.dir().join("stdout")).unwrap();
        let mut command: Command =
            holdstill::command(["backup", &source, "--freeze", step, "-o", "-"]);
        command.stdout(file);
        holdstill::finish(command).expect(3);
    }
    assert!(!Path::new(&inside).exists());
    // A writer beside the filesystem is not stopped by a freeze.
    let raw = fs::OpenOptions::new()
        .write(true)
        .open(volume.device.path())
        .unwrap();
    let image = volume.path("image.still");
    for step in ["hold", "track"] {
        holdstill::run([
            "backup",
            &source,
            "--freeze",
            step,
            "-o",
            image.to_str().unwrap(),
        ])
        .expect(3)
        .says("for writing");
    }
    drop(raw);
    volume.assert_no_image();
}
