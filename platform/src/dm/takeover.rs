//! A mapped device in use is taken over: a snapshot target is slid under its live mapping, and taken
//! away again (Documentation/admin-guide/device-mapper/snapshot.rst; drivers/md/dm-snap.c, dm-ioctl.c).
//!
//! Beside the device two others are made: *real*, with a second copy of its table, and *snapshot*, of
//! real, read-only. Both are active before the device itself is touched. Then the table
//! `snapshot-origin real` is loaded into the device, and one system call swaps it in: the kernel lets
//! the writes that are on their way end, swaps, and lets the others go on. That is the instant of the
//! snapshot: what was written before went past real, so the snapshot shows it; what is written
//! afterwards goes through the origin, which keeps what it overwrites. No moment between two system calls
//! leaves the device suspended, so nobody has to resume it should the run die or be stopped.
//!
//! The origin takes the length at which it splits writes from the snapshots that are registered when it
//! is resumed, so the snapshot has to be there first. (Writes that are longer than a chunk would else be
//! kept in part only.)
//!
//! Undoing needs no key: the table of real, with the key in it, is read back from the kernel by whoever
//! may do so, loaded into the device, and swapped in by one system call again. It is not kept in the
//! device's other slot meanwhile: there it would be lost if a swap failed (before Linux 6.6 or so), and
//! anybody who suspends and resumes the device would undo the takeover unseen.
//!
//! | the run dies | what there is | what undoing does |
//! | --- | --- | --- |
//! | before real was made | nothing | nothing |
//! | before the origin was loaded | real, perhaps snapshot | removes them |
//! | before the swap | the origin in the other slot | clears the slot, removes them |
//! | in the swap | one of the rows around this one: the kernel ends it or fails whole | as there |
//! | after the swap | the origin is live; the filesystem frozen, at most until the guard thaws it | loads the table of real, swaps it in, removes them |
//! | in undoing, before the swap back | the same, with the old table in the other slot | the same again |
//! | in undoing, after it | real, perhaps snapshot | removes them |
//!
//! Each step looks at what there is, so undoing can be begun again after any of them. What it removes
//! is found by uuids that hold the run's id; the device gets its table back only if its own is an
//! origin of that real. A swap that fails when the device is already suspended inside of it (the
//! kernel cannot combine the limits of the queues) is the one case in which the device has to be
//! resumed: that is done at once, and undoing looks for it, too.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::request::{
    create, end_of, find, is_origin_of, load, remove, resume, same_targets, simple, turn_around,
};
use super::{
    INACTIVE_PRESENT, NOFLUSH, QUERY_INACTIVE, READ_ONLY, SECURE_DATA, STATUS_TABLE, SUSPEND,
    Secret, Who, control, exchange, fetch, header, ioctl, open_control, path_of, u32_at, wipe,
    write_header,
};
use crate::error::{Context, Error, Result};
use crate::memory::Arena;
use crate::node::{self, BlockDevice, DeviceNumber};
use crate::os::linux_only;

/// Before the uuids of all devices made here.
const UUID_PREFIX: &str = "HOLDSTILL-";

/// Before their names.
const NAME_PREFIX: &str = "holdstill.";

/// At the end of uuids and names.
const REAL: &str = "-real";
const SNAPSHOT: &str = "-snapshot";

/// Sectors that are kept at a time. Reads of the snapshot and writes of the device are split at that:
/// with fewer they take long, with more a small write has much copied.
const CHUNK: u64 = 32;

/// `DM_UDEV_DISABLE_{DM,SUBSYSTEM,DISK,OTHER}_RULES_FLAG` of libdevmapper.h, in the place of a cookie:
/// no tool looks into the devices made here, and no link leads to them. They hold the same signatures
/// as the device itself.
const LEAVE_ALONE: u32 = 0xf << 16;

/// At least so much is there for a table when it is read back, in bytes.
const LEAST_ROOM: usize = 64 << 10;

