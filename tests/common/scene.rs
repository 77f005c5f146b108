//! A folder in which something will go wrong, and what must not change there.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::holdstill::{Run, command, listing, run, wait};
use super::volume::{ext4, poisoned_file};
use super::{output, spawn, temp_dir};

/// Size of the source in bytes.
pub(crate) const SIZE: u64 = 24 << 20;

/// A folder with a source and its image, whose content is known.
pub(crate) struct Scene {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) source: PathBuf,
    pub(crate) image: PathBuf,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let dir = temp_dir();
        let [source, image] = ["source", "image"].map(|part| dir.path().join(part));
        ext4(&source, SIZE, "", Some(Path::new("/usr/include/linux/can")));
        run([Path::new("backup"), &source, Path::new("-o"), &image]).expect(0);
        Self { dir, source, image }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A target full of poison.
    pub(crate) fn target(&self, size: u64) -> PathBuf {
        let path = self.path("target");
        poisoned_file(&path, size);
        path
    }

    /// Name and content of every file in the folder; the content of nothing else.
    pub(crate) fn state(&self) -> BTreeMap<OsString, Option<blake3::Hash>> {
        let names = listing(self.dir.path()).into_iter();
        names
            .map(|name| {
                let path = self.dir.path().join(&name);
                let is_file = path.symlink_metadata().unwrap().is_file();
                let hash = is_file.then(|| {
                    let mut hasher = blake3::Hasher::new();
                    std::io::copy(&mut File::open(&path).unwrap(), &mut hasher).unwrap();
                    hasher.finalize()
                });
                (name, hash)
            })
            .collect()
    }

    /// Runs the program, which must end with `code`, say `text`, and change nothing in the folder.
    #[track_caller]
    pub(crate) fn refuses<S: AsRef<OsStr>>(
        &self,
        code: i32,
        text: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Run {
        let before = self.state();
        let run = run(args).expect(code).says(text);
        assert!(before == self.state(), "something was changed: {run}");
        run
    }

    pub(crate) fn restore_to(&self, target: &Path) -> [PathBuf; 4] {
        let [restore, yes] = ["restore", "--yes"].map(PathBuf::from);
        [restore, yes, self.image.clone(), target.to_owned()]
    }
}

pub(crate) fn backup_to(source: &Path, image: &Path) -> [PathBuf; 5] {
    let [backup, force, output] = ["backup", "--force", "-o"].map(PathBuf::from);
    [backup, force, source.to_owned(), output, image.to_owned()]
}

/// No signature of any kind is on a device or file.
#[track_caller]
pub(crate) fn assert_no_signature(path: &Path) {
    let found = output("blkid", [Path::new("-p"), path]);
    let shown = String::from_utf8_lossy(&found.stdout).into_owned();
    assert_eq!(found.status.code(), Some(2), "{}: {shown}", path.display());
    assert_eq!(shown, "", "{}", path.display());
}

/// Where [`onto_a_liar`] damages a target: not in what is written last.
const MIDDLE: Range<usize> = 2 << 20..20 << 20;

/// A target that does not hold what was written to it: while the rest is still being written, a block
/// that has arrived is changed. The run, which reads its target back, must end with 4, and the target
/// must not look whole.
pub(crate) fn onto_a_liar<S: AsRef<OsStr>>(
    args: impl IntoIterator<Item = S>,
    target: &Path,
    size: u64,
) {
    poisoned_file(target, size);
    let mut program = command(args);
    program.args(["--yes", "--rate", "12M", "--threads", "1"]);
    let child = spawn(&mut program);
    // Not for writing yet: a target that somebody writes to is refused.
    let file = File::open(target).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let mut bytes = vec![0; MIDDLE.len()];
    let damaged = loop {
        assert!(Instant::now() < end, "nothing was ever written");
        file.read_exact_at(&mut bytes, MIDDLE.start as u64).unwrap();
        let mut blocks = bytes.chunks(4096);
        let is_written = |block: &[u8]| block.iter().any(|byte| *byte != 0xa5);
        if let Some(number) = blocks.position(is_written) {
            break number * 4096;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let file = OpenOptions::new().write(true).open(target).unwrap();
    let damaged_at = (MIDDLE.start + damaged) as u64;
    file.write_all_at(&[bytes[damaged] ^ 1], damaged_at)
        .unwrap();
    wait(&program, child)
        .expect(4)
        .says("4.0 KiB (4096 bytes) differ")
        .says(&damaged_at.to_string());
    assert_no_signature(target);
}
