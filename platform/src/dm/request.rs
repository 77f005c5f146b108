//! Requests to the device mapper that change something, and the answer to "which table?" turned into the
//! request to load it. Where it says so, nothing is allocated: a guard process makes these, too.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::ioctl::ioctl_num_type;

use super::{
    ACTIVE_PRESENT, BUFFER_FULL, HEADER_LEN, NOFLUSH, SECURE_DATA, SKIP_LOCKFS, SPEC_LEN,
    STATUS_TABLE, Secret, Who, decode, exchange, header, ioctl, put, spec, text, u32_at, u64_at,
    write_header,
};
use crate::error::{Context, Error, Result};
use crate::node::DeviceNumber;

/// Makes a device without a table.
pub(super) fn create(control: &OwnedFd, (name, uuid): &(String, String)) -> Result<DeviceNumber> {
    let mut bytes = [0; HEADER_LEN];
    write_header(&mut bytes, Who::New { name, uuid }, 0);
    exchange(control, ioctl::DEV_CREATE, &mut bytes).context("cannot create", Path::new(name))?;
    u64_at(&bytes, header::DEV)
        .map(decode)
        .ok_or_else(|| Error::invalid("cannot create", Path::new(name), "it has no number"))
}

/// A request that is a header and nothing else.
pub(super) fn simple(
    control: &OwnedFd,
    request: ioctl_num_type,
    who: Who<'_>,
    flags: u32,
    event: u32,
) -> io::Result<(DeviceNumber, u32)> {
    let mut bytes = [0; HEADER_LEN];
    write_header(&mut bytes, who, flags);
    put(&mut bytes, header::EVENT_NR, &event.to_ne_bytes());
    exchange(control, request, &mut bytes)?;
    let number = u64_at(&bytes, header::DEV).map(decode);
    let flags = u32_at(&bytes, header::FLAGS);
    number.zip(flags).ok_or(io::ErrorKind::InvalidData.into())
}

/// Number and flags of a device; `None` if there is none.
pub(super) fn find(control: &OwnedFd, who: Who<'_>) -> io::Result<Option<(DeviceNumber, u32)>> {
    match simple(control, ioctl::DEV_STATUS, who, 0, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        found => found.map(Some),
    }
}

/// Makes the loaded table live and the device go on. The filesystem on it is not frozen for that.
pub(super) fn resume(control: &OwnedFd, who: Who<'_>, event: u32) -> io::Result<()> {
    simple(control, ioctl::DEV_SUSPEND, who, SKIP_LOCKFS, event).map(drop)
}

/// Removes a device, if there is one.
pub(super) fn remove(control: &OwnedFd, uuid: &str) -> io::Result<()> {
    match simple(control, ioctl::DEV_REMOVE, Who::Uuid(uuid), 0, 0) {
        Err(error) if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
        _ => Ok(()),
    }
}

/// Whether the table of a device, live or (with `QUERY_INACTIVE`) loaded, is an origin of `real`.
pub(super) fn is_origin_of(
    control: &OwnedFd,
    who: Who<'_>,
    which: u32,
    real: DeviceNumber,
    room: &mut [u8],
) -> io::Result<bool> {
    write_header(room, who, STATUS_TABLE | NOFLUSH | SECURE_DATA | which);
    exchange(control, ioctl::TABLE_STATUS, room)?;
    Ok(origin_in(room) == Some(real))
}

/// The device that an answer's only target is the origin of.
pub(super) fn origin_in(bytes: &[u8]) -> Option<DeviceNumber> {
    if u32_at(bytes, header::TARGET_COUNT)? != 1 {
        return None;
    }
    let start = usize::try_from(u32_at(bytes, header::DATA_START)?).ok()?;
    let target = bytes.get(start..)?;
    let kind = text(target.get(spec::KIND..spec::KIND + spec::KIND_LEN)?)?;
    // Not by its `FromStr`, whose error allocates.
    let (major, minor) = text(target.get(SPEC_LEN..)?)?.split_once(':')?;
    let number = DeviceNumber {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    };
    (kind == "snapshot-origin").then_some(number)
}

/// Loads a table of one target.
pub(super) fn load(
    control: &OwnedFd,
    who: Who<'_>,
    flags: u32,
    sectors: u64,
    kind: &str,
    params: &str,
) -> io::Result<()> {
    let len = (HEADER_LEN + SPEC_LEN + params.len() + 1).next_multiple_of(8);
    let mut bytes = vec![0; len];
    write_header(&mut bytes, who, flags);
    put(&mut bytes, header::TARGET_COUNT, &1u32.to_ne_bytes());
    put(
        &mut bytes,
        HEADER_LEN + spec::LENGTH,
        &sectors.to_ne_bytes(),
    );
    put(&mut bytes, HEADER_LEN + spec::KIND, kind.as_bytes());
    put(&mut bytes, HEADER_LEN + SPEC_LEN, params.as_bytes());
    exchange(control, ioctl::TABLE_LOAD, &mut bytes)
}

