//! The writer and the checker on real filesystems: what a freeze gives is right, and what is
//! copied without one is found out.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

const LIVE_WRITER: &str = env!("CARGO_BIN_EXE_live-writer");

fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} (is it installed?): {error}"))
}

fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn is_root() -> bool {
    run("id", &["-u"]) == "0"
}

/// A mounted file that is taken down at the end, whatever happens.
struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    fn new(file: &Path, dir: PathBuf, options: &str) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        let options = format!("loop{options}");
        run("mount", &["-o", &options, text(file), text(&dir)]);
        Self { dir }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Thaws, should a test have failed while it was frozen.
        let _ = output("fsfreeze", &["--unfreeze", text(&self.dir)]);
        let mut done = output("umount", &[text(&self.dir)]);
        for _ in 0..50 {
            if done.status.success() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
            done = output("umount", &[text(&self.dir)]);
        }
        eprintln!("cannot unmount {}: {done:?}", self.dir.display());
    }
}

/// A writer that is stopped at the end.
struct Writer(Child);

impl Writer {
    fn start(dir: &Path, journal: &Path) -> Self {
        let mut child = Command::new(LIVE_WRITER)
            .args(["run", text(dir), "--journal", text(journal)])
            .args(["--budget", "48"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let writer = Self(child);
        assert_eq!(line, "running\n");
        writer
    }

    fn stop(mut self) -> ExitStatus {
        run("kill", &["-TERM", &self.0.id().to_string()]);
        self.0.wait().unwrap()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn check(dir: &Path, journal: &Path, window: &[&str]) -> Output {
    let mut args = vec!["check", text(dir), "--journal", text(journal)];
    args.extend(window);
    output(LIVE_WRITER, &args)
}

fn frozen_copies_are_right(mkfs: &[&str], copy_options: &str) {
    if !is_root() {
        println!("skipped, needs root: live-writer on {}", mkfs[0]);
        return;
    }
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    let root = tempfile::Builder::new()
        .prefix("live-writer-test-")
        .tempdir_in(parent)
        .unwrap();
    let (disk, copy) = (root.path().join("disk"), root.path().join("copy"));
    let journal = root.path().join("journal");
    File::create(&disk).unwrap().set_len(400 << 20).unwrap();
    let mut args = mkfs[1..].to_vec();
    args.push(text(&disk));
    run(mkfs[0], &args);

    let mounted = Mounted::new(&disk, root.path().join("disk.mnt"), "");
    let dir = mounted.dir.join("live");
    let writer = Writer::start(&dir, &journal);
    std::thread::sleep(Duration::from_millis(1500));

    // Without a freeze, some try catches the writers in the middle of something.
    let mut torn = Vec::new();
    for number in 0..5 {
        let torn_copy = root.path().join(format!("torn-{number}"));
        run("cp", &["--sparse=always", text(&disk), text(&torn_copy)]);
        torn.push(torn_copy);
    }

    run("fsfreeze", &["--freeze", text(&mounted.dir)]);
    let begin = run(LIVE_WRITER, &["clock"]);
    run("cp", &["--sparse=always", text(&disk), text(&copy)]);
    let end = run(LIVE_WRITER, &["clock"]);
    run("fsfreeze", &["--unfreeze", text(&mounted.dir)]);
    std::thread::sleep(Duration::from_millis(500));
    assert!(writer.stop().success());
    drop(mounted);

    {
        let restored = Mounted::new(&copy, root.path().join("copy.mnt"), copy_options);
        let window = ["--frozen-begin", &begin, "--frozen-end", &end, "--exact"];
        let verdict = check(&restored.dir.join("live"), &journal, &window);
        assert!(
            verdict.status.success(),
            "{}",
            String::from_utf8_lossy(&verdict.stdout)
        );
    }
    let found_out = torn.iter().any(|torn| {
        let dir = root.path().join("torn.mnt");
        std::fs::create_dir_all(&dir).unwrap();
        let options = format!("loop{copy_options}");
        let mount = output("mount", &["-o", &options, text(torn), text(&dir)]);
        if !mount.status.success() {
            return true;
        }
        let restored = Mounted { dir };
        !check(&restored.dir.join("live"), &journal, &[])
            .status
            .success()
    });
    assert!(found_out, "five copies without a freeze were all right");
}

#[test]
fn privileged_a_frozen_ext4_is_one_instant() {
    frozen_copies_are_right(&["mkfs.ext4", "-q"], "");
}

#[test]
fn privileged_a_frozen_xfs_is_one_instant() {
    frozen_copies_are_right(&["mkfs.xfs", "-q"], ",nouuid");
}
