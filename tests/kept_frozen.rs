//! What could keep a source frozen, or thaw what is not ours: the terminal, control groups, logs that lie
//! on the source, and `cleanup` after everybody has died.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::common::holdstill::{self as program, listing};
use crate::common::volume::populate;
use crate::common::{
    self, LoopDevice, Mount, Rng, needs_root, output, run, shell, sparse_file, spawn,
    wait_until_frozen,
};

const SIZE: u64 = 64 << 20;

struct Volume {
    // Taken down in this order.
    mount: Mount,
    device: LoopDevice,
    dir: tempfile::TempDir,
}

impl Volume {
    fn new() -> Self {
        let dir = common::temp_dir();
        let file = dir.path().join("volume");
        sparse_file(&file, SIZE);
        let device = LoopDevice::attach(&file);
        run("mkfs.ext4", ["-q", "-F", device.path().to_str().unwrap()]);
        let mount = Mount::new(device.path(), &dir.path().join("live"), "ext4", "");
        populate(mount.dir(), &mut Rng(common::seed() | 1), 16 << 20);
        Self { mount, device, dir }
    }

    fn dir(&self) -> &Path {
        self.mount.dir()
    }

    /// A run that holds the source frozen until its output is read: frozen when this returns.
    fn hold(&self) -> Held {
        self.hold_by(&[])
    }

    /// The same, started by other programs: `env`, a shell that changes its control group.
    fn hold_by(&self, before: &[&str]) -> Held {
        let backup = [
            "backup",
            self.dir().to_str().unwrap(),
            "--freeze",
            "hold",
            "-o",
            "-",
        ];
        let mut command = match before {
            [] => program::command(backup),
            [first, more @ ..] => {
                let mut command = common::command(first, more);
                command.arg(env!("CARGO_BIN_EXE_holdstill")).args(backup);
                command
            }
        };
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn(&mut command);
        let output = child.stdout.take().unwrap();
        wait_until_frozen(self.dir(), &mut child);
        Held { child, output }
    }

    fn is_frozen(&self) -> bool {
        let froze = output("fsfreeze", [Path::new("-f"), self.dir()]);
        if froze.status.success() {
            run("fsfreeze", [Path::new("-u"), self.dir()]);
        }
        !froze.status.success()
    }
}

/// A run whose output waits to be read.
struct Held {
    child: Child,
    output: std::process::ChildStdout,
}

impl Held {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    }

    fn guard(&self) -> u32 {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children
            .split_whitespace()
            .next()
            .expect("a guard")
            .parse()
            .unwrap()
    }

    fn read_all(&mut self) {
        let mut all = Vec::new();
        self.output.read_to_end(&mut all).unwrap();
    }

    /// Kills the run and its guard: nobody is left to thaw.
    fn kill_both(mut self) {
        signal(self.pid(), "STOP");
        signal(self.guard(), "KILL");
        signal(self.pid(), "KILL");
        self.child.wait().unwrap();
    }
}

fn signal(pid: u32, name: &str) {
    run("kill", ["-s", name, &pid.to_string()]);
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < end, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn privileged_a_stop_by_the_terminal_waits_for_the_thaw() {
    needs_root!();
    let volume = Volume::new();
    let held = volume.hold();
    signal(held.pid(), "TSTP");
    std::thread::sleep(Duration::from_millis(300));
    assert_ne!(held.state(), 'T', "stopped with the source frozen");
    // Read until it thaws: then it stops, as it was asked to.
    let mut child = held.child;
    let mut output = held.output;
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        output.read_to_end(&mut all).unwrap();
    });
    let pid = child.id();
    let state = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next())
    };
    wait_until("it stops", || state() == Some('T'));
    assert!(!volume.is_frozen());
    signal(pid, "CONT");
    let status = child.wait().unwrap();
    reader.join().unwrap();
    assert!(status.success(), "{status}");
}

/// A control group that is removed at the end.
struct Group(PathBuf);

