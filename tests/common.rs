//! What the integration tests share: temporary folders, loop devices and mounts that are always
//! taken down, child commands that fail loudly, seeds and counts.

#![allow(dead_code)]

pub(crate) mod apfs;
pub(crate) mod btrfs;
pub(crate) mod btrfs_chunks;
pub(crate) mod btrfs_live;
pub(crate) mod btrfs_writers;
pub(crate) mod holdstill;
pub(crate) mod live;
pub(crate) mod random;
pub(crate) mod reading;
pub(crate) mod reseal;
pub(crate) mod scene;
pub(crate) mod sparse;
pub(crate) mod table;
pub(crate) mod volume;
pub(crate) mod walking;
pub(crate) mod watchdog;

pub(crate) use random::Rng;

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::holdstill::error::{Error, IoContext, Result};
use ::holdstill::pipeline::Bounds;
use ::holdstill::read_at::{ReadAt, check_range};
use ::holdstill::units::{ByteLen, Offset};

/// Where Debian keeps the tools, also those of the administrator.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Waits until the filesystem at `dir` is frozen by this run, without freezing it: a writer in there gets
/// stuck.
pub(crate) fn wait_until_frozen(dir: &Path, run: &mut Child) {
    let file = dir.join(".holdstill-test-canary");
    let beats = Arc::new(AtomicU64::new(0));
    let writer = Arc::clone(&beats);
    let is_over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&is_over);
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let _ = std::fs::write(&file, "x");
            writer.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = std::fs::remove_file(&file);
    });
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        let before = beats.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(700));
        if beats.load(Ordering::Relaxed) == before {
            break;
        }
        if let Some(status) = run.try_wait().expect("a child") {
            let mut said = String::new();
            let stderr = run
                .stderr
                .as_mut()
                .map(|stderr| stderr.read_to_string(&mut said));
            panic!("it ended before it froze anything: {status}: {said} ({stderr:?})");
        }
        assert!(Instant::now() < end, "it is never frozen");
    }
    is_over.store(true, Ordering::Relaxed);
}

/// So many threads, and no other bound.
pub(crate) fn threads(threads: usize) -> Bounds {
    Bounds {
        threads,
        memory: None,
    }
}

/// A folder that is removed at the end: in memory where there is enough of it, else in the
/// system's temporary folder.
pub(crate) fn temp_dir() -> tempfile::TempDir {
    watchdog::watch();
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    tempfile::Builder::new()
        .prefix("holdstill-test-")
        .tempdir_in(parent)
        .expect("a temporary folder")
}

/// The same on a disk, for swap space: what lies in memory must never be swapped to a file in
/// memory, which can wait for itself for ever.
pub(crate) fn temp_dir_on_disk() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("holdstill-test-")
        .tempdir_in("/var/tmp")
        .expect("a temporary folder")
}

/// A new sparse file of `size` bytes.
pub(crate) fn sparse_file(path: &Path, size: u64) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap_or_else(|error| panic!("cannot create {}: {error}", path.display()));
    file.set_len(size)
        .unwrap_or_else(|error| panic!("cannot size {}: {error}", path.display()));
    file
}

/// A command of the system with a fixed path and the C locale.
pub(crate) fn command<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command
        .args(args)
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .env("MKE2FS_SKIP_PROGRESS", "1");
    command
}

/// Starts a command, which the test's time limit ends, too, and waits until it is really that command which runs.
///
/// Between fork and exec a child holds copies of all files that are open here: to others it looks as
/// if it wrote to them. One lock for all children keeps that moment apart from the start of a program
/// that searches for writers.
///
/// # Panics
/// If it cannot be started: a missing tool is a failed test.
pub(crate) fn spawn(command: &mut Command) -> Child {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let child = command.spawn().unwrap_or_else(|error| {
        panic!("cannot run {command:?} (is the package installed?): {error}")
    });
    watchdog::started(child.id());
    child
}

/// Runs a command to its end, whatever its exit status.
///
/// # Panics
/// If it cannot be started: a missing tool is a failed test.
pub(crate) fn output<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Output {
    let mut command = command(program, args);
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn(&mut command);
    child.wait_with_output().expect("the command ends")
}

/// Runs a command that must succeed; what it printed on standard output.
///
/// # Panics
/// With all it printed, if it fails.
pub(crate) fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> String {
    let args: Vec<_> = args
        .into_iter()
        .map(|arg| arg.as_ref().to_owned())
        .collect();
    let output = output(program, &args);
    assert!(
        output.status.success(),
        "{program} {args:?} failed ({}):\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a line of shell that must succeed; what it printed on standard output.
pub(crate) fn shell(script: impl AsRef<OsStr>) -> String {
    run("bash", [OsStr::new("-euc"), script.as_ref()])
}

/// Whether the tests run as root.
pub(crate) fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:"))
            .and_then(|ids| ids.split_whitespace().nth(1))
            == Some("0")
    })
}

/// Ends a test with one printed line unless it runs as root.
macro_rules! needs_root {
    () => {
        if !$crate::common::is_root() {
            println!("skipped, needs root: {}:{}", module_path!(), line!());
            return;
        }
    };
}
pub(crate) use needs_root;

