use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};

use super::*;
use crate::btrfs;
use crate::lock::{self, Lock};
use crate::testing::{Loop, Mounted, Role, mkfs, needs_root, run, scratch};

/// A scratch filesystem on a loop device, and a process that freezes it.
struct Scene {
    mounted: Mounted,
    _device: Loop,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new(fs_type: &str) -> Self {
        let dir = scratch();
        let device = Loop::sparse(&dir.path().join("disk"), 320 << 20);
        mkfs(fs_type, device.path());
        let mounted = Mounted::new(device.path(), &dir.path().join("mnt"), "rw");
        Self {
            mounted,
            _device: device,
            dir,
        }
    }

    fn mount(&self) -> MountPoint {
        MountPoint::open(self.mounted.path()).unwrap()
    }

    /// Starts the process; it and its guard, by id.
    fn start(&self) -> (Role, Pid, Pid) {
        let args = [self.mounted.path(), self.dir.path()];
        let mut role = Role::start("guard::tests::role_freezes", &args);
        let guard = role.expect("guard").parse().unwrap();
        let run = Pid::from_raw(role.pid());
        (role, run, Pid::from_raw(guard))
    }

    /// Whether the filesystem is frozen, found out without changing that.
    fn is_frozen(&self) -> bool {
        let mount = self.mount();
        match mount.freeze() {
            Ok(()) => {
                mount.thaw().unwrap();
                false
            }
            Err(Errno::EBUSY) => true,
            Err(errno) => panic!("{errno}"),
        }
    }

