//! What a volume holds, by its magic numbers.
//!
//! Source of the signatures: the kernel's headers of each filesystem, and `libblkid`'s
//! documentation. Where several match (a filesystem made over an old one of another kind), the
//! order follows libblkid: containers first, then filesystems, partition tables last.

use super::{Info, Kind, ext4, xfs};
use crate::error::Result;
use crate::read_at::ReadAt;
use crate::units::ByteLen;

/// Says what is on a volume, by its signature alone; `None` if it carries none that is known.
///
/// # Errors
/// If reading fails.
pub fn probe(source: &dyn ReadAt) -> Result<Option<Info>> {
    if let Some(info) = ext(source)? {
        return Ok(Some(info));
    }
    xfs(source)
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
pub(super) fn uuid(bytes: &[u8; 16]) -> Option<String> {
    let uuid = uuid::Uuid::from_bytes(*bytes);
    (!uuid.is_nil()).then(|| uuid.to_string())
}

/// ext2, ext3, ext4 and their external journals. The borders between them are libblkid's.
fn ext(source: &dyn ReadAt) -> Result<Option<Info>> {
    use ext4::format as f;
    if source.len() < ByteLen(2048) {
        return Ok(None);
    }
    let superblock = ext4::read_superblock(source)?;
    if superblock.magic.get() != f::MAGIC {
        return Ok(None);
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
    Ok(Some(Info {
        kind,
        label: text(&superblock.volume_name),
        uuid: uuid(&superblock.uuid),
        block_size,
        size: ByteLen(
            superblock
                .blocks_count()
                .saturating_mul(u64::from(block_size)),
        ),
    }))
}

/// XFS.
fn xfs(source: &dyn ReadAt) -> Result<Option<Info>> {
    if source.len() < ByteLen(512) {
        return Ok(None);
    }
    let superblock = xfs::read_superblock(source)?;
    if superblock.magic.get() != xfs::format::SB_MAGIC {
        return Ok(None);
    }
    let block_size = superblock.block_size.get();
    let blocks = superblock.data_blocks.get();
    Ok(Some(Info {
        kind: Kind::Xfs,
        label: text(&superblock.label),
        uuid: uuid(&superblock.uuid),
        block_size,
        size: ByteLen(blocks.saturating_mul(u64::from(block_size))),
    }))
}
