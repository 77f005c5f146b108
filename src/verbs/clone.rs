//! `clone`: a source that holds still, straight to a device or raw file.

use std::os::fd::AsFd;
use std::path::PathBuf;

use holdstill_platform::btrfs::Filesystem;
use holdstill_platform::device::{Access, Disk};
use serde::Serialize;
use uuid::Uuid;

use crate::destination::apart::{refuse_as_target, refuse_printing_on, refuse_shared};
use crate::destination::compare::Comparison;
use crate::destination::fit::Fit;
use crate::destination::new_ids;
use crate::destination::overwritten::{Confirm, Question};
use crate::destination::subvolume;
use crate::destination::target_name;
use crate::destination::twin;
use crate::destination::{Candidate, Target};
use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::freeze::plan::Plan;
use crate::freeze::session::{Hooks, Session, Watched};
use crate::freeze::step::AnyStep;
use crate::freeze::stills::{Copier, copy_all, expect_hooks};
use crate::freeze::{Context, CowRoom, Pass, Proof, Purpose, Still, Turn};
use crate::fs::{self, Needs};
use crate::image::manifest::{CommitProof, FreezeTimes, Grade};
use crate::pipeline::Bounds;
use crate::pipeline::copy::copy;
use crate::pipeline::read::{OnReadError, Reading};
use crate::pipeline::receive::Receive;
use crate::progress::{Event, Progress};
use crate::source::whole;
use crate::units::{ByteLen, Offset};

/// What to clone, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The source as the user wrote it.
    pub source: String,
    /// The target: a device, a raw file, or a file to be made.
    pub target: PathBuf,
    /// A step by name, or `None` for the first that applies.
    pub freeze: Option<AnyStep>,
    /// Room for a snapshot.
    pub cow: CowRoom,
    /// Freeze nothing.
    pub no_freeze: bool,
    /// Copy unallocated blocks too.
    pub all_blocks: bool,
    /// What to do with unreadable blocks.
    pub on_read_error: OnReadError,
    /// Discard the target first.
    pub discard: bool,
    /// Read the target back and compare.
    pub verify: bool,
    /// Write a copy that could not be used on the target.
    pub allow_unusable: bool,
    /// Let a filesystem become visible twice that must not.
    pub allow_twin: bool,
    /// Give the copy a UUID of its own.
    pub new_ids: bool,
    /// Commands around the freeze.
    pub hooks: Hooks,
    /// What it may take of the machine.
    pub bounds: Bounds,
    /// The run's id.
    pub run_id: String,
}

/// What a clone achieved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What was read.
    pub source: String,
    /// Where it went.
    pub target: String,
    /// How far it can be relied on.
    pub grade: Grade,
    /// The step that made the source hold still.
    pub freeze: String,
    /// The instant the target shows (RFC 3339).
    pub instant: String,
    /// All the time writers were blocked, in milliseconds.
    pub freeze_ms: f64,
    /// Each time they were.
    pub freezes: Vec<FreezeTimes>,
    /// The commit it shows, if it is one of a filesystem in use.
    pub commit: Option<CommitProof>,
    /// Bytes its map called used, zeros included.
    pub used_bytes: u64,
    /// What could not be read and is zeros: offset and length in bytes.
    pub unreadable: Vec<(u64, u64)>,
    /// The UUID the copy was given, if it is not the source's.
    pub new_uuid: Option<String>,
    /// Whether the target was read back and compared.
    pub verified: bool,
    /// The copy is complete, but the post-freeze command failed: what it had to release may be locked.
    pub hook_failed: bool,
    /// Seconds from the start to the end.
    pub elapsed_s: f64,
    /// What the user was warned of.
    pub warnings: Vec<String>,
}

/// What a clone would do; changes nothing.
///
/// # Errors
/// As [`run`], as far as they can be known before.
pub fn plan(options: &Options) -> Result<(Plan, Candidate)> {
    examine(&resolved(options)?)
}

/// The same, of a target by its path.
fn resolved(options: &Options) -> Result<Options> {
    Ok(Options {
        target: target_name::resolve(&options.target)?,
        ..options.clone()
    })
}