    fn wait_until_thawed(&self) {
        until("the filesystem is thawed", || !self.is_frozen());
        std::fs::write(self.mounted.path().join("after"), "x").unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Waits for what must come; a minute is no matter of speed.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..12_000 {
        if is_so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("never came: {what}");
}

fn is_running(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Undoing it writes its name to `undone`, once there is a file of that name; it prints its environment.
fn undo(dir: &Path, name: &str) -> Undo {
    let script = format!(
        "cd {} && rm {name} && echo {name} >>undone && env >env",
        dir.display()
    );
    Undo {
        name: name.to_owned(),
        way: Way::Command(["/bin/sh", "-c", &script].map(OsString::from).to_vec()),
        patience: Duration::from_secs(60),
    }
}

/// The process under test: does what it is told, a line at a time.
#[test]
fn role_freezes() {
    let Some(args) = Role::args() else { return };
    let mount = Arc::new(MountPoint::open(&args[0]).unwrap());
    let dir = std::fs::File::open(&args[1]).unwrap();
    let marker = args[1].join("hook");
    let lock = Lock::take(&args[1].join("locks"), "run").unwrap().unwrap();
    let hook = Hook {
        script: format!("echo \"$HOLDSTILL_PHASE\" >> {}; exit 3", marker.display()).into(),
        env: vec![("HOLDSTILL_PHASE".into(), "post".into())],
        deadline: Duration::from_secs(30),
        output: None,
    };
    let guard = Guard::spawn(Config {
        hook: Some(hook),
        undo: ["one", "other"].map(|name| undo(&args[1], name)).to_vec(),
        keep: vec![lock.as_fd()],
    })
    .unwrap();
    Role::say("ready");
    Role::say(&format!("guard {}", guard.pid()));
    let mut frozen = None;
    let mut guard = Some(guard);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        if line == "finish" {
            let report = guard.take().unwrap().finish();
            Role::say(&format!("> {report:?}"));
            return;
        }
        let guard = guard.as_ref().unwrap();
        let (verb, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let said = match verb {
            "freeze" => {
                let deadline = Duration::from_millis(argument.parse().unwrap());
                match guard.ready().unwrap().freeze(&mount, deadline) {
                    Ok(now) => {
                        frozen = Some(now);
                        "ok".to_owned()
                    }
                    Err(error) => format!("{error:?}"),
                }
            }
            "thaw" => format!("{:?}", frozen.take().unwrap().thaw()),
            "file" | "folder" => {
                let kind = match verb {
                    "file" => LeftoverKind::File,
                    _ => LeftoverKind::Folder,
                };
                format!("{:?}", guard.register(&dir, OsStr::new(argument), kind))
            }
            "subvolume" => {
                // By a mount that is attached nowhere, as where the place is not mounted.
                let top = btrfs::Filesystem::open(&args[0])
                    .unwrap()
                    .subvolume(btrfs::TOP_LEVEL)
                    .unwrap();
                let (name, kind) = (OsStr::new(argument), LeftoverKind::Subvolume);
                format!("{:?}", guard.register(&top, name, kind))
            }
            "forget" => {
                let leftover = Leftover(argument.parse().unwrap());
                format!("{:?}", guard.forget(leftover))
            }
            "undo" => format!("{:?}", guard.owe_undo(argument)),
            "undone" => format!("{:?}", guard.forget_undo(Owed(argument.parse().unwrap()))),
            "owe" => format!("{:?}", guard.owe_hook()),
            "hook" => format!("{:?}", guard.run_hook()),
            "check" => format!("{:?}", guard.check().map_err(|error| error.kind())),
            "report" => format!("{:?}", guard.report()),
            other => panic!("{other}"),
        };
        Role::say(&format!("> {said}"));
    }
}

fn tell(role: &mut Role, line: &str) -> String {
    role.send(line);
    role.expect(">")
}

#[test]
fn privileged_freeze_and_thaw_are_measured_and_leave_nothing() {
    needs_root!();
    for fs_type in ["ext4", "xfs"] {
        let scene = Scene::new(fs_type);
        let (mut role, run, guard) = scene.start();
        for _ in 0..3 {
            assert_eq!(tell(&mut role, "freeze 60000"), "ok");
            assert!(scene.is_frozen());
            let thawed = tell(&mut role, "thaw");
            assert!(thawed.starts_with("Ok(Thawed { freeze_call: "), "{thawed}");
            assert!(thawed.ends_with("guard_alive: true })"), "{thawed}");
            assert!(!scene.is_frozen());
        }
        let report = "Ok(Report { thawed: 0, hook: None, removed: 0, left: 0 })";
        assert_eq!(tell(&mut role, "finish"), report);
        until("both have ended", || !is_running(run) && !is_running(guard));
    }
}

#[test]
fn privileged_the_guard_is_apart_and_holds_no_more_than_it_must() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (role, run, guard) = scene.start();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        kill(guard, signal).unwrap();
    }
    let open = || {
        std::fs::read_dir(format!("/proc/{guard}/fd"))
            .unwrap()
            .count()
    };
    // Standard input, output and error, the socket, the lock.
    until("the guard has settled", || open() == 5);
    let status = std::fs::read_to_string(format!("/proc/{guard}/status")).unwrap();
    let locked = status
        .lines()
        .find_map(|line| line.strip_prefix("VmLck:"))
        .unwrap();
    assert!(
        !locked.trim().starts_with("0 "),
        "nothing is locked in memory: {locked}"
    );
    let session = nix::unistd::getsid(Some(guard)).unwrap();
    assert_eq!(session, guard);
    assert!(is_running(guard));
    role.kill();
    assert!(!is_running(run));
    until("the guard has ended", || !is_running(guard));
}

#[test]
fn privileged_a_killed_run_is_thawed_hooked_and_swept() {
    needs_root!();
    for fs_type in ["ext4", "xfs"] {
        let scene = Scene::new(fs_type);
        let (mut role, _, guard) = scene.start();
        for name in ["part", "kept"] {
            std::fs::write(scene.path(name), "x").unwrap();
        }
        std::fs::create_dir(scene.path("instance")).unwrap();
        assert_eq!(tell(&mut role, "file part"), "Ok(Leftover(0))");
        assert_eq!(tell(&mut role, "folder instance"), "Ok(Leftover(1))");
        assert_eq!(tell(&mut role, "file kept"), "Ok(Leftover(2))");
        assert_eq!(tell(&mut role, "file never-made"), "Ok(Leftover(3))");
        assert_eq!(tell(&mut role, "forget 2"), "Ok(())");
        assert!(tell(&mut role, "file ../x").starts_with("Err"));
        assert_eq!(tell(&mut role, "owe"), "Ok(())");
        assert_eq!(tell(&mut role, "freeze 60000"), "ok");
        assert!(scene.is_frozen());
        assert!(lock::is_held(&scene.path("locks"), "run").unwrap());
        role.kill();
        scene.wait_until_thawed();
        until("the guard has ended", || !is_running(guard));
        assert!(!scene.path("part").exists() && !scene.path("instance").exists());
        assert!(scene.path("kept").exists());
        let hook = std::fs::read_to_string(scene.path("hook")).unwrap();
        assert_eq!(hook, "post\n", "the hook ran once");
        assert!(!lock::is_held(&scene.path("locks"), "run").unwrap());
    }
}

#[test]
fn privileged_the_subvolumes_of_a_killed_run_are_deleted() {
    needs_root!();
    let scene = Scene::new("btrfs");
    let (mut role, _, guard) = scene.start();
    let path = |name: &str| scene.mounted.path().join(name);
    let btrfs = |verb: &[&str], names: &[&str]| {
        let verb = verb.iter().map(PathBuf::from);
        run("btrfs", verb.chain(names.iter().map(|name| path(name))));
    };
    for name in ["one", "kept"] {
        btrfs(&["subvolume", "create"], &[name]);
        std::fs::write(path(name).join("file"), "x").unwrap();
    }
    btrfs(&["subvolume", "snapshot", "-r"], &["one", "snapshot"]);
    std::fs::create_dir(path("folder")).unwrap();
    for name in ["one", "snapshot", "never-made", "kept", "folder"] {
        let registered = tell(&mut role, &format!("subvolume {name}"));
        assert!(registered.starts_with("Ok"), "{registered}");
    }
    assert_eq!(tell(&mut role, "forget 3"), "Ok(())");
    // Deleting would wait for ever, were it not thawed first.
    assert_eq!(tell(&mut role, "freeze 60000"), "ok");
    role.kill();
    scene.wait_until_thawed();
    until("the guard has ended", || !is_running(guard));
    for name in ["one", "snapshot"] {
        assert!(!path(name).exists(), "{name}");
    }
    // What is no subvolume is not taken for one.
    for name in ["kept/file", "folder"] {
        assert!(path(name).exists(), "{name}");
    }
}

#[test]
fn privileged_a_stopped_run_is_thawed_at_the_deadline_and_learns_of_it() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, run, _) = scene.start();
    assert_eq!(tell(&mut role, "freeze 700"), "ok");
    kill(run, Signal::SIGSTOP).unwrap();
    scene.wait_until_thawed();
    kill(run, Signal::SIGCONT).unwrap();
    assert_eq!(tell(&mut role, "thaw"), "Err(DidNotHold)");
    let report = "Ok(Report { thawed: 1, hook: None, removed: 0, left: 0 })";
    assert_eq!(tell(&mut role, "report"), report);
    // The next one holds again.
    assert_eq!(tell(&mut role, "freeze 60000"), "ok");
    assert!(tell(&mut role, "thaw").starts_with("Ok"));
}

