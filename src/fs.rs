//! Filesystems: recognized by magic, and asked which of their blocks are in use.
//!
//! No system call is made here: every parser reads any [`ReadAt`], so that it can be tested and
//! fuzzed in memory. A map starts from "all used" and clears only what is proven free; a
//! contradiction, a failed checksum or an unknown feature that could move allocation makes it
//! give up, and the caller copies every block.
//!
//! A map is true only where nothing waits in a log: see [`Condition`].

use std::fmt;
use std::sync::Arc;

use crate::error::Result;
use crate::extent::Extent;
use crate::read_at::ReadAt;
use crate::units::ByteLen;

mod apfs;
mod bitmap;
pub(crate) mod btrfs;
mod emit;
mod ext4;
mod last_use;
mod needs;
mod probe;
mod xfs;

pub use btrfs::{Member, member};
pub use last_use::{LastUse, last_use};
pub use needs::{Needs, end_of_content};
pub use probe::probe;

/// What a signature on a volume says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// ext2.
    Ext2,
    /// ext3.
    Ext3,
    /// ext4.
    Ext4,
    /// The journal of an ext3 or ext4 that lives on another device.
    ExtJournal,
    /// XFS.
    Xfs,
    /// The log of an XFS that lives on another device.
    XfsLog,
    /// Btrfs.
    Btrfs,
    /// F2FS.
    F2fs,
    /// FAT12, FAT16 or FAT32.
    Vfat,
    /// exFAT.
    Exfat,
    /// NTFS.
    Ntfs,
    /// HFS.
    Hfs,
    /// HFS+ or HFSX.
    HfsPlus,
    /// An APFS container.
    Apfs,
    /// Linux swap space.
    Swap,
    /// Swap space with a hibernated system in it.
    Hibernation,
    /// A LUKS container, version 1 or 2.
    Luks,
    /// A BitLocker volume.
    BitLocker,
    /// A physical volume of LVM.
    Lvm2Member,
    /// A member of an md array.
    MdRaidMember,
    /// A vdev of a ZFS pool.
    ZfsMember,
    /// A device of a bcache set.
    Bcache,
    /// Bcachefs.
    Bcachefs,
    /// ISO 9660.
    Iso9660,
    /// UDF.
    Udf,
    /// SquashFS.
    Squashfs,
    /// EROFS.
    Erofs,
    /// JFS.
    Jfs,
    /// ReiserFS.
    Reiserfs,
    /// NILFS2.
    Nilfs2,
    /// OCFS2.
    Ocfs2,
    /// GFS2.
    Gfs2,
    /// A partition table: this is a whole disk.
    PartitionTable,
}

impl Kind {
    /// The name `blkid` gives it as `TYPE`; for a partition table, `partitions`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::ExtJournal => "jbd",
            Self::Xfs => "xfs",
            Self::XfsLog => "xfs_external_log",
            Self::Btrfs => "btrfs",
            Self::F2fs => "f2fs",
            Self::Vfat => "vfat",
            Self::Exfat => "exfat",
            Self::Ntfs => "ntfs",
            Self::Hfs => "hfs",
            Self::HfsPlus => "hfsplus",
            Self::Apfs => "apfs",
            Self::Swap => "swap",
            Self::Hibernation => "swsuspend",
            Self::Luks => "crypto_LUKS",
            Self::BitLocker => "BitLocker",
            Self::Lvm2Member => "LVM2_member",
            Self::MdRaidMember => "linux_raid_member",
            Self::ZfsMember => "zfs_member",
            Self::Bcache => "bcache",
            Self::Bcachefs => "bcachefs",
            Self::Iso9660 => "iso9660",
            Self::Udf => "udf",
            Self::Squashfs => "squashfs",
            Self::Erofs => "erofs",
            Self::Jfs => "jfs",
            Self::Reiserfs => "reiserfs",
            Self::Nilfs2 => "nilfs2",
            Self::Ocfs2 => "ocfs2",
            Self::Gfs2 => "gfs2",
            Self::PartitionTable => "partitions",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a filesystem says about itself. Text is as on disk: escape it before showing it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// What it is.
    pub kind: Kind,
    /// Its label, if it has one.
    pub label: Option<String>,
    /// Its UUID or serial number, as `blkid` writes it.
    pub uuid: Option<String>,
    /// Bytes in one block; 0 where that is not known.
    pub block_size: u32,
    /// The bytes it says it has, which may be less than the volume; 0 where that is not known.
    pub size: ByteLen,
}

