//! The window: all of one commit is read that was not before.
//!
//! What a commit leads to is whole until the superblocks of the next one are written. So: the superblocks
//! are read, then all that changed since the last round, then the superblocks again. If they are still
//! the same, everything between was right. What the pins refer to stays, and is read later; what no pin
//! refers to, written after the last pin was taken, is read here, too.
//!
//! Under a freeze no commit comes. The window is looked through once before it, so that most of what it
//! needs is in memory then, and little memory is taken while writers wait.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::FromBytes;

use super::devices::Devices;
use super::mirrors;
use super::pins::{Pins, is_subvolume};
use crate::error::{Error, Kind, Result};
use crate::fs::btrfs::chunks::{self, damaged};
use crate::fs::btrfs::commit::Commit;
use crate::fs::btrfs::difference::difference;
use crate::fs::btrfs::format::{self, FileExtentItem, Key, RootItem, SuperBlock};
use crate::fs::btrfs::map::listed;
use crate::fs::btrfs::sums::Sums;
use crate::fs::btrfs::superblock::Geometry;
use crate::fs::btrfs::tree::{Cache, Pointer, Reader, Root, Visit};
use crate::units::ByteLen;

/// Most bytes of data that are read at a time.
const REQUEST: u64 = 1 << 20;

/// How long to wait for a moment in which nobody overwrites anything in place.
const PATIENCE: Duration = Duration::from_millis(300);

/// A window that is being looked through.
pub(super) struct Window<'a> {
    devices: &'a Devices,
    by_id: chunks::Devices<'a>,
    pins: &'a Pins,
    /// The only subvolume whose data is wanted.
    only: Option<u64>,
    /// Tree blocks of this generation and before are in the image already.
    since: u64,
    /// Most bytes there is memory for.
    room: ByteLen,
    cache: Cache,
    /// Data that was read when the window was looked through before, by its place.
    held: HashMap<(u64, u64), Arc<Vec<u8>>>,
}

/// Data that was read before, if it was.
type Held = Option<Arc<Vec<u8>>>;

/// What there was to see.
pub(super) enum Sight {
    /// A commit, of which data may still be missing.
    Commit(Box<Seen>),
    /// The next commit came, or a subvolume that has no pin.
    Moved,
    /// More changed since the last round than there is memory for.
    TooMuch,
}

/// A commit that was looked at.
pub(super) struct Seen {
    pub(super) commit: Commit,
    /// Of each volume.
    pub(super) superblocks: Vec<SuperBlock>,
    /// Tree blocks that are not in the image yet, by logical address.
    pub(super) blocks: BTreeMap<u64, Arc<Vec<u8>>>,
    /// Data that no pin refers to, ascending.
    pub(super) data: Vec<Loose>,
    /// The roots of all pinned trees.
    pub(super) pinned: Vec<PinnedRoot>,
    /// How many subvolumes there are.
    pub(super) subvolumes: usize,
    /// Whether some of its subvolumes were being deleted: their data was not pinned.
    pub(super) has_dying: bool,
    /// How long it took to look at, all told.
    pub(super) took: Duration,
    /// Data that is not read yet.
    missing: Vec<usize>,
}

impl Seen {
    /// Whether the data at a logical address was read in the window.
    pub(super) fn has_read(&self, logical: u64) -> bool {
        let number = self
            .data
            .partition_point(|loose| loose.logical.end <= logical);
        self.data
            .get(number)
            .is_some_and(|loose| loose.logical.contains(&logical))
    }

    /// Whether all its data was read.
    pub(super) fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// How many bytes of data were read in the window.
    pub(super) fn data_len(&self) -> ByteLen {
        let lens = self
            .data
            .iter()
            .map(|loose| loose.logical.end - loose.logical.start);
        ByteLen(lens.sum())
    }
}

/// Data that no pin refers to.
pub(super) struct Loose {
    pub(super) logical: Range<u64>,
    /// Empty until it is read.
    pub(super) bytes: Arc<Vec<u8>>,
    sums: Sums,
}

/// The root of a pinned tree: it changes only if what the tree refers to is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PinnedRoot {
    pub(super) tree: u64,
    pub(super) bytenr: u64,
    pub(super) generation: u64,
    pub(super) level: u8,
}

