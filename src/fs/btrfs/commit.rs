//! A commit: what its superblock leads to, read and checked before any tree is gone through.
//!
//! A commit is a consistent state by itself. Nothing that can be reached from it is overwritten before
//! the superblocks of the next one are written (the kernel's `fs/btrfs/transaction.c`: extents are
//! unpinned in `btrfs_finish_extent_commit`, after `write_all_supers`).

use zerocopy::FromBytes;

use super::chunks::{self, ChunkMap, Devices, damaged};
use super::format::{self, DevExtent, DevItem, DevReplaceItem, Key, RootItem, SuperBlock};
use super::superblock::Geometry;
use super::tree::{Cache, Reader, Root};
use crate::error::{Error, Kind, Result};

/// What of a commit everything else stands on.
#[derive(Debug)]
pub(crate) struct Commit {
    pub(crate) geometry: Geometry,
    pub(crate) chunks: ChunkMap,
    pub(crate) trees: Trees,
    /// What the superblock counts as in use, in logical bytes.
    pub(crate) bytes_used: u64,
    /// Its devices, as the chunk tree lists them.
    pub(crate) devices: Vec<DevItem>,
}

/// The trees that tell what is in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trees {
    pub(crate) root: Root,
    pub(crate) chunk: Root,
    pub(crate) extent: Root,
    pub(crate) dev: Root,
    pub(crate) csum: Root,
    /// `None` where block group items are in the extent tree.
    pub(crate) block_group: Option<Root>,
}

impl Commit {
    /// Reads chunks, and where the trees begin.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it contradicts itself, [`Kind::NotApplicable`] if it is of a kind that cannot
    /// be understood, or half-way through a balance; else if reading fails.
    pub(crate) fn read(
        superblock: &SuperBlock,
        devices: &Devices<'_>,
        cache: Option<&Cache>,
    ) -> Result<Self> {
        let geometry = Geometry::check(superblock).map_err(damaged)?;
        let (chunks, chunk_root, items) = read_chunks(superblock, &geometry, devices, cache)?;
        let reader = Reader {
            geometry: &geometry,
            chunks: &chunks,
            devices,
            cache,
        };
        let trees = find_trees(superblock, chunk_root, &reader)?;
        Ok(Self {
            trees,
            bytes_used: superblock.bytes_used.get(),
            geometry,
            chunks,
            devices: items,
        })
    }

    /// What reads its trees.
    pub(crate) fn reader<'a>(
        &'a self,
        devices: &'a Devices<'a>,
        cache: Option<&'a Cache>,
    ) -> Reader<'a> {
        Reader {
            geometry: &self.geometry,
            chunks: &self.chunks,
            devices,
            cache,
        }
    }

    /// What it lists as the device that has this superblock.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it does not list it.
    pub(crate) fn own_device(&self, superblock: &SuperBlock) -> Result<&DevItem> {
        let this = &superblock.dev_item;
        let mut items = self.devices.iter();
        items
            .find(|item| item.devid == this.devid && item.uuid == this.uuid)
            .ok_or_else(|| damaged("this device is not in its list of devices"))
    }
}

/// Why the superblock forbids to look any further.
pub(crate) fn unknown(superblock: &SuperBlock) -> Option<String> {
    let incompat = superblock.incompat.get();
    if incompat & format::INCOMPAT_ZONED != 0 {
        return Some("it is zoned".into());
    }
    let unknown_incompat = incompat & !format::INCOMPAT_KNOWN;
    let unknown_compat_ro = superblock.compat_ro.get() & !format::COMPAT_RO_KNOWN;
    if unknown_incompat != 0 || unknown_compat_ro != 0 {
        return Some(format!(
            "it has features unknown here (incompatible {unknown_incompat:#x}, \
             read-only compatible {unknown_compat_ro:#x})"
        ));
    }
    if incompat & format::INCOMPAT_MIXED_BACKREF == 0 {
        return Some("its extent tree is of an old kind".into());
    }
    let flags = superblock.flags.get();
    if flags & format::SUPER_SEEDING != 0 {
        return Some("it is a seed device".into());
    }
    if flags & format::SUPER_METADUMP != 0 {
        return Some("it holds metadata alone".into());
    }
    let harmless = format::SUPER_FLAGS_HARMLESS | format::SUPER_ERROR | format::SUPER_CHANGING;
    let flags = flags & !harmless;
    (flags != 0).then(|| format!("its superblock has flags unknown here ({flags:#x})"))
}

