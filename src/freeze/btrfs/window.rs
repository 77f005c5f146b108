//! The window: all of one commit is read that was not before.
//!
//! What a commit leads to is whole until the superblocks of the next one are written. So: the superblocks
//! are read, then all that changed since the last round, then the superblocks again. If they are still
//! the same, everything between was right. What the pins refer to stays, and is read later; what no pin
//! refers to, written after the last pin was taken, is read here, too.
//!
//! Under a freeze no commit comes. The window is looked through once before it, so that most of what it
//! needs is in memory then, and little memory is taken while writers wait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::devices::Devices;
use super::loose::{Held, Loose, LooseExtents};
use super::pins::Pins;
use super::roots::{self, PinnedRoot, Roots};
use crate::error::Result;
use crate::fs::btrfs::chunks::damaged;
use crate::fs::btrfs::commit::Commit;
use crate::fs::btrfs::format::{Key, SuperBlock};
use crate::fs::btrfs::map::listed;
use crate::fs::btrfs::superblock::Geometry;
use crate::fs::btrfs::tree::{Cache, Pointer, Reader, Visit};
use crate::units::ByteLen;

/// A window that is being looked through.
pub(super) struct Window {
    devices: Arc<Devices>,
    /// The only subvolume whose data is wanted.
    only: Option<u64>,
    /// Tree blocks of this generation and before are in the image already.
    since: u64,
    /// Most bytes there is memory for.
    room: ByteLen,
    cache: Cache,
    /// Data that was read when the window was looked through before, by its place.
    held: Held,
}

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
    /// Whether some of the data that no pin refers to may be overwritten in place: what was read of it may be
    /// newer than the commit, unless nobody writes.
    pub(super) has_in_place: bool,
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
        self.data.iter().map(Loose::len).sum()
    }
}

impl Window {
    /// A window over what is newer than generation `since`.
    pub(super) fn new(
        devices: &Arc<Devices>,
        only: Option<u64>,
        since: u64,
        room: ByteLen,
    ) -> Self {
        Self {
            only,
            devices: Arc::clone(devices),
            since,
            room,
            cache: Cache::default(),
            held: Held::default(),
        }
    }

    /// Looks at the commit that is there now. Data without checksums, which may be overwritten in place, is
    /// read, and all other data too unless there is more than `most` of it.
    ///
    /// # Errors
    /// If what is there cannot be understood though nobody changed it meanwhile.
    pub(super) fn look(&mut self, pins: &Pins, most: ByteLen) -> Result<Sight> {
        let begun = Instant::now();
        let Some(superblocks) = self.devices.superblocks()? else {
            return Ok(Sight::Moved);
        };
        match self.look_at(&superblocks, pins, most) {
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
        let by_id = self.devices.by_id();
        let reader = seen.commit.reader(&by_id, None);
        let mut read = Ok(());
        for number in std::mem::take(&mut seen.missing) {
            read = read.and_then(|()| seen.data[number].read(&reader));
        }
        let is_still = self.devices.are_still(&seen.superblocks)?;
        seen.took += begun.elapsed();
        match is_still {
            true => read.map(|()| true),
            false => Ok(false),
        }
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
    fn look_at(&mut self, superblocks: &[SuperBlock], pins: &Pins, most: ByteLen) -> Result<Sight> {
        let by_id = self.devices.by_id();
        let first = superblocks
            .first()
            .ok_or_else(|| damaged("it has no superblock"))?;
        let commit = Commit::read(first, &by_id, Some(&self.cache))?;
        let reader = commit.reader(&by_id, Some(&self.cache));
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
        let pinned = roots.pinned(pins)?;
        let mut extents = LooseExtents::default();
        let is_wanted = |root: &&PinnedRoot| self.only.is_none_or(|only| only == root.tree);
        for root in roots.alive.iter().filter(is_wanted) {
            let pin = pins.of(root.tree);
            let pin = pin.and_then(|pin| roots::find(&pinned, pin.tree));
            if pin.is_none() && root.level > 0 {
                // One that came after the pins, and too large to be read here: it needs a pin, too.
                return Ok(Sight::Moved);
            }
            extents.find(&reader, root, pin)?;
        }
        let room = ByteLen(self.room.0 - block_bytes);
        let Some(mut data) = extents.runs(&commit, &reader, &mut self.held, room)? else {
            return Ok(Sight::TooMuch);
        };
        let has_in_place = extents.has_in_place(&commit, &reader, &data)?;
        let is_unread = |run: &Loose| run.bytes.is_empty();
        let unread: ByteLen = data
            .iter()
            .filter(|run| is_unread(run))
            .map(Loose::len)
            .sum();
        let mut missing = Vec::new();
        for (number, run) in data
            .iter_mut()
            .enumerate()
            .filter(|(_, run)| is_unread(run))
        {
            match unread <= most || !run.has_all_sums() {
                true => run.read(&reader)?,
                false => missing.push(number),
            }
        }
        Ok(Sight::Commit(Box::new(Seen {
            superblocks: superblocks.to_vec(),
            blocks,
            data,
            pinned,
            subvolumes: roots.alive.len(),
            has_dying: roots.has_dying,
            has_in_place,
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
