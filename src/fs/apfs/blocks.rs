//! Reading a container's blocks and objects, and whether an object is what it should be.

use zerocopy::FromBytes;

use super::format::{
    self, ObjectHeader, STORAGE_EPHEMERAL, STORAGE_MASK, STORAGE_PHYSICAL, TYPE_MASK,
};
use crate::error::{Error, Kind, Result};
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// A container as a row of blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) source: &'a dyn ReadAt,
    /// Bytes, a power of two from 4096 to 65536.
    pub(super) size: u64,
    /// All of them lie within the source.
    pub(super) count: u64,
}

/// What an object has to be.
#[derive(Clone, Copy)]
pub(super) struct Expected {
    pub(super) name: &'static str,
    pub(super) kind: u32,
    /// No later transaction can have written it.
    pub(super) newest: u64,
}

impl Blocks<'_> {
    /// Where a block begins. Blocks behind the end begin at the end.
    pub(super) fn offset(&self, address: u64) -> Offset {
        Offset(address.min(self.count) * self.size)
    }

    /// One block.
    ///
    /// # Errors
    /// [`Damaged`](Kind::Damaged) if there is none; else if reading fails.
    pub(super) fn read(&self, address: u64) -> Result<Vec<u8>> {
        if address >= self.count {
            return Err(damaged(format!(
                "an address ({address}) lies behind the container's end"
            )));
        }
        self.source
            .read_vec_at(self.offset(address), ByteLen(self.size))
    }

    /// An object of one block whose id is its address.
    ///
    /// # Errors
    /// [`Damaged`](Kind::Damaged) if what is there is something else; else if reading fails.
    pub(super) fn physical(&self, address: u64, expected: Expected) -> Result<Vec<u8>> {
        let object = self.read(address)?;
        check(&object, address, STORAGE_PHYSICAL, expected)?;
        Ok(object)
    }
}

/// Whether an object is ephemeral, whole, and the one that is expected. Each commit writes all of them
/// anew, so it has to be of the very transaction: an older one may have been left in its place.
///
/// # Errors
/// [`Damaged`](Kind::Damaged) if not.
pub(super) fn check_ephemeral(object: &[u8], oid: u64, expected: Expected) -> Result<()> {
    check(object, oid, STORAGE_EPHEMERAL, expected)?;
    let header: &ObjectHeader = part(object, 0, expected.name)?;
    if header.xid.get() != expected.newest {
        return Err(damaged(format!(
            "{} ({oid}) is older than its checkpoint",
            expected.name
        )));
    }
    Ok(())
}

/// The same of a virtual object.
///
/// # Errors
/// [`Damaged`](Kind::Damaged) if not.
pub(super) fn check_virtual(object: &[u8], oid: u64, expected: Expected) -> Result<()> {
    check(object, oid, 0, expected)
}

fn check(object: &[u8], oid: u64, storage: u32, expected: Expected) -> Result<()> {
    let Expected { name, kind, newest } = expected;
    if !format::checksum_holds(object) {
        return Err(damaged(format!("the checksum of {name} ({oid}) is wrong")));
    }
    let header: &ObjectHeader = part(object, 0, name)?;
    let found = header.kind.get();
    if header.oid.get() != oid || found & TYPE_MASK != kind || found & STORAGE_MASK != storage {
        return Err(damaged(format!(
            "where {name} ({oid}) should be there is another object"
        )));
    }
    if header.xid.get() > newest {
        return Err(damaged(format!(
            "{name} ({oid}) is newer than its checkpoint"
        )));
    }
    Ok(())
}

/// A structure at `offset` of an object.
///
/// # Errors
/// [`Damaged`](Kind::Damaged) if it does not lie within the object.
pub(super) fn part<'a, T>(object: &'a [u8], offset: usize, name: &str) -> Result<&'a T>
where
    T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    let rest = object.get(offset..);
    let found = rest.and_then(|rest| T::ref_from_prefix(rest).ok());
    let (found, _) = found.ok_or_else(|| damaged(format!("{name} is cut off")))?;
    Ok(found)
}

/// So many structures at `offset` of an object.
///
/// # Errors
/// [`Damaged`](Kind::Damaged) if they do not lie within the object.
pub(super) fn parts<'a, T>(
    object: &'a [u8],
    offset: usize,
    count: usize,
    name: &str,
) -> Result<&'a [T]>
where
    T: FromBytes + zerocopy::Immutable + zerocopy::Unaligned,
{
    let rest = object.get(offset..);
    let found = rest.and_then(|rest| <[T]>::ref_from_prefix_with_elems(rest, count).ok());
    let (found, _) = found.ok_or_else(|| damaged(format!("{name} is cut off")))?;
    Ok(found)
}

pub(super) fn damaged(what: impl Into<String>) -> Error {
    Error::new(Kind::Damaged, what.into())
}

/// Whether an error says that what was read is not whole, or could not be read at that place.
pub(super) fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), Kind::Damaged | Kind::Io)
}