#[test]
fn privileged_a_lost_guard_is_noticed() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, _, guard) = scene.start();
    assert_eq!(tell(&mut role, "freeze 60000"), "ok");
    kill(guard, Signal::SIGKILL).unwrap();
    let thawed = tell(&mut role, "thaw");
    assert!(thawed.ends_with("guard_alive: false })"), "{thawed}");
    assert!(!scene.is_frozen());
    assert!(tell(&mut role, "freeze 60000").starts_with("GuardLost"));
    assert!(!scene.is_frozen());
    assert_eq!(tell(&mut role, "check"), "Err(BrokenPipe)");
}

#[test]
fn privileged_without_both_it_stays_frozen_until_cleaned_up() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, _, guard) = scene.start();
    assert_eq!(tell(&mut role, "freeze 60000"), "ok");
    kill(guard, Signal::SIGKILL).unwrap();
    until("the guard is dead", || !is_running(guard));
    role.kill();
    assert!(scene.is_frozen());
    assert!(!lock::is_held(&scene.path("locks"), "run").unwrap());
    assert!(scene.mount().thaw_leftover().unwrap());
    assert!(!scene.mount().thaw_leftover().unwrap());
    scene.wait_until_thawed();
}

#[test]
fn privileged_the_freeze_of_another_stays_theirs() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, _, guard) = scene.start();
    let theirs = scene.mount();
    theirs.freeze().unwrap();
    assert_eq!(tell(&mut role, "freeze 60000"), "AlreadyFrozen");
    role.kill();
    until("the guard has ended", || !is_running(guard));
    assert!(scene.is_frozen());
    theirs.thaw().unwrap();
}

#[test]
fn privileged_somebody_else_thawing_is_noticed() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, _, _) = scene.start();
    assert_eq!(tell(&mut role, "freeze 60000"), "ok");
    scene.mount().thaw().unwrap();
    assert_eq!(tell(&mut role, "thaw"), "Err(DidNotHold)");
}

