//! `inspect`: what a source or an image is, without changing anything.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use holdstill_platform::device::{Access, Disk};
use serde::Serialize;

use crate::error::{IoContext, Kind, Result};
use crate::freeze::apfs::{self, Description};
use crate::freeze::plan::{self, StepReport};
use crate::freeze::step;
use crate::fs::{self, Condition, Opened, Snapshot, Volume};
use crate::image::content::to_hex;
use crate::image::format::MAGIC;
use crate::image::manifest::{Manifest, Trailer};
use crate::image::reader::{Summary, summarize};
use crate::read_at::ReadAt;
use crate::source::{Named, Source, whole};

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum Report {
    /// An image.
    Image(Box<ImageReport>),
    /// Something that could be imaged.
    Source(Box<SourceReport>),
    /// A dataset of ZFS, which could be imaged as a stream.
    Dataset(DatasetReport),
}

/// A dataset of ZFS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DatasetReport {
    /// `POOL/NAME`.
    pub path: String,
    /// The step that `backup` would take.
    pub step: String,
}

/// An image, as it describes itself. That it is whole is not proven by this: `verify` does that.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageReport {
    /// The image, as the user named it.
    pub image: String,
    /// The id of this file.
    pub image_id: String,
    /// BLAKE3 over all headers and tables.
    pub root_hash: String,
    /// Bytes of the image.
    pub stored_bytes: u64,
    /// What it says at its front.
    pub manifest: Manifest,
    /// What it says at its end.
    pub trailer: Trailer,
}

/// A source.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceReport {
    /// What is read.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// Logical sector in bytes.
    pub logical_sector: u32,
    /// Where it is mounted.
    pub mounted_at: Option<String>,
    /// What is on it.
    pub fs: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// The volumes that share its blocks, where there can be several.
    pub volumes: Vec<VolumeReport>,
    /// The other devices of its filesystem, where there are such and all of them are here.
    pub siblings: Vec<String>,
    /// Whether it was left in order: `clean`, `frozen`, `dirty`, or `unknown`. A mounted filesystem
    /// is dirty as a rule.
    pub condition: String,
    /// Bytes in use; only where the map can be trusted.
    pub used_bytes: Option<u64>,
    /// The step that `backup` would take.
    pub step: Option<String>,
    /// Every step of the ladder, and what speaks against it.
    pub ladder: Vec<StepReport>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// A volume of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumeReport {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// What its system uses it for.
    pub roles: Vec<&'static str>,
    /// Its files are encrypted: they are imaged as they lie on disk.
    pub encrypted: bool,
    /// It carries a seal over all its content.
    pub sealed: bool,
    /// Bytes that it has allocated.
    pub used_bytes: u64,
    /// Its snapshots, the oldest first.
    pub snapshots: Vec<SnapshotReport>,
}

/// A snapshot of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotReport {
    /// Its name.
    pub name: String,
    /// When it was made (RFC 3339, UTC).
    pub created: Option<String>,
}

impl VolumeReport {
    fn new(volume: Volume) -> Self {
        let snapshot = |snapshot: Snapshot| SnapshotReport {
            name: snapshot.name,
            created: snapshot.created.map(|created| created.to_string()),
        };
        Self {
            name: volume.name,
            uuid: volume.uuid,
            roles: volume.roles,
            encrypted: volume.is_encrypted,
            sealed: volume.is_sealed,
            used_bytes: volume.used.0,
            snapshots: volume.snapshots.into_iter().map(snapshot).collect(),
        }
    }
}

/// Looks at a source or an image.
///
/// # Errors
/// If it cannot be found or read.
pub fn run(text: &str) -> Result<Report> {
    let path = Path::new(text);
    if is_image(path)? {
        let Summary {
            image_id,
            manifest,
            trailer,
            len,
            root_hash,
            ..
        } = summarize(&Disk::open(path, Access::Read)?).map_err(|error| error.on(path))?;
        return Ok(Report::Image(Box::new(ImageReport {
            image: text.to_owned(),
            image_id: to_hex(&image_id),
            root_hash: to_hex(&root_hash),
            stored_bytes: len.0,
            manifest,
            trailer,
        })));
    }
    match Named::resolve(text)? {
        Named::Blocks(found) => source(&found).map(|report| Report::Source(Box::new(report))),
        Named::Dataset(path) => Ok(Report::Dataset(DatasetReport {
            path,
            step: step::ZFS.name().to_owned(),
        })),
    }
}

