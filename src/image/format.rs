//! On-disk structures of an image, version 1: constants and layouts only, no I/O.
//!
//! `FORMAT.md` beside this file is the specification; the numbers here repeat it.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of every image. As in PNG: a byte no text begins with, the name, and line ends that a
/// transfer in text mode would change.
pub const MAGIC: [u8; 16] = *b"\x89holdstill\r\n\x1a\n\0\0";

/// First bytes of the footer.
pub const FOOTER_MAGIC: [u8; 16] = *b"\x89stillness\r\n\x1a\n\0\0";

/// First bytes of every record header.
pub const RECORD_MAGIC: [u8; 4] = *b"HsR1";

/// The format version this code writes and the newest it reads.
pub const VERSION: u32 = 1;

/// Length of the file header and of the footer in bytes.
pub const FRAME: usize = 4096;

/// Every record begins at a multiple of this many bytes.
pub const RECORD_ALIGN: u64 = 8;

/// A raw payload begins at a multiple of this many bytes, so that it can be written by direct I/O.
pub const RAW_ALIGN: u64 = 4096;

/// Unit of extents and of zero detection in bytes.
pub const BLOCK: u64 = 4096;

/// Unit of content hashing in bytes: a volume is hashed in cells of this length from its start.
pub const CELL: u64 = 1 << 20;

/// Blocks in one cell.
pub const BLOCKS_PER_CELL: usize = (CELL / BLOCK) as usize;

/// No data or stream record holds more plain bytes than this.
pub const MAX_PLAIN: u32 = 8 << 20;

/// No record has more extents than this.
pub const MAX_EXTENTS: u32 = 8192;

/// No record has more hashes than this: every block of the largest record in a cell of its own.
pub const MAX_HASHES: u32 = MAX_PLAIN / BLOCK as u32;

/// No JSON text is longer than this, in bytes.
pub const MAX_JSON: u32 = 4 << 20;

/// No index segment has more entries than this.
pub const MAX_SEGMENT: usize = 4096;

/// No index root has more entries than this.
pub const MAX_SEGMENTS: usize = 1 << 18;

/// No record of a kind that may be skipped is longer than this, in bytes.
pub const MAX_SKIPPED: u32 = 16 << 20;

/// Passes are numbered below this.
pub const MAX_PASSES: u32 = 256;

/// No image has more volumes and streams than this.
pub const MAX_VOLUMES: usize = 4096;

/// No volume is larger than this, in bytes: positions stay far from the end of the number range.
pub const MAX_VOLUME_SIZE: u64 = 1 << 62;

/// Feature bits. A reader ignores unknown *compatible* bits; it may read, but not append to or prune,
/// an image with unknown *read-only compatible* bits; it refuses one with unknown *incompatible* bits.
///
/// Bytes and fields that this version calls zero may be used by incompatible features only: others can
/// have ignorable records and new fields in the JSON texts.
pub mod feature {
    /// Incompatible: the image holds only what differs from a parent image.
    pub const PARENT: u64 = 1 << 0;
    /// Incompatible: payloads are encrypted.
    pub const ENCRYPTED: u64 = 1 << 1;
    /// Incompatible: one logical extent lives in several physical places.
    pub const MIRRORED: u64 = 1 << 2;
    /// Incompatible: it holds opaque streams.
    pub const STREAMS: u64 = 1 << 3;

    /// Incompatible: of a filesystem it has the metadata as a whole, and the data of one subvolume.
    pub const SUBVOLUME: u64 = 1 << 4;

    /// Incompatible bits that this version reads.
    pub const KNOWN_INCOMPATIBLE: u64 = STREAMS | SUBVOLUME;

    /// Names of the incompatible bits that are defined, for messages.
    pub const INCOMPATIBLE_NAMES: [(u64, &str); 5] = [
        (PARENT, "a parent image (incremental)"),
        (ENCRYPTED, "encryption"),
        (MIRRORED, "mirrored extents"),
        (STREAMS, "opaque streams"),
        (SUBVOLUME, "one subvolume of a filesystem"),
    ];
}

/// What a record holds. Numbers from [`record_kind::IGNORABLE`] on may be skipped by a reader that does not know
/// them; an unknown one below is damage or a newer format.
pub mod record_kind {
    /// JSON about the volumes; always the first record.
    pub const MANIFEST: u8 = 1;
    /// Blocks of a volume: data, zeros, or no longer used.
    pub const DATA: u8 = 2;
    /// Entries of the index, for some of the data records before it.
    pub const INDEX: u8 = 3;
    /// Where the index segments are; the last record but one. In front of it stands the manifest again.
    pub const INDEX_ROOT: u8 = 4;
    /// JSON about what was achieved; always the last record.
    pub const TRAILER: u8 = 5;
    /// A chunk of an opaque stream.
    pub const STREAM: u8 = 6;
    /// Reserved: runs of blocks that belong in a second place too.
    pub const MIRRORS: u8 = 7;
    /// Reserved: how to come by the key of an encrypted image.
    pub const KEYS: u8 = 8;
    /// Kinds from here on may be skipped.
    pub const IGNORABLE: u8 = 0x80;
}