/// All chunks, the root of their tree, and the devices in it.
fn read_chunks(
    superblock: &SuperBlock,
    geometry: &Geometry,
    devices: &Devices<'_>,
    cache: Option<&Cache>,
) -> Result<(ChunkMap, Root, Vec<DevItem>)> {
    let sector_size = geometry.sector_size;
    let array_len = superblock.sys_chunk_array_size.get() as usize;
    let array = superblock.sys_chunk_array.get(..array_len);
    let system = ChunkMap::of_system(array.unwrap_or_default(), sector_size)?;
    let root = Root::of(
        format::CHUNK_TREE,
        superblock.chunk_root.get(),
        superblock.chunk_root_generation.get(),
        superblock.chunk_root_level,
    );
    let reader = Reader {
        geometry,
        chunks: &system,
        devices,
        cache,
    };
    let mut chunks = ChunkMap::default();
    let mut items: Vec<DevItem> = Vec::new();
    let mut visit = |key: Key, bytes: &[u8]| match key.kind {
        format::CHUNK_ITEM => chunks.add(key, bytes, sector_size),
        format::DEV_ITEM if key.objectid == format::DEV_ITEMS => {
            let item = DevItem::read_from_bytes(bytes)
                .map_err(|_| damaged("the item of a device makes no sense"))?;
            if item.devid.get() != key.offset {
                return Err(damaged("the item of a device makes no sense"));
            }
            if item.fsid != geometry.metadata_uuid {
                let what = "it grows from a seed device";
                return Err(Error::new(Kind::NotApplicable, what));
            }
            items.push(item);
            match items.len() as u64 > superblock.num_devices.get() {
                true => Err(damaged("it has more devices than it counts")),
                false => Ok(()),
            }
        }
        _ => Ok(()),
    };
    reader.walk(&root, Key::MIN..=Key::MAX, &mut visit)?;
    if items.len() as u64 != superblock.num_devices.get() {
        return Err(damaged("it has fewer devices than it counts"));
    }
    let is_listed = |chunk: &chunks::Chunk| {
        let found = chunks.find(chunk.logical.start);
        found.is_some_and(|(_, other)| other == chunk)
    };
    if !system.chunks().iter().all(is_listed) {
        return Err(damaged(
            "its list of system chunks is not that of its chunk tree",
        ));
    }
    for chunk in chunks.chunks() {
        for stripe in &chunk.stripes {
            let item = items.iter().find(|item| item.devid.get() == stripe.devid);
            if item.is_none_or(|item| item.uuid != stripe.dev_uuid) {
                return Err(damaged("a chunk lies on a device that is none of its own"));
            }
        }
    }
    Ok((chunks, root, items))
}

/// The item of a tree, of whatever version.
///
/// # Errors
/// [`Kind::Damaged`] if it is too short.
pub(crate) fn root_item(bytes: &[u8]) -> Result<RootItem> {
    let item = RootItem::read_from_prefix(bytes);
    let (item, _) = item.map_err(|_| damaged("the item of a tree is cut short"))?;
    Ok(item)
}

/// Where the trees begin, as the root tree says.
fn find_trees(superblock: &SuperBlock, chunk: Root, reader: &Reader<'_>) -> Result<Trees> {
    let root = Root::of(
        format::ROOT_TREE,
        superblock.root.get(),
        superblock.generation.get(),
        superblock.root_level,
    );
    let find = |tree: u64| -> Result<Root> {
        let mut found = None;
        let key = Key::new(tree, format::ROOT_ITEM, 0);
        reader.walk(&root, key..=key, &mut |_: Key, bytes: &[u8]| {
            let item = root_item(bytes)?;
            found = Some(Root::of(
                tree,
                item.bytenr.get(),
                item.generation.get(),
                item.level,
            ));
            Ok(())
        })?;
        found.ok_or_else(|| damaged(format!("its root tree does not know tree {tree}")))
    };
    let has_group_tree = superblock.compat_ro.get() & format::COMPAT_RO_BLOCK_GROUP_TREE != 0;
    let block_group = has_group_tree.then(|| find(format::BLOCK_GROUP_TREE));
    let balance = Key::new(format::BALANCE, format::TEMPORARY_ITEM, 0);
    reader.walk(&root, balance..=balance, &mut |_: Key, _: &[u8]| {
        let what = "a balance was begun and has not ended";
        Err(Error::new(Kind::NotApplicable, what))
    })?;
    Ok(Trees {
        root,
        chunk,
        extent: find(format::EXTENT_TREE)?,
        csum: find(format::CSUM_TREE)?,
        dev: find(format::DEV_TREE)?,
        block_group: block_group.transpose()?,
    })
}

/// Checks that the device tree knows the stripes of all chunks and no others, and that no device is
/// being replaced.
pub(crate) fn check_devices(dev: &Root, reader: &Reader<'_>) -> Result<()> {
    let mut known = 0usize;
    let mut visit = |key: Key, bytes: &[u8]| match key.kind {
        format::DEV_EXTENT => {
            let nonsense = || damaged("an extent of a device belongs to no chunk");
            let item = DevExtent::read_from_bytes(bytes).map_err(|_| nonsense())?;
            let (_, chunk) = reader
                .chunks
                .find(item.chunk_offset.get())
                .ok_or_else(nonsense)?;
            let is_one = chunk.logical.start == item.chunk_offset.get()
                && chunk.stripe_len() == item.length.get()
                && chunk
                    .stripes
                    .iter()
                    .any(|stripe| (stripe.devid, stripe.start) == (key.objectid, key.offset));
            known += 1;
            is_one.then_some(()).ok_or_else(nonsense)
        }
        format::DEV_REPLACE => {
            let item = DevReplaceItem::read_from_prefix(bytes);
            let (item, _) = item.map_err(|_| damaged("a device replacement makes no sense"))?;
            match item.state.get() {
                format::REPLACE_STARTED | format::REPLACE_SUSPENDED => {
                    let what = "the replacement of a device was begun and has not ended";
                    Err(Error::new(Kind::NotApplicable, what))
                }
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    };
    reader.walk(dev, Key::MIN..=Key::MAX, &mut visit)?;
    let stripes = reader.chunks.chunks().iter();
    match known == stripes.map(|chunk| chunk.stripes.len()).sum::<usize>() {
        true => Ok(()),
        false => Err(damaged("a chunk has no extent on its device")),
    }
}
