//! An image as input: a file, or a stream on standard input.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Kind, Result};
use crate::image::content::{Hash, from_hex, to_hex};
use crate::image::reader::ImageReader;

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