impl<'a> Window<'a> {
    /// A window over what is newer than generation `since`.
    pub(super) fn new(
        devices: &'a Devices,
        pins: &'a Pins,
        only: Option<u64>,
        since: u64,
        room: ByteLen,
    ) -> Self {
        Self {
            only,
            by_id: devices.by_id(),
            devices,
            pins,
            since,
            room,
            cache: Cache::default(),
            held: HashMap::new(),
        }
    }

    /// Looks at the commit that is there now. Data without checksums, which may be overwritten in place, is
    /// read, and all other data too unless there is more than `most` of it.
    ///
    /// # Errors
    /// If what is there cannot be understood though nobody changed it meanwhile.
    pub(super) fn look(&mut self, most: ByteLen) -> Result<Sight> {
        let begun = Instant::now();
        let Some(superblocks) = self.devices.superblocks()? else {
            return Ok(Sight::Moved);
        };
        match self.look_at(&superblocks, most) {
            Ok(Sight::Commit(mut seen)) => {
                seen.took = begun.elapsed();
                Ok(Sight::Commit(seen))
            }
            Err(error) => match self.devices.are_still(&superblocks)? {
                true => Err(error),
                false => Ok(Sight::Moved),
            },
            other => other,
        }
    }

    /// Reads what is missing, and makes sure that no commit came meanwhile.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub(super) fn confirm(&mut self, seen: &mut Seen) -> Result<bool> {
        let begun = Instant::now();
        let mut read = Ok(());
        for number in std::mem::take(&mut seen.missing) {
            read = read.and_then(|()| self.read_loose(&seen.commit, &mut seen.data[number]));
        }
        let is_still = self.devices.are_still(&seen.superblocks)?;
        seen.took += begun.elapsed();
        match is_still {
            true => read.map(|()| true),
            false => Ok(false),
        }
    }

    /// Reads data that may be overwritten in place again, until it is twice the same: then it was all that
    /// at one instant. `false` if it never is.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) fn settle(&self, seen: &mut Seen) -> Result<bool> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let mut is_settled = true;
            for loose in &mut seen.data {
                if loose.sums.is_complete() {
                    continue;
                }
                let before = Arc::clone(&loose.bytes);
                let read = self.read_loose(&seen.commit, loose);
                if read.is_err() && !self.devices.are_still(&seen.superblocks)? {
                    // Something else lies there by now.
                    return Ok(false);
                }
                read?;
                is_settled &= loose.bytes == before;
            }
            if is_settled {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Keeps the data that was read of a commit, for the next look.
    pub(super) fn keep(&mut self, seen: Seen) {
        for Loose { logical, bytes, .. } in seen.data {
            if !bytes.is_empty() {
                self.held.insert((logical.start, logical.end), bytes);
            }
        }
    }

    /// Looks at the commit of these superblocks.
    fn look_at(&mut self, superblocks: &[SuperBlock], most: ByteLen) -> Result<Sight> {
        let first = superblocks
            .first()
            .ok_or_else(|| damaged("it has no superblock"))?;
        let commit = Commit::read(first, &self.by_id, Some(&self.cache))?;
        let reader = commit.reader(&self.by_id, Some(&self.cache));
        let places = self.new_blocks(&commit, &reader)?;
        let node_len = commit.geometry.node_len();
        let block_bytes = places.len() as u64 * node_len.0;
        if block_bytes > self.room.0 {
            return Ok(Sight::TooMuch);
        }
        reader.prefetch(&places)?;
        let mut blocks = BTreeMap::new();
        for (bytenr, generation) in places {
            let gone = || damaged(format!("the tree block at logical {bytenr} is nowhere"));
            let block = self.cache.get(bytenr, generation).ok_or_else(gone)?;
            blocks.insert(bytenr, block);
        }
        let mut roots = Roots::read(&commit, &reader)?;
        let pinned = roots.pinned(self.pins)?;
        let mut loose = LooseExtents::default();
        let is_wanted = |root: &&PinnedRoot| self.only.is_none_or(|only| only == root.tree);
        for root in roots.alive.iter().filter(is_wanted) {
            let pin = self.pins.of(root.tree);
            let pin = pin.and_then(|pin| pinned.iter().find(|root| root.tree == pin.tree));
            if pin.is_none() && root.level > 0 {
                // One that came after the pins, and too large to be read here: it needs a pin, too.
                return Ok(Sight::Moved);
            }
            self.find_loose(&reader, root, pin, &mut loose)?;
        }
        let mut pieces = pieces(&commit, &loose.written)?;
        for (start, piece) in self::pieces(&commit, &loose.reserved)? {
            // It may have been written to before, and still have checksums for that.
            if !pieces.contains_key(&start) && has_sums(&commit, &reader, start..start + piece)? {
                pieces.insert(start, piece);
            }
        }
        if block_bytes + pieces.values().sum::<u64>() > self.room.0 {
            return Ok(Sight::TooMuch);
        }
        let mut runs = take_held(&mut self.held, &mut pieces);
        runs.extend(merged(&commit, pieces).map(|run| (run, None)));
        runs.sort_unstable_by_key(|(run, _)| run.start);
        let mut loose = Vec::new();
        for (logical, held) in runs {
            let mut sums = Sums::new(&commit.geometry, logical.clone());
            let keys = sums.keys();
            let mut add = |key: Key, item: &[u8]| match key.kind {
                format::EXTENT_CSUM => sums.add(key, item),
                _ => Ok(()),
            };
            reader.walk(&commit.trees.csum, keys, &mut add)?;
            let is_right =
                |bytes: &Arc<Vec<u8>>| sums.is_complete() && sums.wrong(bytes).next().is_none();
            loose.push(Loose {
                bytes: held.filter(is_right).unwrap_or_default(),
                logical,
                sums,
            });
        }
        let unread: Vec<usize> = (0..loose.len())
            .filter(|number| loose[*number].bytes.is_empty())
            .collect();
        let unread_bytes: u64 = unread
            .iter()
            .map(|number| loose[*number].logical.end - loose[*number].logical.start)
            .sum();
        let mut missing = Vec::new();
        for number in unread {
            if unread_bytes <= most.0 || !loose[number].sums.is_complete() {
                self.read_loose(&commit, &mut loose[number])?;
            } else {
                missing.push(number);
            }
        }
        Ok(Sight::Commit(Box::new(Seen {
            superblocks: superblocks.to_vec(),
            blocks,
            data: loose,
            pinned,
            subvolumes: roots.alive.len(),
            has_dying: roots.has_dying,
            took: Duration::ZERO,
            missing,
            commit,
        })))
    }

    /// All tree blocks newer than what the image has, by address and generation, ascending.
    fn new_blocks(&self, commit: &Commit, reader: &Reader<'_>) -> Result<Vec<(u64, u64)>> {
        let mut newer = Newer {
            since: self.since,
            geometry: &commit.geometry,
            most: (self.room.0 / commit.geometry.node_len().0) as usize,
            blocks: Vec::new(),
        };
        reader.walk(&commit.trees.extent, Key::MIN..=Key::MAX, &mut newer)?;
        Ok(newer.blocks)
    }

    /// Notes the data that a subvolume refers to and its pin does not, by address.
    fn find_loose(
        &self,
        reader: &Reader<'_>,
        root: &PinnedRoot,
        pin: Option<&PinnedRoot>,
        loose: &mut LooseExtents,
    ) -> Result<()> {
        let mut own = LooseExtents::default();
        let mut pins: HashSet<u64> = HashSet::new();
        let pin = pin.map(PinnedRoot::root);
        difference(
            reader,
            &root.root(),
            pin.as_ref(),
            &mut |key, item| {
                if let Some(data) = DataRef::of(key, item)? {
                    let list = match data.is_reserved {
                        true => &mut own.reserved,
                        false => &mut own.written,
                    };
                    list.insert(data.start, data.len);
                }
                Ok(())
            },
            &mut |key, item| {
                pins.extend(DataRef::of(key, item)?.map(|data| data.start));
                Ok(())
            },
        )?;
        own.written.retain(|start, _| !pins.contains(start));
        own.reserved.retain(|start, _| !pins.contains(start));
        loose.written.append(&mut own.written);
        loose.reserved.append(&mut own.reserved);
        Ok(())
    }

    fn read_loose(&self, commit: &Commit, loose: &mut Loose) -> Result<()> {
        let reader = commit.reader(&self.by_id, None);
        let len = ByteLen(loose.logical.end - loose.logical.start);
        let mut bytes = vec![0; len.as_usize()];
        mirrors::read(&reader, 0, &loose.logical, &loose.sums, &mut bytes)?;
        loose.bytes = Arc::new(bytes);
        Ok(())
    }
}

