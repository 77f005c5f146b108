//! Filesystems. Where a magic is short, more of the superblock has to make sense.
//!
//! Sources: the kernel's header of each filesystem, ECMA-119 and ECMA-167, Microsoft's
//! specifications of FAT and exFAT, Apple's of HFS+ (TN1150) and APFS.

use super::{Info, Kind, Matcher, Volume, blocks, only};
use crate::fs::{apfs, btrfs, ext4, xfs};
use crate::units::ByteLen;

/// What is commonly made to look like a partitioned disk as well.
pub(super) const OPTICAL: &[Matcher] = &[udf, iso9660];

pub(super) const ALL: &[Matcher] = &[
    vfat, exfat, ntfs, ext, xfs, xfs_log, btrfs, f2fs, hfs_plus, hfs, apfs, squashfs, erofs, jfs,
    reiserfs, nilfs2, ocfs2, gfs2,
];

/// ext2, ext3, ext4 and their external journals. The borders between them are libblkid's.
fn ext(volume: &Volume) -> Option<Info> {
    use ext4::format as f;
    let bytes: [u8; size_of::<f::SuperBlock>()] = volume.bytes(f::SUPERBLOCK_OFFSET as usize)?;
    let superblock: f::SuperBlock = zerocopy::transmute!(bytes);
    if superblock.magic.get() != f::MAGIC {
        return None;
    }
    let ext2_ro = f::RO_COMPAT_SPARSE_SUPER | f::RO_COMPAT_LARGE_FILE | f::RO_COMPAT_BTREE_DIR;
    let ext3_incompat = f::INCOMPAT_FILETYPE | f::INCOMPAT_RECOVER | f::INCOMPAT_META_BG;
    let has_journal = superblock.compat() & f::COMPAT_HAS_JOURNAL != 0;
    let is_older =
        superblock.ro_compat() & !ext2_ro == 0 && superblock.incompat() & !ext3_incompat == 0;
    let kind = if superblock.incompat() & f::INCOMPAT_JOURNAL_DEV != 0 {
        Kind::ExtJournal
    } else if is_older && has_journal {
        Kind::Ext3
    } else if is_older && superblock.incompat() & f::INCOMPAT_RECOVER == 0 {
        Kind::Ext2
    } else {
        Kind::Ext4
    };
    let block_size = 1024u32
        .checked_shl(superblock.log_block_size.get())
        .unwrap_or(0);
    Some(Info {
        kind,
        label: super::text(&superblock.volume_name),
        uuid: super::uuid(&superblock.uuid),
        block_size,
        size: blocks(superblock.blocks_count(), block_size),
    })
}

fn xfs(volume: &Volume) -> Option<Info> {
    let bytes: [u8; size_of::<xfs::format::SuperBlock>()] = volume.bytes(0)?;
    let superblock: xfs::format::SuperBlock = zerocopy::transmute!(bytes);
    if superblock.magic.get() != xfs::format::SB_MAGIC {
        return None;
    }
    let block_size = superblock.block_size.get();
    Some(Info {
        kind: Kind::Xfs,
        label: super::text(&superblock.label),
        uuid: super::uuid(&superblock.uuid),
        block_size,
        size: blocks(superblock.data_blocks.get(), block_size),
    })
}

/// A log of version 1 or 2, written by Linux, and nothing else.
fn xfs_log(volume: &Volume) -> Option<Info> {
    let is_log = volume.be32(0)? == xfs::format::LOG_MAGIC
        && matches!(volume.be32(8)?, 1 | 2)
        && volume.be32(300)? == xfs::format::LOG_FORMAT_LINUX_LE;
    is_log.then(|| Info {
        uuid: volume.uuid(304),
        ..only(Kind::XfsLog)
    })
}

fn btrfs(volume: &Volume) -> Option<Info> {
    use btrfs::format as f;
    let bytes: [u8; size_of::<f::SuperBlock>()] = volume.bytes(f::SUPER_OFFSETS[0] as usize)?;
    let superblock: f::SuperBlock = zerocopy::transmute!(bytes);
    (superblock.magic == f::MAGIC).then(|| Info {
        kind: Kind::Btrfs,
        label: super::text(&superblock.label),
        uuid: super::uuid(&superblock.fsid),
        block_size: superblock.sector_size.get(),
        // Of this device, not of all the filesystem may have.
        size: ByteLen(superblock.dev_item.total_bytes.get()),
    })
}

