//! Reads one page of the kernel's trace ring buffer (kernel/trace/ring_buffer.c,
//! include/linux/ring_buffer.h), in memory only.
//!
//! A page is a header with the number of bytes of events, and the events. Each event begins with a
//! 32-bit word: five bits of type or length, 27 of time. Lengths up to 112 bytes are in those five
//! bits (in words), longer ones in a word of their own.

use super::format::{EventFormat, PageFormat};

/// Set in the page's length word when events before this page were lost.
const MISSED_EVENTS: u64 = 1 << 31;
/// Set when how many is stored behind the events.
const MISSED_STORED: u64 = 1 << 30;
/// The bits that are the length.
const LENGTH: u64 = (1 << 20) - 1;

const TYPE_PADDING: u32 = 29;
const TYPE_TIME_EXTEND: u32 = 30;
const TYPE_TIME_STAMP: u32 = 31;

/// One completed request, as traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completed {
    /// The disk, as the kernel numbers it inside.
    pub(super) dev: u32,
    pub(super) sector: u64,
    pub(super) sectors: u32,
    /// First letter of the kernel's description: `W`, `D`, `F`, `N`, `R` …
    pub(super) letter: u8,
    /// Second letter.
    pub(super) detail: u8,
}

/// The page makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadPage;

