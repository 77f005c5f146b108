//! `apfs`, with tools that pretend to be those of macOS: what is refused, what is made in which order, and
//! that nothing of it is left, however it ends.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use holdstill::error::{Error, Kind, Result};
use holdstill::freeze::apfs::{self, Volume, raw};
use holdstill::freeze::session::{Hooks, RunRecord, Session, Watched};
use holdstill::freeze::step;
use holdstill::freeze::{Context, CowRoom, Next, Proof};
use holdstill::image::manifest::Grade;
use holdstill::pipeline::read::OnReadError;
use holdstill::progress::{Event, Progress, Silent, Stop};
use holdstill::verbs::cleanup;
use holdstill_platform::apple::System;
use holdstill_platform::lock;
use holdstill_platform::records::Records;

use crate::common::{self, Rng, count, needs_root, run, seed, sparse_file, temp_dir};

/// The tools that are called.
const TOOLS: [&str; 11] = [
    "asr",
    "csrutil",
    "diskutil",
    "hdiutil",
    "mount",
    "mount_apfs",
    "sw_vers",
    "sysctl",
    "system_profiler",
    "tmutil",
    "umount",
];

/// The volume of the scene, and where its container lies.
const DATA: &str = "disk3s5";

/// Snapshots that are there before, and that nobody may touch.
const OTHERS: [(&str, &str, &str); 2] = [
    (
        DATA,
        "com.apple.TimeMachine.2026-01-02-030405.local",
        "11111111-2222-4333-8444-555555555555",
    ),
    (
        "disk3s7",
        "com.bombich.ccc.1",
        "66666666-7777-4888-8999-AAAAAAAAAAAA",
    ),
];

/// A Mac that is none, in a folder.
struct Mac {
    dir: PathBuf,
    system: System,
    _removed: Option<tempfile::TempDir>,
}

