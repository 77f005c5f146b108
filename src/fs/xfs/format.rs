//! XFS on disk: structures, constants and checksums, no I/O. All numbers are big-endian but for
//! the checksums.
//!
//! Source: the kernel's `fs/xfs/libxfs/xfs_format.h` and `xfs_log_format.h`.

use std::mem::offset_of;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::fs::sums_match;

/// [`SuperBlock::magic`]: "XFSB".
pub(crate) const SB_MAGIC: u32 = 0x5846_5342;
/// [`Agf::magic`]: "XAGF".
pub(super) const AGF_MAGIC: u32 = 0x5841_4746;
/// The AGI's magic: "XAGI".
pub(super) const AGI_MAGIC: u32 = 0x5841_4749;
/// The AGFL's magic: "XAFL". Version 4 has none.
pub(super) const AGFL_MAGIC: u32 = 0x5841_464c;
/// Magic of a block of the free-space btree by block number: "ABTB".
pub(super) const BNOBT_MAGIC: u32 = 0x4142_5442;
/// The same with a checksum: "AB3B".
pub(super) const BNOBT_CRC_MAGIC: u32 = 0x4142_3342;

/// "No block", within an allocation group.
pub(super) const NULL_AGBLOCK: u32 = u32::MAX;
/// More levels than any btree of an allocation group has (XFS_BTREE_MAXLEVELS).
pub(super) const MAX_LEVELS: u32 = 9;

pub(super) const MIN_SECTOR_LOG: u8 = 9;
pub(super) const MAX_SECTOR_LOG: u8 = 15;
pub(super) const MIN_BLOCK_LOG: u8 = 9;
pub(super) const MAX_BLOCK_LOG: u8 = 16;
/// Bytes of the smallest and the largest allocation group.
pub(super) const MIN_AG_BYTES: u64 = 1 << 24;
pub(super) const MAX_AG_BYTES: u64 = 1 << 40;
/// Sectors at the start of an allocation group: superblock, AGF, AGI, AGFL.
pub(super) const AG_HEADER_SECTORS: u64 = 4;

/// [`SuperBlock::version`]: the number itself.
pub(super) const VERSION_MASK: u16 = 0xf;
/// The feature nobody knows the meaning of any more.
pub(super) const VERSION_SHARED: u16 = 0x200;
/// Log records of version 2.
pub(super) const VERSION_LOGV2: u16 = 0x400;
/// [`SuperBlock::features2`] is in use.
pub(super) const VERSION_MOREBITS: u16 = 0x8000;
/// The counters of the superblock are exact only after a clean unmount.
pub(super) const FEATURES2_LAZY_COUNT: u32 = 0x2;
/// Lazy counters, attr2, 32-bit project ids, file types: all there is in version 4.
pub(super) const FEATURES2_KNOWN: u32 = 0x2 | 0x8 | 0x80 | 0x200;

/// Free inode btree, reverse mapping, reflink, inode btree counters.
pub(super) const RO_COMPAT_KNOWN: u32 = 0xf;
/// Metadata carries [`SuperBlock::meta_uuid`].
pub(super) const INCOMPAT_META_UUID: u32 = 1 << 2;
/// It has to be repaired before it may be mounted.
pub(super) const INCOMPAT_NEEDS_REPAIR: u32 = 1 << 4;
/// File types, sparse inode chunks, meta UUID, big timestamps, needs repair, large extent
/// counters, exchange-range, parent pointers. The last two change log items and attributes, not
/// allocation.
pub(super) const INCOMPAT_KNOWN: u32 = 0xff;

/// `struct xfs_dsb`, as far as version 5 without metadata directories goes.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SuperBlock {
    pub(crate) magic: U32,
    pub(crate) block_size: U32,
    pub(crate) data_blocks: U64,
    pub(super) rt_blocks: U64,
    rt_extents: U64,
    pub(crate) uuid: [u8; 16],
    pub(super) log_start: U64,
    root_ino: U64,
    rbm_ino: U64,
    rsum_ino: U64,
    rt_ext_size: U32,
    pub(super) ag_blocks: U32,
    pub(super) ag_count: U32,
    rbm_blocks: U32,
    pub(super) log_blocks: U32,
    pub(super) version: U16,
    pub(super) sector_size: U16,
    inode_size: U16,
    inodes_per_block: U16,
    pub(crate) label: [u8; 12],
    pub(super) block_log: u8,
    pub(super) sector_log: u8,
    inode_log: u8,
    inopb_log: u8,
    pub(super) ag_block_log: u8,
    rt_ext_log: u8,
    pub(super) in_progress: u8,
    imax_percent: u8,
    inode_count: U64,
    inodes_free: U64,
    pub(super) free_blocks: U64,
    free_rt_extents: U64,
    uquota_ino: U64,
    gquota_ino: U64,
    quota_flags: U16,
    flags: u8,
    shared_version: u8,
    inode_align: U32,
    stripe_unit: U32,
    stripe_width: U32,
    dir_block_log: u8,
    log_sector_log: u8,
    log_sector_size: U16,
    log_stripe_unit: U32,
    features2: U32,
    bad_features2: U32,
    features_compat: U32,
    pub(super) features_ro_compat: U32,
    pub(super) features_incompat: U32,
    features_log_incompat: U32,
    crc: [u8; 4],
    sparse_inode_align: U32,
    pquota_ino: U64,
    /// Where in the log the change is that was last written to it.
    pub(super) lsn: U64,
    meta_uuid: [u8; 16],
}

