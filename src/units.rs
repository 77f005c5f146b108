//! Units in types: a length cannot be taken for a position, nor a sector for a byte.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};
use std::str::FromStr;

/// Bytes in one [`Lba`]: the kernel counts in 512-byte sectors whatever the device's own sector is.
pub const SECTOR: u64 = 512;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteLen(pub u64);

/// A position in bytes from the start of a volume or file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Offset(pub u64);

/// A position in 512-byte sectors from the start of a disk, as sysfs and the kernel's traces count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

impl ByteLen {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// `n` times 1024 bytes.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// `n` times 1024² bytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// The length as an index into memory. Lengths of buffers fit by construction;
    /// a length read from a disk must be capped before it comes here.
    ///
    /// # Panics
    /// On a 32-bit machine, if the length exceeds the address space.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).expect("a buffer length fits the address space")
    }

    /// Rounded up to a multiple of `unit` (which must not be 0); `u64::MAX` where that overflows.
    pub fn align_up(self, unit: u64) -> Self {
        Self(self.0.checked_next_multiple_of(unit).unwrap_or(u64::MAX))
    }
}

impl Offset {
    /// The start of the volume.
    pub const ZERO: Self = Self(0);

    /// Rounded down to a multiple of `unit` (not 0).
    pub fn align_down(self, unit: u64) -> Self {
        Self(self.0 - self.0 % unit)
    }

    /// Rounded up to a multiple of `unit` (not 0); `u64::MAX` where that overflows.
    pub fn align_up(self, unit: u64) -> Self {
        Self(self.0.checked_next_multiple_of(unit).unwrap_or(u64::MAX))
    }

    /// How far this lies behind `start`; 0 if it lies before it.
    pub fn since(self, start: Self) -> ByteLen {
        ByteLen(self.0.saturating_sub(start.0))
    }
}

impl Lba {
    /// The position in bytes; `None` where that overflows.
    pub fn to_offset(self) -> Option<Offset> {
        self.0.checked_mul(SECTOR).map(Offset)
    }
}

impl Add for ByteLen {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl AddAssign for ByteLen {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sub for ByteLen {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl Sum for ByteLen {
    fn sum<I: Iterator<Item = Self>>(lengths: I) -> Self {
        Self(lengths.map(|length| length.0).sum())
    }
}

impl Add<ByteLen> for Offset {
    type Output = Self;
    fn add(self, length: ByteLen) -> Self {
        Self(self.0 + length.0)
    }
}

impl fmt::Display for ByteLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1024 {
            write!(f, "{} B", self.0)
        } else {
            write!(f, "{}", bytesize::ByteSize(self.0).display().iec())
        }
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}", self.0)
    }
}

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size: write a whole number, with K, M, G or T for powers of 1024, as 512M")]
pub struct ParseSizeError(String);

/// Reads a size as the command line takes it: a whole number with an optional K, M, G or T,
/// each a power of 1024.
///
/// ```
/// use holdstill::units::ByteLen;
/// assert_eq!("4M".parse::<ByteLen>().unwrap(), ByteLen::mib(4));
/// assert!("4MB".parse::<ByteLen>().is_err());
/// ```
impl FromStr for ByteLen {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let wrong = || ParseSizeError(text.to_owned());
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match &text[digits.len()..] {
            "" => 0,
            "K" | "k" => 10,
            "M" | "m" => 20,
            "G" | "g" => 30,
            "T" | "t" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("7", 7),
            ("2K", 2048),
            ("3g", 3 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse::<ByteLen>().unwrap(), ByteLen(bytes));
        }
        for text in ["", "K", "-1", "1.5G", "1KB", "99999999999T", "é"] {
            assert!(text.parse::<ByteLen>().is_err(), "{text}");
        }
    }

    #[test]
    fn rounding_never_wraps() {
        assert_eq!(ByteLen(u64::MAX).align_up(4096), ByteLen(u64::MAX));
        assert_eq!(Offset(4097).align_down(4096), Offset(4096));
        assert_eq!(Offset(4097).align_up(4096), Offset(8192));
    }
}
