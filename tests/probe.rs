//! Signatures against what `blkid` says.

use std::os::unix::fs::FileExt;
use std::path::Path;

use holdstill::fs::{self, Kind, Opened};
use holdstill::units::ByteLen;

use crate::common::{
    FileSource, LoopDevice, needs_root, output, run, shell, sparse_file, table, temp_dir,
};

/// What to run on the file `$1`, or which table to write there, by kind.
const MAKERS: &[(Kind, &str)] = &[
    (Kind::Ext2, "mkfs.ext2 -q -L label $1"),
    (Kind::Ext3, "mkfs.ext3 -q -L label $1"),
    (Kind::Ext4, "mkfs.ext4 -q -L label $1"),
    (Kind::Ext4, "mkfs.ext4 -q -O ^has_journal $1"),
    (Kind::ExtJournal, "mke2fs -q -F -b 4096 -O journal_dev $1"),
    (Kind::Xfs, "mkfs.xfs -q -L label $1"),
    (Kind::Xfs, "mkfs.xfs -q -m crc=0 -b size=1024 $1 2>&1"),
    (Kind::Btrfs, "mkfs.btrfs -q -L label $1"),
    (Kind::F2fs, "mkfs.f2fs -q -l label $1"),
    (Kind::Vfat, "mkfs.vfat -n LABEL $1"),
    (Kind::Vfat, "mkfs.vfat -F 32 $1"),
    (
        Kind::Vfat,
        "truncate -s 100M $1; mkfs.vfat -F 12 -s 128 -n LABEL $1",
    ),
    (Kind::Exfat, "mkfs.exfat $1"),
    (Kind::Ntfs, "mkfs.ntfs -q -F -Q -s 512 -p 0 -H 0 -S 0 $1"),
    (Kind::Apfs, "mkapfs -L label $1"),
    (Kind::Swap, "mkswap -q -L label $1"),
    (
        Kind::Luks,
        "echo -n x | cryptsetup luksFormat -q --type luks1 --iter-time 1 $1",
    ),
    (
        Kind::Luks,
        "echo -n x | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --iter-time 1 --label label $1",
    ),
    (
        Kind::Squashfs,
        "rm $1; mksquashfs /usr/include/linux $1 -quiet -no-progress -comp gzip",
    ),
    (Kind::Erofs, "mkfs.erofs --quiet $1 /usr/include/linux"),
    (
        Kind::Iso9660,
        "rm $1; genisoimage -quiet -V label -o $1 /usr/include/linux/netfilter",
    ),
    (Kind::Udf, "mkudffs $1"),
    (Kind::PartitionTable, "a GPT"),
    (Kind::PartitionTable, "an MBR"),
];

const SIZE: u64 = 320 << 20;

