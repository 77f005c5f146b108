//! Volumes in memory of which only some blocks are kept. Also for the fuzzer, so it uses nothing of the
//! tests.

use std::collections::BTreeMap;

use holdstill::extent::Extent;
use holdstill::units::Offset;

/// Blocks of one size by their numbers. What is not there is zeros.
pub(crate) type Blocks = BTreeMap<u64, Vec<u8>>;

/// Reads at `offset` of a volume of blocks of `size` bytes each.
pub(crate) fn read(blocks: &Blocks, size: u64, buf: &mut [u8], offset: Offset) {
    buf.fill(0);
    let whole = Extent::new(offset.0, buf.len() as u64);
    let numbers = offset.0 / size..whole.end().0.div_ceil(size);
    for (number, block) in blocks.range(numbers) {
        let start = number * size;
        if let Some(both) = whole.intersect(Extent::new(start, size)) {
            let [to, from] = [offset.0, start].map(|base| (both.start.0 - base) as usize);
            let len = both.len.0 as usize;
            buf[to..to + len].copy_from_slice(&block[from..from + len]);
        }
    }
}