/// How a payload is stored.
pub mod codec {
    /// As it is.
    pub const NONE: u8 = 0;
    /// One zstd frame (RFC 8878) with its content size, without dictionary.
    pub const ZSTD: u8 = 1;
}

/// Kinds of cipher in the file header.
pub mod cipher {
    /// Nothing is encrypted.
    pub const NONE: u8 = 0;
    /// Reserved: XChaCha20-Poly1305.
    pub const XCHACHA20_POLY1305: u8 = 1;
}

/// Kinds of content hash in the file header.
pub mod hash_kind {
    /// BLAKE3, unkeyed, 32 bytes.
    pub const BLAKE3: u8 = 1;
    /// Reserved: BLAKE3, keyed, 32 bytes.
    pub const BLAKE3_KEYED: u8 = 2;
}

/// Bits of [`RecordHeader::flags`].
pub mod record_flag {
    /// Nothing else in the image is part of the cells this record touches, but for blocks that a
    /// record of a later pass supersedes: its hashes are the cells' own.
    pub const WHOLE_CELLS: u16 = 1 << 0;
    /// Reserved: tables and payload are encrypted.
    pub const ENCRYPTED: u16 = 1 << 1;
    /// Flags that this version reads; a record with any other is refused.
    pub const KNOWN: u16 = WHOLE_CELLS;
}

/// What the blocks of an extent are.
pub mod extent_kind {
    /// In the payload.
    pub const DATA: u32 = 0;
    /// All zeros; not in the payload.
    pub const ZERO: u32 = 1;
    /// No longer part of the volume's content: an earlier record's copy is void.
    pub const TRIM: u32 = 2;
    /// Where the kind stands in [`ExtentEntry::len_kind`](super::ExtentEntry::len_kind).
    pub const SHIFT: u32 = 30;
    /// Largest length of one extent in blocks.
    pub const MAX_LEN: u32 = (1 << SHIFT) - 1;
}

/// The file header: the first [`FRAME`] bytes. What is not named here is zero, but for the CRC-32 of
/// all bytes before it in the last four bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FileHeader {
    /// [`MAGIC`].
    pub magic: [u8; 16],
    /// [`VERSION`].
    pub version: U32,
    /// [`FRAME`].
    pub header_len: U32,
    /// Feature bits a reader may ignore.
    pub compatible: U64,
    /// Feature bits that forbid changing the image.
    pub read_only_compatible: U64,
    /// Feature bits without which it cannot be read.
    pub incompatible: U64,
    /// Random; in every record header and in the footer.
    pub image_id: [u8; 16],
    /// [`BLOCK`].
    pub block_len: U32,
    /// [`CELL`].
    pub cell_len: U32,
    /// Largest number of plain bytes in any record; at most [`MAX_PLAIN`].
    pub max_plain: U32,
    /// One of [`hash_kind`].
    pub hash_kind: u8,
    /// One of [`cipher`].
    pub cipher: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// From which the key of an encrypted image is derived; else zero.
    pub key_salt: [u8; 32],
}

/// The header in front of every record.
///
/// Behind it: `extents` times [`ExtentEntry`], `hashes` times 32 bytes, `pad` zero bytes, the payload
/// (`stored_len` bytes), and zeros up to a multiple of [`RECORD_ALIGN`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RecordHeader {
    /// [`RECORD_MAGIC`].
    pub magic: [u8; 4],
    /// One of [`record_kind`].
    pub kind: u8,
    /// One of [`codec`].
    pub codec: u8,
    /// Bits of [`record_flag`].
    pub flags: U16,
    /// The image's id.
    pub image_id: [u8; 16],
    /// 0 for the first record, and one more for each.
    pub sequence: U64,
    /// Number of the volume or stream, from 1 (volumes first); 0 where none is meant.
    pub volume: U32,
    /// Data records of one pass are disjoint and ascending in each volume; those of a later pass
    /// supersede what they overlap. Below [`MAX_PASSES`].
    pub pass: U32,
    /// Data: byte offset in the volume from which the extents count. Stream: byte offset in it.
    pub base: U64,
    /// Number of extents (data records only).
    pub extents: U32,
    /// Number of 32-byte hashes.
    pub hashes: U32,
    /// Length of the payload when decoded, in bytes.
    pub plain_len: U32,
    /// Length of the payload as stored, in bytes.
    pub stored_len: U32,
    /// Zero bytes between the tables and the payload; below [`RAW_ALIGN`].
    pub pad: U32,
    /// CRC-32 of extents and hashes.
    pub tables_crc: U32,
    /// CRC-32 of the payload as stored.
    pub payload_crc: U32,
    /// Zero.
    pub reserved: [u8; 16],
    /// CRC-32 of all bytes of the header before it.
    pub header_crc: U32,
}

