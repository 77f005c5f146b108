//! Both ends of an image in a file: what it says of itself, without reading what lies between.

use std::io::Read;

use zerocopy::{FromBytes, IntoBytes};

use super::{ImageReader, decode_manifest};
use crate::error::Result;
use crate::image::content::Hash;
use crate::image::format::{
    FOOTER_MAGIC, FRAME, FileHeader, Footer, frame_is_blank_from, frame_is_whole, record_kind,
};
use crate::image::manifest::{Manifest, Trailer};
use crate::image::record::{Input, check_header, damaged, truncated};
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

pub(super) fn check_footer(frame: &[u8; FRAME], header: &FileHeader) -> Result<Footer> {
    let footer = parse_footer(frame).ok_or_else(|| damaged("the footer fails its checksum"))?;
    if footer.image_id != header.image_id || footer.header.as_bytes() != header.as_bytes() {
        return Err(damaged("the footer does not fit the image"));
    }
    Ok(footer)
}

fn parse_footer(frame: &[u8; FRAME]) -> Option<Footer> {
    let (footer, _) = Footer::read_from_prefix(frame).ok()?;
    let is_footer = frame_is_whole(frame)
        && frame_is_blank_from(frame, size_of::<Footer>())
        && footer.magic == FOOTER_MAGIC;
    is_footer.then_some(footer)
}

/// What an image says at its front, as its end repeats it.
#[derive(Clone, Debug)]
pub struct Front {
    pub(in crate::image) header: FileHeader,
    /// What the image is of.
    pub manifest: Manifest,
}

impl Front {
    /// Reads it from the end of an image.
    ///
    /// # Errors
    /// [`Damaged`](crate::error::Kind::Damaged) or [`Truncated`](crate::error::Kind::Truncated) if the end is no better than the front;
    /// [`Incompatible`](crate::error::Kind::Incompatible).
    pub fn from_end(image: &dyn ReadAt) -> Result<Self> {
        let footer = read_footer(image)?;
        check_header(&footer.header)?;
        let mut reader = ImageReader::new(
            Cursor::input(image, footer.manifest.get()),
            footer.header,
            Manifest::default(),
        );
        reader.go_on_behind_damage();
        let record = reader.record()?;
        let json = reader.whole_payload(&record)?;
        if record.header.kind != record_kind::MANIFEST {
            return Err(damaged("the footer points astray"));
        }
        Ok(Self {
            header: footer.header,
            manifest: decode_manifest(&json, &footer.header)?,
        })
    }
}

/// Reads the footer of an image in a file, whatever it is worth.
fn read_footer(image: &dyn ReadAt) -> Result<Footer> {
    let size = image.len();
    let mut frame = [0; FRAME];
    let footer_at = size.0.checked_sub(FRAME as u64).ok_or_else(truncated)?;
    image.read_exact_at(&mut frame, Offset(footer_at))?;
    match parse_footer(&frame) {
        Some(footer) if footer.total_len.get() == size.0 => Ok(footer),
        _ => Err(truncated().hint("its footer is missing: verify tells more")),
    }
}

/// What an image in a file says at its front and at its end, without reading what lies between.
#[derive(Debug)]
pub struct Summary {
    /// The random id in the file header.
    pub image_id: [u8; 16],
    /// What the image is of.
    pub manifest: Manifest,
    /// What was achieved.
    pub trailer: Trailer,
    /// Length of the image in bytes.
    pub len: ByteLen,
    /// BLAKE3 over header, record headers and tables, as the footer says it.
    pub root_hash: Hash,
    pub(in crate::image) header: FileHeader,
    pub(in crate::image) footer: Footer,
}

/// Reads a [`Summary`]. That the image is whole is not proven by this.
///
/// # Errors
/// As [`ImageReader::open`]; [`Truncated`](crate::error::Kind::Truncated) if the footer is missing.
pub fn summarize(image: &dyn ReadAt) -> Result<Summary> {
    let reader = ImageReader::open(Cursor { image, at: 0 })?;
    let (header, manifest) = (reader.header, reader.manifest);
    let footer = read_footer(image)?;
    if footer.header.as_bytes() != header.as_bytes() {
        return Err(damaged("the footer does not fit the image"));
    }
    let mut end = ImageReader::new(
        Cursor::input(image, footer.trailer.get()),
        header,
        Manifest::default(),
    );
    end.sequence = footer.records.get().saturating_sub(1);
    let record = end.record()?;
    let json = end.whole_payload(&record)?;
    if record.header.kind != record_kind::TRAILER {
        return Err(damaged("the footer points astray"));
    }
    Ok(Summary {
        image_id: header.image_id,
        trailer: Trailer::decode(&json, &manifest)?,
        manifest,
        len: image.len(),
        root_hash: footer.root_hash,
        header,
        footer,
    })
}

/// Positioned reading as a stream.
pub(in crate::image) struct Cursor<'a> {
    image: &'a dyn ReadAt,
    at: u64,
}

impl<'a> Cursor<'a> {
    /// Input that begins at `position` of the image.
    pub(in crate::image) fn input(image: &'a dyn ReadAt, position: u64) -> Input<Self> {
        let at = position;
        Input::new(Self { image, at }, position)
    }
}

impl Read for Cursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let left = self.image.len().0.saturating_sub(self.at);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.image
            .read_exact_at(&mut buf[..len], Offset(self.at))
            .map_err(std::io::Error::other)?;
        self.at += len as u64;
        Ok(len)
    }
}
