//! One record, read and checked, from wherever the input stands. Nothing that is read is believed:
//! lengths and counts are within their caps before anything is allocated or skipped by them.

use std::io::{ErrorKind, Read};

use zerocopy::FromBytes;

use crate::error::{Error, Kind, Result};
use crate::image::content::{Hash, RunningContent};
use crate::image::format::{
    BLOCK, CELL, FRAME, FileHeader, IndexEntry, IndexRootEntry, MAX_EXTENTS, MAX_HASHES, MAX_JSON,
    MAX_PASSES, MAX_PLAIN, MAX_SEGMENT, MAX_SEGMENTS, MAX_SKIPPED, MAX_VOLUME_SIZE, RAW_ALIGN,
    RECORD_HEADER, RECORD_MAGIC, RecordHeader, VERSION, cipher, codec, feature,
    frame_is_blank_from, frame_is_whole, hash_kind, record_flag, record_kind,
};
use crate::image::manifest::Manifest;
use crate::image::tables::Tables;
use crate::units::{ByteLen, Offset};

/// Checks a file header, or the copy of one.
///
/// # Errors
/// [`Kind::Incompatible`] with the feature's name, or [`Kind::Damaged`].
pub(super) fn check_header(header: &FileHeader) -> Result<()> {
    let unknown = header.incompatible.get() & !feature::KNOWN_INCOMPATIBLE;
    if unknown != 0 || header.cipher != cipher::NONE || header.hash_kind != hash_kind::BLAKE3 {
        return Err(incompatible(format!(
            "the image needs what this program does not have: {}",
            feature_names(header)
        )));
    }
    let sane = header.version.get() == VERSION
        && header.header_len.get() as usize == FRAME
        && u64::from(header.block_len.get()) == BLOCK
        && u64::from(header.cell_len.get()) == CELL
        && (CELL as u32..=MAX_PLAIN).contains(&header.max_plain.get())
        && header.reserved == [0; 2]
        && header.key_salt == [0; 32];
    if !sane {
        return Err(damaged("the file header makes no sense").at(Offset::ZERO));
    }
    Ok(())
}

/// Checks the first bytes of an image.
///
/// # Errors
/// As [`check_header`].
pub(super) fn check_first_frame(frame: &[u8; FRAME]) -> Result<FileHeader> {
    let (header, _) = FileHeader::read_from_prefix(frame).map_err(|_| damaged("impossible"))?;
    if !frame_is_whole(frame) {
        return Err(damaged("the file header fails its checksum").at(Offset::ZERO));
    }
    // The version comes first: the rest of a newer header may mean something else.
    if header.version.get() > VERSION {
        return Err(incompatible(format!(
            "the image has format version {}, this program reads up to {VERSION}",
            header.version
        )));
    }
    check_header(&header)?;
    if !frame_is_blank_from(frame, size_of::<FileHeader>()) {
        return Err(damaged("the file header makes no sense").at(Offset::ZERO));
    }
    Ok(header)
}

fn feature_names(header: &FileHeader) -> String {
    let unknown = header.incompatible.get() & !feature::KNOWN_INCOMPATIBLE;
    let named = feature::INCOMPATIBLE_NAMES
        .iter()
        .filter(|(bit, _)| unknown & bit != 0);
    let mut names: Vec<String> = named.map(|(_, name)| (*name).to_owned()).collect();
    let nameless = feature::INCOMPATIBLE_NAMES
        .iter()
        .fold(unknown, |left, (bit, _)| left & !bit);
    if nameless != 0 {
        names.push(format!("feature bits {nameless:#x}"));
    }
    if header.cipher != cipher::NONE && unknown & feature::ENCRYPTED == 0 {
        names.push(format!("cipher {}", header.cipher));
    }
    if header.hash_kind != hash_kind::BLAKE3 {
        names.push(format!("hash kind {}", header.hash_kind));
    }
    names.join(", ")
}

/// A record whose header and tables are checked; the input stands before its payload.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) header: RecordHeader,
    /// Extents and hashes, as stored.
    pub(super) tables: Vec<u8>,
    /// Where its header begins, in bytes.
    pub(super) position: u64,
}

