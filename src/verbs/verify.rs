//! `verify`: every byte of an image is checked, and on request compared with a device.

use std::path::{Path, PathBuf};

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::extents_below::Extents;
use holdstill_platform::node::Node;
use serde::Serialize;

use crate::destination::compare::Comparison;
use crate::error::{Error, Kind, Result};
use crate::image::content::{RunningContent, to_hex};
use crate::image::manifest::{Grade, Trailer, VolumeManifest};
use crate::pipeline::Bounds;
use crate::pipeline::load::load;
use crate::pipeline::receive::{Discard, Receive};
use crate::pipeline::tolerant::Tolerant;
use crate::progress::Progress;
use crate::read_at::ReadAt;
use crate::storage::input::{self, ExpectedId};
use crate::units::ByteLen;

/// What to verify.
#[derive(Clone, Debug)]
pub struct Options {
    /// The image; `-` for standard input.
    pub image: PathBuf,
    /// A device or raw file to compare it with.
    pub against: Option<PathBuf>,
    /// Which volume to compare; 0 stands for the only one.
    pub volume: u32,
    /// The id it must have.
    pub expect_id: Option<ExpectedId>,
    /// What it may take of the machine.
    pub bounds: Bounds,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The image, as the user named it.
    pub image: String,
    /// The id of the image file.
    pub image_id: String,
    /// The id of its content, if it says one.
    pub content_id: Option<String>,
    /// BLAKE3 over all headers and tables.
    pub root_hash: String,
    /// The image's grade.
    pub grade: Grade,
    /// Bytes of the image.
    pub stored_bytes: u64,
    /// What it was compared with.
    pub against: Option<String>,
    /// Seconds from the start to the end.
    pub elapsed_s: f64,
    /// What the user was warned of.
    pub warnings: Vec<String>,
}

/// Verifies an image.
///
/// Damage is reported place by place; it is an error only at the end.
///
/// # Errors
/// [`Kind::Damaged`] and its kin; [`Kind::UnexpectedImage`]; [`Kind::Mismatch`] if the comparison found a difference.
pub fn run(options: &Options, progress: &dyn Progress) -> Result<Report> {
    let begun = std::time::Instant::now();
    let name = input::name(&options.image);
    if let Some(path) = &options.against {
        refuse_as_compared(&options.image, path)?;
    }
    let mut image = input::open(&options.image, progress)?;
    if let Some(expected) = options.expect_id {
        expected
            .check_front(&options.image, &image.image_id())
            .map_err(|error| error.on(&name))?;
    }
    image.go_on_behind_damage();
    let manifest = image.manifest();
    let mut content = RunningContent::new(manifest.sizes(), manifest.streams.len());
    progress.total(image.manifest().used_bytes());
    let comparison = match &options.against {
        Some(path) => {
            let volume = volume_of(&image.manifest().volumes, options.volume)?;
            let disk = Disk::open(path, Access::Read)?;
            // What a shorter target has no room for is zeros.
            let room = ReadAt::len(&disk).max(ByteLen(volume.smallest_target));
            let size = ByteLen(volume.size).min(room);
            Some(Comparison::new(volume.n, size, disk)?)
        }
        None => None,
    };
    let receiver: &dyn Receive = match &comparison {
        Some(comparison) => comparison,
        None => &Discard,
    };
    let receiver = Tolerant::new(receiver, false, progress);
    let read = load(&mut image, &receiver, options.bounds, progress, |head| {
        head.add_to(&mut content)
    });
    let check = || {
        let (end, damages) = receiver.finish(read)?;
        damages.as_failure("restore --salvage writes all that is whole")?;
        // Without damage there is an end.
        let end = end.ok_or_else(|| Error::new(Kind::Truncated, "the image has no end"))?;
        let content_id = input::content_id(&options.image, content)?;
        input::check_content_id(content_id.as_ref(), end.trailer.content_id.as_deref())?;
        if let Some(expected) = options.expect_id {
            expected.check_end(&end.root_hash, content_id.as_ref())?;
        }
        comparison.as_ref().map_or(Ok(()), Comparison::finish)?;
        Ok((end, content_id))
    };
    let (end, content_id) = check().map_err(|error: Error| error.on(name))?;
    let warnings = grade_warnings(&end.trailer, |_| true);
    for warning in &warnings {
        progress.warn(warning);
    }
    Ok(Report {
        image: options.image.display().to_string(),
        image_id: to_hex(&image.image_id()),
        content_id: content_id.map(|id| to_hex(&id)).or(end.trailer.content_id),
        root_hash: to_hex(&end.root_hash),
        grade: end.trailer.grade,
        stored_bytes: end.len.0,
        against: options
            .against
            .as_ref()
            .map(|path| path.display().to_string()),
        elapsed_s: begun.elapsed().as_secs_f64(),
        warnings,
    })
}

