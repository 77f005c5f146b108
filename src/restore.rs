//! `restore`: a volume of an image back to a device or a raw file.

use std::path::{Path, PathBuf};

use holdstill_platform::node::device_with_uuid;
use serde::Serialize;

use crate::damage::{Damages, Tolerant};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::image::content::{RunningContent, to_hex};
use crate::image::manifest::{Grade, Manifest, VolumeManifest};
use crate::image::reader::End;
use crate::input::{self, ExpectedId, NamedImage};
use crate::pipeline::Bounds;
use crate::pipeline::load::{Receive, load};
use crate::progress::{Event, Progress, Silent};
use crate::target::{Candidate, Target};
use crate::units::{ByteLen, Offset};
use crate::verify;

/// What to restore, and where to.
#[derive(Clone, Debug)]
pub struct Options {
    /// The image; `-` for standard input.
    pub image: PathBuf,
    /// Volumes and their targets. Number 0 stands for the only volume.
    pub targets: Vec<(u32, PathBuf)>,
    /// Discard the target first.
    pub discard: bool,
    /// Read the target back and compare.
    pub verify: bool,
    /// Go on behind damage: write all that is whole, and zeros for the rest.
    pub salvage: bool,
    /// The id the image must have.
    pub expect_id: Option<ExpectedId>,
    /// What it may take of the machine.
    pub bounds: Bounds,
}

/// What a restore achieved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The image, as the user named it.
    pub image: String,
    /// The id of the image file.
    pub image_id: String,
    /// The id of its content, if it says one.
    pub content_id: Option<String>,
    /// The image's grade.
    pub grade: Grade,
    /// Where volumes went.
    pub targets: Vec<TargetReport>,
    /// Whether the targets were read back and compared.
    pub verified: bool,
    /// Seconds from the start to the end.
    pub elapsed_s: f64,
    /// What the user was warned of.
    pub warnings: Vec<String>,
}

/// One restored volume.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TargetReport {
    /// The volume's number.
    pub n: u32,
    /// Where it went.
    pub path: String,
}

/// Asked before something that exists is overwritten.
pub type Confirm<'a> = dyn FnMut(&Path, &str) -> Result<()> + 'a;

/// What a restore would do; changes nothing.
///
/// # Errors
/// As [`run`], as far as they can be known before the image is read.
pub fn plan(options: &Options) -> Result<Vec<(VolumeManifest, PathBuf, Candidate)>> {
    let image = open(options, &Silent)?;
    let (wanted, candidates) = examine(options, image.manifest())?;
    let both = wanted.into_iter().zip(candidates);
    Ok(both
        .map(|((volume, path), candidate)| (volume, path, candidate))
        .collect())
}

/// Opens the image and checks what can be told before it is read.
fn open<'a>(options: &Options, progress: &'a dyn Progress) -> Result<NamedImage<'a>> {
    let image = match options.salvage {
        true => input::open_damaged(&options.image, progress),
        false => input::open(&options.image, progress),
    }?;
    if options.salvage && matches!(options.expect_id, Some(ExpectedId::Hash(_))) {
        return Err(Error::new(
            Kind::Usage,
            "with --salvage only an image id can be expected: damage changes the others",
        ));
    }
    if let Some(expected) = options.expect_id {
        expected
            .check_front(&options.image, &image.image_id())
            .map_err(|error| error.on(input::name(&options.image)))?;
    }
    Ok(image)
}

/// A volume and where it goes.
type Wanted = (VolumeManifest, PathBuf);

/// The chosen volumes, and what their targets were found to be.
fn examine(options: &Options, manifest: &Manifest) -> Result<(Vec<Wanted>, Vec<Candidate>)> {
    let wanted = choose(manifest, &options.targets)?;
    let mut candidates = Vec::new();
    for (volume, path) in &wanted {
        refuse_image_as_target(&options.image, path)?;
        candidates.push(Candidate::examine(path, ByteLen(volume.size))?);
    }
    Ok((wanted, candidates))
}

