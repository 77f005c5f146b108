//! Whether a volume can be used on a target: its size and its sectors are compared with what the content
//! needs, before anything is written.

use std::path::Path;

use holdstill_platform::device::Geometry;

use crate::error::{Error, Kind, Result};
use crate::fs::{self, Needs};
use crate::image::manifest::VolumeManifest;
use crate::units::ByteLen;

/// A volume, as far as its target is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// What it is called in messages: `volume 1`, `the source`.
    name: String,
    /// Its size in bytes.
    size: ByteLen,
    /// What its content needs.
    needs: Needs,
    /// Logical sector of the device it was on.
    logical_sector: u32,
    /// What it holds, as `blkid` calls it.
    fs: Option<String>,
}

impl Fit {
    /// A volume of an image, by what its manifest says.
    pub fn of_volume(volume: &VolumeManifest) -> Self {
        Self {
            name: format!("volume {}", volume.n),
            size: ByteLen(volume.size),
            needs: Needs {
                sector: volume.sector_size,
                smallest: ByteLen(volume.smallest_target.min(volume.size)),
                largest: volume.largest_target.map(ByteLen),
            },
            logical_sector: volume.logical_sector,
            fs: volume.fs.clone(),
        }
    }

    /// A source that is about to be copied.
    pub fn of_source(geometry: &Geometry, fs: Option<fs::Kind>, needs: Needs) -> Self {
        Self {
            name: "the source".to_owned(),
            size: ByteLen(geometry.size),
            needs,
            logical_sector: geometry.logical_sector,
            fs: fs.map(|kind| kind.name().to_owned()),
        }
    }

    /// What it holds, as `blkid` calls it.
    pub fn fs(&self) -> Option<&str> {
        self.fs.as_deref()
    }

    /// Its size in bytes.
    pub fn size(&self) -> ByteLen {
        self.size
    }

    fn is_disk(&self) -> bool {
        self.fs.as_deref() == Some(fs::Kind::PartitionTable.name())
    }

    /// Whether it fits on an existing target. With `allow_unusable`, only its size has to.
    ///
    /// # Errors
    /// [`Kind::TooSmall`]; [`Kind::Unusable`] if it could not be used there.
    pub fn check(&self, target: &Path, found: &Geometry, allow_unusable: bool) -> Result<()> {
        let room = ByteLen(found.size);
        let needed = self.needs.smallest;
        if room < needed {
            let what = format!(
                "the target is too small: it has {room} ({} bytes), and {} needs {needed} ({} bytes)",
                room.0, self.name, needed.0
            );
            return Err(Error::new(Kind::TooSmall, what).on(target));
        }
        let objection = self
            .objection_to_sectors(found)
            .or_else(|| self.objection_to_size(room));
        match objection {
            Some(what) if !allow_unusable => Err(Error::new(Kind::Unusable, what)
                .on(target)
                .hint("choose another target; --allow-unusable writes the copy anyway")),
            _ => Ok(()),
        }
    }

    /// A file has no sectors of its own: whoever attaches it chooses them.
    fn objection_to_sectors(&self, found: &Geometry) -> Option<String> {
        let (name, target) = (&self.name, found.logical_sector);
        if !found.is_block_device {
            return None;
        }
        let Some(sector) = self.needs.sector else {
            let made_on = self.logical_sector;
            return (target > made_on).then(|| {
                format!(
                    "{name} was on sectors of {made_on} bytes, and nothing tells that it can be used on \
                     the target's sectors of {target} bytes"
                )
            });
        };
        if self.is_disk() {
            return (target != sector).then(|| {
                format!(
                    "the partition table of {name} is for sectors of {sector} bytes, and the target has \
                     sectors of {target} bytes"
                )
            });
        }
        let fs = self.fs.as_deref().unwrap_or("filesystem");
        (target > sector).then(|| {
            format!(
                "the {fs} of {name} uses units of {sector} bytes, and the target has larger sectors \
                 ({target} bytes): it could not be mounted"
            )
        })
    }

    fn objection_to_size(&self, room: ByteLen) -> Option<String> {
        let largest = self.needs.largest.filter(|largest| room > *largest)?;
        let fs = self.fs.as_deref().unwrap_or("content");
        Some(format!(
            "the {fs} of {} is looked for at the end of its device, and the target is larger: it has \
             {} bytes instead of {}",
            self.name, room.0, largest.0
        ))
    }

    /// What the user has to do before a copy on a target of `room` bytes can be used to its full extent.
    pub fn warning(&self, target: &Path, room: ByteLen) -> Option<String> {
        (self.is_disk() && room > self.size).then(|| {
            let target = target.display();
            format!(
                "{target} is larger than the disk that {} is of: if its partition table is a GPT, the \
                 backup of that table is not at the end; `sgdisk --move-second-header {target}` moves it",
                self.name
            )
        })
    }
}
