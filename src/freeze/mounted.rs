//! What `hold`, `track` and `btrfs` share: a mounted filesystem that can be frozen, and what must not lie on
//! it while it is.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use holdstill_platform::beneath;
use holdstill_platform::freeze::{FreezeError, MountPoint};
use holdstill_platform::guard::Thawed;
use holdstill_platform::in_use::{self, Swap, User};
use holdstill_platform::mounts;
use holdstill_platform::node::BlockDevice;
use holdstill_platform::swap_file::SwapFile;

use crate::error::{Error, Kind, Result};
use crate::host::who_may;
use crate::image::manifest::FreezeTimes;
use crate::progress::Progress;
use crate::source::{Medium, Source};

/// The device of a source and where it is mounted; or why it cannot be frozen at all.
pub(super) fn device(source: &Source) -> std::result::Result<&BlockDevice, String> {
    let Medium::Device(device) = &source.medium else {
        return Err("it is a file, not a mounted device".to_owned());
    };
    let Some(mount) = &source.mount else {
        return Err(covered(device).unwrap_or_else(|| "it is not mounted here".to_owned()));
    };
    match mount.fs_type.as_str() {
        "ext2" | "ext3" | "ext4" | "xfs" => Ok(device),
        other => Err(format!("a mounted {other} cannot be imaged this way yet")),
    }
}

/// That a device is mounted only where other mounts cover it, in words.
fn covered(device: &BlockDevice) -> Option<String> {
    let all = mounts::of_this_process().ok()?;
    let mount = all
        .iter()
        .find(|mount| mount.block_device() == Some(device.number))?;
    let point = mount.point.display();
    Some(format!(
        "its mount point {point} is covered by another mount; unmount that, or mount it at another place, too"
    ))
}

/// Why the copy, written while the source is frozen, would wait for its thaw, and the thaw for it.
/// `output` is what the copy is written to. What is said of the run goes nowhere meanwhile.
pub(super) fn would_wait_for_itself(
    device: &BlockDevice,
    output: Option<BorrowedFd<'_>>,
) -> Result<Option<&'static str>> {
    let Some(output) = output else {
        return Ok(None);
    };
    let rests = beneath::file_rests_on(output, device)?;
    Ok(rests.then_some("the output lies on the source itself"))
}

