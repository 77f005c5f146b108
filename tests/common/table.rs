//! Partition tables, as few bytes as every reader takes for one. Tools that write them, such as `sfdisk`,
//! flush every filesystem of the machine (`sync(2)`), among them those that other tests have frozen.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::FileSource;
use ::holdstill::read_at::ReadAt;

const SECTOR: u64 = 512;
/// Bytes of the 128 entries of a GPT.
const ENTRIES: usize = 128 * 128;

/// Writes an MBR with one partition that takes up the rest of the disk from sector `start`; of all else
/// that was in the first sector, the code remains.
pub(crate) fn mbr(disk: &Path, start: u32) {
    write_mbr(disk, 0x83, start);
}

/// Writes a GPT with one partition from 1 MiB to 101 MiB, and the copy at the disk's end.
pub(crate) fn gpt(disk: &Path) {
    write_mbr(disk, 0xee, 1);
    let sectors = FileSource::open(disk).len().0 / SECTOR;
    let in_sectors = ENTRIES as u64 / SECTOR;
    let mut entries = vec![0; ENTRIES];
    // Linux filesystem data, in the bytes' order of a GUID on disk.
    entries[..16]
        .copy_from_slice(b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4");
    entries[16..32].copy_from_slice(b"one partition...");
    entries[32..40].copy_from_slice(&2048u64.to_le_bytes());
    entries[40..48].copy_from_slice(&(2048u64 + (100 << 20) / SECTOR - 1).to_le_bytes());

    let last = sectors - 1;
    for (here, there, table) in [(1, last, 2), (last, 1, last - in_sectors)] {
        let mut header = [0; 92];
        header[..12].copy_from_slice(b"EFI PART\0\0\x01\0");
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        for (at, value) in [
            (24, here),
            (32, there),
            (40, 2 + in_sectors),
            (48, last - in_sectors - 1),
            (72, table),
        ] {
            header[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
        }
        header[56..72].copy_from_slice(b"a disk for tests");
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        let crc = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        write(disk, &header, here * SECTOR);
        write(disk, &entries, table * SECTOR);
    }
}

fn write_mbr(disk: &Path, kind: u8, start: u32) {
    let sectors = FileSource::open(disk).len().0 / SECTOR;
    let mut table = [0; 72];
    // An identifier of the disk.
    table[..4].copy_from_slice(b"disk");
    table[10] = kind;
    table[14..18].copy_from_slice(&start.to_le_bytes());
    let rest = u32::try_from(sectors).expect("a small disk") - start;
    table[18..22].copy_from_slice(&rest.to_le_bytes());
    table[70..].copy_from_slice(&[0x55, 0xaa]);
    write(disk, &table, SECTOR - table.len() as u64);
}

fn write(disk: &Path, bytes: &[u8], at: u64) {
    let file = OpenOptions::new().write(true).open(disk);
    let file = file.unwrap_or_else(|error| panic!("cannot open {}: {error}", disk.display()));
    file.write_all_at(bytes, at).expect("writes the table");
}
