//! Sources by what they say of themselves: `LABEL=`, `UUID=` of a filesystem, `PARTLABEL=`, `PARTUUID=` of a
//! partition. All block devices are asked; udev is not needed, and only believed where we cannot tell.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::node::{self, BlockDevice, Node};
use uuid::Uuid;

use crate::error::{Error, Kind, Result};
use crate::fs::{self, Info};
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset, SECTOR};

/// What a source is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Label,
    Uuid,
    PartLabel,
    PartUuid,
}

const KEYS: [(&str, Key); 4] = [
    ("LABEL=", Key::Label),
    ("UUID=", Key::Uuid),
    ("PARTLABEL=", Key::PartLabel),
    ("PARTUUID=", Key::PartUuid),
];

/// `LABEL=data` and the like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag<'a> {
    key: Key,
    value: &'a str,
}

/// What a device says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    /// `None` if it says nothing of it, which is not to say that it has none.
    value: Option<String>,
    /// Which btrfs it belongs to.
    btrfs: Option<Uuid>,
}

impl<'a> Tag<'a> {
    /// What `text` asks for, if it is a tag.
    pub fn parse(text: &'a str) -> Option<Self> {
        KEYS.iter().find_map(|&(name, key)| {
            let value = text.strip_prefix(name)?;
            Some(Self { key, value })
        })
    }

    /// The device that has it.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Usage`] if several have it; if the disks cannot be listed.
    pub fn resolve(&self, text: &str) -> Result<BlockDevice> {
        let mut found: Vec<(BlockDevice, Said)> = Vec::new();
        for disk in node::disks()? {
            // A disk that vanishes meanwhile has no partitions either.
            let partitions = disk.partitions().unwrap_or_default();
            for device in std::iter::once(&disk).chain(&partitions) {
                if let Some(said) = self.asked(&disk, device)
                    && said.value.as_deref().is_some_and(|value| self.is(value))
                {
                    found.push((device.clone(), said));
                }
            }
        }
        // All devices of one btrfs have the same label and UUID, and any of them names it.
        let one = found.first().and_then(|(_, said)| said.btrfs);
        if one.is_some() && found.iter().all(|(_, said)| said.btrfs == one) {
            found.truncate(1);
        }
        match found.as_slice() {
            [(device, _)] => Ok(device.clone()),
            [] => self.by_link(text),
            [(one, _), (other, _), ..] => Err(Error::new(
                Kind::Usage,
                format!(
                    "this could be more than one device: {} or {}",
                    one.path().display(),
                    other.path().display()
                ),
            )
            .on(text)
            .hint("name the device")),
        }
    }

    /// Hexadecimal digits may be written either way.
    fn is(&self, value: &str) -> bool {
        match self.key {
            Key::Label | Key::PartLabel => value == self.value,
            Key::Uuid | Key::PartUuid => value.eq_ignore_ascii_case(self.value),
        }
    }

    /// What a device says; `None` if it is not to be asked: it shows what another does, cannot be read, or is
    /// not a partition.
    fn asked(&self, disk: &BlockDevice, device: &BlockDevice) -> Option<Said> {
        let is_beneath = || device.holders().is_ok_and(|holders| !holders.is_empty());
        if device.sectors == 0 || device.is_suspended() || is_beneath() {
            return None;
        }
        match self.key {
            Key::Label | Key::Uuid => {
                let opened = Disk::open(&device.path(), Access::Read).ok()?;
                // The id of a partition table is that of no filesystem.
                let info = fs::probe(&opened)
                    .ok()?
                    .filter(|info| info.kind != fs::Kind::PartitionTable)?;
                let member = match info.kind {
                    fs::Kind::Btrfs => fs::member(&opened).ok().flatten(),
                    _ => None,
                };
                let Info { label, uuid, .. } = info;
                Some(Said {
                    value: if self.key == Key::Label { label } else { uuid },
                    btrfs: member.map(|member| member.fsid),
                })
            }
            Key::PartLabel | Key::PartUuid => {
                let place = device.partition?;
                let opened = Disk::open(&disk.path(), Access::Read).ok()?;
                let sector = opened.geometry().logical_sector;
                let entry = entry(&opened, sector, place.index, place.start * SECTOR)?;
                Some(Said {
                    value: if self.key == Key::PartLabel {
                        entry.name
                    } else {
                        Some(entry.uuid)
                    },
                    btrfs: None,
                })
            }
        }
    }

    /// What udev says, where the device itself is not known to say something else: labels of NTFS and exFAT are
    /// not read here.
    fn by_link(&self, text: &str) -> Result<BlockDevice> {
        let none = || Error::new(Kind::NotFound, "no block device has it").on(text);
        let folder = match self.key {
            Key::Label => "by-label",
            Key::Uuid => "by-uuid",
            Key::PartLabel => "by-partlabel",
            Key::PartUuid => "by-partuuid",
        };
        let link = Path::new("/dev/disk")
            .join(folder)
            .join(encoded(self.value));
        let node = Node::of(&link).map_err(|_| none())?;
        let device = BlockDevice::of(node.block_device().ok_or_else(none)?)?;
        let disk = BlockDevice::of(device.disk)?;
        match self.asked(&disk, &device) {
            Some(Said { value: None, .. }) => Ok(device),
            _ => Err(none()),
        }
    }
}

