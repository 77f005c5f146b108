//! Data is read from the copy that is right.

use std::ops::Range;

use crate::error::{Error, Kind, Result};
use crate::fs::btrfs::chunks::damaged;
use crate::fs::btrfs::sums::Sums;
use crate::fs::btrfs::tree::Reader;

/// Reads a run of whole sectors within a chunk from copy number `first`, and what cannot be read there, or
/// has a wrong checksum, from the other copies. Returns how many sectors came from another one.
///
/// # Errors
/// [`Kind::Io`] if a sector is right in no copy.
pub(super) fn read(
    reader: &Reader<'_>,
    first: usize,
    logical: &Range<u64>,
    sums: &Sums,
    bytes: &mut [u8],
) -> Result<u64> {
    let start = logical.start;
    let nowhere = || damaged(format!("the data at logical {start} is in no chunk"));
    let (_, chunk) = reader.chunks.find(start).ok_or_else(nowhere)?;
    let whole = reader.devices.read(chunk, first, logical.clone(), bytes);
    let is_read = match whole {
        Ok(()) if sums.wrong(bytes).next().is_none() => return Ok(0),
        Ok(()) => true,
        Err(error) if error.kind() == Kind::Io => false,
        Err(error) => return Err(error),
    };
    let sector = u64::from(reader.geometry.sector_size);
    let others = (0..chunk.copies()).filter(|copy| *copy != first);
    let copies: Vec<usize> = std::iter::once(first).chain(others).collect();
    let mut mended = 0;
    for (number, bytes) in bytes.chunks_mut(sector as usize).enumerate() {
        if is_read && sums.allows(number, bytes) {
            continue;
        }
        let at = start + number as u64 * sector;
        let mut trouble = None;
        let mut found = None;
        for copy in &copies {
            match reader.devices.read(chunk, *copy, at..at + sector, bytes) {
                Ok(()) if sums.allows(number, bytes) => {
                    found = Some(*copy);
                    break;
                }
                Ok(()) => {}
                Err(error) if error.kind() == Kind::Io => trouble = Some(error),
                Err(error) => return Err(error),
            }
        }
        match found {
            Some(copy) => mended += u64::from(copy != first),
            None => {
                let what = format!("no copy of the data at logical {at} is right");
                return Err(trouble.unwrap_or_else(|| Error::new(Kind::Io, what)));
            }
        }
    }
    Ok(mended)
}
