//! The blocks in use, by the space manager: chunks of as many blocks as a block of bitmap has bits,
//! whose bitmaps are listed in chunk-info blocks (CIBs), whose addresses stand in the space manager,
//! or, in large containers, in CIB-address blocks (CABs).

use std::ops::Range;

use super::blocks::{Blocks, Expected, damaged, is_damage, part, parts};
use super::checkpoint::Checkpoint;
use super::format::{
    AddressBlock, BlockRange, ChunkInfo, ObjectHeader, Spaceman, Superblock, TYPE_CAB, TYPE_CIB,
};
use crate::error::Result;
use crate::extent::{Extent, ExtentSet};
use crate::fs::bitmap;
use crate::fs::emit::Emitter;
use crate::units::Offset;

/// How a container is divided into chunks. Derived from the container's size; what the space manager
/// says has to be the same.
#[derive(Clone, Copy)]
struct Shape {
    blocks_per_chunk: u64,
    chunks_per_cib: u64,
    cibs_per_cab: u64,
    chunks: u64,
    cibs: u64,
    /// 0 where the space manager holds the addresses of CIBs.
    cabs: u64,
}

/// A space manager whose numbers agree with the container.
pub(super) struct Map<'a> {
    blocks: Blocks<'a>,
    checkpoint: &'a Checkpoint,
    shape: Shape,
    /// Addresses of CABs or CIBs.
    addresses: &'a [zerocopy::little_endian::U64],
    /// Blocks that it says are free, in all.
    free: u64,
    /// What is in use whatever a bitmap says, in bytes.
    fixed: ExtentSet,
}

impl<'a> Map<'a> {
    /// # Errors
    /// [`Damaged`](crate::error::Kind::Damaged) if the space manager contradicts the container.
    pub(super) fn new(blocks: Blocks<'a>, checkpoint: &'a Checkpoint) -> Result<Self> {
        let name = "the space manager";
        let spaceman: &Spaceman = part(&checkpoint.spaceman, 0, name)?;
        let device = &spaceman.main;
        let blocks_per_chunk = blocks.size * 8;
        let room = blocks.size as usize - size_of::<AddressBlock>();
        let chunks_per_cib = (room / size_of::<ChunkInfo>()) as u64;
        let chunks = blocks.count.div_ceil(blocks_per_chunk);
        let shape = Shape {
            blocks_per_chunk,
            chunks_per_cib,
            cibs_per_cab: (room / size_of::<u64>()) as u64,
            chunks,
            cibs: chunks.div_ceil(chunks_per_cib),
            cabs: u64::from(device.cab_count.get()),
        };
        let said = (
            u64::from(spaceman.block_size.get()),
            u64::from(spaceman.blocks_per_chunk.get()),
            u64::from(spaceman.chunks_per_cib.get()),
            u64::from(spaceman.cibs_per_cab.get()),
            device.block_count.get(),
            device.chunk_count.get(),
            u64::from(device.cib_count.get()),
        );
        let expected = (
            blocks.size,
            shape.blocks_per_chunk,
            shape.chunks_per_cib,
            shape.cibs_per_cab,
            blocks.count,
            shape.chunks,
            shape.cibs,
        );
        let cabs_fit = shape.cabs == 0 || shape.cabs == shape.cibs.div_ceil(shape.cibs_per_cab);
        if said != expected || !cabs_fit || device.free_count.get() > blocks.count {
            return Err(damaged(
                "the space manager does not describe this container",
            ));
        }
        let count = if shape.cabs > 0 {
            shape.cabs
        } else {
            shape.cibs
        };
        let addresses = parts(
            &checkpoint.spaceman,
            device.addresses.get() as usize,
            usize::try_from(count).unwrap_or(usize::MAX),
            name,
        )?;
        Ok(Self {
            blocks,
            checkpoint,
            shape,
            addresses,
            free: device.free_count.get(),
            fixed: fixed(&blocks, &checkpoint.superblock, spaceman)?,
        })
    }

