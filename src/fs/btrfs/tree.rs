//! Trees: read block by block, each checked against what its parent says of it.
//!
//! A block that cannot be read, or is not what it should be, is read from its other copies. Keys
//! ascend strictly over a whole tree, and every block has to begin with the key that its parent
//! notes: so no block is met twice in one walk, and a walk ends however the tree was forged.

use std::ops::RangeInclusive;

use zerocopy::FromBytes;

use super::chunks::{ChunkMap, Devices, damaged};
use super::format::{self, Header, Item, Key, KeyPointer};
use super::superblock::Geometry;
use crate::error::{Error, Kind, Result};

/// What leads to a tree block: all that is known of it before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    /// Its logical address.
    pub(crate) bytenr: u64,
    /// The commit it was written in: a block of the same address and generation never changes.
    pub(crate) generation: u64,
    /// 0 for leaves.
    pub(crate) level: u8,
    /// The key it begins with; `None` for the root.
    pub(crate) first: Option<Key>,
}

/// The root of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    /// The block.
    pub(crate) block: Pointer,
    /// The tree that all blocks belong to. `None` where that may differ: a subvolume shares blocks
    /// with others.
    pub(crate) owner: Option<u64>,
}

impl Root {
    /// The root of a tree that shares no blocks with others.
    pub(crate) fn of(owner: u64, bytenr: u64, generation: u64, level: u8) -> Self {
        Self {
            block: Pointer {
                bytenr,
                generation,
                level,
                first: None,
            },
            owner: Some(owner),
        }
    }
}

/// What a walk over a tree does. A closure of the items is enough where nothing is left out.
pub(crate) trait Visit {
    /// Whether a block is to be read at all, with what is below it.
    fn enters(&mut self, _block: &Pointer) -> bool {
        true
    }

    /// A block, as it is on disk, before what is below or in it.
    ///
    /// # Errors
    /// What ends the walk.
    fn block(&mut self, _pointer: &Pointer, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    /// An item of a leaf. Their keys ascend.
    ///
    /// # Errors
    /// What ends the walk.
    fn item(&mut self, key: Key, data: &[u8]) -> Result<()>;
}

impl<F: FnMut(Key, &[u8]) -> Result<()>> Visit for F {
    fn item(&mut self, key: Key, data: &[u8]) -> Result<()> {
        self(key, data)
    }
}

/// What reading trees takes: the devices, and how logical addresses lead to them.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    pub(crate) geometry: &'a Geometry,
    pub(crate) chunks: &'a ChunkMap,
    pub(crate) devices: &'a Devices<'a>,
}

/// A walk through one tree.
struct Walk<'a> {
    reader: &'a Reader<'a>,
    owner: Option<u64>,
    range: RangeInclusive<Key>,
}

