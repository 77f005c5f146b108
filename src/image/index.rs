//! Reads an image anywhere, by its index: which records cover a range, and what the newest of them say.
//!
//! Everything is checked as in reading in order: an index segment by its checksums and against the
//! root, a record against its index entry, a payload against its hashes. Memory is bounded by three
//! small caches, whatever the size of the image. That the index names every record is not proven
//! here: reading in order does that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use zerocopy::FromBytes;

use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::image::content::{CellHasher, ContentHasher, Hash, zero_cell_hash};
use crate::image::format::{
    CELL, FileHeader, IndexEntry, IndexRootEntry, MAX_SEGMENT, RECORD_HEADER, RecordHeader,
    record_kind,
};
use crate::image::manifest::Manifest;
use crate::image::reader::{Cursor, DataHead, Summary, root_entry, summarize};
use crate::image::record::{Input, Record, check_record, damaged, read_tables};
use crate::image::tables::Content;
use crate::read_at::{ReadAt, check_range};
use crate::units::{ByteLen, Offset};

/// Bytes of index segments kept in memory.
const SEGMENT_CACHE: usize = 16 << 20;

/// Bytes of record tables kept in memory.
const HEAD_CACHE: usize = 16 << 20;

/// Bytes of decoded payloads kept in memory.
const PLAIN_CACHE: usize = 32 << 20;

/// An image that can be read anywhere.
#[allow(
    missing_debug_implementations,
    reason = "an image need not be printable"
)]
pub struct IndexedImage<'a> {
    image: &'a dyn ReadAt,
    header: FileHeader,
    manifest: Manifest,
    /// Ascending by volume and pass.
    passes: Vec<PassIndex>,
    segments: Mutex<Cache<Vec<IndexEntry>>>,
    heads: Mutex<Cache<DataHead>>,
    plains: Mutex<Cache<Vec<u8>>>,
}

/// The index segments of one pass of a volume, ascending.
struct PassIndex {
    volume: u32,
    pass: u32,
    segments: Vec<IndexRootEntry>,
}

impl<'a> IndexedImage<'a> {
    /// Opens a whole image. Returns with it what the image says of itself.
    ///
    /// # Errors
    /// As [`summarize`]; [`Kind::Damaged`](crate::error::Kind::Damaged) if the index root is.
    pub fn open(image: &'a dyn ReadAt) -> Result<(Self, Summary)> {
        let summary = summarize(image)?;
        let mut input = Cursor::input(image, summary.footer.index_root.get());
        let record = read_record(&mut input, &summary.header)?;
        let payload = record.read_whole(&mut input)?;
        let roots = <[IndexRootEntry]>::ref_from_bytes(&payload)
            .ok()
            .filter(|_| record.header.kind == record_kind::INDEX_ROOT)
            .ok_or_else(|| damaged("the footer points astray"))?;
        let indexed = Self::new(image, summary.header, summary.manifest.clone(), roots)?;
        Ok((indexed, summary))
    }

    /// An image of which header, manifest and index root are known, whole or still being written.
    ///
    /// # Errors
    /// [`Kind::Damaged`](crate::error::Kind::Damaged) if the index root makes no sense.
    pub(super) fn new(
        image: &'a dyn ReadAt,
        header: FileHeader,
        manifest: Manifest,
        roots: &[IndexRootEntry],
    ) -> Result<Self> {
        let mut roots = roots.to_vec();
        roots.sort_by_key(|root| (root.volume.get(), root.pass.get(), root.sequence.get()));
        let mut passes: Vec<PassIndex> = Vec::new();
        for root in roots {
            let (volume, pass) = (root.volume.get(), root.pass.get());
            match passes.last_mut() {
                Some(last) if (last.volume, last.pass) == (volume, pass) => {
                    let ascends = last.segments.last().is_none_or(|l| l.end <= root.start);
                    if !ascends {
                        return Err(damaged("the index is not in order"));
                    }
                    last.segments.push(root);
                }
                _ => passes.push(PassIndex {
                    volume,
                    pass,
                    segments: vec![root],
                }),
            }
        }
        Ok(Self {
            image,
            header,
            manifest,
            passes,
            segments: Mutex::new(Cache::new(SEGMENT_CACHE)),
            heads: Mutex::new(Cache::new(HEAD_CACHE)),
            plains: Mutex::new(Cache::new(PLAIN_CACHE)),
        })
    }