impl Mac {
    fn new() -> Self {
        let dir = temp_dir();
        let mac = Self {
            _removed: None,
            ..Self::at(dir.path())
        };
        for folder in ["tools", "dev", "state/info", "scratch"] {
            fs::create_dir_all(mac.dir.join(folder)).unwrap();
        }
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apfs_snapshot/tool");
        for name in TOOLS {
            symlink(&tool, mac.dir.join("tools").join(name)).unwrap();
        }
        mac.state("version", "14.5\n");
        mac.state("arm64", "1\n");
        mac.state("bridge", "<plist><array/></plist>");
        mac.state(
            "protection",
            "System Integrity Protection status: enabled.\n",
        );
        mac.state("included", "disk3s5\ndisk3s7\n");
        mac.state("says", "it was told to fail\n");
        mac.state("attach.plist", ATTACHED);
        mac.describe(&[("Roles", "<array><string>Data</string></array>")], &[]);
        for (volume, name, uuid) in OTHERS {
            let folder = mac.dir.join("state/snapshots").join(volume);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(name), format!("{uuid}\n")).unwrap();
        }
        let content = mac.dir.join("state/content");
        sparse_file(&content, 8 << 20);
        run("mkfs.ext4", ["-q", content.to_str().unwrap()]);
        Self {
            _removed: Some(dir),
            ..mac
        }
    }

    fn at(dir: &Path) -> Self {
        Self {
            system: System::pretended(dir.join("tools"), dir.join("dev")),
            dir: dir.to_owned(),
            _removed: None,
        }
    }

    fn state(&self, name: &str, content: &str) {
        fs::write(self.dir.join("state").join(name), content).unwrap();
    }

    /// Describes the volume, with some of it otherwise: in the container, and by itself.
    fn describe(&self, in_container: &[(&str, &str)], by_itself: &[(&str, &str)]) {
        let dict = |default: &[(&str, &str)], otherwise: &[(&str, &str)]| {
            let values = default.iter().map(|(key, value)| {
                let other = otherwise.iter().find(|(other, _)| other == key);
                let value = other.map_or(value, |(_, value)| value);
                format!("<key>{key}</key>{value}\n")
            });
            format!("<dict>{}</dict>", values.collect::<String>())
        };
        let data = dict(&VOLUME, in_container);
        let other = dict(
            &VOLUME,
            &[
                ("DeviceIdentifier", "<string>disk3s7</string>"),
                (
                    "APFSVolumeUUID",
                    "<string>0C6A8C14-1B9A-4C5E-8E7C-94E7E0D1A2B3</string>",
                ),
                ("Name", "<string>More</string>"),
            ],
        );
        let container = dict(&CONTAINER, in_container);
        let container = container.replace("VOLUMES", &format!("{data}{other}"));
        self.state("containers", &container);
        let info = |otherwise| format!("<plist version=\"1.0\">{}</plist>", dict(&INFO, otherwise));
        self.state("info/disk3s5", &info(by_itself));
        let other = [
            ("DeviceIdentifier", "<string>disk3s7</string>"),
            ("APFSVolumeGroupID", "<string/>"),
        ];
        self.state("info/disk3s7", &info(&other));
    }

    fn examine(&self) -> std::result::Result<Volume, String> {
        Volume::examine(&self.system, DATA, Path::new("/System/Volumes/Data")).unwrap()
    }

    /// What speaks against it.
    fn objection(&self) -> String {
        self.examine().unwrap_err()
    }

    fn scratch(&self) -> PathBuf {
        self.dir.join("scratch")
    }

    /// What is called by the guard should the run die.
    fn undo_words(&self, run_id: &str) -> Vec<OsString> {
        let script = self.dir.join("undo");
        let text = format!(
            "#!/bin/sh\nexport {ROLE}='{}\n{run_id}'\nexec {} apfs_snapshot::role_undoes --exact --nocapture\n",
            self.dir.display(),
            std::env::current_exe().unwrap().display()
        );
        fs::write(&script, text).unwrap();
        ["/bin/sh".into(), script.into_os_string()].to_vec()
    }

    /// Copies a snapshot of the volume, reads the copy, and lets go.
    fn copy(&self, run_id: &str, progress: &dyn Progress) -> Result<(Proof, Copy)> {
        let volume = self
            .examine()
            .map_err(|why| Error::new(Kind::NotApplicable, why))?;
        let watched = Watched {
            is_guarded: true,
            undo: vec![apfs::undo_by(DATA, self.undo_words(run_id))],
        };
        let run = Session::begin(run_id, Hooks::default(), &[], watched)?;
        println!("\nguard {}", run.guard()?.pid());
        let cow = CowRoom::default();
        let context = Context {
            run: &run,
            output: None,
            output_path: None,
            cow: &cow,
            no_freeze: false,
            hooks_around_copy: false,
            all_blocks: false,
            compare: false,
            on_read_error: OnReadError::Fail,
            memory: None,
            progress,
        };
        let mut still = apfs::snapshot_of(&self.system, &volume, &self.scratch(), &context)?;
        let [survey] = still.surveys() else {
            panic!("not one volume");
        };
        let mut copy = Copy {
            grade: survey.grade,
            warnings: survey.warnings.clone(),
            size: still.geometry(0).unwrap().size,
            read: Vec::new(),
        };
        while let Next::Pass(pass) = still.next(progress)? {
            (pass.walk)(&mut |run| {
                let mut bytes = vec![0; run.extent.len.0 as usize];
                pass.source.read_exact_at(&mut bytes, run.extent.start)?;
                copy.read.push((run.extent.start.0, bytes));
                Ok(())
            })?;
        }
        Ok((still.finish(progress)?, copy))
    }

    /// What was called that changes something, without its arguments.
    fn changes(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.dir.join("state/calls")).unwrap_or_default();
        let changing = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["diskutil", "apfs", "deleteSnapshot", volume, ..] => {
                    Some(format!("deleteSnapshot {volume}"))
                }
                ["hdiutil", "attach", .., "-readonly", _] => Some("attach -readonly".to_owned()),
                ["hdiutil", what @ ("create" | "attach" | "detach"), ..] => Some(what.to_owned()),
                [what @ ("tmutil" | "mount_apfs" | "asr" | "umount"), ..] => Some(what.to_owned()),
                _ => None,
            }
        };
        calls.lines().filter_map(changing).collect()
    }

    /// Nothing is there that was not before.
    #[track_caller]
    fn assert_nothing_left(&self, what: &str) {
        for left in ["mounted", "attached"] {
            let left = self.dir.join("state").join(left);
            assert!(
                !left.exists(),
                "{what}: {}: {:?}",
                left.display(),
                self.changes()
            );
        }
        let folder = fs::read_dir(self.scratch()).unwrap().count();
        assert_eq!(folder, 0, "{what}: {:?}", self.changes());
        self.assert_only_others(what, &[]);
    }

    /// Only these snapshots are there.
    #[track_caller]
    fn assert_only_others(&self, what: &str, more: &[&str]) {
        let mut there = BTreeSet::new();
        for volume in [DATA, "disk3s7"] {
            for entry in fs::read_dir(self.dir.join("state/snapshots").join(volume)).unwrap() {
                there.insert(entry.unwrap().file_name().into_string().unwrap());
            }
        }
        let others = OTHERS
            .iter()
            .map(|(_, name, _)| *name)
            .chain(more.iter().copied());
        let others: BTreeSet<String> = others.map(str::to_owned).collect();
        assert_eq!(there, others, "{what}: {:?}", self.changes());
    }
}

