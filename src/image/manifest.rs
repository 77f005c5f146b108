//! The two JSON texts of an image: what it is of, at the front, and what was achieved, at the end.
//!
//! Readers ignore fields they do not know. So a field may be added at any time, if an image means the
//! same to a reader that ignores it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::image::format::{MAX_VOLUME_SIZE, MAX_VOLUMES};
use crate::units::ByteLen;

/// How much a volume's copy can be relied on. The order is from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// Every filesystem on it was mounted here and frozen around the instant.
    Frozen,
    /// It was offline, cleanly unmounted, and nobody wrote meanwhile.
    Clean,
    /// Nobody wrote meanwhile, but whether its content was in order cannot be told: nothing here reads its
    /// map or log.
    Unknown,
    /// One instant, but a log would have to be replayed, as after a power cut.
    Crash,
    /// Read while it changed: no instant at all.
    Torn,
}

impl Grade {
    /// The name in JSON and on the terminal.
    pub fn name(self) -> &'static str {
        match self {
            Self::Frozen => "frozen",
            Self::Clean => "clean",
            Self::Unknown => "unknown",
            Self::Crash => "crash",
            Self::Torn => "torn",
        }
    }
}

/// What the image is of: known before the first block is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Program and version that wrote the image.
    pub tool: String,
    /// When it was begun (RFC 3339).
    pub created: String,
    /// The run that made it.
    pub run_id: String,
    /// Name of the machine that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Its id, as `/etc/machine-id` has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// How payloads are compressed: `zstd:LEVEL` or `none`.
    pub compress: String,
    /// The image that this one builds upon; only with the feature bit for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// The volumes, by ascending number from 1.
    pub volumes: Vec<VolumeManifest>,
    /// The opaque streams, by ascending number behind the volumes'; only with the feature bit for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<StreamManifest>,
}

/// The image that an incremental one builds upon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its image id, in hexadecimal.
    pub image_id: String,
    /// Its root hash, in hexadecimal.
    pub root_hash: String,
}

/// One volume, as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeManifest {
    /// Its number, from 1.
    pub n: u32,
    /// Where it was.
    pub path: String,
    /// Filesystem or other signature, if one was recognized.
    pub fs: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID, as its own tools print it.
    pub uuid: Option<String>,
    /// Where it was mounted, as the program saw it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_point: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Logical sector in bytes.
    pub logical_sector: u32,
    /// Physical sector in bytes.
    pub physical_sector: u32,
    /// The smallest target it fits on, in bytes: what lies behind that is zeros, and not needed.
    pub smallest_target: u64,
    /// The largest target on which it can be used, in bytes, where there is such a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest_target: Option<u64>,
    /// The unit its content counts in, in bytes: a target's logical sector must not be larger, and for a
    /// partition table it must be just that. Absent where it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sector_size: Option<u32>,
    /// Whether only used blocks were read (`used`) or all of them (`all`).
    pub blocks: Blocks,
    /// About how many bytes that is: what a reader's progress goes by. The trailer has the exact
    /// number.
    pub used_bytes: u64,
    /// Volumes with the same name here hold one filesystem together, of one instant; they belong
    /// together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The only subvolume of its filesystem whose data is in the image: everything else has to be removed
    /// before the filesystem may be used. Only with the feature bit for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subvolume: Option<Subvolume>,
}

/// A subvolume of a btrfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subvolume {
    /// Its id.
    pub id: u64,
    /// Where it is, as seen from the top level.
    pub path: String,
}

/// The kind of a stream that `zfs send` wrote.
pub const ZFS_SEND: &str = "zfs-send";

/// One opaque stream: bytes that another program wrote and can read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamManifest {
    /// Its number: one more than the volume's or stream's before it.
    pub n: u32,
    /// What it is of.
    pub path: String,
    /// What wrote it: `zfs-send` or `btrfs-send`.
    pub kind: String,
    /// Of a stream of ZFS, what has to be known to receive it and to recognize it there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zfs: Option<ZfsSend>,
}