/// Refuses to compare an image with its own bytes: that would tell nothing of any device.
fn refuse_as_compared(image: &Path, against: &Path) -> Result<()> {
    let image = input::extents(image)?;
    let compared = Extents::of_node(&Node::of(against)?)?;
    match compared.common(&image) {
        None => Ok(()),
        Some(medium) => {
            let what =
                format!("this is the image itself, or has bytes of it: both lie on {medium}");
            Err(Error::new(Kind::InUse, what)
                .on(against)
                .hint("name what the image was restored to"))
        }
    }
}

/// Reads targets back and compares them with the image they were restored from.
///
/// # Errors
/// [`Kind::Mismatch`] if one differs, [`Kind::Damaged`] and its kin if the image has changed since.
pub fn compare(
    image: &Path,
    targets: &[Comparison],
    bounds: Bounds,
    progress: &dyn Progress,
) -> Result<()> {
    let mut image = input::open(image, progress)?;
    load(&mut image, &targets, bounds, progress, |_| ())?;
    targets.iter().try_for_each(Comparison::finish)
}

/// What must be said of the volumes for which `is_meant` holds: a grade below `clean`, and what their
/// sources could not give.
pub fn grade_warnings(trailer: &Trailer, is_meant: impl Fn(u32) -> bool) -> Vec<String> {
    let volumes = || trailer.volumes.iter().filter(|volume| is_meant(volume.n));
    let below = volumes().filter(|volume| volume.grade > Grade::Clean);
    let grades = below.map(|volume| {
        let n = volume.n;
        match volume.grade {
            Grade::Torn => format!("volume {n} is torn: it may have changed while it was read"),
            Grade::Unknown => format!(
                "volume {n} is graded unknown: nobody wrote to it meanwhile, but whether it was in order \
                 cannot be told"
            ),
            _ => format!("volume {n} is graded crash: it is as a power cut would have left it"),
        }
    });
    let unreadable = volumes().filter_map(|volume| {
        let lens = volume.unreadable.iter().map(|(_, len)| *len);
        let bytes = ByteLen(lens.fold(0, u64::saturating_add));
        (bytes > ByteLen::ZERO).then(|| {
            format!(
                "volume {}: {bytes} could not be read from its source and are zeros; inspect --json \
                 lists where",
                volume.n
            )
        })
    });
    grades.chain(unreadable).collect()
}

/// The worst grade of the volumes and streams for which `is_meant` holds; of none, that of the image.
pub fn grade_of(trailer: &Trailer, is_meant: impl Fn(u32) -> bool) -> Grade {
    let volumes = trailer
        .volumes
        .iter()
        .map(|volume| (volume.n, volume.grade));
    let streams = trailer
        .streams
        .iter()
        .map(|stream| (stream.n, stream.grade));
    let meant = volumes.chain(streams).filter(|(n, _)| is_meant(*n));
    meant.map(|(_, grade)| grade).max().unwrap_or(trailer.grade)
}

fn volume_of(volumes: &[VolumeManifest], number: u32) -> Result<VolumeManifest> {
    let index = match (number, volumes.len()) {
        (0, 1) => 0,
        (0, count) => {
            return Err(
                Error::new(Kind::Confirm, format!("the image holds {count} volumes"))
                    .hint("choose one with --volume N"),
            );
        }
        (number, _) => number as usize - 1,
    };
    volumes
        .get(index)
        .cloned()
        .ok_or_else(|| Error::new(Kind::Usage, format!("the image holds no volume {number}")))
}
