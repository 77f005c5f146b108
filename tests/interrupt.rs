//! Runs that are killed, interrupted, or left waiting: what they leave must not look whole, and
//! nothing may keep them from ending.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::holdstill::{command, finish, listing, run, run_from, same_bytes, wait};
use crate::common::scene::{assert_no_signature, backup_to};
use crate::common::volume::{ext4, map};
use crate::common::{
    LoopDevice, Rng, count, needs_root, output, run as tool, seed, spawn, temp_dir,
};

const SIZE: u64 = 128 << 20;

/// A source that takes a moment to copy.
fn source(dir: &Path, rng: &mut Rng) -> PathBuf {
    let [source, tree] = ["source", "tree"].map(|name| dir.join(name));
    std::fs::create_dir(&tree).unwrap();
    let mut bytes = vec![0; 8 << 20];
    for number in 0..8 {
        rng.fill(&mut bytes);
        std::fs::write(tree.join(number.to_string()), &bytes).unwrap();
    }
    ext4(&source, SIZE, "", Some(&tree));
    std::fs::remove_dir_all(tree).unwrap();
    source
}

/// How long a run takes when it is left alone.
fn duration<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Duration {
    let begun = Instant::now();
    run(args).expect(0);
    begun.elapsed()
}

/// Kills runs of a command at random moments, until enough were killed before their end.
struct Kills<'a> {
    rng: &'a mut Rng,
    /// How long a run takes at most, as far as is known.
    whole: Duration,
    left: u64,
}

impl<'a> Kills<'a> {
    /// `whole`: how long a run took when it was left alone.
    fn of(whole: Duration, rng: &'a mut Rng) -> Self {
        let left = count(4, 50);
        Kills { rng, whole, left }
    }

    /// Starts the program and kills it at a random moment, every other time near its end, where
    /// what was held back is written. Whether it was killed before it ended, or `None` when
    /// there were enough.
    fn next(&mut self, mut command: Command) -> Option<bool> {
        if self.left == 0 {
            return None;
        }
        let micros = self.whole.as_micros() as u64;
        let from = if self.left.is_multiple_of(2) {
            0
        } else {
            micros * 4 / 5
        };
        let delay = from + self.rng.below((micros * 11 / 10 - from).max(1));
        let mut child = spawn(&mut command);
        std::thread::sleep(Duration::from_micros(delay));
        child.kill().unwrap();
        let was_killed = child.wait().unwrap().signal() == Some(9);
        if was_killed {
            self.left -= 1;
        } else {
            // The machine has more time for it than before.
            self.whole = self.whole * 9 / 10;
        }
        Some(was_killed)
    }
}

#[test]
fn a_killed_backup_leaves_no_image() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = source(dir.path(), &mut rng);
    let image = dir.path().join("image");
    let whole = duration(backup_to(&source, &image));
    let old = std::fs::read(&image).unwrap();
    for replaces in [false, true] {
        let mut kills = Kills::of(whole, &mut rng);
        loop {
            if replaces {
                std::fs::write(&image, &old).unwrap();
            } else {
                let _ = std::fs::remove_file(&image);
            }
            let Some(was_killed) = kills.next(command(backup_to(&source, &image))) else {
                break;
            };
            let is_old = std::fs::read(&image).is_ok_and(|bytes| bytes == old);
            if image.exists() && !(replaces && is_old) {
                // It had just been given its name.
                run([Path::new("verify"), &image]).expect(0);
            } else if !replaces {
                assert!(was_killed, "it ended, and there is no image");
            }
            let left: Vec<_> = listing(dir.path())
                .into_iter()
                .filter(|name| name != "source" && name != "image")
                .collect();
            // Between the part file's name and the image's there is a moment when it replaces one.
            if !replaces {
                assert_eq!(left, [""; 0]);
            }
            for name in left {
                std::fs::remove_file(dir.path().join(name)).unwrap();
            }
        }
    }
    run(backup_to(&source, &image)).expect(0);
    run([Path::new("verify"), &image]).expect(0);
}

/// Kills restores to `target` at random moments: it never carries a signature then.
fn kill_restores(rng: &mut Rng, source: &Path, image: &Path, target: &Path) {
    let args = [Path::new("restore"), Path::new("--yes"), image, target];
    let whole = duration(args);
    let mut kills = Kills::of(whole, rng);
    loop {
        // It holds a whole filesystem before.
        let begun = target.metadata().is_ok();
        let Some(was_killed) = kills.next(command(args)) else {
            break;
        };
        if was_killed {
            let found = output("blkid", [Path::new("-p"), target]);
            // Killed before it began, or after its last write, it is whole.
            if found.status.code() != Some(2) {
                assert!(begun);
                let fsck = output("e2fsck", [Path::new("-fn"), target]);
                assert!(fsck.status.success(), "half a filesystem: {fsck:?}");
                run([Path::new("verify"), image, Path::new("--against"), target]).expect(0);
            } else {
                assert_no_signature(target);
            }
        }
        run(args).expect(0);
    }
    assert_eq!(map(target).used, map(source).used);
}

