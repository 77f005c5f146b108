//! Btrfs on disk: structures and constants, no I/O. All numbers are little-endian.
//!
//! Source: the kernel's `include/uapi/linux/btrfs_tree.h` and `btrfs.h`, and `fs/btrfs/fs.h`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// [`SuperBlock::magic`].
pub(crate) const MAGIC: [u8; 8] = *b"_BHRfS_M";
/// Where a device has copies of its superblock, as far as it reaches (`btrfs_sb_offset`). The
/// kernel mounts by the first one alone.
pub(crate) const SUPER_OFFSETS: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
/// Bytes of a superblock (BTRFS_SUPER_INFO_SIZE).
pub(crate) const SUPER_SIZE: u64 = 4096;
/// The start of a device that is never allocated to anything (BTRFS_DEVICE_RANGE_RESERVED): boot
/// code and the first superblock.
pub(crate) const RESERVED: u64 = 1 << 20;

/// Bytes at the start of superblocks and tree blocks that a checksum has room in.
pub(crate) const CSUM_SIZE: usize = 32;
/// More levels than any tree has (BTRFS_MAX_LEVEL).
pub(crate) const MAX_LEVELS: u8 = 8;
/// Bytes of the smallest and largest sector and tree block.
pub(crate) const MIN_SECTOR_SIZE: u32 = 4096;
pub(crate) const MAX_NODE_SIZE: u32 = 64 << 10;
/// Bytes in a row on one device of a striped chunk (BTRFS_STRIPE_LEN); there is no other.
pub(crate) const STRIPE_LEN: u64 = 64 << 10;

/// [`SuperBlock::flags`]: errors were found.
pub(crate) const SUPER_ERROR: u64 = 1 << 2;
/// Other filesystems grow from it: read-only, a seed.
pub(crate) const SUPER_SEEDING: u64 = 1 << 32;
/// Only metadata, as `btrfs-image` restores it.
pub(crate) const SUPER_METADUMP: u64 = 0b11 << 33;
/// The conversion of UUIDs, checksums or the block group tree by `btrfstune` was begun.
pub(crate) const SUPER_CHANGING: u64 = 0b11_1111 << 35;
/// BTRFS_HEADER_FLAG_WRITTEN and _RELOC, which stand in superblocks, too.
pub(crate) const SUPER_FLAGS_HARMLESS: u64 = 0b11;

/// [`SuperBlock::incompat`]: back references of the present kind.
pub(crate) const INCOMPAT_MIXED_BACKREF: u64 = 1 << 0;
/// Some of its chunks are RAID5 or RAID6; the kernel clears it with the last of them.
pub(crate) const INCOMPAT_RAID56: u64 = 1 << 7;
/// Tree blocks carry [`SuperBlock::metadata_uuid`].
pub(crate) const INCOMPAT_METADATA_UUID: u64 = 1 << 10;
/// Zones of the device are written in order.
pub(crate) const INCOMPAT_ZONED: u64 = 1 << 12;
/// Mixed back references, default subvolume, mixed groups, LZO, zstd, big metadata, extended
/// references, RAID5/6 (its chunks are looked for one by one), skinny metadata, no holes, metadata
/// UUID, RAID1C3/4, simple quotas. Not: zoned, extent tree v2, RAID stripe tree, remap tree.
pub(crate) const INCOMPAT_KNOWN: u64 = 0x1_0fff;
/// [`SuperBlock::compat_ro`]: free space is noted in a tree, not in files of the root tree.
pub(crate) const COMPAT_RO_FREE_SPACE_TREE: u64 = 1 << 0;
/// Block group items have a tree of their own.
pub(crate) const COMPAT_RO_BLOCK_GROUP_TREE: u64 = 1 << 3;
/// Free space tree, its validity, verity, block group tree.
pub(crate) const COMPAT_RO_KNOWN: u64 = 0xf;

