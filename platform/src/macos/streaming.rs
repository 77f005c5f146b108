//! What a tool says is kept in.

use std::fs::File;
use std::io;

use nix::unistd::{mkstemp, unlink};

/// A file without a name. There are none in memory that can be written like a file.
pub(crate) fn file_in_memory() -> io::Result<File> {
    let (file, path) = mkstemp("/tmp/holdstill.XXXXXX")?;
    unlink(&path)?;
    super::close_on_exec(&file)?;
    Ok(File::from(file))
}
