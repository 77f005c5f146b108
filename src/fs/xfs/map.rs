//! The walk over the allocation groups.
//!
//! Free is what the free-space btree by block number of a group says, and nothing else: the
//! group's headers, its btrees, the blocks of its free list and the log are in use because they
//! are not in it. A group whose tree is not proven right from end to end is in use as a whole.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::format::{self, Agf, BtreeHeader, BtreeHeaderV5, FreeRecord};
use super::{Condition, Xfs};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::fs::Walk;
use crate::fs::emit::Emitter;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset, SECTOR};

/// How many runs of free blocks of one group are kept while its tree is checked. A tree with
/// more is walked a second time.
const MAX_KEPT_RUNS: usize = 1 << 17;

/// Why the walk of one group ended early.
enum Stop {
    /// The group is damaged: its neighbours may not be.
    Damage(String),
    /// Reading or the sink failed.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

type Checked<T> = std::result::Result<T, Stop>;

fn damage<T>(what: impl Into<String>) -> Checked<T> {
    Err(Stop::Damage(what.into()))
}

/// Walks the used blocks: see [`Filesystem::walk_used`](crate::fs::Filesystem::walk_used).
pub(super) fn walk(
    xfs: &Xfs,
    source: &dyn ReadAt,
    sink: &mut dyn FnMut(Extent) -> Result<()>,
) -> Result<Walk> {
    let geometry = &xfs.geometry;
    let mut emitter = Emitter::new(source.len(), sink);
    let mut free_blocks = Some(0u64);
    for number in 0..geometry.ag_count {
        let group = Group {
            xfs,
            source,
            number,
        };
        let end = geometry.offset(geometry.ag_start(number) + geometry.ag_len(number));
        match group.emit(&mut emitter) {
            Ok(free) => free_blocks = free_blocks.map(|sum| sum + free),
            Err(Stop::Damage(what)) => {
                free_blocks = None;
                emitter.warn(format!(
                    "allocation group {number}: {what}: all of it is taken as used"
                ));
                emitter.used(geometry.offset(geometry.ag_start(number)), end)?;
            }
            Err(Stop::Error(error)) => return Err(error),
        }
    }
    let noted = xfs.superblock.free_blocks.get();
    if let Some(counted) = free_blocks
        && xfs.condition == Condition::Clean
        && counted != noted
    {
        return Err(Error::new(
            Kind::Damaged,
            format!(
                "the filesystem contradicts itself: the superblock counts {noted} free blocks \
                 and the allocation groups {counted}"
            ),
        )
        .hint("check it with xfs_repair -n; until it is repaired every block has to be copied"));
    }
    emitter.finish(geometry.offset(geometry.blocks))
}

/// One allocation group.
struct Group<'a> {
    xfs: &'a Xfs,
    source: &'a dyn ReadAt,
    number: u64,
}

/// Where the walk of a tree has come to.
struct Progress {
    /// The first block that the next free run may begin at.
    next: u64,
    /// Free blocks so far.
    free: u64,
    /// The longest run so far.
    longest: u64,
    /// By level: the block visited last, and what it says is to its right.
    last: [Option<(u32, u32)>; format::MAX_LEVELS as usize],
}

