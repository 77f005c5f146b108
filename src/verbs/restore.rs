//! `restore`: a volume of an image back to a device or a raw file, a stream back into a pool.

pub(crate) mod raw;
mod stream;

use std::path::{Path, PathBuf};

use holdstill_platform::btrfs::Filesystem;
use holdstill_platform::node::device_with_uuid;
use serde::Serialize;
use uuid::Uuid;

use crate::destination::apart::{refuse_as_target, refuse_printing_on, refuse_shared};
use crate::destination::fit::Fit;
use crate::destination::new_ids;
use crate::destination::overwritten::{Confirm, Question};
use crate::destination::subvolume;
use crate::destination::target_name;
use crate::destination::twin;
use crate::destination::{Candidate, Taken, Target};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::fs;
use crate::image::content::{RunningContent, to_hex};
use crate::image::manifest::{Grade, Manifest, StreamManifest, Subvolume, VolumeManifest};
use crate::image::reader::End;
use crate::pipeline::Bounds;
use crate::pipeline::load::load;
use crate::pipeline::receive::Receive;
use crate::pipeline::tolerant::{Damages, Tolerant};
use crate::progress::{Event, Progress, Silent};
use crate::storage::input::{self, ExpectedId, NamedImage};
use crate::units::Offset;
use crate::verbs::verify;
use stream::{Receiving, WantedStream};

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
    /// Write a copy that could not be used on the target.
    pub allow_unusable: bool,
    /// Let a filesystem become visible twice that must not.
    pub allow_twin: bool,
    /// Give every filesystem a UUID of its own.
    pub new_ids: bool,
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
    /// The worst grade of what was restored.
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
    /// The UUID its filesystem was given, if it is not that of the image.
    pub new_uuid: Option<String>,
    /// The only subvolume that is in it, if it is not whole.
    pub subvolume: Option<Subvolume>,
}

/// What a restore would do.
#[derive(Debug)]
pub struct Planned {
    /// The volume that goes to standard output.
    pub to_stdout: Option<VolumeManifest>,
    /// Volumes, and where they go.
    pub volumes: Vec<WantedVolume>,
    /// Streams, and where they go.
    pub streams: Vec<WantedStream>,
}

/// A volume of an image and the target it goes to.
#[derive(Debug)]
pub struct WantedVolume {
    /// What the image says of it.
    pub volume: VolumeManifest,
    /// Where it goes.
    pub path: PathBuf,
    /// What was found there.
    pub candidate: Candidate,
    /// What the user will have to do.
    pub warning: Option<String>,
    /// The UUID that its filesystem will be given.
    pub new_uuid: Option<Uuid>,
}

/// Says what a restore would do; changes nothing.
///
/// # Errors
/// As [`run`], as far as they can be known before the image is read.
pub fn plan(options: &Options) -> Result<Planned> {
    raw::check_usage(options)?;
    let image = open(options, &Silent)?;
    if options.is_to_stdout() {
        return Ok(Planned {
            to_stdout: Some(raw::volume(options, image.manifest())?),
            volumes: Vec::new(),
            streams: Vec::new(),
        });
    }
    examine(options, image.manifest())
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
    if !options.salvage {
        input::check_ends(&options.image).map_err(with_salvage_hint)?;
    }
    Ok(image)
}

/// The chosen volumes and streams, and what their targets were found to be.
fn examine(options: &Options, manifest: &Manifest) -> Result<Planned> {
    let mut planned = Planned {
        to_stdout: None,
        volumes: Vec::new(),
        streams: Vec::new(),
    };
    let image = input::extents(&options.image)?;
    refuse_printing_on("the image", &image)?;
    for (part, path) in choose(manifest, &options.targets)? {
        match part {
            Part::Volume(volume) => {
                let path = target_name::resolve(&path)?;
                let fit = Fit::of_volume(volume);
                refuse_as_target(&path, &image, "the image")?;
                let candidate = Candidate::examine(&path, &fit, options.allow_unusable)?;
                let own = candidate.extents();
                refuse_shared("target", &path, own, "the image", &image)?;
                refuse_printing_on("the target", own)?;
                for other in &planned.volumes {
                    let what = format!("the target of volume {}", other.volume.n);
                    refuse_shared("target", &path, own, &what, other.candidate.extents())?;
                }
                planned.volumes.push(WantedVolume {
                    volume: volume.clone(),
                    warning: fit.warning(&path, candidate.room()),
                    path,
                    candidate,
                    new_uuid: None,
                });
            }
            Part::Stream(stream) => {
                for (is_set, name) in [
                    (options.verify, "verify"),
                    (options.discard, "discard"),
                    (options.salvage, "salvage"),
                    (options.new_ids, "new-ids"),
                ] {
                    if is_set {
                        return Err(Error::new(
                            Kind::Usage,
                            format!("--{name} is for volumes, and {} is a stream", stream.n),
                        ));
                    }
                }
                planned.streams.push(WantedStream::examine(stream, &path)?);
            }
        }
    }
    WantedStream::keep_apart(&mut planned.streams);
    let is_partial = |wanted: &WantedVolume| wanted.volume.subvolume.is_some();
    if planned.volumes.iter().any(is_partial) {
        let why = "to restore one subvolume, what else is in its filesystem has to be removed";
        refuse_left_out(why, &planned, manifest)?;
        Filesystem::can_mount()?;
    }
    if options.new_ids {
        choose_new_uuids(&mut planned, manifest)?;
    } else if !options.allow_twin {
        refuse_twins(&planned.volumes)?;
    }
    Ok(planned)
}

