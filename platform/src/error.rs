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

    /// `op` failed on `what` for a reason this crate found: `why` says it in words.
    pub fn other(op: &'static str, what: impl AsRef<Path>, why: impl Into<String>) -> Self {
        Self::new(op, what, io::Error::other(why.into()))
    }

    /// The kernel said something about `what` that makes no sense.
    pub fn invalid(op: &'static str, what: impl AsRef<Path>, why: impl Into<String>) -> Self {
        let source = io::Error::new(io::ErrorKind::InvalidData, why.into());
        Self::new(op, what, source)
    }

    /// Whether it was a child program that failed.
    pub fn is_of_tool(&self) -> bool {
        self.op == crate::command::FAILED
    }

    /// The kind of the underlying error.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// The kernel's error number, where the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
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

/// Adds what was tried, and on what, to a failed system call.
pub(crate) trait Context<T> {
    /// Turns the failure into an [`Error`].
    fn context(self, op: &'static str, what: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, op: &'static str, what: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::new(op, what, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_where_and_why() {
        let failed: nix::Result<()> = Err(nix::errno::Errno::EBUSY);
        let error = failed.context("cannot open", "/dev/x").unwrap_err();
        assert_eq!(error.errno(), Some(libc::EBUSY));
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(error.to_string().starts_with("cannot open: /dev/x: "));
    }
}