    /// What the image is of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The length of a volume or stream; 0 if there is none of that number.
    pub fn len(&self, number: u32) -> ByteLen {
        let n = number as usize;
        match n.checked_sub(1).and_then(|n| self.manifest.volumes.get(n)) {
            Some(volume) => ByteLen(volume.size),
            None => {
                let last = self.passes_of(number).last();
                let end = last.and_then(|pass| pass.segments.last());
                ByteLen(end.map_or(0, |segment| segment.end.get()))
            }
        }
    }

    /// Reads bytes of a volume or stream: what the newest record says of each block, and zeros where none says
    /// anything.
    ///
    /// # Errors
    /// [`Kind::Damaged`](crate::error::Kind::Damaged) with the record's position in the image; if the
    /// range passes the volume's end.
    pub fn read(&self, volume: u32, offset: Offset, buf: &mut [u8]) -> Result<()> {
        check_range(self.len(volume), offset, ByteLen(buf.len() as u64))?;
        let mut at = offset;
        for piece in buf.chunks_mut(CELL as usize) {
            self.read_piece(volume, at, piece)?;
            at = at + ByteLen(piece.len() as u64);
        }
        Ok(())
    }

    fn read_piece(&self, volume: u32, offset: Offset, buf: &mut [u8]) -> Result<()> {
        let whole = Extent::new(offset.0, buf.len() as u64);
        let mut missing: ExtentSet = std::iter::once(whole).collect();
        buf.fill(0);
        for head in self.touching(volume, whole)?.iter().rev() {
            let mut plain_at = 0;
            for run in &head.tables.runs {
                let parts: Vec<Extent> = missing.intersect(run.extent).collect();
                if run.content == Content::Data {
                    for part in parts {
                        let plain = self.plain(head)?;
                        let from = plain_at + part.start.since(run.extent.start).as_usize();
                        let to = part.start.since(offset).as_usize();
                        let len = part.len.as_usize();
                        buf[to..to + len].copy_from_slice(&plain[from..from + len]);
                    }
                    plain_at += run.extent.len.as_usize();
                }
                missing.remove(run.extent);
            }
            if missing.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Computes the content id. Cells that one record alone has are not decoded: their hash is in its
    /// tables.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn content_id(&self) -> Result<Hash> {
        let volumes = self.manifest.volumes.len();
        let mut id = ContentHasher::new(volumes, self.manifest.streams.len());
        for number in 1..=(volumes + self.manifest.streams.len()) as u32 {
            self.cells(number, |cell, hash| id.cell(cell, hash))?;
            id.end(self.len(number));
        }
        Ok(id.finish())
    }

    /// The hashes of all cells of a volume that are not zero, in order.
    fn cells(&self, volume: u32, mut each: impl FnMut(u64, &Hash)) -> Result<()> {
        let mut walks = self
            .passes_of(volume)
            .map(|pass| CellWalk::new(self, pass))
            .collect::<Result<Vec<_>>>()?;
        while let Some(cell) = walks.iter().filter_map(CellWalk::cell).min() {
            let hash = self.cell_hash(volume, cell)?;
            if hash != *zero_cell_hash() {
                each(cell, &hash);
            }
            for walk in &mut walks {
                while walk.cell() == Some(cell) {
                    walk.advance(self)?;
                }
            }
        }
        Ok(())
    }

    fn cell_hash(&self, volume: u32, cell: u64) -> Result<Hash> {
        let extent = Extent::new(cell * CELL, CELL);
        let touching = self.touching(volume, extent)?;
        if let [only] = touching.as_slice()
            && only.whole_cells
            && let Some(hash) = only.hash_of(cell)
        {
            return Ok(*hash);
        }
        let end = extent.end().min(Offset(self.len(volume).0));
        let mut bytes = vec![0; end.since(extent.start).as_usize()];
        self.read_piece(volume, extent.start, &mut bytes)?;
        let mut hasher = CellHasher::new();
        hasher.push(0, &bytes);
        Ok(hasher.finish().0)
    }

    fn passes_of(&self, volume: u32) -> impl Iterator<Item = &PassIndex> + '_ {
        let from = self.passes.partition_point(|pass| pass.volume < volume);
        self.passes[from..]
            .iter()
            .take_while(move |pass| pass.volume == volume)
    }