/// How often what is busy is tried again.
const RETRY: Duration = Duration::from_millis(50);

/// How one device is taken over by one run, and how that is undone.
#[derive(Clone, Debug)]
pub struct Takeover {
    device: DeviceNumber,
    run_id: String,
    /// Name and uuid.
    real: (String, String),
    snapshot: (String, String),
    /// Bytes that suffice to read its table back.
    room: usize,
}

/// A device about to be taken over: all but the swap is done.
#[derive(Debug)]
pub struct Prepared {
    control: OwnedFd,
    device: DeviceNumber,
    real: DeviceNumber,
    /// The snapshot, which shows the device as it was at the swap.
    pub snapshot: DeviceNumber,
}

/// Why a device cannot be taken over at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its table names a key that cannot be had any more.
    Key,
    /// Its table, or its state, does not allow it.
    Table,
}

/// A takeover that a run has left.
#[derive(Clone, Debug)]
pub struct Leftover {
    /// What is left.
    pub takeover: Takeover,
    /// The run.
    pub run_id: String,
}

impl Takeover {
    /// How run `run_id` would take a device over. Nothing is changed.
    ///
    /// # Errors
    /// If it is no mapped device, or cannot be asked.
    pub fn of(device: &BlockDevice, run_id: &str) -> Result<Self> {
        let path = device.sysfs().join("dm/name");
        let name = std::fs::read_to_string(&path).context("cannot read", &path)?;
        let table = fetch(
            Who::Number(device.number),
            STATUS_TABLE | NOFLUSH | SECURE_DATA,
            &path_of(device.number),
        )?;
        let used = u32_at(table.0.bytes(), header::DATA_SIZE).unwrap_or(0) as usize;
        Ok(Self::named(device.number, name.trim_end(), run_id, used))
    }

    fn named(device: DeviceNumber, name: &str, run_id: &str, used: usize) -> Self {
        let made = |end: &str| {
            let most = header::NAME_LEN - 1 - end.len();
            let mut begin = format!("{NAME_PREFIX}{run_id}.{name}");
            while begin.len() > most {
                begin.pop();
            }
            let uuid = format!("{UUID_PREFIX}{run_id}-{device}{end}");
            (begin + end, uuid)
        };
        Self {
            device,
            run_id: run_id.to_owned(),
            real: made(REAL),
            snapshot: made(SNAPSHOT),
            room: used.saturating_mul(2).max(LEAST_ROOM),
        }
    }

    /// The name of the device that gets the copy of the table: what the takeover is called.
    pub fn name(&self) -> &str {
        &self.real.0
    }

    /// How many bytes [`undo`](Self::undo) needs to work with.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// Does everything that can fail, with the copy-on-write store on device `store`. What it has made
    /// is left to [`undo_patiently`](Self::undo_patiently), also if it fails.
    ///
    /// # Errors
    /// Whatever the device mapper says; see [`refusal`](Self::refusal).
    pub fn prepare(&self, store: DeviceNumber) -> Result<Prepared> {
        let control = open_control()?;
        let what = path_of(self.device);
        let refuse = |why: &str| Error::other("cannot take over", &what, why);
        let mut table = self.table(Who::Number(self.device))?;
        let flags = u32_at(table.0.bytes(), header::FLAGS).unwrap_or(0);
        if flags & INACTIVE_PRESENT != 0 {
            return Err(refuse("somebody has loaded another table into it"));
        }
        if flags & SUSPEND != 0 {
            return Err(refuse("it is suspended"));
        }
        let sectors = end_of(table.0.bytes()).ok_or_else(|| refuse("its table makes no sense"))?;
        let read_only = flags & READ_ONLY;

        let real = create(&control, &self.real)?;
        let real_who = Who::Uuid(&self.real.1);
        turn_around(table.0.bytes_mut(), real_who, read_only)
            .ok_or_else(|| refuse("its table makes no sense"))?;
        exchange(&control, ioctl::TABLE_LOAD, table.0.bytes_mut())
            .context("cannot load the table once more of", &what)?;
        drop(table);
        let resume = |who, name: &str| {
            resume(&control, who, LEAVE_ALONE).context("cannot bring up", Path::new(name))
        };
        resume(real_who, &self.real.0)?;
        // Undoing goes by it.
        if !self.is_current()? {
            return Err(refuse("its table came out differently when loaded again"));
        }

        let snapshot = create(&control, &self.snapshot)?;
        let snapshot_who = Who::Uuid(&self.snapshot.1);
        let params = format!("{real} {store} N {CHUNK}");
        load(
            &control,
            snapshot_who,
            READ_ONLY,
            sectors,
            "snapshot",
            &params,
        )
        .context("cannot make a snapshot of", &what)?;
        resume(snapshot_who, &self.snapshot.0)?;
        let params = real.to_string();
        let origin = Who::Number(self.device);
        load(
            &control,
            origin,
            read_only,
            sectors,
            "snapshot-origin",
            &params,
        )
        .context("cannot load a new table into", &what)?;
        Ok(Prepared {
            control,
            device: self.device,
            real,
            snapshot,
        })
    }

