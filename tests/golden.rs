//! Golden images: what the writer makes of given content, byte by byte, and what the two readers,
//! this program's and the one in `reader.py`, make of the images.
//!
//! `HOLDSTILL_WRITE_GOLDEN=1` writes the images anew. As the format is frozen, that is only right for
//! new ones.

use std::path::{Path, PathBuf};

use ::holdstill::error::{Kind, Result};
use ::holdstill::extent::Extent;
use ::holdstill::image::content::to_hex;
use ::holdstill::image::format::{BLOCK, CELL, codec, feature};
use ::holdstill::image::index::IndexedImage;
use ::holdstill::image::manifest::{
    Blocks, FreezeTimes, Grade, Manifest, Parent, StreamManifest, StreamTrailer, Trailer,
    VolumeManifest, VolumeTrailer,
};
use ::holdstill::image::reader::ImageReader;
use ::holdstill::image::tables::{Content, Elide, Run, Tables};
use ::holdstill::image::writer::{DataRecord, ImageWriter};
use ::holdstill::pipeline::load::load;
use ::holdstill::pipeline::receive::Discard;
use ::holdstill::progress::Silent;
use ::holdstill::units::{ByteLen, Offset};

use crate::common::holdstill;
use crate::common::reseal::{records, reseal};
use crate::common::{output, temp_dir, threads};

const TIME: &str = "2026-11-22T14:02:07.12Z";
const CELL_LEN: usize = CELL as usize;
const BLOCK_LEN: usize = BLOCK as usize;

/// A golden image: its name, its bytes, and what its volumes and streams read as, or what whoever
/// refuses it says.
struct Golden {
    name: &'static str,
    image: Vec<u8>,
    expected: std::result::Result<Vec<Vec<u8>>, &'static str>,
}

fn manifest(sizes: &[usize]) -> Manifest {
    let volume = |(n, size): (u32, &usize)| VolumeManifest {
        n,
        path: format!("/dev/vg/volume{n}"),
        fs: Some("ext4".into()),
        label: Some("Zürich \"1\"".into()),
        uuid: None,
        size: *size as u64,
        logical_sector: 512,
        physical_sector: 4096,
        smallest_target: *size as u64,
        largest_target: None,
        sector_size: None,
        mount_point: None,
        blocks: Blocks::Used,
        used_bytes: *size as u64,
        group: None,
        subvolume: None,
    };
    Manifest {
        tool: "holdstill golden".into(),
        created: TIME.into(),
        run_id: "0123456789abcdef".into(),
        compress: "zstd:1".into(),
        parent: None,
        host: None,
        machine_id: None,
        volumes: (1..).zip(sizes).map(volume).collect(),
        streams: Vec::new(),
    }
}

/// Ends an image whose streams are so long.
fn finish(mut image: ImageWriter<Vec<u8>>, volumes: u32, streams: &[usize]) -> Vec<u8> {
    let content_id = image.content_id().unwrap().map(|id| to_hex(&id));
    let volume = |n| VolumeTrailer {
        n,
        grade: Grade::Frozen,
        instant: TIME.into(),
        used_bytes: 12_288,
        unreadable: vec![(4096, 512)],
    };
    let stream = |(n, len): (u32, &usize)| StreamTrailer {
        n,
        grade: Grade::Crash,
        instant: TIME.into(),
        len: *len as u64,
    };
    let trailer = Trailer {
        grade: match streams {
            [] => Grade::Frozen,
            _ => Grade::Crash,
        },
        freeze: "track".into(),
        instant: TIME.into(),
        freeze_ms: 84.5,
        freezes: vec![FreezeTimes {
            purpose: "final".into(),
            freeze_ms: 84.5,
            drain_ms: 1.0,
            read_ms: 80.0,
            thaw_ms: 0.5,
        }],
        content_id,
        warnings: vec!["a warning".into()],
        volumes: (1..=volumes).map(volume).collect(),
        streams: (volumes + 1..).zip(streams).map(stream).collect(),
        commits: Vec::new(),
    };
    image.finish(&trailer).unwrap().0
}

