//! What a target was found to be, and how it is taken: looked up once, examined, claimed, and only then,
//! when nothing can refuse any more, written to.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::exclusive::{Claim, DiskLock, is_open_here_alone};
use holdstill_platform::extents_below::Extents;
use holdstill_platform::in_use::{self, User, Users};
use holdstill_platform::located::Located;
use holdstill_platform::loop_claims::LoopClaims;
use holdstill_platform::node::{BlockDevice, DeviceNumber, FileId, Kind as NodeKind};

use super::{Claimed, Hold, Target};
use crate::destination::fit::Fit;
use crate::destination::signatures;
use crate::error::{Error, IoContext, Kind, Result};
use crate::units::ByteLen;

/// How long udev may keep a disk locked.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// How long a file may be open by somebody who cannot be found: whoever just closed it.
const OPEN_PATIENCE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);

/// What a target was found to be, before anything is changed.
#[derive(Debug)]
pub struct Candidate {
    located: Located,
    size: ByteLen,
    /// Bytes that the target has; of a missing file those that it will have.
    room: ByteLen,
    extents: Extents,
}

impl Candidate {
    /// Examines a target for a volume, which may be one that cannot be used there with `allow_unusable`.
    /// Changes nothing.
    ///
    /// # Errors
    /// [`Kind::InUse`] if it is mounted, held, open for writing or read-only; [`Kind::TooSmall`];
    /// [`Kind::Unusable`]; [`Kind::NotApplicable`] for a device that does not exist; [`Kind::Usage`] if it is neither a
    /// device nor a file.
    pub fn examine(path: &Path, fit: &Fit, allow_unusable: bool) -> Result<Self> {
        let size = fit.size();
        let located = Located::of(path).map_err(refusal)?;
        let Some(node) = located.node() else {
            located.refuse_among_devices().map_err(refusal)?;
            return Ok(Self {
                located,
                size,
                room: size,
                extents: Extents::default(),
            });
        };
        let user = match node.kind {
            NodeKind::Block(number) => {
                first_user(in_use::of_device(&BlockDevice::of(number)?, &[])?)
            }
            NodeKind::Regular => user_of_file(node.id)?,
            _ => {
                return Err(
                    Error::new(Kind::Usage, "a target is a block device or a file").on(path),
                );
            }
        };
        if let Some(user) = user {
            return Err(used(path, &user));
        }
        let extents = Extents::of_node(node)?;
        let geometry = Disk::at(&located, Access::Read)?.geometry();
        if geometry.read_only {
            return Err(Error::new(Kind::InUse, "the target is read-only").on(path));
        }
        let room = ByteLen(geometry.size);
        fit.check(path, &geometry, allow_unusable)?;
        Ok(Self {
            located,
            size,
            room,
            extents,
        })
    }

    /// Whether something is there that would be overwritten.
    pub fn exists(&self) -> bool {
        self.located.node().is_some()
    }

    /// Bytes that it has, or will have.
    pub fn room(&self) -> ByteLen {
        self.room
    }

    /// The bytes that would be overwritten.
    pub fn extents(&self) -> &Extents {
        &self.extents
    }

    /// Takes the target: opens and claims it, or makes it. Nothing that was there is changed.
    ///
    /// # Errors
    /// If it cannot be opened for writing, somebody has it, or it cannot be discarded and is to be.
    pub fn take(self, discard: bool) -> Result<Taken> {
        let (disk, hold) = match self.located.node().map(|node| (node.kind, node.id)) {
            None => (self.create()?, Hold::New),
            Some((NodeKind::Block(number), _)) => {
                let (claimed, disk) = self.claim(number)?;
                (disk, Hold::Device(claimed))
            }
            Some((_, id)) => {
                let (claims, disk) = self.open_file(id)?;
                (disk, Hold::File { _loops: claims })
            }
        };
        if discard && matches!(hold, Hold::Device(_) | Hold::File { .. }) && !disk.can_discard() {
            return Err(Error::new(Kind::NotApplicable, "the target cannot discard")
                .on(self.located.path())
                .hint("leave out --discard"));
        }
        Ok(Taken {
            target: Target::new(disk, hold, self.located, self.size),
            discard,
        })
    }

    fn create(&self) -> Result<Disk> {
        let path = self.located.path();
        let file = self.located.create().map_err(refusal)?;
        let sized = file.set_len(self.size.0).context("cannot size", path);
        let disk = sized.and_then(|()| Ok(Disk::of_file(file, path)?));
        if disk.is_err() {
            let removed = self.located.folder().remove(self.located.name(), |_| true);
            if let Err(error) = removed {
                log::warn!("cannot remove {}: {error}", path.display());
            }
        }
        disk
    }

