//! The B-trees of a container whose nodes are physical objects, read from end to end: the trees that
//! are walked here are small.

use zerocopy::little_endian::U64;

use super::blocks::{Blocks, Expected, damaged, part, parts};
use super::format::{
    BTREE_INFO_SIZE, BtreeNode, Entry, FixedEntry, NODE_FIXED, NODE_ROOT, Place, TYPE_BTREE,
    TYPE_BTREE_NODE,
};
use crate::error::Result;

/// No tree is higher: each level has at least two nodes for one above it.
const MAX_LEVELS: u16 = 16;
/// More nodes than any tree of volumes or of snapshots has.
const MAX_NODES: u32 = 65536;

/// Who is given a key and its value.
type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<()>;

/// Hands on each key and value of the leaves, in order.
///
/// # Errors
/// [`Damaged`](crate::error::Kind::Damaged) if the tree contradicts itself; else if reading fails, or
/// `visit` does.
pub(super) fn for_each(
    blocks: &Blocks<'_>,
    root: u64,
    newest: u64,
    visit: Visit<'_>,
) -> Result<()> {
    let mut walk = Walk {
        blocks,
        newest,
        nodes: 0,
        visit,
    };
    walk.node(root, None)
}

struct Walk<'a> {
    blocks: &'a Blocks<'a>,
    newest: u64,
    nodes: u32,
    visit: Visit<'a>,
}

impl Walk<'_> {
    /// `level`: the one that the node must have, but for the root.
    fn node(&mut self, address: u64, level: Option<u16>) -> Result<()> {
        let name = "a node of a tree";
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(damaged("a tree has no end"));
        }
        let kind = if level.is_none() {
            TYPE_BTREE
        } else {
            TYPE_BTREE_NODE
        };
        let block = self.blocks.physical(
            address,
            Expected {
                name,
                kind,
                newest: self.newest,
            },
        )?;
        let node: &BtreeNode = part(&block, 0, name)?;
        let found = node.level.get();
        if found > MAX_LEVELS || level.is_some_and(|level| level != found) {
            return Err(damaged(format!("{name} ({address}) is of another level")));
        }
        for index in 0..node.count.get() as usize {
            let (key, value) = entry(&block, node, index)?;
            if found == 0 {
                (self.visit)(key, value)?;
            } else {
                let child: &U64 = part(value, 0, name)?;
                self.node(child.get(), Some(found - 1))?;
            }
        }
        Ok(())
    }
}

/// A key and a value of a node. Places of keys count from behind the table of contents, those of values
/// back from the end of the node, or of what there is to know of the tree. Of fixed sizes only the
/// places are given; key and value then go on as far as they could.
fn entry<'a>(block: &'a [u8], node: &BtreeNode, index: usize) -> Result<(&'a [u8], &'a [u8])> {
    let name = "a node of a tree";
    let number = |value: zerocopy::little_endian::U16| usize::from(value.get());
    let table = size_of::<BtreeNode>() + number(node.table.offset);
    let keys = table + number(node.table.len);
    let info = if node.flags.get() & NODE_ROOT != 0 {
        BTREE_INFO_SIZE
    } else {
        0
    };
    let end = block.len() - info;
    let (key, value) = if node.flags.get() & NODE_FIXED != 0 {
        let entries: &[FixedEntry] = parts(block, table, index + 1, name)?;
        let (key, value) = (
            keys + number(entries[index].key),
            number(entries[index].value),
        );
        (block.get(key..end), from_end(block, end, value, value))
    } else {
        let entries: &[Entry] = parts(block, table, index + 1, name)?;
        let Entry { key, value } = entries[index];
        let Place { offset, len } = key;
        let start = keys + number(offset);
        let key = block.get(start..start + number(len));
        let value = from_end(block, end, number(value.offset), number(value.len));
        (key, value)
    };
    key.zip(value)
        .ok_or_else(|| damaged("an item lies outside of its node"))
}

fn from_end(block: &[u8], end: usize, back: usize, len: usize) -> Option<&[u8]> {
    let start = end.checked_sub(back)?;
    block.get(start..start.checked_add(len)?)
}
