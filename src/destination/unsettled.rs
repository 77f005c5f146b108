//! A target that holds a whole filesystem, which is still to be changed before anybody may use it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::exclusive::Claim;
use holdstill_platform::loop_device::LoopDevice;
use holdstill_platform::node::{BlockDevice, Node};

use super::{Hold, Target};
use crate::error::{Error, Kind, Result};
use crate::fs::btrfs::renew::{self, Identity};

/// How long a device may stay busy after its filesystem was unmounted: who looks at new devices holds
/// them for moments.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(20);

/// A target of which everything was written, its first block too. Dropped before
/// [`settle`](Self::settle), it holds no signature again; if it is a file that did not exist before, it
/// is removed.
#[derive(Debug)]
pub(crate) struct Unsettled {
    /// `None` once it is settled.
    target: Option<Target>,
    path: PathBuf,
}

/// A block device that shows the target, and that can be mounted.
#[derive(Debug)]
pub(crate) enum Mountable {
    /// The target itself.
    Itself(PathBuf),
    /// One that shows a file.
    Loop(LoopDevice),
}

impl Mountable {
    /// Its node.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Itself(path) => path,
            Self::Loop(device) => device.path(),
        }
    }
}

impl Unsettled {
    /// Writes what was held back, and with `compare` reads it back.
    ///
    /// # Errors
    /// As [`Target::finish`].
    pub(crate) fn new(mut target: Target, compare: bool) -> Result<Self> {
        target.complete(compare)?;
        Ok(Self {
            path: target.path().to_owned(),
            target: Some(target),
        })
    }

    fn target(&mut self) -> Result<&mut Target> {
        let gone = || Error::new(Kind::Failed, "the target is settled already");
        self.target.as_mut().ok_or_else(gone)
    }

    /// Lets its filesystem be mounted. It stays locked against udev, but nobody mounts what others have
    /// open for writing (Linux 6.8, where it is built so).
    ///
    /// # Errors
    /// If there is no loop device for a file.
    pub(crate) fn lend(&mut self) -> Result<Mountable> {
        let target = self.target()?;
        match &mut target.hold {
            Hold::Device(claimed) => {
                claimed.claim = None;
                target.disk = Disk::at(&target.located, Access::Read)?;
                // By the kernel's own name, in a folder where nobody else changes names.
                let node = target.located.node().and_then(Node::block_device);
                let gone = || Error::new(Kind::Failed, "the target is not a device any more");
                Ok(Mountable::Itself(
                    BlockDevice::of(node.ok_or_else(gone)?)?.path(),
                ))
            }
            _ => Ok(Mountable::Loop(LoopDevice::attach(&*target)?)),
        }
    }

    /// Takes it back when its filesystem is unmounted.
    ///
    /// # Errors
    /// [`Kind::InUse`] if somebody else has taken it meanwhile.
    pub(crate) fn take_back(&mut self, lent: Mountable) -> Result<()> {
        let path = self.path.clone();
        drop(lent);
        let target = self.target()?;
        let Hold::Device(claimed) = &mut target.hold else {
            return Ok(());
        };
        let begun = Instant::now();
        loop {
            match Claim::at(&target.located, Access::ReadWrite) {
                Ok((claim, disk)) => {
                    claimed.claim = Some(claim);
                    target.disk = disk;
                    return Ok(());
                }
                Err(error) if error.kind() != std::io::ErrorKind::ResourceBusy => {
                    return Err(error.into());
                }
                Err(_) if begun.elapsed() < PATIENCE => std::thread::sleep(RETRY),
                Err(_) => {
                    return Err(
                        Error::new(Kind::InUse, "somebody took the target meanwhile").on(&path),
                    );
                }
            }
        }
    }

    /// Gives the filesystem another identity, in its first superblock last.
    ///
    /// # Errors
    /// If it cannot be changed, or what the device says.
    pub(crate) fn give_identity(&mut self, new: &Identity) -> Result<()> {
        let path = self.path.clone();
        let disk = &self.target()?.disk;
        let renewed = renew::renewed(disk, new).map_err(|error| error.on(path))?;
        disk.sync()?;
        for (offset, bytes) in renewed.iter().rev() {
            disk.write_all_at(bytes, offset.0)?;
            disk.sync()?;
        }
        Ok(())
    }

    /// The target is whole, and may be used.
    pub(crate) fn settle(mut self) {
        if let Some(target) = self.target.take() {
            target.let_go();
        }
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        let Some(target) = &mut self.target else {
            return;
        };
        let is_lent = matches!(&target.hold, Hold::Device(claimed) if claimed.claim.is_none());
        let opened = match is_lent {
            true => Disk::at(&target.located, Access::ReadWrite).map(|disk| target.disk = disk),
            false => Ok(()),
        };
        let cleared = opened
            .map_err(Error::from)
            .and_then(|()| target.clear_signatures());
        if let Err(error) = cleared {
            log::warn!("{error}: it looks whole, and is not");
        }
    }
}
