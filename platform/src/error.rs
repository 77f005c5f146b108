//! One error for this crate: which step failed, on what, and what the kernel said.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// `Result` with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

/// A step that the operating system refused.
#[derive(Debug)]
pub struct Error {
    /// What was tried, as the start of a sentence: "cannot open".
    pub op: &'static str,
    /// The device, file or tool it was tried on.
    pub what: PathBuf,
    /// What the kernel said. `Other` with a text where it was this crate that refused.
    pub source: io::Error,
}

impl Error {
    /// `op` failed on `what` because of `source`.
    pub fn new(op: &'static str, what: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self {
            op,
            what: what.as_ref().to_owned(),
            source: source.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.op, self.what.display(), self.source)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}
