//! The four kinds of checksum that superblocks, tree blocks and data may have.
//!
//! Source: the kernel's `fs/btrfs/fs.c` (`btrfs_csums`). All checksums of one filesystem are of one
//! kind.

use blake2::Blake2b256;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh64::xxh64;

use super::format::CSUM_SIZE;
use crate::fs::sums_match;

/// A kind of checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    Crc32c,
    XxHash64,
    Sha256,
    Blake2b,
}

impl Checksum {
    /// The kind of this number (`enum btrfs_csum_type`), if it is known.
    pub(super) fn of_type(number: u16) -> Option<Self> {
        [Self::Crc32c, Self::XxHash64, Self::Sha256, Self::Blake2b]
            .get(usize::from(number))
            .copied()
    }

    /// How many bytes of its field it takes.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Crc32c => 4,
            Self::XxHash64 => 8,
            Self::Sha256 | Self::Blake2b => 32,
        }
    }

    /// The checksum of `bytes`; what of the field it does not take is zeros.
    pub(crate) fn of(self, bytes: &[u8]) -> [u8; CSUM_SIZE] {
        let mut sum = [0; CSUM_SIZE];
        match self {
            Self::Crc32c => sum[..4].copy_from_slice(&crc32c::crc32c(bytes).to_le_bytes()),
            Self::XxHash64 => sum[..8].copy_from_slice(&xxh64(bytes, 0).to_le_bytes()),
            Self::Sha256 => sum.copy_from_slice(&Sha256::digest(bytes)),
            Self::Blake2b => sum.copy_from_slice(&Blake2b256::digest(bytes)),
        }
        sum
    }

    /// Whether a superblock or tree block has the checksum that stands at its start.
    pub(super) fn holds(self, block: &[u8]) -> bool {
        let Some((noted, rest)) = block.split_at_checked(CSUM_SIZE) else {
            return false;
        };
        sums_match(&self.of(rest)[..self.len()], &noted[..self.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_their_standards() {
        let hex = |kind: Checksum| {
            let sum = kind.of(b"123456789");
            sum[..kind.len()]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        // The check values of the catalogues; xxHash and hashes as their own tools print them.
        assert_eq!(hex(Checksum::Crc32c), "839206e3");
        assert_eq!(hex(Checksum::XxHash64), "83aee640db41b88c");
        assert_eq!(
            hex(Checksum::Sha256),
            "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"
        );
        assert_eq!(
            hex(Checksum::Blake2b),
            "16e0bf1f85594a11e75030981c0b670370b3ad83a43f49ae58a2fd6f6513cde9"
        );
    }

    #[test]
    fn a_changed_bit_is_seen_by_every_kind() {
        for number in 0..4 {
            let kind = Checksum::of_type(number).unwrap();
            let mut block = vec![7; 4096];
            let sum = kind.of(&block[CSUM_SIZE..]);
            block[..CSUM_SIZE].copy_from_slice(&sum);
            assert!(kind.holds(&block));
            block[4095] ^= 1;
            assert!(!kind.holds(&block));
        }
        assert_eq!(Checksum::of_type(4), None);
        assert!(!Checksum::Crc32c.holds(&[0; 31]));
    }
}
