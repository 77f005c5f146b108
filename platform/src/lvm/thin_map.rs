//! Which blocks of a thin volume exist at all, from the metadata of its pool by thin_dump(8)
//! (thin-provisioning-tools). What was never written, or was discarded, reads as zeros.

use std::fmt;
use std::time::Duration;

use crate::command::Tool;
use crate::dm;
use crate::error::{Error, Result};
use crate::guard::{Undo, Way};
use crate::lvm;
use crate::node::DeviceNumber;

/// Reading the metadata of a large volume takes time.
const PATIENCE: Duration = Duration::from_secs(600);

/// The most that is read of the tool's output, in bytes: some million ranges.
const MOST_OUTPUT: usize = 256 << 20;

/// For how long a guard tries to release the snapshot.
const UNDO_PATIENCE: Duration = Duration::from_secs(5);

/// The blocks of a thin volume that exist.
#[derive(Clone, PartialEq, Eq)]
pub struct ThinMap {
    /// First sector and number of sectors of each range, ascending, apart; in units of 512 bytes.
    pub ranges: Vec<(u64, u64)>,
}

impl fmt::Debug for ThinMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ThinMap({} ranges)", self.ranges.len())
    }
}

/// A snapshot of a pool's metadata, of which there can be one only. Dropped, it is released.
#[derive(Debug)]
pub struct MetadataSnapshot {
    pool: DeviceNumber,
}

impl MetadataSnapshot {
    /// What releases it, for the guard; `None` where the pool is not mapped.
    ///
    /// # Errors
    /// If the tool is missing.
    pub fn undo(pool: DeviceNumber) -> Result<Option<Undo>> {
        let Some(name) = Self::name(pool) else {
            return Ok(None);
        };
        let tool = Tool::find("dmsetup")?.args(["message", &name, "0", "release_metadata_snap"]);
        Ok(Some(Undo {
            name,
            way: Way::Command(tool.words()),
            patience: UNDO_PATIENCE,
        }))
    }

    /// The name of a pool in /dev/mapper, by which its metadata snapshot is noted and found again.
    pub fn name(pool: DeviceNumber) -> Option<String> {
        let name = std::fs::read_to_string(format!("/sys/dev/block/{pool}/dm/name"));
        name.ok().map(|name| name.trim().to_owned())
    }

    /// Makes it. `None` if somebody else holds one.
    ///
    /// # Errors
    /// If the pool refuses.
    pub fn make(pool: DeviceNumber) -> Result<Option<Self>> {
        if lvm::pool_fill(pool)?.has_metadata_snapshot {
            return Ok(None);
        }
        dm::message(pool, "reserve_metadata_snap")?;
        Ok(Some(Self { pool }))
    }

    /// Releases the one that a dead run has left behind. Whether there was one.
    ///
    /// # Errors
    /// If the pool refuses.
    pub fn release_leftover(pool: DeviceNumber) -> Result<bool> {
        if !lvm::pool_fill(pool)?.has_metadata_snapshot {
            return Ok(false);
        }
        dm::message(pool, "release_metadata_snap").map(|()| true)
    }

    /// The map of the thin volume `id` of the pool. `None` if it is longer than is read, or not
    /// understood: then nothing is known of the volume's blocks.
    ///
    /// # Errors
    /// If the tool is missing or fails.
    pub fn map(&self, id: u64) -> Result<Option<ThinMap>> {
        let table = dm::table(self.pool)?;
        // `METADATA DATA BLOCK_SIZE ...`, the size in sectors.
        let mut words = table
            .targets
            .first()
            .map_or("", |target| &target.params)
            .split(' ');
        let metadata: Option<DeviceNumber> = words.next().and_then(|word| word.parse().ok());
        let block: Option<u64> = words.nth(1).and_then(|word| word.parse().ok());
        let (Some(metadata), Some(block)) = (metadata, block) else {
            return Err(Error::invalid(
                "cannot understand",
                "the pool's table",
                "no thin pool",
            ));
        };
        let device = crate::node::BlockDevice::of(metadata)?.path();
        let tool = Tool::find("thin_dump")?
            .args(["--metadata-snap", "--format", "xml"])
            .args(["--dev-id", &id.to_string()])
            .arg(device);
        let output = tool.deadline(PATIENCE).limit(MOST_OUTPUT).run()?;
        if output.truncated {
            return Ok(None);
        }
        let output = output.checked()?;
        Ok(std::str::from_utf8(&output.stdout)
            .ok()
            .and_then(|text| parse(text, block)))
    }
}