/// Whether swap space lies on the source: what it holds changes though the filesystem is frozen.
pub(super) fn has_swap(device: &BlockDevice) -> Result<bool> {
    for swap in in_use::swaps()? {
        if swap_rests_on(&swap, device)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The swap files of the source's own filesystem; or why its swap space is in the way: through a
/// loop device memory could not be written out while the source is frozen.
pub(super) fn swap_files(
    device: &BlockDevice,
) -> Result<std::result::Result<Vec<SwapFile>, String>> {
    let mut files = Vec::new();
    for swap in in_use::swaps()? {
        if swap
            .file
            .is_some_and(|file| file.filesystem == device.number)
        {
            match SwapFile::open(&swap.path) {
                Ok(file) => files.push(file),
                Err(error) => return Ok(Err(format!("swap space lies on it: {error}"))),
            }
        } else if swap_rests_on(&swap, device)? {
            let name = swap.path.display();
            return Ok(Err(format!(
                "swap space lies on it by way of another device ({name})"
            )));
        }
    }
    Ok(Ok(files))
}

fn swap_rests_on(swap: &Swap, device: &BlockDevice) -> Result<bool> {
    // One that cannot be opened is a deleted file: ordinary blocks, which it keeps to the end.
    let Ok(file) = std::fs::File::open(&swap.path) else {
        return Ok(false);
    };
    Ok(beneath::file_rests_on(&file, device)?)
}

/// Who could change the device behind the back of its filesystem: a freeze does not stop them.
pub(super) fn other_writer(device: &BlockDevice) -> Result<Option<String>> {
    let users = in_use::of_device(device, &[])?.users;
    let is_known = |user: &User| {
        matches!(
            user,
            User::Mount { .. } | User::Btrfs { .. } | User::Swap { .. }
        )
    };
    let mut users = users.into_iter();
    let writer = users.find(|user| !is_known(user) && user.may_write());
    Ok(writer.map(|user| user.to_string()))
}

/// Writing out what writers produced must not take longer than this, or a freeze would not either.
const SYNC_BUDGET: Duration = Duration::from_secs(5);

/// Writes out everything, so that a freeze that follows has little to write.
pub(super) fn sync_within_budget(
    point: &Arc<MountPoint>,
    source: &Source,
    progress: &dyn Progress,
) -> Result<()> {
    let mut took = Duration::MAX;
    // Twice: a backlog from before the run is written out only once.
    for _ in 0..2 {
        let begin = Instant::now();
        sync(point, progress)?;
        took = begin.elapsed();
        if took <= SYNC_BUDGET {
            return Ok(());
        }
    }
    let what = format!(
        "the disk needs {:.0} s to write out what its writers produce: a freeze would take as long",
        took.as_secs_f64()
    );
    Err(Error::new(Kind::Inconsistent, what)
        .on(&source.path)
        .hint("try again when less is written"))
}

/// How often to look whether a run is asked to stop, and after what time it is told that it waits.
const NAP: Duration = Duration::from_millis(100);
const SLOW: Duration = Duration::from_secs(20);

/// Writes out everything that is dirty on a filesystem. On a disk or kernel that is stuck this never ends,
/// so it has a thread of its own, and whoever waits for it can be asked to stop.
pub(super) fn sync(point: &Arc<MountPoint>, progress: &dyn Progress) -> Result<()> {
    let (done, wait) = std::sync::mpsc::channel();
    let synced = Arc::clone(point);
    let thread = std::thread::Builder::new().name("holdstill-sync".to_owned());
    thread
        .spawn(move || done.send(synced.sync()))
        .map_err(|error| Error::io("cannot start a thread to sync", error).on(point.path()))?;
    let begin = Instant::now();
    let mut is_told = false;
    loop {
        match wait.recv_timeout(NAP) {
            Ok(synced) => return Ok(synced?),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(
                    Error::new(Kind::Failed, "the thread that syncs has ended").on(point.path())
                );
            }
            Err(RecvTimeoutError::Timeout) => progress.check()?,
        }
        if begin.elapsed() > SLOW && !std::mem::replace(&mut is_told, true) {
            let what = point.path().display();
            progress.warn(&format!(
                "still waiting for the kernel to write out what is dirty on {what} (syncfs); its log may say why"
            ));
        }
    }
}

/// A freeze that failed or did not hold, as the user should see it.
pub(super) fn explain(error: FreezeError, source: &Source) -> Error {
    let may = who_may();
    let (kind, hint) = match &error {
        FreezeError::AlreadyFrozen => (
            Kind::InUse,
            "wait for whoever froze it (a snapshot being made, an agent of a virtual machine); only if \
             nobody did, thaw it: fsfreeze --unfreeze",
        ),
        FreezeError::Unsupported => (Kind::NotApplicable, "unmount it and image it offline"),
        FreezeError::NotPermitted => (Kind::Permission, may.as_str()),
        FreezeError::GuardLost(_) => (
            Kind::Failed,
            "without its guard process holdstill freezes nothing",
        ),
        FreezeError::DidNotHold => (
            Kind::Inconsistent,
            "the copy is worthless and was discarded; try again",
        ),
        FreezeError::Failed(_) => (Kind::Io, "check the disk and the kernel's log"),
    };
    Error::new(kind, "cannot freeze the filesystem")
        .on(&source.path)
        .because(error.to_string())
        .hint(hint)
}

/// The report of a freeze that held.
pub(super) fn times(purpose: &str, thawed: &Thawed, drain_ms: f64, read_ms: f64) -> FreezeTimes {
    FreezeTimes {
        purpose: purpose.to_owned(),
        freeze_ms: milliseconds(thawed.total()),
        drain_ms,
        read_ms,
        thaw_ms: milliseconds(thawed.thaw_call),
    }
}

/// A duration in milliseconds.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
