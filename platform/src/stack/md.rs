//! What md's folder in sysfs says of an array (Documentation/admin-guide/md.rst). Only a whole mirror
//! that nothing else writes to is understood.

use std::path::{Path, PathBuf};

use super::Piece;
use crate::node::DeviceNumber;

/// Most members of a mirror.
const MOST_MEMBERS: usize = 128;

/// What must be so, by file: any of the values.
const EXPECTED: [(&str, &[&str]); 6] = [
    ("level", &["raid1"]),
    ("degraded", &["0"]),
    ("sync_action", &["idle"]),
    ("reshape_position", &["none"]),
    // Not with a journal.
    ("consistency_policy", &["resync", "bitmap"]),
    (
        "array_state",
        &[
            "clean",
            "active",
            "active-idle",
            "write-pending",
            "read-auto",
        ],
    ),
];

/// The members of the mirror whose folder `md` is `dir`, and what must not change about it.
/// `sectors` is how long the array is.
///
/// # Errors
/// What of it is in the way.
pub(super) fn read(dir: &Path, sectors: u64) -> Result<(Vec<Piece>, String), String> {
    for (file, values) in EXPECTED {
        let value = text(&dir.join(file))?;
        if !values.contains(&value.as_str()) {
            return Err(match file {
                "level" => format!("writes cannot be followed through md's {value}"),
                _ => format!("its {file} is `{value}`"),
            });
        }
    }
    if text(&dir.join("metadata_version"))?.starts_with("external") {
        return Err("its metadata are written by a program (external)".to_owned());
    }
    if text(&dir.join("consistency_policy"))? == "bitmap" {
        let kind = text(&dir.join("bitmap/metadata"))?;
        if kind != "internal" {
            return Err(format!("its bitmap is `{kind}`"));
        }
    }
    let mut members = Vec::new();
    for folder in member_folders(dir)? {
        members.push(Member::read(&folder, sectors)?);
        if members.len() > MOST_MEMBERS {
            return Err("it has too many members".to_owned());
        }
    }
    members.sort_by_key(|member| member.slot);
    let disks: u64 = number(&dir.join("raid_disks"))?;
    let slots = members.iter().map(|member| member.slot);
    if disks < 2 || !slots.eq(0..disks) {
        return Err(format!("it has {} of {disks} members", members.len()));
    }
    let facts: Vec<String> = members.iter().map(Member::facts).collect();
    let pieces = members.into_iter().map(|member| Piece {
        start: 0,
        sectors,
        lower: member.device,
        lower_start: member.offset,
        stripe: None,
    });
    Ok((pieces.collect(), format!("raid1 {}", facts.join(", "))))
}

struct Member {
    device: DeviceNumber,
    slot: u64,
    /// Where the data begin on it, in sectors.
    offset: u64,
}

impl Member {
    fn read(dir: &Path, sectors: u64) -> Result<Self, String> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let name = name.trim_start_matches("dev-");
        let state = text(&dir.join("state"))?;
        let mut flags = state.split(',');
        // Flags that say nothing else than that it is in use: what it would be refused for comes by
        // name (`faulty`, `spare`, `write_mostly`, `write_error`).
        if !flags.clone().any(|flag| flag == "in_sync")
            || !flags.all(|flag| matches!(flag, "in_sync" | "failfast"))
        {
            return Err(format!("its member {name} is `{state}`"));
        }
        let bad = text(&dir.join("bad_blocks"))?;
        if !bad.is_empty() {
            return Err(format!("its member {name} has bad blocks"));
        }
        let offset = number(&dir.join("offset"))?;
        if number(&dir.join("new_offset"))? != offset {
            return Err(format!("the data of its member {name} are being moved"));
        }
        // In KiB.
        if number(&dir.join("size"))?.saturating_mul(2) < sectors {
            return Err(format!("its member {name} is too small"));
        }
        let device = text(&dir.join("block/dev"))?;
        Ok(Self {
            device: device
                .parse()
                .map_err(|_| format!("its member {name} has no device number"))?,
            slot: number(&dir.join("slot"))?,
            offset,
        })
    }

    fn facts(&self) -> String {
        format!("{}: {} {}", self.slot, self.device, self.offset)
    }
}

fn member_folders(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let fail = |error| format!("its members cannot be listed: {error}");
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_name().to_string_lossy().starts_with("dev-") {
            folders.push(entry.path());
        }
    }
    folders.sort();
    Ok(folders)
}

fn number(path: &Path) -> Result<u64, String> {
    let text = text(path)?;
    let value = text.parse();
    value.map_err(|_| format!("its {} is `{text}`", short(path)))
}

