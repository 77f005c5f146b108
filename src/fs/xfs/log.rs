//! Whether anything waits in the log.
//!
//! The log is a ring of 512-byte blocks. Records are written to it one behind the other; the
//! first word of every block on disk is the number of the round it was written in (its cycle),
//! or, where a record begins, a magic followed by the cycle. The head is where the next record
//! would go; the last record before it says where the tail is: the oldest record whose changes
//! are not all in their places. The search for both follows `xlog_find_head` and
//! `xlog_find_tail` in the kernel's `fs/xfs/xfs_log_recover.c`.

use zerocopy::FromBytes;

use super::Geometry;
use super::format::{self, LogOp, LogRecord, SuperBlock};
use crate::error::Result;
use crate::fs::sums_match;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset, SECTOR};

mod tail;
mod transactions;

/// What a log says about its filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Its last record is that of an unmount, or it was never written to.
    Clean,
    /// From its tail on there is nothing but what a freeze leaves ([`tail`]).
    Frozen,
    /// Something would have to be replayed.
    Dirty,
    /// It makes no sense.
    Damaged,
}

/// Blocks read at once while cycles are looked at.
const SCAN_BLOCKS: u64 = (256 << 10) / SECTOR;

/// Judges the internal log. `is_frozen`: the filesystem is mounted for writing, and the caller holds it
/// frozen.
///
/// # Errors
/// If reading fails.
pub(super) fn state(
    source: &dyn ReadAt,
    superblock: &SuperBlock,
    geometry: &Geometry,
    is_frozen: bool,
) -> Result<State> {
    let log = Log {
        source,
        superblock,
        start: geometry.log.start,
        blocks: geometry.log.len.0 / SECTOR,
        is_frozen,
    };
    log.state()
}

struct Log<'a> {
    source: &'a dyn ReadAt,
    superblock: &'a SuperBlock,
    start: Offset,
    /// Blocks of 512 bytes.
    blocks: u64,
    is_frozen: bool,
}

/// A record and where it begins.
struct Found {
    block: u64,
    record: LogRecord,
}

