//! What a volume holds, by its magic numbers.

use super::{Info, Kind};
use crate::error::Result;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

mod containers;
mod filesystems;
mod tables;

/// Bytes from the start of a volume within which all signatures lie, but those at its end: the
/// last is the first label of a ZFS vdev.
const HEAD: u64 = 256 << 10;
/// Bytes at the end of a volume within which old md superblocks lie.
const TAIL: u64 = 128 << 10;

/// Says what is on a volume, by its signatures alone; `None` if it carries none that is known.
/// If it carries several: containers first, then hybrid ISO images, GPT, filesystems, MBR.
///
/// # Errors
/// If reading fails.
pub fn probe(source: &dyn ReadAt) -> Result<Option<Info>> {
    Ok(signatures(source)?.found.into_iter().next())
}

/// What [`signatures`] found.
pub(super) struct Signatures {
    /// The most likely first.
    pub(super) found: Vec<Info>,
    /// Some places where there could be one cannot be read.
    pub(super) is_partial: bool,
}

/// All signatures on a volume. More than one means that an older one was left behind, or that
/// something lies within something else (a filesystem on one half of an md mirror): what the
/// volume holds is then not certain. Containers come first, then what is made over existing
/// partition tables on purpose (hybrid ISO images), GPT, filesystems, and last the MBR, whose
/// signature many boot sectors have.
///
/// # Errors
/// If reading fails.
pub(super) fn signatures(source: &dyn ReadAt) -> Result<Signatures> {
    let volume = Volume::read(source)?;
    let mut found: Vec<Info> = containers::ALL
        .iter()
        .chain(filesystems::OPTICAL)
        .chain(tables::GPT)
        .chain(filesystems::ALL)
        .filter_map(|matches| matches(&volume))
        .collect();
    // The boot sectors of these look like an MBR.
    let has_boot_sector = |info: &Info| {
        matches!(
            info.kind,
            Kind::Vfat | Kind::Exfat | Kind::Ntfs | Kind::BitLocker
        )
    };
    if !found
        .iter()
        .any(|info| has_boot_sector(info) || info.kind == Kind::PartitionTable)
    {
        found.extend(tables::mbr(&volume));
    }
    Ok(Signatures {
        found,
        is_partial: volume.is_partial,
    })
}

/// Whether the superblock of an md array is at the start of a volume: versions 1.1 and 1.2.
pub(super) fn is_md_at_start(source: &dyn ReadAt) -> bool {
    Volume::read(source).is_ok_and(|volume| containers::md(&volume).is_some())
}

/// A function that knows one signature.
type Matcher = fn(&Volume) -> Option<Info>;

/// The parts of a volume that signatures lie in.
struct Volume {
    head: Vec<u8>,
    tail: Vec<u8>,
    len: ByteLen,
    is_partial: bool,
}

impl Volume {
    fn read(source: &dyn ReadAt) -> Result<Self> {
        let len = source.len();
        let head = len.min(ByteLen(HEAD));
        let tail = len.min(ByteLen(TAIL));
        let (head, head_is_partial) = read_patiently(source, Offset::ZERO, head)?;
        let (tail, tail_is_partial) = read_patiently(source, Offset(len.0 - tail.0), tail)?;
        Ok(Self {
            head,
            tail,
            len,
            is_partial: head_is_partial || tail_is_partial,
        })
    }

    /// `N` bytes at a position of the head.
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.head.get(at..)?.first_chunk().copied()
    }

    /// Whether `magic` stands at a position of the head.
    fn has(&self, at: usize, magic: &[u8]) -> bool {
        self.head
            .get(at..)
            .is_some_and(|rest| rest.starts_with(magic))
    }

    fn u8(&self, at: usize) -> Option<u8> {
        self.head.get(at).copied()
    }

    fn le16(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    fn le32(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    fn le64(&self, at: usize) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }

    fn be16(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    fn be32(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    fn be64(&self, at: usize) -> Option<u64> {
        self.bytes(at).map(u64::from_be_bytes)
    }

    /// A text field of the head.
    fn text(&self, at: usize, len: usize) -> Option<String> {
        text(self.head.get(at..)?.get(..len)?)
    }

    /// A binary UUID in the head.
    fn uuid(&self, at: usize) -> Option<String> {
        uuid(&self.bytes(at)?)
    }
}

/// Reads a range, zeros in place of what cannot be read, and whether there was such.
fn read_patiently(source: &dyn ReadAt, start: Offset, len: ByteLen) -> Result<(Vec<u8>, bool)> {
    const PIECE: usize = 4096;
    match source.read_vec_at(start, len) {
        Err(error) if error.kind() == crate::error::Kind::Io => {}
        other => return Ok((other?, false)),
    }
    let mut bytes = vec![0; len.as_usize()];
    let mut at = start;
    let mut is_readable = false;
    for piece in bytes.chunks_mut(PIECE) {
        match source.read_exact_at(piece, at) {
            Ok(()) => is_readable = true,
            // What is not readable at all is not a volume with a bad block.
            Err(error) if error.kind() != crate::error::Kind::Io || !is_readable && at != start => {
                return Err(error);
            }
            Err(_) => piece.fill(0),
        }
        at = at + ByteLen(piece.len() as u64);
    }
    Ok((bytes, true))
}

/// What is known of something of which only its kind is.
fn only(kind: Kind) -> Info {
    Info {
        kind,
        label: None,
        uuid: None,
        block_size: 0,
        size: ByteLen::ZERO,
    }
}

/// The size of so many blocks; 0 for "not known" where it makes no sense.
fn blocks(count: u64, block_size: u32) -> ByteLen {
    ByteLen(count.checked_mul(u64::from(block_size)).unwrap_or(0))
}

/// Text of a fixed field: up to the first NUL, without blanks at the end; `None` if nothing is
/// left. What is not UTF-8 is replaced.
pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|&byte| byte == 0);
    let bytes = &bytes[..end.unwrap_or(bytes.len())];
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end();
    (!text.is_empty()).then(|| text.to_owned())
}

/// A UUID as text; `None` if it is nil.
fn uuid(bytes: &[u8; 16]) -> Option<String> {
    let uuid = uuid::Uuid::from_bytes(*bytes);
    (!uuid.is_nil()).then(|| uuid.to_string())
}
