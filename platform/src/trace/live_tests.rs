//! All parts together: a volume is copied while it is written to, and the copy must be the volume as
//! it was in the last freeze.

use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use super::tests::{PATIENCE, keep_busy, run_id};
use super::*;
use crate::buffer::Buffer;
use crate::device::{Access, Disk};
use crate::dirty::DirtyMap;
use crate::freeze::MountPoint;
use crate::fsmap::{FsMap, UsedRange};
use crate::guard::{Config, Guard, LeftoverKind};
use crate::memory::Arena;
use crate::testing::{Loop, Mounted, mkfs, needs_root, run, scratch};

const SIZE: u64 = 320 << 20;
const BLOCK: u64 = 4096;
const UNIT: u64 = 1024;
const DEADLINE: Duration = Duration::from_secs(60);

/// Reads blocks of the device by direct I/O into the image.
fn copy(disk: &Disk, image: &mut [u8], buffer: &mut Buffer, start: u64, len: u64) {
    let (start, end) = (start, (start + len).min(SIZE));
    for at in (start..end).step_by(buffer.len()) {
        let take = (end - at).min(buffer.len() as u64) as usize;
        disk.read_exact_at(&mut buffer[..take], at).unwrap();
        image[at as usize..at as usize + take].copy_from_slice(&buffer[..take]);
    }
}

