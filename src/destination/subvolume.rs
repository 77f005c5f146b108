//! A btrfs of which only one subvolume has its data: an image of one subvolume holds the metadata of
//! all of it, and what is not wanted can be removed only where it is restored.
//!
//! That takes a mount, and until it is done the filesystem must not be taken for what it will be. So it
//! is mounted for nobody else to see, and has an id of its own meanwhile, and a label that says what it
//! is. That way it is also no twin of the original. Removing reads no data, only metadata.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdstill_platform::btrfs::{self, Child, Filesystem, TOP_LEVEL};
use uuid::Uuid;

use crate::destination::new_ids;
use crate::destination::{Target, Unsettled};
use crate::error::{Error, Kind, Result};
use crate::fs::btrfs::renew::Identity;
use crate::image::manifest::Subvolume;
use crate::progress::Progress;

/// What it is called while there is more in it than has its data.
const LABEL: &[u8] = b"holdstill: not restored yet";

/// How long the kernel may drop what was deleted without anything of it becoming less.
const PATIENCE: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(50);

/// Finishes the targets of one filesystem, all its devices, so that of its subvolumes and files there are
/// only those that `wanted` is and lies in. With `new`, that is its UUID then.
///
/// # Errors
/// Whatever went wrong; the targets then hold no signature.
pub(crate) fn finish(
    targets: Vec<Target>,
    wanted: &Subvolume,
    new: Option<Uuid>,
    compare: bool,
    progress: &dyn Progress,
) -> Result<()> {
    let mut label = [0; 256];
    label[..LABEL.len()].copy_from_slice(LABEL);
    let meanwhile = Identity {
        fsid: Uuid::new_v4(),
        label,
    };
    let mut identities = Vec::new();
    for target in &targets {
        let own = Identity::of(target).map_err(|error| error.on(target.path()))?;
        new_ids::give_identity(target, &meanwhile, compare)?;
        identities.push(Identity {
            fsid: new.unwrap_or(own.fsid),
            ..own
        });
    }
    let mut unsettled = Vec::new();
    for target in targets {
        unsettled.push(Unsettled::new(target, compare)?);
    }
    let lent = unsettled.iter_mut().map(Unsettled::lend);
    let lent = lent.collect::<Result<Vec<_>>>()?;
    let paths: Vec<&Path> = lent.iter().map(|device| device.path()).collect();
    let pruned = prune(&paths, wanted, progress);
    for path in paths {
        // It would be taken for a device of the filesystem that it was meanwhile.
        if let Err(error) = btrfs::forget(path) {
            log::debug!("{error}");
        }
    }
    let lent = unsettled.iter_mut().zip(lent);
    let back = lent.map(|(target, lent)| target.take_back(lent));
    let back = back.collect::<Result<Vec<()>>>();
    pruned.and(back)?;
    for (target, identity) in unsettled.iter_mut().zip(&identities) {
        target.give_identity(identity)?;
    }
    unsettled.into_iter().for_each(Unsettled::settle);
    Ok(())
}

/// Removes all that is not wanted from the filesystem on `devices`, which nobody has mounted.
fn prune(devices: &[&Path], wanted: &Subvolume, progress: &dyn Progress) -> Result<()> {
    let filesystem = Filesystem::mount(devices)?;
    let children = filesystem.children()?;
    let kept = kept(&children, wanted)?;
    let is_kept = |id: u64| id == TOP_LEVEL || kept.iter().any(|child| child.id == id);
    if !is_kept(filesystem.default_subvolume()?) {
        filesystem.set_default_subvolume(TOP_LEVEL)?;
    }
    let go: Vec<&Child> = children.iter().filter(|child| !is_kept(child.id)).collect();
    // In what is read-only nothing can be deleted.
    let parents: HashSet<u64> = go.iter().map(|child| child.parent).collect();
    let holds = |id: u64| parents.contains(&id);
    let is_changed =
        |child: &Child| child.is_read_only && (holds(child.id) || child.id != wanted.id);
    let unlocked = children
        .iter()
        .filter(|child| is_changed(child) && (is_kept(child.id) || holds(child.id)));
    for child in unlocked.clone() {
        filesystem.subvolume(child.id)?.set_read_only(false)?;
    }
    delete(&filesystem, go, progress)?;
    // From the top level down to the last one that the wanted one lies in.
    let mut above = TOP_LEVEL;
    for child in &kept {
        let folder = filesystem.folder_path(above, child.folder)?;
        let mut check = || progress.check();
        let subvolume = filesystem.subvolume(above)?;
        subvolume.empty(&folder.join(&child.name), &mut check)?;
        above = child.id;
    }
    for child in unlocked.filter(|child| is_kept(child.id)) {
        filesystem.subvolume(child.id)?.set_read_only(true)?;
    }
    wait_for_cleaner(&filesystem, progress)?;
    Ok(filesystem.sync()?)
}

/// The wanted subvolume and those it lies in, from the top level down.
fn kept<'a>(children: &'a [Child], wanted: &Subvolume) -> Result<Vec<&'a Child>> {
    let mut kept: Vec<&Child> = Vec::new();
    let mut id = wanted.id;
    while id != TOP_LEVEL {
        let found = children.iter().find(|child| child.id == id);
        let is_new = kept.iter().all(|other| other.id != id);
        let child = found.filter(|_| is_new).ok_or_else(|| {
            let what = format!(
                "what was restored holds no subvolume {} ({})",
                wanted.id, wanted.path
            );
            Error::new(Kind::Failed, what)
        })?;
        kept.insert(0, child);
        id = child.parent;
    }
    Ok(kept)
}

/// Deletes subvolumes, those that lie in others first.
fn delete(filesystem: &Filesystem, mut go: Vec<&Child>, progress: &dyn Progress) -> Result<()> {
    while !go.is_empty() {
        let parents: HashSet<u64> = go.iter().map(|child| child.parent).collect();
        let (mut rest, mut leaves): (Vec<&Child>, Vec<&Child>) =
            go.iter().partition(|child| parents.contains(&child.id));
        if leaves.is_empty() {
            let what = "its subvolumes lie in each other";
            return Err(Error::new(Kind::Failed, what));
        }
        leaves.sort_by_key(|child| child.parent);
        for siblings in leaves.chunk_by(|one, other| one.parent == other.parent) {
            let parent = filesystem.subvolume(siblings[0].parent)?;
            for child in siblings {
                progress.check()?;
                let folder: PathBuf = filesystem.folder_path(child.parent, child.folder)?;
                parent.delete_in(&folder, &child.name)?;
            }
        }
        go = std::mem::take(&mut rest);
    }
    Ok(())
}

/// Waits until nothing is left of what was deleted.
fn wait_for_cleaner(filesystem: &Filesystem, progress: &dyn Progress) -> Result<()> {
    let mut last = Vec::new();
    let mut since = Instant::now();
    loop {
        progress.check()?;
        filesystem.clean()?;
        let left = filesystem.dropping()?;
        if left.is_empty() {
            return Ok(());
        }
        if left != last {
            last = left;
            since = Instant::now();
        } else if since.elapsed() > PATIENCE {
            let what = format!("the kernel does not drop {} deleted subvolumes", last.len());
            return Err(Error::new(Kind::Failed, what));
        }
        std::thread::sleep(POLL);
    }
}
