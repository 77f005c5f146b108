//! Pairs of writes: one through the page cache into a file, then, once that has returned, one past
//! the cache into another file. Nothing is ever made durable, so the second of a pair is on the disk
//! long before the first: only a copy that shows one instant holds both.
//!
//! Odd writes are firsts, even ones seconds. The files of every other thread lie in two folders, if
//! there are several.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::check::Found;
use crate::config::{Config, Thread};
use crate::content::{Aligned, BLOCK, Stamp, intact, mix};
use crate::journal::Timeline;
use crate::run::Task;

/// Added to the place in the stamps of the second file.
const SECOND: u64 = 1 << 32;

/// Which file a write goes to (0 or 1), and to which block.
fn place_of(seed: u64, thread: usize, seq: u64, blocks: u64) -> (usize, u64) {
    let file = usize::from(seq.is_multiple_of(2));
    (file, mix(seed, thread as u64, seq) % blocks)
}

fn render(seed: u64, thread: usize, (file, block): (usize, u64), seq: u64, buf: &mut [u8]) {
    let stamp = Stamp {
        thread: thread as u32,
        place: block + file as u64 * SECOND,
        seq,
        len: BLOCK as u32,
    };
    stamp.render(seed, buf);
}

/// Writes both files as they are before the first write.
pub(crate) fn prepare(task: &Task) -> io::Result<()> {
    for (file, path) in [&task.path, &task.second].into_iter().enumerate() {
        let mut out = io::BufWriter::new(File::create_new(path)?);
        let mut buf = [0; BLOCK];
        for block in 0..task.config.blocks() {
            render(task.config.seed, task.index, (file, block), 0, &mut buf);
            out.write_all(&buf)?;
        }
        out.into_inner()?.sync_all()?;
    }
    Ok(())
}

/// Writes until it is told to stop.
pub(crate) fn run(task: &Task) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true);
    let first = options.open(&task.path)?;
    options.custom_flags(OFlags::DIRECT.bits() as i32);
    let files = [first, options.open(&task.second)?];
    let mut buf = Box::new(Aligned([0; BLOCK]));
    let mut seq = 0;
    while !task.stopped() {
        seq += 1;
        let place = place_of(task.config.seed, task.index, seq, task.config.blocks());
        render(task.config.seed, task.index, place, seq, &mut buf.0);
        task.journal.begun(seq)?;
        files[place.0].write_all_at(&buf.0, place.1 * BLOCK as u64)?;
        task.journal.returned(seq)?;
        task.progressed();
        if seq.is_multiple_of(2) {
            task.pause();
            std::thread::sleep(std::time::Duration::from_micros(500));
        }
    }
    Ok(())
}

/// Which prefix of the writes the two files hold: exactly one, or they are wrong. After a crash the
/// firsts may be there or not.
pub(crate) fn check(
    paths: [&Path; 2],
    config: &Config,
    thread: &Thread,
    timeline: &Timeline,
    after_crash: bool,
) -> Result<Found, Vec<String>> {
    let one = |message: String| vec![message];
    let blocks = config.blocks();
    let mut contents = [Vec::new(), Vec::new()];
    for (path, content) in paths.into_iter().zip(&mut contents) {
        File::open(path)
            .and_then(|mut file| file.read_to_end(content))
            .map_err(|error| one(format!("cannot read {}: {error}", path.display())))?;
        if content.len() as u64 != blocks * BLOCK as u64 {
            let len = content.len();
            return Err(one(format!("{}: {len} bytes long", path.display())));
        }
    }
    let newest = |content: &[u8]| {
        let stamps = content.chunks(BLOCK).filter_map(Stamp::read);
        stamps.map(|stamp| stamp.seq).max().unwrap_or(0)
    };
    let seen = newest(&contents[0]).max(newest(&contents[1]));
    let last = if after_crash {
        newest(&contents[1])
    } else {
        seen
    };
    if seen > timeline.begun_count() {
        return Err(one(format!("holds write {seen}, which was never begun")));
    }

    let mut expected = [vec![0; blocks as usize], vec![0; blocks as usize]];
    for seq in 1..=last {
        let (file, block) = place_of(config.seed, thread.index, seq, blocks);
        expected[file][block as usize] = seq;
    }
    let mut wrong = Vec::new();
    let mut buf = [0; BLOCK];
    for file in 0..2 {
        for (block, have) in contents[file].chunks(BLOCK).enumerate() {
            let place = (file, block as u64);
            let mut seq = expected[file][block];
            let stamp = Stamp::read(have);
            if after_crash
                && file == 0
                && let Some(stamp) = stamp
                && (stamp.seq == 0
                    || place_of(config.seed, thread.index, stamp.seq, blocks) == place)
            {
                seq = stamp.seq;
            }
            render(config.seed, thread.index, place, seq, &mut buf);
            if have != buf {
                let what = match stamp {
                    Some(stamp) if intact(have) => format!("holds write {}", stamp.seq),
                    Some(stamp) => format!("is torn (stamp of write {})", stamp.seq),
                    None => "has no stamp".into(),
                };
                let name = ["first", "second"][file];
                wrong.push(format!(
                    "block {block} of the {name} file {what}; of {last} writes it should hold {seq}"
                ));
            }
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    // Whether the first behind the last second is there is not judged after a crash.
    let whole = if after_crash { last + 1 } else { last };
    Ok(Found { seen, whole })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Makes the two files hold exactly the first `n` writes.
    pub(crate) fn rewind(paths: [&Path; 2], config: &Config, thread: usize, n: u64) {
        let blocks = config.blocks();
        let mut state = [vec![0; blocks as usize], vec![0; blocks as usize]];
        for seq in 1..=n {
            let (file, block) = place_of(config.seed, thread, seq, blocks);
            state[file][block as usize] = seq;
        }
        for (file, path) in paths.into_iter().enumerate() {
            let mut content = vec![0; blocks as usize * BLOCK];
            for (block, buf) in content.chunks_mut(BLOCK).enumerate() {
                let place = (file, block as u64);
                render(config.seed, thread, place, state[file][block], buf);
            }
            std::fs::write(path, content).unwrap();
        }
    }
}