/// Gives each filesystem a new UUID, the same on all its devices.
fn choose_new_uuids(planned: &mut Planned, manifest: &Manifest) -> Result<()> {
    refuse_left_out(
        "a new UUID has to be given to all devices of a filesystem",
        planned,
        manifest,
    )?;
    let mut groups: Vec<(String, Uuid)> = Vec::new();
    for wanted in &mut planned.volumes {
        let volume = &wanted.volume;
        new_ids::refuse_others(volume.fs.as_deref(), &format!("volume {}", volume.n))?;
        let known = groups
            .iter()
            .find(|(group, _)| volume.group.as_ref() == Some(group));
        let new = known.map_or_else(Uuid::new_v4, |(_, new)| *new);
        groups.extend(volume.group.clone().map(|group| (group, new)));
        wanted.new_uuid = Some(new);
    }
    Ok(())
}

/// Refuses to make a btrfs visible twice.
fn refuse_twins(volumes: &[WantedVolume]) -> Result<()> {
    let targets: Vec<&Path> = volumes.iter().map(|wanted| wanted.path.as_path()).collect();
    for WantedVolume { volume, path, .. } in volumes {
        let is_btrfs = volume.fs.as_deref() == Some(fs::Kind::Btrfs.name());
        let fsid = volume.uuid.as_deref().map(Uuid::parse_str);
        if let (true, Some(Ok(fsid))) = (is_btrfs, fsid) {
            twin::refuse(fsid, path, &targets)?;
        }
    }
    Ok(())
}

