//! The transactions a freeze leaves in a log, told from all others.
//!
//! A transaction is a row of operations: its start, its header, its items, of which each may have
//! several pieces, and its commit (`xlog_recover_process_data` in the kernel's
//! `fs/xfs/xfs_log_recover.c`). One that only writes the superblock has one item: the buffer of
//! the volume's first sector.

use zerocopy::FromBytes;

use crate::fs::xfs::format::{self, BufferItem, LogOp, LogRecord};
use crate::units::ByteLen;

/// What comes next in the transactions of a log that was frozen.
#[derive(Default)]
pub(super) enum Transactions {
    /// A transaction begins.
    #[default]
    Start,
    /// Its header follows.
    Header { transaction: u32 },
    /// Its items follow, of the current one `pieces` more; then its commit.
    Items { transaction: u32, pieces: u16 },
}

impl Transactions {
    /// Takes the operations of one record. False if there is anything in them but whole
    /// transactions that write the superblock.
    pub(super) fn take(&mut self, record: &LogRecord, body: &[u8]) -> bool {
        let mut rest = body;
        for _ in 0..record.ops.get() {
            let Ok((op, behind)) = LogOp::read_from_prefix(rest) else {
                return false;
            };
            let Some((data, behind)) =
                behind.split_at_checked(ByteLen(op.len.get().into()).as_usize())
            else {
                return false;
            };
            if !self.step(&op, data) {
                return false;
            }
            rest = behind;
        }
        true
    }

    /// Whether every transaction that began has ended.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self, Self::Start)
    }

    fn step(&mut self, op: &LogOp, data: &[u8]) -> bool {
        let id = op.transaction.get();
        let next = match *self {
            Self::Start if op.flags == format::OP_START && data.is_empty() => {
                Self::Header { transaction: id }
            }
            Self::Header { transaction }
                if id == transaction
                    && op.flags == 0
                    && data.starts_with(&format::TRANSACTION_MAGIC.to_le_bytes()) =>
            {
                Self::Items {
                    transaction,
                    pieces: 0,
                }
            }
            Self::Items {
                transaction,
                pieces: 0,
            } if id == transaction && op.flags == format::OP_COMMIT && data.is_empty() => {
                Self::Start
            }
            Self::Items {
                transaction,
                pieces: 0,
            } if id == transaction && op.flags == 0 => match BufferItem::read_from_prefix(data) {
                Ok((item, _))
                    if item.kind.get() == format::ITEM_BUFFER
                        && item.sector.get() == 0
                        && item.pieces.get() >= 1 =>
                {
                    Self::Items {
                        transaction,
                        pieces: item.pieces.get() - 1,
                    }
                }
                _ => return false,
            },
            Self::Items {
                transaction,
                pieces,
            } if id == transaction && op.flags == 0 => Self::Items {
                transaction,
                pieces: pieces - 1,
            },
            _ => return false,
        };
        *self = next;
        true
    }
}