fn f2fs(volume: &Volume) -> Option<Info> {
    const AT: usize = 1024;
    (volume.le32(AT)? == 0xf2f5_2010).then_some(())?;
    let block_size = 1u32.checked_shl(volume.le32(AT + 16)?).unwrap_or(0);
    let label: Vec<u16> = volume
        .head
        .get(AT + 124..AT + 124 + 1024)?
        .chunks_exact(2)
        .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
        .take_while(|&unit| unit != 0)
        .collect();
    Some(Info {
        kind: Kind::F2fs,
        label: super::text(String::from_utf16_lossy(&label).as_bytes()),
        uuid: volume.uuid(AT + 108),
        block_size,
        size: blocks(volume.le64(AT + 36)?, block_size),
    })
}

/// FAT12, FAT16 or FAT32: the boot sector has to make sense.
fn vfat(volume: &Volume) -> Option<Info> {
    let sector_size = volume.le16(11)?;
    let cluster_sectors = volume.u8(13)?;
    let is_fat = volume.has(510, &[0x55, 0xaa])
        && matches!(volume.u8(0)?, 0xeb | 0xe9)
        && sector_size.is_power_of_two()
        && (512..=4096).contains(&sector_size)
        && cluster_sectors.is_power_of_two()
        && volume.le16(14)? > 0
        && (1..=2).contains(&volume.u8(16)?)
        && matches!(volume.u8(21)?, 0xf0 | 0xf8..);
    is_fat.then_some(())?;
    let few = volume.le16(19)?;
    let sectors = if few > 0 {
        u32::from(few)
    } else {
        volume.le32(32)?
    };
    let is_fat32 = volume.le16(22)? == 0 && volume.le32(36)? > 0;
    (sectors > 0 && (is_fat32 || volume.le16(22)? > 0)).then_some(())?;
    let extended = if is_fat32 { 64 } else { 36 };
    let (serial, label) = match volume.u8(extended + 2)? {
        0x29 => (volume.le32(extended + 3), volume.text(extended + 7, 11)),
        0x28 => (volume.le32(extended + 3), None),
        _ => (None, None),
    };
    Some(Info {
        kind: Kind::Vfat,
        label: label.filter(|label| label != "NO NAME"),
        uuid: serial.map(short_serial),
        block_size: u32::from(sector_size),
        size: blocks(u64::from(sectors), u32::from(sector_size)),
    })
}

fn exfat(volume: &Volume) -> Option<Info> {
    volume.has(3, b"EXFAT   ").then_some(())?;
    let sector_size = 1u32.checked_shl(u32::from(volume.u8(108)?)).unwrap_or(0);
    Some(Info {
        kind: Kind::Exfat,
        label: None,
        uuid: Some(short_serial(volume.le32(100)?)),
        block_size: sector_size,
        size: blocks(volume.le64(72)?, sector_size),
    })
}

/// A FAT serial number as it is commonly written.
fn short_serial(serial: u32) -> String {
    format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff)
}

fn ntfs(volume: &Volume) -> Option<Info> {
    let sector_size = volume.le16(11)?;
    (volume.has(3, b"NTFS    ") && sector_size.is_power_of_two()).then_some(())?;
    // Powers of two above 128 KiB are written as negative exponents.
    let cluster_sectors = match volume.u8(13)? {
        exponent @ 0xe1.. => 1u32.checked_shl(256 - u32::from(exponent)).unwrap_or(0),
        sectors => u32::from(sectors),
    };
    Some(Info {
        kind: Kind::Ntfs,
        label: None,
        uuid: Some(format!("{:016X}", volume.le64(72)?)),
        block_size: cluster_sectors.saturating_mul(u32::from(sector_size)),
        size: blocks(volume.le64(40)?, u32::from(sector_size)),
    })
}

/// HFS+ and HFSX, also wrapped in an HFS volume.
fn hfs_plus(volume: &Volume) -> Option<Info> {
    const AT: usize = 1024;
    if volume.has(AT, b"BD") && volume.has(AT + 124, b"H+") {
        return Some(only(Kind::HfsPlus));
    }
    let version = volume.be16(AT + 2)?;
    let is_plus = volume.has(AT, b"H+") && version == 4 || volume.has(AT, b"HX") && version == 5;
    let block_size = volume.be32(AT + 40)?;
    (is_plus && block_size.is_power_of_two() && block_size >= 512).then(|| Info {
        kind: Kind::HfsPlus,
        label: None,
        uuid: None,
        block_size,
        size: blocks(volume.be32(AT + 44).map_or(0, u64::from), block_size),
    })
}