impl Log<'_> {
    fn state(&self) -> Result<State> {
        if self.blocks < 2 {
            return Ok(State::Damaged);
        }
        let Some(head) = self.find_head()? else {
            return Ok(State::Damaged);
        };
        if head == 0 && self.cycle(0)? == 0 {
            return Ok(State::Clean);
        }
        let Some(last) = self.last_record(head)? else {
            return Ok(State::Damaged);
        };
        if last.record.uuid != self.superblock.uuid {
            return Ok(State::Damaged);
        }
        if self.wrap(last.block + self.record_blocks(&last.record)) != head {
            return Ok(State::Damaged);
        }
        let Some(body) = self.read_record(&last)? else {
            return Ok(State::Damaged);
        };
        if self.goes_on(&last, head)? {
            return Ok(State::Dirty);
        }
        if is_unmount(&last.record, &body) {
            return Ok(State::Clean);
        }
        self.judge_tail(&last, head)
    }

    /// The block where the next record would go; `None` if the log makes no sense.
    fn find_head(&self) -> Result<Option<u64>> {
        let first_cycle = self.cycle(0)?;
        let last_cycle = self.cycle(self.blocks - 1)?;
        if first_cycle == 0 {
            return Ok(Some(0));
        }
        // Several records may have been on their way to disk at once, in any order: around the
        // place where the cycles change, that much is looked at block by block.
        let window = self
            .blocks
            .min(format::LOG_MAX_IN_FLIGHT * self.max_record() / SECTOR);
        if last_cycle == 0 {
            if first_cycle != 1 {
                return Ok(None);
            }
            let change = self.find_change(0, self.blocks - 1, 0)?;
            let from = change - window.min(change);
            let head = self.first_with(from, change, 0)?.unwrap_or(change);
            return self.whole_record_before(head);
        }
        let (mut head, stop_at) = if first_cycle == last_cycle {
            (self.blocks, last_cycle.wrapping_sub(1))
        } else {
            (
                self.find_change(0, self.blocks - 1, last_cycle)?,
                last_cycle,
            )
        };
        if head >= window {
            head = self
                .first_with(head - window, head, stop_at)?
                .unwrap_or(head);
        } else {
            let from = self.blocks - (window - head);
            head = match self.first_with(from, self.blocks, stop_at.wrapping_sub(1))? {
                Some(hole) => hole,
                None => self.first_with(0, head, stop_at)?.unwrap_or(head),
            };
        }
        self.whole_record_before(head)
    }

    /// By halving: where blocks begin to have `cycle`, between `low`, which has not, and `high`,
    /// which has.
    fn find_change(&self, mut low: u64, mut high: u64, cycle: u32) -> Result<u64> {
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.cycle(middle)? == cycle {
                high = middle;
            } else {
                low = middle;
            }
        }
        Ok(high)
    }

    /// The first block in `[from, to)` that has `cycle`.
    fn first_with(&self, from: u64, to: u64, cycle: u32) -> Result<Option<u64>> {
        let mut at = from;
        while at < to {
            let count = SCAN_BLOCKS.min(to - at);
            let bytes = self.read(at, count)?;
            let found = bytes
                .chunks_exact(ByteLen(SECTOR).as_usize())
                .position(|block| cycle_of(block) == cycle);
            if let Some(index) = found {
                return Ok(Some(at + index as u64));
            }
            at += count;
        }
        Ok(None)
    }

    /// `head`, if a record ends just there; else where the last record that begins before it
    /// begins, for that one is not whole. Both the block behind the last and the first stand for
    /// a head at the start.
    fn whole_record_before(&self, head: u64) -> Result<Option<u64>> {
        let reach = self.max_record() / SECTOR;
        let here = head.min(reach);
        if let Some(found) = self.last_header(head - here, head)? {
            let whole = head - found.block == self.record_blocks(&found.record);
            return Ok(Some(self.wrap(if whole { head } else { found.block })));
        }
        if head >= reach {
            return Ok(None);
        }
        let from = self.blocks.saturating_sub(reach - head).max(head);
        let Some(found) = self.last_header(from, self.blocks)? else {
            return Ok(None);
        };
        let whole = self.blocks - found.block + head == self.record_blocks(&found.record);
        Ok(Some(self.wrap(if whole { head } else { found.block })))
    }

    /// The last record that begins before `head`, going round.
    fn last_record(&self, head: u64) -> Result<Option<Found>> {
        let reach = self.max_record() / SECTOR + format::LOG_MAX_IN_FLIGHT;
        let here = head.min(reach);
        if let Some(found) = self.last_header(head - here, head)? {
            return Ok(Some(found));
        }
        let from = self.blocks.saturating_sub(reach - here).max(head);
        self.last_header(from, self.blocks)
    }

    /// The last record header in `[from, to)`.
    fn last_header(&self, from: u64, to: u64) -> Result<Option<Found>> {
        let mut end = to;
        while end > from {
            let count = SCAN_BLOCKS.min(end - from);
            let bytes = self.read(end - count, count)?;
            let blocks = bytes.chunks_exact(ByteLen(SECTOR).as_usize()).enumerate();
            for (index, block) in blocks.rev() {
                let Ok((record, _)) = LogRecord::read_from_prefix(block) else {
                    continue;
                };
                if record.magic.get() == format::LOG_MAGIC {
                    return Ok(Some(Found {
                        block: end - count + index as u64,
                        record,
                    }));
                }
            }
            end -= count;
        }
        Ok(None)
    }

    /// The record of this filesystem that begins at a block.
    fn record_at(&self, block: u64) -> Result<Option<Found>> {
        let bytes = self.read(block, 1)?;
        let record = LogRecord::read_from_prefix(&bytes)
            .ok()
            .map(|(record, _)| record);
        Ok(record
            .filter(|record| {
                record.magic.get() == format::LOG_MAGIC && record.uuid == self.superblock.uuid
            })
            .map(|record| Found { block, record }))
    }

    /// Whether something was written behind `head` after all: where a crash tore records apart,
    /// or where a damaged cycle made the search stop too early. Never so after an unmount or a
    /// freeze, which wait for all writes.
    fn goes_on(&self, last: &Found, head: u64) -> Result<bool> {
        let cycle = last.record.cycle.get();
        // The last record may itself have gone round.
        let next = if head <= last.block {
            next_cycle(cycle)
        } else {
            cycle
        };
        let window = format::LOG_MAX_IN_FLIGHT * self.max_record() / SECTOR;
        // What xfs_repair and xfs_admin make of a log is one unmount at the start and, to raise
        // the cycle, others up to the end: the head is then found between them.
        let mut from = head;
        if let Some(here) = self.record_at(head)?
            && here.record.cycle.get() == next
            && let Some(body) = self.read_record(&here)?
            && is_unmount(&here.record, &body)
        {
            from = self.blocks.min(head + self.record_blocks(&here.record));
        }
        let bytes = self.read(from, window.min(self.blocks - from))?;
        let mut cycles = bytes.chunks_exact(ByteLen(SECTOR).as_usize()).map(cycle_of);
        Ok(cycles.any(|cycle| cycle >= next))
    }

    /// Blocks of a record, its headers included.
    fn record_blocks(&self, record: &LogRecord) -> u64 {
        header_blocks(record) + u64::from(record.len.get()).div_ceil(SECTOR)
    }

    /// What a record holds, checked, its first words put back; `None` if it is damaged.
    fn read_record(&self, found: &Found) -> Result<Option<Vec<u8>>> {
        let record = &found.record;
        let len = u64::from(record.len.get());
        let headers = header_blocks(record);
        if len > self.max_record()
            || u64::from(record.size.get()) > self.max_record()
            || self.record_blocks(record) > self.blocks
        {
            return Ok(None);
        }
        let header = self.read(found.block, headers)?;
        let mut body = self.read(self.wrap(found.block + headers), len.div_ceil(SECTOR))?;
        if !log_crc_holds(record, &header, &body[..ByteLen(len).as_usize()]) {
            return Ok(None);
        }
        // The words of the first 64 blocks are in the header, of the next 64 in the next, …
        // Behind the end of the ring the next cycle begins.
        let sector = ByteLen(SECTOR).as_usize();
        let before_wrap = self.blocks.saturating_sub(found.block + headers);
        for (index, block) in body.chunks_exact_mut(sector).enumerate() {
            let (which, word) = (
                index / format::LOG_CYCLE_WORDS,
                index % format::LOG_CYCLE_WORDS,
            );
            let cycle = record.cycle.get();
            let expected = if (index as u64) < before_wrap {
                cycle
            } else {
                next_cycle(cycle)
            };
            let original = if which == 0 {
                record.cycle_data.get(word).copied()
            } else {
                let at = which * sector + 4 + 4 * word;
                header
                    .get(at..)
                    .and_then(|rest| rest.first_chunk().copied())
            };
            match original {
                Some(original) if block[..4] == expected.to_be_bytes() => {
                    block[..4].copy_from_slice(&original);
                }
                _ => return Ok(None),
            }
        }
        body.truncate(ByteLen(len).as_usize());
        Ok(Some(body))
    }

    /// The largest record, in bytes.
    fn max_record(&self) -> u64 {
        if self.superblock.has_log_v2() {
            format::LOG_MAX_RECORD_V2
        } else {
            format::LOG_MAX_RECORD_V1
        }
    }

    /// The cycle of one block.
    fn cycle(&self, block: u64) -> Result<u32> {
        Ok(cycle_of(&self.read(block, 1)?))
    }

    /// A block number, going round.
    fn wrap(&self, block: u64) -> u64 {
        block % self.blocks
    }

    /// `count` blocks from `block` on, going round once.
    fn read(&self, block: u64, count: u64) -> Result<Vec<u8>> {
        let first = count.min(self.blocks - block);
        let at = |block: u64| self.start + ByteLen(block * SECTOR);
        let mut bytes = self
            .source
            .read_vec_at(at(block), ByteLen(first * SECTOR))?;
        if count > first {
            let rest = ByteLen((count - first) * SECTOR);
            bytes.extend(self.source.read_vec_at(at(0), rest)?);
        }
        Ok(bytes)
    }
}

