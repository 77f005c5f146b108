//! Images: whatever somebody made of one, with all checksums right again, so that every part of the
//! reader gets to see it.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};

#[path = "../../common/random.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod random;
#[path = "../../common/reading.rs"]
mod reading;
#[path = "../../common/reseal.rs"]
mod reseal;

use random::Rng;

/// Bytes of a file header and a footer.
const FRAMES: usize = 2 * 4096;

fuzz_target!(|input: &[u8]| -> Corpus {
    if input.len() < FRAMES {
        return Corpus::Reject;
    }
    let mut image = input.to_vec();
    reseal::reseal(&mut image);
    // Where it is looked into follows from the input, too.
    let mut rng = Rng(u64::from(crc32fast::hash(input)));
    reading::read_all_ways(&image, &mut |limit| rng.below(limit));
    Corpus::Keep
});
