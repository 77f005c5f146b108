//! Trees: read block by block, each checked against what its parent says of it.
//!
//! A block that cannot be read, or is not what it should be, is read from its other copies. Keys
//! ascend strictly over a whole tree, and every block has to begin with the key that its parent
//! notes: so no block is met twice in one walk, and a walk ends however the tree was forged.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use zerocopy::FromBytes;

use super::chunks::{Chunk, ChunkMap, Devices, damaged};
use super::format::{self, Header, Item, Key, KeyPointer};
use super::superblock::Geometry;
use crate::error::{Error, Kind, Result};

/// Most bytes that [`Reader::prefetch`] reads at a time.
const PREFETCH: u64 = 1 << 20;

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
    /// Where blocks are kept that were read.
    pub(crate) cache: Option<&'a Cache>,
}

/// Tree blocks that were read and found right, by logical address and generation: as such they never
/// change.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<HashMap<Place, Block>>);

/// The logical address and the generation of a block.
type Place = (u64, u64);

/// The bytes of a block.
type Block = Arc<Vec<u8>>;

impl Cache {
    /// A block, if it is there.
    pub(crate) fn get(&self, bytenr: u64, generation: u64) -> Option<Arc<Vec<u8>>> {
        let blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.get(&(bytenr, generation)).cloned()
    }

    /// Keeps a block.
    fn keep(&self, place: (u64, u64), bytes: &Arc<Vec<u8>>) {
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.insert(place, Arc::clone(bytes));
    }
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

    /// A block's bytes, from the first copy that is right. `last` is the greatest key it may have.
    ///
    /// # Errors
    /// As [`walk`](Self::walk).
    pub(crate) fn read(
        &self,
        pointer: &Pointer,
        last: Key,
        owner: Option<u64>,
    ) -> Result<Arc<Vec<u8>>> {
        if let Some(bytes) = self
            .cache
            .and_then(|cache| cache.get(pointer.bytenr, pointer.generation))
            && self.check(pointer, last, owner, &bytes).is_ok()
        {
            return Ok(bytes);
        }
        let bytes = Arc::new(self.read_from_disk(pointer, last, owner)?);
        if let Some(cache) = self.cache {
            cache.keep((pointer.bytenr, pointer.generation), &bytes);
        }
        Ok(bytes)
    }

