//! `--dry-run`: what a verb would do, found out without changing anything.

use std::path::Path;

use serde::Serialize;

use crate::destination::overwritten::Overwritten;
use crate::error::Result;
use crate::freeze::plan::{Plan, StepReport};
use crate::freeze::step;
use crate::source::Source;
use crate::verbs::backup;
use crate::verbs::clone;
use crate::verbs::estimate::{free_bytes, used_bytes};
use crate::verbs::restore;

/// What would be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Always true: tells this result from that of the real thing.
    pub dry_run: bool,
    /// What would be copied where, in order.
    pub actions: Vec<Action>,
}

/// One copy that would be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Action {
    /// What would be read.
    pub source: String,
    /// What would be written.
    pub target: String,
    /// Whether something is there that would be overwritten.
    pub overwrites: bool,
    /// What that is, of a target of restore or clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub now: Option<Overwritten>,
    /// Whether the copy would get UUIDs of its own.
    pub new_ids: bool,
    /// About how many bytes would be copied, if that can be told. An image is no larger than that.
    pub used_bytes: Option<u64>,
    /// How many bytes are free where a file would be written.
    pub free_bytes: Option<u64>,
    /// How the source would be made to hold still, where it has to be.
    pub step: Option<String>,
    /// Steps that come earlier, and why they do not apply.
    pub passed_over: Vec<StepReport>,
}

impl Action {
    fn new(plan: &Plan, source: &Source, target: String, overwrites: bool) -> Self {
        let passed_over = plan.passed_over.iter().map(|(step, why)| StepReport {
            step: step.name().to_owned(),
            objection: Some(why.clone()),
        });
        Self {
            source: source.path.display().to_string(),
            target,
            overwrites,
            now: None,
            new_ids: false,
            used_bytes: used_bytes(source).map(|bytes| bytes.0),
            free_bytes: None,
            step: Some(plan.step.name().to_owned()),
            passed_over: passed_over.collect(),
        }
    }
}

/// What a backup would do.
///
/// # Errors
/// What would keep it from being done, as far as that can be known.
pub fn backup(options: &backup::Options) -> Result<Report> {
    let output = options.output.as_ref();
    let target = output.map_or("-".to_owned(), |path| path.display().to_string());
    let overwrites = output.is_some_and(|path| path.is_file());
    let planned = backup::plan(options)?;
    let volumes = planned.volumes.iter().flat_map(|plan| {
        let action = |source| Action::new(plan, source, target.clone(), overwrites);
        plan.sources().map(action).collect::<Vec<_>>()
    });
    let datasets = planned.datasets.iter().map(|wanted| Action {
        source: wanted.name.clone(),
        target: target.clone(),
        overwrites,
        now: None,
        new_ids: false,
        used_bytes: None,
        free_bytes: None,
        step: Some(step::ZFS.name().to_owned()),
        passed_over: Vec::new(),
    });
    let mut actions: Vec<Action> = volumes.chain(datasets).collect();
    if let Some(path) = output.filter(|_| planned.is_file()) {
        let free = free_bytes(path)?;
        actions
            .iter_mut()
            .for_each(|it| it.free_bytes = Some(free.0));
    }
    Ok(Report {
        dry_run: true,
        actions,
    })
}

/// What a clone would do.
///
/// # Errors
/// As [`backup()`].
pub fn clone(options: &clone::Options) -> Result<Report> {
    let (plan, candidate) = clone::plan(options)?;
    let target = options.target.display().to_string();
    Ok(Report {
        dry_run: true,
        actions: vec![Action {
            new_ids: options.new_ids,
            now: candidate.exists().then(|| Overwritten::of(&options.target)),
            free_bytes: match candidate.exists() {
                true => None,
                false => Some(free_bytes(&options.target)?.0),
            },
            ..Action::new(&plan, &plan.source, target, candidate.exists())
        }],
    })
}

/// What a restore would do.
///
/// # Errors
/// As [`backup()`].
pub fn restore(options: &restore::Options) -> Result<Report> {
    let planned = restore::plan(options)?;
    let action = |what: String, used: Option<u64>, target: String, overwrites: bool| Action {
        used_bytes: used,
        free_bytes: (!overwrites && used.is_some() && target != "-")
            .then(|| free_bytes(Path::new(&target)).ok())
            .flatten()
            .map(|free| free.0),
        source: format!("{what} of {}", options.image.display()),
        now: overwrites.then(|| Overwritten::of(Path::new(&target))),
        target,
        overwrites,
        new_ids: options.new_ids,
        step: None,
        passed_over: Vec::new(),
    };
    let to_stdout = planned.to_stdout.iter();
    let to_stdout = to_stdout.map(|volume| {
        let used = Some(volume.used_bytes);
        action(format!("volume {}", volume.n), used, "-".to_owned(), false)
    });
    let volumes = planned.volumes.iter().map(|wanted| {
        let mut what = format!("volume {}", wanted.volume.n);
        if let Some(subvolume) = &wanted.volume.subvolume {
            what = format!("subvolume {} from {what}", subvolume.path);
        }
        let target = wanted.path.display().to_string();
        let used = Some(wanted.volume.used_bytes);
        action(what, used, target, wanted.candidate.exists())
    });
    let streams = planned.streams.iter();
    let streams = streams.map(|stream| {
        action(
            format!("stream {}", stream.n),
            None,
            stream.target.clone(),
            false,
        )
    });
    let actions = to_stdout.chain(volumes).chain(streams);
    Ok(Report {
        dry_run: true,
        actions: actions.collect(),
    })
}