impl Record {
    /// Where the next record begins.
    pub(super) fn end(&self) -> u64 {
        self.position.saturating_add(self.header.total_len())
    }

    /// Zero bytes behind the payload.
    pub(super) fn tail(&self) -> usize {
        let header = &self.header;
        let exact = RECORD_HEADER + header.tables_len() + header.pad.get() as usize;
        let used = exact as u64 + u64::from(header.stored_len.get());
        (header.total_len() - used) as usize
    }

    /// Where it begins, for messages.
    pub(super) fn at(&self) -> Offset {
        Offset(self.position)
    }

    /// Reads and checks the payload of a record of neither data nor a stream, up to its tail.
    pub(super) fn read_whole<R: Read>(&self, input: &mut Input<R>) -> Result<Vec<u8>> {
        let mut payload = vec![0; self.header.stored_len.get() as usize];
        input.fill(&mut payload)?;
        let crc_fits = crc32fast::hash(&payload) == self.header.payload_crc.get();
        if !crc_fits || blake3::hash(&payload).as_bytes().as_slice() != self.tables {
            return Err(damaged("a record fails its checksum").at(self.at()));
        }
        Ok(payload)
    }
}

/// Checks what a record header says, without its tables. After this, all lengths and counts are
/// within their caps. The sequence number and the image are the caller's to check.
///
/// # Errors
/// [`Kind::Incompatible`] if a newer program wrote it, else [`Kind::Damaged`].
pub(super) fn check_record(record: &RecordHeader, file: &FileHeader) -> Result<()> {
    if record.magic != RECORD_MAGIC || record.header_crc.get() != record.compute_crc() {
        return Err(damaged("a record header is damaged"));
    }
    if record.image_id != file.image_id {
        return Err(damaged("a record is of another image"));
    }
    let flags = record.flags.get();
    if flags & !record_flag::KNOWN != 0 {
        let what = match flags & record_flag::ENCRYPTED {
            0 => format!("a record with unknown flags {flags:#x}"),
            _ => "an encrypted record".to_owned(),
        };
        return Err(incompatible(format!("the image holds {what}")));
    }
    let is_data = matches!(record.kind, record_kind::DATA | record_kind::STREAM);
    let is_skipped = record.kind >= record_kind::IGNORABLE;
    let longest = match record.kind {
        record_kind::DATA | record_kind::STREAM => file.max_plain.get(),
        record_kind::MANIFEST | record_kind::TRAILER => MAX_JSON,
        record_kind::INDEX => (MAX_SEGMENT * size_of::<IndexEntry>()) as u32,
        record_kind::INDEX_ROOT => (MAX_SEGMENTS * size_of::<IndexRootEntry>()) as u32,
        _ if is_skipped => MAX_SKIPPED,
        kind => {
            let name = match kind {
                record_kind::MIRRORS => " (mirrored extents)",
                record_kind::KEYS => " (encryption)",
                _ => "",
            };
            return Err(incompatible(format!(
                "the image holds a record of unknown kind {kind}{name}"
            )));
        }
    };
    if is_data && record.codec > codec::ZSTD {
        return Err(incompatible(format!(
            "the image holds a record with unknown codec {}",
            record.codec
        )));
    }
    let (plain, stored) = (record.plain_len.get(), record.stored_len.get());
    let is_plain = record.codec == codec::NONE && plain == stored;
    let sane = plain <= longest
        && (is_plain || (is_data && record.codec == codec::ZSTD && stored <= plain && stored > 0))
        && record.extents.get() <= MAX_EXTENTS
        && record.hashes.get() <= MAX_HASHES
        && record.pass.get() < MAX_PASSES
        && u64::from(record.pad.get()) < RAW_ALIGN
        && record.reserved == [0; 16]
        && (is_data || is_bare(record));
    if !sane {
        return Err(damaged("a record header makes no sense"));
    }
    Ok(())
}

/// Whether a record is of no volume, with one hash and no extents: all but data and streams.
fn is_bare(record: &RecordHeader) -> bool {
    record.flags.get() == 0
        && record.volume.get() == 0
        && record.pass.get() == 0
        && record.base.get() == 0
        && record.extents.get() == 0
        && record.hashes.get() == 1
}

