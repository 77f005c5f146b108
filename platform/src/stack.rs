//! Stacks of block devices: on which disks, and where there, a device built of others (device-mapper,
//! md, partitions) stores what is written to it, and the way back: which of its sectors a request to
//! such a disk wrote.
//!
//! Events of the block layer ([`crate::trace`]) name disks whose requests pass through its queues,
//! the *leaves*. To know from them what changed on the *top* device, they are mapped upwards. That is
//! right for layers where every write (1) goes to a fixed place that the layer's own description
//! tells, and (2) ends only when the requests for it have ended. Then a request is traced after it
//! took effect and before the writer learns of its end, at any height, just as on a bare disk.
//!
//! | layer | what makes it so (Linux 6.1) |
//! |---|---|
//! | partition | moves the sector, nothing else |
//! | `linear`, `striped`, `snapshot-origin` | remap the bio, which ends below (an origin at most waits for its snapshots' copies) |
//! | `crypt` without integrity | a write waits in queues only until it is submitted; `crypt_endio` of the last part ends it |
//! | `delay` | waits before it submits |
//! | md `raid1` | `raid1_end_write_request` of the last member ends it, but for write-behind |
//! | dm `raid` with `raid1` | the same code of md |
//!
//! Everything else is refused by name, for so much is known to be wrong: `writecache`, `cache`, bcache,
//! journals (of integrity, md) and write-behind end a write before it is where it will be read;
//! `thin`, `snapshot` and the like have maps that no table tells. A leaf without queues (`brd`, zram,
//! pmem, the head of an NVMe multipath device) causes no events under its number and is refused, too.
//!
//! With mirrors each member is traced, and whatever was written to any of them counts as written: the
//! last event of a write comes after the last moment at which reading the top could give old data.
//!
//! # Borders
//! An event is cut where the pieces of its disk begin and end, never judged by where it starts: a
//! request that the queue has merged across the border of a partition or of a logical volume gives to
//! each what is its own. Nothing has to be assumed about the length of requests, as events come for the
//! whole disk and the sums below are of bios, which are for one device each.
//!
//! # Sums
//! That no event was lost is proven by the kernel's own counters of the top device, which counts what
//! was sent to it: `dm_io_acct` of drivers/md/dm.c and `bio_start_io_acct` in raid1.c (or
//! `md_account_bio` of md.c in newer kernels) count the sectors of every bio once, split ones by their
//! parts, and data that comes with a flush only when it is sent again without. Since every sector sent
//! to the top is one sector on as many leaves as there are *copies*, between two quiet moments
//!
//! copies × counted by the top = sectors traced that map to it + lost,
//!
//! whatever the neighbours on the same leaves do (other volumes and partitions, superblocks, bitmaps,
//! copies made for snapshots), for they map to nothing. *Lost* is never negative, so equality proves
//! that it is none. For that the copies have to be as many everywhere on the device, which is demanded,
//! and no sector of a leaf may belong to two places of the top. A write behind the top's back (through
//! a lower device, or a resynchronisation) is traced and not counted, and one that failed may be sent
//! again: then the sums differ the other way, which is refused as well. Only together with a loss of
//! exactly the same size could such a write go unnoticed: whoever copies sees to it that nobody has
//! a device of the stack open for writing, and a mirror that is being written to is refused.
//!
//! A discard is traced with its first place and the length of all, where a disk takes several at once;
//! what counts is whom its first place belongs to. The other places are not marked, and need not be:
//! filesystems discard nothing but what they do not use.
//!
//! A write is counted when it begins (Linux 6.1) or when it ends (newer ones), so a moment is quiet only if
//! none is under way (`inflight` in sysfs); frozen, there is none of the filesystem's.
//!
//! dm's `raid` is the exception: a bio sent to it is counted by dm, and once more by md, which finds the
//! same device in it, where the kernel keeps statistics of the queues of mapped devices (newer than 6.1).
//! Not it but its members are compared then, each with its own counters: they are devices of dm
//! themselves, and hold nothing but its data (its metadata have their own).
//!
//! # The description may change
//! By a resized volume, a snapshot, a moved extent, a failed member. [`Stack::signature`] tells: what
//! was mapped is worth something only if it is the same before the trace began and after the last read.

