//! The scratch volume of the demonstration: made in a folder of its own, and taken down whatever
//! happens.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use holdstill_platform::command::{Output, Tool};

use super::ledger::{self, Verdict};
use crate::error::{Error, IoContext, Kind, Result};

/// Size of the volume in bytes: a sparse file.
const SIZE: u64 = 512 << 20;

/// Where scratch volumes are made: in memory where there is such a place.
const FOLDERS: [&str; 2] = ["/dev/shm", "/var/tmp"];

/// The scratch volume, mounted.
#[derive(Debug)]
pub(super) struct Scene {
    // Dropped in this order: the mount must go before the folder it lies in.
    volume: Mounted,
    folder: Folder,
}

/// The scene's own folder, removed with all that is in it when dropped.
#[derive(Debug)]
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// A filesystem in a file, mounted through a loop device. Unmounted when dropped; the loop device
/// goes with the mount.
#[derive(Debug)]
struct Mounted {
    point: PathBuf,
    device: String,
}

fn tool(name: &str, args: &[&str]) -> Result<Output> {
    Tool::find(name)
        .and_then(|tool| tool.args(args).run())
        .and_then(Output::checked)
        .map_err(|error| {
            Error::new(Kind::Tool, format!("the demonstration needs `{name}`")).because(error)
        })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::new(Kind::Failed, "an odd path").on(path))
}

impl Mounted {
    fn new(file: &Path, point: &Path) -> Result<Self> {
        std::fs::create_dir_all(point).context("cannot create", point)?;
        tool(
            "mount",
            &["-t", "ext4", "-o", "loop", text(file)?, text(point)?],
        )?;
        let mut mounted = Self {
            point: point.to_owned(),
            device: String::new(),
        };
        let found = tool("findmnt", &["-n", "-o", "SOURCE", text(point)?])?;
        String::from_utf8_lossy(&found.stdout)
            .trim()
            .clone_into(&mut mounted.device);
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = text(&self.point).and_then(|point| tool("umount", &[point])) {
            log::warn!("{error}");
        }
    }
}

impl Scene {
    pub(super) fn set_up(run_id: &str) -> Result<Self> {
        let parent = FOLDERS.iter().map(Path::new).find(|folder| folder.is_dir());
        let path = parent
            .unwrap_or(Path::new("/tmp"))
            .join(format!("holdstill-demo-{run_id}"));
        std::fs::create_dir(&path).context("cannot create", &path)?;
        let folder = Folder(path);
        let file = folder.0.join("volume.raw");
        let volume = File::create_new(&file).context("cannot create", &file)?;
        volume.set_len(SIZE).context("cannot size", &file)?;
        let needs = "the demonstration mounts a scratch volume: it needs root, e2fsprogs and mount";
        tool("mkfs.ext4", &["-q", "-F", text(&file)?]).map_err(|error| error.hint(needs))?;
        let volume =
            Mounted::new(&file, &folder.0.join("live")).map_err(|error| error.hint(needs))?;
        Ok(Self { volume, folder })
    }

    /// The device of the volume.
    pub(super) fn device(&self) -> &str {
        &self.volume.device
    }

    /// Where the volume is mounted.
    pub(super) fn live(&self) -> &Path {
        &self.volume.point
    }

    /// A path in the scene's own folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.0.join(name)
    }

    /// Copies the device from its first byte to its last, as `dd` does.
    pub(super) fn plain_copy(&self) -> Result<PathBuf> {
        let path = self.path("plain.raw");
        let copy = File::create_new(&path).context("cannot create", &path)?;
        let mut device = File::open(self.device()).context("cannot open", self.device())?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let got = device
                .read(&mut buffer)
                .context("cannot read", self.device())?;
            if got == 0 {
                return Ok(path);
            }
            copy.write_all_at(&buffer[..got], at)
                .context("cannot write", &path)?;
            at += got as u64;
        }
    }

    /// Mounts a copy and judges what the program would find there.
    pub(super) fn judge(&self, copy: &Path) -> Result<Verdict> {
        let unreadable = |error: Error| Verdict::Unreadable {
            why: error.to_string(),
        };
        let mounted = match Mounted::new(copy, &self.path("look")) {
            Ok(mounted) => mounted,
            Err(error) => return Ok(unreadable(error)),
        };
        Ok(ledger::judge(&mounted.point.join("ledger")).unwrap_or_else(unreadable))
    }
}
