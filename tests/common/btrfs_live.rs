//! A mounted, busy btrfs that is imaged, and everything its copy is held to.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::btrfs::{Making, Scene, forget, mount, number_after};
use super::btrfs_writers::{Journals, SUBVOLUMES, Writers, Writing, lay_out};
use super::holdstill::{self, Run, listing};
use super::live::Judgement;
use super::volume::{digests, poisoned_file};
use super::{LoopDevice, Mount, Rng, output, run, spawn};

/// What the names of all that the program makes on a source begin with.
const OURS: &str = ".holdstill";

/// A mounted btrfs, laid out as [`lay_out`] does, with its writers.
pub(crate) struct Live {
    // Taken down in this order.
    pub(crate) writers: Option<Writers>,
    pub(crate) mount: Mount,
    pub(crate) scene: Scene,
    size: u64,
    seed: u64,
}

impl Live {
    /// Makes it, with nobody writing yet.
    pub(crate) fn make(making: &Making, size: u64, seed: u64, bytes: u64) -> Self {
        Self::over(Scene::make_sized(making, size), making.mount, seed, bytes)
    }

    /// Mounts what was made, and lays it out.
    pub(crate) fn over(scene: Scene, options: &str, seed: u64, bytes: u64) -> Self {
        let mount = scene.mount(options);
        let size = scene.path("device1").metadata().expect("a device").len();
        lay_out(mount.dir(), &mut Rng(seed | 1), bytes);
        let writers = None;
        Self {
            writers,
            mount,
            scene,
            size,
            seed,
        }
    }

    /// The same, and its writers at work.
    pub(crate) fn busy(
        making: &Making,
        size: u64,
        seed: u64,
        bytes: u64,
        writing: Writing,
    ) -> Self {
        let mut live = Self::make(making, size, seed, bytes);
        live.write(writing);
        live
    }

    /// Starts the writers.
    pub(crate) fn write(&mut self, writing: Writing) {
        let journals = self.scene.path("journals");
        let writers = Writers::start(self.mount.dir(), &journals, self.seed, writing);
        self.writers = Some(writers);
    }

    pub(crate) fn dir(&self) -> &Path {
        self.mount.dir()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scene.path(name)
    }

    /// The arguments of a backup to `image`.
    pub(crate) fn backup_args(&self, image: &Path, more: &[&str]) -> Vec<PathBuf> {
        let args = ["backup", "--freeze", "btrfs", "--json", "-o"].map(PathBuf::from);
        let places = [image.to_owned(), self.dir().to_owned()];
        let more = more.iter().map(PathBuf::from);
        args.into_iter().chain(places).chain(more).collect()
    }

    /// A backup by the command line, to its end.
    pub(crate) fn backup(&self, image: &Path, more: &[&str]) -> Run {
        holdstill::run(self.backup_args(image, more))
    }

    /// A backup that is still reading data when this returns, and will be for a while.
    pub(crate) fn slow_backup(&self, image: &Path, rate: &str) -> Streaming {
        Streaming::start(&self.backup_args(image, &["--rate", rate]))
    }

    /// What can still change must not be gone: nothing is frozen, no subvolume of ours is left, and no
    /// record of this run.
    pub(crate) fn assert_nothing_left(&self, run_id: Option<&str>) {
        let file = self.dir().join("still-writable");
        std::fs::write(&file, "content").unwrap();
        run("sync", [Path::new("-f"), &file]);
        std::fs::remove_file(file).unwrap();
        assert_no_subvolume_of_ours(self.dir());
        if let Some(run_id) = run_id {
            for folder in ["/var/lib/holdstill", "/run/holdstill"].map(Path::new) {
                if folder.is_dir() {
                    let left = listing(folder);
                    let is_ours = |name: &OsString| name.to_string_lossy().contains(run_id);
                    assert!(!left.iter().any(is_ours), "{left:?}");
                }
            }
        }
    }

    /// Nothing was made under this name, or for it.
    pub(crate) fn assert_no_image(&self, image: &Path) {
        let name = image.file_name().unwrap().to_string_lossy().into_owned();
        let left = listing(image.parent().unwrap());
        let is_of_it = |one: &OsString| one.to_string_lossy().contains(&name);
        assert!(!left.iter().any(is_of_it), "{left:?}");
    }

