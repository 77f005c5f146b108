//! Device-mapper: what a mapped device is made of, and how its targets fare
//! (include/uapi/linux/dm-ioctl.h, drivers/md/dm-ioctl.c).
//!
//! The kernel's ioctl is asked directly: no tool needs to be installed, and no key passes through a
//! pipe. The table of a `crypt` target may carry its key; it is read into locked memory that is wiped
//! (by the kernel on its side, too), and only a placeholder leaves this module.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::ioctl::ioctl_num_type;

use crate::error::{Context, Error, Result};
use crate::memory::Arena;
use crate::node::{BlockDevice, DeviceNumber};

mod fill;
mod request;
mod suspension;
mod takeover;

pub use fill::{Fill, fill};
pub use suspension::{Suspended, SuspensionWatch};
pub use takeover::{Leftover, Prepared, Refusal, Takeover};

/// The control node.
const CONTROL: &CStr = c"/dev/mapper/control";

/// The oldest interface with everything used here: 4.0 has all but `DM_SECURE_DATA_FLAG`, which older
/// kernels ignore.
const VERSION: [u32; 3] = [4, 0, 0];

/// `DM_READONLY_FLAG`: the device, or the table to be loaded, refuses to be written.
const READ_ONLY: u32 = 1 << 0;
/// `DM_STATUS_TABLE_FLAG`: the table instead of the status.
const STATUS_TABLE: u32 = 1 << 4;
/// `DM_ACTIVE_PRESENT_FLAG`: there is a table at all.
const ACTIVE_PRESENT: u32 = 1 << 5;
/// `DM_INACTIVE_PRESENT_FLAG`: another one is loaded, and will be live at the next resume.
const INACTIVE_PRESENT: u32 = 1 << 6;
/// `DM_BUFFER_FULL_FLAG`: the answer did not fit.
const BUFFER_FULL: u32 = 1 << 8;
/// `DM_SKIP_LOCKFS_FLAG`: the filesystem on the device is not frozen for this.
const SKIP_LOCKFS: u32 = 1 << 10;
/// `DM_NOFLUSH_FLAG`: a thin pool is not made to write out its metadata for this question.
const NOFLUSH: u32 = 1 << 11;
/// `DM_QUERY_INACTIVE_TABLE_FLAG`: of the table that is loaded and not live yet.
const QUERY_INACTIVE: u32 = 1 << 12;
/// `DM_SECURE_DATA_FLAG`: the kernel wipes its copies of this message, and ours.
const SECURE_DATA: u32 = 1 << 15;
/// `DM_SUSPEND_FLAG`: the device is suspended.
const SUSPEND: u32 = 1 << 1;

/// What is offered for an answer at first, and at most, in bytes.
const FIRST_ROOM: usize = 64 << 10;
const MOST_ROOM: usize = 16 << 20;

/// `struct dm_ioctl`.
const HEADER_LEN: usize = 312;
/// Where its fields are.
mod header {
    pub(super) const VERSION: usize = 0;
    pub(super) const DATA_SIZE: usize = 12;
    pub(super) const DATA_START: usize = 16;
    pub(super) const TARGET_COUNT: usize = 20;
    pub(super) const FLAGS: usize = 28;
    pub(super) const EVENT_NR: usize = 32;
    pub(super) const DEV: usize = 40;
    pub(super) const NAME: usize = 48;
    pub(super) const NAME_LEN: usize = 128;
    pub(super) const UUID: usize = NAME + NAME_LEN;
}

/// `struct dm_target_spec`.
const SPEC_LEN: usize = 40;
/// Where its fields are.
mod spec {
    pub(super) const START: usize = 0;
    pub(super) const LENGTH: usize = 8;
    pub(super) const NEXT: usize = 20;
    pub(super) const KIND: usize = 24;
    pub(super) const KIND_LEN: usize = 16;
}

mod ioctl {
    //! `_IOWR(0xfd, NUMBER, struct dm_ioctl)`.
    use nix::sys::ioctl::ioctl_num_type;

    const fn request(number: u8) -> ioctl_num_type {
        nix::request_code_readwrite!(0xfd, number, super::HEADER_LEN) as ioctl_num_type
    }

