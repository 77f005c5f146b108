//! Reads an image that anybody may have made, in every way there is, and checks that nothing is handed out
//! that is outside of its volumes. Also for the fuzzer, so it uses nothing of the tests.

use holdstill::error::{Kind, Result};
use holdstill::extent::Extent;
use holdstill::image::index::IndexedImage;
use holdstill::image::manifest::Manifest;
use holdstill::image::reader::{Front, ImageReader, Lost};
use holdstill::pipeline::Bounds;
use holdstill::pipeline::load::load;
use holdstill::pipeline::receive::Receive;
use holdstill::progress::Silent;
use holdstill::units::{ByteLen, Offset};

/// Bytes of the file header.
const FRAME: usize = 4096;
/// No more threads than needed.
const ALONE: Bounds = Bounds {
    threads: 1,
    memory: None,
};

/// Checks that everything lies where it may, and takes damage in or not.
struct Watcher {
    manifest: Manifest,
    is_tolerant: bool,
}

impl Watcher {
    fn check(&self, volume: u32, extent: Extent) {
        let n = volume as usize - 1;
        let streams = self.manifest.streams.len();
        match self.manifest.volumes.get(n) {
            Some(volume) => assert!(extent.end().0 <= volume.size, "{extent:?} of {volume:?}"),
            None => assert!(
                n - self.manifest.volumes.len() < streams,
                "no volume {volume}"
            ),
        }
    }
}

impl Receive for Watcher {
    fn data(&self, volume: u32, offset: Offset, bytes: &[u8]) -> Result<()> {
        self.check(volume, Extent::new(offset.0, bytes.len() as u64));
        Ok(())
    }

    fn zeros(&self, volume: u32, extent: Extent) -> Result<()> {
        self.check(volume, extent);
        Ok(())
    }

    fn trim(&self, volume: u32, extent: Extent) -> Result<()> {
        self.check(volume, extent);
        Ok(())
    }

    fn damaged(&self, lost: Lost) -> Result<()> {
        if !self.is_tolerant {
            return Err(lost.error);
        }
        Ok(())
    }
}

/// Reads an image in every way there is; whether it was whole by reading in order. `below` chooses a number
/// below another.
pub(crate) fn read_all_ways(image: &Vec<u8>, below: &mut dyn FnMut(u64) -> u64) -> bool {
    let in_order = ImageReader::open(image.as_slice()).and_then(|mut reader| {
        let manifest = reader.manifest().clone();
        let watcher = Watcher {
            manifest,
            is_tolerant: false,
        };
        load(&mut reader, &watcher, ALONE, &Silent, |_| ())
    });
    let behind_damage = ImageReader::open(image.as_slice()).or_else(|error| {
        let front = Front::from_end(image)?;
        let rest = image.get(FRAME..).unwrap_or_default();
        Ok::<_, holdstill::error::Error>(ImageReader::open_behind(front, error, rest))
    });
    if let Ok(mut reader) = behind_damage {
        reader.go_on_behind_damage();
        let manifest = reader.manifest().clone();
        let watcher = Watcher {
            manifest,
            is_tolerant: true,
        };
        if let Err(error) = load(&mut reader, &watcher, ALONE, &Silent, |_| ()) {
            assert_eq!(error.kind().exit_code(), 4, "{error}");
        }
    }
    let by_index = IndexedImage::open(image).and_then(|(indexed, _)| {
        let sizes: Vec<ByteLen> = indexed.manifest().sizes().collect();
        for (n, size) in (1..).zip(sizes) {
            let mut buf = vec![0; below(100_000).min(size.0) as usize];
            let at = below(size.0 - buf.len() as u64 + 1);
            indexed.read(n, Offset(at), &mut buf)?;
            indexed
                .read(n, Offset(size.0), &mut [0])
                .expect_err("behind the end");
        }
        indexed.content_id()
    });
    for error in [in_order.as_ref().err(), by_index.as_ref().err()]
        .into_iter()
        .flatten()
    {
        // Reading behind the end of the bytes is an I/O error where a file would give one.
        let is_known = error.kind().exit_code() == 4 || error.kind() == Kind::Io;
        assert!(is_known, "{error}");
    }
    in_order.is_ok()
}