/// Reads a record's tables; the input stands behind its header. Padding is left to the caller.
///
/// # Errors
/// [`Kind::Damaged`] if they fail their checksum.
pub(super) fn read_tables<R: Read>(
    input: &mut Input<R>,
    header: RecordHeader,
    position: u64,
) -> Result<Record> {
    let mut tables = vec![0; header.tables_len()];
    input.fill(&mut tables)?;
    if crc32fast::hash(&tables) != header.tables_crc.get() {
        return Err(damaged("the tables of a record fail their checksum").at(Offset(position)));
    }
    Ok(Record {
        header,
        tables,
        position,
    })
}

/// A data or stream record whose header and tables are checked, without its payload.
#[derive(Clone, Debug)]
pub struct DataHead {
    /// Number of the volume or stream, from 1; there is one of that number in the manifest.
    pub volume: u32,
    /// Whether it is a chunk of a stream.
    pub is_stream: bool,
    /// Pass, from 0.
    pub pass: u32,
    /// Sequence number.
    pub sequence: u64,
    /// Whether its hashes are its cells' own.
    pub whole_cells: bool,
    /// Extents and hashes.
    pub tables: Tables,
    /// Where the record begins in the image, in bytes.
    pub position: u64,
    pub(super) codec: u8,
    pub(super) stored_len: u32,
    pub(super) payload_crc: u32,
    pub(super) tail: usize,
}

impl DataHead {
    /// Checks the tables of a data or stream record.
    pub(super) fn new(record: &Record, manifest: &Manifest) -> Result<Self> {
        let header = &record.header;
        let wrong = |what| damaged(what).at(record.at());
        let number = header.volume.get();
        let base = Offset(header.base.get());
        let plain_len = ByteLen(u64::from(header.plain_len.get()));
        let is_stream = header.kind == record_kind::STREAM;
        let volume = (number as usize)
            .checked_sub(1)
            .and_then(|n| manifest.volumes.get(n));
        let tables = match volume {
            Some(volume) if !is_stream => Tables::decode(
                &record.tables,
                header.extents.get(),
                base,
                ByteLen(volume.size),
                plain_len,
            )
            .map_err(|error| error.at(record.at()))?,
            None if is_stream && manifest.streams.iter().any(|stream| stream.n == number) => {
                let (hashes, _) = record.tables.as_chunks::<32>();
                let sane = header.extents.get() == 0
                    && header.flags.get() == record_flag::WHOLE_CELLS
                    && header.pass.get() == 0
                    && base.0.is_multiple_of(CELL)
                    && base.0 <= MAX_VOLUME_SIZE
                    && plain_len > ByteLen::ZERO
                    && hashes.len() as u64 == plain_len.0.div_ceil(CELL);
                if !sane {
                    return Err(wrong("a chunk of a stream makes no sense"));
                }
                Tables::of_stream(base, plain_len, hashes.to_vec())
            }
            _ => return Err(wrong("a record belongs to no volume")),
        };
        let whole_cells = header.flags.get() & record_flag::WHOLE_CELLS != 0;
        let suits_pass = header.pass.get() > 0 || (whole_cells && !tables.has_trim());
        if tables.runs.is_empty() || !suits_pass {
            return Err(wrong("a record makes no sense"));
        }
        Ok(Self {
            volume: number,
            is_stream,
            pass: header.pass.get(),
            sequence: header.sequence.get(),
            whole_cells,
            tables,
            position: record.position,
            codec: header.codec,
            stored_len: header.stored_len.get(),
            payload_crc: header.payload_crc.get(),
            tail: record.tail(),
        })
    }