    /// Ends the writers and puts the original away, so that its twin can be looked at.
    pub(crate) fn put_away(self) -> PutAway {
        let Self {
            writers,
            mount,
            mut scene,
            size,
            ..
        } = self;
        let journals = writers.map(Writers::stop);
        let kept = ["snapshot", "static"].map(|name| digests(&mount.dir().join(name)));
        drop(mount);
        forget(&scene.loops);
        let loops = scene.loops.drain(..);
        let paths: Vec<String> = loops
            .map(|device| device.path().display().to_string())
            .collect();
        PutAway {
            scene,
            journals,
            kept,
            paths,
            subvolumes: SUBVOLUMES.map(str::to_owned).to_vec(),
            size,
        }
    }

    /// Does something while it is not mounted.
    pub(crate) fn unmounted<T>(&self, act: impl FnOnce() -> T) -> T {
        run("umount", [self.dir()]);
        let done = act();
        // Taken down by the one there was.
        std::mem::forget(self.scene.mount(""));
        done
    }
}

/// No name below a mount point, and no subvolume wherever it is, is one of ours; deleted ones that are
/// still being removed are waited for.
#[track_caller]
pub(crate) fn assert_no_subvolume_of_ours(mount: &Path) {
    // This wakes the cleaner, which else would sleep for up to half a minute.
    let args = ["-o", "remount"].map(Path::new);
    run("mount", args.into_iter().chain([mount]));
    run(
        "btrfs",
        ["subvolume", "sync"]
            .map(Path::new)
            .into_iter()
            .chain([mount]),
    );
    let args = ["subvolume", "list", "-d"].map(Path::new);
    let deleted = run("btrfs", args.into_iter().chain([mount]));
    assert_eq!(deleted, "", "deleted, but still there");
    let args = ["subvolume", "list", "-a"].map(Path::new);
    let all = run("btrfs", args.into_iter().chain([mount]));
    assert!(!all.contains(OURS), "{all}");
    let mut names = vec![mount.to_owned()];
    names.extend(SUBVOLUMES.iter().map(|name| mount.join(name)));
    for dir in names.iter().filter(|dir| dir.is_dir()) {
        let left = listing(dir);
        let is_ours = |name: &OsString| name.to_string_lossy().starts_with(OURS);
        assert!(!left.iter().any(is_ours), "in {}: {left:?}", dir.display());
    }
}

/// A run of the program that has come to the data it streams.
pub(crate) struct Streaming {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    reader: std::thread::JoinHandle<()>,
}

impl Streaming {
    /// Starts it and waits until it has told of bytes that are done.
    pub(crate) fn start(args: &[PathBuf]) -> Self {
        let mut command = holdstill::command(args);
        let mut child = spawn(command.stderr(Stdio::inherit()));
        let stdout = std::io::BufReader::new(child.stdout.take().unwrap());
        let lines = Arc::new(Mutex::new(Vec::new()));
        let ours = Arc::clone(&lines);
        let reader = std::thread::spawn(move || {
            use std::io::BufRead;
            for line in stdout.lines().map_while(Result::ok) {
                ours.lock().unwrap().push(line);
            }
        });
        let mut run = Self {
            child,
            lines,
            reader,
        };
        let end = Instant::now() + Duration::from_secs(120);
        while !run.is_streaming() {
            assert!(Instant::now() < end, "it never came to stream");
            assert!(run.goes_on(), "it ended before: {:?}", run.lines);
            std::thread::sleep(Duration::from_millis(10));
        }
        run
    }

    /// Whether the moment of the copy has come, and data was read behind it.
    fn is_streaming(&self) -> bool {
        let lines = self.lines.lock().unwrap();
        let mut lines = lines
            .iter()
            .skip_while(|line| !line.contains("\"event\":\"frozen\""));
        lines.any(|line| line.contains("\"event\":\"progress\""))
    }

    /// Whether it has not ended yet.
    pub(crate) fn goes_on(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its end: the exit code, if it was no signal, and the last line.
    pub(crate) fn end(mut self) -> (Option<i32>, Value) {
        let status = self.child.wait().unwrap();
        self.reader.join().unwrap();
        let lines = self.lines.lock().unwrap();
        let last = lines.last().map(String::as_str).unwrap_or("null");
        (status.code(), serde_json::from_str(last).unwrap())
    }
}

/// What a report says of the one commit its image shows.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) generation: u64,
    pub(crate) fsid: String,
    pub(crate) instant: u64,
    pub(crate) is_frozen: bool,
}