/// A snapshot of a dataset of ZFS, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZfsSend {
    /// The dataset: `POOL/NAME`.
    pub dataset: String,
    /// Its snapshot: `POOL/NAME@SNAPSHOT`.
    pub snapshot: String,
    /// `guid` of the snapshot, the same wherever it is received.
    pub guid: String,
    /// About how many bytes the stream has, for progress.
    pub size: u64,
    /// The pool.
    pub pool: String,
    /// `guid` of the pool.
    pub pool_guid: String,
    /// Properties of the dataset that were not at their defaults, and those that say what it is.
    pub properties: BTreeMap<String, String>,
    /// Features that were active in the pool.
    pub features: Vec<String>,
    /// Versions of tools and module.
    pub version: String,
}

/// Which blocks of a volume were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Blocks {
    /// Those its filesystem uses.
    Used,
    /// All.
    All,
}

/// What was achieved: known when the last block is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trailer {
    /// The worst grade of any volume or stream.
    pub grade: Grade,
    /// The step that made the source hold still.
    pub freeze: String,
    /// The instant the image shows (RFC 3339).
    pub instant: String,
    /// All the time writers were blocked, in milliseconds.
    pub freeze_ms: f64,
    /// Each time they were.
    pub freezes: Vec<FreezeTimes>,
    /// Identity of the content, in hexadecimal. Absent where blocks were superseded and the image was
    /// written where it cannot be read back: then only a reader of the whole can tell it.
    pub content_id: Option<String>,
    /// What the user was warned of.
    pub warnings: Vec<String>,
    /// What was achieved for each volume.
    pub volumes: Vec<VolumeTrailer>,
    /// What was achieved for each stream.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<StreamTrailer>,
    /// Of filesystems that were imaged at a commit while in use: what proves that it is all there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commits: Vec<CommitProof>,
}

/// A commit of a btrfs that was imaged while it was in use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommitProof {
    /// The UUID of the filesystem.
    pub fsid: String,
    /// Which commit: the generation in its superblocks.
    pub generation: u64,
    /// How many devices it has.
    pub devices: u64,
    /// How many subvolumes are in it, snapshots included.
    pub subvolumes: u64,
    /// How many of them were pinned by a snapshot or an open folder.
    pub pinned: u64,
    /// How long the window was open: what was read in it, was read while this was the newest commit.
    pub window_ms: f64,
    /// How often a window was opened until one held.
    pub windows: u32,
    /// Bytes of tree blocks that were read in the window.
    pub window_tree_bytes: u64,
    /// Bytes of data that were read in the window, for no pin refers to them.
    pub window_data_bytes: u64,
    /// Bytes of pinned data whose checksums are right.
    pub checked_bytes: u64,
    /// Bytes of pinned data that have no checksums.
    pub unchecked_bytes: u64,
    /// Sectors that were wrong in one copy and taken from another.
    pub mended_sectors: u64,
    /// Sectors of subvolumes that were being deleted, and were gone before they could be copied.
    pub gone_sectors: u64,
    /// Which operation moved blocks meanwhile. Always `none`: else there is no image.
    pub exclusive_operation: String,
}

/// One freeze, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FreezeTimes {
    /// What it was for: `map` or `final`.
    pub purpose: String,
    /// From its begin until the thaw was done: how long writers were blocked.
    pub freeze_ms: f64,
    /// Collecting the last traced writes.
    pub drain_ms: f64,
    /// Reading the last changed blocks.
    pub read_ms: f64,
    /// The thaw itself.
    pub thaw_ms: f64,
}

/// What was achieved for one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTrailer {
    /// Its number, from 1.
    pub n: u32,
    /// Its grade.
    pub grade: Grade,
    /// The instant it shows (RFC 3339).
    pub instant: String,
    /// Bytes its map called used, zeros included.
    pub used_bytes: u64,
    /// What could not be read and is zeros in the image: offset and length in bytes.
    pub unreadable: Vec<(u64, u64)>,
}