/// Whether it is a regular file that begins as an image does.
fn is_image(path: &Path) -> Result<bool> {
    if !std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return Ok(false);
    }
    let mut start = Vec::new();
    let file = File::open(path).context("cannot open", path)?;
    file.take(MAGIC.len() as u64)
        .read_to_end(&mut start)
        .context("cannot read", path)?;
    Ok(start == MAGIC)
}

/// A volume of APFS on a Mac, whose node cannot be read.
fn source_of_apfs(source: &Source, volume: Description) -> Result<SourceReport> {
    let ladder = plan::ladder(source)?;
    let mount = source.mount.as_ref();
    Ok(SourceReport {
        path: source.path.display().to_string(),
        size: volume.size,
        logical_sector: 512,
        mounted_at: mount.map(|mount| mount.point.display().to_string()),
        fs: Some(fs::Kind::Apfs.name().to_owned()),
        label: volume.name,
        uuid: volume.uuid,
        volumes: Vec::new(),
        siblings: Vec::new(),
        condition: "in use".to_owned(),
        used_bytes: Some(volume.used),
        step: first_that_applies(&ladder),
        ladder,
        warnings: Vec::new(),
    })
}

fn first_that_applies(ladder: &[StepReport]) -> Option<String> {
    let applies = |report: &&StepReport| report.objection.is_none();
    ladder
        .iter()
        .find(applies)
        .map(|report| report.step.clone())
}

fn source(source: &Source) -> Result<SourceReport> {
    if let Some(volume) = apfs::description(source)? {
        return source_of_apfs(source, volume);
    }
    let disk = Disk::open(&source.path, Access::Read)?;
    let geometry = disk.geometry();
    let ladder = plan::ladder(source)?;
    let mut report = SourceReport {
        path: source.path.display().to_string(),
        size: geometry.size,
        logical_sector: geometry.logical_sector,
        mounted_at: source
            .mount
            .as_ref()
            .map(|mount| mount.point.display().to_string()),
        fs: None,
        label: None,
        uuid: None,
        volumes: Vec::new(),
        siblings: Vec::new(),
        condition: "unknown".to_owned(),
        used_bytes: None,
        step: first_that_applies(&ladder),
        ladder,
        warnings: Vec::new(),
    };
    // What is mounted here is marked as in use by this very machine.
    let mut siblings: Vec<Arc<dyn ReadAt>> = Vec::new();
    for sibling in whole::siblings(source)? {
        siblings.push(Arc::new(Disk::open(&sibling.path, Access::Read)?));
        report.siblings.push(sibling.path.display().to_string());
    }
    let is_live_btrfs = source
        .mount
        .as_ref()
        .is_some_and(|mount| mount.fs_type == "btrfs");
    let opened = if is_live_btrfs {
        // Its trees move while they are read: it would seem to contradict itself.
        report.condition = "in use".to_owned();
        fs::probe(&disk)?.map_or(Opened::Unknown, Opened::NoMap)
    } else if source.mount.is_some() && siblings.is_empty() {
        fs::open_mounted(&disk)?
    } else {
        fs::open_with(&disk, &siblings)?
    };
    let info = match opened {
        Opened::Known(filesystem) => {
            report.condition = match filesystem.condition() {
                Condition::Clean => "clean".to_owned(),
                Condition::Frozen => "frozen".to_owned(),
                Condition::Interrupted => "dirty: it was not unmounted".to_owned(),
                Condition::Dirty { reason } => format!("dirty: {reason}"),
            };
            if filesystem.condition().is_settled() && source.mount.is_none() {
                match filesystem.walk_used(&disk, &mut |_| Ok(())) {
                    Ok(walk) => {
                        report.used_bytes = Some(walk.used.0);
                        report.warnings = walk.warnings;
                    }
                    Err(error) if error.kind() == Kind::Damaged => report.warnings.push(format!(
                        "all blocks would be copied: the filesystem contradicts itself ({error})"
                    )),
                    Err(error) => return Err(error),
                }
            }
            match filesystem.volumes(&disk) {
                Ok(volumes) => {
                    report.volumes = volumes.into_iter().map(VolumeReport::new).collect();
                }
                Err(error) if error.kind() == Kind::Damaged => report
                    .warnings
                    .push(format!("its volumes cannot be told ({error})")),
                Err(error) => return Err(error),
            }
            Some(filesystem.info().clone())
        }
        Opened::AllBlocks { info, why } => {
            report
                .warnings
                .push(format!("all blocks would be copied: {why}"));
            Some(info)
        }
        Opened::NoMap(info) => Some(info),
        Opened::Unknown => None,
    };
    if let Some(info) = info {
        report.fs = Some(info.kind.name().to_owned());
        report.label = info.label;
        report.uuid = info.uuid;
    }
    Ok(report)
}
