//! Writes an image, append-only: to a file, a pipe, a tape.
//!
//! [`ImageWriter`] lays records out one behind the other, gives them their sequence numbers, keeps the
//! index, and adds up root hash and content id. It never looks at payloads: those arrive compressed
//! and with their CRC from the pipeline's workers.

use zerocopy::IntoBytes;

use crate::error::{Error, Kind, Result};
use crate::image::content::{ContentHasher, Hash, zero_cell_hash};
use crate::image::format::{
    BLOCK, CELL, FOOTER_MAGIC, FRAME, FileHeader, Footer, IndexEntry, IndexRootEntry, MAGIC,
    MAX_STORED, RAW_ALIGN, RECORD_ALIGN, RECORD_HEADER, RECORD_MAGIC, RecordHeader, VERSION,
    cipher, codec, hash_kind, record_flag, record_kind, seal_frame,
};
use crate::image::manifest::{Manifest, Trailer};
use crate::image::tables::{Tables, cells_of};
use crate::units::ByteLen;

/// Entries in one index segment: what the index of a run takes in memory, and a reader's bound.
pub const SEGMENT_ENTRIES: usize = 4096;

/// Where the bytes go. Every append is the next part of the image.
pub trait Sink {
    /// Appends all of `bytes`. Those of a raw payload are aligned to [`RAW_ALIGN`] in the image (and
    /// in memory, if they came so).
    ///
    /// # Errors
    /// Whatever the writing says; the image is lost then.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;
}

impl Sink for Vec<u8> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }
}

/// A data record, all but its place in the image.
#[derive(Clone, Debug)]
pub struct DataRecord {
    /// Number of the volume, from 1.
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
    image_id: [u8; 16],
    position: u64,
    sequence: u64,
    root: blake3::Hasher,
    pending: Vec<IndexEntry>,
    segments: Vec<IndexRootEntry>,
    content: ContentProgress,
}

/// The content id as it grows. It can be told on the way as long as no block is superseded.
#[derive(Clone, Debug)]
struct ContentProgress {
    hasher: ContentHasher,
    sizes: Vec<u64>,
    /// Volumes begun so far.
    begun: u32,
    superseded: bool,
}

