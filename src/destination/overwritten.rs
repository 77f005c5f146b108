//! What is on a target now, for people who are asked whether it may be overwritten.

use std::fmt;
use std::path::Path;

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::identity;
use holdstill_platform::node::BlockDevice;
use serde::Serialize;

use crate::error::{Escaped, Result};
use crate::fs::{self, Opened};
use crate::units::ByteLen;

/// What a device or file holds. Text is as on disk; [`Display`](fmt::Display) escapes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Overwritten {
    /// Where it is.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// Filesystem or other signature, if one was recognized.
    pub fs: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Bytes in use, where its map can be trusted.
    pub used_bytes: Option<u64>,
    /// Where it was last mounted.
    pub last_mounted_at: Option<String>,
    /// When that was (RFC 3339).
    pub last_mounted: Option<String>,
    /// When it was last written to (RFC 3339).
    pub last_written: Option<String>,
    /// What the disk calls itself.
    pub model: Option<String>,
    /// Serial number of the disk, or another id.
    pub serial: Option<String>,
    /// The partitions that the kernel knows on it.
    pub partitions: Vec<Self>,
}

/// Asks a question before something that exists is overwritten.
#[derive(Debug)]
pub struct Question<'a> {
    /// What would be overwritten.
    pub target: &'a Path,
    /// With what.
    pub with: &'a str,
}

/// Answers a [`Question`]: an error if the answer is no.
pub type Confirm<'a> = dyn FnMut(&Question<'_>) -> Result<()> + 'a;

impl Overwritten {
    /// Looks at a device or file. What cannot be read is left out.
    pub fn of(path: &Path) -> Self {
        let device = BlockDevice::at(path).ok();
        let mut found = Self::content(path).unwrap_or_else(|error| {
            log::debug!("{error}");
            Self::default()
        });
        found.path = path.display().to_string();
        if let Some(device) = device {
            let label = identity::of_disk(&device);
            found.model = label.model;
            found.serial = label.serial;
            let partitions = device.partitions().unwrap_or_default().into_iter();
            let partitions = partitions.map(|partition| {
                let path = partition.path();
                Self {
                    path: path.display().to_string(),
                    ..Self::content(&path).unwrap_or_default()
                }
            });
            found.partitions = partitions.collect();
        }
        found
    }

    /// All except its place and its partitions.
    fn content(path: &Path) -> Result<Self> {
        let disk = Disk::open(path, Access::Read)?;
        let empty = Self {
            size: disk.geometry().size,
            ..Self::default()
        };
        let Some(info) = fs::probe(&disk)? else {
            return Ok(empty);
        };
        let last = fs::last_use(&disk, &info);
        Ok(Self {
            used_bytes: used_bytes(&disk).map(|used| used.0),
            fs: Some(info.kind.name().to_owned()),
            label: info.label,
            uuid: info.uuid,
            last_mounted_at: last.mounted_at,
            last_mounted: last.mounted.map(|time| time.to_string()),
            last_written: last.written.map(|time| time.to_string()),
            ..empty
        })
    }
}

/// Bytes in use, where a map says it and can be trusted.
fn used_bytes(disk: &Disk) -> Option<ByteLen> {
    match fs::open(disk) {
        Ok(Opened::Known(filesystem)) if filesystem.condition().is_settled() => {
            let walk = filesystem.walk_used(disk, &mut |_| Ok(()));
            walk.ok().map(|walk| walk.used)
        }
        _ => None,
    }
}

/// ``ext4 `data`, 24.0 MiB, 5.1 MiB used, last mounted at /srv at 2026-11-30T21:00:00Z``.
impl fmt::Display for Overwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fs {
            Some(fs) => write!(f, "{}", Escaped(fs))?,
            None => write!(f, "no known filesystem")?,
        }
        if let Some(label) = &self.label {
            write!(f, " `{}`", Escaped(label))?;
        }
        write!(f, ", {}", ByteLen(self.size))?;
        if let Some(used) = self.used_bytes {
            write!(f, ", {} used", ByteLen(used))?;
        }
        match (&self.last_mounted_at, &self.last_mounted) {
            (Some(point), Some(time)) => {
                write!(f, ", last mounted at {} at {time}", Escaped(point))?;
            }
            (Some(point), None) => write!(f, ", last mounted at {}", Escaped(point))?,
            (None, Some(time)) => write!(f, ", last mounted at {time}")?,
            (None, None) => {}
        }
        if let Some(time) = &self.last_written {
            write!(f, ", last written at {time}")?;
        }
        if let Some(model) = &self.model {
            write!(f, ", on {}", Escaped(model))?;
        }
        if let Some(serial) = &self.serial {
            write!(f, ", serial number {}", Escaped(serial))?;
        }
        for partition in &self.partitions {
            write!(f, "; {}: {partition}", Escaped(&partition.path))?;
        }
        Ok(())
    }
}
