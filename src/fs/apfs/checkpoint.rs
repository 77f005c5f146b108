//! The newest whole state of a container.
//!
//! A commit writes ephemeral objects into a ring of blocks (the data area), then maps that say where
//! they are and, last, a superblock into another ring (the descriptor area). The newest state is the
//! superblock of the highest transaction whose objects all are there. Block 0 holds a copy of a
//! superblock that may be older.

use super::blocks::{Blocks, Expected, check_ephemeral, damaged, is_damage, part, parts};
use super::format::{
    self, AREA_IS_TREE, CHECKPOINT_MAP_LAST, CheckpointMap, CheckpointMapping, NX_MAGIC,
    OID_SUPERBLOCK, ObjectHeader, ObjectMap, Superblock, TYPE_BTREE, TYPE_CHECKPOINT_MAP,
    TYPE_MASK, TYPE_OMAP, TYPE_SPACEMAN, TYPE_SUPERBLOCK,
};
use crate::error::Result;
use crate::units::ByteLen;

/// More bytes than any descriptor area has (some MiB): all of it is read.
const MAX_DESCRIPTORS: ByteLen = ByteLen::mib(64);
/// More bytes than any ephemeral object has, and than all of a checkpoint have.
const MAX_OBJECT: ByteLen = ByteLen::mib(16);
const MAX_OBJECTS: ByteLen = ByteLen::mib(1024);

/// A state of the container all of whose own objects are whole.
pub(super) struct Checkpoint {
    pub(super) superblock: Superblock,
    /// The space manager, one or more blocks.
    pub(super) spaceman: Vec<u8>,
    /// The address of the root of the container's object map.
    pub(super) object_tree: u64,
}

impl Checkpoint {
    /// The number of its transaction.
    pub(super) fn xid(&self) -> u64 {
        self.superblock.header.xid.get()
    }
}

/// What the descriptor area holds.
pub(super) struct Newest {
    pub(super) checkpoint: Checkpoint,
    /// There is, or may have been, a newer one that is not whole.
    pub(super) is_doubtful: bool,
    /// Unmounting copies it to block 0. This one is newer than that.
    pub(super) is_interrupted: bool,
}

/// A ring of blocks.
#[derive(Clone, Copy)]
struct Area {
    base: u64,
    blocks: u64,
}

impl Area {
    fn new(blocks: &Blocks<'_>, base: u64, count: u32) -> std::result::Result<Self, &'static str> {
        if count & AREA_IS_TREE != 0 {
            return Err("a checkpoint area of it is not contiguous");
        }
        let area = Self {
            base,
            blocks: u64::from(count),
        };
        let end = base.checked_add(area.blocks);
        if count == 0 || base == 0 || end.is_none_or(|end| end > blocks.count) {
            return Err("its checkpoint areas make no sense");
        }
        Ok(area)
    }

    /// The block `index` behind the first, around the ring.
    fn address(&self, index: u64) -> u64 {
        self.base + index % self.blocks
    }

    /// The index of an address within the ring.
    fn index(&self, address: u64) -> Option<u64> {
        let index = address.checked_sub(self.base)?;
        (index < self.blocks).then_some(index)
    }
}

/// The descriptor area, read once.
struct Ring<'a> {
    blocks: Blocks<'a>,
    descriptors: Area,
    data: Area,
    /// Transaction and index of each superblock whose checksum holds, the newest first.
    superblocks: Vec<(u64, u64)>,
    /// The newest transaction of a map of a checkpoint.
    newest_map: u64,
    /// Something that was a part of a checkpoint is not whole, or cannot be read.
    has_broken: bool,
}