mod map;
mod md;
mod resolve;
mod seen;
mod target;

pub(crate) use map::Reached;
pub use map::Stack;
#[cfg(test)]
pub(crate) use resolve::tests::two_segments;

use crate::node::{BlockDevice, DeviceNumber};

/// How many disks there may be below a stack.
pub(crate) const MOST_LEAVES: usize = 16;

impl Stack {
    /// What `device` is built of.
    ///
    /// # Errors
    /// Why its writes cannot be followed to disks: in words, with the device that is in the way.
    pub fn of(device: &BlockDevice) -> Result<Self, String> {
        resolve::resolve(device.number, &seen::look)
    }
}

#[cfg(test)]
impl Stack {
    /// One device that is a stretch of another, from its sector `start`, for tests on real devices.
    pub(crate) fn of_stretch(top: DeviceNumber, leaf: DeviceNumber, start: u64) -> Self {
        let look = |number: DeviceNumber| {
            let sectors = BlockDevice::of(number).unwrap().sectors;
            let piece = Piece {
                start: 0,
                sectors,
                lower: leaf,
                lower_start: start,
                stripe: None,
            };
            let (makeup, counts) = match number == leaf {
                true => (Makeup::Leaf, Counts::Requests),
                false => (Makeup::Joined(vec![piece]), Counts::Bios),
            };
            Ok(Seen {
                label: number.to_string(),
                sectors,
                makeup,
                counts,
                facts: String::new(),
            })
        };
        resolve::resolve(top, &look).unwrap()
    }
}

/// A stretch of a device, and where it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    /// Its first sector on the device.
    start: u64,
    /// How many sectors it has on the lower device; of a stripe: in this column.
    sectors: u64,
    /// The lower device, and the first sector on it.
    lower: DeviceNumber,
    lower_start: u64,
    /// If it is one column of several.
    stripe: Option<Stripe>,
}

/// One column of a striped stretch: chunk `n` of the column is chunk `n * columns + column` of the
/// stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stripe {
    chunk: u64,
    columns: u64,
    column: u64,
}

/// A part of a device, in bytes, and where it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Its first byte on the device.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// The lower device, and the first byte on it.
    pub(crate) lower: DeviceNumber,
    pub(crate) lower_start: u64,
    /// Whether byte follows byte there; else it is spread over the lower bytes somehow.
    pub(crate) is_exact: bool,
}

/// The parts that a device is built of; `None` if it does not say, or is built of nothing.
pub(crate) fn parts_of(number: DeviceNumber) -> Option<Vec<Part>> {
    let pieces = match seen::look(number).ok()?.makeup {
        Makeup::Leaf => return None,
        Makeup::Joined(pieces) | Makeup::Mirrored(pieces) => pieces,
    };
    let bytes = |sectors: u64| sectors.saturating_mul(512);
    let part = |piece: Piece| Part {
        start: bytes(piece.start),
        len: bytes(piece.sectors),
        lower: piece.lower,
        lower_start: bytes(piece.lower_start),
        is_exact: piece.stripe.is_none(),
    };
    Some(pieces.into_iter().map(part).collect())
}

/// How a device is made.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Makeup {
    /// A disk: its requests are traced under its own number.
    Leaf,
    /// Of pieces side by side, which cover it.
    Joined(Vec<Piece>),
    /// Of pieces that each hold all of it.
    Mirrored(Vec<Piece>),
}

/// What the kernel's counters of a device count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counts {
    /// Requests: merged ones only for the device that the first of them was for.
    Requests,
    /// Every bio once.
    Bios,
    /// Every bio twice, or no better known.
    Otherwise,
}

/// What a look at a device has found.
#[derive(Clone, Debug)]
struct Seen {
    /// What people call it.
    label: String,
    /// Its length in units of 512 bytes.
    sectors: u64,
    makeup: Makeup,
    counts: Counts,
    /// All that must not change about it, in words.
    facts: String,
}