/// What was achieved for one stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTrailer {
    /// Its number.
    pub n: u32,
    /// Its grade.
    pub grade: Grade,
    /// The instant it shows (RFC 3339).
    pub instant: String,
    /// Its length in bytes.
    pub len: u64,
}

impl Manifest {
    /// Whether of a filesystem only one subvolume is here.
    pub fn has_subvolume(&self) -> bool {
        self.volumes.iter().any(|volume| volume.subvolume.is_some())
    }

    /// The sizes of the volumes.
    pub fn sizes(&self) -> impl Iterator<Item = ByteLen> + '_ {
        self.volumes.iter().map(|volume| ByteLen(volume.size))
    }

    /// About how many bytes the image holds, zeros included.
    pub fn used_bytes(&self) -> ByteLen {
        let volumes = self.volumes.iter().map(|volume| volume.used_bytes);
        let streams = self.streams.iter().filter_map(|stream| stream.zfs.as_ref());
        let all = volumes.chain(streams.map(|zfs| zfs.size));
        ByteLen(all.fold(0, u64::saturating_add))
    }

    /// Decodes and checks a manifest.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if it is no manifest or makes no sense.
    pub fn decode(json: &[u8]) -> Result<Self> {
        let manifest: Self = decode(json, "the list of volumes")?;
        let numbers = manifest.volumes.iter().map(|volume| volume.n);
        let numbers = numbers.chain(manifest.streams.iter().map(|stream| stream.n));
        let count = manifest.volumes.len() + manifest.streams.len();
        let sane = |volume: &VolumeManifest| {
            volume.size <= MAX_VOLUME_SIZE
                && volume.smallest_target >= 1.min(volume.size)
                && volume.logical_sector.is_power_of_two()
        };
        if count > MAX_VOLUMES
            || !numbers.eq(1..=count as u32)
            || !manifest.volumes.iter().all(sane)
        {
            return Err(Error::new(
                Kind::Damaged,
                "the list of volumes makes no sense",
            ));
        }
        Ok(manifest)
    }
}

impl Trailer {
    /// The worst grade of any volume or stream; `None` if there is neither.
    fn worst(&self) -> Option<Grade> {
        let volumes = self.volumes.iter().map(|volume| volume.grade);
        volumes
            .chain(self.streams.iter().map(|stream| stream.grade))
            .max()
    }

    /// Whether the grade of the whole is that of its worst part. A better one would promise what is not
    /// there.
    pub(in crate::image) fn is_graded_by_worst(&self) -> bool {
        self.worst().is_none_or(|worst| worst == self.grade)
    }

    /// Decodes a trailer and checks that it speaks of the same volumes and streams as the manifest, and
    /// that its grade is that of the worst of them.
    ///
    /// # Errors
    /// [`Kind::Damaged`] if not.
    pub fn decode(json: &[u8], manifest: &Manifest) -> Result<Self> {
        let trailer: Self = decode(json, "the trailer")?;
        let volumes = trailer.volumes.iter().map(|volume| volume.n);
        let streams = trailer.streams.iter().map(|stream| stream.n);
        let fits = volumes.eq(manifest.volumes.iter().map(|volume| volume.n))
            && streams.eq(manifest.streams.iter().map(|stream| stream.n));
        if !fits {
            return Err(Error::new(Kind::Damaged, "the trailer is of another image"));
        }
        if !trailer.is_graded_by_worst() {
            return Err(Error::new(
                Kind::Damaged,
                "the image is damaged: its grade is not the worst of its volumes and streams",
            ));
        }
        Ok(trailer)
    }
}

fn decode<'a, T: Deserialize<'a>>(json: &'a [u8], what: &str) -> Result<T> {
    serde_json::from_slice(json).map_err(|source| {
        Error::new(Kind::Damaged, format!("{what} cannot be read")).because(source)
    })
}
