//! Reads an image from its first byte to its last, as a file or a stream, and believes nothing.
//!
//! [`ImageReader`] checks everything but the payloads of data records: those it hands out as they are
//! stored, so that workers can decode and check them in parallel ([`DataHead::decode`]). It is
//! finished only when the footer and the end of the input were seen: an image that was cut off, even
//! between two records, is [`Kind::Truncated`].
//!
//! Asked to [go on behind damage](ImageReader::go_on_behind_damage), it hands out what is lost as
//! [`Item::Lost`]. Where a record header is damaged, the next one is found by scanning: at a multiple
//! of 8 bytes, whole, of this very image, and with a higher sequence number than all before it, so
//! that images stored inside the image are not taken for parts of it. Where the lost records belonged
//! is told by the index segments behind them.

mod ends;
mod losses;

use std::io::Read;
use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Kind, Result};
use crate::extent::Extent;
use crate::image::content::Hash;
use crate::image::format::{
    FRAME, FileHeader, IndexEntry, IndexRootEntry, MAGIC, MAX_SEGMENT, MAX_SEGMENTS, RECORD_ALIGN,
    RECORD_HEADER, RECORD_MAGIC, RecordHeader, feature, record_kind,
};
use crate::image::manifest::{Manifest, Trailer};
pub use crate::image::record::DataHead;
use crate::image::record::{
    Input, Record, check_first_frame, check_record, damaged, read_tables, truncated,
};
use crate::units::{ByteLen, Offset};
pub(super) use ends::Cursor;
pub use ends::{Front, Summary, summarize};
pub use losses::{Lost, State};

use ends::check_footer;
use losses::{ENOUGH_DAMAGE, Losses};

/// An image being read in order.
#[derive(Debug)]
pub struct ImageReader<R> {
    input: Input<R>,
    header: FileHeader,
    manifest: Manifest,
    manifest_hash: Option<blake3::Hash>,
    sequence: u64,
    root: blake3::Hasher,
    pending: Vec<IndexEntry>,
    segments: Vec<IndexRootEntry>,
    manifest_copy: Option<u64>,
    index_root: Option<u64>,
    /// For each volume and stream.
    progress: Vec<Progress>,
    /// `None`: the first damage ends the reading.
    losses: Option<Losses>,
}

/// How far a volume or stream has come.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    pass: u32,
    end: Offset,
    /// The first cell that a further record of the pass may have whole.
    next_cell: u64,
    /// Records were lost since its last one: perhaps its own.
    is_unsure: bool,
}

