//! How full a snapshot's copy-on-write store is, by the kernel's status line
//! (Documentation/admin-guide/device-mapper/snapshot.rst).

use crate::error::{Error, Result};
use crate::node::DeviceNumber;

/// How full the copy-on-write store of a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// In sectors of 512 bytes.
    Used {
        /// What is taken.
        sectors: u64,
        /// Of how many.
        of: u64,
    },
    /// It overflowed, or its store failed: what it held is lost.
    Lost,
}

/// Asks the kernel how full a snapshot is. Needs no tool, and takes no time.
///
/// # Errors
/// If the device is gone or is no snapshot.
pub fn fill(snapshot: DeviceNumber) -> Result<Fill> {
    let status = super::status(snapshot)?;
    let parsed = match &status.targets[..] {
        [target] if target.kind == "snapshot" => parse_fill(&target.params),
        _ => None,
    };
    parsed
        .ok_or_else(|| Error::invalid("cannot understand", "the snapshot's status", "no snapshot"))
}

/// `USED/TOTAL METADATA`, or a word (drivers/md/dm-snap.c: `snapshot_status`).
fn parse_fill(status: &str) -> Option<Fill> {
    let Some((used, rest)) = status.split_once('/') else {
        return (!status.is_empty()).then_some(Fill::Lost);
    };
    Some(Fill::Used {
        sectors: used.parse().ok()?,
        of: rest.split(' ').next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines_are_read() {
        assert_eq!(
            parse_fill("16/8192 16"),
            Some(Fill::Used {
                sectors: 16,
                of: 8192
            })
        );
        for lost in ["Invalid", "Overflow", "Merge failed", "Unknown"] {
            assert_eq!(parse_fill(lost), Some(Fill::Lost));
        }
        assert_eq!(parse_fill(""), None);
        assert_eq!(parse_fill("a/b 1"), None);
    }
}
