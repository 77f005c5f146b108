//! Which bytes a device or file really is: the stretches of disks and files below it. Two names are the
//! same bytes not only where they name the same thing: a loop device shows a stretch of a file, a
//! partition one of a disk, a mapped device stretches of others, and a file of an overlay is one of its
//! layers' files.
//!
//! What passes through the same device at different places has no bytes in common there, and is not
//! followed further. Where a device does not tell which bytes below are its own, it is taken to have all.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::dm;
use crate::error::{Context, Error, Result};
use crate::mounts::Place;
use crate::node::{BlockDevice, DeviceNumber, FileId, Kind, Node};
use crate::os;
use crate::stack::{self, Part};

/// Devices stacked on one another at most.
const DEEPEST: u32 = 32;

/// Bytes in the kernel's unit of 512.
const SECTOR: u64 = 512;

/// What bytes lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    Device(DeviceNumber),
    /// A volume of a thin pool, by its number: several devices may show it.
    Thin(DeviceNumber, u64),
    File(FileId),
}

/// Some bytes of a medium.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stretch {
    medium: Medium,
    start: u64,
    end: u64,
    /// The device that has these bytes, or some of them, to share out: what else it gives away are others.
    shared_out_by: Option<DeviceNumber>,
    label: String,
}

/// The bytes that a device or file is, at every level below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents(Vec<Stretch>);

impl Extents {
    /// Those of a block device.
    ///
    /// # Errors
    /// If the kernel does not say what it is built of, or this user may not ask.
    pub fn of_device(number: DeviceNumber) -> Result<Self> {
        let mut extents = Self::default();
        extents.add_device(number, 0, u64::MAX, None, 0)?;
        Ok(extents)
    }

    /// Those of a regular file; by its path the layers are found, if it is a file of an overlay.
    ///
    /// # Errors
    /// If its mount cannot be found.
    pub fn of_file(file: FileId, path: &Path) -> Result<Self> {
        let mut extents = Self::default();
        extents.add_file(file, path, 0, u64::MAX)?;
        Ok(extents)
    }

    /// Those of something open; a pipe, a terminal or a character device has none.
    ///
    /// # Errors
    /// As [`of_device`](Self::of_device) and [`of_file`](Self::of_file).
    pub fn of_open(file: impl AsFd) -> Result<Self> {
        let file = file.as_fd();
        let name = format!("file descriptor {}", file.as_raw_fd());
        let file = file.try_clone_to_owned().context("cannot look at", &name)?;
        let file = File::from(file);
        let path = os::located::path_of(&file).unwrap_or_else(|_| name.into());
        let node = Node::of_file(&file, &path)?;
        Self::of_node(&node)
    }

    /// Those of what a path led to.
    ///
    /// # Errors
    /// As [`of_open`](Self::of_open).
    pub fn of_node(node: &Node) -> Result<Self> {
        match node.kind {
            Kind::Block(number) => Self::of_device(number),
            Kind::Regular => Self::of_file(node.id, &node.path),
            _ => Ok(Self::default()),
        }
    }

    /// Takes those of another, too.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// What bytes both have in common lie on, in words; `None` if they have none.
    pub fn common(&self, other: &Self) -> Option<&str> {
        let pairs = self
            .0
            .iter()
            .flat_map(|one| other.0.iter().map(move |other| (one, other)));
        pairs
            .filter(|(one, other)| {
                let is_told_apart_above =
                    one.shared_out_by.is_some() && one.shared_out_by == other.shared_out_by;
                one.medium == other.medium
                    && one.start.max(other.start) < one.end.min(other.end)
                    && !is_told_apart_above
            })
            .map(|(one, _)| one.label.as_str())
            .next()
    }