/// What was read.
struct Copy {
    grade: Grade,
    warnings: Vec<String>,
    size: u64,
    read: Vec<(u64, Vec<u8>)>,
}

const VOLUME: [(&str, &str); 8] = [
    ("DeviceIdentifier", "<string>disk3s5</string>"),
    (
        "APFSVolumeUUID",
        "<string>57A6F1C2-3B60-4D4E-9A7B-0B8E64B0E0D5</string>",
    ),
    ("Name", "<string>Data</string>"),
    ("CapacityInUse", "<integer>1000000</integer>"),
    ("Roles", "<array/>"),
    ("Encryption", "<true/>"),
    ("Locked", "<false/>"),
    ("CryptoMigrationOn", "<false/>"),
];

const CONTAINER: [(&str, &str); 6] = [
    ("ContainerReference", "<string>disk3</string>"),
    ("Fusion", "<false/>"),
    ("CapacityCeiling", "<integer>8000000</integer>"),
    ("CapacityFree", "<integer>4000000</integer>"),
    (
        "PhysicalStores",
        "<array><dict><key>DeviceIdentifier</key><string>disk0s2</string><key>Size</key>
         <integer>8000000</integer></dict></array>",
    ),
    ("Volumes", "<array>VOLUMES</array>"),
];

const INFO: [(&str, &str); 12] = [
    ("DeviceIdentifier", "<string>disk3s5</string>"),
    ("ParentWholeDisk", "<string>disk3</string>"),
    (
        "Content",
        "<string>41504653-0000-11AA-AA11-00306543ECAC</string>",
    ),
    ("Internal", "<true/>"),
    ("Size", "<integer>8000000</integer>"),
    ("FilesystemType", "<string>apfs</string>"),
    ("MountPoint", "<string>/System/Volumes/Data</string>"),
    ("APFSContainerReference", "<string>disk3</string>"),
    ("APFSSnapshot", "<false/>"),
    (
        "APFSSnapshotUUID",
        "<string>2E91BB9B-3C0F-4A0B-8A59-64A0B3A8A5E7</string>",
    ),
    ("Sealed", "<string>No</string>"),
    ("APFSVolumeGroupID", "<string/>"),
];

const ATTACHED: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0"><dict>
<key>system-entities</key>
<array>
<dict><key>content-hint</key><string>GUID_partition_scheme</string>
<key>dev-entry</key><string>/dev/disk4</string></dict>
<dict><key>content-hint</key><string>Apple_APFS</string>
<key>dev-entry</key><string>/dev/disk4s1</string></dict>
<dict><key>content-hint</key><string>EF57347C-0000-11AA-AA11-00306543ECAC</string>
<key>dev-entry</key><string>/dev/disk5</string></dict>
</array>
</dict></plist>
"#;

/// The id of a run that no other has.
fn run_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("apfs{}x{count}", std::process::id())
}

/// What is on record of a run, if anything is.
fn record(run_id: &str) -> Option<RunRecord> {
    let found = Records::default().list().unwrap();
    let found = found.into_iter().find(|found| found.id == run_id)?;
    Some(serde_json::from_slice(&found.content).unwrap())
}

#[test]
fn only_a_mac_has_it() {
    let source = temp_dir();
    let file = source.path().join("file");
    fs::write(&file, vec![1; 4096]).unwrap();
    let args = [
        "backup",
        file.to_str().unwrap(),
        "-o",
        "-",
        "--freeze",
        "apfs",
    ];
    let refused = common::holdstill::run(args).expect(3);
    let said = refused.stderr;
    assert!(said.contains("this system is not macOS"), "{said}");
    assert!(!step::APFS.has_to_freeze() && step::APFS.needs_guard());
    // Nothing it would read raw is in the way elsewhere.
    let named = holdstill::source::Source::resolve(file.to_str().unwrap()).unwrap();
    assert_eq!(raw::objection(&named).unwrap(), None);
    common::holdstill::run(["cleanup", "--run", "no-such-run"]).expect(1);
}