    /// Hands on all that is in use. What is damaged is taken as in use, and said.
    ///
    /// # Errors
    /// [`Damaged`](crate::error::Kind::Damaged) if the counts contradict each other; else if reading
    /// fails, or the emitter's sink.
    pub(super) fn walk(&self, emitter: &mut Emitter<'_>) -> Result<()> {
        // Of all chunks, if each of them told.
        let mut free = Some(0);
        for (index, address) in (0..).zip(self.addresses) {
            match self.shape.cabs {
                0 => self.cib(index, address.get(), &mut free, emitter)?,
                _ => self.cab(index, address.get(), &mut free, emitter)?,
            }
        }
        match free {
            Some(free) if free != self.free => Err(damaged(format!(
                "its chunks have {free} free blocks, its space manager says {}",
                self.free
            ))),
            _ => Ok(()),
        }
    }

    fn cab(
        &self,
        index: u64,
        address: u64,
        free: &mut Option<u64>,
        emitter: &mut Emitter<'_>,
    ) -> Result<()> {
        let first = index * self.shape.cibs_per_cab;
        let count = self.shape.cibs_per_cab.min(self.shape.cibs - first);
        let block = self.list(address, "a CIB-address block", TYPE_CAB, index, count);
        let block = match block {
            Err(error) if is_damage(&error) => {
                let chunks = self.shape.chunks_per_cib;
                let all = first * chunks..(first + count) * chunks;
                return self.all_used(all, &error.to_string(), free, emitter);
            }
            other => other?,
        };
        let cibs: &[zerocopy::little_endian::U64] = parts(
            &block,
            size_of::<AddressBlock>(),
            count as usize,
            "a CIB-address block",
        )?;
        for (index, cib) in (first..).zip(cibs) {
            self.cib(index, cib.get(), free, emitter)?;
        }
        Ok(())
    }

