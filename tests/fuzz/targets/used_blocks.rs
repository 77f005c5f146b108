//! Every parser of a filesystem: what is found on a volume that somebody changed, with all checksums
//! taken for right (`cfg(fuzzing)`).
//!
//! Volumes are too large for an input. An input says which one of those in the folder that
//! `HOLDSTILL_FUZZ_VOLUMES` names is changed, and where:
//!
//! | byte | |
//! | --- | --- |
//! | 0 | number of the volume |
//! | 1 | bit 0: it is frozen; bit 1: it is cut off in the middle |
//! | then 12 each | `u16` number of a sector that is not all zeros, `u16` offset in it and length of the change, `u64` what is put there |
#![no_main]

use std::collections::BTreeMap;
use std::sync::LazyLock;

use holdstill::error::Result;
use holdstill::fs::{self, Opened};
use holdstill::read_at::{ReadAt, check_range};
use holdstill::units::{ByteLen, Offset};
use libfuzzer_sys::{Corpus, fuzz_target};

#[path = "../../common/walking.rs"]
mod walking;

use walking::{Bounded, walk};

const SECTOR: usize = 512;
/// Bytes of a change in an input.
const CHANGE: usize = 12;
const MAX_CHANGES: usize = 64;

type Sectors = BTreeMap<u64, [u8; SECTOR]>;

/// A volume in memory; sectors of zeros are left out.
struct Volume {
    len: u64,
    sectors: Sectors,
    numbers: Vec<u64>,
}

static VOLUMES: LazyLock<Vec<Volume>> = LazyLock::new(|| {
    let folder = std::env::var_os("HOLDSTILL_FUZZ_VOLUMES").expect("HOLDSTILL_FUZZ_VOLUMES is set");
    let entries = std::fs::read_dir(folder).expect("the folder of volumes");
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("a volume").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no volumes");
    paths.iter().map(|path| Volume::read(path)).collect()
});

impl Volume {
    fn read(path: &std::path::Path) -> Self {
        let bytes = std::fs::read(path).expect("a volume");
        let (whole, _) = bytes.as_chunks::<SECTOR>();
        let sectors: Sectors = (0..)
            .zip(whole)
            .filter(|(_, sector)| **sector != [0; SECTOR])
            .map(|(number, sector)| (number, *sector))
            .collect();
        Self {
            len: bytes.len() as u64,
            numbers: sectors.keys().copied().collect(),
            sectors,
        }
    }
}

/// A volume with changes.
struct Changed {
    volume: &'static Volume,
    len: ByteLen,
    changed: Sectors,
}

impl Changed {
    fn new(volume: &'static Volume, is_cut: bool, changes: &[[u8; CHANGE]]) -> Self {
        let mut changed = Sectors::new();
        for change in changes {
            let [number, place] =
                [0, 2].map(|at| usize::from(u16::from_le_bytes([change[at], change[at + 1]])));
            let number = volume.numbers[number % volume.numbers.len()];
            let offset = place % SECTOR;
            let len = (place / SECTOR % 8 + 1).min(SECTOR - offset);
            let sector = changed
                .entry(number)
                .or_insert_with(|| volume.sectors[&number]);
            sector[offset..offset + len].copy_from_slice(&change[4..4 + len]);
        }
        Self {
            volume,
            len: ByteLen(if is_cut {
                volume.len / 2 + 100
            } else {
                volume.len
            }),
            changed,
        }
    }
}

impl ReadAt for Changed {
    fn len(&self) -> ByteLen {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        check_range(self.len, offset, ByteLen(buf.len() as u64))?;
        buf.fill(0);
        let end = offset.0 + buf.len() as u64;
        let sectors = offset.0 / SECTOR as u64..end.div_ceil(SECTOR as u64);
        for from in [&self.volume.sectors, &self.changed] {
            for (number, sector) in from.range(sectors.clone()) {
                let start = number * SECTOR as u64;
                let first = offset.0.max(start);
                let last = end.min(start + SECTOR as u64);
                buf[(first - offset.0) as usize..(last - offset.0) as usize]
                    .copy_from_slice(&sector[(first - start) as usize..(last - start) as usize]);
            }
        }
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let [number, how, changes @ ..] = input else {
        return Corpus::Reject;
    };
    let (changes, _) = changes.as_chunks::<CHANGE>();
    if changes.len() > MAX_CHANGES {
        return Corpus::Reject;
    }
    let volume = &VOLUMES[usize::from(*number) % VOLUMES.len()];
    let source = Changed::new(volume, how & 2 != 0, changes);
    let source = Bounded::new(&source);
    let opened = match how & 1 {
        0 => fs::open(&source),
        _ => fs::open_frozen(&source),
    };
    if let Ok(Opened::Known(filesystem)) = opened {
        let _ = filesystem.volumes(&source);
        let _ = walk(filesystem.as_ref(), &source);
    }
    Corpus::Keep
});
