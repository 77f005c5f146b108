//! When and where a filesystem was last used, by what it notes itself: for people who are about to overwrite it.

use jiff::Timestamp;

use super::{Info, Kind, probe};
use crate::read_at::ReadAt;
use crate::units::Offset;

/// What a filesystem notes of its last use. Text is as on disk: escape it before showing it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastUse {
    /// Where it was last mounted.
    pub mounted_at: Option<String>,
    /// When that was.
    pub mounted: Option<Timestamp>,
    /// When it was last written to.
    pub written: Option<Timestamp>,
}

/// Reads what the filesystem `info` on `source` notes of its last use: ext2, ext3 and ext4 do.
pub fn last_use(source: &dyn ReadAt, info: &Info) -> LastUse {
    match info.kind {
        Kind::Ext2 | Kind::Ext3 | Kind::Ext4 => of_ext(source).unwrap_or_default(),
        _ => LastUse::default(),
    }
}

/// By the kernel's `fs/ext4/ext4.h`: 32 bits of seconds, and 8 more in another place.
fn of_ext(source: &dyn ReadAt) -> Option<LastUse> {
    const SUPERBLOCK: Offset = Offset(1024);
    const LAST_MOUNTED: std::ops::Range<usize> = 0x88..0xc8;
    let mut bytes = [0; 1024];
    source.read_exact_at(&mut bytes, SUPERBLOCK).ok()?;
    let time = |low: usize, high: usize| {
        let low = bytes[low..]
            .first_chunk()
            .copied()
            .map(u32::from_le_bytes)?;
        let seconds = i64::from(low) | i64::from(bytes[high]) << 32;
        Timestamp::from_second(seconds)
            .ok()
            .filter(|_| seconds != 0)
    };
    Some(LastUse {
        mounted_at: probe::text(&bytes[LAST_MOUNTED]),
        mounted: time(0x2c, 0x275),
        written: time(0x30, 0x274),
    })
}