/// What the guard calls takes nothing from a run that lives.
#[test]
fn privileged_a_live_run_keeps_what_it_has() {
    needs_root!();
    let id = run_id();
    let watched = Watched {
        is_guarded: true,
        ..Watched::default()
    };
    let run = Session::begin(&id, Hooks::default(), &[], watched).unwrap();
    let refused = common::holdstill::run(["cleanup", "--run", &id]).expect(3);
    assert!(
        refused.stderr.contains("this run lives"),
        "{}",
        refused.stderr
    );
    drop(run);
    let mut ended = Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    let dead = RunRecord {
        pid: ended.id(),
        ..RunRecord::default()
    };
    let content = serde_json::to_vec(&dead).unwrap();
    let record = Records::default().create(&id, &content).unwrap();
    common::holdstill::run(["cleanup", "--run", &id]).expect(0);
    record.remove().unwrap();
}

#[test]
fn what_cannot_be_copied_is_refused_with_a_way_out() {
    let mac = Mac::new();
    let volume = mac.examine().unwrap();
    assert_eq!((volume.used, volume.size), (1_000_000, 8_000_000));
    assert!(volume.is_encrypted && volume.group.is_empty());
    assert!(volume.image_sectors() * 512 >= volume.size);

    let somebody = mac.system.clone().without_root();
    let refused = Volume::examine(&somebody, DATA, Path::new("/")).unwrap();
    assert!(refused.unwrap_err().contains("sudo"));
    mac.state("version", "10.15.7\n");
    assert!(mac.objection().contains("10.15 is too old"));
    mac.state("version", "26.1\n");
    let (yes, no) = ("<true/>", "<string>hfs</string>");
    for (in_container, by_itself, why) in [
        (("-", ""), ("FilesystemType", no), "no APFS"),
        (
            ("-", ""),
            ("Sealed", "<string>Yes</string>"),
            "sealed System volume",
        ),
        (
            ("-", ""),
            ("APFSSnapshot", yes),
            "a snapshot that is mounted",
        ),
        (("Fusion", yes), ("-", ""), "Fusion"),
        (("Locked", yes), ("-", ""), "unlockVolume"),
        (
            ("CryptoMigrationOn", yes),
            ("-", ""),
            "wait until that is done",
        ),
        (
            ("Roles", "<array><string>VM</string></array>"),
            ("-", ""),
            "the system's own VM volume",
        ),
        (
            ("Roles", "<array><string>System</string></array>"),
            ("-", ""),
            "name the Data volume",
        ),
        (
            ("DeviceIdentifier", "<string>disk3s6</string>"),
            ("-", ""),
            "no container",
        ),
    ] {
        mac.describe(&[in_container], &[by_itself]);
        let said = mac.objection();
        assert!(said.contains(why), "{said}");
    }
    mac.describe(&[("Fusion", "<string>perhaps</string>")], &[]);
    assert!(Volume::examine(&mac.system, DATA, Path::new("/")).is_err());
    assert!(mac.changes().is_empty());
}

#[test]
fn a_volume_is_described_without_reading_it() {
    let mac = Mac::new();
    let described = apfs::describe(&mac.system, DATA).unwrap().unwrap();
    assert_eq!(described.name.as_deref(), Some("Data"));
    assert_eq!((described.size, described.used), (8_000_000, 1_000_000));
    assert_eq!(apfs::describe(&mac.system, "disk0s2").unwrap(), None);
}

#[test]
fn a_group_is_counted_as_a_whole() {
    let mac = Mac::new();
    let group = (
        "APFSVolumeGroupID",
        "<string>0B8A5A43-6F0E-4C57-9E0D-2B1A7B2A7F11</string>",
    );
    mac.describe(&[], &[group]);
    assert_eq!(mac.examine().unwrap().used, 1_000_000);
    let info = fs::read_to_string(mac.dir.join("state/info/disk3s5")).unwrap();
    mac.state("info/disk3s7", &info.replace("disk3s5", "disk3s7"));
    let volume = mac.examine().unwrap();
    assert_eq!(
        (volume.used, volume.group),
        (2_000_000, vec!["More".to_owned()])
    );
}