/// A loop device over a file, detached when dropped.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Attaches a free loop device to `file`.
    pub(crate) fn attach(file: &Path) -> Self {
        Self::attach_with(file, &[])
    }

    /// The same with further options of `losetup`, such as `--read-only`.
    pub(crate) fn attach_with(file: &Path, options: &[&str]) -> Self {
        let mut args: Vec<&OsStr> = vec![OsStr::new("--find"), OsStr::new("--show")];
        args.extend(options.iter().map(OsStr::new));
        args.push(file.as_os_str());
        let path = PathBuf::from(run("losetup", args).trim());
        // A device that was set read-only stays so when it is detached, for whoever comes next.
        if !options
            .iter()
            .any(|option| ["-r", "--read-only"].contains(option))
        {
            run("blockdev", [OsStr::new("--setrw"), path.as_os_str()]);
        }
        Self { path }
    }

    /// The device node.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        take_down("losetup", &["--detach"], &self.path);
    }
}

/// A partition device without a table, deleted when dropped.
#[derive(Debug)]
pub(crate) struct Partition {
    disk: PathBuf,
    number: String,
    node: PathBuf,
}

impl Partition {
    /// Adds partition `number` to a disk: where it begins and how long it is, in sectors.
    pub(crate) fn add(disk: &Path, number: u32, start: u64, sectors: u64) -> Self {
        let numbers = [u64::from(number), start, sectors].map(|number| number.to_string());
        // Such as a killed test left behind.
        output("delpart", [disk.as_os_str(), OsStr::new(&numbers[0])]);
        let mut args = vec![disk.as_os_str()];
        args.extend(numbers.iter().map(OsStr::new));
        run("addpart", args);
        let node = PathBuf::from(format!("{}p{number}", disk.display()));
        let partition = Self {
            disk: disk.to_owned(),
            number: number.to_string(),
            node,
        };
        for _ in 0..500 {
            if partition.node.exists() {
                return partition;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{} never appeared", partition.node.display());
    }

    /// The device node.
    pub(crate) fn node(&self) -> &Path {
        &self.node
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        let disk = self.disk.display().to_string();
        take_down("delpart", &[&disk], Path::new(&self.number));
    }
}

/// A mounted filesystem, unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Mount {
    dir: PathBuf,
}

impl Mount {
    /// Mounts `device` at `dir`, which is created. `options` as in `mount -o`, or empty.
    pub(crate) fn new(device: &Path, dir: &Path, fs: &str, options: &str) -> Self {
        std::fs::create_dir_all(dir).expect("a mount point");
        let mut args = vec![OsStr::new("-t"), OsStr::new(fs)];
        if !options.is_empty() {
            args.extend([OsStr::new("-o"), OsStr::new(options)]);
        }
        args.extend([device.as_os_str(), dir.as_os_str()]);
        run("mount", args);
        Self::of(dir)
    }

    /// What is mounted there already.
    pub(crate) fn of(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// The mount point.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Freezes the filesystem; it thaws when the guard is dropped. Keep it short, and write
    /// nothing to the filesystem meanwhile.
    pub(crate) fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", [OsStr::new("--freeze"), self.dir.as_os_str()]);
        Frozen(self)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        take_down("umount", &[], &self.dir);
    }
}

/// A frozen mount, thawed when dropped.
#[derive(Debug)]
pub(crate) struct Frozen<'a>(&'a Mount);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        take_down("fsfreeze", &["--unfreeze"], &self.0.dir);
    }
}

/// Takes something down, patiently: whoever looks at new devices may hold it for a moment.
/// Never panics while a test fails already.
fn take_down(program: &str, args: &[&str], what: &Path) {
    let mut result = None;
    for _ in 0..50 {
        let mut command = command(program, args);
        command.arg(what).stderr(Stdio::piped());
        let done = spawn(&mut command).wait_with_output();
        match done {
            Ok(output) if output.status.success() => return,
            other => result = Some(other),
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let message = format!("{program} {} failed: {result:?}", what.display());
    if std::thread::panicking() {
        eprintln!("{message}");
    } else {
        panic!("{message}");
    }
}

/// A file or device as the parsers read it.
#[derive(Debug)]
pub(crate) struct FileSource {
    file: File,
    path: PathBuf,
    len: ByteLen,
}

impl FileSource {
    /// Opens it for reading. Its size is where its end is, for devices too.
    pub(crate) fn open(path: &Path) -> Self {
        use std::io::{Seek, SeekFrom};
        let mut file = File::open(path)
            .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
        let len = file.seek(SeekFrom::End(0)).expect("the end of the file");
        Self {
            file,
            path: path.to_owned(),
            len: ByteLen(len),
        }
    }
}

impl ReadAt for FileSource {
    fn len(&self) -> ByteLen {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        check_range(self.len, offset, ByteLen(buf.len() as u64))?;
        self.file
            .read_exact_at(buf, offset.0)
            .context("cannot read", &self.path)
            .map_err(|error: Error| error.at(offset))
    }
}

/// `HOLDSTILL_SEED`, else one from the clock; printed, so that a failure can be run again.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("HOLDSTILL_SEED") {
        Ok(text) => text.parse().expect("HOLDSTILL_SEED is a number"),
        Err(_) => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |since| since.as_nanos() as u64),
    };
    let thread = std::thread::current();
    println!("{}: HOLDSTILL_SEED={seed}", thread.name().unwrap_or("test"));
    seed
}

/// How many times to try something: `quick` by default, `full` with `HOLDSTILL_TEST_SCALE=full`,
/// else `quick` times the number given there; never 0.
pub(crate) fn count(quick: u64, full: u64) -> u64 {
    let scaled = match std::env::var("HOLDSTILL_TEST_SCALE") {
        Err(_) => quick,
        Ok(scale) if scale == "full" => full,
        Ok(scale) => {
            let scale: f64 = scale
                .parse()
                .expect("HOLDSTILL_TEST_SCALE is `full` or a number");
            ((quick as f64 * scale) as u64).min(full)
        }
    };
    scaled.max(1)
}