    pub(super) const DEV_CREATE: ioctl_num_type = request(3);
    pub(super) const DEV_REMOVE: ioctl_num_type = request(4);
    /// Suspends or, without that flag, resumes; a table that was loaded is live then.
    pub(super) const DEV_SUSPEND: ioctl_num_type = request(6);
    pub(super) const DEV_STATUS: ioctl_num_type = request(7);
    pub(super) const TABLE_LOAD: ioctl_num_type = request(9);
    pub(super) const TABLE_CLEAR: ioctl_num_type = request(10);
    pub(super) const TABLE_STATUS: ioctl_num_type = request(12);
    pub(super) const TARGET_MSG: ioctl_num_type = request(14);
}

/// Which mapped device is meant.
#[derive(Clone, Copy, Debug)]
enum Who<'a> {
    Number(DeviceNumber),
    Uuid(&'a str),
    /// One that is to be made.
    New {
        name: &'a str,
        uuid: &'a str,
    },
}

/// One target of a mapped device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its first sector on the mapped device, in units of 512 bytes.
    pub start: u64,
    /// How many.
    pub sectors: u64,
    /// Its type: `linear`, `crypt`, `snapshot`.
    pub kind: String,
    /// Its parameters, or what it says of its state. A key of `crypt` is replaced by `-`.
    pub params: String,
}

/// Everything a mapped device is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The targets, ascending. Empty if no table is loaded.
    pub targets: Vec<Target>,
    /// Whether it is suspended.
    pub is_suspended: bool,
}

/// Whether a block device is a mapped device.
pub fn is_mapped(device: &BlockDevice) -> bool {
    device.sysfs().join("dm").is_dir()
}

/// The live table of a mapped device.
///
/// # Errors
/// If it is none, or this user may not ask; `InvalidData` for an answer that makes no sense.
pub fn table(device: DeviceNumber) -> Result<Table> {
    ask(device, STATUS_TABLE | NOFLUSH | SECURE_DATA)
}

/// What the targets of a mapped device say of their state.
///
/// # Errors
/// As [`table`].
pub fn status(device: DeviceNumber) -> Result<Table> {
    ask(device, NOFLUSH)
}

/// Sends a message to the target at the begin of a mapped device.
///
/// # Errors
/// What the target says.
pub fn message(device: DeviceNumber, text: &str) -> Result<()> {
    let what = path_of(device);
    let control = open_control()?;
    let mut room = Arena::new(FIRST_ROOM)?;
    let bytes = room.bytes_mut();
    write_header(bytes, Who::Number(device), 0);
    // `struct dm_target_msg`: a sector, then the text, ended by a zero byte.
    bytes
        .get_mut(HEADER_LEN + 8..)
        .and_then(|bytes| bytes.get_mut(..text.len()))
        .filter(|_| HEADER_LEN + 8 + text.len() < FIRST_ROOM)
        .ok_or_else(|| Error::other("cannot send a message to", &what, "it is too long"))?
        .copy_from_slice(text.as_bytes());
    exchange(&control, ioctl::TARGET_MSG, bytes).context("cannot send a message to", what)
}

/// The kernel's answer, which may hold a key: wiped when dropped.
#[derive(Debug)]
struct Secret(Arena);

impl Drop for Secret {
    fn drop(&mut self) {
        wipe(self.0.bytes_mut());
    }
}

fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    // The hint keeps the compiler from leaving this out.
    std::hint::black_box(&*bytes);
}

fn ask(device: DeviceNumber, flags: u32) -> Result<Table> {
    let what = path_of(device);
    let answer = fetch(Who::Number(device), flags, &what)?;
    parse(answer.0.bytes())
        .ok_or_else(|| Error::invalid("cannot understand", what, "its answer makes no sense"))
}

/// Asks for the table or the state of all targets, in a buffer large enough for it. `what` is what the
/// device is called in an error.
fn fetch(who: Who<'_>, flags: u32, what: &Path) -> Result<Secret> {
    let control = open_control()?;
    let mut room = FIRST_ROOM;
    loop {
        let mut answer = Secret(Arena::new(room)?);
        let bytes = answer.0.bytes_mut();
        write_header(bytes, who, flags);
        exchange(&control, ioctl::TABLE_STATUS, bytes)
            .context("cannot ask the device mapper about", what)?;
        if u32_at(bytes, header::FLAGS).is_some_and(|flags| flags & BUFFER_FULL == 0) {
            return Ok(answer);
        }
        if room >= MOST_ROOM {
            let why = "its answer is too long";
            return Err(Error::invalid("cannot understand", what, why));
        }
        room *= 2;
    }
}