impl Reader<'_> {
    /// Hands every item whose key is in `range` to `visitor`, ascending, and the blocks that lead
    /// to them. Blocks without such keys are not read.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if a block is not what it should be in any of its copies; else what the
    /// devices or the visitor say.
    pub(crate) fn walk(
        &self,
        root: &Root,
        range: RangeInclusive<Key>,
        visitor: &mut dyn Visit,
    ) -> Result<()> {
        let walk = Walk {
            reader: self,
            owner: root.owner,
            range,
        };
        walk.descend(&root.block, Key::MAX, visitor)
    }

    /// A block's bytes, from the first copy that is right.
    fn read(&self, pointer: &Pointer, last: Key, owner: Option<u64>) -> Result<Vec<u8>> {
        let what = |why: &str| {
            let at = pointer.bytenr;
            damaged(format!("the tree block at logical {at} {why}"))
        };
        let len = self.geometry.node_len();
        let end = pointer.bytenr.checked_add(len.0);
        let (Some((_, chunk)), Some(end)) = (self.chunks.find(pointer.bytenr), end) else {
            return Err(what("is in no chunk"));
        };
        if chunk.kind & (format::METADATA | format::SYSTEM) == 0 {
            return Err(what("is in a chunk of data"));
        }
        let mut trouble = "is nowhere".to_owned();
        for copy in 0..chunk.copies() {
            let mut bytes = vec![0; len.as_usize()];
            match self
                .devices
                .read(chunk, copy, pointer.bytenr..end, &mut bytes)
            {
                Ok(()) => match self.check(pointer, last, owner, &bytes) {
                    Ok(()) => return Ok(bytes),
                    Err(why) => trouble = why.to_owned(),
                },
                Err(error) if error.kind() == Kind::Io => {
                    trouble = format!("cannot be read ({error})");
                }
                Err(error) => return Err(error),
            }
        }
        Err(what(&trouble))
    }

    /// Whether `bytes` are the block that `pointer` leads to, with all its keys up to `last`.
    fn check(
        &self,
        pointer: &Pointer,
        last: Key,
        owner: Option<u64>,
        bytes: &[u8],
    ) -> std::result::Result<(), &'static str> {
        if !self.geometry.checksum.holds(bytes) {
            return Err("has a wrong checksum");
        }
        let (header, body) =
            Header::read_from_prefix(bytes).map_err(|_| "is shorter than its header")?;
        if header.bytenr.get() != pointer.bytenr || header.fsid != self.geometry.metadata_uuid {
            return Err("belongs elsewhere");
        }
        if header.flags.get() & format::HEADER_WRITTEN == 0 {
            return Err("was never written");
        }
        if header.generation.get() != pointer.generation
            || pointer.generation > self.geometry.generation
        {
            return Err("is of another commit");
        }
        if header.level != pointer.level || pointer.level >= format::MAX_LEVELS {
            return Err("is of another level");
        }
        if owner.is_some_and(|owner| header.owner.get() != owner) {
            return Err("belongs to another tree");
        }
        let count = header.count.get() as usize;
        let entry = match header.level {
            0 => size_of::<Item>(),
            _ => size_of::<KeyPointer>(),
        };
        if count > body.len() / entry {
            return Err("has more entries than room");
        }
        // Only a whole tree may be empty.
        if count == 0 && (pointer.level > 0 || pointer.first.is_some()) {
            return Err("is empty");
        }
        let mut before = None;
        let mut data_start = body.len();
        for number in 0..count {
            let key = match header.level {
                0 => {
                    let item: Item = entry_of(body, number).ok_or("has too few entries")?;
                    let (start, size) = (item.offset.get() as usize, item.size.get() as usize);
                    // Items follow each other from the end backwards, without gaps.
                    if start.checked_add(size) != Some(data_start) || start < count * entry {
                        return Err("has items that overlap");
                    }
                    data_start = start;
                    item.key.into()
                }
                _ => {
                    let child: KeyPointer = entry_of(body, number).ok_or("has too few entries")?;
                    if child.generation > header.generation {
                        return Err("is older than what it leads to");
                    }
                    Key::from(child.key)
                }
            };
            let is_right = match before {
                None => pointer.first.is_none_or(|first| first == key),
                Some(before) => before < key,
            };
            if !is_right || key > last {
                return Err("has keys where they do not belong");
            }
            before = Some(key);
        }
        Ok(())
    }
}

impl Walk<'_> {
    /// `last` is the greatest key that may be below `pointer`.
    fn descend(&self, pointer: &Pointer, last: Key, visitor: &mut dyn Visit) -> Result<()> {
        if !visitor.enters(pointer) {
            return Ok(());
        }
        let bytes = self.reader.read(pointer, last, self.owner)?;
        visitor.block(pointer, &bytes)?;
        let (header, body) = Header::read_from_prefix(bytes.as_slice()).map_err(|_| cut_short())?;
        let count = header.count.get() as usize;
        for number in 0..count {
            if pointer.level == 0 {
                let item: Item = entry_of(body, number).ok_or_else(cut_short)?;
                let key = Key::from(item.key);
                if self.range.contains(&key) {
                    let start = item.offset.get() as usize;
                    let data = body.get(start..start + item.size.get() as usize);
                    visitor.item(key, data.ok_or_else(cut_short)?)?;
                }
                continue;
            }
            let child: KeyPointer = entry_of(body, number).ok_or_else(cut_short)?;
            let first = Key::from(child.key);
            // What is below ends before the next child begins.
            let child_last = match entry_of::<KeyPointer>(body, number + 1) {
                Some(next) if number + 1 < count => before(next.key.into()),
                _ => last,
            };
            if first > *self.range.end() || child_last < *self.range.start() {
                continue;
            }
            let child = Pointer {
                bytenr: child.bytenr.get(),
                generation: child.generation.get(),
                level: pointer.level - 1,
                first: Some(first),
            };
            self.descend(&child, child_last, visitor)?;
        }
        Ok(())
    }
}

/// The greatest key below `key`.
fn before(key: Key) -> Key {
    match (key.offset, key.kind, key.objectid) {
        (0, 0, objectid) => Key::new(objectid.saturating_sub(1), u8::MAX, u64::MAX),
        (0, kind, objectid) => Key::new(objectid, kind - 1, u64::MAX),
        (offset, kind, objectid) => Key::new(objectid, kind, offset - 1),
    }
}

fn entry_of<T: FromBytes>(body: &[u8], number: usize) -> Option<T> {
    let start = number.checked_mul(size_of::<T>())?;
    let bytes = body.get(start..start.checked_add(size_of::<T>())?)?;
    T::read_from_bytes(bytes).ok()
}

fn cut_short() -> Error {
    damaged("a tree block is cut short")
}
