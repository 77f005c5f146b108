//! Btrfs, on one device or several: geometry, condition, and the map of blocks in use.

use std::sync::{Arc, OnceLock};

use zerocopy::FromBytes;

use super::{Condition, DirtyReason, Filesystem, Info, Opened, Walk};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::read_at::ReadAt;
use crate::units::ByteLen;

pub(crate) mod checksum;
pub(crate) mod chunks;
pub(crate) mod format;
mod map;
pub(crate) mod renew;
pub(crate) mod superblock;
pub(crate) mod tree;

use chunks::{ChunkMap, Devices, damaged};
use format::{DevExtent, DevItem, DevReplaceItem, Key, RootItem, SuperBlock};
use superblock::{Found, Geometry};
use tree::{Reader, Root};

/// Which device of which btrfs something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The UUID of the filesystem.
    pub fsid: uuid::Uuid,
    /// The id of this device within it.
    pub devid: u64,
    /// The UUID of this device.
    pub device_uuid: uuid::Uuid,
    /// How many devices the filesystem has.
    pub devices: u64,
}

/// Finds out which device of which btrfs this is; `None` if it is none. Only the first superblock
/// counts, as it does for the kernel: copies of it outlive what was there.
///
/// # Errors
/// If reading fails for another reason than bad blocks.
pub fn member(source: &dyn ReadAt) -> Result<Option<Member>> {
    let first = superblock::read_copy(source, format::SUPER_OFFSETS[0])?;
    Ok(first.ok().map(|superblock| Member {
        fsid: uuid::Uuid::from_bytes(superblock.fsid),
        devid: superblock.dev_item.devid.get(),
        device_uuid: uuid::Uuid::from_bytes(superblock.dev_item.uuid),
        devices: superblock.num_devices.get(),
    }))
}

/// A device of a btrfs whose superblocks and chunks make sense.
struct Btrfs {
    info: Info,
    condition: Condition,
    geometry: Geometry,
    trees: Trees,
    chunks: ChunkMap,
    /// What the superblock counts as in use, in logical bytes.
    bytes_used: u64,
    /// The id of this device.
    devid: u64,
    /// Its bytes, as far as they belong to the filesystem.
    size: ByteLen,
    /// The other devices, by id.
    siblings: Vec<(u64, Arc<dyn ReadAt>)>,
    /// What is damaged and does not matter for the map.
    warnings: Vec<String>,
    /// Set once the extent tree was found to be right as a whole.
    is_checked: OnceLock<()>,
}

/// The trees that tell what is in use.
#[derive(Clone, Copy, Debug)]
struct Trees {
    root: Root,
    chunk: Root,
    extent: Root,
    dev: Root,
    /// `None` where block group items are in the extent tree.
    block_group: Option<Root>,
}

impl std::fmt::Debug for Btrfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Btrfs")
            .field("info", &self.info)
            .field("condition", &self.condition)
            .field("geometry", &self.geometry)
            .field("devid", &self.devid)
            .finish_non_exhaustive()
    }
}

impl Filesystem for Btrfs {
    fn info(&self) -> &Info {
        &self.info
    }

    fn condition(&self) -> Condition {
        self.condition
    }

    fn walk_used(
        &self,
        source: &dyn ReadAt,
        sink: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<Walk> {
        map::walk(self, source, sink)
    }
}

impl Btrfs {
    /// All devices, `source` being this one.
    fn devices<'a>(&'a self, source: &'a dyn ReadAt) -> Devices<'a> {
        let mut devices = Devices::default();
        devices.add(self.devid, source);
        for (devid, sibling) in &self.siblings {
            devices.add(*devid, sibling.as_ref());
        }
        devices
    }

    fn reader<'a>(&'a self, devices: &'a Devices<'a>) -> Reader<'a> {
        Reader {
            geometry: &self.geometry,
            chunks: &self.chunks,
            devices,
        }
    }
}

/// Opens the filesystem whose superblock has the magic. `siblings` are its other devices.
pub(super) fn open(
    source: &dyn ReadAt,
    siblings: &[Arc<dyn ReadAt>],
    info: Info,
) -> Result<Opened> {
    let found = match superblock::read(source)? {
        Ok(found) => found,
        Err(why) => {
            let why = why.to_owned();
            return Ok(Opened::AllBlocks { info, why });
        }
    };
    if let Some(why) = unknown(&found) {
        return Ok(Opened::AllBlocks { info, why });
    }
    match understand(source, siblings, &found.newest, &info) {
        Ok(mut btrfs) => {
            let missing = found.missing.iter();
            btrfs.warnings = missing
                .map(|at| format!("the copy of its superblock at byte {at} is damaged or old"))
                .collect();
            Ok(Opened::Known(Box::new(btrfs)))
        }
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::NotApplicable) => {
            let why = error.to_string();
            Ok(Opened::AllBlocks { info, why })
        }
        Err(error) => Err(error),
    }
}