fn examine(options: &Options) -> Result<(Plan, Candidate)> {
    let plan = Plan::make(&options.source, options.freeze)?;
    plan.allow_freeze(options.no_freeze)?;
    if !plan.siblings.is_empty() {
        let what = format!(
            "it is one of {} devices of its filesystem, and a clone goes to one target",
            plan.siblings.len() + 1
        );
        return Err(Error::new(Kind::NotApplicable, what)
            .on(&plan.source.path)
            .hint(
                "backup takes all of them into one image, which restore writes to as many targets",
            ));
    }
    if plan.source.subvolume.is_some() {
        // What is not wanted is removed by the kernel.
        Filesystem::can_mount()?;
    }
    let fit = fit(&plan)?;
    let source = plan.extents()?;
    // First: whoever has the source open is also a user of a target that is the same.
    refuse_as_target(&options.target, &source, "the source")?;
    refuse_printing_on("the source", &source)?;
    let candidate = Candidate::examine(&options.target, &fit, options.allow_unusable)?;
    refuse_shared(
        "target",
        &options.target,
        candidate.extents(),
        "the source",
        &source,
    )?;
    refuse_printing_on("the target", candidate.extents())?;
    plan.refuse_cow_device(&options.cow, candidate.extents())?;
    plan.refuse_output_on_source(&options.target, options.no_freeze)?;
    if options.new_ids {
        new_ids::refuse_others(fit.fs(), "the source")
            .map_err(|error| error.on(&plan.source.path))?;
    } else if !options.allow_twin
        && plan.step.reads_the_source()
        && let Some(member) = whole::member(&plan.source)?
    {
        twin::refuse(member.fsid, &options.target, &[&options.target])?;
    }
    Ok((plan, candidate))
}

/// What the source needs of its target.
fn fit(plan: &Plan) -> Result<Fit> {
    let geometry = plan.geometries()?[0];
    if !plan.step.reads_the_source() {
        // Its node cannot be read.
        let needs = Needs::unknown(ByteLen(geometry.size));
        return Ok(Fit::of_source(&geometry, Some(fs::Kind::Apfs), needs));
    }
    let disk = Disk::open(&plan.source.path, Access::Read)?;
    let kind = fs::probe(&disk)?.map(|info| info.kind);
    let needs = Needs::of(&disk, geometry.logical_sector);
    Ok(Fit::of_source(&geometry, kind, needs))
}

/// Clones a source.
///
/// # Errors
/// Whatever went wrong; the target then holds nothing that looks like a whole filesystem.
pub fn run(
    options: &Options,
    confirm: &mut Confirm<'_>,
    progress: &dyn Progress,
) -> Result<Report> {
    let begun = std::time::Instant::now();
    let options = &resolved(options)?;
    let (mut plan, candidate) = examine(options)?;
    let exists = candidate.exists();
    let warning = fit(&plan)?.warning(&options.target, candidate.room());
    let taken = candidate.take(options.discard)?;
    if exists {
        confirm(&Question {
            target: &options.target,
            with: &options.source,
        })?;
    }
    let new_uuid = options.new_ids.then(Uuid::new_v4);
    let note = new_uuid.map_or(String::new(), |new| format!(", {}", new_ids::note(new)));
    progress.event(&Event::Plan(&format!(
        "{plan}, to {}{note}",
        options.target.display()
    )));
    let sources = [options.source.clone()];
    let run = Session::begin(
        &options.run_id,
        options.hooks.clone(),
        &sources,
        Watched::of(std::slice::from_ref(&plan), &options.run_id)?,
    )?;
    run.warn_of_shared_group(progress);
    let hooks_around_copy = expect_hooks(&run, &[plan.step.turn(options.no_freeze)]);
    let context = Context {
        run: &run,
        output: Some(taken.as_target().as_fd()),
        output_path: Some(&options.target),
        cow: &options.cow,
        no_freeze: options.no_freeze,
        hooks_around_copy,
        all_blocks: options.all_blocks,
        compare: options.verify,
        on_read_error: options.on_read_error,
        memory: options.bounds.memory,
        progress,
    };
    let (still, mut warnings) = plan.hold_still_somehow(&context)?;
    let [survey] = still.surveys() else {
        return Err(Error::new(Kind::NotApplicable, "it is not one volume").on(&plan.source.path));
    };
    warnings.extend(survey.warnings.clone());
    warnings.extend(warning);
    if !options.new_ids
        && let Some(uuid) = survey.info.as_ref().and_then(|info| info.uuid.as_ref())
    {
        warnings.push(format!(
            "source and target will both have the UUID {uuid}: what is mounted by UUID may then be either"
        ));
    }
    for warning in &warnings {
        progress.warn(warning);
    }
    let bytes = survey.bytes;
    let turn = plan.step.turn(options.no_freeze);
    if exists && turn == Turn::Shared {
        run.rehearse_hooks(progress)?;
    }
    progress.check()?;
    let target = taken.begin()?;
    progress.total(if options.verify { bytes + bytes } else { bytes });
    let mut passes = Passes {
        target: &target,
        options,
        progress,
        comparison: None,
        compared: None,
        unreadable: Vec::new(),
    };
    let held = copy_all(vec![still], &[turn], &run, &mut passes, progress)?;
    let unreadable = passes.finish()?;
    let used: ByteLen = held.iter().flat_map(|held| &held.used).copied().sum();
    let missing = || Error::new(Kind::Failed, "nothing was copied");
    let Proof {
        grade,
        instant,
        freezes,
        commit,
    } = held.into_iter().next().ok_or_else(missing)?.proof;
    progress.check()?;
    for cleared in target.cleared() {
        progress.warn(&cleared);
        warnings.push(cleared);
    }
    if let Some(wanted) = &plan.source.subvolume {
        subvolume::finish(vec![target], wanted, new_uuid, options.verify, progress)?;
    } else {
        if let Some(new) = new_uuid {
            new_ids::give(&target, new, options.verify)?;
        }
        target.finish(options.verify)?;
    }
    Ok(Report {
        source: plan.source.path.display().to_string(),
        target: options.target.display().to_string(),
        grade,
        freeze: plan.step.name().to_owned(),
        instant: instant.to_string(),
        freeze_ms: freezes
            .iter()
            .fold(0.0, |all, freeze| all + freeze.freeze_ms),
        freezes,
        commit,
        used_bytes: used.0,
        unreadable: unreadable
            .iter()
            .map(|extent| (extent.start.0, extent.len.0))
            .collect(),
        new_uuid: new_uuid.map(|new| new.to_string()),
        verified: options.verify,
        hook_failed: run.has_failed_hook(),
        elapsed_s: begun.elapsed().as_secs_f64(),
        warnings,
    })
}

