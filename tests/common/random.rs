//! Random numbers that follow from a seed. Also for the fuzzer, so it uses nothing of the tests.

/// Small repeatable random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub u64);

impl Rng {
    /// The next 64 random bits.
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit` (not 0).
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next_u64() % limit
    }

    /// Fills `buf` with random bytes.
    pub(crate) fn fill(&mut self, buf: &mut [u8]) {
        for part in buf.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            part.copy_from_slice(&bytes[..part.len()]);
        }
    }

    /// Some of `all`, at most `count`, in their order.
    pub(crate) fn some<'a, T>(&mut self, all: &'a [T], count: u64) -> Vec<&'a T> {
        let mut rest = all.len() as u64;
        let mut wanted = count.min(rest);
        let mut chosen = Vec::new();
        for item in all {
            if self.below(rest) < wanted {
                chosen.push(item);
                wanted -= 1;
            }
            rest -= 1;
        }
        chosen
    }
}