/// Hands the events of a page to `each`; whether events were lost before it.
pub(super) fn read(
    page: &[u8],
    format: &PageFormat,
    event: &EventFormat,
    mut each: impl FnMut(Completed),
) -> Result<bool, BadPage> {
    let commit = page.get(format.commit.clone()).ok_or(BadPage)?;
    let commit = match *commit {
        [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => return Err(BadPage),
    };
    if commit & 0xffff_ffff & !(MISSED_EVENTS | MISSED_STORED | LENGTH) != 0 {
        return Err(BadPage);
    }
    let length = usize::try_from(commit & LENGTH).map_err(|_| BadPage)?;
    let data = page.get(format.data.clone()).ok_or(BadPage)?;
    let mut rest = data.get(..length).ok_or(BadPage)?;
    while !rest.is_empty() {
        let header = u32_at(rest, 0)?;
        let first = u32_at(rest, 4);
        let delta = header >> 5;
        let (skip, body) = match header & 31 {
            // The rest of the page is unused.
            TYPE_PADDING if delta == 0 => break,
            // An event that the filter threw out after it was written.
            TYPE_PADDING => (length_of(first?)?.saturating_add(4), None),
            TYPE_TIME_EXTEND | TYPE_TIME_STAMP => (8, None),
            // The length counts its own word.
            0 => {
                let end = length_of(first?)?.saturating_add(4);
                (end, Some(8..end))
            }
            words => {
                // At most 28 words.
                let end = length_of(words)? * 4 + 4;
                (end, Some(4..end))
            }
        };
        if let Some(body) = body {
            let body = rest.get(body).ok_or(BadPage)?;
            if let Some(completed) = decode(body, event)? {
                each(completed);
            }
        }
        rest = rest.get(skip..).ok_or(BadPage)?;
    }
    Ok(commit & MISSED_EVENTS != 0)
}

/// One event; `None` if it is of another kind.
fn decode(body: &[u8], format: &EventFormat) -> Result<Option<Completed>, BadPage> {
    let bytes = |range: &std::ops::Range<usize>| body.get(range.clone()).ok_or(BadPage);
    let id = bytes(&format.common_type)?;
    if id != format.id.to_le_bytes() {
        return Ok(None);
    }
    let sector = bytes(&format.sector)?;
    let rwbs = bytes(&format.rwbs)?;
    Ok(Some(Completed {
        dev: u32_at(bytes(&format.dev)?, 0)?,
        sector: u64::from_le_bytes(sector.try_into().map_err(|_| BadPage)?),
        sectors: u32_at(bytes(&format.nr_sector)?, 0)?,
        letter: rwbs.first().copied().unwrap_or(0),
        detail: rwbs.get(1).copied().unwrap_or(0),
    }))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, BadPage> {
    let word = bytes.get(at..at + 4).ok_or(BadPage)?;
    Ok(u32::from_le_bytes(word.try_into().map_err(|_| BadPage)?))
}

fn length_of(word: u32) -> Result<usize, BadPage> {
    usize::try_from(word).map_err(|_| BadPage)
}

#[cfg(test)]
mod tests {
    use super::super::format::tests::{FORMAT, HEADER_EVENT, HEADER_PAGE};
    use super::*;

    fn formats() -> (PageFormat, EventFormat) {
        (
            PageFormat::parse(HEADER_PAGE, HEADER_EVENT).unwrap(),
            EventFormat::parse(FORMAT).unwrap(),
        )
    }

    fn body(id: u16, sector: u64, sectors: u32, rwbs: &[u8]) -> Vec<u8> {
        let mut body = vec![0; 48];
        body[..2].copy_from_slice(&id.to_le_bytes());
        body[8..12].copy_from_slice(&0x70_0001u32.to_le_bytes());
        body[16..24].copy_from_slice(&sector.to_le_bytes());
        body[24..28].copy_from_slice(&sectors.to_le_bytes());
        body[34..34 + rwbs.len()].copy_from_slice(rwbs);
        body
    }

    fn page(events: &[Vec<u8>], flags: u64) -> Vec<u8> {
        let data = events.concat();
        let mut page = vec![0; 4096];
        page[8..16].copy_from_slice(&(data.len() as u64 | flags).to_le_bytes());
        page[16..16 + data.len()].copy_from_slice(&data);
        page
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// An event with its length in the first word, and one with it in a word of its own.
    fn short(body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() / 4).unwrap();
        [words(&[7 << 5 | length]), body.to_vec()].concat()
    }

    fn long(body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [words(&[7 << 5, length]), body.to_vec()].concat()
    }

    /// Sector, sectors and letter of each event, and whether some were lost.
    type Found = (Vec<(u64, u32, u8)>, bool);

    fn read_all(page: &[u8]) -> Result<Found, BadPage> {
        let (format, event) = formats();
        let mut found = Vec::new();
        let lost = read(page, &format, &event, |completed| {
            assert_eq!(completed.dev, 0x70_0001);
            found.push((completed.sector, completed.sectors, completed.letter));
        })?;
        Ok((found, lost))
    }

    #[test]
    fn every_kind_of_entry() {
        let events = [
            words(&[1 << 5 | TYPE_TIME_EXTEND, 5]),
            short(&body(2107, 8, 16, b"WS")),
            words(&[1 << 5 | TYPE_TIME_STAMP, 5]),
            // Thrown out by the filter: twelve bytes, of which four count themselves.
            words(&[1 << 5 | TYPE_PADDING, 8, 99]),
            short(&body(4, 1, 1, b"W")),
            long(&body(2107, u64::MAX, u32::MAX, b"D")),
        ];
        let expected = vec![(8, 16, b'W'), (u64::MAX, u32::MAX, b'D')];
        assert_eq!(read_all(&page(&events, 0)), Ok((expected.clone(), false)));
        let lost = read_all(&page(&events, MISSED_EVENTS | MISSED_STORED));
        assert_eq!(lost, Ok((expected, true)));
        assert_eq!(read_all(&page(&[], 0)), Ok((vec![], false)));
        // What follows the end-of-page padding is rubbish.
        let ended = [
            short(&body(2107, 8, 16, b"W")),
            words(&[TYPE_PADDING, 1, 2, 3]),
        ];
        assert_eq!(read_all(&page(&ended, 0)), Ok((vec![(8, 16, b'W')], false)));
    }

    #[test]
    fn damage_is_an_error_not_a_panic() {
        let good = short(&body(2107, 8, 16, b"WS"));
        for end in 1..good.len() {
            let cut = good[..end].to_vec();
            assert_eq!(read_all(&page(&[cut], 0)), Err(BadPage), "{end}");
        }
        let too_long = [words(&[0, 5000])];
        assert_eq!(read_all(&page(&too_long, 0)), Err(BadPage));
        assert_eq!(read_all(&page(&[words(&[0, 0])], 0)), Err(BadPage));
        assert_eq!(read_all(&page(&[words(&[0, u32::MAX])], 0)), Err(BadPage));
        assert_eq!(read_all(&page(&[], 1 << 25)), Err(BadPage));
        assert_eq!(read_all(&page(&[], 4081)), Err(BadPage));
        assert_eq!(read_all(&[0; 10]), Err(BadPage));
        // An event of the right kind that is too short for its fields.
        let stub = short(&body(2107, 8, 16, b"W")[..40]);
        assert_eq!(read_all(&page(&[stub], 0)), Err(BadPage));
    }

    #[test]
    fn random_pages_end() {
        let (format, event) = formats();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut page = vec![0; 4096];
        for _ in 0..2000 {
            for chunk in page.chunks_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Small numbers now and then, so that lengths make sense.
                let value = if state & 1 == 0 { state } else { state >> 50 };
                chunk.copy_from_slice(&value.to_le_bytes());
            }
            page[8..16].copy_from_slice(&(state % 4080).to_le_bytes());
            let _ = read(&page, &format, &event, |_| ());
        }
    }
}
