use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use super::page::Completed;
use super::reader::Sums;
use super::tracefs::USUAL;
use super::*;
use crate::dirty::DirtyMap;
use crate::freeze::MountPoint;
use crate::guard::{Config, Guard, LeftoverKind};
use crate::testing::{Loop, Mounted, Role, mkfs, needs_root, run, scratch};

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// An id that no other test uses.
pub(super) fn run_id() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("test-{}-{next}", std::process::id())
}

fn start(options: &Options, each: impl FnMut(Write) + Send + 'static) -> Tracker {
    Tracker::start(Tracefs::open().unwrap(), &run_id(), options, each).unwrap()
}

/// Pseudo-random numbers, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Writes of many kinds below `dir`.
pub(super) fn keep_busy(dir: &Path, seed: u64, rounds: u64) {
    let mut random = Random(seed);
    let path = |name: &str| dir.join(format!("{seed}-{name}"));
    let open = |flags| {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(flags)
            .open(path("data"))
            .unwrap()
    };
    let (buffered, direct) = (open(0), open(libc::O_DIRECT));
    buffered.set_len(8 << 20).unwrap();
    let mut block = crate::buffer::Buffer::new(4096);
    for round in 0..rounds {
        let offset = random.below(2048) * 4096;
        let bytes = [u8::try_from(round % 251).unwrap() + 1; 4096];
        match random.below(6) {
            0 | 1 => {
                buffered
                    .write_all_at(&bytes, offset + random.below(4000))
                    .unwrap();
                buffered.sync_data().unwrap();
            }
            2 => {
                block.copy_from_slice(&bytes);
                direct.write_all_at(&block, offset).unwrap();
            }
            3 => {
                std::fs::write(path("new"), bytes).unwrap();
                std::fs::rename(path("new"), path("old")).unwrap();
            }
            4 => {
                let many = dir.join(format!("{seed}-{}", random.below(20)));
                if std::fs::remove_file(&many).is_err() {
                    std::fs::write(&many, bytes.repeat(1 + round as usize % 30)).unwrap();
                }
            }
            _ => {
                let file = std::fs::File::create(path("reserved")).unwrap();
                let all = nix::fcntl::FallocateFlags::empty();
                nix::fcntl::fallocate(&file, all, 0, 1 << 20).unwrap();
                file.write_all_at(&bytes, 12345).unwrap();
            }
        }
    }
}