/// Trees, by the id that is their root item's objectid and their blocks' owner.
pub(crate) const ROOT_TREE: u64 = 1;
pub(crate) const EXTENT_TREE: u64 = 2;
pub(crate) const CHUNK_TREE: u64 = 3;
pub(crate) const DEV_TREE: u64 = 4;
/// The top level: the subvolume that all others are in.
pub(crate) const FS_TREE: u64 = 5;
pub(crate) const CSUM_TREE: u64 = 7;
pub(crate) const BLOCK_GROUP_TREE: u64 = 11;
/// Trees that a balance builds.
pub(crate) const TREE_RELOC: u64 = -8i64 as u64;
/// The first and the last id that a subvolume may have, but for the top level.
pub(crate) const FIRST_SUBVOLUME: u64 = 256;
pub(crate) const LAST_SUBVOLUME: u64 = -256i64 as u64;

/// Objectid of the items of devices in the chunk tree.
pub(crate) const DEV_ITEMS: u64 = 1;
/// Objectid of all chunks, and what chunks and block groups call theirs.
pub(crate) const CHUNKS: u64 = 256;
/// Objectid of the item of a balance that has not ended.
pub(crate) const BALANCE: u64 = -4i64 as u64;

/// Objectid of all checksums of data.
pub(crate) const CSUMS: u64 = -10i64 as u64;

/// [`Key::kind`].
pub(crate) const EXTENT_DATA: u8 = 108;
pub(crate) const EXTENT_CSUM: u8 = 128;
pub(crate) const ROOT_ITEM: u8 = 132;
pub(crate) const EXTENT_ITEM: u8 = 168;
pub(crate) const METADATA_ITEM: u8 = 169;
pub(crate) const EXTENT_OWNER_REF: u8 = 172;
pub(crate) const TREE_BLOCK_REF: u8 = 176;
pub(crate) const EXTENT_DATA_REF: u8 = 178;
pub(crate) const SHARED_BLOCK_REF: u8 = 182;
pub(crate) const SHARED_DATA_REF: u8 = 184;
pub(crate) const BLOCK_GROUP_ITEM: u8 = 192;
pub(crate) const DEV_EXTENT: u8 = 204;
pub(crate) const DEV_ITEM: u8 = 216;
pub(crate) const CHUNK_ITEM: u8 = 228;
pub(crate) const TEMPORARY_ITEM: u8 = 248;
pub(crate) const DEV_REPLACE: u8 = 250;

/// `struct btrfs_disk_key`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DiskKey {
    objectid: U64,
    kind: u8,
    offset: U64,
}

/// A key in the memory of this machine: keys are ordered by objectid, kind, offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) objectid: u64,
    pub(crate) kind: u8,
    pub(crate) offset: u64,
}

impl Key {
    pub(crate) const MIN: Self = Self::new(0, 0, 0);
    pub(crate) const MAX: Self = Self::new(u64::MAX, u8::MAX, u64::MAX);

    pub(crate) const fn new(objectid: u64, kind: u8, offset: u64) -> Self {
        Self {
            objectid,
            kind,
            offset,
        }
    }
}

impl From<DiskKey> for Key {
    fn from(key: DiskKey) -> Self {
        Self::new(key.objectid.get(), key.kind, key.offset.get())
    }
}

/// `struct btrfs_dev_item`: a device, in its own superblock and in the chunk tree.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DevItem {
    pub(crate) devid: U64,
    pub(crate) total_bytes: U64,
    bytes_used: U64,
    io_align: U32,
    io_width: U32,
    sector_size: U32,
    kind: U64,
    generation: U64,
    start_offset: U64,
    dev_group: U32,
    seek_speed: u8,
    bandwidth: u8,
    pub(crate) uuid: [u8; 16],
    /// The UUID that tree blocks carry.
    pub(crate) fsid: [u8; 16],
}

const _: () = assert!(size_of::<DevItem>() == 98);