    /// Whether the device still has the table that was copied: to be asked right before the swap, for it
    /// would give the device the old one for another.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn is_current(&self) -> Result<bool> {
        let copy = self.table(Who::Uuid(&self.real.1))?;
        Ok(same_targets(&copy, &self.table(Who::Number(self.device))?))
    }

    /// What an error of [`prepare`](Self::prepare) means: that it cannot be done; `None`: that it failed.
    pub fn refusal(error: &Error) -> Option<Refusal> {
        match (error.errno(), error.kind()) {
            (Some(linux_only::ENOKEY), _) => Some(Refusal::Key),
            (Some(libc::EBUSY | libc::EINVAL), _) | (None, io::ErrorKind::Other) => {
                Some(Refusal::Table)
            }
            _ => None,
        }
    }

    fn table(&self, who: Who<'_>) -> Result<Secret> {
        let table = fetch(
            who,
            STATUS_TABLE | NOFLUSH | SECURE_DATA,
            &path_of(self.device),
        )?;
        match u32_at(table.0.bytes(), header::DATA_SIZE) {
            Some(len) if (len as usize) < self.room => Ok(table),
            _ => {
                let why = "its table has grown";
                Err(Error::other("cannot take over", path_of(self.device), why))
            }
        }
    }

    /// Undoes as much as there is to undo; see the table above. Can be called again. Allocates nothing.
    /// `room`: [`room`](Self::room) bytes of locked memory, which are wiped.
    pub(crate) fn undo(&self, room: &mut [u8]) -> io::Result<()> {
        let control = control()?;
        if let Some((real, flags)) = find(&control, Who::Uuid(&self.real.1))? {
            let given = self.give_back(&control, real, flags & READ_ONLY, room);
            wipe(room);
            given?;
        }
        // One that is busy does not keep the other.
        let removed = remove(&control, &self.snapshot.1);
        remove(&control, &self.real.1).and(removed)
    }

    /// Gives the device the table of `real` back.
    fn give_back(
        &self,
        control: &OwnedFd,
        real: DeviceNumber,
        read_only: u32,
        room: &mut [u8],
    ) -> io::Result<()> {
        let origin = Who::Number(self.device);
        let Some((_, flags)) = find(control, origin)? else {
            return Ok(());
        };
        if is_origin_of(control, origin, 0, real, room)? {
            let flags = STATUS_TABLE | NOFLUSH | SECURE_DATA;
            write_header(room, Who::Uuid(&self.real.1), flags);
            exchange(control, ioctl::TABLE_STATUS, room)?;
            turn_around(room, origin, read_only).ok_or(io::ErrorKind::InvalidData)?;
            exchange(control, ioctl::TABLE_LOAD, room)?;
            return resume(control, origin, 0);
        }
        if flags & INACTIVE_PRESENT != 0
            && is_origin_of(control, origin, QUERY_INACTIVE, real, room)?
        {
            simple(control, ioctl::TABLE_CLEAR, origin, 0, 0)?;
        }
        match flags & SUSPEND {
            0 => Ok(()),
            _ => resume(control, origin, 0),
        }
    }

    /// Undoes it; what is busy is tried again for up to `patience`.
    ///
    /// # Errors
    /// `ResourceBusy` if somebody uses the snapshot; whatever the device mapper says.
    pub fn undo_patiently(&self, patience: Duration) -> Result<()> {
        let mut room = Arena::new(self.room)?;
        let end = Instant::now() + patience;
        loop {
            match self.undo(room.bytes_mut()) {
                Err(_) if Instant::now() < end => std::thread::sleep(RETRY),
                undone => return undone.context("cannot remove", self.name()),
            }
        }
    }

    /// All that takeovers of this machine have left, or are just using.
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub fn leftovers() -> Result<Vec<Leftover>> {
        let mut found: Vec<Leftover> = Vec::new();
        for device in node::disks()? {
            let read = |name: &str| std::fs::read_to_string(device.sysfs().join(name));
            let (Ok(uuid), Ok(name)) = (read("dm/uuid"), read("dm/name")) else {
                continue;
            };
            let Some(mut takeover) = parse_made(name.trim_end(), uuid.trim_end()) else {
                continue;
            };
            if found
                .iter()
                .any(|other| other.takeover.real.1 == takeover.real.1)
            {
                continue;
            }
            let real = Who::Uuid(&takeover.real.1);
            let flags = STATUS_TABLE | NOFLUSH | SECURE_DATA;
            // Where there is none, nothing is to be read back.
            if let Ok(table) = fetch(real, flags, Path::new(takeover.name())) {
                let used = u32_at(table.0.bytes(), header::DATA_SIZE).unwrap_or(0) as usize;
                takeover.room = takeover.room.max(used.saturating_mul(2));
            }
            found.push(Leftover {
                run_id: takeover.run_id.clone(),
                takeover,
            });
        }
        Ok(found)
    }
}

