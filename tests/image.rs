//! Images in memory: what is written is read back; damage is found, wherever it is.

use std::sync::Mutex;

use holdstill::error::{Kind, Result};
use holdstill::extent::{Extent, ExtentSet};
use holdstill::image::content::{CellHasher, ContentHasher, zero_cell_hash};
use holdstill::image::format::{BLOCK, CELL};
use holdstill::image::index::IndexedImage;
use holdstill::image::manifest::{Blocks, Grade, Manifest, Trailer, VolumeManifest, VolumeTrailer};
use holdstill::image::reader::ImageReader;
use holdstill::image::tables::{Content, Run};
use holdstill::image::writer::ImageWriter;
use holdstill::pipeline::load::load;
use holdstill::pipeline::read::{OnReadError, Reading};
use holdstill::pipeline::receive::{Discard, Receive};
use holdstill::pipeline::store::{Compression, Job, store};
use holdstill::progress::Silent;
use holdstill::units::{ByteLen, Offset};
use proptest::prelude::*;

use crate::common::{self, threads};

/// Poison for whatever an image should not touch.
const UNTOUCHED: u8 = 0xA5;

fn manifest(size: u64) -> Manifest {
    Manifest {
        tool: "test".into(),
        created: "2026-01-01T00:00:00Z".into(),
        run_id: "test".into(),
        compress: "zstd:1".into(),
        parent: None,
        host: None,
        machine_id: None,
        streams: Vec::new(),
        volumes: vec![VolumeManifest {
            n: 1,
            path: "/dev/test".into(),
            fs: None,
            label: None,
            uuid: None,
            size,
            logical_sector: 512,
            physical_sector: 512,
            smallest_target: size,
            largest_target: None,
            sector_size: None,
            mount_point: None,
            blocks: Blocks::Used,
            used_bytes: size,
            group: None,
            subvolume: None,
        }],
    }
}

fn trailer(content_id: Option<String>) -> Trailer {
    Trailer {
        grade: Grade::Clean,
        freeze: "offline".into(),
        instant: "2026-01-01T00:00:00Z".into(),
        freeze_ms: 0.0,
        freezes: Vec::new(),
        content_id,
        warnings: Vec::new(),
        volumes: vec![VolumeTrailer {
            n: 1,
            grade: Grade::Clean,
            instant: "2026-01-01T00:00:00Z".into(),
            used_bytes: 0,
            unreadable: Vec::new(),
        }],
        streams: Vec::new(),
        commits: Vec::new(),
    }
}

/// Stores the runs of each pass, taken from the pass's own source, and returns the image.
pub(crate) fn image_of_runs(passes: &[(Vec<u8>, Vec<Run>)], compression: Compression) -> Vec<u8> {
    let size = passes[0].0.len() as u64;
    let max_plain = compression.chunk_len() as u32;
    let mut image = ImageWriter::begin(Vec::new(), [7; 16], max_plain, &manifest(size)).unwrap();
    for (pass, (source, runs)) in passes.iter().enumerate() {
        let job = Job {
            reading: Reading {
                source,
                volume: 1,
                on_read_error: OnReadError::Fail,
                bounds: threads(2),
            },
            pass: pass as u32,
            compression,
        };
        let walk = Box::new(move |sink: &mut dyn FnMut(Run) -> Result<()>| {
            runs.iter().try_for_each(|run| sink(*run))
        });
        store(&job, walk, &mut image, &Silent).unwrap();
    }
    let content_id = image.content_id().unwrap();
    let hex = content_id.map(|id| holdstill::image::content::to_hex(&id));
    image.finish(&trailer(hex)).unwrap().0
}

/// The same with data only.
fn image_of(passes: &[(Vec<u8>, Vec<Extent>)], compression: Compression) -> Vec<u8> {
    let data = |extent: &Extent| Run {
        extent: *extent,
        content: Content::Data,
    };
    let passes: Vec<_> = passes
        .iter()
        .map(|(source, extents)| (source.clone(), extents.iter().map(data).collect()))
        .collect();
    image_of_runs(&passes, compression)
}

/// A target in memory.
struct Memory(Mutex<Vec<u8>>);

impl Receive for Memory {
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        assert_eq!(volume, 1);
        let start = offset.0 as usize;
        self.0.lock().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&self, _: u32, extent: Extent) -> Result<()> {
        self.0.lock().unwrap()[extent.start.0 as usize..extent.end().0 as usize].fill(0);
        Ok(())
    }

    fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
        self.zeros(volume, extent)
    }
}

fn restored(image: &[u8], size: usize) -> Result<Vec<u8>> {
    let target = Memory(Mutex::new(vec![UNTOUCHED; size]));
    let mut reader = ImageReader::open(image)?;
    load(&mut reader, &target, threads(2), &Silent, |_| ())?;
    Ok(target.0.into_inner().unwrap())
}

