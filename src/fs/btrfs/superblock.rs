//! The superblock of a device and its copies, and the numbers in it, checked.

use zerocopy::IntoBytes;

use super::checksum::Checksum;
use super::format::{self, SuperBlock};
use crate::error::{Kind, Result};
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// What the superblocks of one device say.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// The newest copy that is valid.
    pub(crate) newest: SuperBlock,
    /// Whether that is the first one, by which the kernel mounts.
    pub(crate) is_first: bool,
    /// Where there should be a copy of the same commit, and is none.
    pub(crate) missing: Vec<Offset>,
}

/// Reads all copies of a device's superblock.
///
/// # Errors
/// Why there is none, as text; else if reading fails for another reason than that a copy cannot
/// be read.
pub(crate) fn read(source: &dyn ReadAt) -> Result<std::result::Result<Found, &'static str>> {
    let mut copies = Vec::new();
    for at in format::SUPER_OFFSETS {
        if at + format::SUPER_SIZE > source.len().0 {
            break;
        }
        copies.push((at, read_copy(source, at)?));
    }
    let why = match copies.first() {
        Some((_, Err(why))) => *why,
        _ => "it is too small for a superblock",
    };
    let valid = copies.iter().filter_map(|(at, copy)| {
        let copy = copy.as_ref().ok()?;
        Some((*at, copy))
    });
    // The first of those that are equally new: a log is noted in the first copy only.
    let newest =
        valid.reduce(
            |best, other| match other.1.generation.get() > best.1.generation.get() {
                true => other,
                false => best,
            },
        );
    let Some((newest_at, newest)) = newest else {
        return Ok(Err(why));
    };
    let is_same = |copy: &SuperBlock| {
        copy.fsid == newest.fsid
            && copy.dev_item.devid == newest.dev_item.devid
            && copy.generation == newest.generation
    };
    let missing = copies.iter().filter_map(|(at, copy)| {
        let is_expected = at + format::SUPER_SIZE < newest.dev_item.total_bytes.get();
        let is_there = copy.as_ref().is_ok_and(is_same);
        (is_expected && !is_there).then_some(Offset(*at))
    });
    Ok(Ok(Found {
        missing: missing.collect(),
        is_first: newest_at == format::SUPER_OFFSETS[0],
        newest: newest.clone(),
    }))
}

/// One copy, if it is valid by itself; else why not, as text.
///
/// # Errors
/// If reading fails for another reason than that it cannot be read.
pub(crate) fn read_copy(
    source: &dyn ReadAt,
    at: u64,
) -> Result<std::result::Result<SuperBlock, &'static str>> {
    let mut bytes = [0; format::SUPER_SIZE as usize];
    match source.read_exact_at(&mut bytes, Offset(at)) {
        Err(error) if error.kind() == Kind::Io => return Ok(Err("its superblock cannot be read")),
        other => other?,
    }
    let superblock: SuperBlock = zerocopy::transmute!(bytes);
    if superblock.magic != format::MAGIC || superblock.bytenr.get() != at {
        return Ok(Err("its superblock is none"));
    }
    let Some(checksum) = Checksum::of_type(superblock.csum_type.get()) else {
        return Ok(Err("its kind of checksum is unknown here"));
    };
    if !checksum.holds(&bytes) {
        return Ok(Err("the superblock's checksum is wrong"));
    }
    Ok(Ok(superblock))
}

/// The copy at `at` of a superblock, for an image of its commit and nothing else: what is not in the
/// commit itself, a log of fsyncs, older trees and the old kind of free space cache, is left out. The
/// kernel does without all of them.
pub(crate) fn of_commit_alone(
    superblock: &SuperBlock,
    at: u64,
) -> [u8; format::SUPER_SIZE as usize] {
    let mut alone = superblock.clone();
    alone.bytenr = at.into();
    alone.log_root = 0.into();
    alone.log_root_level = 0;
    alone.log_root_transid = 0.into();
    alone.super_roots = [[0; 168]; 4];
    if alone.compat_ro.get() & format::COMPAT_RO_FREE_SPACE_TREE == 0 {
        alone.cache_generation = 0.into();
    }
    if let Some(checksum) = Checksum::of_type(alone.csum_type.get()) {
        alone.csum = checksum.of(&alone.as_bytes()[format::CSUM_SIZE..]);
    }
    zerocopy::transmute!(alone)
}

/// The superblock's numbers that reading trees takes, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Bytes in a sector, the unit of data extents: a power of two from 4096.
    pub(crate) sector_size: u32,
    /// Bytes in a tree block: a power of two up to 64 KiB, not less than a sector.
    pub(crate) node_size: u32,
    /// The kind of all checksums.
    pub(crate) checksum: Checksum,
    /// The UUID that tree blocks carry.
    pub(crate) metadata_uuid: [u8; 16],
    /// The commit that the superblock stands for. Nothing it leads to is newer.
    pub(crate) generation: u64,
}

impl Geometry {
    /// Checks what the kernel's `btrfs_validate_super` does, as far as it matters here.
    ///
    /// # Errors
    /// Why not, as text.
    pub(crate) fn check(superblock: &SuperBlock) -> std::result::Result<Self, &'static str> {
        let (sector_size, node_size) = (superblock.sector_size.get(), superblock.node_size.get());
        if !sector_size.is_power_of_two()
            || !node_size.is_power_of_two()
            || sector_size < format::MIN_SECTOR_SIZE
            || node_size < sector_size
            || node_size > format::MAX_NODE_SIZE
        {
            return Err("its sector or node size makes no sense");
        }
        let array = superblock.sys_chunk_array_size.get() as usize;
        if array > superblock.sys_chunk_array.len() {
            return Err("its list of system chunks makes no sense");
        }
        if superblock.root_level >= format::MAX_LEVELS
            || superblock.chunk_root_level >= format::MAX_LEVELS
        {
            return Err("its trees have too many levels");
        }
        let is_chunk_root_newer =
            superblock.chunk_root_generation.get() > superblock.generation.get();
        if is_chunk_root_newer || superblock.num_devices.get() == 0 {
            return Err("its superblock makes no sense");
        }
        if superblock.dev_item.fsid != *superblock.metadata_uuid() {
            return Err("its device belongs to another filesystem");
        }
        let checksum = Checksum::of_type(superblock.csum_type.get());
        Ok(Self {
            sector_size,
            node_size,
            checksum: checksum.ok_or("its kind of checksum is unknown here")?,
            metadata_uuid: *superblock.metadata_uuid(),
            generation: superblock.generation.get(),
        })
    }

    /// Bytes of a tree block.
    pub(crate) fn node_len(&self) -> ByteLen {
        ByteLen(u64::from(self.node_size))
    }
}
