//! What holds other volumes, or memory.
//!
//! Sources: the kernel's `include/uapi/linux/raid/md_p.h`, `include/linux/swap.h`,
//! `drivers/md/bcache/bcache_ondisk.h`; the LUKS1 and LUKS2 on-disk formats; LVM2's
//! `lib/format_text/layout.h`; the ZFS on-disk specification.

use super::{Info, Kind, Matcher, Volume, blocks, only};
use crate::units::SECTOR;

pub(super) const ALL: &[Matcher] = &[
    md, md_at_end, bcache, bcachefs, lvm2, luks, bit_locker, zfs, swap,
];

const MD_MAGIC: [u8; 4] = 0xa92b_4efc_u32.to_le_bytes();

/// md, versions 1.1 and 1.2: at the start, or 4 KiB behind it.
pub(super) fn md(volume: &Volume) -> Option<Info> {
    let at = [0, 4096]
        .into_iter()
        .find(|&at| volume.has(at, &MD_MAGIC) && volume.le32(at + 4) == Some(1))?;
    Some(Info {
        uuid: volume.uuid(at + 16),
        label: volume.text(at + 32, 32),
        ..only(Kind::MdRaidMember)
    })
}

/// md, versions 1.0 and 0.90: near the end.
fn md_at_end(volume: &Volume) -> Option<Info> {
    let tail_start = volume.len.0 - volume.tail.len() as u64;
    let at = |offset: u64| {
        let from = usize::try_from(offset.checked_sub(tail_start)?).ok()?;
        let bytes = volume.tail.get(from..)?;
        bytes.starts_with(&MD_MAGIC).then_some(bytes)
    };
    let sectors = volume.len.0 / SECTOR;
    let v1 = (sectors.checked_sub(16)? & !7) * SECTOR;
    let v0 = (volume.len.0 & !0xffff).checked_sub(0x1_0000)?;
    // Version 1 notes its own place: a partition at the end of a disk does not make the disk one.
    let is_v1 = at(v1).and_then(|bytes| bytes.get(144..152)?.first_chunk().copied())
        == Some((v1 / SECTOR).to_le_bytes());
    (is_v1 || at(v0).is_some()).then(|| only(Kind::MdRaidMember))
}

/// Where the superblocks of bcache and bcachefs have their magics.
const BCACHE_MAGIC_OFFSET: usize = 4096 + 24;

fn bcache(volume: &Volume) -> Option<Info> {
    let magic = 0xc685_73f6_4e1a_45ca_8265_f57f_48ba_6d81_u128.to_be_bytes();
    // Old bcachefs has the same magic, and versions from 10 on.
    let version = volume.le64(4096 + 16)?;
    (volume.has(BCACHE_MAGIC_OFFSET, &magic) && version < 10).then(|| Info {
        uuid: volume.uuid(4096 + 40),
        ..only(Kind::Bcache)
    })
}

fn bcachefs(volume: &Volume) -> Option<Info> {
    let old = 0xc685_73f6_4e1a_45ca_8265_f57f_48ba_6d81_u128.to_be_bytes();
    let new = 0xc685_73f6_66ce_90a9_d96a_60cf_803d_f7ef_u128.to_be_bytes();
    let is_old = volume.has(BCACHE_MAGIC_OFFSET, &old) && volume.le64(4096 + 16)? >= 10;
    (is_old || volume.has(BCACHE_MAGIC_OFFSET, &new)).then(|| only(Kind::Bcachefs))
}

/// A physical volume of LVM2: a label in one of the first four sectors.
fn lvm2(volume: &Volume) -> Option<Info> {
    let at = [0, 512, 1024, 1536]
        .into_iter()
        .find(|&at| volume.has(at, b"LABELONE") && volume.has(at + 24, b"LVM2 001"))?;
    let header = usize::try_from(volume.le32(at + 20)?).ok()?;
    let id = volume.bytes::<32>(at.checked_add(header)?)?;
    let id = id
        .is_ascii()
        .then(|| String::from_utf8_lossy(&id).into_owned());
    let uuid = id.map(|id| {
        let mut rest = id.as_str();
        let groups = [6, 4, 4, 4, 4, 4, 6].map(|len| {
            let (group, behind) = rest.split_at(len);
            rest = behind;
            group
        });
        groups.join("-")
    });
    Some(Info {
        uuid,
        ..only(Kind::Lvm2Member)
    })
}

fn luks(volume: &Volume) -> Option<Info> {
    let version = volume.be16(6)?;
    (volume.has(0, b"LUKS\xba\xbe") && matches!(version, 1 | 2)).then(|| Info {
        uuid: volume.text(168, 40),
        label: if version == 2 {
            volume.text(24, 48)
        } else {
            None
        },
        ..only(Kind::Luks)
    })
}

fn bit_locker(volume: &Volume) -> Option<Info> {
    volume.has(3, b"-FVE-FS-").then(|| only(Kind::BitLocker))
}

/// A vdev: several uberblocks in the second half of its first label.
fn zfs(volume: &Volume) -> Option<Info> {
    const MAGIC: u64 = 0x00ba_b10c;
    let uberblocks = (128 << 10..256 << 10)
        .step_by(1024)
        .filter(|&at| volume.le64(at) == Some(MAGIC) || volume.be64(at) == Some(MAGIC))
        .count();
    (uberblocks >= 4).then(|| only(Kind::ZfsMember))
}

/// Swap space, its magic at the end of the first page, whatever the page's size.
fn swap(volume: &Volume) -> Option<Info> {
    const HIBERNATED: &[&[u8]] = &[
        b"S1SUSPEND",
        b"S2SUSPEND",
        b"ULSUSPEND",
        b"LINHIB0001",
        b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",
    ];
    [4096u32, 8192, 16384, 32768, 65536]
        .into_iter()
        .find_map(|page| {
            let at = page as usize - 10;
            let kind = if volume.has(at, b"SWAPSPACE2") || volume.has(at, b"SWAP-SPACE") {
                Kind::Swap
            } else if HIBERNATED.iter().any(|magic| volume.has(at, magic)) {
                Kind::Hibernation
            } else {
                return None;
            };
            Some(Info {
                kind,
                uuid: volume.uuid(1024 + 12),
                label: volume.text(1024 + 28, 16),
                block_size: page,
                size: blocks(u64::from(volume.le32(1024 + 4)?) + 1, page),
            })
        })
}
