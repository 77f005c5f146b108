//! `backup`: sources that hold still, into one image.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdstill_platform::device::Geometry;
use holdstill_platform::extents_below::Extents;
use holdstill_platform::guard::LeftoverKind;
use holdstill_platform::identity;
use holdstill_platform::output::{Output, Slot};
use holdstill_platform::zfs::Reach;
use serde::Serialize;

use crate::destination::apart::{refuse_printing_on, refuse_shared};
use crate::destination::refusal;
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::freeze::plan::{Plan, refuse_nested_holds};
use crate::freeze::session::{Hooks, PartFile, Session, Watched};
use crate::freeze::step::{self, AnyStep};
use crate::freeze::stills::{Copier, Held, copy_all, expect_hooks};
use crate::freeze::zfs::dataset::{self, Datasets, Wanted};
use crate::freeze::{Context, CowRoom, Pass, Proof, Still, Turn};
use crate::image::content::to_hex;
use crate::image::manifest::{
    Blocks, CommitProof, FreezeTimes, Grade, Manifest, StreamManifest, StreamTrailer, Trailer,
    VolumeManifest, VolumeTrailer, ZFS_SEND,
};
use crate::image::writer::ImageWriter;
use crate::pipeline::Bounds;
use crate::pipeline::read::{OnReadError, Reading};
use crate::pipeline::store::{Compression, Job, store};
use crate::pipeline::stream::store_stream;
use crate::progress::{Event, Progress};
use crate::source::{Named, Source};
use crate::storage::output::OutputSink;
use crate::verbs::estimate;

/// What to back up, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The sources as the user wrote them.
    pub sources: Vec<String>,
    /// The image; `None` for standard output.
    pub output: Option<PathBuf>,
    /// Of datasets of ZFS, all below, too.
    pub recursive: bool,
    /// A step by name, or `None` for the first that applies.
    pub freeze: Option<AnyStep>,
    /// Room for a snapshot.
    pub cow: CowRoom,
    /// How payloads are stored.
    pub compression: Compression,
    /// Freeze nothing.
    pub no_freeze: bool,
    /// Copy unallocated blocks too.
    pub all_blocks: bool,
    /// What to do with unreadable blocks.
    pub on_read_error: OnReadError,
    /// Replace an existing image.
    pub force: bool,
    /// What it may take of the machine.
    pub bounds: Bounds,
    /// Commands around the freeze.
    pub hooks: Hooks,
    /// The run's id, for the image and for what is made on the way.
    pub run_id: String,
}

/// What a backup achieved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The image, as the user named it.
    pub image: String,
    /// The id of this very file.
    pub image_id: String,
    /// The id of its content.
    pub content_id: Option<String>,
    /// The worst grade of any volume.
    pub grade: Grade,
    /// The step that made the sources hold still.
    pub freeze: String,
    /// The instant the image shows (RFC 3339).
    pub instant: String,
    /// All the time writers were blocked, in milliseconds.
    pub freeze_ms: f64,
    /// Each time they were.
    pub freezes: Vec<FreezeTimes>,
    /// Bytes the maps call used, zeros included.
    pub used_bytes: u64,
    /// Bytes of the image.
    pub stored_bytes: u64,
    /// Seconds from the start to the end.
    pub elapsed_s: f64,
    /// What the user was warned of.
    pub warnings: Vec<String>,
    /// The image is complete, but the post-freeze command failed: what it had to release may be locked.
    pub hook_failed: bool,
    /// Each volume.
    pub volumes: Vec<VolumeReport>,
    /// Each stream.
    pub streams: Vec<StreamReport>,
    /// The commit of each filesystem that was imaged at one while in use.
    pub commits: Vec<CommitProof>,
}

/// One stream of a [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamReport {
    /// Its number, behind those of the volumes.
    pub n: u32,
    /// What it is of.
    pub path: String,
    /// What wrote it.
    pub kind: String,
    /// Its length in bytes.
    pub len: u64,
    /// Its grade.
    pub grade: Grade,
    /// The instant it shows (RFC 3339).
    pub instant: String,
}