/// Reads a report of a backup or clone, holds it to what it promises, and prints its times.
#[track_caller]
pub(crate) fn told(report: &Value) -> Told {
    assert_eq!(report["freeze"], "btrfs", "{report}");
    // A clone is of one source.
    let commit = match &report["commits"] {
        Value::Array(commits) => match &commits[..] {
            [commit] => commit,
            _ => panic!("not one commit: {report}"),
        },
        _ => &report["commit"],
    };
    let window_ms = commit["window_ms"].as_f64().expect("window_ms");
    let freeze_ms = report["freeze_ms"].as_f64().expect("freeze_ms");
    println!("window_ms={window_ms:.1} freeze_ms={freeze_ms:.1} commit={commit}");
    let instant = report["instant"].as_str().expect("an instant");
    let instant: jiff::Timestamp = instant.parse().expect("a time");
    let is_frozen = report["grade"] == "frozen";
    assert_eq!(is_frozen, freeze_ms > 0.0, "{report}");
    Told {
        generation: commit["generation"].as_u64().expect("a generation"),
        fsid: commit["fsid"].as_str().expect("an fsid").to_owned(),
        instant: instant.as_nanosecond() as u64,
        is_frozen,
    }
}

/// An original whose devices are detached; its files stay.
pub(crate) struct PutAway {
    pub(crate) scene: Scene,
    journals: Option<Journals>,
    /// The digests of what nobody changed.
    kept: [BTreeMap<PathBuf, String>; 2],
    /// Its devices as they were called.
    paths: Vec<String>,
    /// The subvolumes that its copy must have.
    pub(crate) subvolumes: Vec<String>,
    size: u64,
}

impl PutAway {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scene.path(name)
    }

    pub(crate) fn journals(&self) -> &Journals {
        self.journals.as_ref().expect("writers")
    }

    /// Restores an image with this report to files full of poison, in the order of the devices.
    pub(crate) fn restore(&self, image: &Path, report: &Value) -> Vec<PathBuf> {
        let number = |path: &String| {
            let volumes = report["volumes"].as_array().unwrap();
            let volume = volumes
                .iter()
                .find(|volume| volume["path"] == path.as_str());
            volume.unwrap_or_else(|| panic!("no {path} in {report}"))["n"].clone()
        };
        let targets: Vec<PathBuf> = (1..=self.paths.len())
            .map(|n| self.path(&format!("restored{n}")))
            .collect();
        let mut args = vec![PathBuf::from("restore"), "--yes".into(), image.to_owned()];
        for (path, target) in self.paths.iter().zip(&targets) {
            poisoned_file(target, self.size);
            match self.paths.len() {
                1 => args.push(target.clone()),
                _ => args.extend([
                    "--map".into(),
                    format!("{}={}", number(path), target.display()).into(),
                ]),
            }
        }
        holdstill::run(args).expect(0);
        targets
    }

    /// Judges what came of a run: the files hold the filesystem as it was at the commit.
    #[track_caller]
    pub(crate) fn judge(&self, files: &[PathBuf], told: &Told, how: Option<Judgement>) {
        for file in files {
            assert_superblocks(file, told);
        }
        self.judge_written(files, told, how);
    }

    /// The same of what was mounted and written to before.
    #[track_caller]
    pub(crate) fn judge_written(&self, files: &[PathBuf], told: &Told, how: Option<Judgement>) {
        let copy = Copy::attach(files, &self.path("copied"));
        copy.check();
        let mounted = copy.mount("");
        scrub(&mounted);
        for (name, expected) in ["snapshot", "static"].into_iter().zip(&self.kept) {
            let got = digests(&mounted.dir().join(name));
            let differs = |path: &&PathBuf| got.get(*path) != expected.get(*path);
            let names: Vec<_> = expected.keys().filter(differs).collect();
            assert!(
                got == *expected,
                "in {name}, which nobody changed: {names:?}"
            );
        }
        if let Some(journals) = &self.journals {
            let at = Judgement::Realtime(told.instant);
            let how = how.unwrap_or(match told.is_frozen {
                true => at,
                false => Judgement::OneInstant,
            });
            let found = journals.judge(mounted.dir(), how);
            print!("{}", found.unwrap_or_else(|wrong| panic!("{wrong}")));
        }
        assert_eq!(subvolumes(mounted.dir()), self.subvolumes);
        assert_no_subvolume_of_ours(mounted.dir());
        for name in ["home", "home/nested", "var", ""] {
            let new = mounted.dir().join(name).join("new");
            std::fs::write(&new, vec![7; 300_000]).unwrap();
            run("sync", [Path::new("-f"), &new]);
        }
        let read_only = std::fs::write(mounted.dir().join("snapshot/new"), "");
        assert!(read_only.is_err(), "the snapshot can be written to");
        drop(mounted);
        copy.check();
    }
}

