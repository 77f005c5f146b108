//! ext2, ext3 and ext4 on disk: structures, constants and checksums, no I/O.
//!
//! Source: the kernel's `fs/ext4/ext4.h`, `Documentation/filesystems/ext4/`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::fs::sums_match;

/// Where the superblock lies, in bytes from the start of the volume.
pub(crate) const SUPERBLOCK_OFFSET: u64 = 1024;
/// [`SuperBlock::magic`].
pub(crate) const MAGIC: u16 = 0xef53;
/// The largest block is `1024 << 6` bytes.
pub(super) const MAX_LOG_BLOCK_SIZE: u32 = 6;
/// The largest cluster is `1024 << 19` bytes (EXT4_MAX_CLUSTER_LOG_SIZE is 30).
pub(super) const MAX_LOG_CLUSTER_SIZE: u32 = 20;
/// Bytes of an inode before revision 1, and of the smallest since.
pub(super) const MIN_INODE_SIZE: u64 = 128;
/// Bytes of a group descriptor without [`INCOMPAT_64BIT`].
pub(super) const DESC_SIZE: u64 = 32;
/// The fewest bytes of a group descriptor with it.
pub(super) const MIN_DESC_SIZE_64BIT: u64 = 64;
/// [`SuperBlock::checksum_type`]: CRC-32C, the only one there is.
pub(super) const CHECKSUM_CRC32C: u8 = 1;

/// [`SuperBlock::state`]: unmounted cleanly (without journal), or checked.
pub(super) const STATE_VALID: u16 = 1;
/// [`SuperBlock::state`]: errors were found.
pub(super) const STATE_ERROR: u16 = 2;
/// [`SuperBlock::state`]: orphans are being recovered.
pub(super) const STATE_ORPHAN: u16 = 4;

pub(crate) const COMPAT_HAS_JOURNAL: u32 = 0x4;
pub(super) const COMPAT_SPARSE_SUPER2: u32 = 0x200;

pub(crate) const INCOMPAT_FILETYPE: u32 = 0x2;
pub(crate) const INCOMPAT_RECOVER: u32 = 0x4;
pub(crate) const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
pub(crate) const INCOMPAT_META_BG: u32 = 0x10;
pub(super) const INCOMPAT_EXTENTS: u32 = 0x40;
pub(crate) const INCOMPAT_64BIT: u32 = 0x80;
pub(super) const INCOMPAT_MMP: u32 = 0x100;
pub(super) const INCOMPAT_FLEX_BG: u32 = 0x200;
pub(super) const INCOMPAT_EA_INODE: u32 = 0x400;
pub(super) const INCOMPAT_CSUM_SEED: u32 = 0x2000;
pub(super) const INCOMPAT_LARGEDIR: u32 = 0x4000;
pub(super) const INCOMPAT_INLINE_DATA: u32 = 0x8000;
pub(super) const INCOMPAT_ENCRYPT: u32 = 0x1_0000;
pub(super) const INCOMPAT_CASEFOLD: u32 = 0x2_0000;
/// The incompatible features whose effect on allocation is known.
pub(super) const INCOMPAT_KNOWN: u32 = INCOMPAT_FILETYPE
    | INCOMPAT_RECOVER
    | INCOMPAT_META_BG
    | INCOMPAT_EXTENTS
    | INCOMPAT_64BIT
    | INCOMPAT_MMP
    | INCOMPAT_FLEX_BG
    | INCOMPAT_EA_INODE
    | INCOMPAT_CSUM_SEED
    | INCOMPAT_LARGEDIR
    | INCOMPAT_INLINE_DATA
    | INCOMPAT_ENCRYPT
    | INCOMPAT_CASEFOLD;

