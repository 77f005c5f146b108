//! An image as input: a file, or a stream on standard input.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::extents_below::Extents;
use holdstill_platform::node::Node;
use holdstill_platform::stream::Reader;

use crate::error::{Error, IoContext, Kind, Result};
use crate::image::content::{Hash, RunningContent, from_hex, to_hex};
use crate::image::format::FRAME;
use crate::image::index::IndexedImage;
use crate::image::reader::{Front, ImageReader, summarize};
use crate::progress::Progress;
use crate::units::Offset;

/// Small reads (headers and tables) are gathered; payloads are longer and pass by.
const READ_AHEAD: usize = 64 << 10;

/// The reader of an image that was opened by name.
pub type NamedImage<'a> = ImageReader<BufReader<Box<dyn Read + 'a>>>;

/// How long a silent stream is waited for before looking whether we were asked to stop.
const PATIENCE: Duration = Duration::from_millis(200);

/// Opens an image; `-` is standard input.
///
/// # Errors
/// If it cannot be opened or is no image; the request to stop.
pub fn open<'a>(path: &Path, progress: &'a dyn Progress) -> Result<NamedImage<'a>> {
    let input: Box<dyn Read + 'a> = if is_stream(path) {
        let reader = match is_stdin(path) {
            true => Reader::stdin(),
            false => Reader::open(path),
        };
        Box::new(Stream {
            reader: reader?,
            progress,
        })
    } else {
        Box::new(File::open(path).context("cannot open the image", path)?)
    };
    ImageReader::open(BufReader::with_capacity(READ_AHEAD, input))
        .map_err(|error| progress.check().err().unwrap_or(error).on(name(path)))
}

/// A pipe, which may stay silent for ever.
struct Stream<'a> {
    reader: Reader,
    progress: &'a dyn Progress,
}

impl Read for Stream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.reader.read_within(buf, PATIENCE)? {
                Some(count) => return Ok(count),
                None if self.progress.stop().is_none() => {}
                None => return Err(std::io::Error::other("asked to stop")),
            }
        }
    }
}

/// Opens an image that may be damaged, and goes on behind damage. Where its front is lost, a file may
/// still have it at its end.
///
/// # Errors
/// As [`open`]; if the front is lost for good.
pub fn open_damaged<'a>(path: &Path, progress: &'a dyn Progress) -> Result<NamedImage<'a>> {
    let error = match open(path, progress) {
        Ok(mut image) => {
            image.go_on_behind_damage();
            return Ok(image);
        }
        Err(error) => error,
    };
    let is_front = matches!(error.kind(), Kind::Damaged | Kind::NotAnImage);
    if !is_front || is_stream(path) {
        return Err(error);
    }
    let Ok(front) = Disk::open(path, Access::Read)
        .map_err(Error::from)
        .and_then(|disk| Front::from_end(&disk))
    else {
        return Err(error);
    };
    let error = match error.kind() {
        Kind::NotAnImage => Error::new(
            Kind::Damaged,
            "the image is damaged: it does not begin as images do",
        )
        .at(Offset::ZERO),
        _ => error,
    };
    let mut file = File::open(path).context("cannot open the image", path)?;
    file.seek(SeekFrom::Start(FRAME as u64))
        .context("cannot read", path)?;
    let input: Box<dyn Read + 'a> = Box::new(file);
    let input = BufReader::with_capacity(READ_AHEAD, input);
    Ok(ImageReader::open_behind(front, error, input))
}

/// Whether it can be read only once.
pub fn is_stream(path: &Path) -> bool {
    let is_file = |kind: std::fs::FileType| kind.is_file() || kind.is_block_device();
    is_stdin(path) || std::fs::metadata(path).is_ok_and(|found| !is_file(found.file_type()))
}