fn begin(manifest: &Manifest) -> ImageWriter<Vec<u8>> {
    let image_id = std::array::from_fn(|n| 0xf0 | n as u8);
    ImageWriter::begin(Vec::new(), image_id, 1 << 20, manifest).unwrap()
}

/// A zstd frame that no version of the compressor would make otherwise: one block a run of 4096
/// bytes, repeated bytes as such.
fn zstd_frame(plain: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend((plain.len() as u32).to_le_bytes());
    let count = plain.len().div_ceil(BLOCK_LEN);
    for (number, block) in plain.chunks(BLOCK_LEN).enumerate() {
        let is_repeated = block.iter().all(|byte| *byte == block[0]);
        let is_last = number + 1 == count;
        let header = block.len() << 3 | usize::from(is_repeated) << 1 | usize::from(is_last);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(if is_repeated { &block[..1] } else { block });
    }
    frame
}

/// Appends a record of one pass. `source` is what all of the volume reads as.
fn record(
    image: &mut ImageWriter<Vec<u8>>,
    (volume, pass): (u32, u32),
    source: &[u8],
    runs: &[(usize, usize, Content)],
    codec: u8,
) {
    let run = |&(start, len, content): &(usize, usize, Content)| Run {
        extent: Extent::new(start as u64, len as u64),
        content,
    };
    let runs: Vec<Run> = runs.iter().map(run).collect();
    let data = runs.iter().filter(|run| run.content == Content::Data);
    let plain: Vec<u8> = data
        .flat_map(|run| &source[run.extent.start.0 as usize..run.extent.end().0 as usize])
        .copied()
        .collect();
    let elide = match codec {
        codec::NONE => Elide::EveryBlock,
        _ => Elide::Ends,
    };
    let (tables, pieces) = Tables::describe(&runs, &plain, elide);
    let stored: Vec<u8> = pieces
        .into_iter()
        .flat_map(|piece| &plain[piece])
        .copied()
        .collect();
    append(image, (volume, pass), tables, stored, codec);
}

fn append(
    image: &mut ImageWriter<Vec<u8>>,
    (volume, pass): (u32, u32),
    tables: Tables,
    mut stored: Vec<u8>,
    codec: u8,
) {
    if codec == codec::ZSTD {
        stored = zstd_frame(&stored);
    }
    let record = DataRecord {
        volume,
        pass,
        tables,
        codec,
        payload_crc: crc32fast::hash(&stored),
    };
    image.data(&record, &[&stored]).unwrap();
}

/// Bytes that no two blocks have in common.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| (at / BLOCK_LEN) as u8 ^ (at % 251) as u8 ^ seed;
    (0..len).map(byte).collect()
}

use Content::{Data, Trim, Zero};

/// A volume of three cells and a short last block; used are parts of it.
fn plain() -> (Vec<u8>, Vec<u8>) {
    let size = 2 * CELL_LEN + 5 * BLOCK_LEN + 512;
    let mut source = vec![0; size];
    let end = 2 * CELL_LEN + 3 * BLOCK_LEN;
    source[..3 * BLOCK_LEN].fill(0x11);
    source[5 * BLOCK_LEN..7 * BLOCK_LEN].copy_from_slice(&pattern(2 * BLOCK_LEN, 1));
    source[end..].copy_from_slice(&pattern(size - end, 2));
    let mut image = begin(&manifest(&[size]));
    let runs = [(0, 8 * BLOCK_LEN, Data), (8 * BLOCK_LEN, CELL_LEN, Zero)];
    record(&mut image, (1, 0), &source, &runs, codec::ZSTD);
    let runs = [(end, BLOCK_LEN, Data), (end + 2 * BLOCK_LEN, 512, Data)];
    record(&mut image, (1, 0), &source, &runs, codec::NONE);
    source[end + BLOCK_LEN..end + 2 * BLOCK_LEN].fill(0);
    (finish(image, 1, &[]), source)
}