#[test]
fn privileged_every_changed_block_is_marked_and_every_sector_accounted_for() {
    needs_root!();
    for fs_type in ["ext4", "xfs"] {
        let dir = scratch();
        let file = dir.path().join("disk");
        let size: u64 = 320 << 20;
        let device = Loop::sparse(&file, size);
        mkfs(fs_type, device.path());
        let mounted = Mounted::new(device.path(), &dir.path().join("mnt"), "rw");
        keep_busy(mounted.path(), 1, 50);
        run("sync", ["-f".as_ref(), mounted.path().as_os_str()]);
        std::fs::copy(&file, dir.path().join("before")).unwrap();

        let map = Arc::new(DirtyMap::new(size / 512, 3).unwrap());
        let marks = map.clone();
        let options = Options::new(vec![device.number()]);
        let tracker = start(&options, move |write| {
            marks.mark(write.sector, write.sectors);
        });
        let counted = CounterFile::open(device.number()).unwrap();
        let base = tracker.balance(PATIENCE).unwrap();
        let (before, traced) = (counted.read().unwrap(), tracker.tally());
        // The journal may still be written home; what was copied is older than the trace then.
        let first_sectors = traced.written + traced.discarded;

        std::thread::scope(|scope| {
            for seed in 2..6 {
                let path = mounted.path();
                scope.spawn(move || keep_busy(path, seed, 150));
            }
        });

        let mount = MountPoint::open(mounted.path()).unwrap();
        mount.freeze().unwrap();
        let drained = tracker.drain(PATIENCE);
        let frozen = std::fs::read(&file);
        let marked = map.count();
        mount.thaw().unwrap();
        drained.unwrap();
        let frozen = frozen.unwrap();
        let old = std::fs::read(dir.path().join("before")).unwrap();
        let mut changed = 0;
        for (block, (new, old)) in frozen.chunks(4096).zip(old.chunks(4096)).enumerate() {
            if new != old {
                changed += 1;
                assert!(
                    map.is_dirty(block as u64),
                    "{fs_type}: block {block} was missed"
                );
            }
        }
        // Few enough marks that a missed block would have shown.
        assert!(
            changed > 500 && marked < map.blocks() / 4,
            "{changed} {marked}"
        );

        run("fstrim", [mounted.path()]);
        keep_busy(mounted.path(), 7, 50);
        mount.freeze().unwrap();
        let balance = tracker.balance(PATIENCE);
        let (after, tally) = (counted.read(), tracker.tally());
        mount.thaw().unwrap();
        tracker.check().unwrap();
        let after = after.unwrap();
        assert_eq!(balance.unwrap().missed_since(&base), 0);
        let sectors = tally.written + tally.discarded - first_sectors;
        assert_eq!(sectors, after.changed_sectors_since(&before));
        let discards = after.discards.since(before.discards).sectors;
        assert_eq!(tally.discarded - traced.discarded, discards);
        assert!(tally.flushes - traced.flushes >= after.flushes - before.flushes);
        assert!(discards > 0 && tally.requests > 300, "{tally:?}");
        println!("{fs_type}: {changed} blocks changed, {marked} marked, {tally:?}");
        let name = tracker.name().to_owned();
        tracker.stop().unwrap();
        assert!(
            !Tracefs::open()
                .unwrap()
                .leftovers()
                .unwrap()
                .contains(&name)
        );
    }
}

#[test]
fn privileged_kinds_and_places_are_told_apart_and_reads_left_out() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 16 << 20);
    let neighbour = Loop::sparse(&dir.path().join("other"), 16 << 20);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let list = seen.clone();
    let options = Options::new(vec![device.number()]);
    let tracker = start(&options, move |write| list.lock().unwrap().push(write));
    let base = tracker.balance(PATIENCE).unwrap();
    let take = || {
        tracker.drain(PATIENCE).unwrap();
        std::mem::take(&mut *seen.lock().unwrap())
    };

    let node = device.path().to_str().unwrap();
    let other = neighbour.path().to_str().unwrap();
    let (from, to) = (format!("if={node}"), format!("of={node}"));
    run("dd", [&from, "of=/dev/null", "bs=1M", "iflag=direct"]);
    run(
        "dd",
        [
            "if=/dev/zero",
            &format!("of={other}"),
            "bs=1M",
            "count=1",
            "oflag=direct",
        ],
    );
    assert_eq!(take(), []);

    let write = |sector, sectors, kind| Write {
        device: device.number(),
        sector,
        sectors,
        kind,
    };
    run(
        "dd",
        [
            "if=/dev/zero",
            &to,
            "bs=4096",
            "seek=3",
            "count=1",
            "oflag=direct",
            "conv=fsync",
        ],
    );
    assert_eq!(take(), [write(24, 8, WriteKind::Data)]);
    run("blkdiscard", ["-o", "1048576", "-l", "8192", node]);
    assert_eq!(take(), [write(2048, 16, WriteKind::Discard)]);
    run("blkdiscard", ["-z", "-o", "4096", "-l", "8192", node]);
    let zeroed = take();
    // Where the file below cannot punch holes, a failed attempt comes first.
    let place = |write: &Write| (write.sector, write.sectors);
    assert!(
        zeroed.iter().all(|write| place(write) == (8, 16)),
        "{zeroed:?}"
    );
    assert!(
        zeroed.iter().all(|write| write.kind != WriteKind::Discard),
        "{zeroed:?}"
    );
    assert!(!zeroed.is_empty());

    assert_eq!(tracker.balance(PATIENCE).unwrap(), base);
    let tally = tracker.stop().unwrap();
    let zeroed: u64 = zeroed.iter().map(|write| write.sectors).sum();
    assert_eq!((tally.written, tally.discarded), (8 + zeroed, 16));
    assert!(tally.flushes > 0);
}

