//! The one place that freezes a mounted filesystem and thaws it, and that proves that the freeze held
//! from one moment in it to another.
//!
//! A frozen filesystem writes nothing. So the device's counters of writes, and size and times of the
//! file if it is a loop device, must be the same at the last moment before the thaw as when the freeze
//! had settled. That a thaw succeeds proves less: the kernel does not say whose freeze it ended, and
//! another tool may have thawed and frozen again meanwhile. Nor does a freeze stop those who write to
//! the device itself.
//!
//! While anything is frozen, nothing is written to standard output or error (they may end on what is
//! frozen), and a stop by the terminal waits.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdstill_platform::btrfs::Filesystem;
use holdstill_platform::counters::{CounterFile, InFlightFile};
use holdstill_platform::freeze::{FreezeError, MountPoint};
use holdstill_platform::guard::{Frozen, Thawed};
use holdstill_platform::node::BlockDevice;
use holdstill_platform::trace;
use holdstill_platform::witness::{Stamps, Witness};

use super::mounted;
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::run::{self, FreezeRecord, Run};
use crate::source::{Medium, Source};

/// How long another run of holdstill is waited for that has the source frozen.
const PATIENCE: Duration = Duration::from_secs(15);

/// How often to look whether it has thawed it.
const NAP: Duration = Duration::from_millis(20);

/// How long requests that were under way when the freeze came may take to end.
const SETTLING: Duration = Duration::from_secs(1);

/// A filesystem that can be frozen, and what tells whether it stays so.
#[derive(Debug)]
pub(super) struct Freezer {
    source: Source,
    point: Arc<MountPoint>,
    run: Run,
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
pub(super) enum Expect {
    /// Nothing at all.
    Nothing,
    /// Discards of free blocks that were on their way: somebody else tells which blocks they were of.
    Discards,
    /// Anything: somebody else tells where everything went.
    Anything,
}

/// What the kernel tells of a device at one moment. Later it must tell the same.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    written: u64,
    discarded: u64,
    stamps: Stamps,
}

type Looks = [Look; MOST_DEVICES];

impl Freezer {
    /// Opens the mount point of a source, and makes sure that it is the one of its device.
    ///
    /// # Errors
    /// If another filesystem is mounted over it, or it cannot be opened or watched.
    pub(super) fn open(source: &Source, run: &Run) -> Result<Self> {
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
        run: &Run,
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

    /// Freezes; what is dirty should have been written out just before, or the freeze takes as long.
    /// Another run of holdstill that has it frozen is waited for.
    ///
    /// # Errors
    /// If that takes too long, somebody else has frozen it, or the guard is lost. Nothing is frozen then.
    pub(super) fn freeze(
        self: &Arc<Self>,
        deadline: Duration,
        progress: &dyn Progress,
    ) -> Result<Ice> {
        self.run.check_guard()?;
        // On record before it happens, as long as it may.
        let under_way = UnderWay::begin(self)?;
        let begin = Instant::now();
        let mut is_told = false;
        loop {
            let guard = self.run.guard()?;
            progress.hush(true);
            let frozen = guard.freeze(&self.point, deadline);
            if frozen.is_err() {
                progress.hush(false);
            }
            match frozen {
                Ok(frozen) => {
                    return Ok(Ice {
                        frozen,
                        freezer: Arc::clone(self),
                        _under_way: under_way,
                        settled: None,
                    });
                }
                Err(FreezeError::AlreadyFrozen) => {
                    let device = self.point.device().to_string();
                    let Some(other) = run::freezing(&device, self.run.id())? else {
                        return Err(mounted::explain(FreezeError::AlreadyFrozen, &self.source));
                    };
                    if begin.elapsed() > PATIENCE {
                        let what = format!("another run of holdstill keeps it frozen ({other})");
                        return Err(Error::new(Kind::InUse, what)
                            .on(&self.source.path)
                            .hint("try again when that run has ended"));
                    }
                    if !std::mem::replace(&mut is_told, true) {
                        progress.warn(&format!("waiting for another run of holdstill ({other})"));
                    }
                    progress.check()?;
                    std::thread::sleep(NAP);
                }
                Err(error) => return Err(mounted::explain(error, &self.source)),
            }
        }
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

    /// Allocates nothing.
    fn look(&self) -> io::Result<Looks> {
        let mut looks = [Look::default(); MOST_DEVICES];
        for (look, watched) in looks.iter_mut().zip(&self.devices) {
            *look = watched.look()?;
        }
        Ok(looks)
    }

    fn is_writing(&self) -> bool {
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

/// A frozen filesystem. Dropped, it is thawed.
#[derive(Debug)]
#[must_use = "dropping it thaws"]
pub(super) struct Ice {
    // Dropped first: the thaw must not wait.
    frozen: Frozen,
    _under_way: UnderWay,
    freezer: Arc<Freezer>,
    /// What was seen when the freeze had settled.
    settled: Option<io::Result<Looks>>,
}

impl Ice {
    /// How long it is frozen by now.
    pub(super) fn held(&self) -> Duration {
        self.frozen.held()
    }

    /// From now on nothing may be written any more: what the filesystem wrote to be frozen is complete.
    /// Waits for requests that are still under way. Allocates nothing.
    pub(super) fn settle(&mut self) {
        let begin = Instant::now();
        while begin.elapsed() < SETTLING && self.freezer.is_writing() {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.settled = Some(self.freezer.look());
    }

    /// Thaws, and says how long it was frozen.
    ///
    /// # Errors
    /// [`Kind::Inconsistent`] if it was thawed before, or written to since it [settled](Self::settle)
    /// other than was to be expected: what was read is worthless.
    pub(super) fn thaw(self, expect: Expect, progress: &dyn Progress) -> Result<Thawed> {
        let Self {
            frozen,
            _under_way,
            freezer,
            settled,
        } = self;
        let now = freezer.look();
        let thawed = frozen.thaw();
        progress.hush(false);
        let thawed = thawed.map_err(|error| mounted::explain(error, &freezer.source))?;
        let Some(settled) = settled else {
            return Ok(thawed);
        };
        let io = |error| {
            Error::io("cannot tell whether it was written to", error).on(&freezer.source.path)
        };
        let (then, now) = (settled.map_err(io)?, now.map_err(io)?);
        for (then, mut now) in then.into_iter().zip(now) {
            match expect {
                Expect::Nothing => {}
                Expect::Discards => now.discarded = then.discarded,
                Expect::Anything => now = then,
            }
            if let Some(how) = now.change_since(&then) {
                return Err(did_not_hold(&freezer.source).because(how));
            }
        }
        Ok(thawed)
    }
}

fn did_not_hold(source: &Source) -> Error {
    Error::new(
        Kind::Inconsistent,
        "the freeze did not hold: the device was written to meanwhile",
    )
    .on(&source.path)
    .hint("the copy was discarded; find out who writes to the device, or thaws it, and try again")
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

/// The record says that a freeze is under way until this is dropped.
#[derive(Debug)]
struct UnderWay {
    run: Run,
    device: String,
}

impl UnderWay {
    fn begin(freezer: &Freezer) -> Result<Self> {
        let record = FreezeRecord::of(freezer.point.path(), freezer.point.device());
        let device = record.device.clone();
        let run = freezer.run.clone();
        run.note(|it| it.freezes.push(record))?;
        Ok(Self { run, device })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let Self { run, device } = self;
        let ended = run.note(|it| it.freezes.retain(|freeze| freeze.device != *device));
        if let Err(error) = ended {
            log::debug!("{error}");
        }
    }
}
