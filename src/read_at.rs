//! Positioned reading: all that a parser of a disk or an image may ask of the world.

use crate::error::{Error, Kind, Result};
use crate::units::{ByteLen, Offset};

/// Something that can be read at any position: a device, a file, memory.
///
/// Parsers take `&dyn ReadAt` and nothing else, so that they run, and are fuzzed, on memory.
pub trait ReadAt: Send + Sync {
    /// How many bytes there are.
    fn len(&self) -> ByteLen;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// If any byte of the range lies behind the end, or cannot be read.
    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()>;

    /// Whether there is nothing to read.
    fn is_empty(&self) -> bool {
        self.len() == ByteLen::ZERO
    }

    /// `len` bytes at `offset` in memory of their own. The caller has capped `len`:
    /// it must never come from a disk unchecked.
    ///
    /// # Errors
    /// As [`read_exact_at`](Self::read_exact_at).
    fn read_vec_at(&self, offset: Offset, len: ByteLen) -> Result<Vec<u8>> {
        check_range(self.len(), offset, len)?;
        let mut bytes = vec![0; len.as_usize()];
        self.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

/// Whether `[offset, offset + len)` lies within `size` bytes.
///
/// # Errors
/// [`Kind::Io`] with the offset if it does not.
pub fn check_range(size: ByteLen, offset: Offset, len: ByteLen) -> Result<()> {
    match offset.0.checked_add(len.0) {
        Some(end) if end <= size.0 => Ok(()),
        _ => Err(Error::new(
            Kind::Io,
            format!("{} bytes lie behind the end ({} bytes)", len.0, size.0),
        )
        .at(offset)),
    }
}

impl ReadAt for [u8] {
    fn len(&self) -> ByteLen {
        ByteLen(self.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        check_range(ReadAt::len(self), offset, ByteLen(buf.len() as u64))?;
        let start = ByteLen(offset.0).as_usize();
        buf.copy_from_slice(&self[start..start + buf.len()]);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn len(&self) -> ByteLen {
        ReadAt::len(self.as_slice())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        self.as_slice().read_exact_at(buf, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_ends_where_it_ends() {
        let memory = vec![1u8, 2, 3];
        let mut two = [0; 2];
        memory.read_exact_at(&mut two, Offset(1)).unwrap();
        assert_eq!(two, [2, 3]);
        assert!(memory.read_exact_at(&mut two, Offset(2)).is_err());
        assert!(memory.read_exact_at(&mut two, Offset(u64::MAX)).is_err());
        assert!(memory.read_vec_at(Offset(0), ByteLen(u64::MAX)).is_err());
    }
}