/// Collects the tree blocks that the extent tree lists and that are newer than a generation.
struct Newer<'a> {
    since: u64,
    geometry: &'a Geometry,
    /// More than so many are too many anyway.
    most: usize,
    blocks: Vec<(u64, u64)>,
}

impl Visit for Newer<'_> {
    /// Whatever is listed newly is listed in a block that is new.
    fn enters(&mut self, block: &Pointer) -> bool {
        block.generation > self.since && self.blocks.len() <= self.most
    }

    fn item(&mut self, key: Key, item: &[u8]) -> Result<()> {
        if let Some(listed) = listed(self.geometry, key, item)?
            && listed.is_tree_block
            && listed.generation > self.since
        {
            self.blocks.push((listed.logical.start, listed.generation));
        }
        Ok(())
    }
}

/// The trees of subvolumes in a commit.
struct Roots {
    /// Those of subvolumes that are not being deleted.
    alive: Vec<PinnedRoot>,
    /// The others.
    dead: Vec<PinnedRoot>,
    has_dying: bool,
}

impl Roots {
    fn read(commit: &Commit, reader: &Reader<'_>) -> Result<Self> {
        let mut roots = Self {
            alive: Vec::new(),
            dead: Vec::new(),
            has_dying: false,
        };
        let range = Key::new(format::FS_TREE, 0, 0)..=Key::MAX;
        reader.walk(&commit.trees.root, range, &mut |key: Key, item: &[u8]| {
            if key.kind != format::ROOT_ITEM {
                return Ok(());
            }
            if key.objectid == format::TREE_RELOC {
                let what = "a balance of it was begun and has not ended";
                return Err(Error::new(Kind::NotApplicable, what));
            }
            if !is_subvolume(key.objectid) {
                return Ok(());
            }
            let (root, _) = RootItem::read_from_prefix(item)
                .map_err(|_| damaged("the item of a tree is cut short"))?;
            let list = match root.refs.get() {
                0 => &mut roots.dead,
                _ => &mut roots.alive,
            };
            list.push(PinnedRoot::of(key.objectid, &root));
            Ok(())
        })?;
        Ok(roots)
    }