/// Refuses to restore only some of the devices of a filesystem.
fn refuse_left_out(why: &str, planned: &Planned, manifest: &Manifest) -> Result<()> {
    let Some(left_out) = left_out(planned, manifest) else {
        return Ok(());
    };
    let what = format!("{why}, and volume {} is left out", left_out.n);
    Err(Error::new(Kind::NotApplicable, what).hint("name a target for it, too, by --map"))
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
    raw::check_usage(options)?;
    let mut image = open(options, progress)?;
    let manifest = image.manifest().clone();
    if options.is_to_stdout() {
        drop(image);
        return raw::run(options, &manifest, progress);
    }
    let planned = examine(options, &manifest)?;
    let reports = planned.reports();
    let mut notes: Vec<_> = planned.volumes.iter().filter_map(twin_warning).collect();
    notes.extend(part_warning(&planned, &manifest));
    notes.extend(planned.volumes.iter().filter_map(|it| it.warning.clone()));
    // All are taken before the first is asked for, and long before the first is written to.
    let mut taken = Vec::new();
    for wanted in planned.volumes {
        let exists = wanted.candidate.exists();
        let target = wanted.candidate.take(options.discard)?;
        taken.push(TakenVolume {
            volume: wanted.volume,
            path: wanted.path,
            new_uuid: wanted.new_uuid,
            exists,
            target,
        });
    }
    for wanted in &taken {
        let TakenVolume { volume, path, .. } = wanted;
        if wanted.exists {
            confirm(&Question {
                target: path,
                with: &format!("volume {} ({})", volume.n, volume.path),
            })?;
        }
        let mut what = format!("volume {} to {}", volume.n, path.display());
        if let Some(new) = wanted.new_uuid {
            what = format!("{what}, {}", new_ids::note(new));
        }
        if let Some(subvolume) = &volume.subvolume {
            what = format!("{what}, of it only the subvolume {}", subvolume.path);
        }
        progress.event(&Event::Plan(&what));
    }
    for stream in &planned.streams {
        let what = format!("stream {} to {}", stream.n, stream.target);
        progress.event(&Event::Plan(&what));
    }
    let bytes = manifest.used_bytes();
    progress.total(if options.verify { bytes + bytes } else { bytes });
    let mut targets = Targets::default();
    let mut filesystems = Vec::new();
    for stream in &planned.streams {
        targets.streams.push(Receiving::start(stream, progress)?);
    }
    progress.check()?;
    for wanted in taken {
        let volume = wanted.volume;
        filesystems.push(Finishing {
            group: volume.group,
            subvolume: volume.subvolume,
            new_uuid: wanted.new_uuid,
        });
        let target = wanted.target.begin()?;
        if options.salvage && wanted.exists {
            // Nobody can tell where all that is lost belongs: nothing may shine through.
            target.zero(Extent::new(0, volume.size))?;
        }
        targets.volumes.push((volume.n, target));
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
            .map_err(with_salvage_hint)
            .and_then(|end| check_whole(options, end, content))
            .map(|end| (Some(end), Damages::none())),
    };
    let (end, damages) = check().map_err(|error| error.on(input::name(&options.image)))?;
    progress.check()?;
    if options.verify {
        let written = targets.volumes.iter();
        let comparisons = written.map(|(volume, target)| target.comparison(*volume));
        let comparisons = comparisons.collect::<Result<Vec<_>>>()?;
        verify::compare(&options.image, &comparisons, options.bounds, progress)?;
    }
    if !damages.is_empty() && manifest.has_subvolume() {
        progress.warn(
            "what is damaged is not mounted to remove what is not wanted: all subvolumes are there, and \
             the data of one",
        );
        filesystems.iter_mut().for_each(|it| it.subvolume = None);
    }
    let written = targets.volumes.iter();
    notes.extend(written.flat_map(|(_, target)| target.cleared()));
    let volumes = targets.volumes.into_iter().map(|(_, target)| target);
    finish(volumes.zip(filesystems).collect(), options.verify, progress)?;
    let received = targets.streams.into_iter().map(Receiving::finish);
    stream::place(received.collect::<Result<_>>()?)?;
    let left = match &end {
        Some(_) => "all that is intact was written; lost blocks are zeros",
        None => {
            "all that is intact was written, lost blocks are zeros; without the end of the image nobody \
             can tell whether that is of one instant"
        }
    };
    damages
        .as_failure(left)
        .map_err(|error| error.on(input::name(&options.image)))?;
    // Without damage there is an end.
    let end = end.ok_or_else(|| Error::new(Kind::Truncated, "the image has no end"))?;
    // What nobody restores says nothing of what is.
    let is_restored = |n| reports.iter().any(|report| report.n == n);
    let mut warnings = verify::grade_warnings(&end.trailer, is_restored);
    let grade = verify::grade_of(&end.trailer, is_restored);
    warnings.extend(notes);
    for warning in &warnings {
        progress.warn(warning);
    }
    Ok(Report {
        image: options.image.display().to_string(),
        image_id: to_hex(&image.image_id()),
        content_id: end.trailer.content_id,
        grade,
        targets: reports,
        verified: options.verify,
        elapsed_s: begun.elapsed().as_secs_f64(),
        warnings,
    })
}

/// A volume of an image and the target it goes to, which is ours now.
struct TakenVolume {
    volume: VolumeManifest,
    path: PathBuf,
    new_uuid: Option<Uuid>,
    /// Whether something is there.
    exists: bool,
    target: Taken,
}

/// How the filesystem on a target is finished.
struct Finishing {
    /// Targets with the same one hold one together.
    group: Option<String>,
    /// The only subvolume to be left.
    subvolume: Option<Subvolume>,
    new_uuid: Option<Uuid>,
}

/// Makes targets whole. Those of one filesystem of which a subvolume is wanted are finished together.
fn finish(
    mut targets: Vec<(Target, Finishing)>,
    compare: bool,
    progress: &dyn Progress,
) -> Result<()> {
    for (target, finishing) in &targets {
        if let (Some(new), None) = (finishing.new_uuid, &finishing.subvolume) {
            new_ids::give(target, new, compare)?;
        }
    }
    while !targets.is_empty() {
        let (target, finishing) = targets.remove(0);
        let Some(wanted) = finishing.subvolume else {
            target.finish(compare)?;
            continue;
        };
        let is_same = |other: &Option<String>| other.is_some() && *other == finishing.group;
        let (others, rest) = targets.into_iter().partition(|(_, it)| is_same(&it.group));
        targets = rest;
        let others: Vec<(Target, Finishing)> = others;
        let others = others.into_iter().map(|(target, _)| target);
        let all = std::iter::once(target).chain(others).collect();
        subvolume::finish(all, &wanted, finishing.new_uuid, compare, progress)?;
    }
    Ok(())
}

