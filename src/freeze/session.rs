//! One run of the program, a session: its id, its guard process, its record on disk, and its hooks.
//!
//! Order matters. The guard is forked while the process is small and has one thread; the record is on
//! disk before anything is frozen or created; the post-freeze hook is owed from the moment before the
//! pre-freeze hook starts, and the guard runs it even if this process is killed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdstill_platform::command::{self, Ending, Output, Tool};
use holdstill_platform::guard::{Config, Guard, Hook, HookEnd, Leftover, LeftoverKind, Owed, Undo};
use holdstill_platform::node::{DeviceNumber, disk_sequence};
use holdstill_platform::records::{self, Record, Records};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::freeze::apfs::Leavings;
use crate::freeze::plan::Plan;
use crate::progress::{Event, Progress};

/// How long the pre-freeze hook may take, and the post-freeze hook.
pub const HOOK_DEADLINE: Duration = Duration::from_secs(60);

/// How much of what a hook prints is shown, in bytes of each of its outputs.
const MOST_SAID: usize = 64 << 10;

/// The phases, as hooks see them in `HOLDSTILL_PHASE`.
const PRE: &str = "pre";
const POST: &str = "post";

/// Commands of the user around the freeze, run by `/bin/sh -c`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Before the (final) freeze: if it fails, nothing is frozen.
    pub pre: Option<String>,
    /// Right after the thaw; always once the first was started.
    pub post: Option<String>,
    /// Standard error belongs to a program that reads it: what the commands print is told as
    /// [`Event::Hook`] alone.
    pub is_stderr_taken: bool,
}

/// What a run writes down before it does it, for `cleanup` after a power cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The process.
    pub pid: u32,
    /// When it began (RFC 3339).
    pub begun: String,
    /// Freezes that are under way, in their order: written down before a freeze begins, and gone once it has
    /// ended.
    #[serde(default)]
    pub freezes: Vec<FreezeRecord>,
    /// Write-tracking instances.
    #[serde(default)]
    pub trace_instances: Vec<String>,
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

/// A freeze that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeRecord {
    /// The mount point it goes by.
    pub point: PathBuf,
    /// The device of the filesystem (`st_dev` of the mount point), as `7:0`. A path alone may lead
    /// elsewhere by the time somebody reads this.
    pub device: String,
    /// What tells this device from whatever has its number later, where the system says.
    pub sequence: Option<String>,
    /// Since which start of the machine, where the system says: after the next one nothing is frozen.
    pub boot: Option<String>,
}

impl FreezeRecord {
    /// Of the filesystem `device` at `point`, from now on.
    pub fn of(point: &Path, device: DeviceNumber) -> Self {
        Self {
            point: point.to_owned(),
            device: device.to_string(),
            sequence: disk_sequence(device),
            boot: records::this_boot(),
        }
    }
}

/// The live run, other than `own` (an id), that has a freeze of this device under way, in words.
///
/// # Errors
/// If the records cannot be read.
pub fn freezing(device: &str, own: &str) -> Result<Option<String>> {
    for found in Records::default().list()? {
        let record = serde_json::from_slice::<RunRecord>(&found.content);
        if let (true, Ok(record)) = (found.is_alive && found.id != own, record)
            && record.freezes.iter().any(|freeze| freeze.device == device)
        {
            return Ok(Some(format!("process {}, run {}", record.pid, found.id)));
        }
    }
    Ok(None)
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
        })
    }
}

/// A run. Clones are the same run.
#[derive(Clone, Debug)]
pub struct Session(Arc<Inner>);

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
    /// How the post-freeze hook ended was told already.
    is_hook_told: AtomicBool,
    /// What the post-freeze hook prints, unless that goes to standard error.
    said: Option<Arc<File>>,
    record: Mutex<(RunRecord, Option<Record>)>,
}