impl Prepared {
    /// Swaps the new table in: the instant of the snapshot. The filesystem on the device is not frozen
    /// by this: that is left to the caller. Allocates nothing.
    ///
    /// # Errors
    /// What the device mapper says: then the device has its old table.
    pub fn swap(&self) -> io::Result<()> {
        let device = Who::Number(self.device);
        let swapped = resume(&self.control, device, 0);
        // Whoever thaws its filesystem would wait for it.
        if swapped.is_err()
            && let Ok(Some((_, flags))) = find(&self.control, device)
            && flags & SUSPEND != 0
        {
            let _ = resume(&self.control, device, 0);
        }
        swapped
    }

    /// Whether the device still has the table that was swapped in. If not, the snapshot does not show
    /// the instant any more.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn is_in_place(&self) -> Result<bool> {
        let table = super::table(self.device)?;
        Ok(match &table.targets[..] {
            [target] => target.kind == "snapshot-origin" && target.params == self.real.to_string(),
            _ => false,
        })
    }
}

/// The takeover that a device of this name and uuid belongs to, if it is one of ours.
fn parse_made(name: &str, uuid: &str) -> Option<Takeover> {
    let rest = uuid.strip_prefix(UUID_PREFIX)?;
    let (rest, end) = [REAL, SNAPSHOT]
        .into_iter()
        .find_map(|end| Some((rest.strip_suffix(end)?, end)))?;
    let (run_id, device) = rest.rsplit_once('-')?;
    let origin = name
        .strip_prefix(NAME_PREFIX)?
        .strip_prefix(run_id)?
        .strip_prefix('.')?
        .strip_suffix(end)?;
    Some(Takeover::named(device.parse().ok()?, origin, run_id, 0))
}

#[cfg(test)]
mod tests;