/// Data, zeros and trims of later passes over data of earlier ones.
fn superseded() -> (Vec<u8>, Vec<u8>) {
    let size = 3 * CELL_LEN;
    let mut image = begin(&manifest(&[size]));
    let mut source = vec![0; size];
    source[..6 * BLOCK_LEN].copy_from_slice(&pattern(6 * BLOCK_LEN, 3));
    source[CELL_LEN..CELL_LEN + BLOCK_LEN].fill(9);
    source[2 * CELL_LEN..2 * CELL_LEN + BLOCK_LEN].fill(7);
    record(
        &mut image,
        (1, 0),
        &source,
        &[(0, 6 * BLOCK_LEN, Data)],
        codec::NONE,
    );
    let runs = [(CELL_LEN, BLOCK_LEN, Data), (2 * CELL_LEN, BLOCK_LEN, Data)];
    record(&mut image, (1, 0), &source, &runs, codec::ZSTD);
    source[BLOCK_LEN..2 * BLOCK_LEN].fill(0x22);
    source[2 * BLOCK_LEN..4 * BLOCK_LEN].fill(0);
    source[CELL_LEN..CELL_LEN + BLOCK_LEN].fill(0);
    let runs = [
        (BLOCK_LEN, BLOCK_LEN, Data),
        (2 * BLOCK_LEN, BLOCK_LEN, Zero),
        (3 * BLOCK_LEN, BLOCK_LEN, Trim),
        (CELL_LEN, BLOCK_LEN, Trim),
    ];
    record(&mut image, (1, 1), &source, &runs, codec::ZSTD);
    source[3 * BLOCK_LEN..4 * BLOCK_LEN].fill(0x33);
    record(
        &mut image,
        (1, 2),
        &source,
        &[(3 * BLOCK_LEN, BLOCK_LEN, Data)],
        codec::ZSTD,
    );
    (finish(image, 1, &[]), source)
}

/// Three volumes, one of them without any block; two belong together, and their records alternate.
fn volumes() -> (Vec<u8>, Vec<Vec<u8>>) {
    let sizes = [2 * CELL_LEN, 4608, 2 * BLOCK_LEN];
    let mut manifest = manifest(&sizes);
    manifest.volumes[0].group = Some("pair".into());
    manifest.volumes[2].group = Some("pair".into());
    let mut image = begin(&manifest);
    let mut sources = sizes.map(|size| vec![0; size]);
    sources[0][..BLOCK_LEN].fill(1);
    sources[2] = pattern(2 * BLOCK_LEN, 4);
    record(
        &mut image,
        (1, 0),
        &sources[0],
        &[(0, BLOCK_LEN, Data)],
        codec::ZSTD,
    );
    record(
        &mut image,
        (3, 0),
        &sources[2],
        &[(0, 2 * BLOCK_LEN, Data)],
        codec::NONE,
    );
    sources[0][CELL_LEN..CELL_LEN + BLOCK_LEN].fill(2);
    record(
        &mut image,
        (1, 0),
        &sources[0],
        &[(CELL_LEN, BLOCK_LEN, Data)],
        codec::ZSTD,
    );
    (finish(image, 3, &[]), sources.into())
}