#[test]
fn raw_copies_that_nobody_could_read_are_refused() {
    let mac = Mac::new();
    let denied = || {
        let source = std::io::ErrorKind::PermissionDenied;
        Err(holdstill_platform::error::Error::new(
            "cannot open",
            "/dev/disk0s2",
            source,
        ))
    };
    let said = |opened: holdstill_platform::error::Result<()>| {
        raw::objection_to(&mac.system, "disk0s2", opened).unwrap()
    };
    let volume = raw::objection_to(&mac.system, DATA, Ok(()))
        .unwrap()
        .unwrap();
    assert!(volume.contains("no blocks of its own"));
    let info = fs::read_to_string(mac.dir.join("state/info/disk3s5")).unwrap();
    let partition = |is_internal: bool| {
        let info = info
            .replace("disk3s5", "disk0s2")
            .replace("<string>apfs<", "<string><");
        let info = info.replace(
            "<key>APFSContainerReference</key><string>disk3<",
            "<key>x</key><string><",
        );
        mac.state(
            "info/disk0s2",
            &match is_internal {
                true => info,
                false => info.replace("<key>Internal</key><true/>", "<key>Internal</key><false/>"),
            },
        );
    };
    partition(true);
    assert!(said(Ok(())).unwrap().contains("never leave its hardware"));
    partition(false);
    let mounted = said(Ok(())).unwrap();
    assert!(mounted.contains("disk3s5 of the APFS container on it is mounted at"));
    for volume in ["disk3s5", "disk3s7"] {
        let path = format!("info/{volume}");
        let info = fs::read_to_string(mac.dir.join("state").join(&path)).unwrap();
        mac.state(&path, &info.replace("/System/Volumes/Data", ""));
    }
    assert_eq!(said(Ok(())), None);
    // In it, but not a part of it: a card, an image.
    for of_others in [
        "<key>RemovableMedia</key><true/>",
        "<key>BusProtocol</key><string>Disk Image</string>",
    ] {
        partition(true);
        let info = fs::read_to_string(mac.dir.join("state/info/disk0s2")).unwrap();
        mac.state(
            "info/disk0s2",
            &info.replace("<dict>", &format!("<dict>{of_others}")),
        );
        assert_eq!(said(Ok(())), None, "{of_others}");
    }
    // An Intel Mac, with a T2 and without.
    partition(true);
    mac.state("arm64", "0\n");
    mac.state(
        "bridge",
        "<plist><array><dict><key>_items</key><array><dict><key>ibridge_model_name</key>
         <string>Apple T2 Security Chip</string></dict></array></dict></array></plist>",
    );
    assert!(said(Ok(())).unwrap().contains("never leave its hardware"));
    mac.state("bridge", "<plist><array/></plist>");
    assert_eq!(said(Ok(())), None);
    assert!(
        said(denied())
            .unwrap()
            .contains("System Integrity Protection")
    );
    mac.state(
        "protection",
        "System Integrity Protection status: disabled.\n",
    );
    assert_eq!(said(denied()), None);
}

#[test]
fn privileged_a_snapshot_is_copied_and_read_and_nothing_is_left() {
    needs_root!();
    let mac = Mac::new();
    let id = run_id();
    let begun = jiff::Timestamp::now();
    let (proof, copy) = mac.copy(&id, &Silent).unwrap();
    assert_eq!((proof.grade, copy.grade), (Grade::Frozen, Grade::Frozen));
    assert!(proof.freezes.is_empty() && proof.instant >= begun);
    assert_eq!(copy.size, 8 << 20);
    let content = fs::read(mac.dir.join("state/content")).unwrap();
    assert!(!copy.read.is_empty());
    for (start, bytes) in &copy.read {
        let start = *start as usize;
        assert!(
            content[start..start + bytes.len()] == bytes[..],
            "at {start}"
        );
    }
    let warned = copy.warnings.join("\n");
    assert!(warned.contains("before the instant given"), "{warned}");
    assert!(
        warned.contains("encrypted, and its copy is not"),
        "{warned}"
    );
    assert_eq!(
        mac.changes(),
        [
            "tmutil",
            "mount_apfs",
            "create",
            "attach",
            "asr",
            // It is held as long as it is copied, and no longer.
            "umount",
            "deleteSnapshot disk3s5",
            // Made by the same call.
            "deleteSnapshot disk3s7",
            "detach",
            // Nobody can write to what is read.
            "attach -readonly",
            "detach",
        ]
    );
    mac.assert_nothing_left("after it was copied");
    assert_eq!(record(&id), None);
}

#[test]
fn privileged_without_room_nothing_is_begun() {
    needs_root!();
    let mac = Mac::new();
    mac.describe(
        &[("CapacityInUse", "<integer>900000000000000</integer>")],
        &[],
    );
    let error = mac.copy(&run_id(), &Silent).err().unwrap();
    assert_eq!(error.kind(), Kind::NotApplicable);
    assert!(
        error.to_string().contains("900000000000000")
            || error.to_string().contains("956250000000000"),
        "{error}"
    );
    assert!(mac.changes().is_empty());
    mac.assert_nothing_left("without room");
}

