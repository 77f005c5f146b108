//! APFS containers written structure by structure, for what no tool at hand makes: large ones with
//! CIB-address blocks, every block size, rings that wrap. They hold no volume.
//!
//! Written from the Apple File System Reference, not from the parser.

use std::ops::Range;

use holdstill::error::Result;
use holdstill::extent::{Extent, ExtentSet};
use holdstill::read_at::{ReadAt, check_range};
use holdstill::units::{ByteLen, Offset};

use super::sparse::{self, Blocks};

/// What a container is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) block_size: u64,
    pub(crate) blocks: u64,
    pub(crate) descriptors: u64,
    pub(crate) data: u64,
    /// Blocks of checkpoint maps in a checkpoint.
    pub(crate) maps: u64,
    pub(crate) has_cabs: bool,
}

impl Shape {
    pub(crate) const SMALL: Self = Self {
        block_size: 4096,
        blocks: 40_000,
        descriptors: 8,
        data: 16,
        maps: 1,
        has_cabs: false,
    };

    fn per_chunk(&self) -> u64 {
        self.block_size * 8
    }

    fn per_cib(&self) -> u64 {
        (self.block_size - 40) / 32
    }

    fn per_cab(&self) -> u64 {
        (self.block_size - 40) / 8
    }

    fn chunks(&self) -> u64 {
        self.blocks.div_ceil(self.per_chunk())
    }

    fn cibs(&self) -> u64 {
        self.chunks().div_ceil(self.per_cib())
    }

    fn cabs(&self) -> u64 {
        if self.has_cabs {
            self.cibs().div_ceil(self.per_cab())
        } else {
            0
        }
    }
}

/// Where the parts of a checkpoint are, in blocks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    pub(crate) superblock: u64,
    pub(crate) maps: Vec<u64>,
    pub(crate) spaceman: Vec<u64>,
    pub(crate) omap: Vec<u64>,
    pub(crate) cabs: Vec<u64>,
    pub(crate) cibs: Vec<u64>,
    /// Chunk and block.
    pub(crate) bitmaps: Vec<(u64, u64)>,
}

/// A container in memory; blocks that were never written are zeros.
#[derive(Clone)]
pub(crate) struct Container {
    pub(crate) shape: Shape,
    pub(crate) written: Blocks,
    /// Of the newest checkpoint.
    pub(crate) places: Places,
    pub(crate) used: ExtentSet,
    pub(crate) xid: u64,
    descriptor_next: u64,
    data_next: u64,
    pool_next: u64,
}

const POOL_BITMAP_BLOCKS: u64 = 16;
const PHYSICAL: u32 = 0x4000_0000;
const EPHEMERAL: u32 = 0x8000_0000;
const SPACEMAN_OID: u64 = 1024;

