//! Bitmaps as they lie on disk: bit 0 is the lowest bit of byte 0.

use std::ops::Range;

/// Sets the bits of `range`, as far as the bitmap goes.
pub(super) fn set(bits: &mut [u8], range: Range<u64>) {
    let end = range.end.min(bits.len() as u64 * 8) as usize;
    let mut at = (range.start.min(end as u64)) as usize;
    while at < end {
        if at.is_multiple_of(8) && end - at >= 8 {
            bits[at / 8] = 0xff;
            at += 8;
        } else {
            bits[at / 8] |= 1 << (at % 8);
            at += 1;
        }
    }
}

/// How many of the first `len` bits are clear. Bits behind the bitmap's end do not exist.
pub(super) fn count_clear(bits: &[u8], len: u64) -> u64 {
    let len = len.min(bits.len() as u64 * 8);
    len - runs_of_set(bits, len)
        .map(|run| run.end - run.start)
        .sum::<u64>()
}

/// The runs of set bits among the first `len`, ascending.
pub(super) fn runs_of_set(bits: &[u8], len: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let len = len.min(bits.len() as u64 * 8);
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = find(bits, at, len, true);
        if start == len {
            return None;
        }
        at = find(bits, start, len, false);
        Some(start..at)
    })
}

/// The first bit from `at` on, below `len`, that is `wanted`; else `len`.
fn find(bits: &[u8], mut at: u64, len: u64, wanted: bool) -> u64 {
    while at < len {
        let word = word(bits, (at / 64) as usize);
        let word = if wanted { word } else { !word };
        let ahead = word >> (at % 64);
        if ahead != 0 {
            return (at + u64::from(ahead.trailing_zeros())).min(len);
        }
        at = (at / 64 + 1) * 64;
    }
    len
}

/// The `index`th 64 bits; zeros behind the end.
fn word(bits: &[u8], index: usize) -> u64 {
    let rest = bits.get(index * 8..).unwrap_or_default();
    match rest.first_chunk::<8>() {
        Some(whole) => u64::from_le_bytes(*whole),
        None => {
            let mut part = [0; 8];
            part[..rest.len()].copy_from_slice(rest);
            u64::from_le_bytes(part)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_the_set_bits(bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 0..40), len in 0u64..400) {
            let real = len.min(bytes.len() as u64 * 8);
            let mut seen = vec![false; real as usize];
            let mut last = None;
            for run in runs_of_set(&bytes, len) {
                prop_assert!(run.start < run.end && run.end <= real);
                prop_assert!(last.is_none_or(|last| run.start > last));
                last = Some(run.end);
                for bit in run {
                    seen[bit as usize] = true;
                }
            }
            for (bit, &seen) in seen.iter().enumerate() {
                prop_assert_eq!(seen, bytes[bit / 8] >> (bit % 8) & 1 == 1);
            }
            let clear = seen.iter().filter(|seen| !**seen).count() as u64;
            prop_assert_eq!(count_clear(&bytes, len), clear);
        }

        #[test]
        fn setting_sets_just_the_range(size in 0usize..20, start in 0u64..200, more in 0u64..200) {
            let mut bits = vec![0; size];
            set(&mut bits, start..start + more);
            for bit in 0..size as u64 * 8 {
                let is_set = bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
                prop_assert_eq!(is_set, (start..start + more).contains(&bit));
            }
        }
    }
}