/// Whatever fails, what was made before is undone in reverse.
#[test]
fn privileged_a_tool_that_fails_leaves_nothing() {
    needs_root!();
    let released = "umount, deleteSnapshot disk3s5, deleteSnapshot disk3s7";
    for (fail, made, undone) in [
        ("tmutil 1", "tmutil", ""),
        (
            "mount_apfs 1",
            "tmutil, mount_apfs",
            "deleteSnapshot disk3s5, deleteSnapshot disk3s7",
        ),
        ("create 1", "tmutil, mount_apfs, create", released),
        ("attach 1", "tmutil, mount_apfs, create, attach", released),
        (
            "asr 1",
            "tmutil, mount_apfs, create, attach, asr",
            "detach, umount, deleteSnapshot disk3s5, deleteSnapshot disk3s7",
        ),
        (
            "attach 2",
            "tmutil, mount_apfs, create, attach, asr, umount, deleteSnapshot disk3s5, \
             deleteSnapshot disk3s7, detach, attach -readonly",
            "",
        ),
    ] {
        for when in ["before", "after"] {
            let mac = Mac::new();
            mac.state("fail", &format!("{fail} {when}\n"));
            let id = run_id();
            let error = mac.copy(&id, &Silent).err();
            let error = error.unwrap_or_else(|| panic!("{fail} {when}"));
            assert_eq!(error.kind().exit_code(), 1, "{fail} {when}: {error}");
            // One that failed after its work has left something more to undo.
            if when == "before" {
                let calls: Vec<_> = [made, undone]
                    .into_iter()
                    .filter(|one| !one.is_empty())
                    .collect();
                assert_eq!(mac.changes().join(", "), calls.join(", "), "{fail}");
                assert!(
                    error.to_string().contains("it was told to fail"),
                    "{fail}: {error}"
                );
            }
            mac.assert_nothing_left(&format!("{fail} {when}"));
            assert_eq!(record(&id), None, "{fail} {when}");
        }
    }
}

#[test]
fn privileged_a_copy_of_something_else_is_never_used() {
    needs_root!();
    for (what, why) in [
        ("purge", "gave the snapshot up"),
        ("unmount", "gave the snapshot up"),
        ("copies_the_live_volume", "no copy of the snapshot"),
    ] {
        let mac = Mac::new();
        mac.state(what, "");
        let error = mac.copy(&run_id(), &Silent).err().unwrap();
        assert_eq!(error.kind(), Kind::Inconsistent, "{what}: {error}");
        assert!(error.to_string().contains(why), "{what}: {error}");
        // All of Time Machine's were purged.
        if what == "purge" {
            let others = mac.dir.join("state/snapshots").join(DATA).join(OTHERS[0].1);
            fs::write(others, "").unwrap();
        }
        mac.assert_nothing_left(what);
    }
}

#[test]
fn privileged_what_macos_forbids_is_explained() {
    needs_root!();
    let mac = Mac::new();
    mac.state("fail", "mount_apfs 1 before\n");
    mac.state(
        "says",
        "mount_apfs: snapshot could not be mounted: Operation not permitted\n",
    );
    let error = mac.copy(&run_id(), &Silent).err().unwrap();
    assert_eq!(error.kind(), Kind::Permission);
    assert!(error.get_hint().unwrap().contains("Full Disk Access"));
    mac.assert_nothing_left("forbidden");

    let mac = Mac::new();
    mac.state("included", "disk3s7\n");
    let error = mac.copy(&run_id(), &Silent).err().unwrap();
    assert_eq!(error.kind(), Kind::NotApplicable);
    assert!(error.get_hint().unwrap().contains("exclusions"));
    mac.assert_nothing_left("excluded");
}

/// An image that stays busy is detached by force at last, but not if it is still needed: what was not
/// written to it yet would be lost.
#[test]
fn privileged_a_busy_image_is_detached_all_the_same_and_not_used() {
    needs_root!();
    let mac = Mac::new();
    mac.state("busy", "");
    let error = mac.copy(&run_id(), &Silent).err().unwrap();
    assert_eq!(error.kind(), Kind::Tool);
    assert!(error.to_string().contains("Resource busy"), "{error}");
    mac.assert_nothing_left("busy");
    let calls = fs::read_to_string(mac.dir.join("state/calls")).unwrap();
    assert_eq!(calls.matches("hdiutil detach disk4 -force").count(), 1);
    assert!(!calls.contains("-readonly"));
}

