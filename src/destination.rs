//! Where a volume is written back: a block device or a raw file that must not look whole too early.
//!
//! Before the first write, the first and the last MiB (where filesystems, partition tables and
//! containers have their signatures) are zeroed; what belongs there is kept in memory, and written
//! only after everything else has reached stable storage and all checks have passed: the very first block,
//! without which hardly anything is recognized, at last and by itself. An interrupted restore leaves
//! nothing that a system would mount, neither the new volume nor the one that was there. The few signatures
//! that lie elsewhere (`signatures.rs` lists them) are cleared, and held back, in the same way.

pub(crate) mod apart;
mod candidate;
pub mod compare;
pub mod fit;
pub(crate) mod new_ids;
pub mod overwritten;
pub(crate) mod signatures;
pub(crate) mod subvolume;
pub(crate) mod target_name;
pub(crate) mod twin;
mod unsettled;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holdstill_platform::device::Disk;
use holdstill_platform::exclusive::{Claim, DiskLock};
use holdstill_platform::located::Located;
use holdstill_platform::loop_claims::LoopClaims;

use crate::destination::compare::Comparison;
use crate::destination::signatures::Found;
use crate::error::{Error, Kind, Result};
use crate::extent::{Extent, ExtentSet};
use crate::fs;
use crate::image::content::is_zero;
use crate::image::format::BLOCK;
use crate::read_at::{ReadAt, check_range};
use crate::units::{ByteLen, Offset};

pub(crate) use candidate::refusal;
pub use candidate::{Candidate, Taken};
pub(crate) use unsettled::Unsettled;

/// What is held back of the start until the end.
const HEAD: ByteLen = ByteLen::mib(1);

/// What is held back of the end: signatures that live there (md, ZFS) would speak too early. At the
/// end of a target that is larger than its volume they would speak of what was before, and are
/// cleared.
const TAIL: ByteLen = ByteLen::mib(1);

/// How a target is kept from others while it is written.
#[derive(Debug)]
enum Hold {
    /// It was made by us.
    New,
    Device(Claimed),
    /// With the loop devices that show it.
    File {
        _loops: LoopClaims,
    },
}

/// A block device that is ours while it is written: nobody can mount it or build on it, and udev and
/// partitioning tools keep their hands off its disk.
#[derive(Debug)]
struct Claimed {
    /// `None` while its filesystem is mounted by us.
    claim: Option<Claim>,
    _lock: Arc<DiskLock>,
}

/// A target being written. Dropped before [`finish`](Self::finish), it holds no signature; if it is a
/// file that did not exist before, it is removed.
#[derive(Debug)]
pub struct Target {
    disk: Disk,
    hold: Hold,
    /// By which it is opened again, never by its name.
    located: Located,
    /// What is written of the volume: all of it, or as much as there is room for.
    size: ByteLen,
    /// The volume.
    volume: ByteLen,
    /// Signatures outside of its first MiB that were there before.
    stale: Vec<Found>,
    is_done: bool,
    tail: Held,
    head: Held,
    /// Blocks between them where signatures may lie.
    late: Vec<Held>,
    /// All of these.
    held: ExtentSet,
}

/// A part of the volume that is written last: zeros, until something else is known.
#[derive(Debug)]
struct Held {
    extent: Extent,
    bytes: Mutex<Vec<u8>>,
    /// The volume says something of it.
    is_known: AtomicBool,
}

impl Held {
    fn new(extent: Extent) -> Self {
        Self {
            extent,
            bytes: Mutex::new(vec![0; extent.len.as_usize()]),
            is_known: AtomicBool::new(false),
        }
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is held of `extent`, as [`with`](Self::with).
    fn change(&self, extent: Extent, change: impl FnOnce(&mut [u8], usize)) {
        self.with(extent, |part, at| {
            self.is_known.store(true, Ordering::Relaxed);
            change(part, at);
        });
    }

    /// Hands out what is held of `extent`, and where in `extent` that is.
    fn with(&self, extent: Extent, use_it: impl FnOnce(&mut [u8], usize)) {
        if let Some(part) = extent.intersect(self.extent) {
            let start = part.start.since(self.extent.start).as_usize();
            use_it(
                &mut self.bytes()[start..start + part.len.as_usize()],
                part.start.since(extent.start).as_usize(),
            );
        }
    }
}

impl Target {
    /// For a volume of `volume` bytes on a target that may be smaller: what it has no room for is zeros
    /// that nobody needs.
    fn new(disk: Disk, hold: Hold, located: Located, volume: ByteLen) -> Self {
        let size = volume.min(ReadAt::len(&disk));
        let end = Offset(size.0);
        let head_end = Offset(HEAD.min(size).0);
        let tail_start = Offset(end.0.saturating_sub(TAIL.0))
            .align_down(BLOCK)
            .max(head_end);
        let mut target = Self {
            disk,
            hold,
            located,
            size,
            volume,
            stale: Vec::new(),
            is_done: false,
            tail: Held::new(Extent::between(tail_start, end)),
            head: Held::new(Extent::between(Offset::ZERO, head_end)),
            late: Vec::new(),
            held: ExtentSet::new(),
        };
        target.hold_back(signatures::blocks(size));
        target
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.disk.path()
    }

