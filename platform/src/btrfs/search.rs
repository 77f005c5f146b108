//! Items of a tree: BTRFS_IOC_TREE_SEARCH_V2 (`search_ioctl` of fs/btrfs/ioctl.c).

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::{Context, Error};

/// Where an item stands in its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// What it is about.
    pub objectid: u64,
    /// Which kind of item.
    pub kind: u8,
    /// Which of its kind.
    pub offset: u64,
}

impl Key {
    /// The lowest there is.
    pub const MIN: Self = Self::new(0, 0, 0);
    /// The highest there is.
    pub const MAX: Self = Self::new(u64::MAX, u8::MAX, u64::MAX);

    /// Of its three parts.
    pub const fn new(objectid: u64, kind: u8, offset: u64) -> Self {
        Self {
            objectid,
            kind,
            offset,
        }
    }

    /// The one after it.
    fn next(self) -> Option<Self> {
        if let Some(offset) = self.offset.checked_add(1) {
            return Some(Self { offset, ..self });
        }
        if let Some(kind) = self.kind.checked_add(1) {
            return Some(Self::new(self.objectid, kind, 0));
        }
        Some(Self::new(self.objectid.checked_add(1)?, 0, 0))
    }
}

/// One item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// First part of its key.
    pub objectid: u64,
    /// Second part of its key.
    pub kind: u8,
    /// Third part of its key.
    pub offset: u64,
    /// In which transaction the leaf it lies in was written last.
    pub transid: u64,
    /// Its content, as on disk.
    pub data: &'a [u8],
}

impl Item<'_> {
    /// Its key.
    pub fn key(&self) -> Key {
        Key::new(self.objectid, self.kind, self.offset)
    }
}

/// Bytes for the items of one answer: an item has less than 64 KiB.
const ROOM: usize = 128 << 10;

/// Bytes of `struct btrfs_ioctl_search_header`: transid, objectid, offset of 8, type, len of 4 each.
const HEADER: usize = 32;

/// `struct btrfs_ioctl_search_key`, and how much room is behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    tree: u64,
    min_objectid: u64,
    max_objectid: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_kind: u32,
    max_kind: u32,
    /// At most so many items; from the kernel: so many.
    items: u32,
    unused: u32,
    unused_too: [u64; 4],
    room: u64,
}

const _: () = assert!(size_of::<Question>() == 112);

impl Question {
    pub(super) fn new(tree: u64, min: Key, max: Key, min_transid: u64) -> Self {
        Self {
            tree,
            min_objectid: min.objectid,
            max_objectid: max.objectid,
            min_offset: min.offset,
            max_offset: max.offset,
            min_transid,
            max_transid: u64::MAX,
            min_kind: min.kind.into(),
            max_kind: max.kind.into(),
            items: u32::MAX,
            unused: 0,
            unused_too: [0; 4],
            room: ROOM as u64,
        }
    }
}

/// A question and room for its answer, in one piece as the kernel wants them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Exchange {
    question: Question,
    found: [u8; ROOM],
}

mod ioctl {
    // The size in the number is that of the question alone.
    nix::ioctl_readwrite!(tree_search_v2, 0x94, 17, super::Question);
}

/// Room for answers, one for every search that is going on at the same time.
#[derive(Default)]
pub(super) struct Rooms(Mutex<Vec<Box<[Exchange]>>>);

impl fmt::Debug for Rooms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rooms").finish_non_exhaustive()
    }
}