/// Finds the newest state whose objects are whole; `first` is what block 0 holds, of which only the
/// geometry is relied on.
///
/// # Errors
/// The inner: why there is none. The outer: if reading fails in another way than at some place.
pub(super) fn newest(
    blocks: Blocks<'_>,
    first: &Superblock,
) -> Result<std::result::Result<Newest, &'static str>> {
    let areas = Area::new(&blocks, first.desc_base.get(), first.desc_blocks.get()).and_then(
        |descriptors| {
            if descriptors.blocks * blocks.size > MAX_DESCRIPTORS.0 {
                return Err("its checkpoint areas make no sense");
            }
            let data = Area::new(&blocks, first.data_base.get(), first.data_blocks.get())?;
            Ok((descriptors, data))
        },
    );
    let (descriptors, data) = match areas {
        Ok(areas) => areas,
        Err(why) => return Ok(Err(why)),
    };
    let ring = Ring::read(blocks, descriptors, data)?;
    let Some(&(newest, _)) = ring.superblocks.first() else {
        return Ok(Err("none of its checkpoints has a superblock"));
    };
    for &(xid, index) in &ring.superblocks {
        match ring.checkpoint(xid, index, first) {
            Ok(checkpoint) => {
                let is_doubtful = xid < newest
                    || newest < ring.newest_map
                    || newest < first.header.xid.get()
                    || ring.has_broken;
                return Ok(Ok(Newest {
                    checkpoint,
                    is_doubtful,
                    is_interrupted: xid > first.header.xid.get(),
                }));
            }
            Err(error) if is_damage(&error) => {
                log::debug!("checkpoint of transaction {xid}: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Err("none of its checkpoints is whole"))
}

impl<'a> Ring<'a> {
    fn read(blocks: Blocks<'a>, descriptors: Area, data: Area) -> Result<Self> {
        let mut ring = Self {
            blocks,
            descriptors,
            data,
            superblocks: Vec::new(),
            newest_map: 0,
            has_broken: false,
        };
        for index in 0..descriptors.blocks {
            match blocks.read(descriptors.address(index)) {
                Ok(block) => ring.add(index, &block)?,
                Err(error) if is_damage(&error) => ring.has_broken = true,
                Err(error) => return Err(error),
            }
        }
        ring.superblocks.sort_unstable_by(|a, b| b.cmp(a));
        Ok(ring)
    }

    fn add(&mut self, index: u64, block: &[u8]) -> Result<()> {
        let header: &ObjectHeader = part(block, 0, "an object")?;
        let superblock: &Superblock = part(block, 0, "a superblock")?;
        let kind = header.kind.get() & TYPE_MASK;
        let is_superblock = kind == TYPE_SUPERBLOCK && superblock.magic.get() == NX_MAGIC;
        let is_map = kind == TYPE_CHECKPOINT_MAP;
        let xid = header.xid.get();
        if format::checksum_holds(block) {
            if is_superblock {
                self.superblocks.push((xid, index));
            } else if is_map {
                self.newest_map = self.newest_map.max(xid);
            }
            // Else nothing but zeros: not used yet.
        } else if kind == TYPE_SUPERBLOCK || is_map || superblock.magic.get() == NX_MAGIC {
            self.has_broken = true;
        }
        Ok(())
    }

    /// The state of a superblock, if all its objects are whole.
    fn checkpoint(&self, xid: u64, index: u64, first: &Superblock) -> Result<Checkpoint> {
        let block = self.blocks.read(self.descriptors.address(index))?;
        let superblock: &Superblock = part(&block, 0, "a superblock")?;
        self.check_superblock(superblock, index, first)?;
        let maps = u64::from(superblock.desc_len.get()) - 1;
        let begin = u64::from(superblock.desc_index.get());
        let mut spaceman = None;
        // They do not overlap.
        let mut room = self.data.blocks.min(MAX_OBJECTS.0 / self.blocks.size);
        for map in 0..maps {
            let block = self.blocks.physical(
                self.descriptors.address(begin + map),
                Expected {
                    name: "a checkpoint map",
                    kind: TYPE_CHECKPOINT_MAP,
                    newest: xid,
                },
            )?;
            let head: &CheckpointMap = part(&block, 0, "a checkpoint map")?;
            let header: &ObjectHeader = part(&block, 0, "a checkpoint map")?;
            let is_last = head.flags.get() & CHECKPOINT_MAP_LAST != 0;
            if header.xid.get() != xid || is_last != (map == maps - 1) {
                return Err(damaged("a checkpoint map is of another checkpoint"));
            }
            let count = head.count.get() as usize;
            let mappings: &[CheckpointMapping] = parts(
                &block,
                size_of::<CheckpointMap>(),
                count,
                "a checkpoint map",
            )?;
            for mapping in mappings {
                let object = self.ephemeral(mapping, xid, &mut room)?;
                if mapping.oid.get() == superblock.spaceman_oid.get()
                    && mapping.kind.get() & TYPE_MASK == TYPE_SPACEMAN
                {
                    spaceman = Some(object);
                }
            }
        }
        Ok(Checkpoint {
            superblock: superblock.clone(),
            spaceman: spaceman.ok_or_else(|| damaged("there is no space manager"))?,
            object_tree: self.object_tree(superblock.omap_oid.get(), xid)?,
        })
    }

    /// Whether a superblock is where it says, and of this container as block 0 describes it.
    fn check_superblock(
        &self,
        superblock: &Superblock,
        index: u64,
        first: &Superblock,
    ) -> Result<()> {
        let begin = u64::from(superblock.desc_index.get());
        let len = u64::from(superblock.desc_len.get());
        if begin >= self.descriptors.blocks
            || !(2..=self.descriptors.blocks).contains(&len)
            || (begin + len - 1) % self.descriptors.blocks != index
        {
            return Err(damaged("a checkpoint is not where its superblock says"));
        }
        let geometry = |block: &Superblock| {
            (
                block.block_size,
                block.block_count,
                block.uuid,
                (block.desc_base, block.desc_blocks),
                (block.data_base, block.data_blocks),
            )
        };
        if superblock.header.oid.get() != OID_SUPERBLOCK || geometry(superblock) != geometry(first)
        {
            return Err(damaged("a superblock differs from that of block 0"));
        }
        Ok(())
    }

    /// An object of the data area, around whose end it may go on.
    fn ephemeral(&self, mapping: &CheckpointMapping, xid: u64, room: &mut u64) -> Result<Vec<u8>> {
        let size = u64::from(mapping.size.get());
        let (Some(index), true) = (
            self.data.index(mapping.address.get()),
            size > 0 && size <= MAX_OBJECT.0 && size.is_multiple_of(self.blocks.size),
        ) else {
            return Err(damaged("a checkpoint map makes no sense"));
        };
        let count = size / self.blocks.size;
        *room = room
            .checked_sub(count)
            .ok_or_else(|| damaged("its objects do not fit into the data area"))?;
        let mut object = Vec::with_capacity(ByteLen(size).as_usize());
        for block in index..index + count {
            object.extend_from_slice(&self.blocks.read(self.data.address(block))?);
        }
        check_ephemeral(
            &object,
            mapping.oid.get(),
            Expected {
                name: "an object of the checkpoint",
                kind: mapping.kind.get() & TYPE_MASK,
                newest: xid,
            },
        )?;
        Ok(object)
    }

    /// The root of the container's object map.
    fn object_tree(&self, address: u64, xid: u64) -> Result<u64> {
        let expect = |name, kind| Expected {
            name,
            kind,
            newest: xid,
        };
        let map = self
            .blocks
            .physical(address, expect("the object map", TYPE_OMAP))?;
        let map: &ObjectMap = part(&map, 0, "the object map")?;
        let root = map.tree.get();
        self.blocks
            .physical(root, expect("the tree of the object map", TYPE_BTREE))?;
        Ok(root)
    }
}