pub(crate) const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
pub(crate) const RO_COMPAT_LARGE_FILE: u32 = 0x2;
pub(crate) const RO_COMPAT_BTREE_DIR: u32 = 0x4;
pub(super) const RO_COMPAT_HUGE_FILE: u32 = 0x8;
pub(super) const RO_COMPAT_GDT_CSUM: u32 = 0x10;
pub(super) const RO_COMPAT_DIR_NLINK: u32 = 0x20;
pub(super) const RO_COMPAT_EXTRA_ISIZE: u32 = 0x40;
pub(super) const RO_COMPAT_QUOTA: u32 = 0x100;
pub(super) const RO_COMPAT_BIGALLOC: u32 = 0x200;
pub(super) const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
pub(super) const RO_COMPAT_READONLY: u32 = 0x1000;
pub(super) const RO_COMPAT_PROJECT: u32 = 0x2000;
pub(super) const RO_COMPAT_SHARED_BLOCKS: u32 = 0x4000;
pub(super) const RO_COMPAT_VERITY: u32 = 0x8000;
pub(super) const RO_COMPAT_ORPHAN_PRESENT: u32 = 0x1_0000;
/// The read-only compatible features whose effect on allocation is known: bigalloc is one of
/// this class and changes what a bitmap means, so unknown ones count as incompatible here.
pub(super) const RO_COMPAT_KNOWN: u32 = RO_COMPAT_SPARSE_SUPER
    | RO_COMPAT_LARGE_FILE
    | RO_COMPAT_BTREE_DIR
    | RO_COMPAT_HUGE_FILE
    | RO_COMPAT_GDT_CSUM
    | RO_COMPAT_DIR_NLINK
    | RO_COMPAT_EXTRA_ISIZE
    | RO_COMPAT_QUOTA
    | RO_COMPAT_BIGALLOC
    | RO_COMPAT_METADATA_CSUM
    | RO_COMPAT_READONLY
    | RO_COMPAT_PROJECT
    | RO_COMPAT_SHARED_BLOCKS
    | RO_COMPAT_VERITY
    | RO_COMPAT_ORPHAN_PRESENT;

/// [`GroupDesc::flags`]: the block bitmap was never written.
pub(super) const BG_BLOCK_UNINIT: u16 = 2;

/// [`MmpBlock::magic`].
pub(super) const MMP_MAGIC: u32 = 0x004d_4d50;
/// [`MmpBlock::seq`] when nobody has it mounted.
pub(super) const MMP_SEQ_CLEAN: u32 = 0xff4d_4d50;

/// `struct ext4_super_block`.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SuperBlock {
    pub(super) inodes_count: U32,
    blocks_count_lo: U32,
    r_blocks_count_lo: U32,
    free_blocks_count_lo: U32,
    free_inodes_count: U32,
    pub(super) first_data_block: U32,
    pub(crate) log_block_size: U32,
    pub(super) log_cluster_size: U32,
    pub(super) blocks_per_group: U32,
    pub(super) clusters_per_group: U32,
    pub(super) inodes_per_group: U32,
    mtime: U32,
    wtime: U32,
    mnt_count: U16,
    max_mnt_count: U16,
    pub(crate) magic: U16,
    pub(super) state: U16,
    errors: U16,
    minor_rev_level: U16,
    lastcheck: U32,
    checkinterval: U32,
    creator_os: U32,
    rev_level: U32,
    def_resuid: U16,
    def_resgid: U16,
    first_ino: U32,
    inode_size: U16,
    block_group_nr: U16,
    feature_compat: U32,
    feature_incompat: U32,
    feature_ro_compat: U32,
    pub(crate) uuid: [u8; 16],
    pub(crate) volume_name: [u8; 16],
    last_mounted: [u8; 64],
    algorithm_usage_bitmap: U32,
    prealloc_blocks: u8,
    prealloc_dir_blocks: u8,
    pub(super) reserved_gdt_blocks: U16,
    journal_uuid: [u8; 16],
    pub(super) journal_inum: U32,
    journal_dev: U32,
    pub(super) last_orphan: U32,
    hash_seed: [U32; 4],
    def_hash_version: u8,
    jnl_backup_type: u8,
    desc_size: U16,
    default_mount_opts: U32,
    pub(super) first_meta_bg: U32,
    mkfs_time: U32,
    jnl_blocks: [U32; 17],
    blocks_count_hi: U32,
    r_blocks_count_hi: U32,
    free_blocks_count_hi: U32,
    min_extra_isize: U16,
    want_extra_isize: U16,
    flags: U32,
    raid_stride: U16,
    mmp_update_interval: U16,
    pub(super) mmp_block: U64,
    raid_stripe_width: U32,
    pub(super) log_groups_per_flex: u8,
    pub(super) checksum_type: u8,
    encryption_level: u8,
    reserved_pad: u8,
    kbytes_written: U64,
    unused_180: [u8; 0x24c - 0x180],
    pub(super) backup_bgs: [U32; 2],
    unused_254: [u8; 0x270 - 0x254],
    checksum_seed: U32,
    unused_274: [u8; 0x3fc - 0x274],
    checksum: U32,
}