    /// The roots of what is pinned.
    fn pinned(&mut self, pins: &Pins) -> Result<Vec<PinnedRoot>> {
        let is_pin = |root: &PinnedRoot| pins.iter().any(|pin| pin.tree == root.tree);
        self.has_dying = !self.dead.iter().all(is_pin);
        let mut pinned = Vec::new();
        for pin in pins.iter() {
            let mut all = self.alive.iter().chain(&self.dead);
            let gone = || {
                let what = format!("the pin of its subvolume {} vanished", pin.subvolume);
                Error::new(Kind::Inconsistent, what)
            };
            pinned.push(*all.find(|root| root.tree == pin.tree).ok_or_else(gone)?);
        }
        Ok(pinned)
    }
}

impl PinnedRoot {
    /// Of the item of a tree.
    pub(super) fn of(tree: u64, root: &RootItem) -> Self {
        Self {
            tree,
            bytenr: root.bytenr.get(),
            generation: root.generation.get(),
            level: root.level,
        }
    }

    fn root(&self) -> Root {
        Root {
            // A subvolume shares blocks with others.
            owner: None,
            ..Root::of(self.tree, self.bytenr, self.generation, self.level)
        }
    }
}

/// What a subvolume says of an extent of data.
pub(super) struct DataRef {
    /// Its logical address.
    pub(super) start: u64,
    /// Its bytes on disk.
    pub(super) len: u64,
    /// Whether this part of it was never written to.
    is_reserved: bool,
}