/// A volume whose blocks are zero, compressible or noise, by one number each.
fn volume(blocks: &[u8], tail: usize) -> Vec<u8> {
    let mut bytes = vec![0; blocks.len() * BLOCK as usize + tail];
    let mut noise = 1u64;
    for (kind, block) in blocks.iter().zip(bytes.chunks_mut(BLOCK as usize)) {
        match kind % 3 {
            0 => {}
            1 => block.fill(*kind),
            _ => block.iter_mut().for_each(|byte| {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (noise >> 56) as u8;
            }),
        }
    }
    let len = bytes.len();
    bytes[len - tail..].fill(9);
    bytes
}

fn any_volume() -> impl Strategy<Value = Vec<u8>> {
    let run = (any::<u8>(), 1usize..200).prop_map(|(kind, len)| vec![kind; len]);
    (prop::collection::vec(run, 1..20), 0usize..4)
        .prop_map(|(runs, tail)| volume(&runs.concat(), tail * 512))
}

fn any_extents() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0u64..16_000_000, 1u64..300_000), 0..20)
}

fn extents_in(runs: &[(u64, u64)], size: usize) -> Vec<Extent> {
    let whole = Extent::new(0, size as u64);
    let clipped = runs
        .iter()
        .filter_map(|&(start, len)| Extent::new(start, len).intersect(whole));
    let set: ExtentSet = clipped.map(|run| run.align_out(BLOCK, whole.len)).collect();
    set.runs().to_vec()
}

/// The content id by its definition, from what the volume reads as.
fn content_id_of(bytes: &[u8]) -> String {
    let mut id = ContentHasher::new(1, 0);
    for (number, cell) in bytes.chunks(CELL as usize).enumerate() {
        let mut hasher = CellHasher::new();
        hasher.push(0, cell);
        let (hash, _) = hasher.finish();
        if hash != *zero_cell_hash() {
            id.cell(number as u64, &hash);
        }
    }
    id.end(ByteLen(bytes.len() as u64));
    holdstill::image::content::to_hex(&id.finish())
}

fn compressions() -> impl Strategy<Value = Compression> {
    prop_oneof![
        Just(Compression::None),
        Just(Compression::Zstd(1)),
        Just(Compression::Zstd(3))
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: common::count(24, 400) as u32, ..ProptestConfig::default() })]

    /// Every used block comes back, nothing else is touched, and the content id is that of the volume.
    #[test]
    fn images_give_back_what_was_stored(
        source in any_volume(), runs in any_extents(), compression in compressions(),
    ) {
        let extents = extents_in(&runs, source.len());
        let image = image_of(&[(source.clone(), extents.clone())], compression);
        let got = restored(&image, source.len()).unwrap();
        let mut expected = vec![UNTOUCHED; source.len()];
        let mut reads_as = vec![0; source.len()];
        for extent in &extents {
            let range = extent.start.0 as usize..extent.end().0 as usize;
            expected[range.clone()].copy_from_slice(&source[range.clone()]);
            reads_as[range.clone()].copy_from_slice(&source[range]);
        }
        prop_assert!(got == expected);
        let mut reader = ImageReader::open(image.as_slice()).unwrap();
        let end = load(&mut reader, &Discard, threads(2), &Silent, |_| ()).unwrap();
        prop_assert_eq!(end.trailer.content_id, Some(content_id_of(&reads_as)));
        prop_assert_eq!(end.len.0, image.len() as u64);
    }

    /// What a later pass says wins, in reading in order and by the index alike; the content id is that
    /// of what is left, although it was told while the image was written.
    #[test]
    fn later_passes_supersede(
        source in any_volume(), first in any_extents(),
        later in prop::collection::vec((any_extents(), any::<u8>()), 1..4),
        kinds in prop::collection::vec(0usize..3, 20), compression in compressions(),
        reads in prop::collection::vec((any::<u64>(), 1usize..3_000_000), 4),
    ) {
        let first = extents_in(&first, source.len());
        let mut expected = vec![UNTOUCHED; source.len()];
        let mut reads_as = vec![0; source.len()];
        let whole = Extent::new(0, source.len() as u64);
        let mut passes = vec![(source.clone(), Vec::new())];
        for extent in &first {
            let range = extent.start.0 as usize..extent.end().0 as usize;
            expected[range.clone()].copy_from_slice(&source[range.clone()]);
            reads_as[range.clone()].copy_from_slice(&source[range]);
            passes[0].1.push(Run { extent: *extent, content: Content::Data });
        }
        for (extents, fill) in later {
            let changed = vec![fill; source.len()];
            let mut runs = Vec::new();
            for (kind, extent) in kinds.iter().zip(extents_in(&extents, source.len())) {
                let range = extent.start.0 as usize..extent.end().0 as usize;
                let content = [Content::Data, Content::Zero, Content::Trim][*kind];
                let byte = if content == Content::Data { fill } else { 0 };
                reads_as[range.clone()].fill(byte);
                expected[range].fill(byte);
                runs.push(Run { extent, content });
            }
            passes.push((changed, runs));
        }
        let image = image_of_runs(&passes, compression);
        prop_assert!(restored(&image, source.len()).unwrap() == expected);
        let (indexed, summary) = IndexedImage::open(&image).unwrap();
        for (at, len) in reads {
            let extent = Extent::new(at % source.len() as u64, len as u64).intersect(whole).unwrap();
            let mut got = vec![UNTOUCHED; extent.len.as_usize()];
            indexed.read(1, extent.start, &mut got).unwrap();
            prop_assert!(got == reads_as[extent.start.0 as usize..extent.end().0 as usize]);
        }
        let id = holdstill::image::content::to_hex(&indexed.content_id().unwrap());
        prop_assert_eq!(&id, &content_id_of(&reads_as));
        prop_assert_eq!(summary.trailer.content_id, Some(id));
    }
}

