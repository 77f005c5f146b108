//! Whether a btrfs can be imaged while it is in use, and whether nothing was moved meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};

use holdstill_platform::btrfs::{Filesystem, Key};
use holdstill_platform::device::{Access, Disk};

use super::roots::PinnedRoot;
use super::window::Seen;
use crate::error::{Error, Kind, Result};
use crate::freeze::mounted;
use crate::fs::btrfs::chunks::ChunkMap;
use crate::fs::btrfs::commit::{root_item, unknown};
use crate::fs::btrfs::{format, superblock};
use crate::source::{Medium, Source};

/// Why a source cannot be imaged this way; `None` if nothing speaks against it.
///
/// # Errors
/// If it cannot be examined.
pub(super) fn objection(source: &Source) -> Result<Option<String>> {
    let no = |why: &str| Ok(Some(why.to_owned()));
    let Medium::Device(device) = &source.medium else {
        return no("it is a file, not a mounted device");
    };
    let Some(mount) = &source.mount else {
        return no("it is not mounted here");
    };
    if mount.fs_type != "btrfs" {
        return Ok(Some(format!("it is mounted as {}", mount.fs_type)));
    }
    if mount.has_super_option("ro") {
        return no("it is mounted read-only: its data cannot be pinned by snapshots");
    }
    if mounted::has_swap(device)? {
        return no("swap space lies on it");
    }
    if let Some(writer) = mounted::other_writer(device)? {
        return Ok(Some(writer));
    }
    let filesystem = Filesystem::open(&mount.point)?;
    if let Some(operation) = filesystem.exclusive_operation()? {
        return Ok(Some(format!("its blocks are being moved ({operation})")));
    }
    if let Err(error) = filesystem.devices() {
        return Ok(Some(error.to_string()));
    }
    let disk = Disk::open(&source.path, Access::Read)?;
    let copy = superblock::read_copy(&disk, format::SUPER_OFFSETS[0])?;
    match copy {
        Err(why) => no(why),
        Ok(superblock) if superblock.incompat.get() & format::INCOMPAT_RAID56 != 0 => {
            no("parts of it are RAID5 or RAID6")
        }
        Ok(superblock) => Ok(unknown(&superblock)),
    }
}

/// Makes sure that no blocks are being moved.
///
/// # Errors
/// [`Kind::Inconsistent`] if they are.
pub(super) fn nothing_moves(filesystem: &Filesystem) -> Result<()> {
    match filesystem.exclusive_operation()? {
        None => Ok(()),
        Some(operation) => Err(Error::new(
            Kind::Inconsistent,
            format!("its blocks are being moved ({operation}): what was copied is worthless"),
        )
        .on(filesystem.path())
        .hint("try again when that has ended")),
    }
}

/// Makes sure that nothing that data was copied from was moved since the window: the pinned trees are the
/// same, and so are the chunks in `used`.
///
/// # Errors
/// [`Kind::Inconsistent`] if not.
pub(super) fn nothing_moved(
    filesystem: &Filesystem,
    seen: &Seen,
    used: &[AtomicBool],
) -> Result<()> {
    nothing_moves(filesystem)?;
    let moved = |what: &str| {
        Error::new(
            Kind::Inconsistent,
            format!("its blocks were moved while they were copied ({what})"),
        )
        .on(filesystem.path())
        .hint("try again when no balance and no change of its devices comes between")
    };
    for pinned in &seen.pinned {
        let now = root_of(filesystem, pinned.tree)?;
        if now != Some(*pinned) {
            return Err(moved(&format!("tree {} is another one", pinned.tree)));
        }
    }
    let sector_size = seen.commit.geometry.sector_size;
    let mut chunks = ChunkMap::default();
    let first = Key::new(format::CHUNKS, format::CHUNK_ITEM, 0);
    let last = Key::new(format::CHUNKS, format::CHUNK_ITEM, u64::MAX);
    filesystem.search(format::CHUNK_TREE, first, last, 0, &mut |item| {
        chunks.add(item.key().into(), item.data, sector_size)
    })?;
    for (chunk, used) in seen.commit.chunks.chunks().iter().zip(used) {
        let start = chunk.logical.start;
        let is_same = chunks.find(start).is_some_and(|(_, now)| now == chunk);
        if used.load(Ordering::Relaxed) && !is_same {
            return Err(moved(&format!(
                "the chunk at logical {start} is another one"
            )));
        }
    }
    nothing_moves(filesystem)
}

/// The root of a tree now.
fn root_of(filesystem: &Filesystem, tree: u64) -> Result<Option<PinnedRoot>> {
    let mut found = None;
    let first = Key::new(tree, format::ROOT_ITEM, 0);
    let last = Key::new(tree, format::ROOT_ITEM, u64::MAX);
    filesystem.search(format::ROOT_TREE, first, last, 0, &mut |item| {
        found = Some(PinnedRoot::of(tree, &root_item(item.data)?));
        Result::Ok(())
    })?;
    Ok(found)
}
