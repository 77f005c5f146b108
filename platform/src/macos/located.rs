//! Looking a path up. There are no descriptors that are good for nothing else: what was found is opened
//! again by name, and must be the same then.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::device::node_to_open;
use super::node::block_node;

/// Where a path leads.
pub(crate) struct LookedUp {
    /// The folder of its last component.
    pub(crate) folder: File,
    /// Its last component, links followed.
    pub(crate) name: OsString,
    pub(crate) found: Option<Found>,
}

/// What was found there.
#[derive(Debug)]
pub(crate) struct Found {
    path: PathBuf,
    metadata: Metadata,
}

impl Found {
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        Ok(self.metadata.clone())
    }

    pub(crate) fn open(&self, options: &OpenOptions) -> io::Result<File> {
        let now = std::fs::symlink_metadata(&self.path)?;
        let file = options.open(node_to_open(&self.path))?;
        let opened = file.metadata()?;
        let identity = |metadata: &Metadata| (metadata.dev(), metadata.ino(), metadata.rdev());
        // Of a disk the character device was opened, which has the same number.
        let is_same = match opened.is_file() {
            true => identity(&opened) == identity(&self.metadata),
            false => identity(&now) == identity(&self.metadata) && opened.rdev() == now.rdev(),
        };
        match is_same {
            true => Ok(file),
            false => Err(io::Error::other(
                "it was replaced by something else meanwhile",
            )),
        }
    }
}

/// The name by which the kernel knows an open file of ours. It cannot be opened again by it.
pub(crate) fn node_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd()))
}

/// The path of an open folder just now.
pub(crate) fn path_of(file: &File) -> io::Result<PathBuf> {
    let mut path = PathBuf::new();
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETPATH(&mut path))?;
    Ok(path)
}

/// Looks a folder up.
pub(crate) fn open_folder(path: &Path) -> io::Result<File> {
    File::open(std::fs::canonicalize(path)?)
}

/// Looks a path up.
pub(crate) fn look_up(path: &Path) -> io::Result<LookedUp> {
    let (resolved, found) = match std::fs::canonicalize(path) {
        Ok(resolved) => {
            let path = block_node(resolved);
            let metadata = std::fs::metadata(&path)?;
            (path.clone(), Some(Found { path, metadata }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let name = path.file_name().ok_or(io::ErrorKind::NotFound)?;
            let folder = match path.parent() {
                Some(folder) if folder != Path::new("") => folder,
                _ => Path::new("."),
            };
            (std::fs::canonicalize(folder)?.join(name), None)
        }
        Err(error) => return Err(error),
    };
    Ok(LookedUp {
        folder: File::open(resolved.parent().unwrap_or(&resolved))?,
        name: resolved.file_name().unwrap_or(".".as_ref()).to_owned(),
        found,
    })
}