const _: () = assert!(size_of::<SuperBlock>() == 1024);

impl SuperBlock {
    /// Whether this revision knows of features at all.
    fn is_dynamic(&self) -> bool {
        self.rev_level.get() > 0
    }

    /// The compatible features.
    pub(crate) fn compat(&self) -> u32 {
        if self.is_dynamic() {
            self.feature_compat.get()
        } else {
            0
        }
    }

    /// The incompatible features.
    pub(crate) fn incompat(&self) -> u32 {
        if self.is_dynamic() {
            self.feature_incompat.get()
        } else {
            0
        }
    }

    /// The read-only compatible features.
    pub(crate) fn ro_compat(&self) -> u32 {
        if self.is_dynamic() {
            self.feature_ro_compat.get()
        } else {
            0
        }
    }

    /// Bytes of an inode on disk, unchecked.
    pub(super) fn inode_size(&self) -> u64 {
        if self.is_dynamic() {
            u64::from(self.inode_size.get())
        } else {
            MIN_INODE_SIZE
        }
    }

    /// Bytes of a group descriptor, unchecked.
    pub(super) fn desc_size(&self) -> u64 {
        if self.incompat() & INCOMPAT_64BIT != 0 {
            u64::from(self.desc_size.get())
        } else {
            DESC_SIZE
        }
    }

    /// Blocks of the filesystem, the ones before the first data block included.
    pub(crate) fn blocks_count(&self) -> u64 {
        self.join(self.blocks_count_lo, self.blocks_count_hi)
    }

    /// Free blocks, as of the last time the superblock was written.
    pub(super) fn free_blocks_count(&self) -> u64 {
        self.join(self.free_blocks_count_lo, self.free_blocks_count_hi)
    }

    fn join(&self, lo: U32, hi: U32) -> u64 {
        let hi = if self.incompat() & INCOMPAT_64BIT != 0 {
            hi.get()
        } else {
            0
        };
        u64::from(hi) << 32 | u64::from(lo.get())
    }

    /// Whether metadata carries CRC-32C checksums.
    pub(super) fn has_metadata_csum(&self) -> bool {
        self.ro_compat() & RO_COMPAT_METADATA_CSUM != 0
    }

    /// Whether group descriptors carry checksums, of either kind.
    pub(super) fn has_desc_csum(&self) -> bool {
        self.ro_compat() & (RO_COMPAT_METADATA_CSUM | RO_COMPAT_GDT_CSUM) != 0
    }

    /// Whether its own checksum holds; true where there is none.
    pub(super) fn checksum_holds(&self) -> bool {
        let bytes = self.as_bytes();
        !self.has_metadata_csum()
            || sums_match(
                &crc32c(u32::MAX, &bytes[..bytes.len() - 4]),
                &self.checksum.get(),
            )
    }

    /// What every other metadata checksum begins with.
    pub(super) fn csum_seed(&self) -> u32 {
        if self.incompat() & INCOMPAT_CSUM_SEED != 0 {
            self.checksum_seed.get()
        } else {
            crc32c(u32::MAX, &self.uuid)
        }
    }
}

/// `struct ext4_group_desc`; its second half is all zeros where descriptors have 32 bytes.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct GroupDesc {
    block_bitmap_lo: U32,
    inode_bitmap_lo: U32,
    inode_table_lo: U32,
    free_blocks_count_lo: U16,
    free_inodes_count_lo: U16,
    used_dirs_count_lo: U16,
    flags: U16,
    exclude_bitmap_lo: U32,
    block_bitmap_csum_lo: U16,
    inode_bitmap_csum_lo: U16,
    itable_unused_lo: U16,
    checksum: U16,
    block_bitmap_hi: U32,
    inode_bitmap_hi: U32,
    inode_table_hi: U32,
    free_blocks_count_hi: U16,
    free_inodes_count_hi: U16,
    used_dirs_count_hi: U16,
    itable_unused_hi: U16,
    exclude_bitmap_hi: U32,
    block_bitmap_csum_hi: U16,
    inode_bitmap_csum_hi: U16,
    reserved: U32,
}