/// Restores an image.
///
/// # Errors
/// Whatever went wrong; the targets then hold nothing that looks like a whole filesystem. Only with
/// `salvage` they hold all that is whole, head and all, and the error says what is not.
pub fn run(
    options: &Options,
    confirm: &mut Confirm<'_>,
    progress: &dyn Progress,
) -> Result<Report> {
    let begun = std::time::Instant::now();
    if options.verify && input::is_stream(&options.image) {
        return Err(Error::new(
            Kind::Usage,
            "a stream cannot be read twice: --verify needs an image in a file",
        ));
    }
    let mut image = open(options, progress)?;
    let manifest = image.manifest().clone();
    let (wanted, candidates) = examine(options, &manifest)?;
    for (candidate, (volume, path)) in candidates.iter().zip(&wanted) {
        if candidate.exists() {
            confirm(path, &format!("volume {} ({})", volume.n, volume.path))?;
        }
        let what = format!("volume {} to {}", volume.n, path.display());
        progress.event(&Event::Plan(&what));
    }
    let bytes = manifest.used_bytes();
    progress.total(if options.verify { bytes + bytes } else { bytes });
    let mut targets = Targets::default();
    for (candidate, (volume, _)) in candidates.into_iter().zip(&wanted) {
        let has_content = candidate.exists();
        let target = candidate.open(options.discard)?;
        if options.salvage && has_content {
            // Nobody can tell where all that is lost belongs: nothing may shine through.
            target.zero(Extent::new(0, volume.size))?;
        }
        targets.0.push((volume.n, target));
    }
    let mut content = RunningContent::new(manifest.sizes(), manifest.streams.len());
    let tolerant = Tolerant::new(&targets, true, progress);
    let receiver: &dyn Receive = match options.salvage {
        true => &tolerant,
        false => &targets,
    };
    let read = load(&mut image, receiver, options.bounds, progress, |head| {
        head.add_to(&mut content)
    });
    let check = || match options.salvage {
        true => tolerant.finish(read),
        false => read
            .map_err(|error| match error.kind() {
                Kind::Damaged | Kind::Truncated => {
                    error.hint("--salvage writes all that is whole, and zeros for the rest")
                }
                _ => error,
            })
            .and_then(|end| check_whole(options, end, content))
            .map(|end| (Some(end), Damages::none())),
    };
    let (end, damages) = check().map_err(|error| error.on(input::name(&options.image)))?;
    progress.check()?;
    if options.verify {
        let written = targets.0.iter();
        let comparisons = written.map(|(volume, target)| target.comparison(*volume));
        let comparisons = comparisons.collect::<Result<Vec<_>>>()?;
        verify::compare(&options.image, &comparisons, options.bounds, progress)?;
    }
    for (_, target) in targets.0 {
        target.finish(options.verify)?;
    }
    damages
        .as_failure("all that is whole was written; lost blocks are zeros")
        .map_err(|error| error.on(input::name(&options.image)))?;
    // Without damage there is an end.
    let end = end.ok_or_else(|| Error::new(Kind::Truncated, "the image has no end"))?;
    let mut warnings = verify::grade_warnings(&end.trailer);
    warnings.extend(wanted.iter().filter_map(twin_warning));
    for warning in &warnings {
        progress.warn(warning);
    }
    Ok(Report {
        image: options.image.display().to_string(),
        image_id: to_hex(&image.image_id()),
        content_id: end.trailer.content_id,
        grade: end.trailer.grade,
        targets: wanted
            .iter()
            .map(|(volume, path)| TargetReport {
                n: volume.n,
                path: path.display().to_string(),
            })
            .collect(),
        verified: options.verify,
        elapsed_s: begun.elapsed().as_secs_f64(),
        warnings,
    })
}

/// Names a UUID that is visible twice now.
fn twin_warning((volume, target): &Wanted) -> Option<String> {
    let uuid = volume.uuid.as_ref()?;
    let other = device_with_uuid(uuid)?;
    let is_other = std::fs::canonicalize(target).is_ok_and(|target| target != other);
    is_other.then(|| {
        format!(
            "{} has the UUID {uuid}, too: what is mounted by UUID may then be either",
            other.display()
        )
    })
}

/// Checks, once everything is read, that it is the content it should be.
fn check_whole(options: &Options, end: Box<End>, content: RunningContent) -> Result<Box<End>> {
    let said = end.trailer.content_id.as_deref();
    let content_id = match options.expect_id {
        Some(ExpectedId::Hash(_)) => input::content_id(&options.image, content)?,
        _ => content.finish(),
    };
    input::check_content_id(content_id.as_ref(), said)?;
    if let Some(expected) = options.expect_id {
        expected.check_end(&end.root_hash, content_id.as_ref())?;
    }
    Ok(end)
}

/// Which volume goes where.
///
/// # Errors
/// [`Kind::Confirm`] if there are several volumes and none was chosen; [`Kind::Usage`] for a number
/// that does not exist or is named twice.
fn choose(
    manifest: &Manifest,
    targets: &[(u32, PathBuf)],
) -> Result<Vec<(VolumeManifest, PathBuf)>> {
    let mut chosen: Vec<(VolumeManifest, PathBuf)> = Vec::new();
    for (number, path) in targets {
        let index = match (*number, manifest.volumes.len()) {
            (0, 1) => 0,
            (0, 0) => return Err(Error::new(Kind::Usage, "the image holds no volume")),
            (0, count) => {
                return Err(
                    Error::new(Kind::Confirm, format!("the image holds {count} volumes"))
                        .hint("choose one with --volume N, or several with --map N=TARGET"),
                );
            }
            (number, _) => number as usize - 1,
        };
        let Some(volume) = manifest.volumes.get(index) else {
            return Err(
                match manifest.streams.iter().find(|stream| stream.n == *number) {
                    Some(stream) => Error::new(
                        Kind::NotApplicable,
                        format!(
                            "{number} is a stream ({} of {}), which this version checks but does not restore",
                            stream.kind, stream.path
                        ),
                    ),
                    None => Error::new(Kind::Usage, format!("the image holds no volume {number}")),
                },
            );
        };
        if chosen
            .iter()
            .any(|(other, target)| other.n == volume.n || target == path)
        {
            return Err(Error::new(Kind::Usage, "a volume or a target is named twice").on(path));
        }
        chosen.push((volume.clone(), path.clone()));
    }
    Ok(chosen)
}

fn refuse_image_as_target(image: &Path, target: &Path) -> Result<()> {
    use holdstill_platform::node::Node;
    let same = match (Node::of(image), Node::of(target)) {
        (Ok(image), Ok(target)) => image.id == target.id,
        _ => false,
    };
    if same {
        return Err(Error::new(Kind::InUse, "the target is the image itself").on(target));
    }
    Ok(())
}

/// The targets of the chosen volumes; other volumes are checked and dropped.
#[derive(Debug, Default)]
struct Targets(Vec<(u32, Target)>);

impl Targets {
    fn of(&self, volume: u32) -> Option<&Target> {
        self.0
            .iter()
            .find(|(number, _)| *number == volume)
            .map(|(_, target)| target)
    }
}

impl Receive for Targets {
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        self.of(volume)
            .map_or(Ok(()), |target| target.write(offset, bytes))
    }

    fn zeros(&self, volume: u32, extent: Extent) -> Result<()> {
        self.of(volume).map_or(Ok(()), |target| target.zero(extent))
    }
}