/// An index segment so long that it is aligned in the image, as raw payloads are.
#[test]
fn an_index_of_many_records_is_read() {
    let source = vec![3; 240 << 20];
    let size = source.len();
    let run = |start, len, content| Run {
        extent: Extent::new(start, len),
        content,
    };
    let first = vec![run(0, size as u64, Content::Data)];
    // Pages of zeros take no memory; none of them is read.
    let later = vec![run(BLOCK, BLOCK, Content::Zero)];
    let image = image_of_runs(
        &[(source, first), (vec![0; size], later)],
        Compression::Zstd(1),
    );
    let (indexed, summary) = IndexedImage::open(&image).unwrap();
    let id = holdstill::image::content::to_hex(&indexed.content_id().unwrap());
    assert_eq!(summary.trailer.content_id, Some(id));
    let mut got = vec![UNTOUCHED; 2 * BLOCK as usize];
    indexed.read(1, Offset(BLOCK), &mut got).unwrap();
    let (zeroed, rest) = got.split_at(BLOCK as usize);
    assert!(zeroed.iter().all(|byte| *byte == 0) && rest.iter().all(|byte| *byte == 3));
}

fn small_image(compression: Compression) -> (Vec<u8>, Vec<u8>) {
    let source = volume(&[2, 0, 1, 5, 0, 0, 7, 2], 512);
    let whole = vec![Extent::new(0, source.len() as u64)];
    let patch = vec![Extent::new(BLOCK, BLOCK)];
    let passes = [(source.clone(), whole), (vec![3; source.len()], patch)];
    let image = image_of(&passes, compression);
    let restored = restored(&image, source.len()).unwrap();
    (image, restored)
}

/// No single flipped bit goes unnoticed, whether it hits data, headers, index, padding or footer.
#[test]
fn every_flipped_bit_is_found() {
    for compression in [Compression::None, Compression::Zstd(1)] {
        let (image, _) = small_image(compression);
        let seed = common::seed();
        let step = (image.len() * 8 / common::count(2_000, 100_000) as usize).max(1);
        let mut bit = seed as usize % step;
        while bit < image.len() * 8 {
            let mut damaged = image.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error =
                restored(&damaged, 8 * BLOCK as usize + 512).expect_err(&format!("bit {bit}"));
            assert_eq!(error.kind().exit_code(), 4, "bit {bit}: {error}");
            bit += step;
        }
    }
}

#[test]
fn every_truncation_and_extension_is_found() {
    let (image, _) = small_image(Compression::Zstd(1));
    let cuts = common::count(300, 10_000) as usize;
    for cut in (0..image.len()).step_by((image.len() / cuts).max(1)) {
        let error = restored(&image[..cut], 8 * BLOCK as usize + 512).unwrap_err();
        let expected = if cut == 0 {
            Kind::NotAnImage
        } else {
            Kind::Truncated
        };
        assert_eq!(error.kind(), expected, "cut at {cut}: {error}");
    }
    let mut longer = image;
    longer.push(0);
    assert_eq!(
        restored(&longer, 8 * BLOCK as usize + 512)
            .unwrap_err()
            .kind(),
        Kind::Damaged
    );
}

/// Records in another order than they were written, or from another image, are not believed.
#[test]
fn foreign_and_reordered_bytes_are_refused() {
    let (image, _) = small_image(Compression::None);
    for offset in (4096..image.len() - 4096).step_by(4096) {
        let mut swapped = image.clone();
        let (front, back) = swapped.split_at_mut(offset);
        if front[offset - 4096..] == back[..4096] {
            continue;
        }
        front[offset - 4096..].swap_with_slice(&mut back[..4096]);
        assert!(
            restored(&swapped, 8 * BLOCK as usize + 512).is_err(),
            "at {offset}"
        );
    }
}