#[test]
fn a_killed_restore_leaves_no_filesystem() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = source(dir.path(), &mut rng);
    let [image, target] = ["image", "target"].map(|name| dir.path().join(name));
    run(backup_to(&source, &image)).expect(0);
    kill_restores(&mut rng, &source, &image, &target);
}

#[test]
fn privileged_a_killed_restore_leaves_no_filesystem_on_a_device() {
    needs_root!();
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = source(dir.path(), &mut rng);
    let [image, file] = ["image", "file"].map(|name| dir.path().join(name));
    run(backup_to(&source, &image)).expect(0);
    crate::common::volume::copy(&source, &file);
    let target = LoopDevice::attach(&file);
    kill_restores(&mut rng, &source, &image, target.path());
}

/// A restore that is killed as soon as its target can be recognized has written everything else.
#[test]
fn what_can_be_recognized_is_whole() {
    const MAGIC: u64 = 1024 + 0x38;
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = source(dir.path(), &mut rng);
    let [image, target] = ["image", "target"].map(|name| dir.path().join(name));
    run(backup_to(&source, &image)).expect(0);
    let args = [Path::new("restore"), Path::new("--yes"), &image, &target];
    let wanted = count(6, 50);
    let mut killed = 0;
    for _ in 0..wanted * 20 {
        if killed == wanted {
            break;
        }
        let _ = std::fs::remove_file(&target);
        let mut child = spawn(&mut command(args));
        while child.try_wait().unwrap().is_none() {
            let mut magic = [0; 2];
            let file = File::open(&target);
            let read = file.and_then(|file| file.read_exact_at(&mut magic, MAGIC));
            if read.is_ok() && magic != [0; 2] {
                child.kill().unwrap();
            }
            std::thread::yield_now();
        }
        killed += u64::from(child.wait().unwrap().signal() == Some(9));
        tool("e2fsck", [Path::new("-fn"), &target]);
        run([Path::new("verify"), &image, Path::new("--against"), &target]).expect(0);
    }
    assert!(killed > 0, "none was killed in time");
}

/// Writes what makes a disk a member of an md array, at its end (version 1.0: `struct mdp_superblock_1`
/// of the kernel's md_p.h, 8 KiB before the end).
fn make_md_member(disk: &Path) {
    let size = disk.metadata().unwrap().len();
    let offset = (size - 8192) / 4096 * 4096;
    let file = File::options().write(true).open(disk).unwrap();
    let mut superblock = [0; 256];
    superblock[..4].copy_from_slice(&0xa92b_4efc_u32.to_le_bytes());
    superblock[4] = 1;
    superblock[16..32].fill(7);
    superblock[144..152].copy_from_slice(&(offset / 512).to_le_bytes());
    file.write_all_at(&superblock, offset).unwrap();
    let shown = tool("blkid", [Path::new("-p"), disk]);
    assert!(shown.contains("linux_raid_member"), "{shown}");
}

/// Signatures at the end of the target neither survive from before nor come too early.
#[test]
fn the_end_of_a_target_holds_no_signature_either() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let [noise, image, target] = ["noise", "image", "target"].map(|name| dir.path().join(name));
    let mut bytes = vec![0; 8 << 20];
    rng.fill(&mut bytes);
    std::fs::write(&noise, &bytes).unwrap();
    // Ends as a member of an array, and so does the target before.
    make_md_member(&noise);
    run(backup_to(&noise, &image)).expect(0);
    let args = [Path::new("restore"), Path::new("--yes"), &image, &target];
    std::fs::copy(&noise, &target).unwrap();
    let mut slow = command(args);
    slow.args(["--json", "--rate", "4M"]);
    let mut child = spawn(&mut slow);
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    wait_for(&mut lines, "progress");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_no_signature(&target);

    run(args).expect(0);
    let shown = tool("blkid", [Path::new("-p"), &target]);
    assert!(shown.contains("linux_raid_member"), "{shown}");
    assert!(same_bytes(&noise, &target));

    // Used blocks alone would leave what was there before in the free ones.
    let source = dir.path().join("source");
    ext4(&source, 8 << 20, "", None);
    run(backup_to(&source, &image)).expect(0);
    run(args).expect(0);
    let shown = tool("blkid", [Path::new("-p"), &target]);
    assert!(shown.contains("ext4") && !shown.contains("raid"), "{shown}");
}

fn signal(child: &Child, name: &str) {
    tool("kill", ["-s", name, &child.id().to_string()]);
}

/// Reads JSON lines until one is of this event.
fn wait_for(lines: &mut impl BufRead, event: &str) {
    let mut line = String::new();
    let wanted = format!("\"event\":\"{event}\"");
    while !line.contains(&wanted) {
        line.clear();
        let got = lines.read_line(&mut line).unwrap();
        assert!(got > 0, "no {event}");
    }
}

const SIGNALS: [(&str, i32, &str); 3] = [
    ("INT", 130, "interrupted"),
    ("TERM", 143, "terminated"),
    ("HUP", 143, "terminated"),
];