#[test]
fn requests_are_cut_at_the_borders_and_only_whole_ones_added_up() {
    let number = DeviceNumber { major: 7, minor: 3 };
    let tally = |range| DeviceTally {
        device: number,
        disk: DeviceNumber { major: 7, minor: 0 },
        sectors: range,
        sums: Sums::default(),
    };
    // What is handed on, and what is added up.
    let count = |range, sector, sectors| {
        let tally = tally(range);
        let event = Completed {
            dev: 7 << 20,
            sector,
            sectors,
            letter: b'W',
            detail: b'S',
        };
        let write = tally.count(&event);
        assert!(write.is_none_or(|write| write.device == number));
        let place = write.map(|write| (write.sector, write.sectors));
        (place, tally.sums.written.into_inner())
    };
    assert_eq!(count(100..150, 90, 24), (Some((0, 14)), 0));
    assert_eq!(count(100..150, 140, 24), (Some((40, 10)), 0));
    assert_eq!(count(100..150, 0, 1000), (Some((0, 50)), 0));
    assert_eq!(count(100..150, 100, 50), (Some((0, 50)), 50));
    assert_eq!(count(100..150, 120, 8), (Some((20, 8)), 8));
    assert_eq!(count(100..150, 92, 8), (None, 0));
    assert_eq!(count(100..150, 150, 8), (None, 0));
    assert_eq!(count(100..150, u64::MAX - 1, 8), (None, 0));
    assert_eq!(count(0..u64::MAX, 1 << 50, 8), (Some((1 << 50, 8)), 8));
}

/// A neighbour that never pauses does not keep a partition from being proven.
#[test]
fn privileged_beside_a_neighbour_that_never_pauses() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 64 << 20);
    let ours = device.add_partition(1, 2048, 65536);
    let other = device.add_partition(2, 2048 + 65536, 32768);
    let number = BlockDevice::at(&ours).unwrap().number;
    let marks = Arc::new(DirtyMap::new(65536, 3).unwrap());
    let to_mark = marks.clone();
    let tracker = start(&Options::new(vec![number]), move |write| {
        assert_eq!(write.device, number);
        to_mark.mark(write.sector, write.sectors);
    });
    let write_to = |path: &Path, block: u64| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .unwrap();
        let bytes = crate::buffer::Buffer::new(4096);
        file.write_all_at(&bytes, block * 4096).unwrap();
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for first in 0..3 {
            let (other, stop) = (&other, &stop);
            scope.spawn(move || {
                let mut block = first;
                while !stop.load(Ordering::Relaxed) {
                    write_to(other, block % 4096);
                    block += 3;
                }
            });
        }
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let base = tracker.balance(PATIENCE).unwrap();
            for block in 0..500 {
                write_to(&ours, block * 7);
                assert_eq!(tracker.balance(PATIENCE).unwrap(), base);
            }
            // What is not traced is missed, though the neighbour goes on.
            write(&tracker.instance, "tracing_on", "0").unwrap();
            write_to(&ours, 4000);
            write(&tracker.instance, "tracing_on", "1").unwrap();
            let balance = tracker.balance(PATIENCE).unwrap();
            assert_eq!(balance.missed_since(&base), 8);
        }));
        stop.store(true, Ordering::Relaxed);
        done.unwrap();
    });
    tracker.check().unwrap();
    let tally = tracker.stop().unwrap();
    assert_eq!((tally.requests, tally.written), (500, 4000));
    assert_eq!(marks.count(), 500);
    assert!((0..500).all(|block| marks.is_dirty(block * 7)));
}

