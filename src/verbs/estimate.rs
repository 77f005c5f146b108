//! How much a run will copy, and whether there is room for it: about, and before anything is frozen.

use std::path::Path;

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::room::Room;

use crate::error::Result;
use crate::freeze::survey::Survey;
use crate::source::Source;
use crate::units::ByteLen;

/// About how many bytes of a source are in use: what its mounted filesystem says or, of one that is not
/// mounted, its map. `None` if that cannot be told.
pub(super) fn used_bytes(source: &Source) -> Option<ByteLen> {
    if let Some(mount) = &source.mount {
        let room = Room::at(&mount.point).ok()?;
        let size = source.geometry().ok()?.size;
        // A btrfs has other devices and copies of its own.
        return Some(ByteLen(match mount.fs_type.as_str() {
            "btrfs" => room.used,
            _ => size.saturating_sub(room.unused),
        }));
    }
    let disk = Disk::open(&source.path, Access::Read).ok()?;
    let survey = Survey::of_offline(&disk, &[], false);
    survey.ok().map(|survey| survey.bytes)
}

/// How many bytes can still be written to where `path` is or will be.
///
/// # Errors
/// If its folder cannot be examined.
pub(super) fn free_bytes(path: &Path) -> Result<ByteLen> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    Ok(ByteLen(Room::at(folder)?.free))
}

/// What to say where a file may not find room.
pub(super) fn shortage(path: &Path, most: ByteLen, free: ByteLen) -> Option<String> {
    (most > free).then(|| {
        let name = path.display();
        format!("up to {most} may be written to {name}, and {free} are free there: it may not fit")
    })
}