/// The snapshot is deleted early, but that it cannot be yet is no reason to give the copy up.
#[test]
fn privileged_a_snapshot_that_is_busy_goes_at_the_end() {
    needs_root!();
    let mac = Mac::new();
    // All tries but the last ones.
    mac.state("busy_snapshot", "5\n");
    mac.copy(&run_id(), &Silent).unwrap();
    mac.assert_nothing_left("busy");
    let changes = mac.changes();
    let deleted = |line: &String| line.starts_with("deleteSnapshot");
    let last_read = changes
        .iter()
        .position(|line| line == "attach -readonly")
        .unwrap();
    assert!(changes[last_read..].iter().any(deleted), "{changes:?}");
}

/// What cannot be taken away stays on record, for `cleanup`.
#[test]
fn privileged_what_stays_is_on_record_until_it_is_gone() {
    needs_root!();
    let mac = Mac::new();
    let id = run_id();
    mac.state("fail", "detach\n");
    mac.copy(&id, &Silent).err().unwrap();
    let left = record(&id).unwrap().apfs;
    assert_eq!(left.len(), 1);
    assert!(mac.dir.join("state/attached").exists());
    // The snapshot is gone though the image is not.
    mac.assert_only_others("while the image stays", &[]);
    fs::remove_file(mac.dir.join("state/fail")).unwrap();
    let mut report = cleanup::Report::default();
    cleanup::undo_apfs(&mac.system, &left, &mut report).unwrap();
    assert!(
        report
            .removed
            .iter()
            .any(|what| what.starts_with("disk4 (")),
        "{report:?}"
    );
    mac.assert_nothing_left("cleaned up");
    Records::default().remove_dead(&id).unwrap();
}

/// Asks to end as soon as asr is at work.
struct Interrupted(PathBuf);

