//! The used-block maps of large volumes, made by the real mkfs on sparse files, and the map of marks
//! that tracking keeps.
//!
//!     cargo bench --bench used_blocks
//!
//! Needs e2fsprogs and xfsprogs.

use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};

use criterion::{Criterion, criterion_group, criterion_main};
use holdstill::fs::{self, Opened};
use holdstill_platform::device::{Access, Disk};
use holdstill_platform::dirty::DirtyMap;

const TIB: u64 = 1 << 40;

fn mkfs(name: &str, options: &[&str], path: &Path) {
    let search = "/usr/sbin:/sbin:/usr/bin:/bin";
    let status = Command::new(name)
        .args(options)
        .arg(path)
        .env("PATH", search)
        .stdout(Stdio::null())
        .status();
    assert!(status.is_ok_and(|status| status.success()), "{name} failed");
}

/// Used bytes by the filesystem's own map.
fn used(path: &Path) -> u64 {
    let disk = Disk::open(path, Access::Read).expect("opens");
    let Opened::Known(filesystem) = fs::open(&disk).expect("is examined") else {
        panic!("the filesystem is not known");
    };
    filesystem
        .walk_used(&disk, &mut |_| Ok(()))
        .expect("a map")
        .used
        .0
}

fn maps(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    let mut group = criterion.benchmark_group("map of 1 TiB");
    group.sample_size(20);
    for (name, tool, options) in [
        (
            "ext4",
            "mkfs.ext4",
            &["-q", "-E", "nodiscard,lazy_itable_init=1"][..],
        ),
        ("xfs", "mkfs.xfs", &["-q", "-K"]),
        ("btrfs", "mkfs.btrfs", &["-q", "-K"]),
    ] {
        let path = dir.path().join(name);
        let file = File::create(&path).expect("a file");
        file.set_len(TIB).expect("a sparse file");
        mkfs(tool, options, &path);
        group.bench_function(name, |bencher| bencher.iter(|| used(black_box(&path))));
    }
    group.finish();
}

/// Marks of 1 TiB: what the trace's reader sets, and what a round takes.
fn marks(criterion: &mut Criterion) {
    let map = DirtyMap::new(TIB / 512, 3).expect("memory");
    let mut group = criterion.benchmark_group("marks of 1 TiB");
    let mut at = 0u64;
    group.bench_function("mark a request of 256 KiB", |bencher| {
        bencher.iter(|| {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            map.mark(black_box(at % (TIB / 512 - 512)), 512);
        });
    });
    map.clear();
    for number in 0..10_000u64 {
        map.mark(number * 200_003, 8);
    }
    group.bench_function("find all of 10,000", |bencher| {
        bencher.iter(|| {
            let (mut from, mut found) = (0, 0);
            while let Some(block) = map.find(from) {
                (from, found) = (block + 1, found + 1);
            }
            found
        });
    });
    group.finish();
}

criterion_group!(benches, maps, marks);
criterion_main!(benches);