/// The bytes that an image lies on; a pipe has none.
///
/// # Errors
/// If it cannot be looked up.
pub fn extents(path: &Path) -> Result<Extents> {
    Ok(match is_stdin(path) {
        true => Extents::of_open(std::io::stdin())?,
        false => Extents::of_node(&Node::of(path)?)?,
    })
}

/// Checks both ends of an image in a file, before anything is done with it; a stream has no end yet.
///
/// # Errors
/// [`Kind::Truncated`], [`Kind::Damaged`] and their kin.
pub fn check_ends(path: &Path) -> Result<()> {
    if is_stream(path) {
        return Ok(());
    }
    let disk = Disk::open(path, Access::Read)?;
    summarize(&disk).map(drop).map_err(|error| error.on(path))
}

/// The content id of an image that was read in order: as it was added up on the way or, where blocks
/// were superseded, from the image read once more. `None` if it cannot be read again.
///
/// # Errors
/// If reading it again fails.
pub fn content_id(path: &Path, running: RunningContent) -> Result<Option<Hash>> {
    match running.finish() {
        Some(id) => Ok(Some(id)),
        None if is_stream(path) => Ok(None),
        None => {
            let disk = Disk::open(path, Access::Read)?;
            let (image, _) = IndexedImage::open(&disk)?;
            image.content_id().map(Some)
        }
    }
}

/// The id that an image must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpectedId {
    /// The id of the file.
    Image([u8; 16]),
    /// The root hash or the content id.
    Hash(Hash),
}

impl FromStr for ExpectedId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let image = from_hex(text).map(Self::Image);
        image
            .or_else(|| from_hex(text).map(Self::Hash))
            .ok_or_else(|| {
                Error::new(Kind::Usage, format!("`{text}` is no id of an image"))
                    .hint("an image id has 32 hexadecimal digits, a content id or root hash 64")
            })
    }
}

impl ExpectedId {
    /// Checks what can be told before the image is read: the image id, and of a file also what it
    /// says of itself at its end.
    ///
    /// # Errors
    /// [`Kind::UnexpectedImage`].
    pub fn check_front(self, path: &Path, image_id: &[u8; 16]) -> Result<()> {
        match self {
            Self::Image(expected) if expected == *image_id => Ok(()),
            Self::Image(_) => Err(unexpected(format!("its image id is {}", to_hex(image_id)))),
            Self::Hash(_) if is_stream(path) => Ok(()),
            Self::Hash(expected) => {
                let disk = Disk::open(path, Access::Read)?;
                // A damaged end is for the reading itself to find.
                let Ok(summary) = summarize(&disk) else {
                    return Ok(());
                };
                let content_id = summary.trailer.content_id.as_deref().and_then(from_hex);
                // Where the image does not say its content id, only the reading can tell.
                if content_id.is_none() {
                    return Ok(());
                }
                check_hash(&expected, &summary.root_hash, content_id.as_ref())
            }
        }
    }

    /// Checks what was found by reading all of it.
    ///
    /// # Errors
    /// [`Kind::UnexpectedImage`].
    pub fn check_end(self, root_hash: &Hash, content_id: Option<&Hash>) -> Result<()> {
        match self {
            Self::Image(_) => Ok(()),
            Self::Hash(expected) => check_hash(&expected, root_hash, content_id),
        }
    }
}

fn check_hash(expected: &Hash, root_hash: &Hash, content_id: Option<&Hash>) -> Result<()> {
    if expected == root_hash || content_id == Some(expected) {
        return Ok(());
    }
    let root = to_hex(root_hash);
    let error = match content_id {
        Some(id) => unexpected(format!(
            "its content id is {}, its root hash {root}",
            to_hex(id)
        )),
        None => unexpected(format!("its root hash is {root}"))
            .hint("its content id cannot be told from a stream: read it from a file"),
    };
    Err(error)
}

fn unexpected(why: String) -> Error {
    Error::new(
        Kind::UnexpectedImage,
        format!("this is not the expected image: {why}"),
    )
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
