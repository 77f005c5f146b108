//! Where logical addresses of a btrfs lie, by what its own tools print of the chunk tree.

use std::path::Path;

use super::btrfs::number_after;
use super::run;

/// Bytes in a piece of a stripe.
const STRIPE_LEN: u64 = 64 << 10;

/// A chunk as it is printed.
pub(crate) struct PrintedChunk {
    logical: std::ops::Range<u64>,
    profile: String,
    /// Device and place of each stripe.
    stripes: Vec<(u64, u64)>,
}

impl PrintedChunk {
    /// The number of the device (from 1) and the byte on it of each copy of a byte of the chunk.
    fn copies(&self, address: u64) -> Vec<(u64, u64)> {
        let offset = address - self.logical.start;
        let (piece, within) = (offset / STRIPE_LEN, offset % STRIPE_LEN);
        let columns = |copies: u64| {
            let columns = self.stripes.len() as u64 / copies;
            let first = (piece % columns * copies) as usize;
            let at = piece / columns * STRIPE_LEN + within;
            (&self.stripes[first..first + copies as usize], at)
        };
        let (stripes, at) = match self.profile.as_str() {
            "raid0" => columns(1),
            "raid10" => columns(2),
            "single" | "dup" | "raid1" | "raid1c3" | "raid1c4" => (&self.stripes[..], offset),
            other => panic!("profile {other}"),
        };
        stripes
            .iter()
            .map(|(devid, start)| (*devid, start + at))
            .collect()
    }
}

/// All chunks of a filesystem that is not mounted.
pub(crate) fn printed_chunks(devices: &[&Path]) -> Vec<PrintedChunk> {
    let args = ["inspect-internal", "dump-tree", "-t", "chunk"].map(Path::new);
    let text = run("btrfs", args.into_iter().chain(devices.iter().copied()));
    let mut chunks: Vec<PrintedChunk> = Vec::new();
    for line in text.lines() {
        if let Some((_, start)) = line.split_once(" CHUNK_ITEM ") {
            let start = start.split(')').next().unwrap().parse().unwrap();
            chunks.push(PrintedChunk {
                logical: start..start,
                profile: String::new(),
                stripes: Vec::new(),
            });
        } else if let Some(len) = number_after(line, "length") {
            let chunk = chunks.last_mut().unwrap();
            let (_, kind) = line.split_once(" type ").unwrap();
            chunk.logical.end += len;
            chunk.profile = kind.split('|').next_back().unwrap().to_lowercase();
        } else if line.trim_start().starts_with("stripe ") {
            let stripe = ["devid", "offset"].map(|name| number_after(line, name).unwrap());
            chunks
                .last_mut()
                .unwrap()
                .stripes
                .push((stripe[0], stripe[1]));
        }
    }
    chunks
}

/// The number of the device (from 1) and the byte on it of each copy of a logical address. (What
/// `btrfs-map-logical` does not say of an extent that is the first of its leaf.)
pub(crate) fn copies_of(chunks: &[PrintedChunk], address: u64) -> Vec<(u64, u64)> {
    let mut chunks = chunks.iter();
    let chunk = chunks.find(|chunk| chunk.logical.contains(&address));
    let chunk = chunk.unwrap_or_else(|| panic!("no chunk holds {address}"));
    chunk.copies(address)
}
