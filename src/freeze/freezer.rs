//! A filesystem that can be frozen, and what proves that it wrote nothing from one moment in a freeze to
//! another.
//!
//! A frozen filesystem writes nothing. So the device's counters of writes, and size and times of the
//! file if it is a loop device, must be the same at the last moment before the thaw as when the freeze
//! had settled. That a thaw succeeds proves less: the kernel does not say whose freeze it ended, and
//! another tool may have thawed and frozen again meanwhile. Nor does a freeze stop those who write to
//! the device itself.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use holdstill_platform::beneath::Below;
use holdstill_platform::btrfs::Filesystem;
use holdstill_platform::counters::{CounterFile, InFlightFile};
use holdstill_platform::freeze::MountPoint;
use holdstill_platform::node::BlockDevice;
use holdstill_platform::trace;
use holdstill_platform::witness::{Stamps, Witness};

use super::ice::{Ice, freeze_all};
use super::mounted;
use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::progress::Progress;
use crate::source::{Medium, Source};

/// A filesystem that can be frozen, and what tells whether it stays so.
#[derive(Debug)]
pub struct Freezer {
    pub(super) source: Source,
    pub(super) point: Arc<MountPoint>,
    pub(super) run: Session,
    /// Its devices: one, but of a btrfs.
    devices: Vec<Watched>,
}

/// One device of a filesystem that is frozen.
#[derive(Debug)]
struct Watched {
    device: BlockDevice,
    witness: Witness,
    /// `None` if the kernel counts nothing for this device.
    counters: Option<CounterFile>,
    in_flight: InFlightFile,
}

/// More devices than this are not looked at while a filesystem is frozen.
const MOST_DEVICES: usize = 16;

/// What may happen to a device while its filesystem is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing at all.
    Nothing,
    /// Discards of free blocks that were on their way: somebody else tells which blocks they were of.
    Discards,
    /// Anything: somebody else tells where everything went.
    Anything,
}

/// What the kernel tells of a device at one moment. Later it must tell the same.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Look {
    written: u64,
    discarded: u64,
    stamps: Stamps,
}

/// At all devices of a filesystem.
pub(super) type Looks = [Look; MOST_DEVICES];

impl Freezer {
    /// Opens the mount point of a source, and makes sure that it is the one of its device.
    ///
    /// # Errors
    /// If another filesystem is mounted over it, or it cannot be opened or watched.
    pub(super) fn open(source: &Source, run: &Session) -> Result<Self> {
        let not = |why: String| Error::new(Kind::NotApplicable, why).on(&source.path);
        let device = mounted::device(source).map_err(not)?;
        let mount = source.mount.as_ref();
        let mount = mount.ok_or_else(|| not("it is not mounted here".to_owned()))?;
        let point = MountPoint::open_on(&mount.point, device.number)?;
        Ok(Self {
            source: source.clone(),
            point: Arc::new(point),
            run: run.clone(),
            devices: vec![Watched::open(device)?],
        })
    }

    /// The same for a btrfs on these devices.
    ///
    /// # Errors
    /// If a device cannot be watched.
    pub(super) fn of_btrfs(
        filesystem: &Filesystem,
        sources: &[&Source],
        run: &Session,
    ) -> Result<Self> {
        let nothing = || Error::new(Kind::Usage, "no source was named");
        let mut devices = Vec::new();
        for source in sources {
            if let Medium::Device(device) = &source.medium {
                devices.push(Watched::open(device)?);
            }
        }
        Ok(Self {
            source: (*sources.first().ok_or_else(nothing)?).clone(),
            point: Arc::new(MountPoint::of_btrfs(filesystem)?),
            run: run.clone(),
            devices,
        })
    }

    /// Writes out everything that is dirty.
    ///
    /// # Errors
    /// As [`mounted::sync`].
    pub(super) fn sync(&self, progress: &dyn Progress) -> Result<()> {
        mounted::sync(&self.point, progress)
    }

    /// The same, so that a freeze that follows has little to write.
    ///
    /// # Errors
    /// As [`mounted::sync_within_budget`].
    pub(super) fn sync_within_budget(&self, progress: &dyn Progress) -> Result<()> {
        mounted::sync_within_budget(&self.point, &self.source, progress)
    }

    /// The open mount point.
    pub(super) fn point(&self) -> &Arc<MountPoint> {
        &self.point
    }

    /// Why what happens to the device cannot be told for certain; `None` if it can.
    pub(super) fn blind_spot(&self) -> Option<&str> {
        self.devices
            .iter()
            .find_map(|watched| match watched.counters {
                Some(_) => watched.witness.blind_spot(),
                None => {
                    Some("the kernel does not count what is written to it (queue/iostats is off)")
                }
            })
    }

