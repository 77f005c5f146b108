//! What is written: every byte follows from the seed, the thread and the sequence number, so that
//! the checker can tell what a file must hold after any number of writes.

/// Bytes of one block of a random writer, and of its stamp's checksummed content.
pub(crate) const BLOCK: usize = 4096;

/// A block where `O_DIRECT` wants it.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(crate) struct Aligned(pub(crate) [u8; BLOCK]);

/// Marks the beginning of every stamp.
const MAGIC: u32 = 0x4c57_5354;

/// Bytes of a stamp: magic, thread, place, sequence number, length, CRC-32 of all but itself.
pub(crate) const STAMP: usize = 32;

/// Where the CRC-32 is in a stamp.
const CRC_AT: usize = 28;

/// A random number that follows from what it is for (SplitMix64 over the parts).
pub(crate) fn mix(seed: u64, thread: u64, number: u64) -> u64 {
    [thread, number].iter().fold(step(seed), |state, part| {
        step(state ^ part.wrapping_mul(0xa076_1d64_78bd_642f))
    })
}

fn step(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `buf` with bytes that follow from `key`: random ones for every other key, else a
/// repeated word, which compresses.
pub(crate) fn fill(buf: &mut [u8], key: u64) {
    let mut state = key;
    for part in buf.chunks_mut(8) {
        if key & 1 == 0 {
            state = step(state);
        }
        part.copy_from_slice(&state.to_le_bytes()[..part.len()]);
    }
}

/// Who wrote something, where, and as which of its writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The writing thread's index.
    pub(crate) thread: u32,
    /// The block number in the file (random writers), or 0 (appenders).
    pub(crate) place: u64,
    /// The thread's write that this was; 0 is the content before the first.
    pub(crate) seq: u64,
    /// Bytes of the whole write, stamp included.
    pub(crate) len: u32,
}

impl Stamp {
    /// All bytes of this write: the stamp and the content after it. `buf` is `len` bytes long.
    pub(crate) fn render(self, seed: u64, buf: &mut [u8]) {
        let (head, body) = buf.split_at_mut(STAMP);
        fill(
            body,
            mix(seed ^ self.place, u64::from(self.thread), self.seq),
        );
        head[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        head[4..8].copy_from_slice(&self.thread.to_le_bytes());
        head[8..16].copy_from_slice(&self.place.to_le_bytes());
        head[16..24].copy_from_slice(&self.seq.to_le_bytes());
        head[24..28].copy_from_slice(&self.len.to_le_bytes());
        let crc = checksum(buf);
        buf[CRC_AT..STAMP].copy_from_slice(&crc.to_le_bytes());
    }

    /// The stamp at the beginning of `buf`, if there is one; its checksum is not looked at.
    pub(crate) fn read(buf: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(buf.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(buf.get(at..at + 8)?.try_into().ok()?));
        (u32_at(0)? == MAGIC).then_some(())?;
        Some(Self {
            thread: u32_at(4)?,
            place: u64_at(8)?,
            seq: u64_at(16)?,
            len: u32_at(24)?,
        })
    }
}

/// Whether the bytes of a write match the checksum in their stamp.
pub(crate) fn intact(buf: &[u8]) -> bool {
    buf.len() >= STAMP && buf[CRC_AT..STAMP] == checksum(buf).to_le_bytes()
}

fn checksum(buf: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&buf[..CRC_AT]);
    hasher.update(&buf[STAMP..]);
    hasher.finalize()
}