const _: () = assert!(size_of::<GroupDesc>() == 64);
/// Where [`GroupDesc::checksum`] lies.
const DESC_CHECKSUM_OFFSET: usize = 0x1e;

impl GroupDesc {
    /// The first block of the group's block bitmap.
    pub(super) fn block_bitmap(&self) -> u64 {
        u64::from(self.block_bitmap_hi.get()) << 32 | u64::from(self.block_bitmap_lo.get())
    }

    /// The first block of the group's inode bitmap.
    pub(super) fn inode_bitmap(&self) -> u64 {
        u64::from(self.inode_bitmap_hi.get()) << 32 | u64::from(self.inode_bitmap_lo.get())
    }

    /// The first block of the group's part of the inode table.
    pub(super) fn inode_table(&self) -> u64 {
        u64::from(self.inode_table_hi.get()) << 32 | u64::from(self.inode_table_lo.get())
    }

    /// Free clusters of the group.
    pub(super) fn free_clusters(&self) -> u64 {
        u64::from(self.free_blocks_count_hi.get()) << 16
            | u64::from(self.free_blocks_count_lo.get())
    }

    /// `BG_…` flags.
    pub(super) fn flags(&self) -> u16 {
        self.flags.get()
    }

    /// Whether `bitmap` (as long as the group has clusters, in bits) has the checksum noted here.
    /// `desc_size` says whether all 32 bits of it are.
    pub(super) fn bitmap_csum_holds(&self, seed: u32, bitmap: &[u8], desc_size: u64) -> bool {
        let computed = crc32c(seed, bitmap);
        let noted = u32::from(self.block_bitmap_csum_lo.get());
        // EXT4_BG_BLOCK_BITMAP_CSUM_HI_END: the upper half is there only in long descriptors.
        if desc_size >= 0x3a {
            let noted = u32::from(self.block_bitmap_csum_hi.get()) << 16 | noted;
            sums_match(&computed, &noted)
        } else {
            sums_match(&(computed & 0xffff), &noted)
        }
    }
}

/// The checksum of the descriptor of `group`, of which `raw` are all bytes as on disk
/// (`ext4_group_desc_csum`). At least 32 bytes.
pub(super) fn desc_csum(superblock: &SuperBlock, seed: u32, group: u32, raw: &[u8]) -> u16 {
    let (head, rest) = raw.split_at(DESC_CHECKSUM_OFFSET);
    let tail = &rest[2..];
    let number = group.to_le_bytes();
    if superblock.has_metadata_csum() {
        let crc = [&number[..], head, &[0, 0], tail]
            .into_iter()
            .fold(seed, crc32c);
        crc as u16
    } else {
        let crc = [&superblock.uuid[..], &number, head]
            .into_iter()
            .fold(u16::MAX, crc16);
        crc16(crc, tail)
    }
}

/// Whether the descriptor's own checksum holds.
pub(super) fn desc_csum_holds(superblock: &SuperBlock, seed: u32, group: u32, raw: &[u8]) -> bool {
    let noted = &raw[DESC_CHECKSUM_OFFSET..DESC_CHECKSUM_OFFSET + 2];
    !superblock.has_desc_csum()
        || sums_match(
            &desc_csum(superblock, seed, group, raw).to_le_bytes()[..],
            noted,
        )
}

/// `struct mmp_struct`, its first part: multiple mount protection.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct MmpBlock {
    pub(super) magic: U32,
    pub(super) seq: U32,
    time: U64,
    pub(super) node: [u8; 64],
    pub(super) device: [u8; 32],
}

/// CRC-32C as ext4 chains it: no inversion at either end.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// CRC-16 with the reflected polynomial 0xA001 (the kernel's `lib/crc16.c`).
fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    const TABLE: [u16; 256] = {
        let mut table = [0u16; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut crc = byte as u16;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 {
                    crc >> 1 ^ 0xa001
                } else {
                    crc >> 1
                };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    bytes.iter().fold(seed, |crc, byte| {
        crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_match_their_published_check_values() {
        // "123456789": CRC-16/ARC is 0xbb3d (initial value 0), CRC-32C 0xe3069283.
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
        assert_eq!(!crc32c(u32::MAX, b"123456789"), 0xe306_9283);
    }
}