    /// Checks the payload's CRC, decodes it, and checks its content. `stored` is the payload as
    /// stored. Returns the plain bytes: those of `stored` itself if they are not compressed, else in
    /// the front of `plain`.
    ///
    /// # Errors
    /// [`Kind::Damaged`] with the record's position.
    pub fn decode<'a>(
        &self,
        stored: &'a [u8],
        plain: &'a mut [u8],
        decompressor: &mut zstd::bulk::Decompressor<'_>,
    ) -> Result<&'a [u8]> {
        let wrong = |what| damaged(what).at(Offset(self.position));
        if crc32fast::hash(stored) != self.payload_crc {
            return Err(wrong("a record fails its checksum"));
        }
        let len = self.tables.data_len().as_usize();
        let bytes = match self.codec {
            codec::NONE if stored.len() == len => stored,
            codec::ZSTD => {
                let room = plain
                    .get_mut(..len)
                    .ok_or_else(|| wrong("a record is too large"))?;
                match decompressor.decompress_to_buffer(stored, room) {
                    Ok(got) if got == len => &*room,
                    _ => return Err(wrong("a record cannot be decompressed")),
                }
            }
            _ => return Err(wrong("a record has impossible lengths")),
        };
        if !self.tables.check_content(bytes) {
            return Err(wrong("a record's content is not what was stored"));
        }
        Ok(bytes)
    }

    /// Adds its cells to the content id.
    pub fn add_to(&self, content: &mut RunningContent) {
        if self.pass > 0 || !self.whole_cells {
            content.give_up();
        }
        content.add(self.volume, self.tables.cells());
        if self.is_stream {
            content.grow(self.volume, ByteLen(self.tables.span().end().0));
        }
    }

    /// Length of the payload as stored, in bytes.
    pub fn stored_len(&self) -> usize {
        self.stored_len as usize
    }

    /// The hash of cell `number`, if it is among the record's.
    pub(super) fn hash_of(&self, number: u64) -> Option<&Hash> {
        let mut cells = self.tables.cells();
        cells
            .find(|(cell, _)| *cell == number)
            .map(|(_, hash)| hash)
    }
}

/// Input that counts what was read, says so when it ends too early, and takes bytes back.
#[derive(Debug)]
pub(super) struct Input<R> {
    input: R,
    /// How far it was read, in bytes from the start of the image.
    pub(super) position: u64,
    /// Taken back, to be read again; few.
    again: Vec<u8>,
}

impl<R: Read> Input<R> {
    /// Stands at `position` of the image.
    pub(super) fn new(input: R, position: u64) -> Self {
        Self {
            input,
            position,
            again: Vec::new(),
        }
    }

    pub(super) fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        if self.fill_some(buf)? < buf.len() {
            return Err(truncated().at(Offset(self.position)));
        }
        Ok(())
    }

    /// Reads until `buf` is full or the input ends.
    pub(super) fn fill_some(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut done = self.again.len().min(buf.len());
        buf[..done].copy_from_slice(&self.again[..done]);
        self.again.drain(..done);
        while done < buf.len() {
            match self.input.read(&mut buf[done..]) {
                Ok(0) => break,
                Ok(got) => done += got,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let at = Offset(self.position + done as u64);
                    return Err(Error::io("cannot read the image", error).at(at));
                }
            }
        }
        self.position += done as u64;
        Ok(done)
    }

    /// Takes back the last bytes that were read.
    pub(super) fn take_back(&mut self, bytes: &[u8]) {
        self.position -= bytes.len() as u64;
        self.again.splice(0..0, bytes.iter().copied());
    }

    /// Reads on up to `position`, whatever there is.
    pub(super) fn skip_to(&mut self, position: u64) -> Result<()> {
        let mut scrap = [0; FRAME];
        while self.position < position {
            let len = (position - self.position).min(FRAME as u64) as usize;
            self.fill(&mut scrap[..len])?;
        }
        Ok(())
    }

    /// Reads `len` bytes of padding, which must be zero. `len` is at most [`FRAME`].
    pub(super) fn zeros(&mut self, len: usize) -> Result<()> {
        let mut padding = [0; FRAME];
        let position = Offset(self.position);
        self.fill(&mut padding[..len])?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(damaged("padding is not zero").at(position));
        }
        Ok(())
    }
}

pub(super) fn damaged(what: &str) -> Error {
    Error::new(Kind::Damaged, format!("the image is damaged: {what}"))
}

pub(super) fn truncated() -> Error {
    Error::new(Kind::Truncated, "the image ends too early: it is not whole")
}

fn incompatible(what: String) -> Error {
    Error::new(Kind::Incompatible, what).hint("use a newer version of holdstill")
}
