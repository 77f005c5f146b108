//! APFS on disk: structures, constants and checksums, no I/O. All numbers are little-endian;
//! addresses and counts are of the container's blocks.
//!
//! Sources: the Apple File System Reference, and `apfs_raw.h` of the Linux driver linux-apfs-rw.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::fs::sums_match;

pub(super) const MIN_BLOCK_SIZE: u64 = 4096;
pub(super) const MAX_BLOCK_SIZE: u64 = 65536;

/// [`Superblock::magic`]: "NXSB".
pub(crate) const NX_MAGIC: u32 = 0x4253_584e;
/// [`VolumeSuperblock::magic`]: "APSB".
pub(super) const VOLUME_MAGIC: u32 = 0x4253_5041;

/// Of [`ObjectHeader::kind`]: what the object is; the rest says how it is stored.
pub(super) const TYPE_MASK: u32 = 0xffff;
pub(super) const TYPE_SUPERBLOCK: u32 = 0x1;
pub(super) const TYPE_BTREE: u32 = 0x2;
pub(super) const TYPE_BTREE_NODE: u32 = 0x3;
pub(super) const TYPE_SPACEMAN: u32 = 0x5;
pub(super) const TYPE_CAB: u32 = 0x6;
pub(super) const TYPE_CIB: u32 = 0x7;
pub(super) const TYPE_OMAP: u32 = 0xb;
pub(super) const TYPE_CHECKPOINT_MAP: u32 = 0xc;
pub(super) const TYPE_VOLUME: u32 = 0xd;
/// How it is stored, all bits: a physical object's id is its address.
pub(super) const STORAGE_MASK: u32 = 0xc000_0000;
pub(super) const STORAGE_PHYSICAL: u32 = 0x4000_0000;
pub(super) const STORAGE_EPHEMERAL: u32 = 0x8000_0000;

/// The id of every container superblock.
pub(super) const OID_SUPERBLOCK: u64 = 1;

/// [`Superblock::incompat`]: the version on disk since macOS 10.13.
const INCOMPAT_VERSION2: u64 = 0x2;
/// [`Superblock::incompat`]: a Fusion set, on two devices.
pub(super) const INCOMPAT_FUSION: u64 = 0x100;
pub(super) const INCOMPAT_KNOWN: u64 = INCOMPAT_VERSION2 | INCOMPAT_FUSION;

/// [`Superblock::desc_blocks`] and `data_blocks`: the area is described by a B-tree, as it is not
/// contiguous.
pub(super) const AREA_IS_TREE: u32 = 0x8000_0000;

/// [`CheckpointMap::flags`]: the last one of its checkpoint.
pub(super) const CHECKPOINT_MAP_LAST: u32 = 0x1;

/// Of [`ChunkInfo`]'s counts: the rest is reserved.
pub(super) const CHUNK_COUNT_MASK: u32 = 0x000f_ffff;

/// `obj_phys_t`: what every object but bitmaps and file data begins with.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ObjectHeader {
    /// Fletcher-64 of all that follows.
    checksum: U64,
    pub(super) oid: U64,
    /// The transaction that wrote it.
    pub(super) xid: U64,
    pub(super) kind: U32,
    pub(super) subtype: U32,
}

/// `prange_t`: a run of blocks.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct BlockRange {
    pub(super) start: U64,
    pub(super) count: U64,
}

/// `nx_superblock_t`, of the container.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Superblock {
    pub(super) header: ObjectHeader,
    pub(crate) magic: U32,
    pub(crate) block_size: U32,
    pub(crate) block_count: U64,
    features: U64,
    pub(super) ro_compat: U64,
    pub(super) incompat: U64,
    pub(crate) uuid: [u8; 16],
    next_oid: U64,
    next_xid: U64,
    pub(super) desc_blocks: U32,
    pub(super) data_blocks: U32,
    pub(super) desc_base: U64,
    pub(super) data_base: U64,
    desc_next: U32,
    data_next: U32,
    /// Where in the descriptor area this checkpoint begins, and its length, this superblock included,
    /// which is the last of it.
    pub(super) desc_index: U32,
    pub(super) desc_len: U32,
    data_index: U32,
    data_len: U32,
    pub(super) spaceman_oid: U64,
    pub(super) omap_oid: U64,
    reaper_oid: U64,
    test_type: U32,
    max_volumes: U32,
    /// Virtual ids of the volumes' superblocks; 0: none.
    pub(super) volume_oids: [U64; 100],
    counters: [U64; 32],
    blocked_out: BlockRange,
    evict_mapping_tree: U64,
    flags: U64,
    efi_jumpstart: U64,
    pub(super) fusion_uuid: [u8; 16],
    /// The container's keybag.
    pub(super) keylocker: BlockRange,
    ephemeral_info: [U64; 4],
    test_oid: U64,
    fusion_middle_tree: U64,
    fusion_write_cache: U64,
    fusion_write_cache_range: BlockRange,
    newest_mounted_version: U64,
    pub(super) media_keylocker: BlockRange,
}