impl Rooms {
    /// Hands the items that `question` is about to `visit`. `asked` is an open folder, and what it is
    /// called.
    pub(super) fn search<E: From<Error>>(
        &self,
        asked: (BorrowedFd<'_>, &Path),
        question: Question,
        visit: &mut dyn FnMut(Item<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let unused = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut room = unused.unwrap_or_else(|| {
            let empty = Exchange {
                question,
                found: [0; ROOM],
            };
            vec![empty].into_boxed_slice()
        });
        let done = room
            .first_mut()
            .map_or(Ok(()), |room| search(asked, question, room, visit));
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(room);
        done
    }
}

fn search<E: From<Error>>(
    asked: (BorrowedFd<'_>, &Path),
    question: Question,
    room: &mut Exchange,
    visit: &mut dyn FnMut(Item<'_>) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let (fd, path) = asked;
    let max = Key::new(
        question.max_objectid,
        max_kind(&question),
        question.max_offset,
    );
    let mut next = Some(Key::new(
        question.min_objectid,
        u8::try_from(question.min_kind).unwrap_or(u8::MAX),
        question.min_offset,
    ));
    while let Some(mut min) = next.filter(|min| *min <= max) {
        room.question = Question {
            min_objectid: min.objectid,
            min_kind: min.kind.into(),
            min_offset: min.offset,
            ..question
        };
        ask(fd, room).context("cannot search the trees of", path)?;
        next = None;
        let mut rest = room.found.as_slice();
        for _ in 0..room.question.items {
            let item = take(&mut rest)
                .filter(|item| (min..=max).contains(&item.key()))
                .ok_or_else(|| {
                    let why = "the kernel's answer contradicts itself";
                    Error::invalid("cannot search the trees of", path, why)
                })?;
            next = item.key().next();
            visit(item)?;
            match next {
                Some(after) => min = after,
                None => break,
            }
        }
    }
    Ok(())
}

fn max_kind(question: &Question) -> u8 {
    u8::try_from(question.max_kind).unwrap_or(u8::MAX)
}

fn ask(fd: BorrowedFd<'_>, room: &mut Exchange) -> nix::Result<()> {
    let question = (&raw mut *room).cast::<Question>();
    // SAFETY: `question` points to a question followed by the `ROOM` bytes it announces, in one
    // `repr(C)` struct that we hold exclusively; the kernel writes to nothing else.
    unsafe { ioctl::tree_search_v2(fd.as_raw_fd(), question) }.map(drop)
}

/// The next item of an answer; `None` if it makes no sense.
fn take<'a>(rest: &mut &'a [u8]) -> Option<Item<'a>> {
    let (header, after) = rest.split_at_checked(HEADER)?;
    let (numbers, kind_and_len) = header.split_at_checked(24)?;
    let number = |at: usize| {
        let bytes = numbers.get(at..at + 8)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    };
    let (kind, len) = kind_and_len.split_at_checked(4)?;
    let small = |bytes: &[u8]| Some(u32::from_ne_bytes(bytes.try_into().ok()?));
    let len = usize::try_from(small(len)?).ok()?;
    let (data, after) = after.split_at_checked(len)?;
    *rest = after;
    Some(Item {
        transid: number(0)?,
        objectid: number(8)?,
        offset: number(16)?,
        kind: u8::try_from(small(kind)?).ok()?,
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_key_carries() {
        assert_eq!(Key::new(1, 2, 3).next(), Some(Key::new(1, 2, 4)));
        assert_eq!(Key::new(1, 2, u64::MAX).next(), Some(Key::new(1, 3, 0)));
        assert_eq!(
            Key::new(1, u8::MAX, u64::MAX).next(),
            Some(Key::new(2, 0, 0))
        );
        assert_eq!(Key::MAX.next(), None);
    }

    #[test]
    fn answers_are_read_or_refused() {
        let mut bytes = Vec::new();
        for number in [7u64, 256, 9] {
            bytes.extend(number.to_ne_bytes());
        }
        for number in [84u32, 3] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(b"abc-");
        let mut rest = bytes.as_slice();
        let item = take(&mut rest).unwrap();
        assert_eq!((item.transid, item.key()), (7, Key::new(256, 84, 9)));
        assert_eq!((item.data, rest), (&b"abc"[..], &b"-"[..]));
        for end in 0..bytes.len() - 1 {
            assert_eq!(take(&mut &bytes[..end]), None);
        }
        // A kind that is none.
        bytes[25] = 1;
        assert_eq!(take(&mut bytes.as_slice()), None);
    }
}