impl Drop for MetadataSnapshot {
    fn drop(&mut self) {
        if let Err(error) = dm::message(self.pool, "release_metadata_snap") {
            log::warn!("{error}");
        }
    }
}

/// Understands what `thin_dump` prints of one volume: one element a line. Only if it is whole, of this
/// block size, and has as many blocks as the volume.
fn parse(text: &str, block_sectors: u64) -> Option<ThinMap> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut mapped = None;
    let mut blocks = 0u64;
    let mut is_whole = false;
    for line in text.lines().map(str::trim) {
        let attribute = |name: &str| {
            let (_, rest) = line.split_once(&format!(" {name}=\""))?;
            rest.split('"').next()?.parse::<u64>().ok()
        };
        let (begin, length) = match line.split([' ', '>']).next()? {
            "<superblock" if attribute("data_block_size")? == block_sectors => continue,
            "<device" if mapped.is_none() => {
                mapped = Some(attribute("mapped_blocks")?);
                continue;
            }
            "<range_mapping" => (attribute("origin_begin")?, attribute("length")?),
            "<single_mapping" => (attribute("origin_block")?, 1),
            "</superblock" => {
                is_whole = true;
                continue;
            }
            "</device" | "" => continue,
            _ => return None,
        };
        blocks = blocks.checked_add(length)?;
        let start = begin.checked_mul(block_sectors)?;
        let sectors = length.checked_mul(block_sectors)?;
        let end = ranges.last().map_or(0, |(start, sectors)| start + sectors);
        start.checked_add(sectors)?;
        match ranges.last_mut() {
            Some(last) if start == end => last.1 += sectors,
            _ if start >= end => ranges.push((start, sectors)),
            _ => return None,
        }
    }
    (is_whole && mapped == Some(blocks)).then_some(ThinMap { ranges })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = r#"<superblock uuid="" time="1" transaction="2" flags="0" version="2" data_block_size="128" nr_data_blocks="320">
  <device dev_id="2" mapped_blocks="6" transaction="1" creation_time="1" snap_time="1">
    <range_mapping origin_begin="0" data_begin="0" length="3" time="0"/>
    <single_mapping origin_block="3" data_block="9" time="1"/>
    <range_mapping origin_begin="10" data_begin="4" length="2" time="0"/>
  </device>
</superblock>
"#;

    #[test]
    fn a_map_is_read_only_if_it_is_whole() {
        let map = parse(DUMP, 128).unwrap();
        assert_eq!(map.ranges, [(0, 512), (1280, 256)]);
        assert_eq!(parse(DUMP, 64), None, "another block size");
        assert_eq!(parse(&DUMP.replace("</superblock>", ""), 128), None);
        assert_eq!(
            parse(
                &DUMP.replace("mapped_blocks=\"6\"", "mapped_blocks=\"7\""),
                128
            ),
            None
        );
        assert_eq!(
            parse(&DUMP.replace("\"10\"", "\"2\""), 128),
            None,
            "not ascending"
        );
        assert_eq!(
            parse(&DUMP.replace("<single_mapping", "<shared"), 128),
            None
        );
        assert_eq!(
            parse(&DUMP.replace("length=\"2\"", "length=\"x\""), 128),
            None
        );
        let none = DUMP.replace(
            "</device>",
            "</device><device dev_id=\"3\" mapped_blocks=\"0\">",
        );
        assert_eq!(
            parse(&none.replace("><device", ">\n<device"), 128),
            None,
            "two volumes"
        );
        let huge = DUMP.replace("\"10\"", "\"18446744073709551615\"");
        assert_eq!(parse(&huge, 128), None);
    }
}
