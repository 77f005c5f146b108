//! One run of the program: its id, its guard process, its record on disk, and its hooks.
//!
//! Order matters. The guard is forked while the process is small and has one thread; the record is on
//! disk before anything is frozen or created; the post-freeze hook is owed from the moment before the
//! pre-freeze hook starts, and the guard runs it even if this process is killed.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdstill_platform::command::{Ending, Output, Tool};
use holdstill_platform::guard::{Config, Guard, Hook, HookEnd, Leftover, LeftoverKind, Owed, Undo};
use holdstill_platform::records::{Record, Records};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::freeze::apfs::Leavings;
use crate::plan::Plan;
use crate::progress::Progress;

/// How long the pre-freeze hook may take, and the post-freeze hook.
pub const HOOK_DEADLINE: Duration = Duration::from_secs(60);

/// Commands of the user around the freeze, run by `/bin/sh -c`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Before the (final) freeze: if it fails, nothing is frozen.
    pub pre: Option<String>,
    /// Right after the thaw; always once the first was started.
    pub post: Option<String>,
}

/// What a run writes down before it does it, for `cleanup` after a power cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The process.
    pub pid: u32,
    /// When it began (RFC 3339).
    pub begun: String,
    /// Mount points it may have frozen.
    pub mount_points: Vec<PathBuf>,
    /// Write-tracking instance, if any.
    pub trace_instance: Option<String>,
    /// Files that are not whole yet.
    #[serde(default)]
    pub parts: Vec<PartFile>,
    /// Snapshots of LVM it may have made: `GROUP/NAME`.
    #[serde(default)]
    pub lvm_snapshots: Vec<String>,
    /// Thin pools whose metadata it may have made a snapshot of, by their names in /dev/mapper.
    #[serde(default)]
    pub thin_pools: Vec<String>,
    /// Devices of the device mapper it may have made, by name.
    #[serde(default)]
    pub dm_devices: Vec<String>,
    /// Snapshots of ZFS it may have made: `POOL/NAME@SNAPSHOT`.
    #[serde(default)]
    pub zfs_snapshots: Vec<String>,
    /// Volumes of ZFS whose property `snapdev` it may have set, and what was set before, if anything.
    #[serde(default)]
    pub zfs_snapdev: Vec<(String, Option<String>)>,
    /// What it may have made to copy volumes of APFS; not what it has taken away again.
    #[serde(default)]
    pub apfs: Vec<Leavings>,
}

/// A file that is not whole yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartFile {
    /// Where it is, by a name that nobody could guess before it was made.
    pub path: PathBuf,
    /// Its inode; absent until it was made.
    pub inode: Option<u64>,
}

/// What of a run has to be watched over.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// Something will be frozen or created: a guard and a record are needed.
    pub is_guarded: bool,
    /// What the guard may have to undo.
    pub undo: Vec<Undo>,
    /// How often something is frozen or held for the last time: after so many the post-freeze command
    /// runs.
    pub freezes: usize,
}

impl Watched {
    /// What these plans need.
    ///
    /// # Errors
    /// If a tool to undo something is missing.
    pub fn of(plans: &[Plan], run_id: &str) -> Result<Self> {
        let undo = plans.iter().map(|plan| plan.undo(run_id));
        Ok(Self {
            is_guarded: plans.iter().any(|plan| plan.step.needs_guard()),
            undo: undo.collect::<Result<Vec<_>>>()?.concat(),
            freezes: plans.len(),
        })
    }
}

/// A run. Clones are the same run.
#[derive(Clone, Debug)]
pub struct Run(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: String,
    hooks: Hooks,
    sources: String,
    guarded: Option<Guarded>,
    hook_state: Mutex<HookState>,
}

/// What only runs that freeze or create something have.
#[derive(Debug)]
struct Guarded {
    /// `None` only while being dropped.
    guard: Option<Guard>,
    record: Mutex<(RunRecord, Option<Record>)>,
}

/// How many freezes are still to come, and whether the pre-freeze hook ran.
#[derive(Debug)]
struct HookState {
    freezes_left: usize,
    is_owed: bool,
}