/// Copies passes, and compares what there is to compare.
struct Passes<'a> {
    target: &'a Target,
    options: &'a Options,
    progress: &'a dyn Progress,
    /// From the pass to compare on, what is written is read back at once.
    comparison: Option<Comparison>,
    /// How the pass to compare ended, until that was judged.
    compared: Option<Result<()>>,
    /// What could not be read.
    unreadable: Vec<Extent>,
}

impl Copier for Passes<'_> {
    fn pass(&mut self, _: usize, pass: Pass<'_>) -> Result<()> {
        match pass.purpose {
            Purpose::Copy => {
                let whole = Whole(self.target, self.comparison.as_ref());
                let read = run_pass(pass, &whole, self.options, self.progress)?;
                self.unreadable.extend(read);
            }
            Purpose::Compare => {
                let begun = self.comparison.insert(self.target.comparison(VOLUME)?);
                self.compared = Some(run_pass(pass, begun, self.options, self.progress).map(drop));
            }
        }
        Ok(())
    }

    fn passed(&mut self, still: &dyn Still) -> Result<()> {
        let (Some(comparison), Some(compared)) = (&self.comparison, self.compared.take()) else {
            return Ok(());
        };
        // Asked also if the comparison was given up: too many differences are no fault of
        // the copy if all of them were written meanwhile.
        let differing = comparison.take_differing();
        if !differing.is_empty() && !still.has_rewritten(&differing)? {
            return Err(comparison.mismatch(&differing));
        }
        compared.map_err(|error| match error.kind() {
            Kind::Mismatch => too_busy_to_compare(self.options),
            _ => error,
        })
    }
}

impl Passes<'_> {
    /// Ends the comparison. Returns what could not be read.
    fn finish(self) -> Result<Vec<Extent>> {
        self.comparison
            .map_or(Ok(()), |comparison| comparison.finish())?;
        Ok(self.unreadable)
    }
}

fn too_busy_to_compare(options: &Options) -> Error {
    let what = "it changes too fast for a copy to be compared with it";
    Error::new(Kind::Failed, what)
        .on(&options.source)
        .hint("try when less is written to it, or without --verify")
}

fn run_pass(
    pass: Pass<'_>,
    receiver: &dyn Receive,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Vec<Extent>> {
    let reading = Reading {
        source: pass.source,
        volume: VOLUME,
        on_read_error: options.on_read_error,
        bounds: options.bounds,
    };
    Ok(copy(&reading, pass.walk, receiver, progress)?.unreadable)
}

/// The only volume of a clone.
const VOLUME: u32 = 1;

/// A target that receives the volume, and what each write is compared with when it is done.
#[derive(Debug)]
struct Whole<'a>(&'a Target, Option<&'a Comparison>);

impl Receive for Whole<'_> {
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        self.0.write(offset, bytes)?;
        self.1
            .map_or(Ok(()), |comparison| comparison.data(volume, offset, bytes))
    }

    fn zeros(&self, volume: u32, extent: Extent) -> Result<()> {
        self.0.zero(extent)?;
        self.1
            .map_or(Ok(()), |comparison| comparison.zeros(volume, extent))
    }

    /// An earlier pass wrote there what was in use before the instant.
    fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
        self.zeros(volume, extent)
    }
}
