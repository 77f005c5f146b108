//! The trees of subvolumes in a commit, and those of them that are pinned.

use std::collections::BTreeMap;

use super::pins::{Pins, is_subvolume};
use crate::error::{Error, Kind, Result};
use crate::fs::btrfs::commit::{Commit, root_item};
use crate::fs::btrfs::format::{self, Key, RootItem};
use crate::fs::btrfs::tree::{Reader, Root};

/// The root of a pinned tree: it changes only if what the tree refers to is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PinnedRoot {
    pub(super) tree: u64,
    pub(super) bytenr: u64,
    pub(super) generation: u64,
    pub(super) level: u8,
}

/// The trees of subvolumes in a commit.
pub(super) struct Roots {
    /// Those of subvolumes that are not being deleted.
    pub(super) alive: Vec<PinnedRoot>,
    /// The others.
    dead: Vec<PinnedRoot>,
    /// Whether there are some that nothing pins.
    pub(super) has_dying: bool,
}

impl Roots {
    /// Reads them.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if a balance has not ended; [`Kind::Damaged`] if they make no sense.
    pub(super) fn read(commit: &Commit, reader: &Reader<'_>) -> Result<Self> {
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
            let root = root_item(item)?;
            let list = match root.refs.get() {
                0 => &mut roots.dead,
                _ => &mut roots.alive,
            };
            list.push(PinnedRoot::of(key.objectid, &root));
            Ok(())
        })?;
        Ok(roots)
    }

    /// The roots of what is pinned, ascending by tree.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if one is not there.
    pub(super) fn pinned(&mut self, pins: &Pins) -> Result<Vec<PinnedRoot>> {
        let all = self.alive.iter().chain(&self.dead);
        let all: BTreeMap<u64, PinnedRoot> = all.map(|root| (root.tree, *root)).collect();
        let mut pinned = Vec::new();
        for pin in pins.iter() {
            let gone = || {
                let what = format!("the pin of its subvolume {} vanished", pin.subvolume);
                Error::new(Kind::Inconsistent, what)
            };
            pinned.push(*all.get(&pin.tree).ok_or_else(gone)?);
        }
        pinned.sort_unstable_by_key(|root| root.tree);
        let is_pinned = |root: &PinnedRoot| find(&pinned, root.tree).is_some();
        self.has_dying = !self.dead.iter().all(is_pinned);
        Ok(pinned)
    }
}

/// The root of a tree among `roots`, which ascend by that.
pub(super) fn find(roots: &[PinnedRoot], tree: u64) -> Option<&PinnedRoot> {
    let at = roots.binary_search_by_key(&tree, |root| root.tree);
    roots.get(at.ok()?)
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

    /// As the root of a tree to be read.
    pub(super) fn root(&self) -> Root {
        Root {
            // A subvolume shares blocks with others.
            owner: None,
            ..Root::of(self.tree, self.bytenr, self.generation, self.level)
        }
    }
}