    fn clear_signatures(&self) -> Result<()> {
        for held in [&self.head, &self.tail] {
            let Extent { start, len } = held.extent;
            self.disk.zero_range(start.0, len.0)?;
        }
        let room = ReadAt::len(&self.disk);
        if room > self.size {
            let tail = TAIL.min(room - self.size);
            self.disk.zero_range((room - tail).0, tail.0)?;
            let behind = HEAD.min(room) - HEAD.min(self.size);
            self.disk.zero_range(self.size.0, behind.0)?;
        }
        for found in signatures::find(&self.disk) {
            let block = found.block();
            let len = ByteLen(BLOCK).min(room - ByteLen(block.0));
            self.disk.zero_range(block.0, len.0)?;
        }
        Ok(self.disk.sync()?)
    }

    /// Old signatures that were cleared and that the volume itself does not have in their places; for
    /// people.
    pub fn cleared(&self) -> Vec<String> {
        let is_gone = |found: &&Found| match found.at.0 < self.size.0 {
            true => !found.is_on(self),
            false => true,
        };
        let gone = self.stale.iter().filter(is_gone);
        let path = self.path().display();
        gone.map(|found| format!("an old signature was cleared on {path}: {found}"))
            .collect()
    }

    /// All parts that are written last.
    fn parts(&self) -> impl Iterator<Item = &Held> {
        [&self.head, &self.tail].into_iter().chain(&self.late)
    }

    /// The blocks between head and tail that the volume says something of: others stay as they are.
    fn known_late(&self) -> impl Iterator<Item = &Held> {
        let late = self.late.iter();
        late.filter(|held| held.is_known.load(Ordering::Relaxed))
    }

    /// Holds back head, tail, and those of `blocks` that lie between them.
    fn hold_back(&mut self, blocks: ExtentSet) {
        let middle = Extent::between(self.head.extent.end(), self.tail.extent.start);
        self.late = blocks.intersect(middle).map(Held::new).collect();
        self.held = self.parts().map(|part| part.extent).collect();
    }

    /// Writes bytes of the volume. Those of its first and last MiB are kept back. Zeros that a shorter target
    /// has no room for are left out.
    ///
    /// # Errors
    /// If the range lies behind the volume's end, or the device refuses.
    pub fn write(&self, offset: Offset, bytes: &[u8]) -> Result<()> {
        check_range(self.volume, offset, ByteLen(bytes.len() as u64))?;
        let bytes = self.without_tail(offset, bytes)?;
        let extent = Extent::new(offset.0, bytes.len() as u64);
        for held in self.parts() {
            held.change(extent, |part, at| {
                part.copy_from_slice(&bytes[at..at + part.len()]);
            });
        }
        for rest in self.held.gaps(extent) {
            let at = rest.start.since(offset).as_usize();
            self.disk
                .write_all_at(&bytes[at..at + rest.len.as_usize()], rest.start.0)
                .map_err(|error| Error::from(error).at(rest.start))?;
        }
        Ok(())
    }

    /// What there is room for; the rest has to be zeros.
    fn without_tail<'a>(&self, offset: Offset, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let room = self.size.0.saturating_sub(offset.0);
        let (fitting, rest) = bytes.split_at(room.min(bytes.len() as u64) as usize);
        match is_zero(rest) {
            true => Ok(fitting),
            false => Err(Error::new(
                Kind::TooSmall,
                "the target is too small: there is content past its end",
            )
            .on(self.disk.path())
            .at(Offset(self.size.0))),
        }
    }

    /// Makes sure that what was written to a target that is shorter than the volume ends where the target
    /// does, at the latest. A filesystem that was in use may have grown after it was first looked at.
    fn check_end(&self) -> Result<()> {
        if self.size == self.volume {
            return Ok(());
        }
        match fs::end_of_content(self) {
            None => Ok(()),
            Some(Some(end)) if end <= self.size => Ok(()),
            _ => Err(Error::new(
                Kind::TooSmall,
                "the target is too small: the filesystem on it does not end where the target does",
            )
            .on(self.disk.path())
            .hint(format!("{} bytes are enough", self.volume.0))),
        }
    }

