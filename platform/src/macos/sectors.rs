//! Writing to what takes whole sectors only.

use std::io;
use std::os::unix::fs::FileExt;

use crate::buffer::Buffer;

/// Writes what does not begin or end with a sector: the rest of the sector stays as it is.
pub(crate) fn write_odd(
    file: &impl FileExt,
    align: u32,
    buf: &[u8],
    offset: u64,
) -> io::Result<()> {
    let unit = align as usize;
    let mut sector = Buffer::new(unit);
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let skip = (at % u64::from(align)) as usize;
        let left = buf.len() - done;
        let take = if skip == 0 && left >= unit {
            let whole = left - left % unit;
            file.write_all_at(&buf[done..done + whole], at)?;
            whole
        } else {
            let (start, take) = (at - skip as u64, left.min(unit - skip));
            file.read_exact_at(&mut sector[..unit], start)?;
            sector[skip..skip + take].copy_from_slice(&buf[done..done + take]);
            file.write_all_at(&sector[..unit], start)?;
            take
        };
        done += take;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    const SECTOR: usize = 512;

    /// As a character device: it refuses whatever is not whole sectors.
    struct Device(RefCell<Vec<u8>>);

    impl Device {
        fn range(len: usize, offset: u64) -> io::Result<std::ops::Range<usize>> {
            let start = usize::try_from(offset).unwrap();
            match start.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) && len > 0 {
                true => Ok(start..start + len),
                false => Err(io::ErrorKind::InvalidInput.into()),
            }
        }
    }

    impl FileExt for Device {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            buf.copy_from_slice(&self.0.borrow()[Self::range(buf.len(), offset)?]);
            Ok(buf.len())
        }

        fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
            self.0.borrow_mut()[Self::range(buf.len(), offset)?].copy_from_slice(buf);
            Ok(buf.len())
        }
    }

    proptest! {
        #[test]
        fn only_what_is_meant_changes(start in 0..4 * SECTOR, len in 0..4 * SECTOR) {
            let before: Vec<u8> = (0..8 * SECTOR).map(|at| (at % 251) as u8).collect();
            let device = Device(RefCell::new(before.clone()));
            let written = vec![0xff; len];
            write_odd(&device, SECTOR as u32, &written, start as u64).unwrap();
            let mut expected = before;
            expected[start..start + len].copy_from_slice(&written);
            prop_assert!(*device.0.borrow() == expected);
        }
    }
}