/// One volume of a [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VolumeReport {
    /// Its number, from 1.
    pub n: u32,
    /// Where it was.
    pub path: String,
    /// What is on it.
    pub fs: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes its map called used.
    pub used_bytes: u64,
    /// Its grade.
    pub grade: Grade,
    /// The instant it shows (RFC 3339).
    pub instant: String,
    /// What could not be read: offset and length in bytes.
    pub unreadable: Vec<(u64, u64)>,
}

impl Report {
    /// Whether some source blocks could not be read.
    pub fn has_unreadable(&self) -> bool {
        self.volumes
            .iter()
            .any(|volume| !volume.unreadable.is_empty())
    }
}

/// What a backup would do.
#[derive(Debug)]
pub struct Planned {
    /// What is copied block by block.
    pub volumes: Vec<Plan>,
    /// Datasets of ZFS that leave as streams; numbered behind the volumes.
    pub datasets: Vec<Wanted>,
    /// Where the image goes; `None` for standard output.
    pub output: Option<Slot>,
}

impl Planned {
    /// Whether the image becomes a regular file.
    pub fn is_file(&self) -> bool {
        self.output.as_ref().is_some_and(Slot::is_file)
    }
}

/// Says what a backup would do; changes nothing.
///
/// # Errors
/// As [`run`], as far as they can be known before.
pub fn plan(options: &Options) -> Result<Planned> {
    let mut planned = Planned {
        volumes: Vec::new(),
        datasets: Vec::new(),
        output: None,
    };
    for text in &options.sources {
        match Named::resolve(text)? {
            Named::Blocks(source) => {
                // It may be imaged already, with another device of its filesystem.
                let mut before = planned.volumes.iter();
                if let Some(plan) = before.find(|plan| plan.includes(&source)) {
                    let had = &plan.source.subvolume;
                    if had.is_some() && *had != source.subvolume {
                        let what = "of a filesystem, an image holds one subvolume or all";
                        return Err(Error::new(Kind::Usage, what)
                            .on(text)
                            .hint("make an image of each, or name the whole filesystem alone"));
                    }
                    continue;
                }
                let plan = Plan::of(*source, options.freeze)?;
                plan.allow_freeze(options.no_freeze)?;
                planned.volumes.push(plan);
            }
            Named::Dataset(name) if options.freeze.is_none_or(|it| it == step::ZFS) => {
                let reach = match options.recursive {
                    true => Reach::Below,
                    false => Reach::Alone,
                };
                planned.datasets.push(Wanted { name, reach });
            }
            Named::Dataset(name) => {
                return Err(Error::new(
                    Kind::NotApplicable,
                    "a dataset of ZFS can be imaged by `zfs` alone",
                )
                .on(name));
            }
        }
    }
    if options.recursive && planned.datasets.is_empty() {
        let what = "--recursive is for datasets of ZFS, and none was named";
        return Err(Error::new(Kind::Usage, what));
    }
    refuse_nested_holds(&planned.volumes)?;
    let mut sources = Extents::default();
    for plan in &planned.volumes {
        sources.extend(plan.extents()?);
    }
    let written = match &options.output {
        Some(path) => {
            let slot = Slot::of(path).map_err(explain_output)?;
            let written = slot.extents()?;
            refuse_shared("output", path, &written, "the source", &sources)?;
            if slot.exists() && !options.force {
                return Err(exists(path));
            }
            planned.output = Some(slot);
            for plan in &planned.volumes {
                plan.refuse_output_on_source(path, options.no_freeze)?;
            }
            written
        }
        None => Extents::of_open(std::io::stdout())?,
    };
    refuse_printing_on("the source", &sources)?;
    for plan in &planned.volumes {
        plan.refuse_cow_device(&options.cow, &written)?;
    }
    Ok(planned)
}