impl Group<'_> {
    /// Emits what of the group is in use, once all of its tree is proven right. The number of
    /// blocks that the superblock would count as free.
    fn emit(&self, emitter: &mut Emitter<'_>) -> Checked<u64> {
        let agf = self.headers()?;
        let mut kept = Vec::new();
        let mut runs = 0usize;
        self.walk_free(&agf, &mut |run| {
            runs += 1;
            if runs <= MAX_KEPT_RUNS {
                kept.push(run);
            }
            Ok(())
        })?;
        let geometry = &self.xfs.geometry;
        let first = geometry.ag_start(self.number);
        let mut at = first;
        let mut emit = |(start, len): (u32, u32)| {
            let start = first + u64::from(start);
            emitter.used(geometry.offset(at), geometry.offset(start))?;
            at = start + u64::from(len);
            Ok(())
        };
        if runs <= MAX_KEPT_RUNS {
            kept.into_iter().try_for_each(emit)?;
        } else {
            drop(kept);
            match self.walk_free(&agf, &mut emit) {
                Err(Stop::Damage(what)) => {
                    return Err(Stop::Error(Error::new(
                        Kind::Inconsistent,
                        format!("the filesystem changes while it is read ({what})"),
                    )));
                }
                other => other?,
            }
        }
        let end = first + geometry.ag_len(self.number);
        emitter.used(geometry.offset(at), geometry.offset(end))?;
        let mut free = u64::from(agf.free_blocks.get()) + u64::from(agf.freelist_count.get());
        if self.xfs.superblock.has_lazy_count() {
            free += u64::from(agf.btree_blocks.get());
        }
        Ok(free)
    }

    /// Reads and checks the group's headers.
    fn headers(&self) -> Checked<Agf> {
        let geometry = &self.xfs.geometry;
        let superblock = &self.xfs.superblock;
        let sector = ByteLen(geometry.sector_size).as_usize();
        let bytes = self.read(
            geometry.offset(geometry.ag_start(self.number)),
            ByteLen(format::AG_HEADER_SECTORS * geometry.sector_size),
        )?;
        let mut sectors = bytes.chunks_exact(sector).skip(1);
        let (Some(agf_bytes), Some(agi), Some(agfl)) =
            (sectors.next(), sectors.next(), sectors.next())
        else {
            return damage("its headers are short");
        };
        let agf: Agf = head_of(agf_bytes)?;
        let number = (self.number as u32).to_be_bytes();
        if agf.magic.get() != format::AGF_MAGIC
            || agf.version.get() != format::AGF_VERSION
            || u64::from(agf.number.get()) != self.number
        {
            return damage("its AGF is not one");
        }
        let has = |bytes: &[u8], offset: usize, what: &[u8]| {
            bytes.get(offset..offset + what.len()) == Some(what)
        };
        if !has(agi, 0, &format::AGI_MAGIC.to_be_bytes())
            || !has(agi, format::AGI_NUMBER_OFFSET, &number)
        {
            return damage("its AGI is not one");
        }
        if superblock.is_v5() {
            let uuid = superblock.metadata_uuid();
            if !format::crc_holds(agf_bytes, format::AGF_CRC_OFFSET) || agf.uuid != *uuid {
                return damage("the checksum or UUID of its AGF is wrong");
            }
            if !format::crc_holds(agi, format::AGI_CRC_OFFSET)
                || !has(agi, format::AGI_UUID_OFFSET, uuid)
            {
                return damage("the checksum or UUID of its AGI is wrong");
            }
            if !format::crc_holds(agfl, format::AGFL_CRC_OFFSET)
                || !has(agfl, 0, &format::AGFL_MAGIC.to_be_bytes())
                || !has(agfl, format::AGFL_NUMBER_OFFSET, &number)
                || !has(agfl, format::AGFL_UUID_OFFSET, uuid)
            {
                return damage("the checksum or UUID of its AGFL is wrong");
            }
        }
        if u64::from(agf.length.get()) != geometry.ag_len(self.number) {
            return damage("its AGF has another length than the group");
        }
        Ok(agf)
    }

    /// Walks the tree of free runs, each as its first block in the group and its length, and
    /// checks it as a whole.
    fn walk_free(&self, agf: &Agf, visit: &mut dyn FnMut((u32, u32)) -> Result<()>) -> Checked<()> {
        let levels = agf.bnobt_levels.get();
        if !(1..=format::MAX_LEVELS).contains(&levels) {
            return damage("its free-space tree has no or too many levels");
        }
        let mut progress = Progress {
            next: 0,
            free: 0,
            longest: 0,
            last: [None; format::MAX_LEVELS as usize],
        };
        self.walk_block(agf.bnobt_root.get(), levels - 1, None, &mut progress, visit)?;
        if progress
            .last
            .iter()
            .flatten()
            .any(|&(_, right)| right != format::NULL_AGBLOCK)
        {
            return damage("its free-space tree goes on behind its end");
        }
        let noted = u64::from(agf.free_blocks.get());
        if progress.free != noted {
            return damage(format!(
                "it claims {noted} free blocks and its free-space tree has {}",
                progress.free
            ));
        }
        if progress.longest != u64::from(agf.longest.get()) {
            return damage("its longest free run is not the one it claims");
        }
        Ok(())
    }

    /// Walks one block of the tree and all below it. `key` is what the block above says it
    /// begins with; only the root may be empty. Each block holds a record that lies behind all
    /// before it, so no block can come twice.
    fn walk_block(
        &self,
        block: u32,
        level: u32,
        key: Option<u32>,
        progress: &mut Progress,
        visit: &mut dyn FnMut((u32, u32)) -> Result<()>,
    ) -> Checked<()> {
        let (header, body) = self.read_block(block, level)?;
        let left = match progress.last.get_mut(level as usize) {
            None => return damage("its free-space tree has too many levels"),
            Some(last) => match last.replace((block, header.right.get())) {
                None => format::NULL_AGBLOCK,
                Some((left, right)) if right == block => left,
                Some(_) => return damage("the blocks of its free-space tree do not follow"),
            },
        };
        if header.left.get() != left {
            return damage("the blocks of its free-space tree do not follow");
        }
        let records = usize::from(header.records.get());
        if records == 0 && (key.is_some() || level > 0) {
            return damage("a block of its free-space tree is empty");
        }
        let entry = size_of::<FreeRecord>() + if level > 0 { format::POINTER_SIZE } else { 0 };
        let capacity = body.len() / entry;
        if records > capacity {
            return damage("a block of its free-space tree is overfull");
        }
        let (keys, pointers) = body.split_at(capacity * size_of::<FreeRecord>());
        let mut pointers = pointers.chunks_exact(format::POINTER_SIZE);
        for index in 0..records {
            let record: FreeRecord = head_of(&keys[index * size_of::<FreeRecord>()..])?;
            let start = record.start.get();
            if index == 0 && key.is_some_and(|key| key != start) {
                return damage("a block of its free-space tree begins with another run than said");
            }
            if level == 0 {
                self.take(start, record.len.get(), progress)?;
                visit((start, record.len.get()))?;
            } else {
                let child: zerocopy::big_endian::U32 = head_of(pointers.next().unwrap_or(&[]))?;
                self.walk_block(child.get(), level - 1, Some(start), progress, visit)?;
            }
        }
        Ok(())
    }

    /// Checks one free run and counts it.
    fn take(&self, start: u32, len: u32, progress: &mut Progress) -> Checked<()> {
        let geometry = &self.xfs.geometry;
        let (start, len) = (u64::from(start), u64::from(len));
        let end = start + len;
        let headers =
            (format::AG_HEADER_SECTORS * geometry.sector_size).div_ceil(geometry.block_size);
        if len == 0 || start < progress.next.max(headers) || end > geometry.ag_len(self.number) {
            return damage("its free runs do not ascend, or leave it");
        }
        let first = geometry.ag_start(self.number);
        let bytes = Extent::between(geometry.offset(first + start), geometry.offset(first + end));
        if bytes.intersect(geometry.log).is_some() {
            return damage("it calls the log free");
        }
        progress.next = end;
        progress.free += len;
        progress.longest = progress.longest.max(len);
        Ok(())
    }

    /// Reads metadata. What cannot be read is as good as damaged.
    fn read(&self, offset: Offset, len: ByteLen) -> Checked<Vec<u8>> {
        match self.source.read_vec_at(offset, len) {
            Err(error) if error.kind() == Kind::Io => damage(error.to_string()),
            other => Ok(other?),
        }
    }

    /// Reads and checks a block of the tree: its header, and what follows.
    fn read_block(&self, block: u32, level: u32) -> Checked<(BtreeHeader, Vec<u8>)> {
        let geometry = &self.xfs.geometry;
        let superblock = &self.xfs.superblock;
        if u64::from(block) >= geometry.ag_len(self.number) {
            return damage("its free-space tree leaves it");
        }
        let Offset(offset) = geometry.offset(geometry.ag_start(self.number) + u64::from(block));
        let mut bytes = self.read(Offset(offset), ByteLen(geometry.block_size))?;
        let header: BtreeHeader = head_of(&bytes)?;
        let mut header_size = size_of::<BtreeHeader>();
        let magic = if superblock.is_v5() {
            let v5: BtreeHeaderV5 = head_of(&bytes[header_size..])?;
            if !format::crc_holds(&bytes, format::BTREE_CRC_OFFSET) {
                return damage(format!(
                    "the checksum of block {block}, of its free-space tree, is wrong"
                ));
            }
            if v5.uuid != *superblock.metadata_uuid()
                || v5.sector.get() != offset / SECTOR
                || u64::from(v5.owner.get()) != self.number
            {
                return damage("a block of its free-space tree belongs elsewhere");
            }
            header_size += size_of::<BtreeHeaderV5>();
            format::BNOBT_CRC_MAGIC
        } else {
            format::BNOBT_MAGIC
        };
        if header.magic.get() != magic || u32::from(header.level.get()) != level {
            return damage("a block of its free-space tree is none");
        }
        bytes.drain(..header_size);
        Ok((header, bytes))
    }
}

/// The structure that `bytes` begin with.
fn head_of<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> Checked<T> {
    match T::read_from_prefix(bytes) {
        Ok((head, _)) => Ok(head),
        Err(_) => damage("a structure is cut short"),
    }
}