/// A volume, and a stream of a cell and a bit.
fn stream() -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut manifest = manifest(&[BLOCK_LEN]);
    manifest.streams.push(StreamManifest {
        n: 2,
        path: "pool/name".into(),
        kind: "zfs-send".into(),
        zfs: None,
    });
    let mut image = begin(&manifest);
    let volume = vec![5; BLOCK_LEN];
    record(
        &mut image,
        (1, 0),
        &volume,
        &[(0, BLOCK_LEN, Data)],
        codec::ZSTD,
    );
    let mut stream = vec![0x44; CELL_LEN + 1234];
    stream[CELL_LEN..].copy_from_slice(&pattern(1234, 5));
    let (first, last) = stream.split_at(CELL_LEN);
    let tables = Tables::describe_stream(Offset(0), first);
    append(&mut image, (2, 0), tables, first.to_vec(), codec::ZSTD);
    let tables = Tables::describe_stream(Offset(CELL), last);
    append(&mut image, (2, 0), tables, last.to_vec(), codec::NONE);
    let len = stream.len();
    (finish(image, 1, &[len]), vec![volume, stream])
}

/// A small image, with a change to its bytes that its checksums agree with.
fn changed(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let source = vec![6; BLOCK_LEN];
    let mut image = begin(&manifest(&[BLOCK_LEN]));
    record(
        &mut image,
        (1, 0),
        &source,
        &[(0, BLOCK_LEN, Data)],
        codec::ZSTD,
    );
    image.ignorable(0x80, b"of a later version").unwrap();
    let mut image = finish(image, 1, &[]);
    change(&mut image);
    reseal(&mut image);
    image
}

fn parent() -> Vec<u8> {
    let mut manifest = manifest(&[BLOCK_LEN]);
    manifest.parent = Some(Parent {
        image_id: "0f".repeat(16),
        root_hash: "f0".repeat(32),
    });
    finish(begin(&manifest), 1, &[])
}