impl Run {
    /// Begins a run over `sources`.
    ///
    /// # Errors
    /// If the guard cannot be started, or the record not be written.
    pub fn begin(id: &str, hooks: Hooks, sources: &[String], watched: Watched) -> Result<Self> {
        let sources_text = sources.join("\n");
        let freezes = watched.freezes;
        let guarded = if watched.is_guarded || hooks.post.is_some() {
            Some(Guarded::begin(id, &hooks, &sources_text, watched.undo)?)
        } else {
            None
        };
        Ok(Self(Arc::new(Inner {
            id: id.to_owned(),
            hooks,
            sources: sources_text,
            guarded,
            hook_state: Mutex::new(HookState {
                freezes_left: freezes,
                is_owed: false,
            }),
        })))
    }

    /// The run's id.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// The guard.
    ///
    /// # Errors
    /// If the run was begun without one.
    pub fn guard(&self) -> Result<&Guard> {
        let missing = || Error::new(Kind::Failed, "this run has no guard process");
        self.maybe_guard().ok_or_else(missing)
    }

    fn maybe_guard(&self) -> Option<&Guard> {
        self.0.guarded.as_ref()?.guard.as_ref()
    }

    /// Whether the guard still lives: asked between steps, so that nothing is frozen without one.
    ///
    /// # Errors
    /// If it was killed or stopped.
    pub fn check_guard(&self) -> Result<()> {
        let lost =
            |error| Error::from(error).hint("without its guard process holdstill freezes nothing");
        self.maybe_guard()
            .map_or(Ok(()), |guard| guard.check().map_err(lost))
    }

    /// Writes down what is about to be done. It is on disk when this returns.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn note(&self, change: impl FnOnce(&mut RunRecord)) -> Result<()> {
        let Some(guarded) = &self.0.guarded else {
            return Ok(());
        };
        let mut record = guarded
            .record
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        change(&mut record.0);
        let json = to_json(&record.0)?;
        match &record.1 {
            Some(on_disk) => Ok(on_disk.update(&json)?),
            None => Ok(()),
        }
    }

    /// Has the guard remove `name` in `folder` should this process die. Register first, create then.
    ///
    /// # Errors
    /// If the guard is lost.
    pub fn register(
        &self,
        folder: impl AsFd,
        name: &str,
        kind: LeftoverKind,
    ) -> Result<Option<Leftover>> {
        let guard = self.maybe_guard();
        let registered = guard.map(|guard| guard.register(folder, OsStr::new(name), kind));
        Ok(registered.transpose()?)
    }

    /// What was registered is gone, or has become what it was meant to be.
    pub fn forget(&self, leftover: Option<Leftover>) {
        if let (Some(guard), Some(leftover)) = (self.maybe_guard(), leftover)
            && let Err(error) = guard.forget(leftover)
        {
            log::debug!("{error}");
        }
    }

    /// From now on what [`Watched::undo`] says under this name is undone when the run ends, until
    /// [`undone`](Self::undone). To be called before there is anything to undo.
    ///
    /// # Errors
    /// If the run has no guard, or it is lost.
    pub fn owe_undo(&self, name: &str) -> Result<Owed> {
        Ok(self.guard()?.owe_undo(name)?)
    }

    /// It was undone.
    pub fn undone(&self, owed: Owed) {
        if let Some(guard) = self.maybe_guard()
            && let Err(error) = guard.forget_undo(owed)
        {
            log::debug!("{error}");
        }
    }

    /// To be called right before a source's (final) freeze: runs the pre-freeze hook, once.
    ///
    /// # Errors
    /// [`Kind::Tool`] if it fails: then nothing must be frozen.
    pub fn before_freeze(&self) -> Result<()> {
        let mut state = self
            .0
            .hook_state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if state.is_owed {
            return Ok(());
        }
        if let Some(guard) = self.maybe_guard() {
            guard.owe_hook()?;
        }
        state.is_owed = true;
        let Some(script) = &self.0.hooks.pre else {
            return Ok(());
        };
        let mut tool = Tool::shell(script).deadline(HOOK_DEADLINE);
        for (name, value) in hook_env(&self.0.id, &self.0.sources, "pre") {
            tool = tool.env(name, value);
        }
        tool.run()
            .and_then(Output::checked)
            .map(drop)
            .map_err(|error| {
                Error::new(
                    Kind::Tool,
                    "the pre-freeze command failed, so nothing is frozen",
                )
                .because(error)
            })
    }

    /// To be called right after a source's thaw (or last read, where nothing is frozen): after that
    /// of the last source the post-freeze hook runs.
    pub fn after_thaw(&self, progress: &dyn Progress) {
        let mut state = self
            .0
            .hook_state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.freezes_left = state.freezes_left.saturating_sub(1);
        if state.freezes_left > 0 || !state.is_owed || self.0.hooks.post.is_none() {
            return;
        }
        drop(state);
        self.run_post_hook(progress);
    }

    /// Runs both hooks, one right after the other, before a target is touched: a pre-freeze hook that fails
    /// only when all was copied would have cost what was on the target.
    ///
    /// # Errors
    /// As [`before_freeze`](Self::before_freeze).
    pub fn rehearse_hooks(&self, progress: &dyn Progress) -> Result<()> {
        if self.0.hooks == Hooks::default() {
            return Ok(());
        }
        self.before_freeze()?;
        self.run_post_hook(progress);
        let state = self.0.hook_state.lock();
        state.unwrap_or_else(PoisonError::into_inner).is_owed = false;
        Ok(())
    }

    fn run_post_hook(&self, progress: &dyn Progress) {
        let Some(guard) = self.maybe_guard() else {
            return;
        };
        let trouble = match guard.run_hook() {
            Ok(Some(HookEnd::Ran(Ending::Exit(0)))) => None,
            Ok(Some(HookEnd::Ran(ending))) => Some(ending.to_string()),
            Ok(Some(HookEnd::NotStarted(errno))) => {
                Some(std::io::Error::from_raw_os_error(errno).to_string())
            }
            Ok(None) => None,
            Err(error) => Some(error.to_string()),
        };
        if let Some(trouble) = trouble {
            progress.warn(&format!("the post-freeze command failed: {trouble}"));
        }
    }
}