/// A value as udev writes it into the name of a link.
fn encoded(value: &str) -> PathBuf {
    let plain =
        |byte: &u8| byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(byte) || *byte > 127;
    let bytes = value.bytes().flat_map(|byte| match plain(&byte) {
        true => vec![byte],
        false => format!("\\x{byte:02x}").into_bytes(),
    });
    PathBuf::from(OsString::from_vec(bytes.collect()))
}

/// An entry of a partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// As `blkid` writes it as PARTUUID.
    uuid: String,
    name: Option<String>,
}

/// The entry of partition `index`, which begins at byte `start`, on a disk with sectors of `sector` bytes. The
/// entry has to say so as well: the kernel may have been told of other partitions than the disk has.
fn entry(disk: &dyn ReadAt, sector: u32, index: u32, start: u64) -> Option<Entry> {
    let sector = u64::from(sector);
    let number = u64::from(index.checked_sub(1)?);
    let header = disk.read_vec_at(Offset(sector), ByteLen(92)).ok()?;
    let le32 = |bytes: &[u8], at: usize| bytes[at..].first_chunk().copied().map(u32::from_le_bytes);
    let le64 = |bytes: &[u8], at: usize| bytes[at..].first_chunk().copied().map(u64::from_le_bytes);
    if header.starts_with(b"EFI PART") {
        let (count, len) = (le32(&header, 80)?, u64::from(le32(&header, 84)?));
        let table = le64(&header, 72)?.checked_mul(sector)?;
        if number >= u64::from(count) || !(128..=4096).contains(&len) {
            return None;
        }
        let at = table.checked_add(number * len)?;
        let entry = disk.read_vec_at(Offset(at), ByteLen(len)).ok()?;
        if le64(&entry, 32)?.checked_mul(sector)? != start {
            return None;
        }
        let units = entry[56..128].chunks_exact(2);
        let units = units.map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        let name = String::from_utf16_lossy(&units);
        return Some(Entry {
            uuid: Uuid::from_bytes_le(*entry[16..].first_chunk()?).to_string(),
            name: (!name.is_empty()).then_some(name),
        });
    }
    let mbr = disk.read_vec_at(Offset::ZERO, ByteLen(512)).ok()?;
    let id = le32(&mbr, 440)?;
    let is_mbr = mbr[510..] == [0x55, 0xaa] && id != 0;
    // Logical partitions have their entries elsewhere, and are counted by the kernel.
    if number < 4 {
        let first = u64::from(le32(&mbr, 446 + 16 * number as usize + 8)?);
        if first.checked_mul(sector)? != start {
            return None;
        }
    }
    is_mbr.then(|| Entry {
        uuid: format!("{id:08x}-{index:02x}"),
        name: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_told_from_paths() {
        assert_eq!(Tag::parse("LABEL=a b").unwrap().value, "a b");
        assert_eq!(Tag::parse("PARTUUID=x").unwrap().key, Key::PartUuid);
        for path in ["./LABEL=a", "/dev/sda", "LABEL", "label=a", "XLABEL=a"] {
            assert_eq!(Tag::parse(path), None);
        }
    }

    #[test]
    fn names_of_links_are_written_as_udev_does() {
        assert_eq!(encoded("a b/c"), Path::new("a\\x20b\\x2fc"));
        assert_eq!(encoded("EFI-1.0_ü"), Path::new("EFI-1.0_ü"));
    }

    #[test]
    fn entries_that_are_nonsense_are_none() {
        let mut disk = vec![0; 1 << 16];
        assert_eq!(entry(&disk, 512, 1, 0), None);
        disk[512..520].copy_from_slice(b"EFI PART");
        for len in [0u32, 1, 127, 4097, u32::MAX] {
            disk[512 + 80..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
            disk[512 + 84..][..4].copy_from_slice(&len.to_le_bytes());
            assert_eq!(entry(&disk, 512, 1, 0), None);
        }
        disk[512 + 84..][..4].copy_from_slice(&128u32.to_le_bytes());
        disk[512 + 72..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(entry(&disk, 512, 1, 0), None);
        assert_eq!(entry(&disk, 512, 0, 0), None);
        disk[512 + 72..][..8].copy_from_slice(&2u64.to_le_bytes());
        assert_eq!(entry(&disk, 512, u32::MAX, 0), None);
        disk[1024 + 56..][..4].copy_from_slice(&[b'a', 0, b'b', 0]);
        let found = entry(&disk, 512, 1, 0).unwrap();
        assert_eq!(found.name.as_deref(), Some("ab"));
        assert_eq!(entry(&disk, 512, 1, 512), None);
    }
}
