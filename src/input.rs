//! An image as input: a file, or a stream on standard input.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Kind, Result};
use crate::image::content::{ContentHasher, Hash, from_hex, to_hex, zero_cell_hash};
use crate::image::reader::{DataHead, ImageReader};
use crate::image::tables::cells_of;
use crate::units::ByteLen;

/// Small reads (headers and tables) are gathered; payloads are longer and pass by.
const READ_AHEAD: usize = 64 << 10;

/// The reader of an image that was opened by name.
pub type NamedImage = ImageReader<BufReader<Box<dyn Read + Send>>>;

/// Opens an image; `-` is standard input.
///
/// # Errors
/// If it cannot be opened or is no image.
pub fn open(path: &Path) -> Result<NamedImage> {
    let input: Box<dyn Read + Send> = if is_stdin(path) {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(path).context("cannot open the image", path)?)
    };
    ImageReader::open(BufReader::with_capacity(READ_AHEAD, input))
        .map_err(|error| error.on(name(path)))
}

/// Whether `path` stands for standard input.
pub fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}

/// What to call it in messages.
pub fn name(path: &Path) -> PathBuf {
    if is_stdin(path) {
        PathBuf::from("(standard input)")
    } else {
        path.to_owned()
    }
}

/// Adds up the content id while an image is read in order.
#[derive(Debug)]
pub struct ContentCheck {
    hasher: ContentHasher,
    sizes: Vec<ByteLen>,
    begun: usize,
    /// Superseded blocks make the hashes of whole cells void.
    is_known: bool,
}

impl ContentCheck {
    /// For volumes of these sizes.
    pub fn new(sizes: Vec<ByteLen>) -> Self {
        Self {
            hasher: ContentHasher::new(sizes.len()),
            sizes,
            begun: 0,
            is_known: true,
        }
    }

    /// Adds a record; records come in order.
    pub fn add(&mut self, head: &DataHead) {
        self.is_known &= head.pass == 0 && head.whole_cells && head.volume as usize >= self.begun;
        if !self.is_known {
            return;
        }
        self.begin_up_to(head.volume as usize);
        for (cell, hash) in cells_of(head.tables.data_extents()).zip(&head.tables.hashes) {
            if hash != zero_cell_hash() {
                self.hasher.cell(cell, hash);
            }
        }
    }

    fn begin_up_to(&mut self, volume: usize) {
        while self.begun < volume {
            if self.begun > 0 {
                self.hasher.end_volume();
            }
            self.hasher.volume(self.sizes[self.begun]);
            self.begun += 1;
        }
    }

    /// The content id; `None` if it cannot be told from the records' own hashes.
    pub fn finish(mut self) -> Option<Hash> {
        self.begin_up_to(self.sizes.len());
        if !self.sizes.is_empty() {
            self.hasher.end_volume();
        }
        self.is_known.then(|| self.hasher.finish())
    }
}

/// Checks a computed content id against what the image says of itself.
///
/// # Errors
/// [`Kind::Damaged`] if they differ.
pub fn check_content_id(computed: Option<&Hash>, said: Option<&str>) -> Result<()> {
    match (computed, said) {
        (Some(computed), Some(said)) if from_hex(said) != Some(*computed) => Err(Error::new(
            Kind::Damaged,
            format!(
                "the image is damaged: its content is {}, not {said}",
                to_hex(computed)
            ),
        )),
        _ => Ok(()),
    }
}