#[test]
fn privileged_what_cannot_be_frozen_says_so() {
    needs_root!();
    let scene = Scene::new("ext4");
    let mount = MountPoint::open(Path::new("/proc")).unwrap();
    let (mut role, _, _) = scene.start();
    assert_eq!(tell(&mut role, "freeze 60000"), "ok");
    assert!(tell(&mut role, "thaw").starts_with("Ok"));
    let refused = FreezeError::from_freeze(mount.freeze().unwrap_err());
    assert!(matches!(refused, FreezeError::Unsupported), "{refused:?}");
    assert!(MountPoint::open(Path::new("/dev/null")).is_err());
}

#[test]
fn privileged_the_hook_runs_once_on_request() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, _, guard) = scene.start();
    assert_eq!(tell(&mut role, "owe"), "Ok(())");
    let ran = "Ok(Some(Ran(Exit(3))))";
    assert_eq!(tell(&mut role, "hook"), ran);
    assert_eq!(tell(&mut role, "hook"), ran);
    let report = "Ok(Report { thawed: 0, hook: Some(Ran(Exit(3))), removed: 0, left: 0 })";
    assert_eq!(tell(&mut role, "finish"), report);
    until("the guard has ended", || !is_running(guard));
    assert_eq!(
        std::fs::read_to_string(scene.path("hook")).unwrap(),
        "post\n"
    );
}

#[test]
fn a_hook_past_its_deadline_is_killed_and_none_is_none() {
    let hook = |script: &str| Hook {
        script: script.into(),
        env: Vec::new(),
        deadline: Duration::from_millis(200),
        output: None,
    };
    let run = |hook| {
        let guard = Guard::spawn(Config {
            hook,
            ..Config::default()
        })
        .unwrap();
        let end = guard.run_hook().unwrap();
        assert_eq!(guard.finish().unwrap().hook, end);
        end
    };
    let late = run(Some(hook("trap '' TERM; sleep 100; sleep 100")));
    assert_eq!(late, Some(HookEnd::Ran(Ending::Deadline)));
    let killed = run(Some(hook("kill -USR1 $$; sleep 100")));
    assert_eq!(killed, Some(HookEnd::Ran(Ending::Signal(libc::SIGUSR1))));
    assert_eq!(run(None), None);
    assert!(prepare(hook("a\0b")).is_err());
}

#[test]
fn privileged_a_killed_run_is_undone_the_latest_first() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, _, guard) = scene.start();
    assert_eq!(tell(&mut role, "undo one"), "Ok(Owed(0))");
    assert_eq!(tell(&mut role, "undo other"), "Ok(Owed(1))");
    assert!(tell(&mut role, "undo third").starts_with("Err"));
    std::fs::write(scene.path("one"), "").unwrap();
    role.kill();
    // What is about to be made is waited for.
    std::thread::sleep(Duration::from_millis(500));
    assert!(is_running(guard));
    assert!(!scene.path("undone").exists());
    std::fs::write(scene.path("other"), "").unwrap();
    until("the guard has ended", || !is_running(guard));
    let undone = std::fs::read_to_string(scene.path("undone")).unwrap();
    assert_eq!(undone, "other\none\n");
    let env = std::fs::read_to_string(scene.path("env")).unwrap();
    assert!(
        env.contains("LC_ALL=C\n") && !env.contains("CARGO"),
        "{env}"
    );
}

#[test]
fn privileged_what_was_undone_is_not_undone_again() {
    needs_root!();
    let scene = Scene::new("ext4");
    let (mut role, _, guard) = scene.start();
    for name in ["one", "other"] {
        std::fs::write(scene.path(name), "").unwrap();
        assert!(tell(&mut role, &format!("undo {name}")).starts_with("Ok"));
    }
    assert_eq!(tell(&mut role, "undone 1"), "Ok(())");
    let report = "Ok(Report { thawed: 0, hook: None, removed: 1, left: 0 })";
    assert_eq!(tell(&mut role, "finish"), report);
    until("the guard has ended", || !is_running(guard));
    assert!(!scene.path("one").exists() && scene.path("other").exists());
    let too_many = vec![undo(scene.dir.path(), "one"); child::UNDOS + 1];
    let config = Config {
        undo: too_many,
        ..Config::default()
    };
    assert!(Guard::spawn(config).is_err());
}