    fn cib(
        &self,
        index: u64,
        address: u64,
        free: &mut Option<u64>,
        emitter: &mut Emitter<'_>,
    ) -> Result<()> {
        let first = index * self.shape.chunks_per_cib;
        let count = self.shape.chunks_per_cib.min(self.shape.chunks - first);
        let block = match self.list(address, "a chunk-info block", TYPE_CIB, index, count) {
            Err(error) if is_damage(&error) => {
                return self.all_used(first..first + count, &error.to_string(), free, emitter);
            }
            other => other?,
        };
        let xid = part::<ObjectHeader>(&block, 0, "a chunk-info block")?
            .xid
            .get();
        let chunks: &[ChunkInfo] = parts(
            &block,
            size_of::<AddressBlock>(),
            count as usize,
            "a chunk-info block",
        )?;
        for (chunk, info) in (first..).zip(chunks) {
            match self.bitmap(chunk, info, xid) {
                Ok(mut bits) => {
                    if let Some(free) = free {
                        *free += info.free();
                    }
                    let fixed = self.fixed_in(chunk);
                    if bits.is_empty() && !fixed.is_empty() {
                        bits = vec![0; self.blocks.size as usize];
                    }
                    for run in fixed {
                        bitmap::set(&mut bits, run);
                    }
                    let start = info.start.get();
                    for run in bitmap::runs_of_set(&bits, info.blocks()) {
                        let end = self.blocks.offset(start + run.end);
                        emitter.used(self.blocks.offset(start + run.start), end)?;
                    }
                }
                Err(error) if is_damage(&error) => {
                    self.all_used(chunk..chunk + 1, &error.to_string(), free, emitter)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A CAB or CIB, with as many entries as it has to have.
    fn list(
        &self,
        address: u64,
        name: &'static str,
        kind: u32,
        index: u64,
        count: u64,
    ) -> Result<Vec<u8>> {
        let expected = Expected {
            name,
            kind,
            newest: self.checkpoint.xid(),
        };
        let block = self.blocks.physical(address, expected)?;
        let head: &AddressBlock = part(&block, 0, name)?;
        if u64::from(head.index.get()) != index || u64::from(head.count.get()) != count {
            return Err(damaged(format!("{name} ({address}) is another one")));
        }
        Ok(block)
    }

    /// The bitmap of a chunk, which agrees with its count: it has no checksum. Empty if all is free.
    /// `newest`: the transaction of its CIB.
    fn bitmap(&self, chunk: u64, info: &ChunkInfo, newest: u64) -> Result<Vec<u8>> {
        let start = chunk * self.shape.blocks_per_chunk;
        let len = self.shape.blocks_per_chunk.min(self.blocks.count - start);
        let (said, address) = (info.free(), info.bitmap.get());
        if info.start.get() != start || info.blocks() != len || said > len {
            return Err(damaged(format!(
                "the numbers of chunk {chunk} make no sense"
            )));
        }
        if info.xid.get() > newest {
            return Err(damaged(format!(
                "chunk {chunk} is newer than what describes it"
            )));
        }
        let bits = match address {
            0 => Vec::new(),
            _ => self.blocks.read(address)?,
        };
        let free = match address {
            0 => len,
            _ => bitmap::count_clear(&bits, len),
        };
        if free != said {
            return Err(damaged(format!(
                "chunk {chunk} has {free} free blocks by its bitmap, and {said} by its count"
            )));
        }
        Ok(bits)
    }

    /// Chunks of which nothing is known.
    fn all_used(
        &self,
        chunks: Range<u64>,
        why: &str,
        free: &mut Option<u64>,
        emitter: &mut Emitter<'_>,
    ) -> Result<()> {
        *free = None;
        let [start, end] = [chunks.start, chunks.end]
            .map(|chunk| self.blocks.offset(chunk * self.shape.blocks_per_chunk));
        emitter.warn(format!(
            "{why}: all blocks from byte {start} to {end} are copied"
        ));
        emitter.used(start, end)
    }

    /// What is in use of a chunk whatever its bitmap says, in blocks from the chunk's first.
    fn fixed_in(&self, chunk: u64) -> Vec<Range<u64>> {
        let [start, end] =
            [chunk, chunk + 1].map(|chunk| self.blocks.offset(chunk * self.shape.blocks_per_chunk));
        let block = |offset: Offset| offset.since(start).0 / self.blocks.size;
        let fixed = self.fixed.intersect(Extent::between(start, end));
        fixed
            .into_iter()
            .map(|extent| block(extent.start)..block(extent.end()))
            .collect()
    }
}

/// What a container cannot be without: block 0, the checkpoint areas, what the space manager is made of,
/// and the keys. All of it is allocated as a rule.
fn fixed(blocks: &Blocks<'_>, superblock: &Superblock, spaceman: &Spaceman) -> Result<ExtentSet> {
    let of = |range: &BlockRange| (range.start.get(), range.count.get());
    let mut fixed = ExtentSet::new();
    for (start, count) in [
        (0, 1),
        (
            superblock.desc_base.get(),
            u64::from(superblock.desc_blocks.get()),
        ),
        (
            superblock.data_base.get(),
            u64::from(superblock.data_blocks.get()),
        ),
        (
            spaceman.pool_bitmap_base.get(),
            u64::from(spaceman.pool_bitmap_blocks.get()),
        ),
        (spaceman.pool_base.get(), spaceman.pool_blocks.get()),
        of(&superblock.keylocker),
        of(&superblock.media_keylocker),
    ] {
        let end = start.checked_add(count);
        let Some(end) = end.filter(|end| *end <= blocks.count) else {
            return Err(damaged("a part of it lies behind its end"));
        };
        fixed.insert(Extent::between(blocks.offset(start), blocks.offset(end)));
    }
    Ok(fixed)
}