/// Makes the image.
///
/// # Errors
/// Whatever went wrong; nothing that looks like a whole image is left then.
pub fn run(options: &Options, progress: &dyn Progress) -> Result<Report> {
    let begun = std::time::Instant::now();
    let mut planned = plan(options)?;
    for plan in &planned.volumes {
        progress.event(&Event::Plan(&plan.to_string()));
    }
    for wanted in &planned.datasets {
        progress.event(&Event::Plan(&wanted.to_string()));
    }
    warn_of_shortage(options, &planned, progress)?;
    let run = begin(options, &planned)?;
    run.warn_of_shared_group(progress);
    let output = match &planned.output {
        Some(slot) => create_output(slot, options.force, progress)?,
        None => Output::stdout()?,
    };
    if let Some(part) = output.part_file()? {
        run.note(|record| {
            let parts = record.parts.iter_mut();
            parts.for_each(|noted| noted.inode = Some(part.inode));
        })?;
    }
    let no_freeze = options.no_freeze;
    let turns = |volumes: &[Plan]| -> Vec<Turn> {
        let turns = volumes.iter().map(|plan| plan.step.turn(no_freeze));
        turns.collect()
    };
    let of_datasets = planned.datasets.iter().map(|_| step::ZFS.turn(no_freeze));
    let all_turns = [turns(&planned.volumes), of_datasets.collect()].concat();
    let hooks_around_copy = expect_hooks(&run, &all_turns);
    let context = Context {
        run: &run,
        output: Some(output.as_fd()),
        output_path: options.output.as_deref(),
        cow: &options.cow,
        no_freeze: options.no_freeze,
        hooks_around_copy,
        all_blocks: options.all_blocks,
        compare: false,
        on_read_error: options.on_read_error,
        memory: options.bounds.memory,
        progress,
    };
    // Before anything is held: macOS lets nobody open what is, not even us.
    let geometries = planned.volumes.iter().map(Plan::geometries);
    let geometries = geometries.collect::<Result<Vec<_>>>()?.concat();
    let mut warnings = Vec::new();
    let mut stills = Vec::new();
    for plan in &mut planned.volumes {
        let (still, of_it) = plan.hold_still_somehow(&context)?;
        let about =
            |source: &Source, warning: &String| format!("{}: {warning}", source.path.display());
        let mut named: Vec<_> = of_it.iter().map(|it| about(&plan.source, it)).collect();
        for (source, survey) in plan.sources().zip(still.surveys()) {
            named.extend(survey.warnings.iter().map(|it| about(source, it)));
        }
        for warning in named {
            progress.warn(&warning);
            warnings.push(warning);
        }
        stills.push(still);
    }
    let mut datasets = Vec::new();
    for wanted in &planned.datasets {
        let group = Datasets::snapshot(wanted, &run, progress)?;
        for warning in group.warnings() {
            progress.warn(&warning);
            warnings.push(warning);
        }
        datasets.push(group);
    }
    let manifest = manifest(options, &planned.volumes, &geometries, &stills, &datasets);
    progress.total(manifest.used_bytes());
    let image_id = *uuid::Uuid::new_v4().as_bytes();
    let max_plain = options.compression.chunk_len() as u32;
    let mut image = ImageWriter::begin(
        OutputSink::new(output, progress)?,
        image_id,
        max_plain,
        &manifest,
    )?;
    let mut streams = Vec::new();
    let mut copier = IntoImage {
        options,
        image: &mut image,
        progress,
        volumes: Volumes::of(&stills),
    };
    // Known only now: where a snapshot could not be made, another step was taken.
    let turns = turns(&planned.volumes);
    let held = copy_all(stills, &turns, &run, &mut copier, progress)?;
    let volumes = copier.volumes.trailers(&held);
    let mut proofs: Vec<Proof> = held.into_iter().map(|held| held.proof).collect();
    let mut numbers = manifest.streams.iter().map(|stream| stream.n);
    for group in datasets {
        // In this order: the other way round it would take a number too many.
        for (description, n) in group.descriptions.iter().zip(numbers.by_ref()) {
            let (sent, mut reader) = Datasets::send(description)?;
            let Options {
                compression,
                bounds,
                ..
            } = *options;
            let len = store_stream(&mut reader, n, compression, bounds, &mut image, progress)?;
            let proof = group.sent(description, sent)?;
            streams.push(StreamTrailer {
                n,
                grade: proof.grade,
                instant: proof.instant.to_string(),
                len: len.0,
            });
            proofs.push(proof);
        }
        group.finish(progress);
    }
    if let Some(warning) = instants_apart(&manifest, &volumes, &streams) {
        progress.warn(&warning);
        warnings.push(warning);
    }
    let content_id = image.content_id()?.map(|id| to_hex(&id));
    let trailer = Trailer {
        volumes,
        streams,
        ..trailer(&planned, &proofs, content_id, warnings)?
    };
    let (sink, written) = image.finish(&trailer)?;
    progress.check()?;
    sink.into_output()?.publish().map_err(explain_output)?;
    Ok(Report {
        image: options
            .output
            .as_ref()
            .map_or("-".to_owned(), |path| path.display().to_string()),
        image_id: to_hex(&image_id),
        content_id: trailer.content_id,
        grade: trailer.grade,
        freeze: trailer.freeze,
        instant: trailer.instant,
        freeze_ms: trailer.freeze_ms,
        freezes: trailer.freezes,
        used_bytes: trailer.volumes.iter().map(|volume| volume.used_bytes).sum(),
        stored_bytes: written.len.0,
        elapsed_s: begun.elapsed().as_secs_f64(),
        warnings: trailer.warnings,
        hook_failed: run.has_failed_hook(),
        volumes: volume_reports(manifest.volumes, trailer.volumes),
        streams: stream_reports(manifest.streams, trailer.streams),
        commits: trailer.commits,
    })
}

