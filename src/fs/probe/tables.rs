//! Partition tables.
//!
//! Source: the UEFI specification, chapter 5.

use super::{Info, Kind, Matcher, Volume, only};
use crate::units::{ByteLen, SECTOR};

pub(super) const GPT: &[Matcher] = &[gpt];

/// A GUID partition table: its header is in the second sector, and its checksum holds.
fn gpt(volume: &Volume) -> Option<Info> {
    const MIN_HEADER: usize = 92;
    const CRC: usize = 16;
    [512usize, 1024, 2048, 4096].into_iter().find_map(|sector| {
        volume.has(sector, b"EFI PART").then_some(())?;
        let size = usize::try_from(volume.le32(sector + 12)?).ok()?;
        let header = volume.head.get(sector..sector.checked_add(size)?)?;
        (MIN_HEADER..=sector).contains(&size).then_some(())?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..CRC]);
        crc.update(&[0; 4]);
        crc.update(&header[CRC + 4..]);
        (crc.finalize() == volume.le32(sector + CRC)?).then(|| Info {
            uuid: volume
                .bytes(sector + 56)
                .map(|guid| uuid::Uuid::from_bytes_le(guid).to_string()),
            block_size: u32::try_from(sector).unwrap_or(0),
            ..whole_disk(volume)
        })
    })
}

/// An MBR: at least one entry, and all of them plausible. Also the protective one before a GPT
/// whose header is damaged.
pub(super) fn mbr(volume: &Volume) -> Option<Info> {
    const ENTRIES: usize = 446;
    const ENTRY: usize = 16;
    volume.has(510, &[0x55, 0xaa]).then_some(())?;
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for at in (ENTRIES..510).step_by(ENTRY) {
        let (active, kind) = (volume.u8(at)?, volume.u8(at + 4)?);
        let start = u64::from(volume.le32(at + 8)?);
        let end = start + u64::from(volume.le32(at + 12)?);
        if kind == 0 {
            continue;
        }
        let overlaps = taken
            .iter()
            .any(|&(first, last)| start < last && first < end);
        let is_inside = kind == 0xee || end.saturating_mul(SECTOR) <= volume.len.0;
        if !matches!(active, 0 | 0x80) || start == 0 || end == start || overlaps || !is_inside {
            return None;
        }
        taken.push((start, end));
    }
    (!taken.is_empty()).then(|| Info {
        uuid: volume
            .le32(440)
            .filter(|&id| id != 0)
            .map(|id| format!("{id:08x}")),
        block_size: 512,
        ..whole_disk(volume)
    })
}

fn whole_disk(volume: &Volume) -> Info {
    Info {
        size: ByteLen(volume.len.0),
        ..only(Kind::PartitionTable)
    }
}