fn text(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path);
    text.map(|text| text.trim().to_owned())
        .map_err(|error| format!("its {} cannot be read: {error}", short(path)))
}

/// A file by its name in its folder.
fn short(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::scratch;

    /// Files as Linux 6.1 shows them of `mdadm --create -l1 -n2`.
    const ARRAY: [(&str, &str); 22] = [
        ("level", "raid1\n"),
        ("degraded", "0\n"),
        ("sync_action", "idle\n"),
        ("reshape_position", "none\n"),
        ("consistency_policy", "bitmap\n"),
        ("array_state", "active\n"),
        ("metadata_version", "1.2\n"),
        ("bitmap/metadata", "internal\n"),
        ("raid_disks", "2\n"),
        ("dev-vdb/state", "in_sync\n"),
        ("dev-vdb/slot", "1\n"),
        ("dev-vdb/offset", "2048\n"),
        ("dev-vdb/new_offset", "2048\n"),
        ("dev-vdb/size", "327680\n"),
        ("dev-vdb/bad_blocks", ""),
        ("dev-vdb/block/dev", "254:16\n"),
        ("dev-vdc1/state", "in_sync,failfast\n"),
        ("dev-vdc1/slot", "0\n"),
        ("dev-vdc1/offset", "4096\n"),
        ("dev-vdc1/new_offset", "4096\n"),
        ("dev-vdc1/size", "327680\n"),
        ("dev-vdc1/bad_blocks", ""),
    ];
    const LAST: (&str, &str) = ("dev-vdc1/block/dev", "254:33\n");
    const SECTORS: u64 = 655_360;

    /// The array with some files changed; an empty name changes nothing, `-` removes the file.
    fn array(changes: &[(&str, &str)]) -> Result<(Vec<Piece>, String), String> {
        let dir = scratch();
        let files = ARRAY.iter().chain([&LAST]).chain(changes);
        for (file, content) in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match *content {
                "-" => std::fs::remove_file(path).unwrap(),
                content => std::fs::write(path, content).unwrap(),
            }
        }
        read(dir.path(), SECTORS)
    }

    #[test]
    fn a_mirror_is_its_members_by_slot() {
        let (pieces, facts) = array(&[]).unwrap();
        let piece = |minor, lower_start| Piece {
            start: 0,
            sectors: SECTORS,
            lower: DeviceNumber { major: 254, minor },
            lower_start,
            stripe: None,
        };
        assert_eq!(pieces, [piece(33, 4096), piece(16, 2048)]);
        assert_eq!(facts, "raid1 0: 254:33 4096, 1: 254:16 2048");
        array(&[("consistency_policy", "resync\n"), ("bitmap/metadata", "-")]).unwrap();
    }

    #[test]
    fn anything_else_is_refused_and_says_why() {
        for (file, content, words) in [
            ("level", "raid5\n", "raid5"),
            ("level", "-", "level cannot be read"),
            ("degraded", "1\n", "degraded"),
            ("sync_action", "resync\n", "resync"),
            ("sync_action", "check\n", "check"),
            ("reshape_position", "4096\n", "reshape_position"),
            ("consistency_policy", "journal\n", "journal"),
            ("consistency_policy", "ppl\n", "ppl"),
            ("array_state", "suspended\n", "suspended"),
            ("metadata_version", "external:/md127/0\n", "external"),
            ("bitmap/metadata", "clustered\n", "clustered"),
            ("raid_disks", "3\n", "2 of 3"),
            ("raid_disks", "x\n", "raid_disks"),
            ("dev-vdb/state", "in_sync,write_mostly\n", "write_mostly"),
            ("dev-vdb/state", "spare\n", "vdb is `spare`"),
            ("dev-vdb/state", "faulty\n", "faulty"),
            ("dev-vdb/state", "\n", "vdb is ``"),
            ("dev-vdb/state", "in_sync,replacement\n", "replacement"),
            ("dev-vdb/slot", "0\n", "2 of 2"),
            ("dev-vdb/slot", "none\n", "slot"),
            ("dev-vdb/offset", "-5\n", "offset"),
            ("dev-vdb/new_offset", "0\n", "moved"),
            ("dev-vdb/size", "327679\n", "too small"),
            ("dev-vdb/bad_blocks", "1234 8\n", "bad blocks"),
            ("dev-vdb/block/dev", "vdb\n", "device number"),
            ("dev-vdd/state", "spare\n", "vdd"),
        ] {
            let why = array(&[(file, content)]).unwrap_err();
            assert!(why.contains(words), "{file} {content}: {why}");
        }
    }
}
