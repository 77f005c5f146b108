//! The hot parts of a copy: what each byte goes through between a disk and an image.
//!
//!     cargo bench --bench pipeline

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use holdstill::error::Result;
use holdstill::extent::Extent;
use holdstill::image::content::is_zero;
use holdstill::image::format::CELL;
use holdstill::image::manifest::{Blocks, Grade, Manifest, Trailer, VolumeManifest, VolumeTrailer};
use holdstill::image::reader::ImageReader;
use holdstill::image::tables::{Content, Elide, Run, Tables};
use holdstill::image::writer::ImageWriter;
use holdstill::pipeline::Bounds;
use holdstill::pipeline::load::load;
use holdstill::pipeline::read::{OnReadError, Reading};
use holdstill::pipeline::receive::Discard;
use holdstill::pipeline::store::{Compression, Job, store};
use holdstill::progress::Silent;

/// Bytes of the volume that is stored and read.
const SIZE: usize = 64 << 20;

/// A fifth is noise, a tenth zeros, the rest compresses to about half.
fn volume() -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        // xorshift64: noise enough for a compressor.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        let place = bytes.len() >> 20;
        let word = next();
        match place % 10 {
            0 | 5 => bytes.extend(word.to_le_bytes()),
            9 => bytes.extend([0; 8]),
            // Few different bytes, in repeating phrases.
            _ if word % 4 == 0 => bytes.extend(b"the quick brown fox "),
            _ => bytes.extend(format!("{:x}", word & 0xffff_ffff).bytes()),
        }
    }
    bytes.truncate(SIZE);
    bytes
}

fn manifest() -> Manifest {
    let volume = VolumeManifest {
        n: 1,
        path: "bench".to_owned(),
        fs: None,
        label: None,
        uuid: None,
        size: SIZE as u64,
        logical_sector: 512,
        physical_sector: 512,
        largest_target: None,
        sector_size: None,
        mount_point: None,
        smallest_target: SIZE as u64,
        blocks: Blocks::All,
        used_bytes: SIZE as u64,
        group: None,
        subvolume: None,
    };
    Manifest {
        tool: "bench".to_owned(),
        created: "2026-01-01T00:00:00Z".to_owned(),
        run_id: "bench".to_owned(),
        compress: "bench".to_owned(),
        host: None,
        machine_id: None,
        parent: None,
        volumes: vec![volume],
        streams: Vec::new(),
    }
}

fn trailer() -> Trailer {
    Trailer {
        grade: Grade::Clean,
        freeze: "offline".to_owned(),
        instant: "2026-01-01T00:00:00Z".to_owned(),
        freeze_ms: 0.0,
        freezes: Vec::new(),
        content_id: None,
        warnings: Vec::new(),
        volumes: vec![VolumeTrailer {
            n: 1,
            grade: Grade::Clean,
            instant: "2026-01-01T00:00:00Z".to_owned(),
            used_bytes: SIZE as u64,
            unreadable: Vec::new(),
        }],
        streams: Vec::new(),
        commits: Vec::new(),
    }
}

/// Everything of `source`, as an image in memory.
fn image_of(source: &Vec<u8>, compression: Compression, bounds: Bounds) -> Vec<u8> {
    let run = Run {
        extent: Extent::new(0, SIZE as u64),
        content: Content::Data,
    };
    let job = Job {
        reading: Reading {
            source,
            volume: 1,
            on_read_error: OnReadError::Fail,
            bounds,
        },
        pass: 0,
        compression,
    };
    let max_plain = compression.chunk_len() as u32;
    let sink = Vec::with_capacity(SIZE + (1 << 20));
    let mut image = ImageWriter::begin(sink, [7; 16], max_plain, &manifest()).expect("begins");
    let walk = move |sink: &mut dyn FnMut(Run) -> Result<()>| sink(run);
    store(&job, Box::new(walk), &mut image, &Silent).expect("stores");
    image.finish(&trailer()).expect("ends").0
}

/// A volume into an image and out of it, with one thread and with as many as a run takes by default.
fn through_an_image(criterion: &mut Criterion) {
    let source = volume();
    let one = Bounds {
        threads: 1,
        memory: None,
    };
    let mut group = criterion.benchmark_group("image");
    group
        .throughput(Throughput::Bytes(SIZE as u64))
        .sample_size(10);
    for compression in [
        Compression::None,
        Compression::Zstd(1),
        Compression::Zstd(3),
    ] {
        for (threads, bounds) in [("one thread", one), ("all threads", Bounds::default())] {
            group.bench_function(format!("store/{compression}/{threads}"), |bencher| {
                bencher.iter(|| black_box(image_of(&source, compression, bounds)));
            });
            let image = image_of(&source, compression, bounds);
            group.bench_function(format!("verify/{compression}/{threads}"), |bencher| {
                bencher.iter(|| {
                    let mut reader = ImageReader::open(image.as_slice()).expect("opens");
                    load(&mut reader, &Discard, bounds, &Silent, |_| ()).expect("is whole")
                });
            });
        }
    }
    group.finish();
}

/// What a chunk costs before it is compressed: which blocks are zeros, and the hash of each cell.
fn content(criterion: &mut Criterion) {
    let source = volume();
    let chunk = &source[..Compression::Zstd(1).chunk_len()];
    let runs = [Run {
        extent: Extent::new(0, chunk.len() as u64),
        content: Content::Data,
    }];
    let mut group = criterion.benchmark_group("content");
    group.throughput(Throughput::Bytes(chunk.len() as u64));
    group.bench_function("describe", |bencher| {
        bencher.iter(|| Tables::describe(black_box(&runs), black_box(chunk), Elide::Ends));
    });
    group.throughput(Throughput::Bytes(CELL));
    let zeros = vec![0; CELL as usize];
    group.bench_function("is_zero", |bencher| {
        bencher.iter(|| is_zero(black_box(&zeros)));
    });
    group.bench_function("crc32", |bencher| {
        bencher.iter(|| crc32fast::hash(black_box(&source[..CELL as usize])));
    });
    group.bench_function("blake3", |bencher| {
        bencher.iter(|| blake3::hash(black_box(&source[..CELL as usize])));
    });
    let mut zstd = zstd::bulk::Compressor::new(1).expect("a compressor");
    group.throughput(Throughput::Bytes(chunk.len() as u64));
    group.bench_function("zstd level 1", |bencher| {
        bencher.iter_batched_ref(
            || vec![0; chunk.len()],
            |room| zstd.compress_to_buffer(black_box(chunk), room.as_mut_slice()),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, through_an_image, content);
criterion_main!(benches);