impl Group {
    /// In a hierarchy of this kind; `None` if there is none here, or it cannot be used.
    fn new(kind: &str, file: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let point = mounts.lines().find_map(|line| {
            let (fields, rest) = line.split_once(" - ")?;
            let is_it = rest.starts_with(kind) && (kind == "cgroup2 " || rest.contains("freezer"));
            is_it.then(|| PathBuf::from(fields.split(' ').nth(4).unwrap()))
        })?;
        let path = point.join(format!("holdstill-test-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        group.0.join(file).exists().then_some(group)
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap();
    }

    /// What starts a program within it.
    fn enter(&self) -> [String; 4] {
        let script = format!("echo $$ >{}/cgroup.procs; exec \"$@\"", self.0.display());
        [
            "/bin/sh".to_owned(),
            "-c".to_owned(),
            script,
            "sh".to_owned(),
        ]
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} stays", self.0.display());
    }
}

#[test]
fn privileged_pausing_or_killing_its_control_group_does_not_keep_it_frozen() {
    needs_root!();
    for (kind, file, value, undo) in [
        ("cgroup2 ", "cgroup.kill", "1", None),
        ("cgroup2 ", "cgroup.freeze", "1", Some("0")),
        ("cgroup ", "freezer.state", "FROZEN", Some("THAWED")),
    ] {
        for _ in 0..common::count(1, 20) {
            let Some(group) = Group::new(kind, file) else {
                println!("skipped, no control groups with {file} here");
                continue;
            };
            let volume = Volume::new();
            let enter = group.enter();
            let enter: Vec<&str> = enter.iter().map(String::as_str).collect();
            let mut held = volume.hold_by(&enter);
            let members = fs::read_to_string(group.0.join("cgroup.procs")).unwrap();
            assert_eq!(
                members.trim(),
                held.pid().to_string(),
                "the guard is outside"
            );
            group.write(file, value);
            wait_until("it is thawed", || !volume.is_frozen());
            if let Some(undo) = undo {
                group.write(file, undo);
                held.read_all();
                let done = held.child.wait_with_output().unwrap();
                assert_eq!(done.status.code(), Some(3), "{done:?}");
            } else {
                held.child.wait().unwrap();
            }
            wait_until("its group is empty", || {
                fs::read_to_string(group.0.join("cgroup.procs"))
                    .unwrap()
                    .is_empty()
            });
        }
    }
}

#[test]
fn privileged_killed_in_a_freeze_it_is_thawed_within_seconds() {
    needs_root!();
    let volume = Volume::new();
    let mut rng = Rng(common::seed() | 1);
    for _ in 0..common::count(3, 100) {
        let mut held = volume.hold();
        std::thread::sleep(Duration::from_millis(rng.below(100)));
        held.child.kill().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        held.child.wait().unwrap();
        while volume.is_frozen() {
            assert!(Instant::now() < end, "it stays frozen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn privileged_cleanup_leaves_the_freeze_of_a_live_run_alone() {
    needs_root!();
    let volume = Volume::new();
    // Its record stays.
    let mut dead = volume.hold();
    dead.child.kill().unwrap();
    dead.child.wait().unwrap();
    wait_until("it is thawed", || !volume.is_frozen());
    let mut held = volume.hold();
    program::run(["cleanup"]).expect(0);
    assert!(volume.is_frozen(), "cleanup thawed it");
    held.read_all();
    let done = held.child.wait_with_output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn privileged_a_log_on_the_source_is_no_reason_to_refuse() {
    needs_root!();
    let volume = Volume::new();
    let image = volume.dir.path().join("image");
    for step in ["track", "hold"] {
        for json in [&[][..], &["--json"]] {
            let log = File::create(volume.dir().join("log")).unwrap();
            let mut args = vec!["backup", volume.dir().to_str().unwrap(), "--freeze", step];
            args.extend([
                "-o",
                image.to_str().unwrap(),
                "--force",
                "--progress",
                "plain",
            ]);
            args.extend(json);
            let mut command = program::command(args);
            // As from cron: everything goes to a log, and that is where everything lies.
            command.stdout(log.try_clone().unwrap()).stderr(log);
            let status = spawn(&mut command).wait().unwrap();
            let said = fs::read_to_string(volume.dir().join("log")).unwrap();
            assert_eq!(status.code(), Some(0), "{step}: {said}");
            let last = said.lines().last().unwrap();
            assert!(said.contains("frozen"), "{said}");
            assert!(
                json.is_empty() || last.contains("\"event\":\"result\""),
                "{said}"
            );
        }
    }
    let verified = program::run(["verify", image.to_str().unwrap(), "--json"])
        .expect(0)
        .last();
    assert_eq!(verified["grade"], "frozen");
}

/// A loop device that was attached by its number.
struct Attached(PathBuf);

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = output("losetup", [Path::new("-d"), &self.0]);
    }
}

/// The record of a run that died while it had this filesystem frozen.
fn leftover_of(dir: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let device = fs::metadata(dir).unwrap().dev();
    let device = format!("{}:{}", libc::major(device), libc::minor(device));
    let sequence = fs::read_to_string(format!("/sys/dev/block/{device}/diskseq"));
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    serde_json::json!({
        "pid": 1, "begun": "2026-01-02T03:04:05Z",
        "freezes": [{
            "point": dir, "device": device,
            "sequence": sequence.ok().map(|it| it.trim().to_owned()),
            "boot": boot.trim(),
        }],
    })
    .to_string()
}

fn freeze_of_another_stays(device: Attached, point: &Path, record: &str) {
    run("mkfs.ext4", ["-q", device.0.to_str().unwrap()]);
    let mounted = Mount::new(&device.0, point, "ext4", "");
    run("fsfreeze", [Path::new("-f"), mounted.dir()]);
    let name = "/var/lib/holdstill/reused0123.json";
    fs::write(name, record).unwrap();
    let cleaned = program::run(["cleanup"]);
    let still = output("fsfreeze", [Path::new("-u"), mounted.dir()]);
    cleaned.expect(0);
    assert!(
        still.status.success(),
        "a freeze of another filesystem was ended"
    );
    assert!(!Path::new(name).exists());
}

#[test]
fn privileged_cleanup_thaws_what_the_run_froze_and_nothing_else() {
    needs_root!();
    // Of a run that died in a freeze: thawed, though it is mounted elsewhere by now.
    let volume = Volume::new();
    let elsewhere = volume.dir.path().join("elsewhere");
    let elsewhere = Mount::new(volume.device.path(), &elsewhere, "ext4", "");
    volume.hold().kill_both();
    assert!(volume.is_frozen());
    let Volume { mount, device, dir } = volume;
    // Who looked whether it is frozen waits in there still.
    run("umount", [Path::new("-l"), mount.dir()]);
    std::mem::forget(mount);
    program::run(["cleanup"]).expect(0);
    let again = output("fsfreeze", [Path::new("-u"), elsewhere.dir()]);
    assert!(!again.status.success(), "it was frozen still");
    // The same number, and another filesystem: a record of the one that is gone is not for it.
    let number = device.path().to_owned();
    let record = leftover_of(elsewhere.dir());
    drop((elsewhere, device));
    let other = dir.path().join("other");
    sparse_file(&other, SIZE);
    // Another test may have been faster to take the number.
    if output("losetup", [number.as_path(), other.as_path()])
        .status
        .success()
    {
        freeze_of_another_stays(Attached(number), &dir.path().join("m"), &record);
    }
    drop(dir);

    // What lies below the mount point is another filesystem, and its freeze is the administrator's.
    let below = Volume::new();
    let file = below.dir.path().join("inner");
    sparse_file(&file, SIZE);
    let device = LoopDevice::attach(&file);
    run("mkfs.ext4", ["-q", device.path().to_str().unwrap()]);
    let inner = Volume {
        mount: Mount::new(device.path(), &below.dir().join("inner"), "ext4", ""),
        device,
        dir: common::temp_dir(),
    };
    populate(inner.dir(), &mut Rng(1), 8 << 20);
    inner.hold().kill_both();
    run("fsfreeze", [Path::new("-u"), inner.dir()]);
    std::thread::sleep(Duration::from_millis(500));
    drop(inner.mount);
    run("fsfreeze", [Path::new("-f"), below.dir()]);
    program::run(["cleanup"]).expect(0);
    let still = output("fsfreeze", [Path::new("-u"), below.dir()]);
    assert!(
        still.status.success(),
        "the administrator's freeze was ended"
    );
    drop(inner.device);

    // A run that died while nothing was frozen: a later freeze is not its.
    let image = below.dir.path().join("image");
    shell(format!("mkfifo {}", image.display()));
    let mut tracked = spawn(
        program::command([
            "backup",
            below.dir().to_str().unwrap(),
            "--freeze",
            "track",
            "-o",
            image.to_str().unwrap(),
        ])
        .stdout(Stdio::null()),
    );
    // It copies into a pipe that nobody empties.
    let reader = File::open(&image).unwrap();
    let mut first = [0; 1];
    (&reader).read_exact(&mut first).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let pid = tracked.id();
    let guard = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    signal(pid, "STOP");
    signal(guard.trim().parse().unwrap(), "KILL");
    signal(pid, "KILL");
    tracked.wait().unwrap();
    drop(reader);
    run("fsfreeze", [Path::new("-f"), below.dir()]);
    program::run(["cleanup"]).expect(0);
    let still = output("fsfreeze", [Path::new("-u"), below.dir()]);
    assert!(
        still.status.success(),
        "the administrator's freeze was ended"
    );
    assert!(!listing(below.dir.path()).is_empty());
}

#[test]
fn privileged_a_short_freeze_of_another_run_is_waited_for() {
    needs_root!();
    let volume = Volume::new();
    let mut held = volume.hold();
    let image = volume.dir.path().join("image");
    let mut other = program::command([
        "backup",
        volume.dir().to_str().unwrap(),
        "--freeze",
        "track",
        "-o",
        image.to_str().unwrap(),
    ]);
    other.stdout(Stdio::null()).stderr(Stdio::piped());
    let other = spawn(&mut other);
    std::thread::sleep(Duration::from_secs(1));
    held.read_all();
    assert!(held.child.wait().unwrap().success());
    let done = other.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    // An administrator's freeze is not waited for, and the advice to thaw does not come first.
    run("fsfreeze", [Path::new("-f"), volume.dir()]);
    let refused = program::run([
        "backup",
        volume.dir().to_str().unwrap(),
        "--freeze",
        "hold",
        "--force",
        "-o",
        image.to_str().unwrap(),
        "--json",
    ]);
    let error = refused.expect(3).last();
    run("fsfreeze", [Path::new("-u"), volume.dir()]);
    assert!(
        error["hint"]
            .as_str()
            .unwrap()
            .starts_with("wait for whoever froze it"),
        "{error}"
    );
    assert!(!volume.is_frozen());
    let _ = &volume.device;
}
