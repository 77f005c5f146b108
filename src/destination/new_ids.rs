//! `--new-ids`: a copy of a filesystem gets a UUID of its own, so that it may be on one machine with
//! the original.
//!
//! It is put in place before a target's first MiB is written, as the last change but that one: the
//! old UUID is never to be seen on the target, and an end before leaves no signature.

use uuid::Uuid;

use crate::destination::Target;
use crate::error::{Error, Kind, Result};
use crate::fs;
use crate::fs::btrfs::renew::{self, Identity};
use crate::pipeline::receive::Receive;

/// Refuses what no new UUID can be given to. `fs` is the name of the filesystem, if one is known, and
/// `what` that of the volume.
///
/// # Errors
/// [`Kind::NotApplicable`].
pub(crate) fn refuse_others(fs: Option<&str>, what: &str) -> Result<()> {
    if fs == Some(fs::Kind::Btrfs.name()) {
        return Ok(());
    }
    let found = fs.unwrap_or("no known filesystem");
    let message = format!("new ids can be given to btrfs only, and {what} is {found}");
    Err(Error::new(Kind::NotApplicable, message).hint("leave out --new-ids"))
}

/// Gives the filesystem on `target`, which is written but not finished, the UUID `new`. With `compare`,
/// what was written for it is read back; what is held back is compared when the target is finished.
///
/// # Errors
/// [`Kind::NotApplicable`] if it cannot be changed; [`Kind::Mismatch`]; else what the device says.
pub(crate) fn give(target: &Target, new: Uuid, compare: bool) -> Result<()> {
    let old = Identity::of(target).map_err(|error| error.on(target.path()))?;
    let new = Identity { fsid: new, ..old };
    give_identity(target, &new, compare)
}

/// The same of its whole identity.
///
/// # Errors
/// As [`give`].
pub(crate) fn give_identity(target: &Target, new: &Identity, compare: bool) -> Result<()> {
    let renewed = renew::renewed(target, new).map_err(|error| error.on(target.path()))?;
    for (offset, bytes) in &renewed {
        target.write(*offset, bytes)?;
    }
    if compare {
        /// Of a target there is one volume.
        const VOLUME: u32 = 1;
        let comparison = target.comparison(VOLUME)?;
        for (offset, bytes) in &renewed {
            comparison.data(VOLUME, *offset, bytes)?;
        }
        comparison.finish()?;
    }
    Ok(())
}

/// How to say it in a plan.
pub(crate) fn note(new: Uuid) -> String {
    format!("with the new UUID {new}")
}
