//! What is read and what is written must not be the same bytes, by whatever names: a loop device and the
//! file below it, a partition and its disk, a file and the standard output that was redirected to it.

use std::os::fd::AsFd;
use std::path::Path;

use holdstill_platform::extents_below::Extents;
use holdstill_platform::node::Node;

use crate::error::{Error, Kind, Result};

/// Refuses to write to `path`, the `role` of this run, if it has bytes of `what`.
///
/// # Errors
/// [`Kind::InUse`].
pub(crate) fn refuse_shared(
    role: &str,
    path: &Path,
    written: &Extents,
    what: &str,
    others: &Extents,
) -> Result<()> {
    let Some(medium) = written.common(others) else {
        return Ok(());
    };
    let message = format!("the {role} is {what} itself, or has bytes of it: both lie on {medium}");
    Err(Error::new(Kind::InUse, message)
        .on(path)
        .hint("name another one: holdstill never writes to what it reads"))
}

/// The same for a target that is not examined yet: else its users would be named, who are those of what is
/// read.
///
/// # Errors
/// [`Kind::InUse`].
pub(crate) fn refuse_as_target(path: &Path, others: &Extents, what: &str) -> Result<()> {
    match Node::of(path) {
        Ok(node) => refuse_shared("target", path, &Extents::of_node(&node)?, what, others),
        Err(_) => Ok(()),
    }
}

/// Refuses to go on if what this program prints goes to bytes of `what`.
///
/// # Errors
/// [`Kind::InUse`]; else if standard output or standard error cannot be examined.
pub(crate) fn refuse_printing_on(what: &str, others: &Extents) -> Result<()> {
    let [stdout, stderr] = [std::io::stdout().as_fd(), std::io::stderr().as_fd()]
        .map(|printed| printed.try_clone_to_owned());
    for (role, printed) in [("standard output", stdout), ("standard error", stderr)] {
        // One that is closed is written to by nobody.
        let Ok(printed) = printed else { continue };
        let written = Extents::of_open(printed)?;
        let path = Path::new("(redirected)");
        refuse_shared(role, path, &written, what, others)?;
    }
    Ok(())
}
