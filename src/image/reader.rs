//! Reads an image from its first byte to its last, as a file or a stream, and believes nothing.
//!
//! [`ImageReader`] checks everything but the payloads of data records: those it hands out as they are
//! stored, so that workers can decode and check them in parallel ([`DataHead::decode`]). It is
//! finished only when the footer and the end of the input were seen: an image that was cut off, even
//! between two records, is [`Kind::Truncated`].

use std::io::{ErrorKind, Read};

use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use crate::error::{Error, Kind, Result};
use crate::image::content::Hash;
use crate::image::format::{
    BLOCK, CELL, FOOTER_MAGIC, FRAME, FileHeader, Footer, IndexEntry, IndexRootEntry, MAGIC,
    MAX_EXTENTS, MAX_HASHES, MAX_PLAIN, MAX_STORED, RAW_ALIGN, RECORD_HEADER, RECORD_MAGIC,
    RecordHeader, VERSION, cipher, codec, feature, frame_is_whole, hash_kind, record_flag,
    record_kind,
};
use crate::image::manifest::{Manifest, Trailer};
use crate::image::tables::Tables;
use crate::image::writer::SEGMENT_ENTRIES;
use crate::read_at::ReadAt;
use crate::units::{ByteLen, Offset};

/// An image being read in order.
#[derive(Debug)]
pub struct ImageReader<R> {
    input: Checked<R>,
    header: FileHeader,
    manifest: Manifest,
    sequence: u64,
    root: blake3::Hasher,
    pending: Vec<IndexEntry>,
    segments: Vec<IndexRootEntry>,
    index_root: Option<u64>,
    /// For each volume, the pass and the end of its last record.
    progress: Vec<(u32, Offset)>,
}

/// A data record whose header and tables are checked and whose payload comes next.
#[derive(Clone, Debug)]
pub struct DataHead {
    /// Number of the volume, from 1; there is one of that number in the manifest.
    pub volume: u32,
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
    codec: u8,
    stored_len: u32,
    payload_crc: u32,
    tail: usize,
}

/// What comes next in an image.
#[derive(Debug)]
pub enum Item {
    /// A data record; its payload must be read next.
    Data(DataHead),
    /// The end, and that it was whole.
    End(Box<End>),
}

/// What an image says at its end.
#[derive(Debug)]
pub struct End {
    /// What was achieved.
    pub trailer: Trailer,
    /// Length of the image in bytes.
    pub len: ByteLen,
    /// BLAKE3 over header, record headers and tables.
    pub root_hash: Hash,
}

impl<R: Read> ImageReader<R> {
    /// Reads the header and the manifest.
    ///
    /// # Errors
    /// [`Kind::NotAnImage`], [`Kind::Incompatible`] with the feature's name, [`Kind::Damaged`],
    /// [`Kind::Truncated`], or what the input says.
    pub fn open(input: R) -> Result<Self> {
        let mut input = Checked { input, position: 0 };
        let mut frame = [0; FRAME];
        let got = input.fill_some(&mut frame)?;
        let magic = &frame[..got.min(MAGIC.len())];
        if magic.is_empty() || magic != &MAGIC[..magic.len()] {
            return Err(Error::new(Kind::NotAnImage, "this is no holdstill image"));
        }
        if got < FRAME {
            return Err(truncated());
        }
        let header = check_header(&frame)?;
        let mut reader = Self {
            input,
            header,
            manifest: Manifest::empty(),
            sequence: 0,
            root: blake3::Hasher::new(),
            pending: Vec::new(),
            segments: Vec::new(),
            index_root: None,
            progress: Vec::new(),
        };
        reader.root.update(&frame);
        let (record, tables) = reader.record()?;
        if record.kind != record_kind::MANIFEST {
            return Err(damaged("it does not begin with the list of volumes"));
        }
        let json = reader.whole_payload(&record, &tables)?;
        reader.manifest = Manifest::decode(&json)?;
        reader.progress = vec![(0, Offset::ZERO); reader.manifest.volumes.len()];
        Ok(reader)
    }

    /// What the image is of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The random id in the file header.
    pub fn image_id(&self) -> [u8; 16] {
        self.header.image_id
    }

    /// Largest number of plain bytes in any record, as the header promises it.
    pub fn max_plain(&self) -> usize {
        self.header.max_plain.get() as usize
    }

    /// The most bytes a data record's payload can be stored in.
    pub fn max_stored(&self) -> usize {
        self.max_plain() + (MAX_STORED - MAX_PLAIN) as usize
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.input.position
    }