/// The cycle a block was written in.
fn cycle_of(block: &[u8]) -> u32 {
    let word = |at: usize| {
        let bytes = block.get(at..).and_then(|rest| rest.first_chunk());
        u32::from_be_bytes(bytes.copied().unwrap_or_default())
    };
    if word(0) == format::LOG_MAGIC {
        word(4)
    } else {
        word(0)
    }
}

/// Whether a record, of which `body` is what it holds, is that of an unmount.
fn is_unmount(record: &LogRecord, body: &[u8]) -> bool {
    record.ops.get() == 1
        && LogOp::read_from_prefix(body).is_ok_and(|(op, _)| op.flags & format::OP_UNMOUNT != 0)
}

/// The cycle after `cycle`: never the magic (`xlog_split_iclog`).
fn next_cycle(cycle: u32) -> u32 {
    match cycle.wrapping_add(1) {
        format::LOG_MAGIC => format::LOG_MAGIC + 1,
        next => next,
    }
}

/// Blocks of headers before what a record holds (`xlog_logrec_hblks`).
fn header_blocks(record: &LogRecord) -> u64 {
    let size = record.size.get();
    if record.version.get() & format::LOG_VERSION_2 != 0 && size > format::LOG_CYCLE_SIZE {
        u64::from(size.div_ceil(format::LOG_CYCLE_SIZE))
    } else {
        1
    }
}

/// Whether a record's checksum holds (`xlog_cksum`). Those of mkfs and of old kernels have none. Of the
/// extended headers it covers as many as the body needs, however many there are.
fn log_crc_holds(record: &LogRecord, headers: &[u8], body: &[u8]) -> bool {
    if record.crc == [0; 4] {
        return true;
    }
    format::LOG_HEADER_SIZES.into_iter().any(|size| {
        let Some(first) = headers.get(..size) else {
            return false;
        };
        let (before, rest) = first.split_at(format::LOG_CRC_OFFSET);
        let mut crc = [before, &[0; 4], &rest[4..]]
            .into_iter()
            .fold(0, crc32c::crc32c_append);
        let needed = body.len().div_ceil(format::LOG_CYCLE_SIZE as usize);
        let headers = headers.chunks_exact(ByteLen(SECTOR).as_usize());
        for extended in headers.take(needed).skip(1) {
            crc = crc32c::crc32c_append(crc, &extended[..format::LOG_EXT_HEADER_SIZE]);
        }
        sums_match(&crc32c::crc32c_append(crc, body).to_le_bytes(), &record.crc)
    })
}
