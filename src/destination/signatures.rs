//! Old signatures on a target where a copy of used blocks may leave them alone: outside of the first MiB, which
//! is always overwritten. What probes devices (libblkid, and so udev and mount) would find them beside the
//! new content, and then tell neither.
//!
//! Sources: util-linux `libblkid/src/superblocks` and `partitions/gpt.c`; the kernel's `btrfs/disk-io.h`,
//! `drbd_int.h` and `md_p.h`; LUKS2 on-disk format, 2.1; the ZFS on-disk specification.

use std::fmt;

use crate::extent::{Extent, ExtentSet};
use crate::image::format::BLOCK;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset, SECTOR};

/// One kind of signature.
struct Signature {
    name: &'static str,
    /// Where the structure begins.
    places: &'static [Place],
    /// Where in it the magic is.
    at: u64,
    magic: &'static [u8],
}

/// Where a structure begins, in bytes.
#[derive(Clone, Copy)]
enum Place {
    /// From the start of the device.
    Start(u64),
    /// Before the end of the device, once that is rounded down to a unit.
    End {
        /// How far before.
        before: u64,
        /// The unit.
        unit: u64,
    },
}
use Place::{End, Start};

const fn sectors_before_end(count: u64) -> Place {
    End {
        before: count * SECTOR,
        unit: SECTOR,
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const BCACHEFS: &[Place] = &[
    Start(2 * MIB),
    End {
        before: MIB,
        unit: KIB,
    },
];

/// All that lie outside of the first MiB. ZFS is apart: its magic is in one of many places.
const ALL: &[Signature] = &[
    Signature {
        name: "VMFS volume member",
        places: &[Start(MIB)],
        at: 0,
        magic: b"\x0d\xd0\x01\xc0",
    },
    Signature {
        name: "VMFS",
        places: &[Start(2 * MIB)],
        at: 0,
        magic: b"\x5e\xf1\xab\x2f",
    },
    Signature {
        name: "second LUKS2 header",
        places: &[Start(MIB), Start(2 * MIB), Start(4 * MIB)],
        at: 0,
        magic: b"SKUL\xba\xbe",
    },
    Signature {
        name: "bcachefs",
        places: BCACHEFS,
        at: 24,
        magic: b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
    },
    Signature {
        name: "bcachefs",
        places: BCACHEFS,
        at: 24,
        magic: b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
    },
    Signature {
        name: "mirror of a btrfs superblock",
        places: &[Start(64 * MIB), Start(256 * GIB)],
        at: 64,
        magic: b"_BHRfS_M",
    },
    Signature {
        name: "backup GPT",
        places: &[
            sectors_before_end(1),
            End {
                before: 4096,
                unit: 4096,
            },
        ],
        at: 0,
        magic: b"EFI PART",
    },
    Signature {
        name: "md 1.0",
        places: &[End {
            before: 8 * KIB,
            unit: 4096,
        }],
        at: 0,
        magic: b"\xfc\x4e\x2b\xa9",
    },
    Signature {
        name: "md 0.90",
        places: &[End {
            before: 64 * KIB,
            unit: 64 * KIB,
        }],
        at: 0,
        magic: b"\xfc\x4e\x2b\xa9",
    },
    Signature {
        name: "DRBD",
        places: DRBD,
        at: 60,
        magic: b"\x83\x74\x02\x6b",
    },
    Signature {
        name: "DRBD",
        places: DRBD,
        at: 60,
        magic: b"\x83\x74\x02\x6c",
    },
    Signature {
        name: "DRBD",
        places: DRBD,
        at: 60,
        magic: b"\x83\x74\x02\x6d",
    },
    Signature {
        name: "second NILFS2 superblock",
        places: &[End {
            before: 4096,
            unit: 4096,
        }],
        at: 0,
        magic: b"\x02\0\0\0\0\0\x34\x34",
    },
    Signature {
        name: "Intel RAID",
        places: &[
            sectors_before_end(2),
            End {
                before: 8192,
                unit: 4096,
            },
        ],
        at: 0,
        magic: b"Intel Raid ISM Cfg Sig. ",
    },
    Signature {
        name: "DDF RAID",
        places: &[sectors_before_end(1), sectors_before_end(257)],
        at: 0,
        magic: b"\xde\x11\xde\x11",
    },
    Signature {
        name: "Promise RAID",
        places: &[
            sectors_before_end(63),
            sectors_before_end(255),
            sectors_before_end(256),
            sectors_before_end(16),
            sectors_before_end(399),
            sectors_before_end(591),
            sectors_before_end(675),
            sectors_before_end(735),
            sectors_before_end(911),
            sectors_before_end(974),
            sectors_before_end(991),
            sectors_before_end(951),
            sectors_before_end(3087),
        ],
        at: 0,
        magic: b"Promise Technology, Inc.",
    },
    Signature {
        name: "second HFS+ header",
        places: &[sectors_before_end(2)],
        at: 0,
        magic: b"H+\0\x04",
    },
];

const DRBD: &[Place] = &[sectors_before_end(8)];

/// The labels of a ZFS vdev at the end of its device, and the uberblocks in one.
const ZFS_LABEL: u64 = 256 * KIB;
const ZFS_UBERBLOCKS: std::ops::Range<u64> = 128 * KIB..256 * KIB;
const ZFS_MAGICS: [&[u8]; 2] = [b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c"];

impl Place {
    fn on(self, size: ByteLen) -> Option<u64> {
        match self {
            Start(at) => Some(at),
            End { before, unit } => (size.0 - size.0 % unit).checked_sub(before),
        }
    }
}

/// A signature that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    name: &'static str,
    /// Where its magic is.
    pub(crate) at: Offset,
    magic: &'static [u8],
}

impl Found {
    /// Whether the magic is there, and can be read.
    pub(crate) fn is_on(&self, source: &dyn ReadAt) -> bool {
        let mut bytes = [0; 32];
        let bytes = &mut bytes[..self.magic.len()];
        source.read_exact_at(bytes, self.at).is_ok() && bytes == self.magic
    }

    /// The block that its magic is in, which may reach past the end of the device.
    pub(crate) fn block(&self) -> Offset {
        self.at.align_down(BLOCK)
    }
}

/// `backup GPT at byte 1048064`.
impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.name, self.at.0)
    }
}

