//! What the content of a volume needs of the device it lies on: sectors that are not too large, and room.
//!
//! A kernel addresses a device in its logical sectors. A filesystem whose smallest unit is smaller than that
//! cannot be mounted there, and a partition table counts in the sectors of the disk it was made on.

use super::{Info, Kind, probe};
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// What a volume needs of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The unit its content counts in, in bytes: the logical sector of a device must not be larger. `None`
    /// where that is not known.
    pub sector: Option<u32>,
    /// Bytes of the smallest device that holds all of it.
    pub smallest: ByteLen,
    /// Bytes of the largest device on which it is still found, where there is such a bound: something of
    /// it lies at the very end.
    pub largest: Option<ByteLen>,
}

/// So much behind the end of a filesystem is looked at: whether it is zeros, which a smaller device need
/// not have. More is taken as needed.
const LONGEST_TAIL: u64 = 4 << 20;

impl Needs {
    /// What is known of a volume of which nothing is recognized.
    pub fn unknown(size: ByteLen) -> Self {
        Self {
            sector: None,
            smallest: size,
            largest: None,
        }
    }

    /// What the content of a device with logical sectors of `logical_sector` bytes needs. What cannot be read
    /// counts as not known.
    pub fn of(source: &dyn ReadAt, logical_sector: u32) -> Self {
        let size = source.len();
        let Ok(signatures) = probe::signatures(source) else {
            return Self::unknown(size);
        };
        let sectors = signatures.found.iter().map(|info| match info.kind {
            // A GPT says it by its place, an MBR does not say it.
            Kind::PartitionTable if !has_gpt(source, info) => Some(logical_sector),
            Kind::PartitionTable => Some(info.block_size),
            _ => sector(source, info),
        });
        let sector = sectors.flatten().filter(|bytes| *bytes > 0).min();
        let [info] = signatures.found.as_slice() else {
            // Which of them counts is not certain.
            return Self {
                sector,
                ..Self::unknown(size)
            };
        };
        let end = end(source, info).filter(|end| *end <= size);
        let is_partial = signatures.is_partial;
        let end = end.filter(|end| !is_partial && is_zero_behind(source, *end));
        Self {
            sector,
            smallest: end.unwrap_or(size),
            largest: is_bound_to_end(source, info).then_some(size),
        }
    }
}

/// Where the only filesystem that is recognized on `source` ends by what it says, even past the end of
/// `source`; `None` if nothing is recognized, `Some(None)` if it does not say.
pub fn end_of_content(source: &dyn ReadAt) -> Option<Option<ByteLen>> {
    let found = probe::signatures(source).ok()?.found;
    match found.as_slice() {
        [] => None,
        [info] => Some(end(source, info)),
        _ => Some(None),
    }
}

fn le16(source: &dyn ReadAt, at: u64) -> Option<u16> {
    let mut bytes = [0; 2];
    source.read_exact_at(&mut bytes, Offset(at)).ok()?;
    Some(u16::from_le_bytes(bytes))
}

fn has_gpt(source: &dyn ReadAt, info: &Info) -> bool {
    let mut magic = [0; 8];
    let at = Offset(u64::from(info.block_size));
    source.read_exact_at(&mut magic, at).is_ok() && magic == *b"EFI PART"
}

/// The smallest unit a filesystem is addressed in.
fn sector(source: &dyn ReadAt, info: &Info) -> Option<u32> {
    /// Where the superblock of XFS has the size of its sectors, big-endian.
    const XFS_SECTOR_SIZE: u64 = 102;
    match info.kind {
        Kind::Xfs => le16(source, XFS_SECTOR_SIZE).map(|bytes| u32::from(bytes.swap_bytes())),
        Kind::Squashfs => None,
        _ => Some(info.block_size).filter(|bytes| bytes.is_power_of_two()),
    }
}

/// Where the filesystem ends by what it says of itself; `None` where that is not known, or where something
/// must lie at the end of the device.
fn end(source: &dyn ReadAt, info: &Info) -> Option<ByteLen> {
    let size = match info.kind {
        // The copy of its boot sector is behind the sectors that it counts.
        Kind::Ntfs => {
            let sector = u64::from(le16(source, 11)?);
            ByteLen(info.size.0.checked_add(sector)?)
        }
        Kind::Ext2
        | Kind::Ext3
        | Kind::Ext4
        | Kind::Xfs
        | Kind::Btrfs
        | Kind::F2fs
        | Kind::Vfat
        | Kind::Exfat
        | Kind::Apfs
        | Kind::Swap => info.size,
        _ => return None,
    };
    (info.size > ByteLen::ZERO).then_some(size)
}

/// Whether part of it is looked for at the end of the device: the second header of HFS+, the superblock of
/// an md array of the older versions.
fn is_bound_to_end(source: &dyn ReadAt, info: &Info) -> bool {
    match info.kind {
        Kind::HfsPlus | Kind::Hfs => true,
        Kind::MdRaidMember => !probe::is_md_at_start(source),
        _ => false,
    }
}

/// Whether only zeros, and few of them, lie behind `end`.
fn is_zero_behind(source: &dyn ReadAt, end: ByteLen) -> bool {
    let len = source.len() - end;
    len.0 <= LONGEST_TAIL
        && source
            .read_vec_at(Offset(end.0), len)
            .is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1 << 20;

    /// An NTFS that counts all sectors of `volume` except so many at its end.
    fn ntfs(volume: &mut [u8], left_out: usize) {
        volume[3..11].copy_from_slice(b"NTFS    ");
        volume[11..13].copy_from_slice(&512u16.to_le_bytes());
        volume[13] = 8;
        let sectors = (volume.len() / 512 - left_out) as u64;
        volume[40..48].copy_from_slice(&sectors.to_le_bytes());
    }

    #[test]
    fn an_ntfs_needs_the_copy_of_its_boot_sector() {
        let mut volume = vec![0; SIZE];
        ntfs(&mut volume, 9);
        let needs = Needs::of(&volume, 512);
        assert_eq!(needs.smallest, ByteLen(SIZE as u64 - 8 * 512));
        assert_eq!(needs.sector, Some(4096));
        // What is not zero there may be something that matters.
        volume[SIZE - 1] = 1;
        assert_eq!(Needs::of(&volume, 512).smallest, ByteLen(SIZE as u64));
        volume[SIZE - 1] = 0;
        ntfs(&mut volume, 0);
        assert_eq!(Needs::of(&volume, 512).smallest, ByteLen(SIZE as u64));
    }

    #[test]
    fn an_hfs_plus_needs_a_device_of_exactly_its_size() {
        let mut volume = vec![0; SIZE];
        volume[1024..1028].copy_from_slice(&[b'H', b'+', 0, 4]);
        volume[1064..1068].copy_from_slice(&4096u32.to_be_bytes());
        volume[1068..1072].copy_from_slice(&100u32.to_be_bytes());
        let size = ByteLen(SIZE as u64);
        let expected = Needs {
            sector: Some(4096),
            smallest: size,
            largest: Some(size),
        };
        assert_eq!(Needs::of(&volume, 512), expected);
    }

    #[test]
    fn of_what_is_not_known_all_is_needed() {
        let volume = vec![0; SIZE];
        assert_eq!(
            Needs::of(&volume, 512),
            Needs::unknown(ByteLen(SIZE as u64))
        );
    }
}
