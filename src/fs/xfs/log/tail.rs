//! What a freeze leaves in the log, from its tail to its head.
//!
//! A freeze writes every logged change to its place first (`xfs_log_quiesce` in the kernel's
//! `fs/xfs/xfs_log.c`), and only then makes the log look so (`xfs_log_cover`). How it looks at last is
//! one of these:
//!
//! - Two records of the superblock's counters, the first of which is the tail.
//! - One such record alone, if nothing else was written since the filesystem was mounted.
//! - One such record behind one of any changes, which is the tail. The kernel takes a log for covered
//!   that was covered before, as long as its records are completed one at a time and are as short as one
//!   of the superblock: those of a `touch`, or of the time stamps of data that is overwritten in place.
//!   The record of the counters that it writes all the same has the last record before it as its tail.
//!   After a mount that replayed the log, that is the last record that was replayed.
//!
//! The first two are believed whoever reads them: what lies before the tail is in its place, and a
//! superblock's counters allocate nothing. The third looks the same after a power cut that came before
//! the changes were written to their places: it is believed only if the caller itself holds frozen, or
//! held frozen for this instant, a filesystem that is mounted for writing. There it is sound:
//!
//! - FIFREEZE returns, and LVM or the device mapper goes on, only when the changes are in their places;
//!   of a filesystem that was shut down it fails. That is the proof; the log only confirms it.
//! - What a power cut left is never in such a log, for a mount for writing begins by replaying it. One
//!   that is mounted read-only may have kept it (`norecovery`), and a freeze does nothing to that: the
//!   caller does not call it frozen.
//! - A filesystem that lives on, or another device than the one that is frozen, mostly has more in its
//!   log. And in version 5, the superblock on disk carries the place of its own last record, that at the
//!   head: a freeze waits until it is written, where otherwise that takes half a minute.
//!
//! More than that no freeze leaves.

use super::format;
use super::transactions::Transactions;
use super::{Found, Log, State};
use crate::error::Result;
use crate::units::SECTOR;

/// More than this is never what a freeze leaves. A record may be padded to 256 KiB.
const MAX_BLOCKS: u64 = (4 << 20) / SECTOR;

impl Log<'_> {
    /// Judges what lies between the tail, as the last record tells it, and `head`.
    pub(super) fn judge_tail(&self, last: &Found, head: u64) -> Result<State> {
        let tail_lsn = last.record.tail_lsn.get();
        let tail = tail_lsn & u64::from(u32::MAX);
        if tail >= self.blocks {
            return Ok(State::Damaged);
        }
        let distance = self.wrap(head + self.blocks - tail);
        if distance == 0 || distance > MAX_BLOCKS {
            return Ok(State::Dirty);
        }
        let mut at = 0;
        let mut transactions = Transactions::default();
        let mut has_changes = false;
        while at < distance {
            let block = self.wrap(tail + at);
            let Some(found) = self.record_at(block)? else {
                return Ok(State::Damaged);
            };
            let record = &found.record;
            if record.lsn.get() & u64::from(u32::MAX) != block
                || record.format.get() != format::LOG_FORMAT_LINUX_LE
            {
                return Ok(State::Damaged);
            }
            let Some(body) = self.read_record(&found)? else {
                return Ok(State::Damaged);
            };
            if !transactions.take(record, &body) {
                let may_be_changes = self.is_frozen && at == 0 && record.lsn.get() == tail_lsn;
                if !may_be_changes || !self.ends_in_superblock(last, &found, head) {
                    return Ok(State::Dirty);
                }
                has_changes = true;
                transactions = Transactions::default();
            }
            at += self.record_blocks(record);
        }
        let is_whole = at == distance && transactions.is_idle();
        Ok(
            match is_whole && (!has_changes || last.record.ops.get() > 0) {
                true => State::Frozen,
                false => State::Dirty,
            },
        )
    }

    /// Whether behind `changes` only the `last` record follows, and the superblock on disk is that of
    /// the last record, as far as it tells.
    fn ends_in_superblock(&self, last: &Found, changes: &Found, head: u64) -> bool {
        let next = self.wrap(changes.block + self.record_blocks(&changes.record));
        let is_written = !self.superblock.is_v5() || self.superblock.lsn == last.record.lsn;
        next == last.block && next != head && is_written
    }
}