/// How many freezes are still to come, and whether the pre-freeze hook ran.
#[derive(Debug)]
struct HookState {
    freezes_left: usize,
    is_owed: bool,
    /// The post-freeze hook ran, and failed.
    has_failed: bool,
}

impl Session {
    /// Begins a run over `sources`.
    ///
    /// # Errors
    /// If the guard cannot be started, or the record not be written.
    pub fn begin(id: &str, hooks: Hooks, sources: &[String], watched: Watched) -> Result<Self> {
        let sources_text = sources.join("\n");
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
                freezes_left: 1,
                is_owed: false,
                has_failed: false,
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

    /// Tells if what pauses or kills this process from outside would reach the guard as well.
    pub fn warn_of_shared_group(&self, progress: &dyn Progress) {
        if let Some(group) = self.maybe_guard().and_then(Guard::shared_group) {
            progress.warn(&format!(
                "the guard process could not leave the control group {group}: whatever freezes or kills \
                 that group (docker pause, systemctl freeze, a unit's SIGKILL) while the source is frozen \
                 leaves it so until `holdstill cleanup`; run it outside of the group, as root"
            ));
        }
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

    /// Whether there are hooks. They run around one freeze: what was quiesced for it is not for another.
    pub fn has_hooks(&self) -> bool {
        self.0.hooks.pre.is_some() || self.0.hooks.post.is_some()
    }

    /// Whether the post-freeze hook ran and failed: what it had to release may be locked still.
    pub fn has_failed_hook(&self) -> bool {
        let state = &self.0.hook_state;
        state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .has_failed
    }

    /// After so many freezes (or last reads, where nothing is frozen) the post-freeze command runs. The pair
    /// of commands runs again for freezes after that.
    pub fn expect_freezes(&self, freezes: usize) {
        let state = self.0.hook_state.lock();
        state.unwrap_or_else(PoisonError::into_inner).freezes_left = freezes;
    }

    /// To be called right before a source's (final) freeze: runs the pre-freeze hook, once.
    ///
    /// # Errors
    /// [`Kind::Tool`] if it fails: then nothing must be frozen. The request to stop: the hook is ended then.
    pub fn before_freeze(&self, progress: &dyn Progress) -> Result<()> {
        let mut state = self
            .0
            .hook_state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if state.is_owed {
            return Ok(());
        }
        if let Some(guarded) = &self.0.guarded
            && let Some(guard) = &guarded.guard
        {
            guard.owe_hook()?;
            guarded.is_hook_told.store(false, Ordering::Relaxed);
        }
        state.is_owed = true;
        let Some(script) = &self.0.hooks.pre else {
            return Ok(());
        };
        progress.check()?;
        let failed = |error| {
            let what = "the pre-freeze command failed, so nothing is frozen";
            Error::new(Kind::Tool, what).because(error)
        };
        let done = self.run_here(script, PRE, &|| progress.stop().is_some());
        let output = done.map_err(failed)?;
        tell(PRE, &[output.stdout.as_slice(), &output.stderr], progress);
        progress.check()?;
        if !output.success() {
            return Err(failed(output.failed()));
        }
        Ok(())
    }

    /// Runs a hook in this process.
    fn run_here(
        &self,
        script: &str,
        phase: &str,
        stop: &dyn Fn() -> bool,
    ) -> holdstill_platform::error::Result<Output> {
        let mut tool = Tool::shell(script).deadline(HOOK_DEADLINE).limit(MOST_SAID);
        for (name, value) in hook_env(&self.0.id, &self.0.sources, phase) {
            tool = tool.env(name, value);
        }
        tool.run_unless(stop)
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
        if state.freezes_left > 0 || !state.is_owed {
            return;
        }
        state.is_owed = false;
        drop(state);
        self.run_post_hook(progress);
    }

    /// Runs both hooks, one right after the other, before a target is touched: a pre-freeze hook that fails
    /// only when all was copied would have cost what was on the target.
    ///
    /// # Errors
    /// As [`before_freeze`](Self::before_freeze); [`Kind::Tool`] if the post-freeze hook fails.
    pub fn rehearse_hooks(&self, progress: &dyn Progress) -> Result<()> {
        if !self.has_hooks() {
            return Ok(());
        }
        self.before_freeze(progress)?;
        self.run_post_hook(progress);
        let state = self.0.hook_state.lock();
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.is_owed = false;
        if state.has_failed {
            let what =
                "the post-freeze command failed when it was tried, so the target was not touched";
            return Err(Error::new(Kind::Tool, what));
        }
        Ok(())
    }

    fn run_post_hook(&self, progress: &dyn Progress) {
        let (Some(script), Some(guarded)) = (&self.0.hooks.post, &self.0.guarded) else {
            return;
        };
        let Some(guard) = &guarded.guard else {
            return;
        };
        guarded.is_hook_told.store(true, Ordering::Relaxed);
        let trouble = match guard.run_hook() {
            Ok(end) => end.and_then(trouble_of),
            // Twice is better than never: what the first hook has locked must be released.
            Err(_) => match self.run_here(script, POST, &|| false) {
                Ok(output) => {
                    tell(POST, &[output.stdout.as_slice(), &output.stderr], progress);
                    (!output.success()).then(|| output.ending.to_string())
                }
                Err(error) => Some(error.to_string()),
            },
        };
        if let Some(Ok(said)) = guarded.said.as_deref().map(command::said_in) {
            tell(POST, &[&said], progress);
        }
        if let Some(trouble) = trouble {
            let state = self.0.hook_state.lock();
            state.unwrap_or_else(PoisonError::into_inner).has_failed = true;
            progress.warn(&format!("the post-freeze command failed: {trouble}"));
        }
    }
}

/// What went wrong with a hook that the guard ran.
fn trouble_of(end: HookEnd) -> Option<String> {
    match end {
        HookEnd::Ran(Ending::Exit(0)) => None,
        HookEnd::Ran(ending) => Some(ending.to_string()),
        HookEnd::NotStarted(errno) => Some(std::io::Error::from_raw_os_error(errno).to_string()),
    }
}

/// Tells what a hook printed.
fn tell(phase: &str, printed: &[&[u8]], progress: &dyn Progress) {
    for output in printed {
        let output = String::from_utf8_lossy(output);
        if !output.trim().is_empty() {
            progress.event(&Event::Hook {
                phase,
                output: output.trim_end(),
            });
        }
    }
}

/// Ends the run, however it went: the guard does what is left to do (the hook, if it is still owed),
/// and the record goes. Only a run that is killed, or could not take away what nothing but its record tells
/// of, leaves it, for `cleanup`.
impl Drop for Guarded {
    fn drop(&mut self) {
        match self.guard.take().map(Guard::finish) {
            Some(Err(error)) => log::warn!("{error}"),
            Some(Ok(report)) => {
                if let Some(trouble) = report.hook.and_then(trouble_of)
                    && !self.is_hook_told.load(Ordering::Relaxed)
                {
                    log::warn!("the post-freeze command failed: {trouble}");
                }
            }
            None => {}
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
        let is_captured = hooks.is_stderr_taken && hooks.post.is_some();
        let said = is_captured
            .then(|| command::unnamed_file().map(Arc::new))
            .transpose()?;
        let hook = hooks.post.as_ref().map(|script| Hook {
            script: OsString::from(script),
            env: hook_env(id, sources, POST)
                .map(|(name, value)| (name.into(), value.into()))
                .to_vec(),
            deadline: HOOK_DEADLINE,
            output: said.clone(),
        });
        let keep = vec![record.lock().as_fd()];
        let guard = Guard::spawn(Config { hook, undo, keep })?;
        Ok(Self {
            guard: Some(guard),
            is_hook_told: AtomicBool::new(false),
            said,
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