impl Progress for Interrupted {
    fn event(&self, _: &Event<'_>) {}
    fn total(&self, _: holdstill::units::ByteLen) {}
    fn advance(&self, _: holdstill::units::ByteLen) {}
    fn stop(&self) -> Option<Stop> {
        self.0.exists().then_some(Stop::Interrupt)
    }
}

#[test]
fn privileged_an_interrupt_ends_asr() {
    needs_root!();
    let mac = Mac::new();
    mac.state("hang", "asr 1 before\n");
    let progress = Interrupted(mac.dir.join("state/reached"));
    let error = mac.copy(&run_id(), &progress).err().unwrap();
    assert_eq!(error.kind(), Kind::Interrupted);
    mac.assert_nothing_left("interrupted");
}

/// Holds the folder of a Mac and the id of a run, one a line, in a process that plays a part.
const ROLE: &str = "HOLDSTILL_TEST_APFS";

fn role() -> Option<(Mac, String)> {
    let text = std::env::var(ROLE).ok()?;
    let (dir, id) = text.split_once('\n')?;
    Some((Mac::at(Path::new(dir)), id.to_owned()))
}

/// A process that copies.
#[test]
fn role_copies() {
    if let Some((mac, id)) = role() {
        mac.copy(&id, &Silent).unwrap();
    }
}

/// What the guard calls.
#[test]
fn role_undoes() {
    if let Some((mac, id)) = role() {
        let left = record(&id).unwrap().apfs;
        cleanup::undo_apfs(&mac.system, &left, &mut cleanup::Report::default()).unwrap();
    }
}

/// Starts a copy that hangs at one call, and kills it there; with its guard, if `both`. What it left on
/// record.
fn kill_at(mac: &Mac, id: &str, hang: &str, both: bool) -> RunRecord {
    mac.state("hang", hang);
    let mut child = common::spawn(
        Command::new(std::env::current_exe().unwrap())
            .args(["apfs_snapshot::role_copies", "--exact", "--nocapture"])
            .env(ROLE, format!("{}\n{id}", mac.dir.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null()),
    );
    let reached = mac.dir.join("state/reached");
    while !reached.exists() {
        assert!(child.try_wait().unwrap().is_none(), "{hang}: it ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    if both {
        // While it can still do nothing about it.
        common::run("kill", ["-STOP", &child.id().to_string()]);
        let stdout = child.stdout.as_mut().unwrap();
        let guard = guard_of(stdout);
        common::run("kill", ["-KILL", &guard]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    mac.state("go", "");
    // The guard holds the lock until it has done its work.
    while lock::is_held(Path::new(lock::FOLDER), id).unwrap() {
        std::thread::sleep(Duration::from_millis(5));
    }
    record(id).unwrap()
}

/// The number of its guard, which a copying process tells.
fn guard_of(stdout: &mut impl std::io::Read) -> String {
    let mut said = String::new();
    loop {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        said.push(char::from(byte[0]));
        if let Some(line) = said.lines().last().filter(|_| said.ends_with('\n'))
            && let Some(guard) = line.strip_prefix("guard ")
        {
            return guard.to_owned();
        }
    }
}

/// At which call it is killed: while the tool has done nothing yet, and while it has, but not said so.
fn moments() -> Vec<String> {
    let calls = [
        "tmutil 1",
        "mount_apfs 1",
        "create 1",
        "attach 1",
        "asr 1",
        "umount 1",
        "deleteSnapshot 1",
        "detach 1",
        "attach 2",
        "detach 2",
    ];
    let moments = calls
        .into_iter()
        .flat_map(|call| ["before", "after"].map(|when| (call, when)));
    let moments = moments.map(|(call, when)| {
        format!(
            "{call} {when}
"
        )
    });
    let all: Vec<String> = moments.collect();
    let some = Rng(seed())
        .some(&all, count(8, all.len() as u64))
        .into_iter();
    some.cloned().collect()
}

#[test]
fn privileged_the_guard_takes_all_away_after_a_killed_run() {
    needs_root!();
    for moment in moments() {
        let mac = Mac::new();
        let id = run_id();
        kill_at(&mac, &id, &moment, false);
        mac.assert_nothing_left(&moment);
        Records::default().remove_dead(&id).unwrap();
    }
}

#[test]
fn privileged_cleanup_takes_all_away_after_both_were_killed() {
    needs_root!();
    for moment in moments() {
        let mac = Mac::new();
        let id = run_id();
        let left = kill_at(&mac, &id, &moment, true).apfs;
        // Made by Time Machine long after.
        let later = "com.apple.TimeMachine.2099-01-02-030405.local";
        let file = mac.dir.join("state/snapshots").join(DATA).join(later);
        fs::write(&file, "77777777-8888-4999-8AAA-BBBBBBBBBBBB\n").unwrap();
        let mut report = cleanup::Report::default();
        // A tool that has outlived the run may be in the way at first.
        while cleanup::undo_apfs(&mac.system, &left, &mut report).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
        mac.assert_only_others(&moment, &[later]);
        fs::remove_file(file).unwrap();
        mac.assert_nothing_left(&moment);
        // And again: nothing to do.
        let mut again = cleanup::Report::default();
        cleanup::undo_apfs(&mac.system, &left, &mut again).unwrap();
        assert_eq!(again, cleanup::Report::default(), "{moment}");
        Records::default().remove_dead(&id).unwrap();
    }
}

/// Of two snapshots of the moment, one of which nobody heard of, neither is touched.
#[test]
fn privileged_what_may_be_somebody_elses_stays() {
    needs_root!();
    let mac = Mac::new();
    let id = run_id();
    let mut left = kill_at(&mac, &id, "tmutil 1 after\n", true).apfs;
    let ours = jiff::Timestamp::from_second(left[0].snapshots.at + 5).unwrap();
    let ours = ours.to_zoned(jiff::tz::TimeZone::system());
    let other = format!(
        "com.apple.TimeMachine.{}.local",
        ours.strftime("%Y-%m-%d-%H%M%S")
    );
    let file = mac.dir.join("state/snapshots").join(DATA).join(&other);
    fs::write(&file, "77777777-8888-4999-8AAA-BBBBBBBBBBBB\n").unwrap();
    let mut report = cleanup::Report::default();
    cleanup::undo_apfs(&mac.system, &left, &mut report).unwrap();
    assert!(file.exists());
    assert_eq!(report.warnings.len(), 1);
    // With what the tool said it is clear.
    let names = fs::read_dir(file.parent().unwrap()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let name = names
        .into_iter()
        .find(|name| *name != other && *name != OTHERS[0].1)
        .unwrap();
    let date = name
        .trim_start_matches("com.apple.TimeMachine.")
        .trim_end_matches(".local");
    left[0].snapshots.date = Some(date.to_owned());
    cleanup::undo_apfs(&mac.system, &left, &mut report).unwrap();
    mac.assert_only_others("told apart", &[&other]);
    Records::default().remove_dead(&id).unwrap();
}