/// `struct btrfs_super_block`.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SuperBlock {
    pub(crate) csum: [u8; CSUM_SIZE],
    pub(crate) fsid: [u8; 16],
    /// Where this very copy is.
    pub(crate) bytenr: U64,
    pub(crate) flags: U64,
    pub(crate) magic: [u8; 8],
    pub(crate) generation: U64,
    pub(crate) root: U64,
    pub(crate) chunk_root: U64,
    pub(crate) log_root: U64,
    pub(crate) log_root_transid: U64,
    pub(crate) total_bytes: U64,
    pub(crate) bytes_used: U64,
    root_dir: U64,
    pub(crate) num_devices: U64,
    pub(crate) sector_size: U32,
    pub(crate) node_size: U32,
    leaf_size: U32,
    stripe_size: U32,
    pub(crate) sys_chunk_array_size: U32,
    pub(crate) chunk_root_generation: U64,
    compat: U64,
    pub(crate) compat_ro: U64,
    pub(crate) incompat: U64,
    pub(crate) csum_type: U16,
    pub(crate) root_level: u8,
    pub(crate) chunk_root_level: u8,
    pub(crate) log_root_level: u8,
    pub(crate) dev_item: DevItem,
    pub(crate) label: [u8; 256],
    pub(crate) cache_generation: U64,
    uuid_tree_generation: U64,
    pub(super) metadata_uuid: [u8; 16],
    reserved: [U64; 28],
    pub(crate) sys_chunk_array: [u8; 2048],
    pub(crate) super_roots: [[u8; 168]; 4],
    padding: [u8; 565],
}

const _: () = assert!(size_of::<SuperBlock>() == SUPER_SIZE as usize);

impl SuperBlock {
    /// The UUID that tree blocks and device items carry.
    pub(crate) fn metadata_uuid(&self) -> &[u8; 16] {
        match self.incompat.get() & INCOMPAT_METADATA_UUID {
            0 => &self.fsid,
            _ => &self.metadata_uuid,
        }
    }
}

/// `struct btrfs_header`: what every tree block begins with.
#[derive(Clone, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    csum: [u8; CSUM_SIZE],
    pub(crate) fsid: [u8; 16],
    /// Its logical address.
    pub(crate) bytenr: U64,
    pub(crate) flags: U64,
    chunk_tree_uuid: [u8; 16],
    pub(crate) generation: U64,
    pub(crate) owner: U64,
    /// Items of a leaf, pointers of a node.
    pub(crate) count: U32,
    pub(crate) level: u8,
}

const _: () = assert!(size_of::<Header>() == 101);

/// [`Header::flags`]: it was written out.
pub(crate) const HEADER_WRITTEN: u64 = 1;

/// `struct btrfs_item`: where in a leaf an item's bytes are.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Item {
    pub(crate) key: DiskKey,
    /// From the end of the leaf's header.
    pub(crate) offset: U32,
    pub(crate) size: U32,
}

const _: () = assert!(size_of::<Item>() == 25);

/// `struct btrfs_key_ptr`: a child of a node.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct KeyPointer {
    pub(crate) key: DiskKey,
    pub(crate) bytenr: U64,
    pub(crate) generation: U64,
}

const _: () = assert!(size_of::<KeyPointer>() == 33);

/// What a chunk or block group holds, and how it lies on devices.
pub(crate) const DATA: u64 = 1 << 0;
pub(crate) const SYSTEM: u64 = 1 << 1;
pub(crate) const METADATA: u64 = 1 << 2;
pub(crate) const RAID0: u64 = 1 << 3;
pub(crate) const RAID1: u64 = 1 << 4;
pub(crate) const DUP: u64 = 1 << 5;
pub(crate) const RAID10: u64 = 1 << 6;
pub(crate) const RAID5: u64 = 1 << 7;
pub(crate) const RAID6: u64 = 1 << 8;
pub(crate) const RAID1C3: u64 = 1 << 9;
pub(crate) const RAID1C4: u64 = 1 << 10;
pub(crate) const CONTENT_MASK: u64 = DATA | SYSTEM | METADATA;