    /// The records that say anything of `extent`, from the oldest to the newest.
    fn touching(&self, volume: u32, extent: Extent) -> Result<Vec<Arc<DataHead>>> {
        let mut heads = Vec::new();
        for pass in self.passes_of(volume) {
            let from = pass
                .segments
                .partition_point(|segment| segment.end.get() <= extent.start.0);
            for segment in &pass.segments[from..] {
                if segment.start.get() >= extent.end().0 {
                    break;
                }
                let entries = self.segment(segment)?;
                let from = entries.partition_point(|entry| entry.end.get() <= extent.start.0);
                let behind = |entry: &&IndexEntry| entry.start.get() < extent.end().0;
                for entry in entries[from..].iter().take_while(behind) {
                    let head = self.head(entry)?;
                    let runs = &head.tables.runs;
                    let at = runs.partition_point(|run| run.extent.end() <= extent.start);
                    if runs
                        .get(at)
                        .is_some_and(|run| run.extent.start < extent.end())
                    {
                        heads.push(head);
                    }
                }
            }
        }
        Ok(heads)
    }

    fn segment(&self, root: &IndexRootEntry) -> Result<Arc<Vec<IndexEntry>>> {
        cached(&self.segments, root.position.get(), || {
            let mut input = Cursor::input(self.image, root.position.get());
            let record = read_record(&mut input, &self.header)?;
            let payload = record.read_whole(&mut input)?;
            let entries = <[IndexEntry]>::ref_from_bytes(&payload)
                .ok()
                .filter(|entries| entries.len() <= MAX_SEGMENT)
                .ok_or_else(|| damaged("an index segment has an odd length").at(record.at()))?;
            let sequence = record.header.sequence.get();
            let is_uniform = entries
                .iter()
                .all(|entry| entry.volume == root.volume && entry.pass == root.pass);
            let ascends = entries
                .windows(2)
                .all(|pair| pair[0].end <= pair[1].start && pair[0].sequence < pair[1].sequence);
            if record.header.kind != record_kind::INDEX
                || root_entry(entries, sequence, record.position).as_ref() != Some(root)
                || !is_uniform
                || !ascends
            {
                return Err(damaged("an index segment is not the root's").at(record.at()));
            }
            Ok((entries.to_vec(), payload.len()))
        })
    }

    fn head(&self, entry: &IndexEntry) -> Result<Arc<DataHead>> {
        cached(&self.heads, entry.position.get(), || {
            let mut input = Cursor::input(self.image, entry.position.get());
            let record = read_record(&mut input, &self.header)?;
            let wrong = || damaged("a record is not the index's").at(record.at());
            if !matches!(record.header.kind, record_kind::DATA | record_kind::STREAM) {
                return Err(wrong());
            }
            let head = DataHead::new(&record, &self.manifest)?;
            let span = head.tables.span();
            let fits = head.sequence == entry.sequence.get()
                && head.volume == entry.volume.get()
                && head.pass == entry.pass.get()
                && span.start.0 == entry.start.get()
                && span.end().0 == entry.end.get();
            if !fits {
                return Err(wrong());
            }
            let tables = &head.tables;
            let weight = size_of::<DataHead>()
                + tables.runs.capacity() * size_of_val(&tables.runs[..1])
                + tables.hashes.capacity() * size_of::<Hash>();
            Ok((head, weight))
        })
    }

