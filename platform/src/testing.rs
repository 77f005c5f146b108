//! What the tests of this crate share: scratch folders in memory, loop devices and mounts that are
//! taken down again whatever happens. Nothing here touches a device it did not make.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::node::{BlockDevice, DeviceNumber};

/// Ends a test with one printed line unless it runs as root.
macro_rules! needs_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped, needs root: {}:{}", module_path!(), line!());
            return;
        }
    };
}
pub(crate) use needs_root;

/// A folder, in memory where possible, removed at the end.
pub(crate) fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    tempfile::Builder::new()
        .prefix("holdstill-test-")
        .tempdir_in(parent)
        .unwrap()
}

/// A folder on a disk, removed at the end, for swap space: what lies in memory must never be swapped
/// to a file in memory, which can wait for itself for ever.
pub(crate) fn scratch_on_disk() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("holdstill-test-")
        .tempdir_in("/var/tmp")
        .unwrap()
}

/// Runs a tool that must succeed; its standard output.
pub(crate) fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(program)
        .args(args)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} (is it installed?): {error}"));
    assert!(
        output.status.success(),
        "{program} failed ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Makes a filesystem of the given type.
pub(crate) fn mkfs(fs_type: &str, device: &Path) {
    let quiet_and_forced: &[&str] = match fs_type {
        "ext4" => &["-q", "-F"],
        "xfs" | "btrfs" => &["-q", "-f"],
        other => panic!("no options known for {other}"),
    };
    let mut args: Vec<&OsStr> = quiet_and_forced.iter().map(OsStr::new).collect();
    args.push(device.as_os_str());
    run(&format!("mkfs.{fs_type}"), args);
}

/// An attached loop device.
#[derive(Debug)]
pub(crate) struct Loop(PathBuf, std::cell::RefCell<Vec<u32>>);

impl Loop {
    /// Over a new sparse file of `size` bytes.
    pub(crate) fn sparse(file: &Path, size: u64) -> Self {
        File::create(file).unwrap().set_len(size).unwrap();
        Self::attach(file, &[])
    }

    /// Over a file or device that is there.
    pub(crate) fn attach(file: &Path, options: &[&str]) -> Self {
        let mut args: Vec<&OsStr> = ["-f", "--show"].iter().map(OsStr::new).collect();
        args.extend(options.iter().map(OsStr::new));
        args.push(file.as_os_str());
        let device = Self(run("losetup", args).trim().into(), Vec::new().into());
        // A device that was set read-only stays so when it is detached, for whoever comes next.
        if !options.contains(&"-r") {
            run(
                "blockdev",
                [OsStr::new("--setrw"), device.path().as_os_str()],
            );
        }
        // Such as a killed test left behind.
        for partition in BlockDevice::at(device.path())
            .unwrap()
            .partitions()
            .unwrap()
        {
            device
                .1
                .borrow_mut()
                .push(partition.partition.unwrap().index);
        }
        device.delete_partitions();
        device
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn number(&self) -> DeviceNumber {
        DeviceNumber::from_raw(std::fs::metadata(&self.0).unwrap().rdev())
    }

    /// Adds a partition device (sectors of 512 bytes) without any table on the disk; its node.
    pub(crate) fn add_partition(&self, index: u32, start: u64, sectors: u64) -> PathBuf {
        let numbers = [u64::from(index), start, sectors].map(|number| number.to_string());
        let mut args = vec![self.0.as_os_str()];
        args.extend(numbers.iter().map(OsStr::new));
        run("addpart", args);
        self.1.borrow_mut().push(index);
        let node = PathBuf::from(format!("{}p{index}", self.0.display()));
        for _ in 0..500 {
            if node.exists() {
                return node;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{} never appeared", node.display());
    }

    fn delete_partitions(&self) {
        for index in self.1.take() {
            let index = index.to_string();
            let _ = Command::new("delpart").arg(&self.0).arg(index).status();
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Partitions that were added by hand outlive the detaching.
        self.delete_partitions();
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A mount, taken down when dropped; thawed first, should a test have left it frozen.
#[derive(Debug)]
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn new(device: &Path, point: &Path, options: &str) -> Self {
        std::fs::create_dir_all(point).unwrap();
        let args = [
            OsStr::new("-o"),
            OsStr::new(options),
            device.as_os_str(),
            point.as_os_str(),
        ];
        run("mount", args);
        Self(point.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze")
            .arg("-u")
            .arg(&self.0)
            .stderr(std::process::Stdio::null())
            .status();
        for _ in 0..50 {
            let unmounted = Command::new("umount").arg(&self.0).status();
            if unmounted.is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        eprintln!("{} stays mounted", self.0.display());
    }
}

/// Another process that plays a part in a test: this test binary, running one test function that
/// does nothing unless it was started so. It says `ready` and goes on when its input ends.
#[derive(Debug)]
pub(crate) struct Role {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

/// Holds the arguments of a role, one a line.
const ROLE: &str = "HOLDSTILL_TEST_ROLE";

impl Role {
    /// Starts the test function `test` (its full path) with arguments and waits until it is ready.
    pub(crate) fn start(test: &str, args: &[&Path]) -> Self {
        let args: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, args.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut role = Self { child, stdout };
        role.expect("ready");
        role
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Reads what it prints up to a line that begins with `start`; the rest of that line.
    pub(crate) fn expect(&mut self, start: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let read = self.stdout.read_line(&mut line).unwrap();
            assert!(read > 0, "the other process never said {start:?}");
            if let Some(rest) = line.trim_end().strip_prefix(start) {
                return rest.trim_start().to_owned();
            }
        }
    }

    /// Sends it a line.
    pub(crate) fn send(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{line}").unwrap();
    }

    /// Kills it with SIGKILL and waits for its end.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The arguments, in the process that plays the role; `None` in an ordinary test run.
    pub(crate) fn args() -> Option<Vec<PathBuf>> {
        let args = std::env::var(ROLE).ok()?;
        Some(args.lines().map(PathBuf::from).collect())
    }

    /// Says `ready` and waits for the end of the input.
    pub(crate) fn ready_until_told() {
        Self::say("ready");
        let mut rest = Vec::new();
        std::io::stdin().read_to_end(&mut rest).unwrap();
    }

    /// Says a line to the test.
    pub(crate) fn say(line: &str) {
        let mut stdout = std::io::stdout();
        // The test harness leaves half a line of its own.
        writeln!(stdout, "\n{line}").unwrap();
        stdout.flush().unwrap();
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