impl<S: Sink> ImageWriter<S> {
    /// Begins an image: header and manifest. No record may hold more than `max_plain` plain bytes.
    ///
    /// # Errors
    /// The sink's.
    pub fn begin(sink: S, image_id: [u8; 16], max_plain: u32, manifest: &Manifest) -> Result<Self> {
        let header = FileHeader {
            magic: MAGIC,
            version: VERSION.into(),
            header_len: (FRAME as u32).into(),
            compatible: 0.into(),
            read_only_compatible: 0.into(),
            incompatible: 0.into(),
            image_id,
            block_len: (BLOCK as u32).into(),
            cell_len: (CELL as u32).into(),
            max_plain: max_plain.into(),
            hash_kind: hash_kind::BLAKE3,
            cipher: cipher::NONE,
            reserved: [0; 2],
        };
        let mut writer = Self {
            sink,
            image_id,
            position: 0,
            sequence: 0,
            root: blake3::Hasher::new(),
            pending: Vec::with_capacity(SEGMENT_ENTRIES),
            segments: Vec::new(),
            content: ContentProgress {
                hasher: ContentHasher::new(manifest.volumes.len()),
                sizes: manifest.volumes.iter().map(|volume| volume.size).collect(),
                begun: 0,
                superseded: false,
            },
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

    /// Appends a data record. `payload` is what the codec made of the data runs, in pieces. Records of
    /// a pass come in ascending order, volume after volume; those of pass 0 hold whole cells.
    ///
    /// # Errors
    /// The sink's.
    pub fn data(&mut self, record: &DataRecord, payload: &[&[u8]]) -> Result<()> {
        let (base, tables, extents) = record.tables.encode();
        let stored: usize = payload.iter().map(|piece| piece.len()).sum();
        let header = self.header(record_kind::DATA, stored)?;
        let header = RecordHeader {
            codec: record.codec,
            flags: if record.pass == 0 {
                record_flag::WHOLE_CELLS
            } else {
                0
            }
            .into(),
            volume: record.volume.into(),
            pass: record.pass.into(),
            base: base.0.into(),
            extents: extents.into(),
            hashes: (record.tables.hashes.len() as u32).into(),
            plain_len: (record.tables.data_len().0 as u32).into(),
            payload_crc: record.payload_crc.into(),
            ..header
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
        self.content.add(record);
        self.record(header, &tables, payload)?;
        if self.pending.len() == SEGMENT_ENTRIES {
            self.flush_index()?;
        }
        Ok(())
    }

    /// The content id, if it can be told without reading the image: no block was superseded. All
    /// data must have been written.
    pub fn content_id(&self) -> Option<Hash> {
        let mut content = self.content.clone();
        let volumes = content.sizes.len() as u32;
        content.begin_up_to(volumes);
        if volumes > 0 {
            content.hasher.end_volume();
        }
        (!content.superseded).then(|| content.hasher.finish())
    }

    /// Ends the image: the rest of the index, its root, the trailer and the footer.
    ///
    /// # Errors
    /// The sink's.
    pub fn finish(mut self, trailer: &Trailer) -> Result<(S, Written)> {
        self.flush_index()?;
        let index_root = self.position;
        let segments = std::mem::take(&mut self.segments);
        self.bytes(record_kind::INDEX_ROOT, segments.as_bytes())?;
        let trailer_position = self.position;
        self.json(record_kind::TRAILER, trailer)?;
        let rest = self.position.next_multiple_of(FRAME as u64) - self.position;
        self.append(&[0; FRAME][..rest as usize])?;
        let root_hash = *self.root.finalize().as_bytes();
        let len = self.position + FRAME as u64;
        let footer = Footer {
            magic: FOOTER_MAGIC,
            image_id: self.image_id,
            index_root: index_root.into(),
            trailer: trailer_position.into(),
            records: self.sequence.into(),
            total_len: len.into(),
            root_hash,
        };
        self.append(&seal_frame(footer.as_bytes()))?;
        let written = Written {
            len: ByteLen(len),
            root_hash,
        };
        Ok((self.sink, written))
    }

    fn flush_index(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let entries = std::mem::take(&mut self.pending);
        self.segments.push(IndexRootEntry {
            position: self.position.into(),
            entries: (entries.len() as u32).into(),
            reserved: 0.into(),
            first_sequence: entries[0].sequence,
        });
        self.bytes(record_kind::INDEX, entries.as_bytes())?;
        self.pending = entries;
        self.pending.clear();
        Ok(())
    }

    fn json(&mut self, kind: u8, value: &impl serde::Serialize) -> Result<()> {
        let json = serde_json::to_vec(value).map_err(|source| {
            Error::new(Kind::Failed, "cannot describe the image").because(source)
        })?;
        self.bytes(kind, &json)
    }

    /// A record other than data: one hash, one uncompressed payload.
    fn bytes(&mut self, kind: u8, payload: &[u8]) -> Result<()> {
        let hash = blake3::hash(payload);
        let header = RecordHeader {
            hashes: 1.into(),
            plain_len: (payload.len() as u32).into(),
            payload_crc: crc32fast::hash(payload).into(),
            ..self.header(kind, payload.len())?
        };
        self.record(header, hash.as_bytes(), &[payload])
    }

    fn header(&self, kind: u8, stored: usize) -> Result<RecordHeader> {
        let stored_len = u32::try_from(stored).ok().filter(|len| *len <= MAX_STORED);
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
            image_id: self.image_id,
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

impl ContentProgress {
    fn add(&mut self, record: &DataRecord) {
        if record.pass > 0 {
            self.superseded = true;
        }
        if self.superseded {
            return;
        }
        self.begin_up_to(record.volume);
        let cells = cells_of(record.tables.data_extents());
        for (cell, hash) in cells.zip(&record.tables.hashes) {
            if hash != zero_cell_hash() {
                self.hasher.cell(cell, hash);
            }
        }
    }

    fn begin_up_to(&mut self, volume: u32) {
        while self.begun < volume {
            if self.begun > 0 {
                self.hasher.end_volume();
            }
            self.hasher.volume(ByteLen(self.sizes[self.begun as usize]));
            self.begun += 1;
        }
    }
}
