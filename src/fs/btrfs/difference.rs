//! What two trees do not share.
//!
//! A snapshot and its subvolume share all blocks that neither has changed since. A block never changes,
//! and always stands at the same height: so both trees are gone down level by level, and what leads to a
//! block that both have is left out. What is read grows with the difference, not with the trees.

use super::format::Key;
use super::tree::{Entry, Pointer, Reader, Root, entries};
use crate::error::Result;

/// Takes the items of leaves.
pub(crate) type Items<'a> = dyn FnMut(Key, &[u8]) -> Result<()> + 'a;

/// Hands the items of all leaves that only `one` has to `of_one`, and of those that only `other` has to
/// `of_other`: an item that both have in different leaves comes from either side. The order is none in
/// particular. Without `other`, `one` is gone through as a whole.
///
/// # Errors
/// As [`Reader::walk`].
pub(crate) fn difference(
    reader: &Reader<'_>,
    one: &Root,
    other: Option<&Root>,
    of_one: &mut Items<'_>,
    of_other: &mut Items<'_>,
) -> Result<()> {
    let mut ones = vec![one.block];
    let mut others: Vec<Pointer> = other.iter().map(|root| root.block).collect();
    let levels = ones.iter().chain(&others).map(|block| block.level);
    let top = levels.max().unwrap_or_default();
    for level in (0..=top).rev() {
        // What is below this level stays for later: the trees may be of different heights.
        let mut here_ones = take_level(&mut ones, level);
        let mut here_others = take_level(&mut others, level);
        let is_in = |sorted: &[Pointer], block: &Pointer| {
            sorted.binary_search_by_key(&place(block), place).is_ok()
        };
        here_ones.sort_unstable_by_key(place);
        here_others.sort_unstable_by_key(place);
        let shared: Vec<Pointer> = here_ones
            .iter()
            .filter(|block| is_in(&here_others, block))
            .copied()
            .collect();
        here_ones.retain(|block| !is_in(&shared, block));
        here_others.retain(|block| !is_in(&shared, block));
        for block in here_ones {
            open(reader, &block, &mut ones, of_one)?;
        }
        for block in here_others {
            open(reader, &block, &mut others, of_other)?;
        }
    }
    Ok(())
}

/// By what two blocks are the same.
fn place(block: &Pointer) -> (u64, u64) {
    (block.bytenr, block.generation)
}

fn take_level(blocks: &mut Vec<Pointer>, level: u8) -> Vec<Pointer> {
    let (here, rest) = blocks.drain(..).partition(|block| block.level == level);
    *blocks = rest;
    here
}

/// Reads a block and hands on what it leads to.
fn open(
    reader: &Reader<'_>,
    block: &Pointer,
    below: &mut Vec<Pointer>,
    items: &mut Items<'_>,
) -> Result<()> {
    let bytes = reader.read(block, Key::MAX, None)?;
    for entry in entries(&bytes)? {
        match entry? {
            Entry::Item(key, data) => items(key, data)?,
            Entry::Child(child, _) => below.push(child),
        }
    }
    Ok(())
}