fn blkid(path: &Path, tag: &str) -> Option<String> {
    let path = path.to_str().unwrap();
    let output = output("blkid", ["-p", "-o", "value", "-s", tag, path]);
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

#[test]
fn signatures_are_what_blkid_says() {
    let dir = temp_dir();
    let path = dir.path().join("volume");
    let mut differences = Vec::new();
    for &(kind, script) in MAKERS {
        sparse_file(&path, SIZE);
        match script {
            "a GPT" => table::gpt(&path),
            "an MBR" => table::mbr(&path, 2048),
            _ => drop(shell(format!("set -- {}; {script}", path.display()))),
        }
        let info = fs::probe(&FileSource::open(&path)).unwrap();
        let Some(info) = info else {
            differences.push(format!("nothing found after {script}"));
            continue;
        };
        let mut compare = |what: &str, ours: Option<&str>, theirs: Option<&str>| {
            if ours != theirs {
                differences.push(format!("{script}: {what} {ours:?}, not {theirs:?}"));
            }
        };
        let (name, uuid) = match kind {
            Kind::PartitionTable => ("PTTYPE", "PTUUID"),
            _ => ("TYPE", "UUID"),
        };
        let name = blkid(&path, name);
        compare("kind", Some(info.kind.name()), Some(kind.name()));
        if kind != Kind::PartitionTable {
            compare("type", Some(info.kind.name()), name.as_deref());
        }
        if info.uuid.is_some() {
            compare("UUID", info.uuid.as_deref(), blkid(&path, uuid).as_deref());
        }
        // Where the label is in the superblock.
        if !matches!(kind, Kind::Udf | Kind::Apfs | Kind::Ntfs | Kind::Exfat) {
            compare(
                "label",
                info.label.as_deref(),
                blkid(&path, "LABEL").as_deref(),
            );
        }
        if info.size > ByteLen(SIZE) {
            compare("size", Some(&info.size.to_string()), None);
        }
        let opened = fs::open(&FileSource::open(&path)).unwrap();
        let is_expected = match kind {
            Kind::Ext2 | Kind::Ext3 | Kind::Ext4 | Kind::Xfs | Kind::Btrfs | Kind::Apfs => {
                matches!(opened, Opened::Known(_))
            }
            _ => matches!(&opened, Opened::NoMap(other) if *other == info),
        };
        if !is_expected {
            compare("opened", Some(&format!("{opened:?}")), None);
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
}

#[test]
fn privileged_members_of_arrays_are_recognized() {
    needs_root!();
    let dir = temp_dir();
    let path = dir.path().join("volume");
    sparse_file(&path, 64 << 20);
    let device = LoopDevice::attach(&path);
    let node = device.path().to_str().unwrap();
    let config = "devices { global_filter = [ \"a|/dev/loop|\" ] scan = [ \"/dev\" ] }";
    run("pvcreate", ["-q", "-y", "--config", config, node]);
    let info = fs::probe(&FileSource::open(&path)).unwrap().unwrap();
    assert_eq!(info.kind, Kind::Lvm2Member);
    assert_eq!(info.uuid, blkid(&path, "UUID"));
}

#[test]
fn members_of_md_arrays_are_recognized_wherever_their_superblock_is() {
    const LEN: usize = 10 << 20;
    let magic = 0xa92b_4efc_u32.to_le_bytes();
    let version_1_0 = LEN - 8192;
    for at in [0, 4096, version_1_0, LEN - 65536] {
        let mut volume = vec![0; LEN];
        volume[at..at + 4].copy_from_slice(&magic);
        if at != LEN - 65536 {
            volume[at + 4] = 1;
            volume[at + 144..at + 152].copy_from_slice(&(at as u64 / 512).to_le_bytes());
        }
        let info = fs::probe(&volume).unwrap();
        assert_eq!(info.map(|info| info.kind), Some(Kind::MdRaidMember), "{at}");
    }
    // That of the last partition is not the disk's.
    let mut disk = vec![0; LEN];
    disk[version_1_0..version_1_0 + 4].copy_from_slice(&magic);
    disk[version_1_0 + 4] = 1;
    disk[version_1_0 + 144] = 7;
    assert_eq!(fs::probe(&disk).unwrap(), None);
}

#[test]
fn two_signatures_are_not_trusted() {
    let dir = temp_dir();
    let path = dir.path().join("volume");
    let name = path.to_str().unwrap();
    let file = sparse_file(&path, SIZE);
    run("mkfs.ext4", ["-q", name]);
    file.write_all_at(b"_BHRfS_M", (64 << 10) + 64).unwrap();
    match fs::open(&FileSource::open(&path)).unwrap() {
        Opened::AllBlocks { info, why } => {
            assert_eq!(info.kind, Kind::Ext4);
            assert!(why.contains("btrfs"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    // An MBR written over the boot sector of what was a filesystem on a whole disk.
    sparse_file(&path, SIZE);
    run("mkfs.ext4", ["-q", name]);
    table::mbr(&path, 2048);
    assert!(matches!(
        fs::open(&FileSource::open(&path)),
        Ok(Opened::AllBlocks { .. })
    ));
}

#[test]
fn nothing_is_found_in_nothing() {
    for len in [0, 1, 511, 512, 1023, 2048, 4096, 70_000, 300_000] {
        assert_eq!(fs::probe(&vec![0u8; len]).unwrap(), None, "{len}");
        assert!(
            matches!(fs::open(&vec![0u8; len]), Ok(Opened::Unknown)),
            "{len}"
        );
    }
}