fn all() -> Vec<Golden> {
    let small = || Ok(vec![vec![6; BLOCK_LEN]]);
    let (plain_image, plain_volume) = plain();
    let (superseded_image, superseded_volume) = superseded();
    let (volumes_image, volumes_expected) = volumes();
    let (stream_image, stream_expected) = stream();
    let golden = |name, image, expected| Golden {
        name,
        image,
        expected,
    };
    vec![
        golden("plain", plain_image, Ok(vec![plain_volume])),
        golden("superseded", superseded_image, Ok(vec![superseded_volume])),
        golden("volumes", volumes_image, Ok(volumes_expected)),
        golden("stream", stream_image, Ok(stream_expected)),
        golden("compatible", changed(|image| image[31] = 0x80), small()),
        golden(
            "read-only-compatible",
            changed(|image| image[39] = 0x80),
            small(),
        ),
        golden(
            "incompatible",
            changed(|image| image[47] = 0x80),
            Err("feature bits 0x8000000000000000"),
        ),
        golden("parent", parent(), Err("a parent image (incremental)")),
        golden(
            "encrypted",
            changed(|image| {
                image[40] = feature::ENCRYPTED as u8;
                image[76] = 2;
                image[77] = 1;
                image[80..112].fill(0xaa);
            }),
            Err("encryption, hash kind 2"),
        ),
        golden(
            "encrypted-record",
            changed(|image| {
                let data = records(image)[1];
                image[data + 6] |= 2;
            }),
            Err("an encrypted record"),
        ),
        golden(
            "mirrored",
            changed(|image| image[40] = feature::MIRRORED as u8),
            Err("mirrored extents"),
        ),
    ]
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The format is stable: the same content makes the same bytes as when it was frozen.
#[test]
fn images_are_written_as_they_always_were() {
    let images = all();
    for golden in &images {
        let path = folder().join(format!("{}.still", golden.name));
        if std::env::var_os("HOLDSTILL_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &golden.image).unwrap();
        }
        let stored = std::fs::read(&path).unwrap();
        let differs = stored.iter().zip(&golden.image).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{} differs from this byte on", golden.name);
        assert_eq!(stored.len(), golden.image.len(), "{}", golden.name);
    }
    let count = std::fs::read_dir(folder()).unwrap().count();
    assert_eq!(
        count,
        images.len(),
        "every image here is made by this program"
    );
}

/// Both ways of reading, in order and by the index.
fn read(image: &Vec<u8>) -> Result<Vec<Vec<u8>>> {
    let mut reader = ImageReader::open(image.as_slice())?;
    let end = load(&mut reader, &Discard, threads(2), &Silent, |_| ())?;
    let (indexed, summary) = IndexedImage::open(image)?;
    assert_eq!(
        summary.trailer.content_id,
        Some(to_hex(&indexed.content_id()?))
    );
    assert_eq!((summary.root_hash, summary.len), (end.root_hash, end.len));
    let lens = indexed.manifest().sizes().collect::<Vec<ByteLen>>();
    let streams = summary
        .trailer
        .streams
        .iter()
        .map(|stream| ByteLen(stream.len));
    let mut contents = Vec::new();
    for (n, len) in (1..).zip(lens.into_iter().chain(streams)) {
        let mut content = vec![0xa5; len.as_usize()];
        indexed.read(n, Offset::ZERO, &mut content)?;
        contents.push(content);
    }
    Ok(contents)
}

#[test]
fn golden_images_are_read_or_refused_by_name() {
    for golden in all() {
        match (read(&golden.image), golden.expected) {
            (Ok(contents), Ok(expected)) => assert!(contents == expected, "{}", golden.name),
            (Err(error), Err(expected)) => {
                assert_eq!(error.kind(), Kind::Incompatible, "{}: {error}", golden.name);
                assert!(
                    error.to_string().contains(expected),
                    "{}: {error}",
                    golden.name
                );
            }
            (got, _) => panic!("{}: {:?}", golden.name, got.map(|_| ())),
        }
    }
}

/// The program itself says the same, in one line.
#[test]
fn the_program_reads_or_refuses_golden_images() {
    for golden in all() {
        let dir = temp_dir();
        let image = folder().join(format!("{}.still", golden.name));
        let target = dir.path().join("target");
        let verify = holdstill::run([Path::new("verify"), &image]);
        let inspect = holdstill::run([Path::new("inspect"), &image]);
        let args = [
            Path::new("restore"),
            &image,
            &target,
            Path::new("--volume"),
            Path::new("1"),
        ];
        let restore = holdstill::run(args);
        match golden.expected {
            Ok(contents) => {
                verify.expect(0);
                inspect.expect(0);
                restore.expect(0);
                assert!(
                    std::fs::read(&target).unwrap() == contents[0],
                    "{}",
                    golden.name
                );
            }
            Err(why) => {
                verify.expect(4).says(why);
                restore.expect(4).says(why);
                // `inspect` reads only the front and the end.
                if golden.name != "encrypted-record" {
                    inspect.expect(4).says(why);
                }
                assert!(!target.exists());
            }
        }
    }
    let stream = folder().join("stream.still");
    let args = [
        Path::new("restore"),
        &stream,
        Path::new("/nowhere/target"),
        Path::new("--volume"),
        Path::new("2"),
    ];
    holdstill::run(args)
        .expect(3)
        .says("is a stream (zfs-send of pool/name)");
}

#[test]
fn the_reader_written_from_the_specification_agrees() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader.py");
    for golden in all() {
        let dir = temp_dir();
        let image = folder().join(format!("{}.still", golden.name));
        let done = output("python3", [&script, &image, &dir.path().to_owned()]);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        match golden.expected {
            Ok(expected) => {
                assert!(done.status.success(), "{}: {said}", golden.name);
                for (n, content) in (1..).zip(expected) {
                    let restored = std::fs::read(dir.path().join(format!("{n}.raw"))).unwrap();
                    assert!(restored == content, "{}, volume {n}", golden.name);
                }
            }
            Err(_) => {
                assert_eq!(done.status.code(), Some(4), "{}: {said}", golden.name);
                assert!(
                    said.contains("this reader does not have"),
                    "{}: {said}",
                    golden.name
                );
            }
        }
    }
}