/// One run of blocks of a data record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtentEntry {
    /// Blocks between the end of the extent before (or the record's `base`) and this one.
    pub gap: U32,
    /// Length in blocks in the lower 30 bits, one of [`extent_kind`] in the upper two.
    pub len_kind: U32,
}

/// One data or stream record in an index segment.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IndexEntry {
    /// The record's sequence number.
    pub sequence: U64,
    /// Where its header begins in the file, in bytes.
    pub position: U64,
    /// Its volume.
    pub volume: U32,
    /// Its pass.
    pub pass: U32,
    /// First byte of its first extent.
    pub start: U64,
    /// First byte behind its last extent.
    pub end: U64,
}

/// One index segment, in the index root. All its entries are of one volume and pass.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct IndexRootEntry {
    /// The segment's own sequence number.
    pub sequence: U64,
    /// Where the segment's record header begins in the file, in bytes.
    pub position: U64,
    /// The volume of its entries.
    pub volume: U32,
    /// The pass of its entries.
    pub pass: U32,
    /// Number of entries in the segment.
    pub entries: U32,
    /// Zero.
    pub reserved: U32,
    /// Where its first entry starts.
    pub start: U64,
    /// Where its last entry ends.
    pub end: U64,
}

/// The footer: the last [`FRAME`] bytes, at a multiple of [`FRAME`]. What is not named here is zero,
/// but for the CRC-32 of all bytes before it in the last four bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Footer {
    /// [`FOOTER_MAGIC`].
    pub magic: [u8; 16],
    /// The image's id.
    pub image_id: [u8; 16],
    /// Where the record header of the manifest's copy begins, in bytes.
    pub manifest: U64,
    /// Where the index root's record header begins, in bytes.
    pub index_root: U64,
    /// Where the trailer's record header begins, in bytes.
    pub trailer: U64,
    /// Number of records.
    pub records: U64,
    /// Length of the whole image in bytes, footer included.
    pub total_len: U64,
    /// BLAKE3 of the file header and of every record's header and tables, in order.
    pub root_hash: [u8; 32],
    /// A copy of the file header, so that an image whose first bytes are lost can still be read.
    pub header: FileHeader,
}

/// Length of a record header in bytes.
pub const RECORD_HEADER: usize = size_of::<RecordHeader>();

const _: () = assert!(size_of::<RecordHeader>() == 96);
const _: () = assert!(size_of::<FileHeader>() == 112 && size_of::<Footer>() == 216);
const _: () = assert!(size_of::<ExtentEntry>() == 8);
const _: () = assert!(size_of::<IndexEntry>() == 40 && size_of::<IndexRootEntry>() == 48);

/// A frame (file header or footer) as it is written: `start`, zeros, and the CRC-32 of both.
pub fn seal_frame(start: &[u8]) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[..start.len()].copy_from_slice(start);
    let crc = crc32fast::hash(&frame[..FRAME - 4]);
    frame[FRAME - 4..].copy_from_slice(&crc.to_le_bytes());
    frame
}

/// Whether a frame's CRC fits.
pub fn frame_is_whole(frame: &[u8; FRAME]) -> bool {
    let (body, crc) = frame.split_at(FRAME - 4);
    crc32fast::hash(body).to_le_bytes() == crc
}

/// Whether all between a frame's first `used` bytes and its CRC is zero.
pub fn frame_is_blank_from(frame: &[u8; FRAME], used: usize) -> bool {
    frame[used..FRAME - 4].iter().all(|byte| *byte == 0)
}

impl RecordHeader {
    /// The CRC-32 that belongs into `header_crc`.
    pub fn compute_crc(&self) -> u32 {
        crc32fast::hash(&self.as_bytes()[..RECORD_HEADER - 4])
    }

    /// Bytes of extents and hashes behind the header. Cannot overflow: both are capped when checked.
    pub fn tables_len(&self) -> usize {
        self.extents.get() as usize * size_of::<ExtentEntry>() + self.hashes.get() as usize * 32
    }

    /// Bytes from the start of this record to the start of the next.
    pub fn total_len(&self) -> u64 {
        let exact = RECORD_HEADER as u64
            + self.tables_len() as u64
            + u64::from(self.pad.get())
            + u64::from(self.stored_len.get());
        exact.next_multiple_of(RECORD_ALIGN)
    }
}