    /// The next data record, or the end. After [`Item::Data`], [`read_payload`](Self::read_payload)
    /// must be called before this is called again.
    ///
    /// # Errors
    /// [`Kind::Damaged`] or [`Kind::Truncated`] with the position, or what the input says. Nothing
    /// more can be read after an error.
    pub fn next_item(&mut self) -> Result<Item> {
        loop {
            let position = self.input.position;
            let (record, tables) = self.record()?;
            match record.kind {
                record_kind::DATA => {
                    return self.data_head(&record, &tables, position).map(Item::Data);
                }
                record_kind::INDEX => {
                    let payload = self.whole_payload(&record, &tables)?;
                    self.index_segment(&payload, position)?;
                }
                record_kind::INDEX_ROOT => {
                    let payload = self.whole_payload(&record, &tables)?;
                    if payload != self.segments.as_bytes() || !self.pending.is_empty() {
                        return Err(damaged("the index is not of this image").at(Offset(position)));
                    }
                    self.index_root = Some(position);
                }
                record_kind::TRAILER => {
                    let json = self.whole_payload(&record, &tables)?;
                    let trailer = Trailer::decode(&json, &self.manifest)?;
                    return self
                        .footer(trailer, position)
                        .map(|end| Item::End(Box::new(end)));
                }
                kind if kind >= record_kind::IGNORABLE => {
                    self.whole_payload(&record, &tables)?;
                }
                kind => {
                    return Err(Error::new(
                        Kind::Incompatible,
                        format!("the image holds a record of unknown kind {kind}"),
                    )
                    .at(Offset(position))
                    .hint("a newer version of holdstill may know it"));
                }
            }
        }
    }

    /// Reads the payload that belongs to `head` into the front of `buf`, as stored.
    ///
    /// # Errors
    /// As [`next_item`](Self::next_item). The payload itself is not checked here.
    ///
    /// # Panics
    /// If `buf` is shorter than [`max_stored`](Self::max_stored).
    pub fn read_payload(&mut self, head: &DataHead, buf: &mut [u8]) -> Result<usize> {
        let stored = head.stored_len as usize;
        self.input.fill(&mut buf[..stored])?;
        self.zeros(head.tail)?;
        Ok(stored)
    }

    /// Reads and checks a record's header and tables. The input stands before the payload then.
    fn record(&mut self) -> Result<(RecordHeader, Vec<u8>)> {
        let position = Offset(self.input.position);
        let mut bytes = [0; RECORD_HEADER];
        self.input.fill(&mut bytes)?;
        let header = RecordHeader::read_from_bytes(&bytes).map_err(|_| damaged("impossible"))?;
        check_record(&header, &self.header, self.sequence).map_err(|error| error.at(position))?;
        let mut tables = vec![0; header.tables_len()];
        self.input.fill(&mut tables)?;
        if crc32fast::hash(&tables) != header.tables_crc.get() {
            return Err(damaged("the tables of a record fail their checksum").at(position));
        }
        self.zeros(header.pad.get() as usize)?;
        self.root.update(&bytes);
        self.root.update(&tables);
        self.sequence += 1;
        Ok((header, tables))
    }

    /// The payload of a record other than data, checked by CRC and hash.
    fn whole_payload(&mut self, record: &RecordHeader, tables: &[u8]) -> Result<Vec<u8>> {
        let position = Offset(self.input.position);
        let is_plain = record.codec == codec::NONE && record.plain_len == record.stored_len;
        if !is_plain || record.extents.get() != 0 || record.hashes.get() != 1 {
            return Err(damaged("a record has impossible lengths").at(position));
        }
        let mut payload = vec![0; record.stored_len.get() as usize];
        self.input.fill(&mut payload)?;
        self.zeros(tail_of(record))?;
        let crc_fits = crc32fast::hash(&payload) == record.payload_crc.get();
        if !crc_fits || blake3::hash(&payload).as_bytes().as_slice() != tables {
            return Err(damaged("a record fails its checksum").at(position));
        }
        Ok(payload)
    }