/// Tells before the copy if the image may not find room.
fn warn_of_shortage(options: &Options, planned: &Planned, progress: &dyn Progress) -> Result<()> {
    let Some(path) = options.output.as_ref().filter(|_| planned.is_file()) else {
        return Ok(());
    };
    let sources = planned.volumes.iter().flat_map(Plan::sources);
    let most = sources.filter_map(estimate::used_bytes).sum();
    if let Some(warning) = estimate::shortage(path, most, estimate::free_bytes(path)?) {
        progress.warn(&warning);
    }
    Ok(())
}

/// Begins the run, with a guard if something will be frozen, or if the image will have a name before
/// it is whole and this user may keep records.
fn begin(options: &Options, planned: &Planned) -> Result<Session> {
    let mut watched = Watched::of(&planned.volumes, &options.run_id)?;
    for wanted in &planned.datasets {
        watched.is_guarded = true;
        watched.undo.extend(dataset::undo(wanted, &options.run_id)?);
    }
    let freezes = watched.is_guarded;
    let part = planned.output.as_ref().and_then(|slot| {
        let name = slot.part_file()?;
        Some((slot.folder(), name))
    });
    let begin = |is_guarded| {
        let watched = Watched {
            is_guarded,
            ..watched.clone()
        };
        let hooks = options.hooks.clone();
        Session::begin(&options.run_id, hooks, &options.sources, watched)
    };
    let run = match begin(freezes || part.is_some()) {
        Err(error) if !freezes && error.kind() == Kind::Permission => begin(false)?,
        run => run?,
    };
    if let Some((folder, name)) = part {
        let path = folder.path()?.join(name);
        run.note(|record| record.parts.push(PartFile { path, inode: None }))?;
        // Forgotten only with the run: gone by then, or renamed.
        let _ = run.register(folder, &name.to_string_lossy(), LeftoverKind::File)?;
    }
    Ok(run)
}

/// What was copied of each volume of the image.
struct Volumes {
    /// The number of the first volume of each source, in their order, and one more.
    first: Vec<u32>,
    copied: Vec<Copied>,
}

#[derive(Clone, Debug, Default)]
struct Copied {
    /// How many passes went over it.
    passes: u32,
    /// What could not be read.
    unreadable: Vec<Extent>,
}

impl Volumes {
    fn of(stills: &[Box<dyn Still>]) -> Self {
        let mut first = vec![1];
        let mut next = 1;
        for still in stills {
            next += still.surveys().len() as u32;
            first.push(next);
        }
        Self {
            copied: vec![Copied::default(); next as usize - 1],
            first,
        }
    }

    /// What is said of them at the end, by what their sources are worth.
    fn trailers(self, held: &[Held]) -> Vec<VolumeTrailer> {
        let of_each = held
            .iter()
            .flat_map(|held| held.used.iter().map(move |used| (held, used)));
        let volumes = (1..).zip(of_each).zip(self.copied);
        let volumes = volumes.map(|((n, (held, used)), copied)| VolumeTrailer {
            n,
            grade: held.proof.grade,
            instant: held.proof.instant.to_string(),
            used_bytes: used.0,
            unreadable: copied
                .unreadable
                .iter()
                .map(|extent| (extent.start.0, extent.len.0))
                .collect(),
        });
        volumes.collect()
    }
}