/// Whether the allocation map on disk tells the truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Unmounted cleanly, or what looks like it: an ext4 with a journal that is or was frozen; a btrfs
    /// whose newest commit has no log behind it.
    Clean,
    /// An XFS whose log holds, from its tail on, nothing but what a freeze leaves there.
    Frozen,
    /// An APFS that was not unmounted. It has no log: the map is true as it is, but what programs had not
    /// written yet is lost as by a power cut.
    Interrupted,
    /// Something would have to be replayed or repaired first: the map may call blocks free that
    /// are in use.
    Dirty {
        /// What it is.
        reason: DirtyReason,
    },
}

impl Condition {
    /// Whether the map is true without any further knowledge.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Clean | Self::Frozen | Self::Interrupted)
    }

    /// Whether the map is true given that the caller itself holds, or held for this instant, the
    /// filesystem frozen: beside the settled ones, an ext4 without journal, which is marked as in
    /// use as long as it is mounted, and an ext4 with files that are deleted but still open.
    pub fn is_settled_if_frozen(self) -> bool {
        match self {
            Self::Clean | Self::Frozen | Self::Interrupted => true,
            Self::Dirty { reason } => {
                matches!(reason, DirtyReason::NotUnmounted | DirtyReason::Orphans)
            }
        }
    }
}

/// Why a filesystem is not clean. Where several hold, the gravest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirtyReason {
    /// The log or journal holds changes that are not yet in their places.
    Log,
    /// The log cannot be read for what it is.
    LogDamaged,
    /// An XFS that is frozen and whose log cannot show it, for its counters are not lazy.
    Unproven,
    /// The filesystem found errors in itself.
    Errors,
    /// It has a journal and is nevertheless not marked as valid: it needs a check.
    Unchecked,
    /// Making, growing or converting it was begun and not ended.
    InProgress,
    /// It asks to be repaired before it is mounted again.
    NeedsRepair,
    /// It has no journal, and is mounted or was not unmounted.
    NotUnmounted,
    /// Files that were deleted while open still have to be freed. The map is sound.
    Orphans,
    /// The newest checkpoint of an APFS container is not whole: an older one is what a mount shows.
    Checkpoint,
}

impl fmt::Display for DirtyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Log => "its log holds changes that would have to be replayed",
            Self::LogDamaged => "its log cannot be understood",
            Self::Unproven => "without lazy counters its log does not show whether it was frozen",
            Self::Errors => "it is marked as having errors",
            Self::Unchecked => "it is marked as needing a check",
            Self::InProgress => "making or changing it was begun and not ended",
            Self::NeedsRepair => "it asks for a repair",
            Self::NotUnmounted => "it has no journal and was not unmounted",
            Self::Orphans => "deleted files that were still open have to be freed",
            Self::Checkpoint => "its newest checkpoint is not whole, an older one counts",
        })
    }
}

/// A filesystem whose allocation map can be read.
pub trait Filesystem: Send + Sync + fmt::Debug {
    /// What it says about itself.
    fn info(&self) -> &Info;

    /// Whether the map is true, as found when it was opened.
    fn condition(&self) -> Condition;

    /// Calls `sink` with every run of bytes in use, ascending, disjoint and not touching each
    /// other, in bytes of the whole volume. What is not proven free is in use, and so is all of
    /// the volume behind the filesystem's end. Memory stays within a few MiB.
    ///
    /// # Errors
    /// [`Damaged`](crate::error::Kind::Damaged) if the filesystem contradicts itself as a whole:
    /// then nothing `sink` was given may be relied on, and every block has to be copied. Else
    /// reading failed, or `sink` did.
    fn walk_used(
        &self,
        source: &dyn ReadAt,
        sink: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<Walk>;

    /// The volumes that share its blocks, where there can be several.
    ///
    /// # Errors
    /// [`Damaged`](crate::error::Kind::Damaged) if what describes them is; else if reading fails.
    fn volumes(&self, _source: &dyn ReadAt) -> Result<Vec<Volume>> {
        Ok(Vec::new())
    }
}

/// A volume of a container. Text is as on disk: escape it before showing it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// What its system uses it for: `system`, `data`, `preboot` and so on; none as a rule elsewhere.
    pub roles: Vec<&'static str>,
    /// Its files are encrypted.
    pub is_encrypted: bool,
    /// It carries a seal over all its content.
    pub is_sealed: bool,
    /// Bytes that it has allocated.
    pub used: ByteLen,
    /// Its snapshots, the oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// A snapshot of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name, as on disk.
    pub name: String,
    /// The transaction it was made in.
    pub transaction: u64,
    /// When it was made, if that is a time.
    pub created: Option<jiff::Timestamp>,
}

