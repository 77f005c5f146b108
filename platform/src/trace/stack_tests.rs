//! Tracing through a map: a partition taken for a device that is built on its disk. Requests are not
//! merged here, so that its own counters are as good as those of bios.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::page::Completed;
use super::tests::{PATIENCE, run_id};
use super::*;
use crate::dirty::DirtyMap;
use crate::stack::two_segments;
use crate::testing::{Loop, needs_root, run, scratch};

const START: u64 = 2048;
const SECTORS: u64 = 65536;

/// Writes blocks of 4 KiB by direct I/O.
fn write_to(path: &Path, blocks: impl IntoIterator<Item = u64>) {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap();
    let bytes = crate::buffer::Buffer::new(4096);
    for block in blocks {
        file.write_all_at(&bytes, block * 4096).unwrap();
    }
}

struct Traced {
    device: Loop,
    top: std::path::PathBuf,
    neighbour: std::path::PathBuf,
    marks: Arc<DirtyMap>,
    tracker: Tracker,
    _dir: tempfile::TempDir,
}

/// A disk with two partitions, of which the first is traced as if it lay `shift` sectors further.
fn traced(shift: u64) -> Traced {
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 64 << 20);
    let top = device.add_partition(1, START, SECTORS);
    let neighbour = device.add_partition(2, START + SECTORS, 32768);
    let number = BlockDevice::at(&top).unwrap().number;
    let stack = Stack::of_stretch(number, device.number(), START + shift);
    let marks = Arc::new(DirtyMap::new(SECTORS, 3).unwrap());
    let to_mark = marks.clone();
    let options = Options::of_stack(Arc::new(stack));
    let tracefs = Tracefs::open().unwrap();
    let tracker = Tracker::start(tracefs, &run_id(), &options, move |write| {
        assert_eq!(write.device, number);
        to_mark.mark(write.sector, write.sectors);
    })
    .unwrap();
    Traced {
        device,
        top,
        neighbour,
        marks,
        tracker,
        _dir: dir,
    }
}

#[test]
fn privileged_what_is_written_below_is_marked_above_and_adds_up() {
    needs_root!();
    let traced = traced(0);
    let tracker = &traced.tracker;
    let base = tracker.balance(PATIENCE).unwrap();
    write_to(&traced.top, (0..500).map(|block| block * 7));
    write_to(&traced.neighbour, 0..200);
    assert_eq!(tracker.balance(PATIENCE).unwrap(), base);
    assert!(!tracker.counts_nothing().unwrap());
    assert_eq!(traced.marks.count(), 500);
    assert!((0..500).all(|block| traced.marks.is_dirty(block * 7)));

    // A discard counts as well.
    let top = traced.top.to_str().unwrap();
    run("blkdiscard", ["-o", "1048576", "-l", "65536", top]);
    assert_eq!(tracker.balance(PATIENCE).unwrap(), base);
    assert!((256..272).all(|block| traced.marks.is_dirty(block)));

    // What is not traced is missed, ...
    write(&tracker.instance, "tracing_on", "0").unwrap();
    write_to(&traced.top, [9]);
    write(&tracker.instance, "tracing_on", "1").unwrap();
    let balance = tracker.balance(PATIENCE).unwrap();
    assert_eq!(balance.missed_since(&base), 8);
    // ... and stays so when somebody writes as much behind its back, which is marked all the same: block
    // 1000 of the disk lies in the partition.
    write_to(traced.device.path(), [1000, 1001]);
    let balance = tracker.balance(PATIENCE).unwrap();
    assert_eq!(balance.missed_since(&base), -8);
    assert!(traced.marks.is_dirty(1000 - START / 8));

    let tally = traced.tracker.stop().unwrap();
    assert_eq!((tally.requests, tally.written), (503, 4016));
    assert_eq!(tally.discarded, 128);
}

/// A wrong map is found by the sums, as far as it misses anything.
#[test]
fn privileged_with_a_shifted_map_sums_differ() {
    needs_root!();
    let traced = traced(64);
    let tracker = &traced.tracker;
    let base = tracker.balance(PATIENCE).unwrap();
    // These land where the map knows nothing: a partition that is written to, but nothing is traced of it.
    write_to(&traced.top, 0..8);
    let balance = tracker.balance(PATIENCE).unwrap();
    assert_ne!(balance, base);
    assert_eq!(balance.missed_since(&base), 64);
    assert_eq!(traced.marks.count(), 0);
    // These are taken for the partition's.
    write_to(&traced.neighbour, 0..2);
    let balance = tracker.balance(PATIENCE).unwrap();
    assert_eq!(balance.missed_since(&base), 48);
    assert!(tracker.counts_nothing().is_ok_and(|nothing| !nothing));
}

/// Counters that do not move though something is traced are no counters.
#[test]
fn privileged_a_device_that_counts_nothing_is_found() {
    needs_root!();
    let traced = traced(0);
    assert!(!traced.tracker.counts_nothing().unwrap());
    write_to(traced.device.path(), [1000]);
    traced.tracker.drain(PATIENCE).unwrap();
    assert!(traced.tracker.counts_nothing().unwrap());
}

#[test]
fn requests_are_cut_at_the_borders_of_segments_and_discards_count_whole() {
    // What is handed on, and what is added up.
    let count = |minor, sector, sectors, letter| {
        let tally = StackTally::new(Arc::new(two_segments()));
        let shared = Shared::new(Vec::new(), Some(tally));
        assert_eq!(shared.disks().count(), 1);
        let event = Completed {
            dev: 253u32 << 20 | minor,
            sector,
            sectors,
            letter,
            detail: b'S',
        };
        let mut writes = Vec::new();
        shared.count(event, &mut |write| {
            writes.push((write.sector, write.sectors))
        });
        (writes, shared.traced()[0])
    };
    assert_eq!(count(0, 2500, 8, b'W'), (vec![(0, 8)], 8));
    assert_eq!(count(0, 2596, 8, b'W'), (vec![(96, 4)], 4));
    assert_eq!(count(0, 2290, 220, b'W'), (vec![(290, 10), (0, 10)], 20));
    assert_eq!(count(0, 2290, 220, b'F'), (vec![(290, 10), (0, 10)], 20));
    assert_eq!(count(0, 2290, 220, b'D'), (vec![(290, 10), (0, 10)], 220));
    // It begins with a neighbour's.
    assert_eq!(count(0, 2090, 20, b'D'), (vec![(100, 10)], 0));
    assert_eq!(count(0, 2090, 20, b'N'), (vec![(100, 10)], 10));
    assert_eq!(count(0, 2300, 200, b'W'), (vec![], 0));
    assert_eq!(count(1, 2500, 8, b'W'), (vec![], 0));
    assert_eq!(count(0, 2500, 0, b'F'), (vec![], 0));
    assert_eq!(count(0, u64::MAX - 1, 8, b'W'), (vec![], 0));
}