/// `checkpoint_map_phys_t`, without its mappings.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct CheckpointMap {
    header: ObjectHeader,
    pub(super) flags: U32,
    pub(super) count: U32,
}

/// `checkpoint_mapping_t`: where an ephemeral object lies in the data area.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct CheckpointMapping {
    pub(super) kind: U32,
    subtype: U32,
    /// In bytes.
    pub(super) size: U32,
    pad: U32,
    fs_oid: U64,
    pub(super) oid: U64,
    pub(super) address: U64,
}

/// `spaceman_device_t`.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SpacemanDevice {
    pub(super) block_count: U64,
    pub(super) chunk_count: U64,
    pub(super) cib_count: U32,
    pub(super) cab_count: U32,
    pub(super) free_count: U64,
    /// Bytes from the start of the space manager to the addresses of the CABs, or of the CIBs where
    /// there are no CABs.
    pub(super) addresses: U32,
    reserved: U32,
    reserved2: U64,
}

/// `spaceman_phys_t`, as far as it is read.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Spaceman {
    header: ObjectHeader,
    pub(super) block_size: U32,
    pub(super) blocks_per_chunk: U32,
    pub(super) chunks_per_cib: U32,
    pub(super) cibs_per_cab: U32,
    pub(super) main: SpacemanDevice,
    /// Of a Fusion set.
    pub(super) tier2: SpacemanDevice,
    flags: U32,
    pool_bitmap_multiplier: U32,
    /// The internal pool, where CIBs, CABs and bitmaps are.
    pub(super) pool_blocks: U64,
    pool_bitmap_size: U32,
    pub(super) pool_bitmap_blocks: U32,
    pub(super) pool_bitmap_base: U64,
    pub(super) pool_base: U64,
}

/// `cib_addr_block_t` (CAB) and `chunk_info_block_t` (CIB), without their entries.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct AddressBlock {
    header: ObjectHeader,
    pub(super) index: U32,
    pub(super) count: U32,
}

/// `chunk_info_t`: a chunk is what one block of bitmap describes.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ChunkInfo {
    pub(super) xid: U64,
    /// Its first block.
    pub(super) start: U64,
    block_count: U32,
    free_count: U32,
    /// The block of its bitmap; 0: all of it is free.
    pub(super) bitmap: U64,
}

impl ChunkInfo {
    pub(super) fn blocks(&self) -> u64 {
        u64::from(self.block_count.get() & CHUNK_COUNT_MASK)
    }

    pub(super) fn free(&self) -> u64 {
        u64::from(self.free_count.get() & CHUNK_COUNT_MASK)
    }
}

/// `omap_phys_t`: an object map, as far as it is read.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ObjectMap {
    header: ObjectHeader,
    flags: U32,
    snapshot_count: U32,
    tree_type: U32,
    snapshot_tree_type: U32,
    pub(super) tree: U64,
}

/// `omap_key_t`.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ObjectMapKey {
    pub(super) oid: U64,
    pub(super) xid: U64,
}

/// `omap_val_t`.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ObjectMapValue {
    pub(super) flags: U32,
    size: U32,
    pub(super) address: U64,
}

/// [`ObjectMapValue::flags`]: there is no such object any more.
pub(super) const OMAP_DELETED: u32 = 0x1;

/// `btree_node_phys_t`, without its data.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct BtreeNode {
    header: ObjectHeader,
    pub(super) flags: U16,
    pub(super) level: U16,
    pub(super) count: U32,
    /// Where in the data the table of contents is; the keys follow it.
    pub(super) table: Place,
    free_space: Place,
    key_free_list: Place,
    value_free_list: Place,
}

/// [`BtreeNode::flags`]: the root; what there is to know of the tree is at its end.
pub(super) const NODE_ROOT: u16 = 0x1;
/// [`BtreeNode::flags`]: keys and values have one size each.
pub(super) const NODE_FIXED: u16 = 0x4;
/// Bytes of `btree_info_t`, at the end of a root.
pub(super) const BTREE_INFO_SIZE: usize = 40;

/// `nloc_t`: offset and length in bytes.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Place {
    pub(super) offset: U16,
    pub(super) len: U16,
}