/// Turns the answer to "which table?" into the request to load it into `who`. There each target says
/// how far the next is from the first one, here how far from itself. `None` if it makes no sense.
/// Allocates nothing.
pub(super) fn turn_around(bytes: &mut [u8], who: Who<'_>, read_only: u32) -> Option<()> {
    let flags = u32_at(bytes, header::FLAGS)?;
    let count = u32_at(bytes, header::TARGET_COUNT)?;
    let start = usize::try_from(u32_at(bytes, header::DATA_START)?).ok()?;
    if flags & ACTIVE_PRESENT == 0 || flags & BUFFER_FULL != 0 || start != HEADER_LEN || count == 0
    {
        return None;
    }
    let mut at = 0;
    for _ in 1..count {
        let place = start.checked_add(at)?.checked_add(spec::NEXT)?;
        let next = usize::try_from(u32_at(bytes, place)?).ok()?;
        let distance = next
            .checked_sub(at)
            .filter(|distance| *distance >= SPEC_LEN)?;
        put(bytes, place, &u32::try_from(distance).ok()?.to_ne_bytes());
        at = next;
    }
    bytes.get(start.checked_add(at)?..)?.get(..SPEC_LEN)?;
    write_header(bytes, who, SECURE_DATA | read_only);
    put(bytes, header::TARGET_COUNT, &count.to_ne_bytes());
    Some(())
}

/// How many sectors a table covers: up to the end of its last target.
pub(super) fn end_of(bytes: &[u8]) -> Option<u64> {
    let table = super::parse(bytes)?;
    let last = table.targets.last()?;
    Some(last.start + last.sectors)
}

/// Whether two answers hold the same targets, keys and all.
pub(super) fn same_targets(one: &Secret, other: &Secret) -> bool {
    let part = |answer: &Secret| {
        let bytes = answer.0.bytes();
        let count = u32_at(bytes, header::TARGET_COUNT)?;
        let len = usize::try_from(u32_at(bytes, header::DATA_SIZE)?).ok()?;
        Some((count, HEADER_LEN..len))
    };
    let (Some(ours), Some(theirs)) = (part(one), part(other)) else {
        return false;
    };
    ours == theirs && one.0.bytes().get(ours.1.clone()) == other.0.bytes().get(ours.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dm::READ_ONLY;
    use crate::dm::tests::answer;

    #[test]
    fn an_answer_becomes_the_request_to_load_it() {
        let targets = [
            (0, 8, "crypt", "aes-xts-plain64 00112233 0 254:17 32768"),
            (8, 16, "linear", "254:18 0"),
            (24, 8, "error", ""),
        ];
        let mut bytes = answer(ACTIVE_PRESENT, &targets);
        assert_eq!(end_of(&bytes), Some(32));
        turn_around(&mut bytes, Who::Uuid("x"), READ_ONLY).unwrap();
        assert_eq!(u32_at(&bytes, header::FLAGS), Some(SECURE_DATA | READ_ONLY));
        assert_eq!(u32_at(&bytes, header::TARGET_COUNT), Some(3));
        assert_eq!(text(&bytes[header::UUID..]), Some("x"));
        // As populate_table() of the kernel walks it.
        let mut at = HEADER_LEN;
        for (start, sectors, kind, params) in targets {
            assert_eq!(u64_at(&bytes, at + spec::START), Some(start));
            assert_eq!(u64_at(&bytes, at + spec::LENGTH), Some(sectors));
            assert_eq!(text(&bytes[at + spec::KIND..]), Some(kind));
            assert_eq!(text(&bytes[at + SPEC_LEN..]), Some(params));
            at += u32_at(&bytes, at + spec::NEXT).unwrap() as usize;
        }

        for flags in [0, ACTIVE_PRESENT | BUFFER_FULL] {
            assert!(turn_around(&mut answer(flags, &targets), Who::Uuid("x"), 0).is_none());
        }
        assert!(turn_around(&mut answer(ACTIVE_PRESENT, &[]), Who::Uuid("x"), 0).is_none());
        let good = answer(ACTIVE_PRESENT, &targets);
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _ = turn_around(&mut bytes, Who::Uuid("x"), 0);
            }
            let _ = turn_around(&mut good[..at].to_vec(), Who::Uuid("x"), 0);
        }
    }

    #[test]
    fn an_origin_is_told_from_anything_else() {
        let of = |targets: &[_]| origin_in(&answer(ACTIVE_PRESENT, targets));
        assert_eq!(
            of(&[(0, 8, "snapshot-origin", "254:7")]),
            Some(DeviceNumber {
                major: 254,
                minor: 7
            })
        );
        for (kind, params) in [
            ("linear", "254:7 0"),
            ("snapshot-origin", "254"),
            ("snapshot-origin", ""),
            ("snapshot-merge", "254:7"),
        ] {
            assert_eq!(of(&[(0, 8, kind, params)]), None, "{kind} {params}");
        }
        let two = [
            (0, 8, "snapshot-origin", "254:7"),
            (8, 8, "snapshot-origin", "254:7"),
        ];
        assert_eq!(of(&two), None);
        assert_eq!(of(&[]), None);
    }
}