fn put32(block: &mut [u8], at: usize, number: u32) {
    block[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

fn put64(block: &mut [u8], at: usize, number: u64) {
    block[at..at + 8].copy_from_slice(&number.to_le_bytes());
}

/// Makes the checksum of an object right.
pub(crate) fn seal(object: &mut [u8]) {
    let modulus = u64::from(u32::MAX);
    let (mut low, mut high) = (0, 0);
    for word in object[8..].chunks(4) {
        low = (low + u64::from(u32::from_le_bytes(word.try_into().unwrap()))) % modulus;
        high = (high + low) % modulus;
    }
    let first = modulus - (low + high) % modulus;
    let second = modulus - (low + first) % modulus;
    put64(object, 0, second << 32 | first);
}

fn head(object: &mut [u8], oid: u64, xid: u64, kind: u32) {
    put64(object, 8, oid);
    put64(object, 16, xid);
    put32(object, 24, kind);
}

impl Container {
    /// Whose first checkpoint, of transaction `xid`, has these blocks in use beside its own.
    pub(crate) fn new(shape: Shape, xid: u64, used: &[Range<u64>]) -> Self {
        let mut container = Self {
            shape,
            written: Blocks::new(),
            places: Places::default(),
            used: ExtentSet::new(),
            xid,
            descriptor_next: 0,
            data_next: 0,
            pool_next: 0,
        };
        container.write_checkpoint(used);
        let first = container.written[&container.places.superblock].clone();
        container.written.insert(0, first);
        container
    }

    /// Commits another transaction, which leaves block 0 as it is.
    pub(crate) fn commit(&mut self, used: &[Range<u64>]) {
        self.xid += 1;
        self.write_checkpoint(used);
    }

    fn data_base(&self) -> u64 {
        1 + self.shape.descriptors
    }

    fn pool_bitmap_base(&self) -> u64 {
        self.data_base() + self.shape.data
    }

    fn pool_base(&self) -> u64 {
        self.pool_bitmap_base() + POOL_BITMAP_BLOCKS
    }

    /// Room for two checkpoints, each with some bitmaps.
    fn pool_blocks(&self) -> u64 {
        2 * (self.shape.cibs() + self.shape.cabs() + 40)
    }

    fn omap_base(&self) -> u64 {
        self.pool_base() + self.pool_blocks()
    }

    /// Behind what the container needs for itself.
    pub(crate) fn free_from(&self) -> u64 {
        self.omap_base() + 4
    }

    fn allocate(&mut self) -> u64 {
        let address = self.pool_base() + self.pool_next % self.pool_blocks();
        self.pool_next += 1;
        address
    }

    fn block(&self) -> Vec<u8> {
        vec![0; self.shape.block_size as usize]
    }

    fn object(&mut self, address: u64, kind: u32, fill: impl FnOnce(&mut [u8])) {
        let mut block = self.block();
        head(&mut block, address, self.xid, PHYSICAL | kind);
        fill(&mut block);
        seal(&mut block);
        self.written.insert(address, block);
    }

    fn write_checkpoint(&mut self, used: &[Range<u64>]) {
        self.places = Places::default();
        let own = 0..self.free_from();
        let mut in_use: Vec<Range<u64>> = vec![own];
        in_use.extend(used.iter().cloned());
        self.used = ExtentSet::new();
        let size = self.shape.block_size;
        for run in &in_use {
            let bytes = run.start * size..run.end.min(self.shape.blocks) * size;
            self.used
                .insert(Extent::new(bytes.start, bytes.end - bytes.start));
        }
        let omap = self.write_omap();
        let addresses = self.write_chunks(&in_use);
        let free = self.shape.blocks - self.used.bytes().0 / size;
        let spaceman = self.spaceman(&addresses, free);
        let mapping = self.write_spaceman(&spaceman);
        self.write_descriptors(mapping, omap);
    }

    /// An object map without objects.
    fn write_omap(&mut self) -> u64 {
        let address = self.omap_base() + self.xid % 2 * 2;
        self.object(address, 0xb, |block| put64(block, 48, address + 1));
        self.object(address + 1, 0x2, |block| {
            // Root, leaf, fixed sizes.
            put32(block, 32, 7);
        });
        self.places.omap = vec![address, address + 1];
        address
    }

    /// Bitmaps, CIBs and CABs; what stands in the space manager.
    fn write_chunks(&mut self, in_use: &[Range<u64>]) -> Vec<u64> {
        let shape = self.shape;
        let mut cibs = Vec::new();
        for cib in 0..shape.cibs() {
            let first = cib * shape.per_cib();
            let count = shape.per_cib().min(shape.chunks() - first);
            let entries: Vec<[u64; 4]> = (first..first + count)
                .map(|chunk| self.write_chunk(chunk, in_use))
                .collect();
            let address = self.allocate();
            let xid = self.xid;
            self.object(address, 0x7, |block| {
                put32(block, 32, cib as u32);
                put32(block, 36, count as u32);
                for (entry, [start, blocks, free, bitmap]) in entries.into_iter().enumerate() {
                    let at = 40 + 32 * entry;
                    put64(block, at, xid);
                    put64(block, at + 8, start);
                    // Reserved bits, which are not part of the counts.
                    put32(block, at + 16, blocks as u32 | 0x0010_0000);
                    put32(block, at + 20, free as u32 | 0x8000_0000);
                    put64(block, at + 24, bitmap);
                }
            });
            cibs.push(address);
        }
        self.places.cibs = cibs.clone();
        if !shape.has_cabs {
            return cibs;
        }
        for (index, part) in cibs.chunks(shape.per_cab() as usize).enumerate() {
            let address = self.allocate();
            self.object(address, 0x6, |block| {
                put32(block, 32, index as u32);
                put32(block, 36, part.len() as u32);
                for (entry, cib) in part.iter().enumerate() {
                    put64(block, 40 + 8 * entry, *cib);
                }
            });
            self.places.cabs.push(address);
        }
        self.places.cabs.clone()
    }

    /// Start, blocks, free blocks and bitmap of a chunk.
    fn write_chunk(&mut self, chunk: u64, in_use: &[Range<u64>]) -> [u64; 4] {
        let start = chunk * self.shape.per_chunk();
        let end = (start + self.shape.per_chunk()).min(self.shape.blocks);
        let mut block = self.block();
        let mut used = 0;
        for run in in_use {
            for bit in run.start.max(start)..run.end.min(end) {
                let (byte, mask) = (((bit - start) / 8) as usize, 1 << ((bit - start) % 8));
                used += u64::from(block[byte] & mask == 0);
                block[byte] |= mask;
            }
        }
        let bitmap = match used {
            0 => 0,
            _ => {
                let address = self.allocate();
                self.written.insert(address, block);
                self.places.bitmaps.push((chunk, address));
                address
            }
        };
        [start, end - start, end - start - used, bitmap]
    }

    fn spaceman(&self, addresses: &[u64], free: u64) -> Vec<u8> {
        let shape = &self.shape;
        // The addresses are far behind the fixed part, so that it has several blocks.
        let at = shape.block_size as usize + 512;
        let size = (at + 8 * addresses.len()).next_multiple_of(shape.block_size as usize);
        let mut object = vec![0; size];
        head(&mut object, SPACEMAN_OID, self.xid, EPHEMERAL | 0x5);
        for (at, number) in [
            (32, shape.block_size),
            (36, shape.per_chunk()),
            (40, shape.per_cib()),
            (44, shape.per_cab()),
            (64, shape.cibs()),
            (68, shape.cabs()),
            (80, at as u64),
            (164, POOL_BITMAP_BLOCKS),
        ] {
            put32(&mut object, at, number as u32);
        }
        for (at, number) in [
            (48, shape.blocks),
            (56, shape.chunks()),
            (72, free),
            (152, self.pool_blocks()),
            (168, self.pool_bitmap_base()),
            (176, self.pool_base()),
        ] {
            put64(&mut object, at, number);
        }
        for (index, address) in addresses.iter().enumerate() {
            put64(&mut object, at + 8 * index, *address);
        }
        seal(&mut object);
        object
    }

    /// Into the data area, around whose end it may go on; its mapping.
    fn write_spaceman(&mut self, object: &[u8]) -> [u64; 3] {
        let base = self.data_base();
        let first = self.data_next;
        for part in object.chunks(self.shape.block_size as usize) {
            let address = base + self.data_next % self.shape.data;
            self.written.insert(address, part.to_vec());
            self.places.spaceman.push(address);
            self.data_next += 1;
        }
        [
            object.len() as u64,
            SPACEMAN_OID,
            base + first % self.shape.data,
        ]
    }

    fn write_descriptors(&mut self, [size, oid, address]: [u64; 3], omap: u64) {
        let shape = self.shape;
        let begin = self.descriptor_next % shape.descriptors;
        for map in 0..shape.maps {
            let place = 1 + self.descriptor_next % shape.descriptors;
            let is_last = map == shape.maps - 1;
            self.object(place, 0xc, |block| {
                put32(block, 32, u32::from(is_last));
                // The last map holds what there is.
                put32(block, 36, u32::from(is_last));
                if is_last {
                    put32(block, 40, EPHEMERAL | 0x5);
                    put32(block, 48, size as u32);
                    put64(block, 64, oid);
                    put64(block, 72, address);
                }
            });
            self.places.maps.push(place);
            self.descriptor_next += 1;
        }
        let place = 1 + self.descriptor_next % shape.descriptors;
        self.descriptor_next += 1;
        let mut block = self.block();
        head(&mut block, 1, self.xid, EPHEMERAL | 0x1);
        block[32..36].copy_from_slice(b"NXSB");
        block[72..88].copy_from_slice(b"container's UUID");
        for (at, number) in [
            (36, shape.block_size),
            (104, shape.descriptors),
            (108, shape.data),
            (136, begin),
            (140, shape.maps + 1),
        ] {
            put32(&mut block, at, number as u32);
        }
        for (at, number) in [
            (40, shape.blocks),
            (64, 2),
            (112, 1),
            (120, self.data_base()),
            (152, SPACEMAN_OID),
            (160, omap),
        ] {
            put64(&mut block, at, number);
        }
        seal(&mut block);
        self.written.insert(place, block);
        self.places.superblock = place;
    }

    /// Changes a block, and makes its checksum right again.
    pub(crate) fn forge(&mut self, address: u64, change: impl FnOnce(&mut [u8])) {
        let block = self.written.get_mut(&address).expect("a block");
        change(block);
        seal(block);
    }

    /// The same of the space manager, which has several blocks.
    pub(crate) fn forge_spaceman(&mut self, change: impl FnOnce(&mut [u8])) {
        let places = self.places.spaceman.clone();
        let blocks = places.iter().flat_map(|place| &self.written[place]);
        let mut object: Vec<u8> = blocks.copied().collect();
        change(&mut object);
        seal(&mut object);
        let blocks = object.chunks(self.shape.block_size as usize);
        for (place, block) in places.iter().zip(blocks) {
            self.written.insert(*place, block.to_vec());
        }
    }

    /// Flips a bit of a block.
    pub(crate) fn flip(&mut self, address: u64, byte: usize) {
        self.written.get_mut(&address).expect("a block")[byte] ^= 1;
    }

    /// All of its bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.read_vec_at(Offset(0), self.len()).unwrap()
    }
}

impl ReadAt for Container {
    fn len(&self) -> ByteLen {
        ByteLen(self.shape.blocks * self.shape.block_size)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        check_range(self.len(), offset, ByteLen(buf.len() as u64))?;
        sparse::read(&self.written, self.shape.block_size, buf, offset);
        Ok(())
    }
}