fn live_copy(fs_type: &str) {
    let dir = scratch();
    let file = dir.path().join("disk");
    let device = Loop::sparse(&file, SIZE);
    mkfs(fs_type, device.path());
    let mounted = Mounted::new(device.path(), &dir.path().join("mnt"), "rw");
    keep_busy(mounted.path(), 1, 300);

    let guard = Guard::spawn(Config::default()).unwrap();
    let tracefs = Tracefs::open().unwrap();
    let id = run_id();
    let name = instance_name(&id);
    let leftover = guard
        .register(tracefs.instances(), name.as_ref(), LeftoverKind::Folder)
        .unwrap();
    let map = Arc::new(DirtyMap::new(SIZE / 512, 3).unwrap());
    // What was ever written since the first freeze, for the comparison.
    let ever = Arc::new(DirtyMap::new(SIZE / 512, 3).unwrap());
    let marks = (map.clone(), ever.clone());
    let options = Options::new(vec![device.number()]);
    let tracker = Tracker::start(tracefs, &id, &options, move |write| {
        marks.0.mark(write.sector, write.sectors);
        marks.1.mark(write.sector, write.sectors);
    })
    .unwrap();

    let mount = Arc::new(MountPoint::open(mounted.path()).unwrap());
    let mut fsmap = FsMap::new();
    let mut used: Vec<UsedRange> = Vec::with_capacity(100_000);
    let mut used_first = Vec::with_capacity(100_000);
    fsmap
        .used(&mount, device.number(), SIZE, &mut used)
        .unwrap();
    let mut final_blocks = Arena::new(64 << 20).unwrap();
    let mut final_ranges: Vec<(u64, u64)> = Vec::with_capacity(100_000);
    let disk = Disk::open(device.path(), Access::Read).unwrap();
    let mut buffer = Buffer::new(1 << 20);
    let mut image = vec![0u8; SIZE as usize];
    let backing = std::fs::File::open(&file).unwrap();
    let mut oracle = vec![1u8; SIZE as usize];

    let stop = AtomicBool::new(false);
    let times = std::thread::scope(|scope| {
        for seed in 2..5 {
            let (path, stop) = (mounted.path(), &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    keep_busy(path, seed, 50);
                }
            });
        }
        // Whatever fails below, the writers end.
        let work = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // The first freeze: an exact map, and a quiet moment for the sums.
            let ready = guard.ready().unwrap();
            let frozen = ready.freeze(&mount, DEADLINE).unwrap();
            let first = fsmap.used(&mount, device.number(), SIZE, &mut used_first);
            let base = tracker.balance(PATIENCE);
            // In the freeze: later a block might be allocated and written before its mark is lost.
            map.clear();
            ever.clear();
            let first_freeze = frozen.thaw().unwrap();
            first.unwrap();
            let base = base.unwrap();

            for range in &used_first {
                copy(&disk, &mut image, &mut buffer, range.start, range.len);
            }
            for _ in 0..3 {
                mount.sync().unwrap();
                let mut from = 0;
                while let Some((first, blocks)) = map.take(from, 256) {
                    copy(
                        &disk,
                        &mut image,
                        &mut buffer,
                        first * BLOCK,
                        blocks * BLOCK,
                    );
                    from = first + blocks;
                }
            }
            mount.sync().unwrap();

            let ready = guard.ready().unwrap();
            let frozen = ready.freeze(&mount, DEADLINE).unwrap();
            let drained = tracker.drain(PATIENCE);
            let balance = tracker.balance(PATIENCE);
            let mapped = fsmap.used(&mount, device.number(), SIZE, &mut used);
            // Marks of blocks that are free now cost nothing but their reading.
            let mut filled = 0;
            let mut from = 0;
            let mut fits = true;
            while let Some((first, blocks)) = map.take(from, 256) {
                let len = (blocks * BLOCK) as usize;
                let room = final_blocks.bytes_mut().get_mut(filled..filled + len);
                let Some(room) = room else {
                    fits = false;
                    break;
                };
                if disk.read_exact_at(room, first * BLOCK).is_err() {
                    fits = false;
                    break;
                }
                final_ranges.push((first * BLOCK, len as u64));
                filled += len;
                from = first + blocks;
            }
            let held = frozen.held();
            let compared = backing.read_exact_at(&mut oracle, 0);
            let late = map.count();
            let thawed = frozen.thaw().unwrap();
            drained.unwrap();
            mapped.unwrap();
            compared.unwrap();
            assert!(fits, "the final blocks did not fit");
            assert_eq!(balance.unwrap(), base);
            assert_eq!(late, 0, "written to while frozen");
            (first_freeze.total(), thawed.freeze_call, held, filled)
        }));
        stop.store(true, Ordering::Relaxed);
        work.unwrap()
    });
    tracker.check().unwrap();
    let tally = tracker.stop().unwrap();
    guard.forget(leftover).unwrap();
    assert_eq!(guard.finish().unwrap().thawed, 0);

    let mut at = 0;
    for (start, len) in final_ranges {
        let (start, len) = (start as usize, len as usize);
        image[start..start + len].copy_from_slice(&final_blocks.bytes()[at..at + len]);
        at += len;
    }
    assert_eq!(SIZE % BLOCK, 0);
    // In use now but neither at the first freeze nor written since: reserved, never written. The
    // filesystem never reads them, so the copy need not have them.
    let was_used = |byte: u64| {
        let after = used_first.partition_point(|range| range.start <= byte);
        after > 0 && used_first[after - 1].start + used_first[after - 1].len > byte
    };
    let mut compared = 0;
    for range in &used {
        // The filesystem's own blocks may be as small as this.
        for byte in (range.start..range.start + range.len).step_by(UNIT as usize) {
            let unit = byte as usize..(byte + UNIT) as usize;
            if was_used(byte) || ever.is_dirty(byte / BLOCK) {
                let equal = image[unit.clone()] == oracle[unit];
                assert!(equal, "{fs_type}: byte {byte} differs");
                compared += 1;
            }
        }
    }
    let (first_freeze, freeze_call, held, filled) = times;
    println!(
        "{fs_type}: {compared} KiB equal; first freeze {first_freeze:?}, final FIFREEZE \
         {freeze_call:?}, work in it {held:?}, {} KiB read; {} requests",
        filled / 1024,
        tally.requests,
    );
    assert!(compared > 1000 && tally.requests > 200, "{compared}");
    if fs_type == "ext4" {
        let path = dir.path().join("image");
        std::fs::write(&path, &image).unwrap();
        // A file that is being removed is still listed as to be freed; mounting frees it, and so does this.
        let orphans = run("dumpe2fs", ["-h".as_ref(), path.as_os_str()]).contains("First orphan");
        let how = if orphans { "-fp" } else { "-fn" };
        run("e2fsck", [how.as_ref(), path.as_os_str()]);
    }
}

#[test]
fn privileged_a_live_copy_of_ext4_is_the_volume_at_the_freeze() {
    needs_root!();
    live_copy("ext4");
}

#[test]
fn privileged_a_live_copy_of_xfs_is_the_volume_at_the_freeze() {
    needs_root!();
    live_copy("xfs");
}
