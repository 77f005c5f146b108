//! Machines that give no more memory or threads: a run ends with an error, and what it had begun is undone.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::holdstill::listing;
use crate::common::scene::Scene;
use crate::common::volume::populate;
use crate::common::{
    LoopDevice, Mount, Rng, count, needs_root, output, run, seed, sparse_file, temp_dir,
};

/// Longer than any of these runs takes: one that is still there then waits for ever.
const PATIENCE: &str = "300";

/// Runs the program by `prefix`, a command that limits it. It must end by itself, done or with an error of one
/// or two lines. Its exit code, and what it said.
fn limited(prefix: &[&str], args: &[OsString]) -> (i32, String) {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", PATIENCE]).args(prefix);
    command.arg(env!("CARGO_BIN_EXE_holdstill")).args(args);
    command.stdin(Stdio::null()).env("LC_ALL", "C");
    // With it, the standard library says more of memory that ran out.
    command.env_remove("RUST_BACKTRACE");
    let done = command.output().expect("prlimit and timeout are there");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let what = format!("{prefix:?} {args:?}: {}\n{said}", done.status);
    let code = done.status.code().expect(&what);
    assert!([0, 1].contains(&code), "{what}");
    for sign in ["panicked", "backtrace", "RUST_"] {
        assert!(!said.contains(sign), "{what}");
    }
    // The loader of the system may have been the one without room.
    assert!(
        code == 0 || said.contains("holdstill: ") || said.contains("error while loading"),
        "{what}"
    );
    (code, said)
}

fn args<S: AsRef<OsStr>>(args: &[S]) -> Vec<OsString> {
    args.iter().map(|arg| arg.as_ref().to_owned()).collect()
}

/// What each verb does to the scene, and what may be there afterwards.
fn verbs(scene: &Scene, image: &Path, target: &Path) -> [Vec<OsString>; 4] {
    let path = |path: &Path| path.as_os_str().to_owned();
    let threads = |words: &[&str]| args(words).into_iter().chain(args(&["--threads", "8"]));
    let of = |verb: &[&str], paths: &[&Path]| {
        threads(verb)
            .chain(paths.iter().map(|it| path(it)))
            .collect::<Vec<_>>()
    };
    [
        of(&["backup"], &[&scene.source, Path::new("-o"), image]),
        of(&["verify"], &[&scene.image]),
        of(&["restore"], &[&scene.image, target]),
        of(&["clone"], &[&scene.source, target]),
    ]
}

fn limits(from: u64, to: u64, quick: u64) -> Vec<u64> {
    let mut rng = Rng(seed());
    let mut limits: Vec<u64> = (0..count(quick, 60))
        .map(|_| from + rng.below(to - from))
        .collect();
    limits.extend([from, to]);
    limits
}

#[test]
fn without_memory_a_run_ends_with_an_error() {
    let scene = Scene::new();
    let [image, target] = ["new", "target"].map(|name| scene.path(name));
    let mut done = 0;
    for mib in limits(32, 400, 8) {
        for args in verbs(&scene, &image, &target) {
            let space = format!("--as={}", mib << 20);
            let (code, said) = limited(&["prlimit", &space], &args);
            done += u32::from(code == 0);
            let aborted = said.contains("had to end at once");
            for path in [&image, &target] {
                if path.exists() && code == 1 {
                    assert!(aborted, "{args:?} left {}: {said}", path.display());
                    let found = output("blkid", [Path::new("-p"), path]);
                    assert_eq!(found.status.code(), Some(2), "{args:?}: a signature");
                }
                let _ = std::fs::remove_file(path);
            }
            assert_eq!(
                listing(scene.dir.path()),
                ["image", "source"],
                "{args:?}: {said}"
            );
        }
    }
    assert!(done > 0, "no run had enough");
}

#[test]
fn privileged_without_threads_a_run_ends_with_an_error() {
    needs_root!();
    // A user of whom nobody else has heard: its processes are counted.
    let uid = 1_000_000_000 + std::process::id();
    let scene = Scene::new();
    let all = [scene.dir.path(), &scene.source, &scene.image];
    all.iter()
        .for_each(|path| chown(path, Some(uid), Some(uid)).unwrap());
    let [image, target] = ["new", "target"].map(|name| scene.path(name));
    let mut failed = 0;
    for threads in (0..14).step_by(if count(1, 2) > 1 { 1 } else { 3 }) {
        for args in verbs(&scene, &image, &target) {
            let [uid, most] = [format!("--reuid={uid}"), format!("--nproc={threads}")];
            let prefix = [
                "setpriv",
                "--clear-groups",
                &uid,
                "--regid=65534",
                "prlimit",
                &most,
            ];
            let (code, said) = limited(&prefix, &args);
            if code == 1 {
                failed += 1;
                assert!(!image.exists() && !target.exists(), "{args:?}: {said}");
            }
            for path in [&image, &target] {
                let _ = std::fs::remove_file(path);
            }
            assert_eq!(
                listing(scene.dir.path()),
                ["image", "source"],
                "{args:?}: {said}"
            );
        }
    }
    assert!(failed > 0, "there were enough threads at any time");
}

/// Whatever is missing while it works: the filesystem is thawed and writable.
#[test]
fn privileged_without_memory_nothing_stays_frozen() {
    needs_root!();
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    sparse_file(&path("volume"), 64 << 20);
    let device = LoopDevice::attach(&path("volume"));
    run(
        "mke2fs",
        ["-q", "-t", "ext4", device.path().to_str().unwrap()],
    );
    let mount = Mount::new(device.path(), &path("live"), "ext4", "");
    populate(mount.dir(), &mut Rng(seed() | 1), 8 << 20);
    let image: PathBuf = path("new");
    for (number, mib) in limits(32, 500, 2).into_iter().enumerate() {
        for step in ["track", "hold"] {
            let space = format!("--as={}", mib << 20);
            let args = args(&[
                "backup".as_ref(),
                mount.dir().as_os_str(),
                "--freeze".as_ref(),
                step.as_ref(),
                "-o".as_ref(),
                image.as_os_str(),
            ]);
            limited(&["prlimit", &space], &args);
            let written = mount.dir().join(format!("after {step} {number}"));
            // In a child: a write to a frozen filesystem would wait, and we with it.
            let write = [
                "-s".as_ref(),
                "KILL".as_ref(),
                PATIENCE.as_ref(),
                "touch".as_ref(),
                written.as_os_str(),
            ];
            run("timeout", write);
            let _ = std::fs::remove_file(&image);
            assert_eq!(listing(dir.path()), ["live", "volume"], "{mib} MiB, {step}");
        }
    }
}