/// Copies the passes of all sources into the image.
struct IntoImage<'a, 'b> {
    options: &'a Options,
    image: &'a mut ImageWriter<OutputSink<'b>>,
    progress: &'a dyn Progress,
    volumes: Volumes,
}

impl Copier for IntoImage<'_, '_> {
    fn pass(&mut self, still: usize, pass: Pass<'_>) -> Result<()> {
        let volume = self.volumes.first[still] + pass.volume as u32;
        let copied = &mut self.volumes.copied[volume as usize - 1];
        let job = Job {
            reading: Reading {
                source: pass.source,
                volume,
                on_read_error: self.options.on_read_error,
                bounds: self.options.bounds,
            },
            pass: copied.passes,
            compression: self.options.compression,
        };
        let stored = store(&job, pass.walk, self.image, self.progress)?;
        copied.unreadable.extend(stored.unreadable);
        copied.passes += 1;
        Ok(())
    }
}

fn manifest(
    options: &Options,
    plans: &[Plan],
    geometries: &[Geometry],
    stills: &[Box<dyn Still>],
    datasets: &[Datasets],
) -> Manifest {
    let descriptions = datasets.iter().flat_map(|group| &group.descriptions);
    let volumes = stills.iter().map(|still| still.surveys().len());
    let streams = (1 + volumes.sum::<usize>() as u32..).zip(descriptions);
    let streams = streams.map(|(n, description)| StreamManifest {
        n,
        path: description.dataset.clone(),
        kind: ZFS_SEND.to_owned(),
        zfs: Some(description.clone()),
    });
    let streams = streams.collect();
    let sources = plans
        .iter()
        .flat_map(|plan| plan.sources().map(move |source| (plan, source)));
    let surveys = stills.iter().flat_map(|still| {
        let surveys = still.surveys().iter().enumerate();
        surveys.map(move |(volume, survey)| (still.geometry(volume), survey))
    });
    let volumes = (1..).zip(sources).zip(geometries).zip(surveys);
    let volumes = volumes.map(|(((n, (plan, source)), of_source), (of_copy, survey))| {
        let geometry = of_copy.as_ref().unwrap_or(of_source);
        let info = survey.info.as_ref();
        let uuid = info.and_then(|info| info.uuid.clone());
        VolumeManifest {
            n,
            path: source.path.display().to_string(),
            fs: info.map(|info| info.kind.name().to_owned()),
            label: info.and_then(|info| info.label.clone()),
            group: uuid.clone().filter(|_| !plan.siblings.is_empty()),
            subvolume: plan.source.subvolume.clone(),
            uuid,
            mount_point: source
                .mount
                .as_ref()
                .map(|mount| mount.point.display().to_string()),
            size: geometry.size,
            logical_sector: geometry.logical_sector,
            physical_sector: geometry.physical_sector,
            smallest_target: survey.needs.smallest.0.min(geometry.size),
            largest_target: survey.needs.largest.map(|bytes| bytes.0),
            sector_size: survey.needs.sector,
            blocks: survey.blocks,
            used_bytes: survey.bytes.0,
        }
    });
    Manifest {
        tool: concat!("holdstill ", env!("CARGO_PKG_VERSION")).to_owned(),
        created: jiff::Timestamp::now().to_string(),
        run_id: options.run_id.clone(),
        compress: options.compression.to_string(),
        host: identity::host(),
        machine_id: identity::machine_id(),
        parent: None,
        volumes: volumes.collect(),
        streams,
    }
}

/// What the user should know if not all is of one instant.
fn instants_apart(
    manifest: &Manifest,
    volumes: &[VolumeTrailer],
    streams: &[StreamTrailer],
) -> Option<String> {
    let paths = manifest.volumes.iter().map(|volume| &volume.path);
    let paths = paths.chain(manifest.streams.iter().map(|stream| &stream.path));
    let instants = volumes.iter().map(|volume| &volume.instant);
    let instants: Vec<_> = instants
        .chain(streams.iter().map(|stream| &stream.instant))
        .collect();
    let first = instants.first()?;
    if instants.iter().all(|instant| instant == first) {
        return None;
    }
    let of_each = paths.zip(&instants);
    let of_each: Vec<_> = of_each.map(|(path, at)| format!("{path} {at}")).collect();
    Some(format!(
        "the sources are not of one instant: {}",
        of_each.join(", ")
    ))
}

