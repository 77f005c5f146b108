//! How runs of `track` end before their time: killed, interrupted, robbed of their guard, doubled.
//! Nothing stays frozen, nothing goes on tracing, and nothing looks like an image.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdstill_platform::trace::{Tracefs, instance_name};
use serde_json::Value;

use crate::common::holdstill::{self, listing};
use crate::common::live::{LiveWriter, judge};
use crate::common::volume::{check_frozen_ext4, populate};
use crate::common::{self, LoopDevice, Mount, Rng, needs_root, run, sparse_file, spawn};

/// A busy volume.
struct Busy {
    // Taken down in this order.
    writer: Option<LiveWriter>,
    mount: Mount,
    _device: LoopDevice,
    dir: tempfile::TempDir,
}

impl Busy {
    fn new(fs_type: &str, seed: u64) -> Self {
        let dir = common::temp_dir();
        let file = dir.path().join("volume");
        sparse_file(&file, 512 << 20);
        let device = LoopDevice::attach_with(&file, &["--direct-io=on"]);
        let force = if fs_type == "xfs" { "-f" } else { "-F" };
        run(
            &format!("mkfs.{fs_type}"),
            ["-q", force, device.path().to_str().unwrap()],
        );
        let mount = Mount::new(device.path(), &dir.path().join("live"), fs_type, "");
        populate(&mount.dir().join("ballast"), &mut Rng(seed | 1), 150 << 20);
        let writer = LiveWriter::start(
            &mount.dir().join("busy"),
            &dir.path().join("journal"),
            seed,
            &["--budget", "48"],
        );
        Self {
            writer: Some(writer),
            mount,
            _device: device,
            dir,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, image: &str) -> Command {
        let image = self.path(image);
        let source = self.mount.dir().to_str().unwrap();
        holdstill::command([
            "backup",
            source,
            "--freeze",
            "track",
            "--json",
            "-o",
            image.to_str().unwrap(),
        ])
    }

    /// Starts a backup and waits for its first line; also the run's id.
    fn begin(&self, image: &str) -> (Child, String) {
        let mut child = spawn(self.command(image).stderr(Stdio::inherit()));
        let mut lines = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let first: Value = serde_json::from_str(&lines.next().expect("a first line")).unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        (child, first["run_id"].as_str().unwrap().to_owned())
    }

    /// What must hold after any end: the writers go on, and neither trace nor image is left.
    fn assert_nothing_left(&self, run_id: &str) {
        let file = self.mount.dir().join("still-writable");
        std::fs::write(&file, run_id).unwrap();
        let instance = instance_name(run_id);
        wait_until("its trace is gone", || {
            !Tracefs::open()
                .unwrap()
                .leftovers()
                .unwrap()
                .contains(&instance)
        });
        let left = listing(self.dir.path());
        assert!(
            left.iter()
                .all(|name| !name.to_string_lossy().contains("image")),
            "{left:?}"
        );
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(pid: u32, name: &str) {
    // It may have ended by itself.
    common::output("kill", ["-s", name, &pid.to_string()]);
}

fn guard_of(pid: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

#[test]
fn privileged_killed_at_any_moment_it_leaves_nothing() {
    needs_root!();
    let seed = common::seed();
    let mut random = Rng(seed | 1);
    for fs_type in ["ext4", "xfs"] {
        let busy = Busy::new(fs_type, seed);
        for _ in 0..common::count(3, 50) {
            let (mut child, run_id) = busy.begin("image.still");
            std::thread::sleep(Duration::from_millis(random.below(1500)));
            let with_guard = random.below(3) == 0;
            if let (true, Some(guard)) = (with_guard, guard_of(child.id())) {
                signal(child.id(), "STOP");
                signal(guard, "KILL");
            }
            signal(child.id(), "KILL");
            let ended = child.wait().unwrap();
            if with_guard {
                holdstill::run(["cleanup"]).expect(0);
            }
            let image = busy.path("image.still");
            if ended.success() || image.exists() {
                // Killed after it had its name: then it is whole.
                holdstill::run(["verify".as_ref(), image.as_os_str()]).expect(0);
                std::fs::remove_file(image).unwrap();
            }
            busy.assert_nothing_left(&run_id);
        }
        holdstill::run(["cleanup"]).expect(0);
    }
}

#[test]
fn privileged_asked_to_end_it_ends_cleanly() {
    needs_root!();
    let busy = Busy::new("ext4", common::seed());
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 143)] {
        let (mut child, run_id) = busy.begin("image.still");
        signal(child.id(), name);
        assert_eq!(child.wait().unwrap().code(), Some(code));
        busy.assert_nothing_left(&run_id);
    }
}

#[test]
fn privileged_without_its_guard_there_is_no_image() {
    needs_root!();
    let busy = Busy::new("xfs", common::seed());
    let (mut child, run_id) = busy.begin("image.still");
    wait_until("it has a guard", || guard_of(child.id()).is_some());
    signal(guard_of(child.id()).expect("a guard"), "KILL");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    busy.assert_nothing_left(&run_id);
}

/// Two at once: each either is exact or gives way to the other.
#[test]
fn privileged_two_runs_at_once_do_no_harm() {
    needs_root!();
    let mut busy = Busy::new("ext4", common::seed());
    let children: Vec<(Child, &str)> = ["image-1.still", "image-2.still"]
        .map(|image| (busy.begin(image).0, image))
        .into();
    let mut whole = Vec::new();
    for (mut child, image) in children {
        match child.wait().unwrap().code() {
            Some(0) => whole.push(busy.path(image)),
            Some(3) => assert!(!busy.path(image).exists()),
            other => panic!("ended with {other:?}"),
        }
    }
    let writer = busy.writer.take().unwrap();
    let journal = writer.journal();
    writer.stop();
    assert!(!whole.is_empty(), "both gave way");
    for image in whole {
        let copy = busy.path("copy");
        holdstill::run([Path::new("restore"), &image, &copy]).expect(0);
        check_frozen_ext4(&copy);
        let device = LoopDevice::attach(&copy);
        let mount = Mount::new(device.path(), &busy.path("restored"), "ext4", "");
        judge(&mount.dir().join("busy"), &journal, None);
        drop(mount);
        drop(device);
        std::fs::remove_file(copy).unwrap();
    }
}

#[test]
fn privileged_a_clone_of_a_busy_volume_is_one_instant() {
    needs_root!();
    for fs_type in ["ext4", "xfs"] {
        let mut busy = Busy::new(fs_type, common::seed());
        let copy = busy.path("copy");
        let json = holdstill::run([
            Path::new("clone"),
            busy.mount.dir(),
            &copy,
            Path::new("--verify"),
            Path::new("--json"),
        ])
        .expect(0)
        .last();
        assert_eq!(json["verified"], true);
        assert_eq!(
            (json["freeze"].as_str(), json["grade"].as_str()),
            (Some("track"), Some("frozen"))
        );
        let writer = busy.writer.take().unwrap();
        let journal = writer.journal();
        writer.stop();
        let device = LoopDevice::attach(&copy);
        let options = if fs_type == "xfs" { "nouuid" } else { "" };
        let mount = Mount::new(device.path(), &busy.path("restored"), fs_type, options);
        judge(&mount.dir().join("busy"), &journal, None);
        drop(mount);
    }
}

/// The demonstration holds what it promises.
#[test]
fn privileged_the_demonstration_shows_one_instant() {
    needs_root!();
    let json = holdstill::run(["demo", "--json"]).expect(0).last();
    assert_eq!(json["restored"]["verdict"], "one_instant");
    assert_eq!(
        (json["freeze"].as_str(), json["grade"].as_str()),
        (Some("track"), Some("frozen"))
    );
    assert!(json["restored"]["writes"].as_u64().unwrap() > 0);
}