    /// Adds the bytes from `start` to `end` of a device, and what they are below it.
    fn add_device(
        &mut self,
        number: DeviceNumber,
        start: u64,
        end: u64,
        shared_out_by: Option<DeviceNumber>,
        depth: u32,
    ) -> Result<()> {
        let device = match BlockDevice::of(number) {
            Ok(device) => Some(device),
            // A number that sysfs does not know has nothing below it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let stretch = Stretch {
            medium: Medium::Device(number),
            start,
            end,
            shared_out_by,
            label: device.as_ref().map_or_else(
                || format!("device {number}"),
                |device| device.path().display().to_string(),
            ),
        };
        if self.0.contains(&stretch) {
            return Ok(());
        }
        self.0.push(stretch);
        let Some(device) = device else { return Ok(()) };
        if depth >= DEEPEST {
            let why = "too many devices are built on one another";
            return Err(Error::other("cannot follow", device.path(), why));
        }
        let depth = depth + 1;
        let end = end.min(device.sectors.saturating_mul(SECTOR));
        if !device.is_whole_disk() {
            return match device.partition {
                Some(place) => {
                    let at = place.start.saturating_mul(SECTOR);
                    self.add_device(device.disk, at + start, at + end, shared_out_by, depth)
                }
                None => self.add_device(device.disk, 0, u64::MAX, Some(device.disk), depth),
            };
        }
        if let Some(backing) = device.loop_backing()? {
            let (start, end) = (backing.offset + start, backing.offset + end);
            return match backing.device {
                Some(lower) => self.add_device(lower, start, end, shared_out_by, depth),
                None => self.add_file(backing.file, &backing.path, start, end),
            };
        }
        if let Some((pool, id)) = thin_volume(&device) {
            self.0.push(Stretch {
                medium: Medium::Thin(pool, id),
                start,
                end,
                shared_out_by: None,
                label: device.path().display().to_string(),
            });
            return self.add_device(pool, 0, u64::MAX, Some(pool), depth);
        }
        match stack::parts_of(number) {
            Some(parts) => {
                for part in parts {
                    let Part {
                        start: at,
                        len,
                        lower,
                        lower_start,
                        is_exact,
                    } = part;
                    if !is_exact {
                        let owner = shared_out_by.or(Some(number));
                        let below = lower_start..lower_start + len;
                        self.add_device(lower, below.start, below.end, owner, depth)?;
                        continue;
                    }
                    let (from, to) = (start.max(at), end.min(at + len));
                    if from < to {
                        let below = |offset: u64| lower_start + (offset - at);
                        self.add_device(lower, below(from), below(to), shared_out_by, depth)?;
                    }
                }
            }
            None => {
                let owner = shared_out_by.or(Some(number));
                for lower in device.lower_devices()? {
                    self.add_device(lower, 0, u64::MAX, owner, depth)?;
                }
            }
        }
        Ok(())
    }

    fn add_file(&mut self, file: FileId, path: &Path, start: u64, end: u64) -> Result<()> {
        for file in std::iter::once(file).chain(layers(file, path)) {
            self.0.push(Stretch {
                medium: Medium::File(file),
                start,
                end,
                shared_out_by: None,
                label: path.display().to_string(),
            });
        }
        Ok(())
    }
}

/// The thin pool of a volume, and its number there.
fn thin_volume(device: &BlockDevice) -> Option<(DeviceNumber, u64)> {
    if !dm::is_mapped(device) {
        return None;
    }
    let table = dm::table(device.number).ok()?;
    let [target] = table.targets.as_slice() else {
        return None;
    };
    let mut words = target.params.split_whitespace();
    match (target.kind.as_str(), words.next(), words.next()) {
        ("thin", Some(pool), Some(id)) => Some((pool.parse().ok()?, id.parse().ok()?)),
        _ => None,
    }
}

/// The files of an overlay's layers that a file of it can be: of the upper one, or of any below.
fn layers(file: FileId, path: &Path) -> Vec<FileId> {
    let is_it = |path: &Path| Node::of(path).is_ok_and(|node| node.id == file);
    // A loop device tells the name that its file had when it was attached.
    let Some(place) = Place::of(path).ok().filter(|_| is_it(path)) else {
        return Vec::new();
    };
    let Place { mount, path, .. } = place;
    if mount.fs_type != "overlay" {
        return Vec::new();
    }
    let Ok(below) = path.strip_prefix(&mount.point) else {
        return Vec::new();
    };
    let below = mount.root.join(below);
    let below = below.strip_prefix("/").unwrap_or(&below);
    let layers = overlay_layers(&mount.super_options);
    let found = layers
        .iter()
        .filter_map(|layer| Node::of(&layer.join(below)).ok());
    found
        .filter(|node| node.kind == Kind::Regular)
        .map(|node| node.id)
        .collect()
}

/// The folders of an overlay's layers, as its options name them: escaped where they hold `:` or `,`.
fn overlay_layers(options: &str) -> Vec<PathBuf> {
    let mut layers = Vec::new();
    for option in split_unescaped(options.as_bytes(), b',') {
        let Some(at) = option.iter().position(|&byte| byte == b'=') else {
            continue;
        };
        let (name, value) = (&option[..at], &option[at + 1..]);
        match name {
            b"upperdir" => layers.push(vec![value.to_vec()]),
            b"lowerdir" | b"lowerdir+" | b"datadir+" => layers.push(split_unescaped(value, b':')),
            _ => {}
        }
    }
    let plain = |name: Vec<u8>| {
        let mut plain = Vec::with_capacity(name.len());
        let mut bytes = name.into_iter();
        while let Some(byte) = bytes.next() {
            plain.push(if byte == b'\\' {
                bytes.next().unwrap_or(byte)
            } else {
                byte
            });
        }
        PathBuf::from(std::ffi::OsString::from_vec(plain))
    };
    let names = layers.into_iter().flatten();
    names.filter(|name| !name.is_empty()).map(plain).collect()
}