/// The blocks of a volume in which signatures may lie. ZFS is left out: at the end, it is always found in the
/// last MiB.
pub(crate) fn blocks(size: ByteLen) -> ExtentSet {
    let places = ALL.iter().flat_map(|signature| {
        let places = signature.places.iter();
        places.filter_map(|place| place.on(size)?.checked_add(signature.at))
    });
    let blocks = places.map(|at| Extent::new(Offset(at).align_down(BLOCK).0, BLOCK));
    blocks
        .filter_map(|block| block.intersect(Extent::new(0, size.0)))
        .collect()
}

/// The signatures on a device, except those in its first MiB.
pub(crate) fn find(source: &dyn ReadAt) -> Vec<Found> {
    let size = source.len();
    let mut found: Vec<Found> = ALL
        .iter()
        .flat_map(|signature| {
            let places = signature.places.iter();
            places.filter_map(|place| {
                Some(Found {
                    name: signature.name,
                    at: Offset(place.on(size)?.checked_add(signature.at)?),
                    magic: signature.magic,
                })
            })
        })
        .filter(|found| found.at.0 >= MIB && found.is_on(source))
        .collect();
    found.extend(zfs(source));
    found
}

/// The first uberblock of each label at the end.
fn zfs(source: &dyn ReadAt) -> Vec<Found> {
    let end = source.len().0 / ZFS_LABEL * ZFS_LABEL;
    let labels = [2 * ZFS_LABEL, ZFS_LABEL].into_iter();
    let labels = labels.filter_map(|before| end.checked_sub(before));
    labels
        .filter_map(|label| {
            let start = label + ZFS_UBERBLOCKS.start;
            let len = ByteLen(ZFS_UBERBLOCKS.end - ZFS_UBERBLOCKS.start);
            let bytes = source.read_vec_at(Offset(start), len).ok()?;
            let mut slots = (0..len.0).step_by(KIB as usize);
            slots.find_map(|slot| {
                let magics = ZFS_MAGICS.into_iter();
                let mut magics = magics.filter(|magic| bytes[slot as usize..].starts_with(magic));
                Some(Found {
                    name: "ZFS label",
                    at: Offset(start + slot),
                    magic: magics.next()?,
                })
            })
        })
        .filter(|found| found.at.0 >= MIB)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device of which only some bytes are not zeros.
    struct Sparse(u64, Vec<(u64, &'static [u8])>);

    impl ReadAt for Sparse {
        fn len(&self) -> ByteLen {
            ByteLen(self.0)
        }

        fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> crate::error::Result<()> {
            crate::read_at::check_range(self.len(), offset, ByteLen(buf.len() as u64))?;
            buf.fill(0);
            for (at, bytes) in &self.1 {
                for (byte, at) in bytes.iter().zip(*at..) {
                    if let Some(place) = at.checked_sub(offset.0).map(|at| at as usize)
                        && place < buf.len()
                    {
                        buf[place] = *byte;
                    }
                }
            }
            Ok(())
        }
    }

    #[test]
    fn each_signature_is_found_where_it_may_be_and_nowhere_else() {
        let size = 300 * GIB + 3 * SECTOR;
        for signature in ALL {
            for place in signature.places {
                let at = place.on(ByteLen(size)).unwrap() + signature.at;
                let device = Sparse(size, vec![(at, signature.magic)]);
                let found = find(&device);
                assert_eq!(found.len(), 1, "{}", signature.name);
                assert_eq!(found[0].at, Offset(at), "{}", signature.name);
                assert!(found[0].is_on(&device));
                let beside = Sparse(size, vec![(at + 1, signature.magic)]);
                assert_eq!(find(&beside), [], "{}", signature.name);
            }
        }
    }

    #[test]
    fn a_label_of_zfs_at_the_end_is_found() {
        let size = 8 * MIB + 5 * SECTOR;
        let at = 8 * MIB - ZFS_LABEL + ZFS_UBERBLOCKS.start + 3 * KIB;
        let device = Sparse(size, vec![(at, ZFS_MAGICS[0])]);
        let found = find(&device);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to_string(), format!("ZFS label at byte {at}"));
    }

    #[test]
    fn a_device_that_is_too_small_for_signatures_has_none() {
        for size in [0, 1, 511, 512, 4096, MIB - 1, MIB, MIB + 1] {
            assert_eq!(find(&Sparse(size, Vec::new())), []);
        }
    }
}
