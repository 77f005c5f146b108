//! How much a block device was written to, by the kernel's own count
//! (`/sys/dev/block/M:m/stat`, Documentation/block/stat.rst).
//!
//! Equal counters before and after prove that no write or discard completed in between; against a
//! trace they show whether it saw everything.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::error::{Context, Result};
use crate::node::{BlockDevice, DeviceNumber};
use crate::os;

/// Requests completed, and how much they moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Completed requests.
    pub requests: u64,
    /// In units of 512 bytes.
    pub sectors: u64,
}

impl Moved {
    /// What was added since `earlier`. The counters are 64 bits wide and wrap at most in theory.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            requests: self.requests.wrapping_sub(earlier.requests),
            sectors: self.sectors.wrapping_sub(earlier.sectors),
        }
    }
}

/// The counters of one device or partition at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads.
    pub reads: Moved,
    /// Writes, write-zeroes and secure erasures among them.
    pub writes: Moved,
    /// Discards.
    pub discards: Moved,
    /// Cache flushes (of whole disks only).
    pub flushes: u64,
    /// Requests begun and not completed.
    pub in_flight: u64,
}

impl Counters {
    /// Reads the counters of a device.
    ///
    /// # Errors
    /// If the device is gone, or its kernel (before 4.18) does not count discards.
    pub fn of(device: DeviceNumber) -> Result<Self> {
        let file = CounterFile::open(device)?;
        file.read().context("cannot read", &file.path)
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let mut fields = [None; 17];
        let words = text
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty());
        for (field, word) in fields.iter_mut().zip(words) {
            *field = Some(std::str::from_utf8(word).ok()?.parse().ok()?);
        }
        let moved = |at: usize| {
            Some(Moved {
                requests: fields[at]?,
                sectors: fields[at + 2]?,
            })
        };
        Some(Self {
            reads: moved(0)?,
            writes: moved(4)?,
            in_flight: fields[8]?,
            discards: moved(11)?,
            // Since 5.5.
            flushes: fields[15].unwrap_or(0),
        })
    }

    /// Whether nothing was written or discarded between `earlier` and now. Only sectors tell: an
    /// `fsync(2)` without anything to write counts as a write request of none.
    pub fn nothing_written_since(&self, earlier: &Self) -> bool {
        self.writes.sectors == earlier.writes.sectors
            && self.discards.sectors == earlier.discards.sectors
    }

    /// Sectors written and discarded since `earlier`: what a trace of the same time must add up to.
    pub fn changed_sectors_since(&self, earlier: &Self) -> u64 {
        let written = self.writes.since(earlier.writes).sectors;
        written.wrapping_add(self.discards.since(earlier.discards).sectors)
    }
}

/// The counters of one device, kept open so that they can be read while a filesystem is frozen.
#[derive(Debug)]
pub struct CounterFile {
    file: File,
    path: PathBuf,
}

impl CounterFile {
    /// Opens the counters of a device.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn open(device: DeviceNumber) -> Result<Self> {
        let path = PathBuf::from(format!("/sys/dev/block/{device}/stat"));
        let file = File::open(&path).context("cannot open", &path)?;
        Ok(Self { file, path })
    }

    /// Reads them as they are now. Allocates nothing.
    ///
    /// # Errors
    /// If the device is gone; `InvalidData` if this kernel counts in another way.
    pub fn read(&self) -> io::Result<Counters> {
        let mut text = [0; 512];
        let length = self.file.read_at(&mut text, 0)?;
        let text = text.get(..length).unwrap_or_default();
        Counters::parse(text).ok_or(io::ErrorKind::InvalidData.into())
    }
}

/// How many writes to one device are under way (`/sys/dev/block/M:m/inflight`), kept open likewise. For
/// devices without queues they are those that have begun and not ended.
#[derive(Debug)]
pub struct InFlightFile {
    file: File,
}