/// Ends the run, however it went: the guard does what is left to do (the hook, if it is still owed),
/// and the record goes. Only a run that is killed, or could not take away what nothing but its record tells
/// of, leaves it, for `cleanup`.
impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.guard.take().map(Guard::finish) {
            log::warn!("{error}");
        }
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        if !record.0.apfs.is_empty() {
            return;
        }
        if let Some(Err(error)) = record.1.take().map(Record::remove) {
            log::warn!("{error}");
        }
    }
}

impl Guarded {
    fn begin(id: &str, hooks: &Hooks, sources: &str, undo: Vec<Undo>) -> Result<Self> {
        let content = RunRecord {
            pid: std::process::id(),
            begun: jiff::Timestamp::now().to_string(),
            ..RunRecord::default()
        };
        let record = Records::default().create(id, &to_json(&content)?)?;
        let hook = hooks.post.as_ref().map(|script| Hook {
            script: OsString::from(script),
            env: hook_env(id, sources, "post")
                .map(|(name, value)| (name.into(), value.into()))
                .to_vec(),
            deadline: HOOK_DEADLINE,
        });
        let keep = vec![record.lock().as_fd()];
        let guard = Guard::spawn(Config { hook, undo, keep })?;
        Ok(Self {
            guard: Some(guard),
            record: Mutex::new((content, Some(record))),
        })
    }
}

fn hook_env<'a>(id: &'a str, sources: &'a str, phase: &'a str) -> [(&'static str, &'a str); 3] {
    [
        ("HOLDSTILL_RUN_ID", id),
        ("HOLDSTILL_SOURCE", sources),
        ("HOLDSTILL_PHASE", phase),
    ]
}

fn to_json(record: &RunRecord) -> Result<Vec<u8>> {
    serde_json::to_vec(record)
        .map_err(|source| Error::new(Kind::Failed, "cannot describe the run").because(source))
}