/// `kvoff_t`: a place in the table of contents of a node of fixed sizes.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct FixedEntry {
    pub(super) key: U16,
    pub(super) value: U16,
}

/// `kvloc_t`: the same of any other node.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Entry {
    pub(super) key: Place,
    pub(super) value: Place,
}

/// `apfs_modified_by_t`.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ModifiedBy {
    id: [u8; 32],
    timestamp: U64,
    last_xid: U64,
}

/// `apfs_superblock_t`, of a volume.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct VolumeSuperblock {
    header: ObjectHeader,
    pub(super) magic: U32,
    index: U32,
    features: U64,
    ro_compat: U64,
    pub(super) incompat: U64,
    unmount_time: U64,
    reserve_blocks: U64,
    quota_blocks: U64,
    pub(super) allocated_blocks: U64,
    meta_crypto: [u8; 20],
    root_tree_type: U32,
    extent_tree_type: U32,
    snapshot_tree_type: U32,
    omap: U64,
    root_tree: U64,
    extent_tree: U64,
    /// Physical: the address of the root of the tree of snapshots.
    pub(super) snapshot_tree: U64,
    revert_to_xid: U64,
    revert_to_superblock: U64,
    next_object: U64,
    files: U64,
    directories: U64,
    symlinks: U64,
    others: U64,
    pub(super) snapshots: U64,
    blocks_allocated: U64,
    blocks_freed: U64,
    pub(super) uuid: [u8; 16],
    last_modified: U64,
    pub(super) flags: U64,
    formatted_by: ModifiedBy,
    modified_by: [ModifiedBy; 8],
    pub(super) name: [u8; 256],
    next_document: U32,
    pub(super) role: U16,
}

/// [`VolumeSuperblock::flags`]: nothing of it is encrypted by software.
pub(super) const VOLUME_UNENCRYPTED: u64 = 0x1;
/// [`VolumeSuperblock::incompat`]: hashes of all of it are kept, and sealed.
pub(super) const VOLUME_SEALED: u64 = 0x20;

/// `j_snap_metadata_val_t`, without the name.
#[derive(Clone, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SnapshotValue {
    extent_tree: U64,
    superblock: U64,
    /// Nanoseconds since 1970.
    pub(super) created: U64,
    changed: U64,
    inode: U64,
    extent_tree_type: U32,
    flags: U32,
    pub(super) name_len: U16,
}

/// Of a key of the tree of snapshots: what it is, in the upper four bits; the transaction in the rest.
pub(super) const KEY_TYPE_SHIFT: u32 = 60;
pub(super) const KEY_ID_MASK: u64 = (1 << KEY_TYPE_SHIFT) - 1;
pub(super) const KEY_SNAPSHOT: u64 = 1;

/// Whether an object's checksum holds. The object has a header, and a multiple of four bytes.
pub(super) fn checksum_holds(object: &[u8]) -> bool {
    match object.split_first_chunk::<8>() {
        Some((stored, rest)) => sums_match(&fletcher64(rest), &u64::from_le_bytes(*stored)),
        None => false,
    }
}

/// The checksum of what follows it in an object: Fletcher's over words of 32 bits, turned so that the
/// sums over all of the object become 0.
pub(crate) fn fletcher64(bytes: &[u8]) -> u64 {
    const MODULUS: u64 = 0xffff_ffff;
    // So many words cannot make the sums overflow.
    const WORDS: usize = 1 << 15;
    let (mut low, mut high) = (0u64, 0u64);
    for part in bytes.chunks(WORDS * 4) {
        for word in part.as_chunks::<4>().0 {
            low += u64::from(u32::from_le_bytes(*word));
            high += low;
        }
        low %= MODULUS;
        high %= MODULUS;
    }
    let first = MODULUS - (low + high) % MODULUS;
    let second = MODULUS - (low + first) % MODULUS;
    second << 32 | first
}

const _: () = {
    assert!(size_of::<ObjectHeader>() == 0x20);
    assert!(size_of::<Superblock>() == 0x580);
    assert!(core::mem::offset_of!(Superblock, keylocker) == 0x510);
    assert!(size_of::<CheckpointMap>() == 40);
    assert!(size_of::<CheckpointMapping>() == 40);
    assert!(core::mem::offset_of!(Spaceman, pool_base) == 176);
    assert!(size_of::<ChunkInfo>() == 32);
    assert!(size_of::<BtreeNode>() == 56);
    assert!(core::mem::offset_of!(VolumeSuperblock, name) == 0x2c0);
    assert!(size_of::<SnapshotValue>() == 50);
};