/// Why the superblock forbids to look any further.
fn unknown(found: &Found) -> Option<String> {
    let superblock = &found.newest;
    if !found.is_first {
        return Some("its first superblock is damaged, or older than a copy of it".into());
    }
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

/// What the superblock says about unfinished business. Which commit it stands for was reached as a
/// whole, or it would stand for the one before: only a log of fsyncs may have come behind it.
fn condition(superblock: &SuperBlock) -> Condition {
    let flags = superblock.flags.get();
    let dirty = |reason| Condition::Dirty { reason };
    if flags & format::SUPER_ERROR != 0 {
        dirty(DirtyReason::Errors)
    } else if flags & format::SUPER_CHANGING != 0 {
        dirty(DirtyReason::InProgress)
    } else if superblock.log_root.get() != 0 {
        dirty(DirtyReason::Log)
    } else {
        Condition::Clean
    }
}

/// Reads what the map stands on: devices, chunks, and where the trees begin.
///
/// # Errors
/// [`Kind::Damaged`] if it contradicts itself, [`Kind::NotApplicable`] if it is of a kind whose map
/// cannot be read; else if reading fails.
fn understand(
    source: &dyn ReadAt,
    siblings: &[Arc<dyn ReadAt>],
    superblock: &SuperBlock,
    info: &Info,
) -> Result<Btrfs> {
    let geometry = Geometry::check(superblock).map_err(damaged)?;
    let siblings = members(superblock, siblings)?;
    let mut devices = Devices::default();
    devices.add(superblock.dev_item.devid.get(), source);
    for (devid, sibling) in &siblings {
        devices.add(*devid, sibling.as_ref());
    }
    let size = ByteLen(superblock.dev_item.total_bytes.get());
    if size > source.len() {
        return Err(damaged("it is larger than the volume it is on"));
    }
    let (chunks, chunk_root, own) = read_chunks(superblock, &geometry, &devices)?;
    let reader = Reader {
        geometry: &geometry,
        chunks: &chunks,
        devices: &devices,
    };
    let trees = find_trees(superblock, chunk_root, &reader)?;
    check_devices(&trees.dev, &reader)?;
    Ok(Btrfs {
        info: info.clone(),
        condition: condition(superblock),
        trees,
        bytes_used: superblock.bytes_used.get(),
        devid: superblock.dev_item.devid.get(),
        // A device that was made larger or smaller: what either number leaves out is copied.
        size: size.min(ByteLen(own.total_bytes.get())),
        geometry,
        chunks,
        siblings,
        warnings: Vec::new(),
        is_checked: OnceLock::new(),
    })
}

/// The other devices of the filesystem by id, each of them the only one of its id, and all of one
/// commit.
fn members(
    superblock: &SuperBlock,
    siblings: &[Arc<dyn ReadAt>],
) -> Result<Vec<(u64, Arc<dyn ReadAt>)>> {
    let devices = superblock.num_devices.get();
    let mut members: Vec<(u64, Arc<dyn ReadAt>)> = Vec::new();
    for sibling in siblings {
        let Ok(Found { newest, .. }) = superblock::read(sibling.as_ref())? else {
            return Err(damaged("another device of it has no superblock"));
        };
        let devid = newest.dev_item.devid.get();
        if newest.fsid != superblock.fsid {
            return Err(damaged("another device is of another filesystem"));
        }
        if newest.generation != superblock.generation {
            return Err(damaged(format!(
                "its devices are of different commits: {} and {}",
                superblock.generation, newest.generation
            )));
        }
        let is_new = superblock.dev_item.devid.get() != devid
            && members.iter().all(|(other, _)| *other != devid);
        if !is_new {
            return Err(damaged(format!(
                "two devices call themselves number {devid}"
            )));
        }
        members.push((devid, Arc::clone(sibling)));
    }
    if members.len() as u64 + 1 != devices {
        return Err(Error::new(
            Kind::NotApplicable,
            format!(
                "it is one of the {devices} devices of its filesystem, and not all of them are here"
            ),
        ));
    }
    Ok(members)
}

/// All chunks, the root of their tree, and what that tree says of this device.
fn read_chunks(
    superblock: &SuperBlock,
    geometry: &Geometry,
    devices: &Devices<'_>,
) -> Result<(ChunkMap, Root, DevItem)> {
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
    let this = &superblock.dev_item;
    let own = items
        .into_iter()
        .find(|item| item.devid == this.devid && item.uuid == this.uuid)
        .ok_or_else(|| damaged("this device is not in its list of devices"))?;
    Ok((chunks, root, own))
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
            let item = RootItem::read_from_prefix(bytes);
            let (item, _) = item.map_err(|_| damaged("the item of a tree is cut short"))?;
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
        dev: find(format::DEV_TREE)?,
        block_group: block_group.transpose()?,
    })
}

/// Checks that the device tree knows the stripes of all chunks and no others, and that no device is
/// being replaced.
fn check_devices(dev: &Root, reader: &Reader<'_>) -> Result<()> {
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