const _: () = assert!(size_of::<SuperBlock>() == 264);
/// Where the superblock's checksum lies.
pub(super) const SB_CRC_OFFSET: usize = offset_of!(SuperBlock, crc);

impl SuperBlock {
    /// Whether it is version 5: checksums, and feature words of their own.
    pub(super) fn is_v5(&self) -> bool {
        self.version_number() == 5
    }

    pub(super) fn version_number(&self) -> u16 {
        self.version.get() & VERSION_MASK
    }

    /// The second feature word, 0 where there is none.
    pub(super) fn features2(&self) -> u32 {
        if self.is_v5() || self.version.get() & VERSION_MOREBITS != 0 {
            self.features2.get()
        } else {
            0
        }
    }

    /// Whether a record of the log may be larger than 32 KiB.
    pub(super) fn has_log_v2(&self) -> bool {
        self.is_v5() || self.version.get() & VERSION_LOGV2 != 0
    }

    /// Whether free blocks are counted without those of the free-space btrees.
    pub(super) fn has_lazy_count(&self) -> bool {
        self.is_v5() || self.features2() & FEATURES2_LAZY_COUNT != 0
    }

    /// The UUID that metadata carries.
    pub(super) fn metadata_uuid(&self) -> &[u8; 16] {
        if self.is_v5() && self.features_incompat.get() & INCOMPAT_META_UUID != 0 {
            &self.meta_uuid
        } else {
            &self.uuid
        }
    }
}

/// `struct xfs_agf`: the header of an allocation group's free space.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Agf {
    pub(super) magic: U32,
    pub(super) version: U32,
    pub(super) number: U32,
    pub(super) length: U32,
    pub(super) bnobt_root: U32,
    cntbt_root: U32,
    rmapbt_root: U32,
    pub(super) bnobt_levels: U32,
    cntbt_levels: U32,
    rmapbt_levels: U32,
    freelist_first: U32,
    freelist_last: U32,
    pub(super) freelist_count: U32,
    pub(super) free_blocks: U32,
    pub(super) longest: U32,
    pub(super) btree_blocks: U32,
    pub(super) uuid: [u8; 16],
    rmap_blocks: U32,
    refcount_blocks: U32,
    refcount_root: U32,
    refcount_level: U32,
    spare: [U64; 14],
    lsn: U64,
    crc: [u8; 4],
    spare2: U32,
}

const _: () = assert!(size_of::<Agf>() == 224);
pub(super) const AGF_CRC_OFFSET: usize = offset_of!(Agf, crc);
/// The only version of AGF there is.
pub(super) const AGF_VERSION: u32 = 1;

/// Where the AGI's group number, UUID and checksum lie (`struct xfs_agi`).
pub(super) const AGI_NUMBER_OFFSET: usize = 8;
pub(super) const AGI_UUID_OFFSET: usize = 296;
pub(super) const AGI_CRC_OFFSET: usize = 312;
/// Where the AGFL's group number, UUID and checksum lie (`struct xfs_agfl`).
pub(super) const AGFL_NUMBER_OFFSET: usize = 4;
pub(super) const AGFL_UUID_OFFSET: usize = 8;
pub(super) const AGFL_CRC_OFFSET: usize = 32;

/// `struct xfs_btree_block`, short form, without what version 5 added.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct BtreeHeader {
    pub(super) magic: U32,
    pub(super) level: U16,
    pub(super) records: U16,
    pub(super) left: U32,
    pub(super) right: U32,
}

const _: () = assert!(size_of::<BtreeHeader>() == 16);

/// What follows [`BtreeHeader`] in version 5.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct BtreeHeaderV5 {
    /// In units of 512 bytes from the start of the volume.
    pub(super) sector: U64,
    lsn: U64,
    pub(super) uuid: [u8; 16],
    pub(super) owner: U32,
    crc: [u8; 4],
}