impl InFlightFile {
    /// Opens the count of a device.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn open(device: DeviceNumber) -> Result<Self> {
        let path = PathBuf::from(format!("/sys/dev/block/{device}/inflight"));
        let file = File::open(&path).context("cannot open", &path)?;
        Ok(Self { file })
    }

    /// Writes under way just now. Allocates nothing.
    ///
    /// # Errors
    /// If the device is gone; `InvalidData` if this kernel counts in another way.
    pub fn writes(&self) -> io::Result<u64> {
        let mut text = [0; 64];
        let length = self.file.read_at(&mut text, 0)?;
        let text = std::str::from_utf8(text.get(..length).unwrap_or_default());
        // Reads come first.
        let words = text.ok().map(str::split_ascii_whitespace);
        let writes = words.and_then(|mut words| words.nth(1)?.parse().ok());
        writes.ok_or(io::ErrorKind::InvalidData.into())
    }
}

/// What it means for whoever relies on them that they are not kept, in words.
pub const NOT_KEPT: &str = os::counters::NOT_KEPT;

/// Whether the kernel counts at all for this device: `queue/iostats` of its disk.
///
/// # Errors
/// If the device is gone.
pub fn are_kept(device: &BlockDevice) -> Result<bool> {
    os::counters::are_kept(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, needs_root, run, scratch};

    #[test]
    fn old_and_new_formats() {
        let text = b"  1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n";
        let counters = Counters::parse(text).unwrap();
        let moved = |requests, sectors| Moved { requests, sectors };
        assert_eq!(counters.reads, moved(1, 3));
        assert_eq!(counters.writes, moved(5, 7));
        assert_eq!(counters.in_flight, 9);
        assert_eq!(counters.discards, moved(12, 14));
        assert_eq!(counters.flushes, 16);
        let before_flushes = Counters::parse(b"1 2 3 4 5 6 7 8 9 10 11 12 13 14 15");
        assert_eq!(before_flushes.unwrap().flushes, 0);
        // Without discards a write could go unseen: refused.
        assert_eq!(Counters::parse(b"1 2 3 4 5 6 7 8 9 10 11"), None);
        assert_eq!(Counters::parse(b"1 2 x"), None);
        assert_eq!(Counters::parse(b""), None);
    }

    #[test]
    fn privileged_counts_writes_and_discards_of_disk_and_partition() {
        needs_root!();
        let dir = scratch();
        let device = Loop::sparse(&dir.path().join("disk"), 16 << 20);
        let partition = device.add_partition(1, 2048, 16384);
        let disk = BlockDevice::at(device.path()).unwrap();
        let part = BlockDevice::at(&partition).unwrap();
        let sample = || {
            let of = |device: &BlockDevice| Counters::of(device.number).unwrap();
            (of(&disk), of(&part))
        };
        let before = sample();
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&partition)
            .unwrap();
        file.write_all_at(&[1; 8192], 4096).unwrap();
        file.sync_all().unwrap();
        let after = sample();
        assert!(!after.0.nothing_written_since(&before.0));
        assert_eq!(after.0.changed_sectors_since(&before.0), 16);
        assert_eq!(after.1.changed_sectors_since(&before.1), 16);
        drop(file);
        let partition = partition.to_str().unwrap();
        run("blkdiscard", ["-l", "1048576", partition]);
        let discarded = sample();
        assert_eq!(discarded.0.changed_sectors_since(&after.0), 2048);
        assert_eq!(discarded.0.discards.since(after.0.discards).sectors, 2048);
        run(
            "dd",
            [
                "of=/dev/null",
                "iflag=direct",
                "bs=1M",
                &format!("if={partition}"),
            ],
        );
        let read = sample();
        assert!(read.0.nothing_written_since(&discarded.0));
        assert_ne!(read.0.reads, discarded.0.reads);

        assert!(are_kept(&part).unwrap());
        let switch = disk.sysfs().join("queue/iostats");
        std::fs::write(&switch, "0").unwrap();
        assert!(!are_kept(&part).unwrap());
        std::fs::write(&switch, "1").unwrap();
    }
}