#[test]
fn privileged_lost_events_are_noticed() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 16 << 20);
    let options = Options {
        buffer_kib: 8,
        // A reader that stalls.
        poll: Duration::from_secs(600),
        ..Options::new(vec![device.number()])
    };
    let tracker = start(&options, |_| ());
    let base = tracker.balance(PATIENCE).unwrap();
    let of = format!("of={}", device.path().display());
    run(
        "dd",
        ["if=/dev/zero", &of, "bs=4096", "count=4000", "oflag=direct"],
    );
    let error = tracker.drain(PATIENCE).unwrap_err();
    assert!(matches!(error, TraceError::Lost(_)), "{error}");
    assert!(tracker.balance(PATIENCE).is_err());
    let error = tracker.check().unwrap_err();
    assert!(
        matches!(error, TraceError::Lost(loss) if loss.overrun + loss.dropped > 1000),
        "{error}"
    );
    // Even without the kernel's word for it the sums would tell.
    let counted = tracker.counted().unwrap().unwrap()[0].wrapping_sub(tracker.shared.traced()[0]);
    assert!(counted.wrapping_sub(base.0[0]) > 8000);
}

#[test]
fn privileged_a_tampered_instance_is_noticed() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 1 << 20);
    let options = Options::new(vec![device.number()]);
    let tampering = [
        ("tracing_on", "0"),
        ("events/block/block_rq_complete/enable", "0"),
        ("events/block/block_rq_complete/filter", "0"),
    ];
    for (file, value) in tampering {
        let tracker = start(&options, |_| ());
        tracker.check().unwrap();
        write(&tracker.instance, file, value).unwrap();
        let error = tracker.check().unwrap_err();
        assert!(matches!(error, TraceError::Changed(..)), "{file}: {error}");
    }
    // Events that were not traced while it was off are missing in the sums.
    let tracker = start(&options, |_| ());
    let base = tracker.balance(PATIENCE).unwrap();
    write(&tracker.instance, "tracing_on", "0").unwrap();
    let of = format!("of={}", device.path().display());
    run(
        "dd",
        ["if=/dev/zero", &of, "bs=4096", "count=5", "oflag=direct"],
    );
    write(&tracker.instance, "tracing_on", "1").unwrap();
    tracker.check().unwrap();
    let balance = tracker.balance(PATIENCE).unwrap();
    assert_ne!(balance, base);
    assert_eq!(balance.missed_since(&base), 40);
}

#[test]
fn privileged_a_panic_in_the_callback_is_no_silence() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 1 << 20);
    let tracker = start(&Options::new(vec![device.number()]), |_| {
        panic!("on purpose")
    });
    let of = format!("of={}", device.path().display());
    run(
        "dd",
        ["if=/dev/zero", &of, "bs=4096", "count=1", "oflag=direct"],
    );
    let error = tracker.drain(PATIENCE).unwrap_err();
    assert!(matches!(error, TraceError::ReaderGone), "{error}");
    assert!(tracker.check().is_err());
}

#[test]
fn privileged_what_cannot_be_traced_is_refused() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 16 << 20);
    let refused = |devices: Vec<DeviceNumber>| {
        let tracefs = Tracefs::open().unwrap();
        let id = run_id();
        let error = Tracker::start(tracefs, &id, &Options::new(devices), |_| ()).unwrap_err();
        let left = Tracefs::open().unwrap().leftovers().unwrap();
        assert!(!left.contains(&instance_name(&id)));
        error.to_string()
    };
    assert!(refused(vec![]).contains("not 0"));
    let switch = BlockDevice::at(device.path()).unwrap();
    let switch = switch.sysfs().join("queue/iostats");
    std::fs::write(&switch, "0").unwrap();
    let said = refused(vec![device.number()]);
    std::fs::write(&switch, "1").unwrap();
    assert!(said.contains("iostats"), "{said}");
}