const _: () = assert!(size_of::<BtreeHeaderV5>() == 40);
pub(super) const BTREE_CRC_OFFSET: usize =
    size_of::<BtreeHeader>() + offset_of!(BtreeHeaderV5, crc);

/// A run of free blocks, and the key of one: `struct xfs_alloc_rec`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct FreeRecord {
    pub(super) start: U32,
    pub(super) len: U32,
}

/// Bytes of a pointer to a btree block.
pub(super) const POINTER_SIZE: usize = 4;

/// Whether the checksum at `offset` of a metadata block holds (`xfs_verify_cksum`).
pub(super) fn crc_holds(bytes: &[u8], offset: usize) -> bool {
    let (Some(head), Some(noted), Some(tail)) = (
        bytes.get(..offset),
        bytes.get(offset..offset + 4),
        bytes.get(offset + 4..),
    ) else {
        return false;
    };
    let crc = [head, &[0; 4], tail]
        .into_iter()
        .fold(0, crc32c::crc32c_append);
    sums_match(&crc.to_le_bytes()[..], noted)
}

/// [`LogRecord::magic`].
pub(crate) const LOG_MAGIC: u32 = 0xfeed_babe;
/// [`LogRecord::version`]: the bit of version 2.
pub(super) const LOG_VERSION_2: u32 = 2;
/// [`LogRecord::format`]: items as a little-endian Linux writes them.
pub(crate) const LOG_FORMAT_LINUX_LE: u32 = 1;
/// Bytes of a record whose first words one header can hold; more take extended headers.
pub(super) const LOG_CYCLE_SIZE: u32 = 32 << 10;
/// Words of 512-byte blocks in one header.
pub(super) const LOG_CYCLE_WORDS: usize = 64;
/// The largest record, in bytes, by version of the log.
pub(super) const LOG_MAX_RECORD_V1: u64 = 32 << 10;
pub(super) const LOG_MAX_RECORD_V2: u64 = 256 << 10;
/// Records that may be on their way to disk at once.
pub(super) const LOG_MAX_IN_FLIGHT: u64 = 8;

/// `struct xlog_rec_header`: the first block of a log record.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct LogRecord {
    pub(super) magic: U32,
    pub(super) cycle: U32,
    pub(super) version: U32,
    /// Bytes behind the headers.
    pub(super) len: U32,
    pub(super) lsn: U64,
    pub(super) tail_lsn: U64,
    pub(super) crc: [u8; 4],
    prev_block: U32,
    pub(super) ops: U32,
    /// The first word of each block of the record; on disk the cycle stands there.
    pub(super) cycle_data: [[u8; 4]; LOG_CYCLE_WORDS],
    pub(super) format: U32,
    pub(super) uuid: [u8; 16],
    /// Bytes of the buffer it was written from, which say how many headers it has.
    pub(super) size: U32,
}

const _: () = assert!(size_of::<LogRecord>() == 324);
pub(super) const LOG_CRC_OFFSET: usize = offset_of!(LogRecord, crc);
/// Bytes of the header that its checksum covers: the size of the structure in memory, which
/// depends on how the machine that wrote it aligns 64-bit numbers.
pub(super) const LOG_HEADER_SIZES: [usize; 2] = [328, 324];
/// Bytes of an extended header: its cycle, and the first words of 64 more blocks.
pub(super) const LOG_EXT_HEADER_SIZE: usize = 4 + 4 * LOG_CYCLE_WORDS;

/// `struct xlog_op_header`: what precedes each piece of a transaction in the log.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct LogOp {
    pub(super) transaction: U32,
    pub(super) len: U32,
    client: u8,
    pub(super) flags: u8,
    reserved: U16,
}

pub(super) const OP_START: u8 = 0x01;
pub(super) const OP_COMMIT: u8 = 0x02;
pub(super) const OP_UNMOUNT: u8 = 0x20;

/// What a transaction begins with, in the byte order of the machine: "TRAN".
pub(super) const TRANSACTION_MAGIC: u32 = 0x5452_414e;
/// [`BufferItem::kind`]: the new content of parts of a block.
pub(super) const ITEM_BUFFER: u16 = 0x123c;

/// `struct xfs_buf_log_format`, its first part, in the byte order of the machine.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct BufferItem {
    pub(super) kind: zerocopy::little_endian::U16,
    /// Pieces of this item, this one included.
    pub(super) pieces: zerocopy::little_endian::U16,
    flags: zerocopy::little_endian::U16,
    blocks: zerocopy::little_endian::U16,
    /// In units of 512 bytes from the start of the volume.
    pub(super) sector: zerocopy::little_endian::U64,
}
