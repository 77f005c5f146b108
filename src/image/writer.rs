//! Writes an image, append-only: to a file, a pipe, a tape.
//!
//! [`ImageWriter`] lays records out one behind the other, gives them their sequence numbers, keeps the
//! index, and adds up root hash and content id. It never looks at payloads: those arrive compressed
//! and with their CRC from the pipeline's workers.

use zerocopy::IntoBytes;

use crate::error::{Error, Kind, Result};
use crate::image::content::{Hash, RunningContent};
use crate::image::format::{
    BLOCK, CELL, FOOTER_MAGIC, FRAME, FileHeader, Footer, IndexEntry, IndexRootEntry, MAGIC,
    MAX_EXTENTS, MAX_JSON, MAX_PASSES, MAX_SEGMENT, MAX_SEGMENTS, MAX_SKIPPED, RAW_ALIGN,
    RECORD_ALIGN, RECORD_HEADER, RECORD_MAGIC, RecordHeader, VERSION, cipher, codec, feature,
    hash_kind, record_flag, record_kind, seal_frame,
};
use crate::image::index::IndexedImage;
use crate::image::manifest::{Manifest, Trailer};
use crate::image::reader::root_entry;
use crate::image::tables::Tables;
use crate::read_at::ReadAt;
use crate::units::ByteLen;

/// Where the bytes go. Every append is the next part of the image.
pub trait Sink {
    /// Appends all of `bytes`. Those of a raw payload are aligned to [`RAW_ALIGN`] in the image (and
    /// in memory, if they came so).
    ///
    /// # Errors
    /// Whatever the writing says; the image is lost then.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// All that was appended, for reading; `None` where that cannot be had.
    ///
    /// # Errors
    /// Whatever the writing says of what was still held back.
    fn written(&mut self) -> Result<Option<&dyn ReadAt>>;
}

impl Sink for Vec<u8> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn written(&mut self) -> Result<Option<&dyn ReadAt>> {
        Ok(Some(self))
    }
}

/// A data or stream record, all but its place in the image.
#[derive(Clone, Debug)]
pub struct DataRecord {
    /// Number of the volume or stream, from 1.
    pub volume: u32,
    /// Pass, from 0.
    pub pass: u32,
    /// Extents and hashes.
    pub tables: Tables,
    /// One of [`codec`].
    pub codec: u8,
    /// CRC-32 of the payload as stored.
    pub payload_crc: u32,
}

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its length in bytes.
    pub len: ByteLen,
    /// BLAKE3 over header, record headers and tables.
    pub root_hash: Hash,
}

/// An image being written.
#[derive(Debug)]
pub struct ImageWriter<S> {
    sink: S,
    header: FileHeader,
    manifest: Manifest,
    position: u64,
    sequence: u64,
    root: blake3::Hasher,
    pending: Vec<IndexEntry>,
    segments: Vec<IndexRootEntry>,
    content: RunningContent,
}