    /// The decoded payload of a record.
    fn plain(&self, head: &DataHead) -> Result<Arc<Vec<u8>>> {
        cached(&self.plains, head.position, || {
            let mut input = Cursor::input(self.image, head.position);
            let record = read_record(&mut input, &self.header)?;
            let mut stored = vec![0; head.stored_len()];
            input.fill(&mut stored)?;
            input.zeros(record.tail())?;
            let mut plain = vec![0; head.tables.data_len().as_usize()];
            let mut decompressor = zstd::bulk::Decompressor::new()
                .map_err(|error| Error::io("cannot set up decompression", error))?;
            let is_stored = {
                let bytes = head.decode(&stored, &mut plain, &mut decompressor)?;
                std::ptr::eq(bytes.as_ptr(), stored.as_ptr())
            };
            let plain = if is_stored { stored } else { plain };
            let weight = plain.len();
            Ok((plain, weight))
        })
    }
}

/// A record anywhere, up to its payload; what it is and whether it is the expected one is the
/// caller's to check.
fn read_record(input: &mut Input<Cursor<'_>>, file: &FileHeader) -> Result<Record> {
    let position = input.position;
    let mut bytes = [0; RECORD_HEADER];
    input.fill(&mut bytes)?;
    let header = RecordHeader::read_from_bytes(&bytes).map_err(|_| damaged("impossible"))?;
    check_record(&header, file).map_err(|error| error.at(Offset(position)))?;
    let record = read_tables(input, header, position)?;
    input.zeros(record.header.pad.get() as usize)?;
    Ok(record)
}

/// Walks over the cells that the records of one pass have data in, ascending.
struct CellWalk<'i> {
    pass: &'i PassIndex,
    segment: usize,
    entry: usize,
    cells: std::vec::IntoIter<u64>,
    current: Option<u64>,
}

impl<'i> CellWalk<'i> {
    fn new(image: &IndexedImage<'_>, pass: &'i PassIndex) -> Result<Self> {
        let mut walk = Self {
            pass,
            segment: 0,
            entry: 0,
            cells: Vec::new().into_iter(),
            current: None,
        };
        walk.advance(image)?;
        Ok(walk)
    }

    /// Where it stands; `None` at the end.
    fn cell(&self) -> Option<u64> {
        self.current
    }

    fn advance(&mut self, image: &IndexedImage<'_>) -> Result<()> {
        self.current = self.cells.next();
        while self.current.is_none() {
            let Some(segment) = self.pass.segments.get(self.segment) else {
                return Ok(());
            };
            let entries = image.segment(segment)?;
            let Some(entry) = entries.get(self.entry) else {
                (self.segment, self.entry) = (self.segment + 1, 0);
                continue;
            };
            self.entry += 1;
            let head = image.head(entry)?;
            let cells: Vec<u64> = head.tables.cells().map(|(cell, _)| cell).collect();
            self.cells = cells.into_iter();
            self.current = self.cells.next();
        }
        Ok(())
    }
}

/// Keeps what was used of late, up to a weight. Two generations: what is used lives on in the young
/// one; when that has half the weight, the old one goes.
struct Cache<V> {
    limit: usize,
    weight: usize,
    young: HashMap<u64, (Arc<V>, usize)>,
    old: HashMap<u64, (Arc<V>, usize)>,
}

impl<V> Cache<V> {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            weight: 0,
            young: HashMap::new(),
            old: HashMap::new(),
        }
    }

    fn get(&mut self, key: u64) -> Option<Arc<V>> {
        if let Some((value, _)) = self.young.get(&key) {
            return Some(Arc::clone(value));
        }
        let (value, weight) = self.old.remove(&key)?;
        self.insert(key, Arc::clone(&value), weight);
        Some(value)
    }

    fn insert(&mut self, key: u64, value: Arc<V>, weight: usize) {
        if self.weight + weight > self.limit / 2 {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
        self.weight += weight;
        self.young.insert(key, (value, weight));
    }
}

fn cached<V>(
    cache: &Mutex<Cache<V>>,
    key: u64,
    load: impl FnOnce() -> Result<(V, usize)>,
) -> Result<Arc<V>> {
    let lock = || cache.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(value) = lock().get(key) {
        return Ok(value);
    }
    let (value, weight) = load()?;
    let value = Arc::new(value);
    lock().insert(key, Arc::clone(&value), weight);
    Ok(value)
}