    fn data_head(
        &mut self,
        record: &RecordHeader,
        tables: &[u8],
        position: u64,
    ) -> Result<DataHead> {
        let at = Offset(position);
        let number = record.volume.get();
        let known = (number as usize).checked_sub(1).and_then(|n| {
            let size = self.manifest.volumes.get(n)?.size;
            Some((ByteLen(size), self.progress.get_mut(n)?))
        });
        let Some((size, progress)) = known else {
            return Err(damaged("a record belongs to no volume").at(at));
        };
        let plain_len = ByteLen(u64::from(record.plain_len.get()));
        let base = Offset(record.base.get());
        let tables = Tables::decode(tables, record.extents.get(), base, size, plain_len)
            .map_err(|error| error.at(at))?;
        let pass = record.pass.get();
        let span = tables.span();
        let in_order = pass > progress.0 || (pass == progress.0 && span.start >= progress.1);
        if tables.runs.is_empty() || !in_order || (pass == 0 && tables.has_trim()) {
            return Err(damaged("records are not in order").at(at));
        }
        *progress = (pass, span.end());
        if self.pending.len() == SEGMENT_ENTRIES {
            return Err(damaged("an index segment is missing").at(at));
        }
        self.pending.push(IndexEntry {
            sequence: record.sequence,
            position: position.into(),
            volume: record.volume,
            pass: record.pass,
            start: span.start.0.into(),
            end: span.end().0.into(),
        });
        Ok(DataHead {
            volume: number,
            pass,
            sequence: record.sequence.get(),
            whole_cells: record.flags.get() & record_flag::WHOLE_CELLS != 0,
            tables,
            position,
            codec: record.codec,
            stored_len: record.stored_len.get(),
            payload_crc: record.payload_crc.get(),
            tail: tail_of(record),
        })
    }

    fn index_segment(&mut self, payload: &[u8], position: u64) -> Result<()> {
        if payload != self.pending.as_bytes() || self.pending.is_empty() {
            return Err(damaged("the index is not of this image").at(Offset(position)));
        }
        self.segments.push(IndexRootEntry {
            position: position.into(),
            entries: (self.pending.len() as u32).into(),
            reserved: 0.into(),
            first_sequence: self.pending[0].sequence,
        });
        self.pending.clear();
        Ok(())
    }

    fn footer(&mut self, trailer: Trailer, trailer_position: u64) -> Result<End> {
        let rest = self.input.position.next_multiple_of(FRAME as u64) - self.input.position;
        self.zeros(rest as usize)?;
        let position = Offset(self.input.position);
        let mut frame = [0; FRAME];
        self.input.fill(&mut frame)?;
        let is_whole = frame_is_whole(&frame, size_of::<Footer>());
        let (footer, _) = Footer::read_from_prefix(&frame).map_err(|_| damaged("impossible"))?;
        let root_hash = *self.root.finalize().as_bytes();
        let fits = is_whole
            && footer.magic == FOOTER_MAGIC
            && footer.image_id == self.header.image_id
            && Some(footer.index_root.get()) == self.index_root
            && footer.trailer.get() == trailer_position
            && footer.records.get() == self.sequence
            && footer.total_len.get() == self.input.position
            && footer.root_hash == root_hash;
        if !fits {
            return Err(damaged("the footer does not fit the image").at(position));
        }
        if self.input.fill_some(&mut [0])? != 0 {
            return Err(
                damaged("bytes follow the end of the image").at(Offset(self.input.position - 1))
            );
        }
        Ok(End {
            trailer,
            len: ByteLen(self.input.position),
            root_hash,
        })
    }

    /// Reads `len` bytes of padding, which must be zero. `len` is below [`FRAME`].
    fn zeros(&mut self, len: usize) -> Result<()> {
        let mut padding = [0; FRAME];
        let position = Offset(self.input.position);
        self.input.fill(&mut padding[..len])?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(damaged("padding is not zero").at(position));
        }
        Ok(())
    }
}

impl DataHead {
    /// Checks the payload's CRC, decodes it, and checks its content. `stored` is what
    /// [`ImageReader::read_payload`] delivered. Returns the plain bytes: those of `stored` itself if
    /// they are not compressed, else in the front of `plain`.
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

    /// Length of the payload as stored, in bytes.
    pub fn stored_len(&self) -> usize {
        self.stored_len as usize
    }
}

/// Input that counts what was read and says so when it ends too early.
#[derive(Debug)]
struct Checked<R> {
    input: R,
    position: u64,
}

impl<R: Read> Checked<R> {
    fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        if self.fill_some(buf)? < buf.len() {
            return Err(truncated().at(Offset(self.position)));
        }
        Ok(())
    }

    /// Reads until `buf` is full or the input ends.
    fn fill_some(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.input.read(&mut buf[done..]) {
                Ok(0) => break,
                Ok(got) => done += got,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io("cannot read the image", error).at(Offset(self.position)));
                }
            }
        }
        self.position += done as u64;
        Ok(done)
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
}