    /// Freezes this one alone, as [`freeze_all`] does.
    ///
    /// # Errors
    /// As [`freeze_all`].
    pub(super) fn freeze(
        self: &Arc<Self>,
        deadline: Duration,
        progress: &dyn Progress,
    ) -> Result<Ice> {
        freeze_all(std::slice::from_ref(self), deadline, progress)
    }

    /// Whether this filesystem lies on the other: directly, or in a file of it.
    pub(super) fn lies_on(&self, below: &[Below], other: &Self) -> bool {
        let is_there = |number| below.iter().any(|below| below.devices.contains(&number));
        let mut others = other.devices.iter().map(|watched| watched.device.number);
        others.any(is_there) || is_there(other.point.device())
    }

    /// What each of its devices writes to.
    pub(super) fn below(&self) -> Result<Vec<Below>> {
        let devices = self.devices.iter();
        let below = devices.map(|watched| Ok(Below::of(watched.device.number)?));
        below.collect()
    }

    /// Whether anybody but its filesystem writes to the device, now or since it was opened here: found
    /// by a search, and by what was told of files below it.
    ///
    /// # Errors
    /// If there is somebody; then the copy must be discarded.
    pub(super) fn no_other_writer(&self) -> Result<()> {
        for Watched {
            device, witness, ..
        } in &self.devices
        {
            let user = mounted::other_writer(device)?;
            let closed = || witness.trace_of_writing_to_files();
            if let Some(who) = user.or_else(closed) {
                return Err(written_by_others(&self.source).because(who));
            }
        }
        Ok(())
    }

    /// The same, where whoever wrote to a device below would go unnoticed.
    ///
    /// # Errors
    /// As [`no_other_writer`](Self::no_other_writer); if that cannot be told.
    pub(super) fn nobody_wrote_below(&self) -> Result<()> {
        self.no_other_writer()?;
        for watched in &self.devices {
            let trace = watched.witness.trace_of_writing(None).map_err(|error| {
                Error::io("cannot tell whether it was written to", error).on(&self.source.path)
            })?;
            if let Some(why) = trace {
                return Err(written_by_others(&self.source).because(why));
            }
        }
        Ok(())
    }

    /// What the kernel tells of its devices now. Allocates nothing.
    pub(super) fn look(&self) -> io::Result<Looks> {
        let mut looks = [Look::default(); MOST_DEVICES];
        for (look, watched) in looks.iter_mut().zip(&self.devices) {
            *look = watched.look()?;
        }
        Ok(looks)
    }

    /// Whether a write is under way.
    pub(super) fn is_writing(&self) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|watched| watched.in_flight.writes().is_ok_and(|writes| writes > 0))
    }
}

impl Watched {
    fn open(device: &BlockDevice) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            witness: Witness::of_device(device)?,
            counters: match trace::may_be_counted(device)? {
                true => Some(CounterFile::open(device.number)?),
                false => None,
            },
            in_flight: InFlightFile::open(device.number)?,
        })
    }

    fn look(&self) -> io::Result<Look> {
        let counted = self.counters.as_ref().map(CounterFile::read).transpose()?;
        let counted = counted.unwrap_or_default();
        Ok(Look {
            written: counted.writes.sectors,
            discarded: counted.discards.sectors,
            stamps: self.witness.stamps()?,
        })
    }
}

fn written_by_others(source: &Source) -> Error {
    Error::new(
        Kind::Inconsistent,
        "somebody else than its filesystem writes to it, or did while it was copied",
    )
    .on(&source.path)
    .hint("the copy was discarded; end whatever writes to the device, and try again")
}

/// How it shows that something was written between two looks that was not to be expected.
pub(super) fn change(then: &Looks, now: Looks, expect: Expect) -> Option<String> {
    then.iter().zip(now).find_map(|(then, mut now)| {
        match expect {
            Expect::Nothing => {}
            Expect::Discards => now.discarded = then.discarded,
            Expect::Anything => now = *then,
        }
        now.change_since(then)
    })
}

impl Look {
    /// How it shows that something was written since `then`; `None` if nothing was.
    fn change_since(&self, then: &Self) -> Option<String> {
        let written = self.written.wrapping_sub(then.written);
        let discarded = self.discarded.wrapping_sub(then.discarded);
        if (written, discarded) != (0, 0) {
            return Some(format!(
                "{written} sectors were written and {discarded} discarded"
            ));
        }
        let changed = self.stamps.tell_of_writing_since(&then.stamps);
        changed.then(|| "the file below it was changed".to_owned())
    }
}