fn path_of(device: DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{device}"))
}

fn open_control() -> Result<OwnedFd> {
    control().context("cannot open", "/dev/mapper/control")
}

/// Opens the control node. Allocates nothing.
fn control() -> io::Result<OwnedFd> {
    // SAFETY: a terminated path.
    let fd = unsafe { libc::open(CONTROL.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    let fd = Errno::result(fd)?;
    // SAFETY: just opened, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Begins a message that is as long as `bytes`. Allocates nothing.
fn write_header(bytes: &mut [u8], who: Who<'_>, flags: u32) {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if let Some(header) = bytes.get_mut(..HEADER_LEN) {
        header.fill(0);
    }
    for (at, part) in VERSION.iter().enumerate() {
        put(bytes, header::VERSION + at * 4, &part.to_ne_bytes());
    }
    put(bytes, header::DATA_SIZE, &len.to_ne_bytes());
    put(
        bytes,
        header::DATA_START,
        &(HEADER_LEN as u32).to_ne_bytes(),
    );
    put(bytes, header::FLAGS, &flags.to_ne_bytes());
    match who {
        Who::Number(device) => put(bytes, header::DEV, &encode(device).to_ne_bytes()),
        Who::Uuid(uuid) => put(bytes, header::UUID, uuid.as_bytes()),
        Who::New { name, uuid } => {
            put(bytes, header::NAME, name.as_bytes());
            put(bytes, header::UUID, uuid.as_bytes());
        }
    }
}

/// `huge_encode_dev` of include/linux/kdev_t.h: 8 bits of minor, 12 of major, the other minor bits.
fn encode(device: DeviceNumber) -> u64 {
    let (major, minor) = (device.major, device.minor);
    u64::from((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// `huge_decode_dev`.
fn decode(encoded: u64) -> DeviceNumber {
    let encoded = encoded as u32;
    DeviceNumber {
        major: (encoded & 0xf_ff00) >> 8,
        minor: (encoded & 0xff) | ((encoded >> 12) & 0xf_ff00),
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Allocates nothing.
fn exchange(control: &OwnedFd, request: ioctl_num_type, bytes: &mut [u8]) -> io::Result<()> {
    debug_assert!(bytes.len() >= HEADER_LEN, "no room for a header");
    // SAFETY: the kernel reads and writes `data_size` bytes of `bytes`, which is its length.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), request, bytes.as_mut_ptr()) };
    Errno::result(done).map(drop).map_err(Into::into)
}

/// Understands an answer of the kernel's: `None` if it makes no sense.
fn parse(bytes: &[u8]) -> Option<Table> {
    let flags = u32_at(bytes, header::FLAGS)?;
    let start = usize::try_from(u32_at(bytes, header::DATA_START)?).ok()?;
    let count = match flags & ACTIVE_PRESENT {
        0 => 0,
        _ => u32_at(bytes, header::TARGET_COUNT)?,
    };
    let data = bytes.get(start..)?;
    let mut targets = Vec::new();
    let mut at = 0;
    let mut end = 0;
    for _ in 0..count {
        let target = data.get(at..)?;
        let (first, sectors) = (u64_at(target, spec::START)?, u64_at(target, spec::LENGTH)?);
        if first < end {
            return None;
        }
        end = first.checked_add(sectors)?;
        let kind = text(target.get(spec::KIND..spec::KIND + spec::KIND_LEN)?)?;
        let params = text(target.get(SPEC_LEN..)?)?;
        targets.push(Target {
            start: first,
            sectors,
            kind: kind.to_owned(),
            params: match kind {
                "crypt" => without_key(params),
                _ => params.to_owned(),
            },
        });
        // Counted from the first target. It only grows, so this ends.
        let next = usize::try_from(u32_at(target, spec::NEXT)?).ok()?;
        if next <= at {
            break;
        }
        at = next;
    }
    let is_suspended = flags & SUSPEND != 0;
    (targets.len() == usize::try_from(count).ok()?).then_some(Table {
        targets,
        is_suspended,
    })
}

/// The parameters of `crypt` are `cipher key iv_offset device offset ...`
/// (Documentation/admin-guide/device-mapper/dm-crypt.rst). A key that begins with a colon is only the
/// name of one.
fn without_key(params: &str) -> String {
    let mut words: Vec<&str> = params.split(' ').collect();
    if let Some(key) = words.get_mut(1)
        && !key.starts_with(':')
    {
        *key = "-";
    }
    words.join(" ")
}

/// Text up to a zero byte.
fn text(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    std::str::from_utf8(bytes.get(..end)?).ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer as the kernel gives it.
    pub(super) fn answer(flags: u32, targets: &[(u64, u64, &str, &str)]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        put(
            &mut bytes,
            header::DATA_START,
            &(HEADER_LEN as u32).to_ne_bytes(),
        );
        put(
            &mut bytes,
            header::TARGET_COUNT,
            &(targets.len() as u32).to_ne_bytes(),
        );
        put(&mut bytes, header::FLAGS, &flags.to_ne_bytes());
        for (start, length, kind, params) in targets {
            let begin = bytes.len();
            bytes.resize(begin + SPEC_LEN, 0);
            bytes.extend_from_slice(params.as_bytes());
            bytes.push(0);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            let next = (bytes.len() - HEADER_LEN) as u32;
            put(&mut bytes, begin + spec::START, &start.to_ne_bytes());
            put(&mut bytes, begin + spec::LENGTH, &length.to_ne_bytes());
            put(&mut bytes, begin + spec::NEXT, &next.to_ne_bytes());
            put(&mut bytes, begin + spec::KIND, kind.as_bytes());
        }
        bytes.resize(bytes.len() + 64, 0);
        bytes
    }

    #[test]
    fn a_table_is_read() {
        let bytes = answer(
            ACTIVE_PRESENT,
            &[
                (0, 2048, "linear", "254:17 2048"),
                (2048, 4096, "striped", "2 128 254:17 0 254:32 0"),
            ],
        );
        let table = parse(&bytes).unwrap();
        assert!(!table.is_suspended);
        assert_eq!(table.targets.len(), 2);
        assert_eq!(table.targets[1].start, 2048);
        assert_eq!(table.targets[1].sectors, 4096);
        assert_eq!(table.targets[0].kind, "linear");
        assert_eq!(table.targets[1].params, "2 128 254:17 0 254:32 0");
    }

    #[test]
    fn numbers_are_those_of_the_kernel() {
        for (major, minor, encoded) in [(254, 3, 0xfe03), (253, 0x1_0203, 0x1020_fd03)] {
            let number = DeviceNumber { major, minor };
            assert_eq!(encode(number), encoded);
            assert_eq!(decode(encoded), number);
        }
    }

    #[test]
    fn keys_stay_here() {
        for (params, expected) in [
            (
                "aes-xts-plain64 00112233 0 254:17 32768",
                "aes-xts-plain64 - 0 254:17 32768",
            ),
            (
                "aes-xts-plain64 :64:logon:cryptsetup:1234-d0 0 254:17 32768 1 allow_discards",
                "aes-xts-plain64 :64:logon:cryptsetup:1234-d0 0 254:17 32768 1 allow_discards",
            ),
            ("aes", "aes"),
            ("aes 0011", "aes -"),
        ] {
            let bytes = answer(ACTIVE_PRESENT, &[(0, 8, "crypt", params)]);
            assert_eq!(parse(&bytes).unwrap().targets[0].params, expected);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let none = answer(SUSPEND, &[(0, 8, "linear", "1:1 0")]);
        let none = parse(&none).unwrap();
        assert!(none.targets.is_empty() && none.is_suspended);
        let overlapping = [(0, 8, "linear", "1:1 0"), (4, 8, "linear", "1:1 8")];
        assert!(parse(&answer(ACTIVE_PRESENT, &overlapping)).is_none());
        let endless = [(u64::MAX, 8, "linear", "1:1 0")];
        assert!(parse(&answer(ACTIVE_PRESENT, &endless)).is_none());
        // Any cut, and any one field that says something else, is an error at worst.
        let good = answer(
            ACTIVE_PRESENT,
            &[(0, 8, "linear", "1:1 0"), (8, 8, "error", "")],
        );
        for len in 0..good.len() {
            let _ = parse(&good[..len]);
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _ = parse(&bytes);
            }
        }
    }
}