/// The subvolumes of a mounted filesystem, by path.
pub(crate) fn subvolumes(mount: &Path) -> Vec<String> {
    let args = ["subvolume", "list"].map(Path::new);
    let list = run("btrfs", args.into_iter().chain([mount]));
    let paths = list.lines().filter_map(|line| line.split(" path ").nth(1));
    let mut paths: Vec<String> = paths.map(str::to_owned).collect();
    paths.sort();
    paths
}

/// Every superblock of a file is whole and of the commit that was told.
#[track_caller]
fn assert_superblocks(file: &Path, told: &Told) {
    let args = ["inspect-internal", "dump-super", "-a"].map(Path::new);
    let text = run("btrfs", args.into_iter().chain([file]));
    let values = |name: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter(|line| line.split_whitespace().next() == Some(name));
        lines
            .map(|line| line[name.len()..].trim().to_owned())
            .collect()
    };
    let copies = values("bytenr").len();
    assert!(copies >= 2, "{text}");
    for (name, expected) in [
        ("generation", told.generation.to_string()),
        ("log_root", "0".to_owned()),
        ("fsid", told.fsid.clone()),
    ] {
        assert_eq!(values(name), vec![expected; copies], "{name}: {text}");
    }
    let is_right = |sum: &String| sum.ends_with("[match]");
    assert!(values("csum").iter().all(is_right), "{text}");
}

/// A scrub finds nothing.
#[track_caller]
fn scrub(mounted: &Mount) {
    let args = ["scrub", "start", "-B", "-d"].map(Path::new);
    let said = run("btrfs", args.into_iter().chain([mounted.dir()]));
    assert!(said.contains("no errors found"), "{said}");
    assert!(!said.contains("uncorrectable"), "{said}");
}

/// Restored files, attached.
pub(crate) struct Copy {
    loops: Vec<LoopDevice>,
    dir: PathBuf,
}

impl Copy {
    pub(crate) fn attach(files: &[PathBuf], dir: &Path) -> Self {
        let loops: Vec<LoopDevice> = files.iter().map(|file| LoopDevice::attach(file)).collect();
        for device in &loops {
            let args = ["device", "scan"].map(Path::new);
            output("btrfs", args.into_iter().chain([device.path()]));
        }
        let dir = dir.to_owned();
        Self { loops, dir }
    }

    /// `btrfs check` reads all of it, data too, and finds nothing.
    #[track_caller]
    pub(crate) fn check(&self) {
        if let Err(said) = self.checked() {
            panic!("{said}");
        }
    }

    /// What it finds wrong, if anything.
    pub(crate) fn checked(&self) -> Result<(), String> {
        let args = ["check", "--readonly", "--check-data-csum"].map(Path::new);
        let output = output("btrfs", args.into_iter().chain([self.loops[0].path()]));
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let is_sound = output.status.success()
            && said.contains("no error found")
            && !said.contains("mirror")
            && !said.to_lowercase().contains("warning");
        if is_sound { Ok(()) } else { Err(said) }
    }

    /// Mounts it with these options.
    pub(crate) fn mount(&self, options: &str) -> Mount {
        mount(&self.loops, &self.dir, options)
    }

    /// Mounts it if that can be done at all.
    pub(crate) fn try_mount(&self) -> Option<Mount> {
        std::fs::create_dir_all(&self.dir).unwrap();
        let args = ["-t", "btrfs"].map(Path::new).into_iter();
        let done = output("mount", args.chain([self.loops[0].path(), &self.dir]));
        done.status.success().then(|| Mount::of(&self.dir))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        forget(&self.loops);
    }
}

/// The id of a subvolume.
pub(crate) fn id_of(mount: &Path, subvolume: &str) -> u64 {
    let args = ["subvolume", "list"].map(Path::new);
    let list = run("btrfs", args.into_iter().chain([mount]));
    let suffix = format!(" path {subvolume}");
    let line = list.lines().find(|line| line.ends_with(&suffix));
    number_after(line.expect("the subvolume"), "ID").expect("an id")
}