/// What a walk over the used blocks found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Bytes in use, the sum of all runs.
    pub used: ByteLen,
    /// What was damaged and therefore taken as in use.
    pub warnings: Vec<String>,
}

/// What [`open`] found.
#[derive(Debug)]
pub enum Opened {
    /// A filesystem with a map.
    Known(Box<dyn Filesystem>),
    /// A filesystem whose map exists but must not be trusted: copy every block and say why.
    AllBlocks {
        /// What can be said about it.
        info: Info,
        /// Why its map is not used.
        why: String,
    },
    /// Something known by its signature, of which no map can be read.
    NoMap(Info),
    /// No known signature.
    Unknown,
}

/// Who keeps a filesystem from changing while it is examined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Nobody has it mounted.
    Unmounted,
    /// It is mounted on this host: its mark of being mounted is no hindrance.
    Mounted,
    /// The same, for writing, and the caller holds it frozen, or held it frozen for this instant.
    Frozen,
}

/// Opens the filesystem on a volume that nobody has mounted.
///
/// # Errors
/// [`NotApplicable`](crate::error::Kind::NotApplicable) if part of the filesystem is on another
/// device; [`InUse`](crate::error::Kind::InUse) if another host says that it has it mounted;
/// else if reading fails.
pub fn open(source: &dyn ReadAt) -> Result<Opened> {
    open_as(source, &[], Held::Unmounted)
}

/// The same for one of several volumes that hold a filesystem together: `siblings` are the others,
/// of which nobody has any mounted.
///
/// # Errors
/// As [`open`].
pub fn open_with(source: &dyn ReadAt, siblings: &[Arc<dyn ReadAt>]) -> Result<Opened> {
    open_as(source, siblings, Held::Unmounted)
}

/// The same for a volume whose filesystem is mounted on this host, or a snapshot of one: its mark of
/// being mounted is no hindrance.
///
/// # Errors
/// As [`open`], but never `InUse`.
pub fn open_mounted(source: &dyn ReadAt) -> Result<Opened> {
    open_as(source, &[], Held::Mounted)
}

/// The same where that filesystem is mounted for writing, and the caller itself holds it frozen, or
/// held it frozen for the instant of the snapshot. Not for one that is mounted read-only: a freeze
/// leaves its log as it is.
///
/// # Errors
/// As [`open_mounted`].
pub fn open_frozen(source: &dyn ReadAt) -> Result<Opened> {
    open_as(source, &[], Held::Frozen)
}

fn open_as(source: &dyn ReadAt, siblings: &[Arc<dyn ReadAt>], held: Held) -> Result<Opened> {
    let signatures = probe::signatures(source)?;
    let mut found = signatures.found.into_iter();
    let Some(info) = found.next() else {
        return Ok(Opened::Unknown);
    };
    if has_map(info.kind) {
        if let Some(other) = found.next() {
            // One of them is a remnant, and its map that of a filesystem long gone.
            let why = format!(
                "it carries the signatures of {} and of {}",
                info.kind, other.kind
            );
            return Ok(Opened::AllBlocks { info, why });
        }
        if signatures.is_partial {
            let why = "parts of its start or end cannot be read".into();
            return Ok(Opened::AllBlocks { info, why });
        }
    }
    match info.kind {
        Kind::Ext2 | Kind::Ext3 | Kind::Ext4 => ext4::open(source, info, held),
        Kind::Xfs => xfs::open(source, info, held),
        Kind::Btrfs => btrfs::open(source, siblings, info),
        Kind::Apfs => apfs::open(source, info),
        _ => Ok(Opened::NoMap(info)),
    }
}

/// Whether a checksum on disk is the one that was computed. While fuzzing, every one is: a fuzzer that
/// had to guess them would see nothing of what they protect.
fn sums_match<T: PartialEq + ?Sized>(computed: &T, noted: &T) -> bool {
    cfg!(fuzzing) || computed == noted
}

/// Whether there is a reader of its map.
fn has_map(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Ext2 | Kind::Ext3 | Kind::Ext4 | Kind::Xfs | Kind::Btrfs | Kind::Apfs
    )
}