fn hfs(volume: &Volume) -> Option<Info> {
    const AT: usize = 1024;
    let block_size = volume.be32(AT + 20)?;
    let is_hfs = volume.has(AT, b"BD")
        && !volume.has(AT + 124, b"H+")
        && block_size > 0
        && block_size.is_multiple_of(512);
    is_hfs.then(|| Info {
        block_size,
        ..only(Kind::Hfs)
    })
}

fn apfs(volume: &Volume) -> Option<Info> {
    let bytes: [u8; size_of::<apfs::format::Superblock>()] = volume.bytes(0)?;
    let superblock: apfs::format::Superblock = zerocopy::transmute!(bytes);
    if superblock.magic.get() != apfs::format::NX_MAGIC {
        return None;
    }
    let block_size = superblock.block_size.get();
    Some(Info {
        kind: Kind::Apfs,
        label: None,
        uuid: super::uuid(&superblock.uuid),
        block_size,
        size: blocks(superblock.block_count.get(), block_size),
    })
}

/// Where the volume descriptors of optical media begin, and how far apart they are.
const DESCRIPTORS: usize = 32 << 10;
const DESCRIPTOR_SIZE: usize = 2048;

fn udf(volume: &Volume) -> Option<Info> {
    let is_udf = (0..16).any(|n| {
        let at = DESCRIPTORS + n * DESCRIPTOR_SIZE + 1;
        volume.has(at, b"NSR02") || volume.has(at, b"NSR03")
    });
    is_udf.then(|| only(Kind::Udf))
}

fn iso9660(volume: &Volume) -> Option<Info> {
    volume.has(DESCRIPTORS + 1, b"CD001").then_some(())?;
    let block_size = u32::from(volume.le16(DESCRIPTORS + 128)?);
    Some(Info {
        kind: Kind::Iso9660,
        label: volume.text(DESCRIPTORS + 40, 32),
        uuid: None,
        block_size,
        size: blocks(u64::from(volume.le32(DESCRIPTORS + 80)?), block_size),
    })
}

fn squashfs(volume: &Volume) -> Option<Info> {
    volume.has(0, b"hsqs").then_some(())?;
    Some(Info {
        block_size: volume.le32(12)?,
        size: ByteLen(volume.le64(40)?),
        ..only(Kind::Squashfs)
    })
}

fn erofs(volume: &Volume) -> Option<Info> {
    const AT: usize = 1024;
    (volume.le32(AT)? == 0xe0f5_e1e2).then_some(())?;
    let block_size = 1u32
        .checked_shl(u32::from(volume.u8(AT + 12)?))
        .unwrap_or(0);
    Some(Info {
        kind: Kind::Erofs,
        label: volume.text(AT + 64, 16),
        uuid: volume.uuid(AT + 48),
        block_size,
        size: blocks(volume.le32(AT + 36).map_or(0, u64::from), block_size),
    })
}

fn jfs(volume: &Volume) -> Option<Info> {
    volume.has(32 << 10, b"JFS1").then(|| only(Kind::Jfs))
}

fn reiserfs(volume: &Volume) -> Option<Info> {
    let is_reiser = [8 << 10, 64 << 10].into_iter().any(|at| {
        let magics: [&[u8]; 3] = [b"ReIsErFs", b"ReIsEr2Fs", b"ReIsEr3Fs"];
        magics.iter().any(|magic| volume.has(at + 52, magic))
    });
    is_reiser.then(|| only(Kind::Reiserfs))
}

fn nilfs2(volume: &Volume) -> Option<Info> {
    const AT: usize = 1024;
    let is_nilfs = volume.le16(AT + 6)? == 0x3434 && volume.le32(AT)? == 2;
    is_nilfs.then(|| only(Kind::Nilfs2))
}

fn ocfs2(volume: &Volume) -> Option<Info> {
    let at = [1024, 2048, 4096, 8192];
    at.into_iter()
        .any(|at| volume.has(at, b"OCFSV2"))
        .then(|| only(Kind::Ocfs2))
}

fn gfs2(volume: &Volume) -> Option<Info> {
    const AT: usize = 64 << 10;
    (volume.be32(AT)? == 0x0116_1970 && volume.be32(AT + 4)? == 1).then(|| only(Kind::Gfs2))
}