/// What comes next in an image.
#[derive(Debug)]
pub enum Item {
    /// A data record; its payload must be read next.
    Data(DataHead),
    /// Something was damaged. Only when asked to go on behind damage.
    Lost(Lost),
    /// The end, and, unless something was lost, that it was whole.
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
        let mut input = Input::new(input, 0);
        let mut frame = [0; FRAME];
        let got = input.fill_some(&mut frame)?;
        let magic = &frame[..got.min(MAGIC.len())];
        if magic.is_empty() || magic != &MAGIC[..magic.len()] {
            return Err(Error::new(Kind::NotAnImage, "this is no holdstill image"));
        }
        if got < FRAME {
            return Err(truncated());
        }
        let header = check_first_frame(&frame)?;
        let mut reader = Self::new(input, header, Manifest::default());
        reader.root.update(&frame);
        let record = reader.record()?;
        if record.header.kind != record_kind::MANIFEST {
            return Err(damaged("it does not begin with the list of volumes").at(record.at()));
        }
        let json = reader.whole_payload(&record)?;
        reader.set_manifest(&json)?;
        Ok(reader)
    }

    /// Reads an image of which the header or the first manifest is damaged: `front` tells what was in
    /// them, and `input` stands behind the header. Goes on behind damage, the first of which is
    /// `error`.
    pub fn open_behind(front: Front, error: Error, input: R) -> Self {
        let mut reader = Self::new(
            Input::new(input, FRAME as u64),
            front.header,
            front.manifest,
        );
        reader.progress = vec![Progress::default(); reader.numbers()];
        let mut losses = Losses::default();
        losses.tell(Lost::nowhere(error));
        reader.losses = Some(losses);
        reader
    }

    pub(super) fn new(input: Input<R>, header: FileHeader, manifest: Manifest) -> Self {
        Self {
            input,
            header,
            manifest,
            manifest_hash: None,
            sequence: 0,
            root: blake3::Hasher::new(),
            pending: Vec::new(),
            segments: Vec::new(),
            manifest_copy: None,
            index_root: None,
            progress: Vec::new(),
            losses: None,
        }
    }

    fn set_manifest(&mut self, json: &[u8]) -> Result<()> {
        self.manifest = decode_manifest(json, &self.header)?;
        self.manifest_hash = Some(blake3::hash(json));
        self.progress = vec![Progress::default(); self.numbers()];
        Ok(())
    }

    fn numbers(&self) -> usize {
        self.manifest.volumes.len() + self.manifest.streams.len()
    }

    /// From now on, damage does not end the reading but is handed out as [`Item::Lost`].
    pub fn go_on_behind_damage(&mut self) {
        self.losses.get_or_insert_default();
    }

    /// What the image is of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The random id in the file header.
    pub fn image_id(&self) -> [u8; 16] {
        self.header.image_id
    }

    /// Largest number of plain bytes in any record, as the header promises it. No payload is stored
    /// in more.
    pub fn max_plain(&self) -> usize {
        self.header.max_plain.get() as usize
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
            if let Some(losses) = &mut self.losses {
                if let Some(item) = losses.queue.pop_front() {
                    return Ok(item);
                }
                if let Some(end) = losses.end.take() {
                    return Err(end);
                }
            }
            match self.next_record() {
                Ok(Some(item)) => return Ok(item),
                Ok(None) => {}
                Err(error) if error.kind() == Kind::Truncated && self.losses.is_some() => {
                    self.cut_off(error)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads one record. `None` if it holds nothing for the caller.
    fn next_record(&mut self) -> Result<Option<Item>> {
        let position = self.input.position;
        let sequence = self.sequence;
        match self.record() {
            Ok(record) => {
                let found = record.header.sequence.get();
                if found > sequence {
                    let error = damaged("records are missing").at(record.at());
                    self.lose(sequence..found, error)?;
                }
                match self.take(&record) {
                    Err(error) if self.goes_on(&error) => {
                        self.input.skip_to(record.end())?;
                        self.lose(found..found + 1, error)?;
                        Ok(None)
                    }
                    other => other,
                }
            }
            Err(error) if self.goes_on(&error) => {
                let error = error.at(Offset(position));
                let found = self.find_record();
                // Where the input ended, at least one record was not found.
                let least = u64::from(found.is_err());
                let next = self.sequence.max(sequence.saturating_add(least));
                self.lose(sequence..next, error)?;
                found.map(|()| None)
            }
            Err(error) => Err(error),
        }
    }

    fn goes_on(&self, error: &Error) -> bool {
        self.losses.is_some() && error.kind() == Kind::Damaged
    }

    /// Does what a record asks for. The input stands before its payload.
    fn take(&mut self, record: &Record) -> Result<Option<Item>> {
        let position = record.position;
        match record.header.kind {
            record_kind::DATA | record_kind::STREAM => {
                return self.data_head(record).map(Item::Data).map(Some);
            }
            record_kind::INDEX => {
                let payload = self.whole_payload(record)?;
                self.index_segment(&payload, record)?;
            }
            record_kind::MANIFEST => {
                let payload = self.whole_payload(record)?;
                let is_first = record.header.sequence.get() == 0;
                let expected = self.manifest_hash;
                if expected.is_some_and(|hash| hash != blake3::hash(&payload))
                    || (is_first && !self.has_losses())
                {
                    return Err(damaged("the lists of volumes differ").at(record.at()));
                }
                self.manifest_copy = (!is_first).then_some(position);
            }
            record_kind::INDEX_ROOT => {
                let payload = self.whole_payload(record)?;
                let is_ours = payload == self.segments.as_bytes() && self.pending.is_empty();
                if !is_ours && !self.has_losses() {
                    return Err(damaged("the index is not of this image").at(record.at()));
                }
                self.index_root = Some(position);
            }
            record_kind::TRAILER => {
                let json = self.whole_payload(record)?;
                let trailer = Trailer::decode(&json, &self.manifest)
                    .map_err(|error| error.at(record.at()))?;
                return self.end(trailer, record);
            }
            // Of a kind that may be skipped: `check_record` knows the others.
            _ => {
                self.whole_payload(record)?;
            }
        }
        Ok(None)
    }

    /// Reads the payload that belongs to `head` into the front of `buf`, as stored.
    ///
    /// # Errors
    /// As [`next_item`](Self::next_item). The payload itself is not checked here.
    ///
    /// # Panics
    /// If `buf` is shorter than [`max_plain`](Self::max_plain).
    pub fn read_payload(&mut self, head: &DataHead, buf: &mut [u8]) -> Result<usize> {
        let stored = head.stored_len as usize;
        self.input.fill(&mut buf[..stored])?;
        match self.padding(head.tail) {
            // The payload is intact; the next item says that the image was cut off.
            Err(error) if error.kind() == Kind::Truncated && self.losses.is_some() => {}
            other => other?,
        }
        Ok(stored)
    }

    /// Reads and checks a record's header and tables. The input stands before the payload then.
    fn record(&mut self) -> Result<Record> {
        let position = self.input.position;
        let mut bytes = [0; RECORD_HEADER];
        self.input.fill(&mut bytes)?;
        let checked = self.header_of(&bytes);
        if checked.is_err() && self.losses.is_some() {
            self.input.take_back(&bytes);
        }
        let header = checked.map_err(|error| error.at(Offset(position)))?;
        self.sequence = header.sequence.get() + 1;
        let record = match read_tables(&mut self.input, header, position) {
            Err(error) if self.goes_on(&error) => {
                // Its length is known: no need to search for the next.
                self.input.skip_to(position + header.total_len())?;
                Err(error)
            }
            other => other,
        }?;
        self.padding(header.pad.get() as usize)?;
        self.root.update(&bytes);
        self.root.update(&record.tables);
        Ok(record)
    }

    /// A record header that may come next.
    fn header_of(&self, bytes: &[u8; RECORD_HEADER]) -> Result<RecordHeader> {
        let header = RecordHeader::read_from_bytes(bytes).map_err(|_| damaged("impossible"))?;
        check_record(&header, &self.header)?;
        let sequence = header.sequence.get();
        let fits = match self.losses {
            None => sequence == self.sequence,
            Some(_) => (self.sequence..u64::MAX).contains(&sequence),
        };
        if !fits {
            return Err(damaged("a record is not in its place"));
        }
        Ok(header)
    }

    /// Moves on to the next whole record header, unless the input stands at one.
    fn find_record(&mut self) -> Result<()> {
        let mut bytes = [0; RECORD_HEADER];
        let skipped = self.input.position.next_multiple_of(RECORD_ALIGN) - self.input.position;
        self.input.skip_to(self.input.position + skipped)?;
        self.input.fill(&mut bytes)?;
        loop {
            if bytes.starts_with(&RECORD_MAGIC)
                && let Ok(header) = self.header_of(&bytes)
            {
                self.input.take_back(&bytes);
                self.sequence = header.sequence.get();
                return Ok(());
            }
            bytes.copy_within(RECORD_ALIGN as usize.., 0);
            self.input
                .fill(&mut bytes[RECORD_HEADER - RECORD_ALIGN as usize..])?;
        }
    }

    /// The payload of a record other than data, checked by CRC and hash.
    fn whole_payload(&mut self, record: &Record) -> Result<Vec<u8>> {
        let payload = record.read_whole(&mut self.input)?;
        self.padding(record.tail())?;
        Ok(payload)
    }

    fn data_head(&mut self, record: &Record) -> Result<DataHead> {
        let head = DataHead::new(record, &self.manifest)?;
        let has_losses = self.has_losses();
        let wrong = |what| damaged(what).at(record.at());
        let span = head.tables.span();
        let progress = self
            .progress
            .get_mut(head.volume as usize - 1)
            .ok_or_else(|| wrong("a record belongs to no volume"))?;
        let mut now = *progress;
        let unsure = std::mem::take(&mut now.is_unsure);
        if head.pass > now.pass {
            now = Progress {
                pass: head.pass,
                ..Progress::default()
            };
        }
        let first_cell = head.tables.cells().next().map(|(cell, _)| cell);
        let in_order = head.pass == now.pass
            && span.start >= now.end
            && (!head.whole_cells || first_cell.is_none_or(|cell| cell >= now.next_cell))
            && (!head.is_stream || has_losses || span.start == now.end);
        if !in_order {
            return Err(wrong("records are not in order"));
        }
        if let Some((last, _)) = head.tables.cells().last() {
            now.next_cell = last + 1;
        }
        let was = std::mem::replace(
            progress,
            Progress {
                end: span.end(),
                ..now
            },
        );
        if unsure && was.pass == 0 {
            let size = self.manifest.volumes.get(head.volume as usize - 1);
            let end = match (head.pass, size) {
                (0, _) | (_, None) => span.start,
                (_, Some(volume)) => Offset(volume.size),
            };
            if let Some(losses) = &mut self.losses {
                losses.note_gap(head.volume, Extent::between(was.end, end))?;
            }
        }
        if !has_losses {
            let is_due = self.pending.first().is_some_and(|first| {
                first.volume != record.header.volume || first.pass != record.header.pass
            });
            if is_due || self.pending.len() == MAX_SEGMENT {
                return Err(wrong("an index segment is missing"));
            }
            self.pending.push(IndexEntry {
                sequence: record.header.sequence,
                position: record.position.into(),
                volume: record.header.volume,
                pass: record.header.pass,
                start: span.start.0.into(),
                end: span.end().0.into(),
            });
        }
        Ok(head)
    }

    fn index_segment(&mut self, payload: &[u8], record: &Record) -> Result<()> {
        let wrong = || damaged("the index is not of this image").at(record.at());
        if let Some(losses) = self.losses.as_mut().filter(|losses| losses.any) {
            let entries = <[IndexEntry]>::ref_from_bytes(payload).map_err(|_| wrong())?;
            for entry in entries {
                losses.place(entry, &self.manifest);
            }
            return Ok(());
        }
        let is_full = self.segments.len() == MAX_SEGMENTS;
        let entry = root_entry(&self.pending, record.header.sequence.get(), record.position);
        match entry {
            Some(entry) if payload == self.pending.as_bytes() && !is_full => {
                self.segments.push(entry);
                self.pending.clear();
                Ok(())
            }
            _ => Err(wrong()),
        }
    }

    /// The end of the image, behind its trailer.
    fn end(&mut self, trailer: Trailer, record: &Record) -> Result<Option<Item>> {
        let streams = self.progress.iter().skip(self.manifest.volumes.len());
        let is_complete = streams
            .zip(&trailer.streams)
            .all(|(progress, stream)| progress.end == Offset(stream.len));
        if !is_complete && !self.has_losses() {
            return Err(damaged("a stream is not whole").at(record.at()));
        }
        let checked = self.footer(record.position);
        let end = Item::End(Box::new(End {
            trailer,
            len: ByteLen(self.input.position),
            root_hash: *self.root.finalize().as_bytes(),
        }));
        match &mut self.losses {
            None => checked.map(|()| Some(end)),
            Some(losses) => {
                losses.tell_unplaced(come_so_far(&self.manifest, &self.progress))?;
                if let Err(error) = checked {
                    losses.tell(Lost::nowhere(error));
                }
                losses.queue.push_back(end);
                Ok(None)
            }
        }
    }

    fn footer(&mut self, trailer_position: u64) -> Result<()> {
        let rest = self.input.position.next_multiple_of(FRAME as u64) - self.input.position;
        self.padding(rest as usize)?;
        let position = Offset(self.input.position);
        let mut frame = [0; FRAME];
        self.input.fill(&mut frame)?;
        let footer = check_footer(&frame, &self.header).map_err(|error| error.at(position))?;
        let fits = Some(footer.manifest.get()) == self.manifest_copy
            && Some(footer.index_root.get()) == self.index_root
            && footer.trailer.get() == trailer_position
            && footer.records.get() == self.sequence
            && footer.total_len.get() == self.input.position
            && footer.root_hash == *self.root.finalize().as_bytes();
        if !fits && !self.has_losses() {
            return Err(damaged("the footer does not fit the image").at(position));
        }
        let end = Offset(self.input.position);
        if self.input.fill_some(&mut [0])? != 0 {
            return Err(damaged("bytes follow the end of the image").at(end));
        }
        Ok(())
    }

    /// Reads `len` bytes of padding, which must be zero. `len` is at most [`FRAME`].
    fn padding(&mut self, len: usize) -> Result<()> {
        match (self.input.zeros(len), &mut self.losses) {
            (Err(error), Some(losses)) if error.kind() == Kind::Damaged => {
                losses.tell(Lost::nowhere(error));
                Ok(())
            }
            (done, _) => done,
        }
    }

    fn has_losses(&self) -> bool {
        self.losses.as_ref().is_some_and(|losses| losses.any)
    }

    /// Remembers records that were lost until the index tells where they belong.
    fn lose(&mut self, sequences: Range<u64>, error: Error) -> Result<()> {
        let Some(losses) = &mut self.losses else {
            return Err(error);
        };
        losses.any = true;
        if sequences.is_empty() {
            losses.tell(Lost::nowhere(error));
        } else {
            losses.unplaced.push((sequences, error));
            for progress in &mut self.progress {
                progress.is_unsure = true;
            }
        }
        if losses.unplaced.len() > ENOUGH_DAMAGE {
            return Err(damaged("there is too much damage to go on"));
        }
        Ok(())
    }

    /// The image ends too early: what should have followed is lost. Of a volume that has come to a later
    /// pass, any block may have been about to be superseded.
    fn cut_off(&mut self, error: Error) -> Result<()> {
        let Some(losses) = &mut self.losses else {
            return Ok(());
        };
        losses.tell_unplaced(come_so_far(&self.manifest, &self.progress))?;
        for (n, size, progress) in come_so_far(&self.manifest, &self.progress) {
            let (start, state) = match progress.pass {
                0 => (progress.end, State::Lost),
                _ => (Offset::ZERO, State::Outdated),
            };
            let rest = Extent::between(start, Offset(size));
            if !rest.is_empty() {
                losses.tell(Lost {
                    error: truncated().at(Offset(self.input.position)),
                    place: Some((n, vec![rest])),
                    state,
                });
            }
        }
        losses.end = Some(error);
        Ok(())
    }
}

/// Each volume's number, its size in bytes, and how far it has come.
fn come_so_far<'a>(
    manifest: &'a Manifest,
    progress: &'a [Progress],
) -> impl Iterator<Item = (u32, u64, &'a Progress)> {
    let volumes = manifest.volumes.iter().zip(progress);
    volumes.map(|(volume, progress)| (volume.n, volume.size, progress))
}

/// The index root's entry for a segment of `entries`, whose record is at `position`.
pub(super) fn root_entry(
    entries: &[IndexEntry],
    sequence: u64,
    position: u64,
) -> Option<IndexRootEntry> {
    let (first, last) = (entries.first()?, entries.last()?);
    Some(IndexRootEntry {
        sequence: sequence.into(),
        position: position.into(),
        volume: first.volume,
        pass: first.pass,
        entries: (entries.len() as u32).into(),
        reserved: 0.into(),
        start: first.start,
        end: last.end,
    })
}

fn decode_manifest(json: &[u8], header: &FileHeader) -> Result<Manifest> {
    let manifest = Manifest::decode(json)?;
    let has = |bit| header.incompatible.get() & bit != 0;
    if has(feature::PARENT) != manifest.parent.is_some()
        || has(feature::STREAMS) == manifest.streams.is_empty()
        || has(feature::SUBVOLUME) != manifest.has_subvolume()
    {
        return Err(damaged("the list of volumes does not fit the file header"));
    }
    Ok(manifest)
}