impl DataRef {
    /// What an item refers to; `None` if to no extent.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it makes no sense.
    pub(super) fn of(key: Key, item: &[u8]) -> Result<Option<Self>> {
        let is_inline = item.get(FILE_EXTENT_KIND_AT) == Some(&format::FILE_EXTENT_INLINE);
        if key.kind != format::EXTENT_DATA || is_inline {
            return Ok(None);
        }
        let nonsense = |_| damaged(format!("the data of inode {} makes no sense", key.objectid));
        let item = FileExtentItem::read_from_bytes(item).map_err(nonsense)?;
        let data = Self {
            start: item.disk_bytenr.get(),
            len: item.disk_num_bytes.get(),
            is_reserved: item.kind == format::FILE_EXTENT_RESERVED,
        };
        // A hole lies nowhere.
        Ok((data.start > 0).then_some(data))
    }
}

/// Where in the item of a part of a file its kind stands.
const FILE_EXTENT_KIND_AT: usize = std::mem::offset_of!(FileExtentItem, kind);

/// Extents of data that no pin refers to: bytes by logical address.
#[derive(Default)]
struct LooseExtents {
    /// Those that something was written to.
    written: BTreeMap<u64, u64>,
    /// Those of which parts are only reserved.
    reserved: BTreeMap<u64, u64>,
}

/// Whether anything of a run of data has a checksum.
fn has_sums(commit: &Commit, reader: &Reader<'_>, logical: Range<u64>) -> Result<bool> {
    let mut sums = Sums::new(&commit.geometry, logical);
    let keys = sums.keys();
    reader.walk(
        &commit.trees.csum,
        keys,
        &mut |key: Key, item: &[u8]| match key.kind {
            format::EXTENT_CSUM => sums.add(key, item),
            _ => Ok(()),
        },
    )?;
    Ok(sums.known() > 0)
}

/// Extents, by address, in pieces that can be read at a time.
fn pieces(commit: &Commit, extents: &BTreeMap<u64, u64>) -> Result<BTreeMap<u64, u64>> {
    let sector = u64::from(commit.geometry.sector_size);
    let mut pieces = BTreeMap::new();
    let mut last = 0;
    for (&start, &len) in extents {
        let nonsense = || damaged(format!("the extent at logical {start} makes no sense"));
        let (_, chunk) = commit.chunks.find(start).ok_or_else(nonsense)?;
        let end = start.checked_add(len).ok_or_else(nonsense)?;
        let is_sane = start.is_multiple_of(sector)
            && len.is_multiple_of(sector)
            && start >= last
            && end <= chunk.logical.end
            && chunk.kind & format::DATA != 0;
        if !is_sane {
            return Err(nonsense());
        }
        last = end;
        let mut at = start;
        while at < end {
            let piece = (end - at).min(REQUEST);
            pieces.insert(at, piece);
            at += piece;
        }
    }
    Ok(pieces)
}

/// Takes out of `pieces` those that make up runs that were read before.
fn take_held(
    held: &mut HashMap<(u64, u64), Arc<Vec<u8>>>,
    pieces: &mut BTreeMap<u64, u64>,
) -> Vec<(Range<u64>, Held)> {
    let mut runs = Vec::new();
    for ((start, end), bytes) in held.drain() {
        let mut at = start;
        while let Some(len) = pieces.get(&at).filter(|_| at < end) {
            at += len;
        }
        if at == end {
            let mut rest = pieces.split_off(&start);
            let mut behind = rest.split_off(&end);
            pieces.append(&mut behind);
            runs.push((start..end, Some(bytes)));
        }
    }
    runs
}

/// Pieces that follow each other within a chunk as one run, as far as that can be read at a time.
fn merged(commit: &Commit, pieces: BTreeMap<u64, u64>) -> impl Iterator<Item = Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (start, len) in pieces {
        let end = start + len;
        let goes_on = |last: &Range<u64>| {
            let chunk = commit.chunks.find(last.start);
            last.end == start
                && end - last.start <= REQUEST
                && chunk.is_some_and(|(_, chunk)| chunk.logical.contains(&start))
        };
        match runs.last_mut() {
            Some(last) if goes_on(last) => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs.into_iter()
}