    /// Writes zeros, really.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn zero(&self, extent: Extent) -> Result<()> {
        check_range(self.volume, extent.start, extent.len)?;
        let Some(extent) = extent.intersect(Extent::new(0, self.size.0)) else {
            return Ok(());
        };
        for held in self.parts() {
            held.change(extent, |part, _| part.fill(0));
        }
        for rest in self.held.gaps(extent) {
            self.disk
                .zero_range(rest.start.0, rest.len.0)
                .map_err(|error| Error::from(error).at(rest.start))?;
        }
        Ok(())
    }

    /// Brings everything written so far to stable storage, to be compared with what volume `volume`
    /// should be: all but what [`finish`](Self::finish) writes.
    ///
    /// # Errors
    /// What the device says.
    pub fn comparison(&self, volume: u32) -> Result<Comparison> {
        self.disk.sync()?;
        let disk = self.disk.try_clone()?;
        Ok(Comparison::new(volume, self.size, disk)?
            .without(self.held.clone())
            .of_copy())
    }

    /// Makes the volume whole: everything written so far reaches stable storage, and then what was
    /// held back, the first block last; with `compare`, that is read back.
    ///
    /// # Errors
    /// If the device refuses; the target then holds no signature, or is damaged at its ends.
    /// [`Kind::Mismatch`] if it holds something else: it is without a signature again then.
    pub fn finish(mut self, compare: bool) -> Result<()> {
        self.complete(compare)?;
        self.let_go();
        Ok(())
    }

    fn complete(&mut self, compare: bool) -> Result<()> {
        self.check_end()?;
        self.disk.sync()?;
        self.write_held()?;
        match compare {
            true => self.compare_held(),
            false => Ok(()),
        }
    }

    /// It is whole.
    fn let_go(mut self) {
        self.is_done = true;
        if matches!(self.hold, Hold::Device(_)) {
            self.hold = Hold::New;
            // A whole disk may have a partition table now. A partition cannot be asked, and a disk
            // without one says no: neither matters.
            if let Err(error) = self.disk.reread_table() {
                log::debug!("{error}");
            }
        }
    }

    /// A large write that is cut short, by SIGKILL or a power cut, leaves a part of what it should
    /// write: a first block written with others may stand there without them.
    fn write_held(&self) -> Result<()> {
        let (tail, head) = (self.tail.bytes(), self.head.bytes());
        let (first, rest) = head.split_at(head.len().min(BLOCK as usize));
        let start = self.head.extent.start.0;
        self.disk.write_all_at(&tail, self.tail.extent.start.0)?;
        for late in self.known_late() {
            self.disk.write_all_at(&late.bytes(), late.extent.start.0)?;
        }
        self.disk.write_all_at(rest, start + first.len() as u64)?;
        self.disk.sync()?;
        self.disk.write_all_at(first, start)?;
        Ok(self.disk.sync()?)
    }

    fn compare_held(&self) -> Result<()> {
        for held in self.known_late().chain([&self.tail, &self.head]) {
            let start = held.extent.start;
            let found = self.disk.read_vec_at(start, held.extent.len)?;
            if *held.bytes() != found {
                self.clear_signatures()?;
                let what = "what was written reads back as something else, in what is written last";
                return Err(Error::new(Kind::Mismatch, what)
                    .on(self.disk.path())
                    .at(start));
            }
        }
        Ok(())
    }
}

/// What the volume holds so far, what is kept back included.
impl ReadAt for Target {
    fn len(&self) -> ByteLen {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        let extent = Extent::new(offset.0, buf.len() as u64);
        check_range(self.size, extent.start, extent.len)?;
        for rest in self.held.gaps(extent) {
            let at = rest.start.since(offset).as_usize();
            self.disk
                .read_exact_at(&mut buf[at..at + rest.len.as_usize()], rest.start.0)
                .map_err(|error| Error::from(error).at(rest.start))?;
        }
        for held in self.parts() {
            held.with(extent, |part, at| {
                buf[at..at + part.len()].copy_from_slice(part);
            });
        }
        Ok(())
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.disk.as_fd()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.is_done || self.located.node().is_some() {
            return;
        }
        // Made by us, unless somebody has put another one in its place.
        let own = self.disk.file_id();
        let removed = own.and_then(|own| {
            let (folder, name) = (self.located.folder(), self.located.name());
            folder.remove(name, |found| found == own)
        });
        if let Err(error) = removed {
            log::warn!("cannot remove {}: {error}", self.path().display());
        }
    }
}
