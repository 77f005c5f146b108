//! Makes all checksums of a changed image right again, so that a reader gets to see the change itself.

/// Length of the file header and of the footer.
const FRAME: usize = 4096;

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn set_crc(bytes: &mut [u8], at: usize) {
    let crc = crc32fast::hash(&bytes[..at]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Where the records of an image begin, as far as their headers make sense.
pub(crate) fn records(image: &[u8]) -> Vec<usize> {
    let mut positions = Vec::new();
    let mut at = FRAME;
    while let Some(end) = record_end(image, at) {
        positions.push(at);
        at = end;
    }
    positions
}

/// The tables, the payload and the end of the record at `at`.
fn parts(image: &[u8], at: usize) -> Option<(usize, usize, usize)> {
    let header = image.get(at..at + 96)?;
    if !header.starts_with(b"HsR1") {
        return None;
    }
    let tables = u32_at(header, 48)
        .checked_mul(8)?
        .checked_add(u32_at(header, 52).checked_mul(32)?)?;
    let payload = (at + 96 + tables).checked_add(u32_at(header, 64))?;
    let end = payload.checked_add(u32_at(header, 60))?;
    (end <= image.len()).then_some((at + 96 + tables, payload, end))
}

fn record_end(image: &[u8], at: usize) -> Option<usize> {
    parts(image, at).map(|(_, _, end)| end.next_multiple_of(8))
}

/// Sets every CRC, the hashes of payloads other than data, and the root hash.
pub(crate) fn reseal(image: &mut [u8]) {
    set_crc(&mut image[..FRAME], FRAME - 4);
    let mut root = blake3::Hasher::new();
    root.update(&image[..FRAME]);
    for at in records(image) {
        let Some((tables, payload, end)) = parts(image, at) else {
            continue;
        };
        let is_data = matches!(image[at + 4], 2 | 6);
        if !is_data && tables - at - 96 == 32 {
            let hash = *blake3::hash(&image[payload..end]).as_bytes();
            image[at + 96..tables].copy_from_slice(&hash);
        }
        let tables_crc = crc32fast::hash(&image[at + 96..tables]);
        let payload_crc = crc32fast::hash(&image[payload..end]);
        image[at + 68..at + 72].copy_from_slice(&tables_crc.to_le_bytes());
        image[at + 72..at + 76].copy_from_slice(&payload_crc.to_le_bytes());
        set_crc(&mut image[at..at + 96], 92);
        root.update(&image[at..tables]);
    }
    let footer = image.len() - FRAME;
    let header: [u8; 112] = image[..112].try_into().unwrap();
    image[footer + 72..footer + 104].copy_from_slice(root.finalize().as_bytes());
    image[footer + 104..footer + 216].copy_from_slice(&header);
    set_crc(&mut image[footer..], FRAME - 4);
}