#[test]
fn privileged_the_usual_mount_is_used_where_there_is_one() {
    needs_root!();
    std::thread::spawn(|| {
        // A mount namespace for this thread alone.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(none, "/", none, private, none).unwrap();
        // Whatever this machine has there: the same thing is not mounted twice.
        while nix::mount::umount2(USUAL, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tracefs"), USUAL, Some("tracefs"), flags, none).unwrap();
        let tracefs = Tracefs::open().unwrap();
        assert!(!tracefs.is_private());
        nix::mount::umount2(USUAL, nix::mount::MntFlags::MNT_DETACH).unwrap();
        let tracefs = Tracefs::open().unwrap();
        assert!(tracefs.is_private());
        assert!(tracefs.remove("not-ours").is_err());
        assert!(!tracefs.remove("holdstill-never-made").unwrap());
    })
    .join()
    .unwrap();
}

#[test]
fn privileged_what_a_killed_run_left_is_found_and_removed() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 1 << 20);
    let tracefs = Tracefs::open().unwrap();
    for guarded in ["no", "yes"] {
        let id = run_id();
        let args = [Path::new(&id), device.path(), Path::new(guarded)];
        let role = Role::start("trace::tests::role_traces", &args);
        let name = instance_name(&id);
        assert!(tracefs.leftovers().unwrap().contains(&name));
        role.kill();
        if guarded == "no" {
            assert!(tracefs.remove(&name).unwrap());
        }
        for _ in 0..2000 {
            if !tracefs.leftovers().unwrap().contains(&name) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!tracefs.leftovers().unwrap().contains(&name), "{guarded}");
    }
}

#[test]
fn role_traces() {
    let Some(args) = Role::args() else { return };
    let [id, device, guarded] = args.as_slice() else {
        panic!("{args:?}");
    };
    let guard = (guarded == Path::new("yes")).then(|| Guard::spawn(Config::default()).unwrap());
    let tracefs = Tracefs::open().unwrap();
    let id = id.to_str().unwrap();
    if let Some(guard) = &guard {
        let name = instance_name(id);
        let folder = LeftoverKind::Folder;
        let _ = guard
            .register(tracefs.instances(), name.as_ref(), folder)
            .unwrap();
    }
    let number = BlockDevice::at(device).unwrap().number;
    let _tracker = Tracker::start(tracefs, id, &Options::new(vec![number]), |_| ()).unwrap();
    Role::ready_until_told();
}

#[test]
fn privileged_a_flood_of_small_requests_is_traced_whole() {
    needs_root!();
    let dir = scratch();
    let size: u64 = 64 << 20;
    let device = Loop::sparse(&dir.path().join("disk"), size);
    let map = Arc::new(DirtyMap::new(size / 512, 0).unwrap());
    let marks = map.clone();
    let options = Options::new(vec![device.number()]);
    let tracker = start(&options, move |write| {
        marks.mark(write.sector, write.sectors)
    });
    let base = tracker.balance(PATIENCE).unwrap();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for seed in 1..5 {
            let path = device.path();
            scope.spawn(move || {
                let mut random = Random(seed);
                let file = std::fs::OpenOptions::new()
                    .write(true)
                    .custom_flags(libc::O_DIRECT)
                    .open(path)
                    .unwrap();
                let block = crate::buffer::Buffer::new(512);
                for _ in 0..10_000 {
                    let offset = random.below(size / 512) * 512;
                    file.write_all_at(&block, offset).unwrap();
                }
            });
        }
    });
    let elapsed = begin.elapsed();
    assert_eq!(tracker.balance(PATIENCE).unwrap(), base);
    tracker.check().unwrap();
    let tally = tracker.stop().unwrap();
    assert_eq!(tally.requests, 40_000);
    let mut expected = std::collections::BTreeSet::new();
    for seed in 1..5 {
        let mut random = Random(seed);
        expected.extend((0..10_000).map(|_| random.below(size / 512)));
    }
    assert_eq!(map.count(), expected.len() as u64);
    assert!(expected.iter().all(|sector| map.is_dirty(*sector)));
    println!("40000 requests in {elapsed:?}");
}