/// All of a trailer but for its volumes and streams.
fn trailer(
    planned: &Planned,
    proofs: &[Proof],
    content_id: Option<String>,
    warnings: Vec<String>,
) -> Result<Trailer> {
    let nothing = || Error::new(Kind::Usage, "no source was named");
    let grade = proofs
        .iter()
        .map(|proof| proof.grade)
        .max()
        .ok_or_else(nothing)?;
    let instant = proofs
        .iter()
        .map(|proof| proof.instant)
        .max()
        .ok_or_else(nothing)?;
    let mut steps: Vec<&str> = planned
        .volumes
        .iter()
        .map(|plan| plan.step.name())
        .chain(planned.datasets.iter().map(|_| step::ZFS.name()))
        .collect();
    steps.dedup();
    let freezes: Vec<FreezeTimes> = proofs
        .iter()
        .flat_map(|proof| proof.freezes.clone())
        .collect();
    Ok(Trailer {
        grade,
        freeze: steps.join(", "),
        instant: instant.to_string(),
        freeze_ms: blocked_ms(proofs),
        freezes,
        content_id,
        warnings,
        volumes: Vec::new(),
        streams: Vec::new(),
        commits: proofs
            .iter()
            .filter_map(|proof| proof.commit.clone())
            .collect(),
    })
}

/// How long writers were blocked, in milliseconds: freezes at one instant count once.
fn blocked_ms(proofs: &[Proof]) -> f64 {
    let mut alone = 0.0;
    let mut at_instants = BTreeMap::new();
    for proof in proofs {
        let is_last = |freeze: &&FreezeTimes| freeze.purpose == "final";
        let (last, others): (Vec<_>, Vec<_>) = proof.freezes.iter().partition(is_last);
        let sum = |freezes: &[&FreezeTimes]| freezes.iter().fold(0.0, |all, it| all + it.freeze_ms);
        alone += sum(&others);
        let longest: &mut f64 = at_instants.entry(proof.instant).or_default();
        *longest = longest.max(sum(&last));
    }
    at_instants
        .values()
        .fold(alone, |all, longest| all + longest)
}

fn stream_reports(
    manifests: Vec<StreamManifest>,
    trailers: Vec<StreamTrailer>,
) -> Vec<StreamReport> {
    let both = manifests.into_iter().zip(trailers);
    both.map(|(stream, trailer)| StreamReport {
        n: stream.n,
        path: stream.path,
        kind: stream.kind,
        len: trailer.len,
        grade: trailer.grade,
        instant: trailer.instant,
    })
    .collect()
}

fn volume_reports(
    manifests: Vec<VolumeManifest>,
    trailers: Vec<VolumeTrailer>,
) -> Vec<VolumeReport> {
    let both = manifests.into_iter().zip(trailers);
    both.map(|(volume, trailer)| VolumeReport {
        n: volume.n,
        path: volume.path,
        fs: volume.fs,
        label: volume.label,
        uuid: volume.uuid,
        size: volume.size,
        used_bytes: trailer.used_bytes,
        grade: trailer.grade,
        instant: trailer.instant,
        unreadable: trailer.unreadable,
    })
    .collect()
}

fn exists(path: &Path) -> Error {
    Error::new(Kind::Exists, "the output exists already")
        .on(path)
        .hint("--force replaces it")
}

/// How often we look whether somebody reads a pipe, and whether the run was asked to stop.
const PATIENCE: Duration = Duration::from_millis(100);

/// Creates the output. A pipe is waited for until somebody reads it.
fn create_output(slot: &Slot, force: bool, progress: &dyn Progress) -> Result<Output> {
    loop {
        match slot.create(force) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                progress.check()?;
                std::thread::sleep(PATIENCE);
            }
            other => return other.map_err(explain_output),
        }
    }
}

/// An existing file and a device as output are refusals, not failures.
fn explain_output(error: holdstill_platform::error::Error) -> Error {
    match error.source.kind() {
        std::io::ErrorKind::AlreadyExists => exists(&error.what),
        _ => refusal(error),
    }
}

/// How a volume's blocks are called for people.
pub fn blocks_text(blocks: Blocks) -> &'static str {
    match blocks {
        Blocks::Used => "used blocks",
        Blocks::All => "all blocks",
    }
}