#[test]
fn signals_end_a_run_that_cleans_up() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = source(dir.path(), &mut rng);
    let image = dir.path().join("image");
    run(backup_to(&source, &image)).expect(0);
    let before = listing(dir.path());
    let [other, target] = ["other", "target"].map(|name| dir.path().join(name));
    for (name, code, kind) in SIGNALS {
        // Slow enough to be caught, whatever the machine.
        let mut slow = command(backup_to(&source, &other));
        slow.args(["--json", "--rate", "4M"]);
        let mut restore = command([Path::new("restore"), &image, &target]);
        restore.args(["--json", "--rate", "4M"]);
        for mut command in [slow, restore] {
            println!("{name} {command:?}");
            let mut child = spawn(&mut command);
            let mut lines = BufReader::new(child.stdout.take().unwrap());
            wait_for(&mut lines, "progress");
            signal(&child, name);
            let mut rest = String::new();
            lines.read_to_string(&mut rest).unwrap();
            let run = wait(&command, child);
            assert_eq!(run.code(), Some(code), "{rest}{run}");
            let last: serde_json::Value =
                serde_json::from_str(rest.lines().last().unwrap()).unwrap();
            assert_eq!(last["kind"], kind);
            assert_eq!(last["exit_code"], code);
            assert_eq!(listing(dir.path()), before);
        }
    }
}

/// A run that waits for the other end of a pipe, and for nothing else.
fn waits(mut command: Command, name: &str, code: i32) {
    println!("{name} {command:?}");
    let mut child = spawn(&mut command);
    // Open until the end.
    let stdin = child.stdin.take();
    until_idle(&child);
    signal(&child, name);
    wait(&command, child).expect(code);
    drop(stdin);
}

/// Waits until a process does nothing any more: it sleeps, and its time does not grow.
fn until_idle(child: &Child) {
    let mut last = String::new();
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split(' ').collect();
        // State, and time in user and system mode in ticks of 10 ms (proc_pid_stat(5)).
        let now = format!("{} {}", fields[1], fields[12]);
        let mut used: u64 = fields[12].parse().unwrap();
        used += fields[13].parse::<u64>().unwrap();
        let now_used = format!("{now} {used}");
        if fields[1] == "S" && now_used == last {
            return;
        }
        assert_ne!(fields[1], "Z", "it has ended");
        last = now_used;
    }
}

#[test]
fn a_stalled_pipe_does_not_keep_a_run_from_ending() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = source(dir.path(), &mut rng);
    let [image, pipe, target] = ["image", "pipe", "target"].map(|name| dir.path().join(name));
    run(backup_to(&source, &image)).expect(0);
    tool("mkfifo", [&pipe]);
    let before = listing(dir.path());
    for (name, code, _) in SIGNALS {
        // Nobody writes to standard input, or nobody opens the pipe.
        for args in [
            vec![Path::new("verify"), Path::new("-")],
            vec![Path::new("restore"), Path::new("-"), &target],
            vec![Path::new("verify"), &pipe],
        ] {
            let mut command = command(args);
            command.stdin(Stdio::piped());
            waits(command, name, code);
        }
        // Nobody reads standard output, or the pipe.
        let mut to_stdout = command(backup_to(&source, Path::new("-")));
        println!("{name} {to_stdout:?}");
        let mut child = spawn(&mut to_stdout);
        let stdout = child.stdout.take().unwrap();
        until_idle(&child);
        signal(&child, name);
        wait(&to_stdout, child).expect(code);
        drop(stdout);
        waits(command(backup_to(&source, &pipe)), name, code);
        let reader = File::options().read(true).write(true).open(&pipe).unwrap();
        waits(command(backup_to(&source, &pipe)), name, code);
        drop(reader);
        // The image ends in the middle, and the pipe stays open.
        let mut half = command([Path::new("restore"), Path::new("-"), &target]);
        half.stdin(Stdio::piped());
        let mut child = spawn(&mut half);
        let mut stdin = child.stdin.take().unwrap();
        let bytes = std::fs::read(&image).unwrap();
        std::io::Write::write_all(&mut stdin, &bytes[..bytes.len() / 2]).unwrap();
        until_idle(&child);
        signal(&child, name);
        wait(&half, child).expect(code);
        drop(stdin);
        assert_eq!(listing(dir.path()), before);
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_run() {
    let mut rng = Rng(seed());
    let dir = temp_dir();
    let source = source(dir.path(), &mut rng);
    let mut backup = command(backup_to(&source, Path::new("-")));
    let mut child = spawn(&mut backup);
    let mut stdout = child.stdout.take().unwrap();
    let mut some = vec![0; 100_000];
    stdout.read_exact(&mut some).unwrap();
    drop(stdout);
    wait(&backup, child).expect(1).says("Broken pipe");
    // What it got is no image.
    let part = dir.path().join("part");
    std::fs::write(&part, &some).unwrap();
    run([Path::new("verify"), &part]).expect(4);
    run_from(&part, ["verify", "-"]).expect(4);
    // Reports that nobody reads do no harm.
    let image = dir.path().join("image");
    let mut quiet = command(backup_to(&source, &image));
    quiet.arg("--json");
    let mut child = spawn(&mut quiet);
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    finish(command([Path::new("verify"), &image])).expect(0);
}