/// Reads a [`Summary`]. That the image is whole is not proven by this.
///
/// # Errors
/// As [`ImageReader::open`]; [`Kind::Truncated`] if the footer is missing.
pub fn summarize(image: &dyn ReadAt) -> Result<Summary> {
    let reader = ImageReader::open(Cursor { image, at: 0 })?;
    let size = image.len();
    let mut frame = [0; FRAME];
    let footer_at = size.0.checked_sub(FRAME as u64).ok_or_else(truncated)?;
    image.read_exact_at(&mut frame, Offset(footer_at))?;
    let (footer, _) = Footer::read_from_prefix(&frame).map_err(|_| damaged("impossible"))?;
    let is_footer = frame_is_whole(&frame, size_of::<Footer>())
        && footer.magic == FOOTER_MAGIC
        && footer.image_id == reader.header.image_id
        && footer.total_len.get() == size.0;
    if !is_footer {
        return Err(truncated().hint("its footer is missing: verify tells more"));
    }
    let mut end = ImageReader {
        input: Checked {
            input: Cursor {
                image,
                at: footer.trailer.get(),
            },
            position: footer.trailer.get(),
        },
        sequence: footer.records.get().saturating_sub(1),
        ..reader
    };
    let (record, tables) = end.record()?;
    let json = end.whole_payload(&record, &tables)?;
    if record.kind != record_kind::TRAILER {
        return Err(damaged("the footer points astray"));
    }
    Ok(Summary {
        image_id: end.header.image_id,
        trailer: Trailer::decode(&json, &end.manifest)?,
        manifest: end.manifest,
        len: size,
        root_hash: footer.root_hash,
    })
}

/// Positioned reading as a stream.
struct Cursor<'a> {
    image: &'a dyn ReadAt,
    at: u64,
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

fn check_header(frame: &[u8; FRAME]) -> Result<FileHeader> {
    let (header, _) = FileHeader::read_from_prefix(frame).map_err(|_| damaged("impossible"))?;
    // The version comes first: the rest of a newer header may mean something else.
    if header.version.get() > VERSION && frame_is_whole(frame, FRAME - 4) {
        return Err(Error::new(
            Kind::Incompatible,
            format!(
                "the image has format version {}, this program reads up to {VERSION}",
                header.version
            ),
        )
        .hint("use a newer version of holdstill"));
    }
    if !frame_is_whole(frame, size_of::<FileHeader>()) {
        return Err(damaged("the file header fails its checksum").at(Offset::ZERO));
    }
    let unknown = header.incompatible.get() & !feature::KNOWN_INCOMPATIBLE;
    if unknown != 0 || header.cipher != cipher::NONE || header.hash_kind != hash_kind::BLAKE3 {
        return Err(Error::new(
            Kind::Incompatible,
            format!(
                "the image needs what this program does not have: {}",
                feature_names(&header)
            ),
        )
        .hint("use a newer version of holdstill"));
    }
    let sane = header.version.get() == VERSION
        && header.header_len.get() as usize == FRAME
        && u64::from(header.block_len.get()) == BLOCK
        && u64::from(header.cell_len.get()) == CELL
        && header.max_plain.get() <= MAX_PLAIN
        && header.reserved == [0; 2];
    if !sane {
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

/// Everything in a record header that can be checked without its payload. After this, lengths and
/// counts are within their caps.
fn check_record(record: &RecordHeader, file: &FileHeader, sequence: u64) -> Result<()> {
    if record.magic != RECORD_MAGIC || record.header_crc.get() != record.compute_crc() {
        return Err(damaged("a record header is damaged"));
    }
    let max_plain = match record.kind {
        record_kind::DATA => file.max_plain.get(),
        _ => MAX_PLAIN,
    };
    let sane = record.image_id == file.image_id
        && record.sequence.get() == sequence
        && record.flags.get() & !record_flag::ALL == 0
        && record.extents.get() <= MAX_EXTENTS
        && record.hashes.get() <= MAX_HASHES
        && record.plain_len.get() <= max_plain
        && record.stored_len.get() <= max_plain + (MAX_STORED - MAX_PLAIN)
        && u64::from(record.pad.get()) < RAW_ALIGN
        && record.reserved == [0; 16];
    if !sane {
        return Err(damaged("a record header makes no sense"));
    }
    Ok(())
}

/// Zero bytes behind a record's payload.
fn tail_of(record: &RecordHeader) -> usize {
    let exact = RECORD_HEADER + record.tables_len() + record.pad.get() as usize;
    let used = exact as u64 + u64::from(record.stored_len.get());
    (record.total_len() - used) as usize
}

fn damaged(what: &str) -> Error {
    Error::new(Kind::Damaged, format!("the image is damaged: {what}"))
}

fn truncated() -> Error {
    Error::new(Kind::Truncated, "the image ends too early: it is not whole")
}
