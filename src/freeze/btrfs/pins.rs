//! Pins: what keeps the kernel from freeing the data of a subvolume while it is copied.
//!
//! The pin of a subvolume is a read-only snapshot of it. Its folder is opened and its name deleted at
//! once: the kernel keeps a deleted subvolume as long as anything in it is open, and drops it by itself
//! when this process ends, however it does. A subvolume that is read-only needs no snapshot: there an
//! open folder is enough.
//!
//! Data that a pin refers to is neither freed nor overwritten in place: of what a snapshot shares, even
//! files that are not copied on write are (`can_nocow_extent` of the kernel's fs/btrfs/inode.c).

use std::io::ErrorKind;
use std::sync::Mutex;
use std::sync::PoisonError;

use holdstill_platform::btrfs::{self, Filesystem, Key, Subvolume};
use holdstill_platform::guard::LeftoverKind;
use holdstill_platform::open_files;

use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::fs::btrfs::commit::root_item;
use crate::fs::btrfs::format;
use crate::thread;

/// Snapshots made at a time: those share commits.
const AT_A_TIME: usize = 8;

/// The pin of one subvolume.
#[derive(Debug)]
pub(super) struct Pin {
    /// The id of the subvolume.
    pub(super) subvolume: u64,
    /// The tree that is pinned: that of a snapshot, or of the subvolume itself.
    pub(super) tree: u64,
    /// As long as it is open, the tree is kept.
    pub(super) folder: Subvolume,
}

/// The pins of all subvolumes, ascending by those.
#[derive(Debug, Default)]
pub(super) struct Pins(Vec<Pin>);

impl Pins {
    /// Pins every subvolume there is, or `only` one.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if one cannot be pinned: swap space lies in it.
    pub(super) fn take(filesystem: &Filesystem, only: Option<u64>, run: &Session) -> Result<Self> {
        let mut wanted = subvolumes(filesystem)?;
        wanted.retain(|subvolume| only.is_none_or(|only| only == subvolume.id));
        if only.is_some() && wanted.is_empty() {
            return Err(Error::new(Kind::NotFound, "the subvolume was deleted"));
        }
        // Each takes a descriptor.
        open_files::raise_limit()?;
        let wanted = Mutex::new(wanted.into_iter());
        let made = Mutex::new(Vec::new());
        let next = || wanted.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || -> Result<()> {
            while let Some(subvolume) = next() {
                if let Some(pin) = pin(filesystem, subvolume, run)? {
                    made.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(pin);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers = (0..AT_A_TIME).map(|_| thread::spawn(scope, work));
            let workers = workers.collect::<Result<Vec<_>>>()?;
            workers.into_iter().try_for_each(|worker| {
                let lost = |_| Error::new(Kind::Failed, "a thread ended before its time");
                worker.join().map_err(lost)?
            })
        })?;
        let mut made = made.into_inner().unwrap_or_else(PoisonError::into_inner);
        made.sort_unstable_by_key(|pin| pin.subvolume);
        Ok(Self(made))
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Pin> {
        self.0.iter()
    }

    /// The pin of a subvolume.
    pub(super) fn of(&self, subvolume: u64) -> Option<&Pin> {
        let at = self.0.binary_search_by_key(&subvolume, |pin| pin.subvolume);
        self.0.get(at.ok()?)
    }
}

/// Whether a tree is that of a subvolume.
pub(super) fn is_subvolume(tree: u64) -> bool {
    tree == format::FS_TREE || (format::FIRST_SUBVOLUME..=format::LAST_SUBVOLUME).contains(&tree)
}

/// A subvolume, and whether it can be written to.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    id: u64,
    is_read_only: bool,
}

/// All subvolumes that are not being deleted.
fn subvolumes(filesystem: &Filesystem) -> Result<Vec<Wanted>> {
    let mut found = Vec::new();
    let first = Key::new(format::FS_TREE, format::ROOT_ITEM, 0);
    let last = Key::new(format::LAST_SUBVOLUME, format::ROOT_ITEM, u64::MAX);
    filesystem.search(format::ROOT_TREE, first, last, 0, &mut |item| {
        if item.kind != format::ROOT_ITEM || !is_subvolume(item.objectid) {
            return Ok(());
        }
        let root = root_item(item.data)?;
        if root.refs.get() > 0 {
            found.push(Wanted {
                id: item.objectid,
                is_read_only: root.flags.get() & format::ROOT_READ_ONLY != 0,
            });
        }
        Result::Ok(())
    })?;
    Ok(found)
}

/// Pins a subvolume; `None` if it was deleted meanwhile.
fn pin(filesystem: &Filesystem, wanted: Wanted, run: &Session) -> Result<Option<Pin>> {
    let subvolume = match filesystem.subvolume(wanted.id) {
        Err(error) if error.source.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let folder = match wanted.is_read_only {
        true => subvolume,
        false => snapshot(&subvolume, run)?,
    };
    Ok(Some(Pin {
        subvolume: wanted.id,
        tree: folder.id(),
        folder,
    }))
}

/// Makes a snapshot that has no name any more.
fn snapshot(subvolume: &Subvolume, run: &Session) -> Result<Subvolume> {
    let name = btrfs::snapshot_name(run.id());
    // Should we die between the two, the guard deletes it.
    let leftover = run.register(subvolume, &name, LeftoverKind::Subvolume)?;
    let made = subvolume.snapshot_read_only(&name);
    if made.is_ok() {
        subvolume.delete_child(&name)?;
    }
    run.forget(leftover);
    made.map_err(|error| match error.source.kind() {
        ErrorKind::ExecutableFileBusy => Error::new(
            Kind::NotApplicable,
            "a subvolume cannot be pinned: swap space lies in it",
        )
        .on(&error.what)
        .hint("turn that off (swapoff), or unmount the filesystem"),
        _ => error.into(),
    })
}
