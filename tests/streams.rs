//! Opaque streams through an image, without the tools that write and read them.

use std::sync::Mutex;

use holdstill::error::{Kind, Result};
use holdstill::extent::Extent;
use holdstill::image::manifest::{
    Grade, Manifest, StreamManifest, StreamTrailer, Trailer, ZFS_SEND,
};
use holdstill::image::reader::ImageReader;
use holdstill::image::writer::ImageWriter;
use holdstill::pipeline::load::load;
use holdstill::pipeline::receive::Receive;
use holdstill::pipeline::store::Compression;
use holdstill::pipeline::stream::{InOrder, store_stream};
use holdstill::progress::Silent;
use holdstill::units::Offset;
use holdstill_platform::stream::Reader;

use crate::common::{Rng, seed, temp_dir, threads};

fn manifest(streams: u32) -> Manifest {
    let stream = |n| StreamManifest {
        n,
        path: format!("pool/{n}"),
        kind: ZFS_SEND.into(),
        zfs: None,
    };
    Manifest {
        tool: "test".into(),
        created: "2026-01-01T00:00:00Z".into(),
        run_id: "test".into(),
        compress: "zstd:1".into(),
        host: None,
        machine_id: None,
        parent: None,
        volumes: Vec::new(),
        streams: (1..=streams).map(stream).collect(),
    }
}

/// An image of these streams, each read from a file.
fn image_of(streams: &[Vec<u8>], compression: Compression) -> Vec<u8> {
    let dir = temp_dir();
    let max_plain = compression.chunk_len() as u32;
    let manifest = manifest(streams.len() as u32);
    let mut image = ImageWriter::begin(Vec::new(), [7; 16], max_plain, &manifest).unwrap();
    let mut trailers = Vec::new();
    for (n, stream) in (1..).zip(streams) {
        let path = dir.path().join(n.to_string());
        std::fs::write(&path, stream).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        let bounds = threads(3);
        let len = store_stream(&mut reader, n, compression, bounds, &mut image, &Silent).unwrap();
        assert_eq!(len.0, stream.len() as u64);
        trailers.push(StreamTrailer {
            n,
            grade: Grade::Frozen,
            instant: "2026-01-01T00:00:00Z".into(),
            len: len.0,
        });
    }
    let content_id = image.content_id().unwrap();
    let trailer = Trailer {
        grade: Grade::Frozen,
        freeze: "zfs".into(),
        instant: "2026-01-01T00:00:00Z".into(),
        freeze_ms: 0.0,
        freezes: Vec::new(),
        content_id: content_id.map(|id| holdstill::image::content::to_hex(&id)),
        warnings: Vec::new(),
        volumes: Vec::new(),
        streams: trailers,
        commits: Vec::new(),
    };
    image.finish(&trailer).unwrap().0
}

/// Whoever reads the streams, in order.
struct Readers(Vec<InOrder<Vec<u8>>>);

impl Receive for Readers {
    fn data(&self, n: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        self.0[n as usize - 1].push(offset, bytes, &Silent)
    }

    fn zeros(&self, _: u32, _: Extent) -> Result<()> {
        panic!("a stream has no holes")
    }

    fn trim(&self, _: u32, _: Extent) -> Result<()> {
        panic!("a stream has no holes")
    }
}

fn read_back(image: &[u8], streams: usize) -> Result<Vec<Vec<u8>>> {
    let readers = Readers((0..streams).map(|_| InOrder::new(Vec::new())).collect());
    let mut reader = ImageReader::open(image)?;
    load(&mut reader, &readers, threads(3), &Silent, |_| ())?;
    readers.0.into_iter().map(InOrder::finish).collect()
}

#[test]
fn streams_of_any_length_come_back_in_order() {
    let mut rng = Rng(seed());
    let streams: Vec<Vec<u8>> = [0, 1, 312, 4096, 1 << 20, (2 << 20) - 1, (9 << 20) + 1234]
        .into_iter()
        .map(|len| {
            let mut bytes = vec![0; len];
            // Half of it compresses.
            rng.fill(&mut bytes[len / 2..]);
            bytes
        })
        .collect();
    for compression in [
        Compression::None,
        Compression::Zstd(1),
        Compression::Zstd(3),
    ] {
        let image = image_of(&streams, compression);
        assert!(read_back(&image, streams.len()).unwrap() == streams);
    }
}

/// Of a damaged image, the end of a stream never reaches whoever reads it.
#[test]
fn the_end_of_a_damaged_stream_is_held_back() {
    struct Shared<'a>(&'a Mutex<Vec<u8>>);
    impl std::io::Write for Shared<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    struct One<'a>(InOrder<Shared<'a>>);
    impl Receive for One<'_> {
        fn data(&self, _: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
            self.0.push(offset, bytes, &Silent)
        }
        fn zeros(&self, _: u32, _: Extent) -> Result<()> {
            Ok(())
        }
        fn trim(&self, _: u32, _: Extent) -> Result<()> {
            Ok(())
        }
        fn abandon(&self) {
            self.0.abandon();
        }
    }
    let mut rng = Rng(seed());
    let mut stream = vec![0; 3 << 20];
    rng.fill(&mut stream);
    let image = image_of(std::slice::from_ref(&stream), Compression::Zstd(1));
    for _ in 0..crate::common::count(40, 400) {
        let mut damaged = image.clone();
        let at = rng.below(image.len() as u64) as usize;
        damaged[at] ^= 1 << rng.below(8);
        let seen = Mutex::new(Vec::new());
        let Ok(mut reader) = ImageReader::open(&damaged[..]) else {
            continue;
        };
        let one = One(InOrder::new(Shared(&seen)));
        let error = load(&mut reader, &one, threads(3), &Silent, |_| ()).unwrap_err();
        assert!(matches!(
            error.kind(),
            Kind::Damaged | Kind::Truncated | Kind::Incompatible
        ));
        let seen = seen.lock().unwrap();
        assert!(seen.len() < stream.len() && stream.starts_with(&seen));
    }
}
