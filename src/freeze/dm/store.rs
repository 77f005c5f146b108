//! Where what is overwritten is kept: on a device that the user named, else in a file on a filesystem
//! that does not rest on the source, on disk or, where there is no better one, in memory.

use std::path::Path;

use holdstill_platform::cow_store::{CowStore, Place};
use holdstill_platform::node::BlockDevice;
use holdstill_platform::{lock, records};

use crate::error::{Error, Kind, Result};
use crate::freeze::CowRoom;
use crate::source::Source;
use crate::units::SECTOR;

/// Folders that a store can be in; the last two are memory on most machines.
const FOLDERS: [&str; 4] = ["/var/tmp", records::FOLDER, lock::FOLDER, "/dev/shm"];

/// It has whole chunks of so many bytes.
const CHUNK: u64 = 16 << 10;

/// It has at least this share of the source, or it would most likely overflow; and something, of a small
/// one.
const LEAST_SHARE: u64 = 100;
const LEAST: u64 = 1 << 20;

/// A store for the source.
pub(super) fn of(source: &Source, device: &BlockDevice, cow: &CowRoom) -> Result<CowStore> {
    if let Some(path) = &cow.device {
        if cow.size.is_some() {
            let what = "a device is taken whole: --cow-size is for a file";
            return Err(Error::new(Kind::Usage, what).on(path));
        }
        return CowStore::on_device(path, device).map_err(|error| match error.kind() {
            std::io::ErrorKind::ResourceBusy => Error::new(Kind::InUse, "this device is in use")
                .on(path)
                .because(error)
                .hint("--cow-device takes one that nobody uses; what is on it is lost"),
            std::io::ErrorKind::InvalidInput => {
                Error::new(Kind::NotApplicable, "it is no block device").on(path)
            }
            _ => error.into(),
        });
    }
    let mut places = Vec::new();
    for folder in FOLDERS {
        places.extend(Place::of(Path::new(folder), device)?);
    }
    let wanted = cow.size.map(|size| size.0);
    let Some((place, size)) = choose(&places, device.sectors * SECTOR, wanted) else {
        let what = match cow.size {
            Some(size) => format!("there is nowhere to keep {size} of what is overwritten"),
            None => "there is nowhere to keep what is overwritten".to_owned(),
        };
        return Err(Error::new(Kind::NotApplicable, what)
            .on(&source.path)
            .hint("--cow-device names a free device; else make room in /var/tmp"));
    };
    log::debug!(
        "{size} bytes in {} for what is overwritten",
        place.folder.display()
    );
    Ok(CowStore::at(place, size)?)
}

/// The place with the most room, and how much of it to take: as the user says, or all that the source
/// can need.
fn choose(places: &[Place], source: u64, wanted: Option<u64>) -> Option<(&Place, u64)> {
    let whole = source.next_multiple_of(CHUNK);
    // The first of those that have the same, or all that is needed.
    let useful = |place: &&Place| place.room.min(wanted.unwrap_or(whole));
    let place = places.iter().rev().max_by_key(useful)?;
    let least = match wanted {
        Some(size) => size,
        None => (source / LEAST_SHARE).max(LEAST).min(whole),
    };
    let size = useful(&place).next_multiple_of(CHUNK);
    (place.room >= least).then_some((place, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_with_the_most_room_is_taken() {
        let place = |folder: &str, room| Place::new(folder.into(), room);
        let places = [
            place("a", 10 << 20),
            place("b", 40 << 20),
            place("c", 30 << 20),
        ];
        let of = |source, wanted| {
            let chosen = choose(&places, source, wanted);
            chosen.map(|(place, size)| (place.folder.to_str().unwrap().to_owned(), size))
        };
        let some = |folder: &str, size| Some((folder.to_owned(), size));
        assert_eq!(of(1 << 30, None), some("b", 40 << 20));
        // Where all have enough, the first.
        assert_eq!(of((5 << 20) + 512, None), some("a", (5 << 20) + CHUNK));
        assert_eq!(of(1 << 30, Some(8 << 20)), some("a", 8 << 20));
        assert_eq!(
            of(1 << 30, Some((20 << 20) + 1)),
            some("b", (20 << 20) + CHUNK)
        );
        // Too little for so large a source, and for what the user wants.
        assert_eq!(of(8 << 30, None), None);
        assert_eq!(of(1 << 30, Some(41 << 20)), None);
        assert_eq!(choose(&[], 4096, None), None);
        assert_eq!(choose(&[place("a", CHUNK)], 4096, None).unwrap().1, CHUNK);
    }
}