/// Names a UUID that is visible twice now.
fn twin_warning(wanted: &WantedVolume) -> Option<String> {
    let uuid = wanted.volume.uuid.as_ref()?;
    let other = device_with_uuid(uuid)?;
    let is_other = std::fs::canonicalize(&wanted.path).is_ok_and(|target| target != other);
    (is_other && wanted.new_uuid.is_none()).then(|| {
        format!(
            "{} has the UUID {uuid}, too: what is mounted by UUID may then be either",
            other.display()
        )
    })
}

/// Names a filesystem of several volumes of which not all are restored.
fn part_warning(planned: &Planned, manifest: &Manifest) -> Option<String> {
    let n = left_out(planned, manifest)?.n;
    Some(format!(
        "volume {n} is not restored, and holds a filesystem together with one that is"
    ))
}

/// A volume that is not restored, of a filesystem of which another is.
fn left_out<'a>(planned: &Planned, manifest: &'a Manifest) -> Option<&'a VolumeManifest> {
    let chosen = planned.volumes.iter().map(|wanted| &wanted.volume);
    manifest.volumes.iter().find(|volume| {
        volume.group.is_some()
            && chosen.clone().all(|chosen| chosen.n != volume.n)
            && chosen.clone().any(|chosen| chosen.group == volume.group)
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

impl Planned {
    fn reports(&self) -> Vec<TargetReport> {
        let volumes = self.volumes.iter().map(|wanted| TargetReport {
            n: wanted.volume.n,
            path: wanted.path.display().to_string(),
            new_uuid: wanted.new_uuid.map(|new| new.to_string()),
            subvolume: wanted.volume.subvolume.clone(),
        });
        let streams = self.streams.iter().map(|stream| TargetReport {
            n: stream.n,
            path: stream.target.clone(),
            new_uuid: None,
            subvolume: None,
        });
        volumes.chain(streams).collect()
    }
}

/// A part of an image that was chosen.
enum Part<'a> {
    Volume(&'a VolumeManifest),
    Stream(&'a StreamManifest),
}

/// Which volume or stream goes where.
///
/// # Errors
/// [`Kind::Confirm`] if there are several and none was chosen; [`Kind::Usage`] for a number that does
/// not exist or is named twice.
fn choose<'a>(
    manifest: &'a Manifest,
    targets: &[(u32, PathBuf)],
) -> Result<Vec<(Part<'a>, PathBuf)>> {
    if let [(0, root)] = targets
        && let Some(tree) = stream::tree(manifest, root)
    {
        let parts = tree.into_iter();
        return Ok(parts
            .map(|(stream, target)| (Part::Stream(stream), target))
            .collect());
    }
    let volumes = manifest.volumes.len();
    let mut chosen = Vec::new();
    let mut taken: Vec<(usize, &PathBuf)> = Vec::new();
    for (number, path) in targets {
        let index = match (*number, volumes + manifest.streams.len()) {
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
        let part = match (manifest.volumes.get(index), index.checked_sub(volumes)) {
            (Some(volume), _) => Some(Part::Volume(volume)),
            (None, Some(index)) => manifest.streams.get(index).map(Part::Stream),
            (None, None) => None,
        };
        let part = part.ok_or_else(|| {
            Error::new(Kind::Usage, format!("the image holds no volume {number}"))
        })?;
        if taken
            .iter()
            .any(|(other, target)| *other == index || *target == path)
        {
            return Err(Error::new(Kind::Usage, "a volume or a target is named twice").on(path));
        }
        taken.push((index, path));
        chosen.push((part, path.clone()));
    }
    Ok(chosen)
}

fn with_salvage_hint(error: Error) -> Error {
    match error.kind() {
        Kind::Damaged | Kind::Truncated => {
            error.hint("--salvage writes all that is whole, and zeros for the rest")
        }
        _ => error,
    }
}

/// The targets of what was chosen; everything else is checked and dropped.
#[derive(Default)]
struct Targets<'a> {
    volumes: Vec<(u32, Target)>,
    streams: Vec<Receiving<'a>>,
}

impl Targets<'_> {
    fn of(&self, volume: u32) -> Option<&Target> {
        self.volumes
            .iter()
            .find(|(number, _)| *number == volume)
            .map(|(_, target)| target)
    }
}

impl Receive for Targets<'_> {
    fn abandon(&self) {
        self.streams.iter().for_each(|stream| stream.abandon());
    }

    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        if let Some(target) = self.of(volume) {
            return target.write(offset, bytes);
        }
        let mut streams = self.streams.iter();
        let stream = streams.find(|stream| stream.number() == volume);
        stream.map_or(Ok(()), |stream| stream.push(offset, bytes))
    }

    fn zeros(&self, volume: u32, extent: Extent) -> Result<()> {
        self.of(volume).map_or(Ok(()), |target| target.zero(extent))
    }

    /// An earlier pass wrote there what was in use before the instant.
    fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
        self.zeros(volume, extent)
    }
}