/// Cuts at `mark`, except where a backslash is before it.
fn split_unescaped(text: &[u8], mark: u8) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut is_escaped = false;
    for &byte in text {
        if byte == mark && !is_escaped {
            parts.push(Vec::new());
            continue;
        }
        is_escaped = byte == b'\\' && !is_escaped;
        if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, needs_root, run, scratch};

    fn of(path: &Path) -> Extents {
        Extents::of_open(File::open(path).unwrap()).unwrap()
    }

    #[test]
    fn privileged_what_shows_the_same_bytes_has_them_in_common() {
        needs_root!();
        let dir = scratch();
        let [file, twin, other] = ["file", "twin", "other"].map(|name| dir.path().join(name));
        let whole = Loop::sparse(&file, 64 << 20);
        std::fs::hard_link(&file, &twin).unwrap();
        let shifted = Loop::attach(&twin, &["-o", "1048576", "--sizelimit", "1048576"]);
        let before = Loop::attach(&file, &["--sizelimit", "1048576"]);
        let above = Loop::attach(whole.path(), &["-o", "33554432"]);
        let partition = whole.add_partition(1, 2048, 2048);
        let elsewhere = Loop::sparse(&other, 64 << 20);
        let share = |one: &Path, other: &Path| {
            let [a, b] = [of(one), of(other)];
            assert_eq!(a.common(&b).is_some(), b.common(&a).is_some());
            a.common(&b).is_some()
        };
        let [whole, shifted, before, above, elsewhere] =
            [&whole, &shifted, &before, &above, &elsewhere].map(|device| device.path());
        for same in [&file, &twin, whole, shifted, before, above, &partition] {
            assert!(share(same, &file) && share(same, same), "{same:?}");
            assert!(share(same, whole), "{same:?}");
            assert!(!share(same, elsewhere) && !share(same, &other), "{same:?}");
        }
        assert!(share(shifted, &partition));
        assert!(!share(shifted, before) && !share(above, shifted) && !share(&partition, before));
        let pipe = Extents::of_open(std::io::pipe().unwrap().0).unwrap();
        assert_eq!(pipe.common(&pipe), None);
    }

    #[test]
    fn privileged_a_file_of_an_overlay_is_the_file_of_its_layer() {
        needs_root!();
        let dir = scratch();
        let path = |name: &str| dir.path().join(name);
        for folder in ["lower", "up:per", "work", "merged"] {
            std::fs::create_dir(path(folder)).unwrap();
        }
        std::fs::write(path("lower/file"), "x").unwrap();
        std::fs::write(path("up:per/new"), "x").unwrap();
        let options = format!(
            "lowerdir={0}/lower,upperdir={0}/up:per,workdir={0}/work",
            dir.path().display()
        );
        let merged = path("merged");
        run(
            "mount",
            [
                "-t",
                "overlay",
                "-o",
                &options,
                "x",
                merged.to_str().unwrap(),
            ],
        );
        let shared = [("merged/file", "lower/file"), ("merged/new", "up:per/new")]
            .map(|(one, other)| of(&path(one)).common(&of(&path(other))).is_some());
        let others = of(&path("merged/file"))
            .common(&of(&path("up:per/new")))
            .is_some();
        run("umount", [&merged]);
        assert_eq!((shared, others), ([true, true], false));
    }

    #[test]
    fn names_of_layers_are_unescaped() {
        let options = r"rw,lowerdir=/a\:b:/c\,d,upperdir=/up:per,workdir=/w,lowerdir+=/e";
        let expected = ["/a:b", "/c,d", "/up:per", "/e"].map(PathBuf::from);
        assert_eq!(overlay_layers(options), expected);
    }

    /// Bytes of a device that shares out a pool, by hand: no such device is needed.
    #[test]
    fn what_one_device_shares_out_is_told_apart_by_that_device() {
        let number = |minor| DeviceNumber { major: 253, minor };
        let stretch = |medium, owner| Stretch {
            medium,
            start: 0,
            end: u64::MAX,
            shared_out_by: owner,
            label: String::new(),
        };
        let volume = |id| {
            let pool = number(9);
            Extents(vec![
                stretch(Medium::Thin(pool, id), None),
                stretch(Medium::Device(number(1)), Some(pool)),
            ])
        };
        let disk = Extents(vec![stretch(Medium::Device(number(1)), None)]);
        assert!(volume(1).common(&volume(2)).is_none());
        assert!(volume(1).common(&volume(1)).is_some());
        assert!(volume(1).common(&disk).is_some());
    }
}