impl<S: Sink> ImageWriter<S> {
    /// Begins an image: header and manifest. No record may hold more than `max_plain` plain bytes.
    ///
    /// # Errors
    /// The sink's.
    pub fn begin(sink: S, image_id: [u8; 16], max_plain: u32, manifest: &Manifest) -> Result<Self> {
        let mut incompatible = 0;
        if manifest.parent.is_some() {
            incompatible |= feature::PARENT;
        }
        if !manifest.streams.is_empty() {
            incompatible |= feature::STREAMS;
        }
        if manifest.has_subvolume() {
            incompatible |= feature::SUBVOLUME;
        }
        let header = FileHeader {
            magic: MAGIC,
            version: VERSION.into(),
            header_len: (FRAME as u32).into(),
            compatible: 0.into(),
            read_only_compatible: 0.into(),
            incompatible: incompatible.into(),
            image_id,
            block_len: (BLOCK as u32).into(),
            cell_len: (CELL as u32).into(),
            max_plain: max_plain.into(),
            hash_kind: hash_kind::BLAKE3,
            cipher: cipher::NONE,
            reserved: [0; 2],
            key_salt: [0; 32],
        };
        let mut writer = Self {
            sink,
            header,
            manifest: manifest.clone(),
            position: 0,
            sequence: 0,
            root: blake3::Hasher::new(),
            pending: Vec::new(),
            segments: Vec::new(),
            content: RunningContent::new(manifest.sizes(), manifest.streams.len()),
        };
        let frame = seal_frame(header.as_bytes());
        writer.root.update(&frame);
        writer.append(&frame)?;
        writer.json(record_kind::MANIFEST, manifest)?;
        Ok(writer)
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The sink.
    pub fn sink(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Appends a data record, or a chunk of a stream. `payload` is what the codec made of the data
    /// runs, in pieces. Records of a pass come in ascending order, volume after volume; those of pass
    /// 0 hold whole cells. Chunks of a stream follow each other without a gap, and all but the last
    /// hold whole cells.
    ///
    /// # Errors
    /// The sink's; [`Kind::Failed`] for what no image can hold.
    pub fn data(&mut self, record: &DataRecord, payload: &[&[u8]]) -> Result<()> {
        let is_stream = record.volume as usize > self.manifest.volumes.len();
        let (base, mut tables, mut extents) = record.tables.encode();
        if is_stream {
            // A stream has no holes: its chunks need no extents.
            tables = record.tables.hashes.concat();
            extents = 0;
        }
        let stored: usize = payload.iter().map(|piece| piece.len()).sum();
        let kind = match is_stream {
            true => record_kind::STREAM,
            false => record_kind::DATA,
        };
        let max_plain = self.header.max_plain.get();
        let plain_len = u32::try_from(record.tables.data_len().0)
            .ok()
            .filter(|len| *len <= max_plain && extents <= MAX_EXTENTS && record.pass < MAX_PASSES)
            .ok_or_else(|| Error::new(Kind::Failed, "a record is too large for an image"))?;
        let is_due = self.pending.first().is_some_and(|first| {
            (first.volume.get(), first.pass.get()) != (record.volume, record.pass)
        });
        if is_due || self.pending.len() == MAX_SEGMENT {
            self.flush_index()?;
        }
        let header = RecordHeader {
            codec: record.codec,
            flags: match record.pass {
                0 => record_flag::WHOLE_CELLS.into(),
                _ => 0.into(),
            },
            volume: record.volume.into(),
            pass: record.pass.into(),
            base: base.0.into(),
            extents: extents.into(),
            hashes: (record.tables.hashes.len() as u32).into(),
            plain_len: plain_len.into(),
            payload_crc: record.payload_crc.into(),
            ..self.header(kind, stored, plain_len)?
        };
        let span = record.tables.span();
        self.pending.push(IndexEntry {
            sequence: self.sequence.into(),
            position: self.position.into(),
            volume: record.volume.into(),
            pass: record.pass.into(),
            start: span.start.0.into(),
            end: span.end().0.into(),
        });
        if record.pass > 0 {
            self.content.give_up();
        }
        self.content.add(record.volume, record.tables.cells());
        if is_stream {
            self.content.grow(record.volume, ByteLen(span.end().0));
        }
        self.record(header, &tables, payload)
    }

    /// Appends a record of a kind that readers may skip ([`record_kind::IGNORABLE`] or above).
    ///
    /// # Errors
    /// The sink's.
    pub fn ignorable(&mut self, kind: u8, payload: &[u8]) -> Result<()> {
        self.bytes(kind, payload, MAX_SKIPPED)
    }

    /// The content id. Where blocks were superseded or volumes alternated, what was written is read
    /// back for it; `None` if that is not possible. All data must have been written.
    ///
    /// # Errors
    /// The sink's; whatever reading back says.
    pub fn content_id(&mut self) -> Result<Option<Hash>> {
        if let Some(id) = self.content.clone().finish() {
            return Ok(Some(id));
        }
        self.flush_index()?;
        let (header, manifest) = (self.header, self.manifest.clone());
        match self.sink.written()? {
            Some(image) => IndexedImage::new(image, header, manifest, &self.segments)?
                .content_id()
                .map(Some),
            None => Ok(None),
        }
    }

    /// Ends the image: the rest of the index, its root, the trailer and the footer.
    ///
    /// # Errors
    /// The sink's; [`Kind::Failed`] for a trailer whose grade is not the worst of its parts.
    pub fn finish(mut self, trailer: &Trailer) -> Result<(S, Written)> {
        if !trailer.is_graded_by_worst() {
            let what = "an image must have the grade of its worst volume or stream";
            return Err(Error::new(Kind::Failed, what));
        }
        self.flush_index()?;
        let manifest_position = self.position;
        let manifest = std::mem::take(&mut self.manifest);
        self.json(record_kind::MANIFEST, &manifest)?;
        let index_root = self.position;
        let segments = std::mem::take(&mut self.segments);
        let longest = MAX_SEGMENTS * size_of::<IndexRootEntry>();
        self.bytes(record_kind::INDEX_ROOT, segments.as_bytes(), longest as u32)?;
        let trailer_position = self.position;
        self.json(record_kind::TRAILER, trailer)?;
        let rest = self.position.next_multiple_of(FRAME as u64) - self.position;
        self.append(&[0; FRAME][..rest as usize])?;
        let root_hash = *self.root.finalize().as_bytes();
        let len = self.position + FRAME as u64;
        let footer = Footer {
            magic: FOOTER_MAGIC,
            image_id: self.header.image_id,
            manifest: manifest_position.into(),
            index_root: index_root.into(),
            trailer: trailer_position.into(),
            records: self.sequence.into(),
            total_len: len.into(),
            root_hash,
            header: self.header,
        };
        self.append(&seal_frame(footer.as_bytes()))?;
        let written = Written {
            len: ByteLen(len),
            root_hash,
        };
        Ok((self.sink, written))
    }

    fn flush_index(&mut self) -> Result<()> {
        let Some(entry) = root_entry(&self.pending, self.sequence, self.position) else {
            return Ok(());
        };
        self.segments.push(entry);
        let mut entries = std::mem::take(&mut self.pending);
        let longest = MAX_SEGMENT * size_of::<IndexEntry>();
        self.bytes(record_kind::INDEX, entries.as_bytes(), longest as u32)?;
        entries.clear();
        self.pending = entries;
        Ok(())
    }

    fn json(&mut self, kind: u8, value: &impl serde::Serialize) -> Result<()> {
        let json = serde_json::to_vec(value).map_err(|source| {
            Error::new(Kind::Failed, "cannot describe the image").because(source)
        })?;
        self.bytes(kind, &json, MAX_JSON)
    }

    /// A record other than data: one hash, one uncompressed payload.
    fn bytes(&mut self, kind: u8, payload: &[u8], longest: u32) -> Result<()> {
        let hash = blake3::hash(payload);
        let header = RecordHeader {
            hashes: 1.into(),
            plain_len: (payload.len() as u32).into(),
            payload_crc: crc32fast::hash(payload).into(),
            ..self.header(kind, payload.len(), longest)?
        };
        self.record(header, hash.as_bytes(), &[payload])
    }

    fn header(&self, kind: u8, stored: usize, longest: u32) -> Result<RecordHeader> {
        let stored_len = u32::try_from(stored).ok().filter(|len| *len <= longest);
        let stored_len = stored_len.ok_or_else(|| {
            Error::new(
                Kind::Failed,
                format!("a record of {stored} bytes is too large for an image"),
            )
        })?;
        Ok(RecordHeader {
            magic: RECORD_MAGIC,
            kind,
            codec: codec::NONE,
            flags: 0.into(),
            image_id: self.header.image_id,
            sequence: self.sequence.into(),
            volume: 0.into(),
            pass: 0.into(),
            base: 0.into(),
            extents: 0.into(),
            hashes: 0.into(),
            plain_len: 0.into(),
            stored_len: stored_len.into(),
            pad: 0.into(),
            tables_crc: 0.into(),
            payload_crc: 0.into(),
            reserved: [0; 16],
            header_crc: 0.into(),
        })
    }

    fn record(&mut self, mut header: RecordHeader, tables: &[u8], payload: &[&[u8]]) -> Result<()> {
        let raw = header.codec == codec::NONE && u64::from(header.stored_len.get()) >= RAW_ALIGN;
        let pad = if raw {
            let payload_at = self.position + (RECORD_HEADER + tables.len()) as u64;
            payload_at.next_multiple_of(RAW_ALIGN) - payload_at
        } else {
            0
        };
        header.pad = (pad as u32).into();
        header.tables_crc = crc32fast::hash(tables).into();
        header.header_crc = header.compute_crc().into();
        self.root.update(header.as_bytes());
        self.root.update(tables);
        self.append(header.as_bytes())?;
        self.append(tables)?;
        self.append(&[0; RAW_ALIGN as usize][..pad as usize])?;
        for piece in payload {
            self.append(piece)?;
        }
        let rest = self.position.next_multiple_of(RECORD_ALIGN) - self.position;
        self.append(&[0; RECORD_ALIGN as usize][..rest as usize])?;
        self.sequence += 1;
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.append(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}