    fn read_from_disk(&self, pointer: &Pointer, last: Key, owner: Option<u64>) -> Result<Vec<u8>> {
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

    /// Reads blocks into the cache, by logical address and generation, several that follow each other at a
    /// time. `blocks` ascend.
    ///
    /// # Errors
    /// As [`walk`](Self::walk).
    pub(crate) fn prefetch(&self, blocks: &[(u64, u64)]) -> Result<()> {
        let node_len = self.geometry.node_len().0;
        let Some(cache) = self.cache else {
            return Ok(());
        };
        let missing: Vec<(u64, u64)> = blocks
            .iter()
            .filter(|(bytenr, generation)| cache.get(*bytenr, *generation).is_none())
            .copied()
            .collect();
        let mut rest = missing.as_slice();
        while let Some((first, _)) = rest.first() {
            let nowhere = || damaged(format!("the tree block at logical {first} is in no chunk"));
            let (_, chunk) = self.chunks.find(*first).ok_or_else(nowhere)?;
            let most = (PREFETCH / node_len).max(1) as usize;
            let follows = |(number, (bytenr, _)): &(usize, &(u64, u64))| {
                *bytenr == first + *number as u64 * node_len
                    && *number < most
                    && chunk.logical.contains(bytenr)
            };
            let count = rest.iter().enumerate().take_while(follows).count().max(1);
            let (run, behind) = rest.split_at(count);
            rest = behind;
            let end = first + count as u64 * node_len;
            let mut bytes = vec![0; count * self.geometry.node_len().as_usize()];
            let is_read = self.devices.read(chunk, 0, *first..end, &mut bytes);
            for ((bytenr, generation), block) in
                run.iter().zip(bytes.chunks_exact(node_len as usize))
            {
                let is_right = |block: &[u8]| self.is_block(*bytenr, *generation, block);
                let right = match is_read.is_ok() && is_right(block) {
                    true => Some(block.to_vec()),
                    false => self.read_copy(chunk, *bytenr, is_right)?,
                };
                let wrong = || damaged(format!("the tree block at logical {bytenr} is wrong"));
                let right = Arc::new(right.ok_or_else(wrong)?);
                cache.keep((*bytenr, *generation), &right);
            }
        }
        Ok(())
    }

    /// The first copy of a block that `is_right`, if there is one.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it leaves its chunk.
    pub(crate) fn read_copy(
        &self,
        chunk: &Chunk,
        bytenr: u64,
        is_right: impl Fn(&[u8]) -> bool,
    ) -> Result<Option<Vec<u8>>> {
        let len = self.geometry.node_len();
        let Some(end) = bytenr.checked_add(len.0) else {
            return Ok(None);
        };
        for copy in 0..chunk.copies() {
            let mut block = vec![0; len.as_usize()];
            match self.devices.read(chunk, copy, bytenr..end, &mut block) {
                Ok(()) if is_right(&block) => return Ok(Some(block)),
                Err(error) if error.kind() != Kind::Io => return Err(error),
                _ => {}
            }
        }
        Ok(None)
    }

    /// Whether `bytes` are a block at this address, of whatever generation.
    pub(crate) fn is_block_of(&self, bytenr: u64, bytes: &[u8]) -> bool {
        let header = Header::read_from_prefix(bytes);
        header.is_ok_and(|(header, _)| self.is_block(bytenr, header.generation.get(), bytes))
    }

    /// Whether `bytes` are the block at this address, of this generation.
    fn is_block(&self, bytenr: u64, generation: u64, bytes: &[u8]) -> bool {
        let header = Header::read_from_prefix(bytes);
        self.geometry.checksum.holds(bytes)
            && header.is_ok_and(|(header, _)| {
                header.bytenr.get() == bytenr
                    && header.generation.get() == generation
                    && header.fsid == self.geometry.metadata_uuid
                    && header.flags.get() & format::HEADER_WRITTEN != 0
            })
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
        for entry in entries(&bytes)? {
            match entry? {
                Entry::Item(key, data) => {
                    if self.range.contains(&key) {
                        visitor.item(key, data)?;
                    }
                }
                Entry::Child(child, next) => {
                    // What is below ends before the next child begins.
                    let child_last = next.map_or(last, before);
                    let first = child.first.unwrap_or(Key::MIN);
                    if first <= *self.range.end() && child_last >= *self.range.start() {
                        self.descend(&child, child_last, visitor)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What a tree block holds.
pub(crate) enum Entry<'a> {
    /// An item of a leaf.
    Item(Key, &'a [u8]),
    /// A child of a node, and the key that the next one begins with.
    Child(Pointer, Option<Key>),
}

/// The entries of a block that was found right.
///
/// # Errors
/// [`Kind::Damaged`] if it was not.
pub(crate) fn entries(bytes: &[u8]) -> Result<impl Iterator<Item = Result<Entry<'_>>>> {
    let (header, body) = Header::read_from_prefix(bytes).map_err(|_| cut_short())?;
    let (count, level) = (header.count.get() as usize, header.level);
    let entry = move |number: usize| -> Option<Entry<'_>> {
        let Some(level) = level.checked_sub(1) else {
            let item: Item = entry_of(body, number)?;
            let start = item.offset.get() as usize;
            let data = body.get(start..start.checked_add(item.size.get() as usize)?)?;
            return Some(Entry::Item(item.key.into(), data));
        };
        let child: KeyPointer = entry_of(body, number)?;
        let next = match number + 1 < count {
            true => Some(entry_of::<KeyPointer>(body, number + 1)?.key.into()),
            false => None,
        };
        let pointer = Pointer {
            bytenr: child.bytenr.get(),
            generation: child.generation.get(),
            level,
            first: Some(child.key.into()),
        };
        Some(Entry::Child(pointer, next))
    };
    Ok((0..count).map(move |number| entry(number).ok_or_else(cut_short)))
}

/// The greatest key below `key`, which is not the least of all: it follows another one.
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

#[cfg(test)]
mod tests {
    use super::super::checksum::Checksum;
    use super::*;

    const NODE: u64 = 4096;
    const OWNER: u64 = 5;
    const GENERATION: u64 = 9;
    const LEN: u64 = 1 << 20;

    /// A device whose bytes are its logical addresses, once or twice.
    struct Scene {
        geometry: Geometry,
        chunks: ChunkMap,
        volume: Vec<u8>,
    }

    impl Scene {
        fn new(kind: u64) -> Self {
            let copies = if kind == format::DUP { 2u16 } else { 1 };
            let mut item = Vec::new();
            for number in [LEN, 2, format::STRIPE_LEN, kind | format::METADATA] {
                item.extend(number.to_le_bytes());
            }
            item.extend([0; 12]);
            item.extend(copies.to_le_bytes());
            item.extend(1u16.to_le_bytes());
            for copy in 0..u64::from(copies) {
                item.extend(1u64.to_le_bytes());
                item.extend((copy * LEN).to_le_bytes());
                item.extend([0; 16]);
            }
            let mut chunks = ChunkMap::default();
            let key = Key::new(format::CHUNKS, format::CHUNK_ITEM, 0);
            chunks.add(key, &item, NODE as u32).unwrap();
            Self {
                geometry: Geometry {
                    sector_size: NODE as u32,
                    node_size: NODE as u32,
                    checksum: Checksum::Crc32c,
                    metadata_uuid: [7; 16],
                    generation: GENERATION,
                },
                chunks,
                volume: vec![0; (LEN * u64::from(copies)) as usize],
            }
        }

        /// Writes a block, to all its copies: a leaf with an item of 8 bytes for each key, or a node.
        fn write(&mut self, block: &Pointer, keys: &[u64], children: &[Pointer]) {
            let mut bytes = vec![0; NODE as usize];
            bytes[0x20..0x30].copy_from_slice(&self.geometry.metadata_uuid);
            bytes[0x30..0x38].copy_from_slice(&block.bytenr.to_le_bytes());
            bytes[0x38] = 1;
            bytes[0x50..0x58].copy_from_slice(&block.generation.to_le_bytes());
            bytes[0x58..0x60].copy_from_slice(&OWNER.to_le_bytes());
            let count = (keys.len() + children.len()) as u32;
            bytes[0x60..0x64].copy_from_slice(&count.to_le_bytes());
            bytes[0x64] = block.level;
            let body = &mut bytes[0x65..];
            for (number, key) in keys.iter().enumerate() {
                let item = &mut body[25 * number..][..25];
                item[..8].copy_from_slice(&key.to_le_bytes());
                let start = NODE as usize - 0x65 - 8 * (number + 1);
                item[17..21].copy_from_slice(&(start as u32).to_le_bytes());
                item[21] = 8;
                body[start..start + 8].copy_from_slice(&key.to_le_bytes());
            }
            for (number, child) in children.iter().enumerate() {
                let entry = &mut body[33 * number..][..33];
                let first = child.first.unwrap().objectid;
                entry[..8].copy_from_slice(&first.to_le_bytes());
                entry[17..25].copy_from_slice(&child.bytenr.to_le_bytes());
                entry[25..].copy_from_slice(&child.generation.to_le_bytes());
            }
            self.seal(block.bytenr, bytes);
        }

        fn seal(&mut self, bytenr: u64, mut bytes: Vec<u8>) {
            let sum = self.geometry.checksum.of(&bytes[32..]);
            bytes[..32].copy_from_slice(&sum);
            for at in (bytenr..self.volume.len() as u64).step_by(LEN as usize) {
                self.volume[at as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        }

        /// Changes a sealed block.
        fn forge(&mut self, bytenr: u64, at: usize, change: &[u8]) {
            let mut bytes = self.volume[bytenr as usize..][..NODE as usize].to_vec();
            bytes[at..at + change.len()].copy_from_slice(change);
            self.seal(bytenr, bytes);
        }

        /// A tree of two leaves with the keys 10 to 13 and 20 to 23, the second one older.
        fn with_tree(kind: u64) -> (Self, Root) {
            let mut scene = Self::new(kind);
            let root = Root::of(OWNER, NODE, GENERATION, 1);
            let leaf = |number: u64, generation| Pointer {
                bytenr: NODE * (1 + number),
                generation,
                level: 0,
                first: Some(Key::new(10 * number, 0, 0)),
            };
            let leaves = [leaf(1, GENERATION), leaf(2, 4)];
            scene.write(&root.block, &[], &leaves);
            scene.write(&leaves[0], &[10, 11, 12, 13], &[]);
            scene.write(&leaves[1], &[20, 21, 22, 23], &[]);
            (scene, root)
        }

        fn walk(&self, root: &Root, range: std::ops::RangeInclusive<u64>) -> Result<Seen> {
            let mut seen = Seen::default();
            self.visit(root, range, &mut seen)?;
            Ok(seen)
        }

        fn visit(
            &self,
            root: &Root,
            range: std::ops::RangeInclusive<u64>,
            visitor: &mut dyn Visit,
        ) -> Result<()> {
            let mut devices = Devices::default();
            devices.add(1, &self.volume);
            let reader = Reader {
                geometry: &self.geometry,
                chunks: &self.chunks,
                devices: &devices,
                cache: None,
            };
            let first = Key::new(*range.start(), 0, 0);
            let last = Key::new(*range.end(), 0, 0);
            reader.walk(root, first..=last, visitor)
        }

        #[track_caller]
        fn is_damaged(&self, root: &Root, why: &str) {
            let error = self.walk(root, 0..=u64::MAX).unwrap_err();
            assert_eq!(error.kind(), Kind::Damaged);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[derive(Debug, Default)]
    struct Seen {
        /// Blocks older than this are not entered.
        from: u64,
        blocks: Vec<u64>,
        keys: Vec<u64>,
    }

    impl Visit for Seen {
        fn enters(&mut self, block: &Pointer) -> bool {
            block.generation >= self.from
        }

        fn block(&mut self, pointer: &Pointer, bytes: &[u8]) -> Result<()> {
            assert_eq!(bytes.len() as u64, NODE);
            self.blocks.push(pointer.bytenr / NODE);
            Ok(())
        }

        fn item(&mut self, key: Key, data: &[u8]) -> Result<()> {
            assert_eq!(data, key.objectid.to_le_bytes());
            self.keys.push(key.objectid);
            Ok(())
        }
    }

    #[test]
    fn a_range_is_read_and_no_block_beside_it() {
        let (scene, root) = Scene::with_tree(0);
        let all = scene.walk(&root, 0..=u64::MAX).unwrap();
        assert_eq!(all.keys, [10, 11, 12, 13, 20, 21, 22, 23]);
        assert_eq!(all.blocks, [1, 2, 3]);
        let some = scene.walk(&root, 12..=19).unwrap();
        assert_eq!((some.keys, some.blocks), (vec![12, 13], vec![1, 2]));
        let some = scene.walk(&root, 20..=20).unwrap();
        assert_eq!((some.keys, some.blocks), (vec![20], vec![1, 3]));
        let none = scene.walk(&root, 0..=9).unwrap();
        assert_eq!((none.keys, none.blocks), (vec![], vec![1]));
    }

    #[test]
    fn what_is_older_can_be_left_out() {
        let (scene, root) = Scene::with_tree(0);
        let mut newer = Seen {
            from: 5,
            ..Seen::default()
        };
        scene.visit(&root, 0..=u64::MAX, &mut newer).unwrap();
        assert_eq!(
            (newer.keys, newer.blocks),
            (vec![10, 11, 12, 13], vec![1, 2])
        );
    }

    #[test]
    fn a_bad_copy_is_made_up_for_by_the_other() {
        for bad in [0, LEN] {
            let (mut scene, root) = Scene::with_tree(format::DUP);
            scene.volume[(bad + 2 * NODE) as usize + 500] ^= 1;
            assert_eq!(scene.walk(&root, 0..=u64::MAX).unwrap().keys.len(), 8);
            scene.volume[(LEN - bad + 2 * NODE) as usize + 500] ^= 1;
            scene.is_damaged(&root, "at logical 8192 has a wrong checksum");
        }
    }

    #[test]
    fn forged_blocks_are_damage() {
        let number = u64::to_le_bytes;
        // By place in the block: the fields of the header, then the first entry.
        for (at, change, why) in [
            (0x20, number(1), "belongs elsewhere"),
            (0x30, number(3 * NODE), "belongs elsewhere"),
            (0x38, number(0), "never written"),
            (0x50, number(GENERATION - 1), "another commit"),
            (0x58, number(OWNER + 1), "another tree"),
            (0x60, number(0), "is empty"),
            (0x60, number(1 << 31), "more entries than room"),
            (0x60, number(1 << 32 | 4), "another level"),
            (0x65, number(9), "keys where they do not belong"),
            (0x65 + 25, number(10), "keys where they do not belong"),
            (0x65 + 75, number(20), "keys where they do not belong"),
            (0x65 + 17, number(u64::MAX), "items that overlap"),
        ] {
            let (mut scene, root) = Scene::with_tree(0);
            scene.forge(2 * NODE, at, &change);
            scene.is_damaged(&root, why);
        }
        let pointer = 0x65 + 17;
        for (at, change, why) in [
            (pointer, number(LEN), "in no chunk"),
            (pointer, number(u64::MAX - 100), "in no chunk"),
            (pointer, number(LEN - 100), "leaves its chunk"),
            (pointer, number(3 * NODE), "another commit"),
            (
                pointer + 8,
                number(GENERATION + 1),
                "older than what it leads to",
            ),
        ] {
            let (mut scene, root) = Scene::with_tree(0);
            scene.forge(NODE, at, &change);
            scene.is_damaged(&root, why);
        }
        // A node that leads to itself, and claims to be of any level.
        let (mut scene, mut root) = Scene::with_tree(0);
        scene.forge(NODE, pointer, &number(NODE));
        scene.forge(NODE, pointer + 8, &number(GENERATION));
        scene.is_damaged(&root, "another level");
        root.block.level = 8;
        scene.forge(NODE, 0x64, &[8]);
        scene.is_damaged(&root, "another level");
        // Twice the same child: its keys would not ascend.
        let (mut scene, root) = Scene::with_tree(0);
        scene.forge(NODE, pointer + 33, &number(2 * NODE));
        scene.forge(NODE, pointer + 33 + 8, &number(GENERATION));
        scene.is_damaged(&root, "keys where they do not belong");
    }

    #[test]
    fn the_key_before_is_the_next_smaller_one() {
        assert_eq!(before(Key::new(5, 3, 7)), Key::new(5, 3, 6));
        assert_eq!(before(Key::new(5, 3, 0)), Key::new(5, 2, u64::MAX));
        assert_eq!(before(Key::new(5, 0, 0)), Key::new(4, u8::MAX, u64::MAX));
    }
}