    fn claim(&self, number: DeviceNumber) -> Result<(Claimed, Disk)> {
        let path = self.located.path();
        let taken = |error: holdstill_platform::error::Error| {
            match error.source.kind() {
            ErrorKind::ResourceBusy | ErrorKind::WouldBlock => Error::new(
                Kind::InUse,
                "somebody has the target: it is mounted or held where no list shows it, or was taken \
                 just now",
            )
            .on(path),
            _ => error.into(),
        }
        };
        let disk = BlockDevice::of(number)?.disk;
        let (claim, opened) = Claim::at(&self.located, Access::ReadWrite).map_err(taken)?;
        let claimed = Claimed {
            claim: Some(claim),
            _lock: lock_disk(disk).map_err(taken)?,
        };
        Ok((claimed, opened))
    }

    /// Opens a file that nobody uses through a loop device, and that nobody else has open for writing, as
    /// far as the kernel tells.
    fn open_file(&self, id: FileId) -> Result<(LoopClaims, Disk)> {
        let path = self.located.path();
        let claims = LoopClaims::over(&self.extents).map_err(|error| match error.kind() {
            ErrorKind::ResourceBusy => used(
                path,
                &format!(
                    "through {}, which is mounted or held, perhaps where no list shows it",
                    error.what.display()
                ),
            ),
            _ => error.into(),
        })?;
        let mut options = std::fs::OpenOptions::new();
        let file = holdstill_platform::located::for_writing(&mut options);
        let file = self
            .located
            .open(file)
            .map_err(|error| match error.kind() {
                // Somebody holds a lease, and is told now that we want to write.
                ErrorKind::WouldBlock => used(path, "somebody protects it from being written"),
                _ => error.into(),
            })?;
        let begun = Instant::now();
        while is_open_here_alone(&file).context("cannot examine", path)? == Some(false) {
            // Whoever has it open is known: our loop devices, which others may not use now, or a program
            // that only reads.
            if claims.count() > 0 || in_use::is_open_elsewhere(id)? {
                break;
            }
            if begun.elapsed() > OPEN_PATIENCE {
                let who =
                    "it is open in another container, or through another filesystem (an overlay)";
                return Err(used(path, who));
            }
            std::thread::sleep(POLL);
        }
        if let Some(user) = user_of_file(id)? {
            return Err(used(path, &user));
        }
        Ok((claims, Disk::of_file(file, path)?))
    }
}

/// Locks that are held: two targets may be partitions of one disk, which is locked once.
static LOCKS: Mutex<Vec<(DeviceNumber, Weak<DiskLock>)>> = Mutex::new(Vec::new());

fn lock_disk(disk: DeviceNumber) -> holdstill_platform::error::Result<Arc<DiskLock>> {
    let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let held = locks.iter().find(|(locked, _)| *locked == disk);
    if let Some(held) = held.and_then(|(_, lock)| lock.upgrade()) {
        return Ok(held);
    }
    let node = BlockDevice::of(disk)?.path();
    let lock = Arc::new(DiskLock::new(&node, LOCK_PATIENCE)?);
    locks.retain(|(_, lock)| lock.strong_count() > 0);
    locks.push((disk, Arc::downgrade(&lock)));
    Ok(lock)
}

/// A target that is ours, with everything in it that was there before.
#[derive(Debug)]
pub struct Taken {
    target: Target,
    discard: bool,
}

impl Taken {
    /// The target as it is written to.
    pub fn as_target(&self) -> &Target {
        &self.target
    }

    /// Discards what was there, if that is wanted, and removes every signature: from here on nothing of
    /// it can be had back. To be called when everything that can refuse has been asked.
    ///
    /// # Errors
    /// What the device says.
    pub fn begin(self) -> Result<Target> {
        let mut target = self.target;
        if self.discard {
            target.disk.discard_all()?;
        }
        target.stale = signatures::find(&target.disk);
        target.clear_signatures()?;
        Ok(target)
    }
}

/// Refusals of the platform, as they are meant.
pub(crate) fn refusal(error: holdstill_platform::error::Error) -> Error {
    match error.kind() {
        ErrorKind::InvalidInput => {
            Error::new(Kind::NotApplicable, error.source.to_string()).on(error.what)
        }
        _ => error.into(),
    }
}

fn used(path: &Path, user: &str) -> Error {
    Error::new(Kind::InUse, format!("the target is in use: {user}"))
        .on(path)
        .hint("unmount it, or let go of it, and try again")
}

fn first_user(found: Users) -> Option<String> {
    found.users.first().map(User::to_string)
}

/// Who uses a file. A loop device over it that nobody uses itself is no user: the kernel keeps
/// nothing of the file in its cache then.
fn user_of_file(file: FileId) -> Result<Option<String>> {
    for user in in_use::of_file(file, &[])?.users {
        let User::Loop { device, name, .. } = &user else {
            return Ok(Some(user.to_string()));
        };
        let users_of_loop = in_use::of_device(&BlockDevice::of(*device)?, &[])?;
        if let Some(user) = first_user(users_of_loop) {
            return Ok(Some(format!("through loop device {name}: {user}")));
        }
    }
    Ok(None)
}