/// `struct btrfs_chunk` without its stripes. Its key's offset is its logical address.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ChunkItem {
    pub(crate) length: U64,
    owner: U64,
    pub(crate) stripe_len: U64,
    pub(crate) kind: U64,
    io_align: U32,
    io_width: U32,
    sector_size: U32,
    pub(crate) num_stripes: U16,
    pub(crate) sub_stripes: U16,
}

const _: () = assert!(size_of::<ChunkItem>() == 48);

/// `struct btrfs_stripe`: a part of a chunk on one device.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct StripeItem {
    pub(crate) devid: U64,
    pub(crate) offset: U64,
    pub(crate) dev_uuid: [u8; 16],
}

const _: () = assert!(size_of::<StripeItem>() == 32);

/// `struct btrfs_root_item` as far as every version of it goes, the inode item in it left out.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RootItem {
    inode: [u8; 160],
    pub(crate) generation: U64,
    root_dirid: U64,
    pub(crate) bytenr: U64,
    byte_limit: U64,
    bytes_used: U64,
    last_snapshot: U64,
    pub(crate) flags: U64,
    /// 0 once it is being deleted.
    pub(crate) refs: U32,
    drop_progress: DiskKey,
    drop_level: u8,
    pub(crate) level: u8,
}

const _: () = assert!(size_of::<RootItem>() == 239);

/// [`RootItem::flags`]: a subvolume that cannot be written to.
pub(crate) const ROOT_READ_ONLY: u64 = 1 << 0;

/// `struct btrfs_file_extent_item`: what a part of a file lies in. An inline one ends behind `kind`,
/// and its data follows.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct FileExtentItem {
    generation: U64,
    ram_bytes: U64,
    compression: u8,
    encryption: u8,
    other_encoding: U16,
    pub(crate) kind: u8,
    /// Logical address of the whole extent; 0 for a hole.
    pub(crate) disk_bytenr: U64,
    /// Its bytes there.
    pub(crate) disk_num_bytes: U64,
    offset: U64,
    num_bytes: U64,
}

const _: () = assert!(size_of::<FileExtentItem>() == 53);

/// [`FileExtentItem::kind`] of data that lies in the leaf itself.
pub(crate) const FILE_EXTENT_INLINE: u8 = 0;
/// Of room that was reserved for data and not written to (BTRFS_FILE_EXTENT_PREALLOC).
pub(crate) const FILE_EXTENT_RESERVED: u8 = 2;

/// `struct btrfs_extent_item`, without the back references behind it.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ExtentItem {
    pub(crate) refs: U64,
    pub(crate) generation: U64,
    pub(crate) flags: U64,
}

const _: () = assert!(size_of::<ExtentItem>() == 24);

/// [`ExtentItem::flags`].
pub(crate) const EXTENT_IS_DATA: u64 = 1 << 0;
pub(crate) const EXTENT_IS_TREE_BLOCK: u64 = 1 << 1;

/// `struct btrfs_block_group_item`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct BlockGroupItem {
    pub(crate) used: U64,
    pub(crate) chunk_objectid: U64,
    pub(crate) flags: U64,
}

const _: () = assert!(size_of::<BlockGroupItem>() == 24);

/// `struct btrfs_dev_extent`: a part of a device that belongs to a chunk. Its key is the device's
/// id and the physical address.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DevExtent {
    chunk_tree: U64,
    chunk_objectid: U64,
    pub(crate) chunk_offset: U64,
    pub(crate) length: U64,
    chunk_tree_uuid: [u8; 16],
}

const _: () = assert!(size_of::<DevExtent>() == 48);

/// `struct btrfs_dev_replace_item`, its first part.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DevReplaceItem {
    src_devid: U64,
    cursor_left: U64,
    cursor_right: U64,
    cont_reading_from: U64,
    pub(crate) state: U64,
}

/// [`DevReplaceItem::state`] of a replacement that runs or waits to go on.
pub(crate) const REPLACE_STARTED: u64 = 1;
pub(crate) const REPLACE_SUSPENDED: u64 = 4;
