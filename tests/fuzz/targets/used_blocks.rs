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

use std::sync::LazyLock;

use holdstill::error::Result;
use holdstill::fs::{self, Opened};
use holdstill::read_at::{ReadAt, check_range};
use holdstill::units::{ByteLen, Offset};
use libfuzzer_sys::{Corpus, fuzz_target};

#[path = "../../common/sparse.rs"]
mod sparse;
#[path = "../../common/walking.rs"]
mod walking;

use sparse::Blocks;
use walking::{Bounded, Changed, Patch, walk};

const SECTOR: usize = 512;
/// Bytes of a change in an input.
const CHANGE: usize = 12;
const MAX_CHANGES: usize = 64;

/// A volume in memory; sectors of zeros are left out.
struct Volume {
    len: ByteLen,
    sectors: Blocks,
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
        let sectors: Blocks = (0..)
            .zip(bytes.chunks_exact(SECTOR))
            .filter(|(_, sector)| **sector != [0; SECTOR])
            .map(|(number, sector)| (number, sector.to_vec()))
            .collect();
        Self {
            len: ByteLen(bytes.len() as u64),
            numbers: sectors.keys().copied().collect(),
            sectors,
        }
    }

    fn patch(&self, change: &[u8; CHANGE]) -> Patch {
        let [number, place] =
            [0, 2].map(|at| usize::from(u16::from_le_bytes([change[at], change[at + 1]])));
        let number = self.numbers[number % self.numbers.len()];
        let offset = place % SECTOR;
        let len = (place / SECTOR % 8 + 1).min(SECTOR - offset);
        let at = number * SECTOR as u64 + offset as u64;
        (at, change[4..4 + len].to_vec())
    }
}

impl ReadAt for Volume {
    fn len(&self) -> ByteLen {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        check_range(self.len, offset, ByteLen(buf.len() as u64))?;
        sparse::read(&self.sectors, SECTOR as u64, buf, offset);
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
    let source = Changed {
        base: volume,
        len: match how & 2 {
            0 => volume.len,
            _ => ByteLen(volume.len.0 / 2 + 100),
        },
        patches: changes.iter().map(|change| volume.patch(change)).collect(),
        broken: None,
    };
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
