//! Random 4 KiB writes over a preallocated file: buffered, direct, or through a mapping.
//! Every block says which write it came from, so a file shows which prefix of the writes it holds.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::check::Found;
use crate::config::Kind;
use crate::content::{Aligned, BLOCK, Stamp, intact, mix};
use crate::journal::Timeline;
use crate::run::Task;

/// How a block gets into the file.
#[derive(Debug)]
enum Way {
    Write(File),
    Map(memmap2::MmapMut),
}

/// The block that a thread's write goes to.
fn block_of(seed: u64, thread: usize, seq: u64, blocks: u64) -> u64 {
    mix(seed, thread as u64, seq) % blocks
}

fn render(seed: u64, thread: usize, block: u64, seq: u64, buf: &mut [u8]) {
    let stamp = Stamp {
        thread: thread as u32,
        place: block,
        seq,
        len: BLOCK as u32,
    };
    stamp.render(seed, buf);
}

/// Writes the file as it is before the first write.
pub(crate) fn prepare(task: &Task) -> io::Result<()> {
    let mut file = io::BufWriter::new(File::create_new(&task.path)?);
    let mut buf = [0; BLOCK];
    for block in 0..task.config.blocks() {
        render(task.config.seed, task.index, block, 0, &mut buf);
        file.write_all(&buf)?;
    }
    file.into_inner()?.sync_all()
}

/// Writes until it is told to stop.
pub(crate) fn run(task: &Task, kind: Kind) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if kind == Kind::Direct {
        options.custom_flags(OFlags::DIRECT.bits() as i32);
    }
    let file = options.open(&task.path)?;
    let mut way = if kind == Kind::Mmap {
        // SAFETY: the file is this thread's own, made by it in a folder of this run and never
        // made shorter, so no access to the mapping can fault for want of a block.
        Way::Map(unsafe { memmap2::MmapMut::map_mut(&file)? })
    } else {
        Way::Write(file)
    };
    let mut buf = Box::new(Aligned([0; BLOCK]));
    let mut done = 0;
    while !task.stopped() {
        // Some writes, then they are made durable.
        let until = done + 1 + mix(task.config.seed, !0, done) % 8;
        for seq in done + 1..=until {
            let block = block_of(task.config.seed, task.index, seq, task.config.blocks());
            render(task.config.seed, task.index, block, seq, &mut buf.0);
            let at = block as usize * BLOCK;
            task.journal.begun(seq)?;
            match &mut way {
                Way::Write(file) => {
                    file.write_all_at(&buf.0, at as u64)?;
                    task.journal.returned(seq)?;
                }
                Way::Map(map) => map[at..at + BLOCK].copy_from_slice(&buf.0),
            }
            task.pause();
        }
        match &mut way {
            Way::Write(file) => file.sync_all()?,
            Way::Map(map) => {
                map.flush()?;
                // A store is no call that returns: it counts as returned once msync has.
                task.journal.returned(until)?;
            }
        }
        task.journal.acked(until)?;
        task.progressed();
        done = until;
    }
    Ok(())
}

/// The write that each block holds after the first `n` writes.
fn state(seed: u64, thread: usize, blocks: u64, n: u64) -> Vec<u64> {
    let mut state = vec![0; blocks as usize];
    for seq in 1..=n {
        state[block_of(seed, thread, seq, blocks) as usize] = seq;
    }
    state
}

/// Which prefix of the writes the file at `path` holds: exactly one, or it is wrong.
pub(crate) fn check(
    path: &Path,
    config: &crate::config::Config,
    thread: &crate::config::Thread,
    timeline: &Timeline,
) -> Result<Found, Vec<String>> {
    let one = |message: String| vec![message];
    let mut content = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut content))
        .map_err(|error| one(format!("cannot read {}: {error}", path.display())))?;
    let blocks = config.blocks();
    if content.len() as u64 != blocks * BLOCK as u64 {
        return Err(one(format!(
            "{} bytes long instead of {}",
            content.len(),
            blocks * BLOCK as u64
        )));
    }
    let stamps: Vec<Option<Stamp>> = content.chunks(BLOCK).map(Stamp::read).collect();
    let last = stamps.iter().flatten().map(|stamp| stamp.seq).max();
    let last = last.ok_or_else(|| one("no block of it has a stamp".into()))?;
    if last > timeline.begun_count() {
        return Err(one(format!(
            "holds write {last}, but only {} were begun",
            timeline.begun_count()
        )));
    }

    let expected = state(config.seed, thread.index, blocks, last);
    let mut wrong: Vec<(u64, String)> = Vec::new();
    let mut buf = [0; BLOCK];
    for (block, (have, seq)) in content.chunks(BLOCK).zip(&expected).enumerate() {
        let block = block as u64;
        render(config.seed, thread.index, block, *seq, &mut buf);
        if have != buf {
            let what = match &stamps[block as usize] {
                Some(stamp) if intact(have) => format!("holds write {}", stamp.seq),
                Some(stamp) => format!("is torn (stamp of write {})", stamp.seq),
                None => "has no stamp".into(),
            };
            wrong.push((
                block,
                format!("block {block} {what}; of {last} writes it should hold {seq}"),
            ));
        }
    }
    if wrong.is_empty() {
        return Ok(Found::whole(last));
    }

    // A store into a mapping is no atomic write: the one that was under way may be there in part.
    if let (Kind::Mmap, [(block, _)]) = (thread.kind, &wrong[..]) {
        let have = &content[*block as usize * BLOCK..][..BLOCK];
        for seq in [last, last + 1] {
            if block_of(config.seed, thread.index, seq, blocks) == *block
                && seq <= timeline.begun_count()
            {
                let before = state(config.seed, thread.index, blocks, seq - 1)[*block as usize];
                let mut old = [0; BLOCK];
                render(config.seed, thread.index, *block, before, &mut old);
                render(config.seed, thread.index, *block, seq, &mut buf);
                let mut bytes = have.iter().zip(&old).zip(&buf);
                if bytes.all(|((have, old), new)| have == old || have == new) {
                    return Ok(Found {
                        seen: seq,
                        whole: seq - 1,
                    });
                }
            }
        }
    }
    Err(wrong.into_iter().map(|(_, message)| message).collect())
}

/// Which writes the file at `path` holds after a crash: each block any of those to it, whole; of a
/// mapping perhaps a part of one. What is found is the first write that is missing, and the last that
/// is there.
pub(crate) fn check_after_crash(
    path: &Path,
    config: &crate::config::Config,
    thread: &crate::config::Thread,
    timeline: &Timeline,
) -> Result<Found, Vec<String>> {
    let blocks = config.blocks();
    let content = std::fs::read(path)
        .map_err(|error| vec![format!("cannot read {}: {error}", path.display())])?;
    if content.len() as u64 != blocks * BLOCK as u64 {
        return Err(vec![format!("{} bytes long", content.len())]);
    }
    // All writes to each block, in their order.
    let mut written = vec![vec![0]; blocks as usize];
    for seq in 1..=timeline.begun_count() {
        written[block_of(config.seed, thread.index, seq, blocks) as usize].push(seq);
    }
    let mut wrong = Vec::new();
    let (mut seen, mut missing) = (0, timeline.begun_count() + 1);
    let mut buf = [0; BLOCK];
    for (block, have) in content.chunks(BLOCK).enumerate() {
        let all = &written[block];
        let mut is_write = |seq: &u64| {
            render(config.seed, thread.index, block as u64, *seq, &mut buf);
            have == buf
        };
        let Some(stamp) = Stamp::read(have) else {
            wrong.push(format!("block {block} has no stamp"));
            continue;
        };
        match all.iter().position(|seq| *seq == stamp.seq) {
            Some(at) if is_write(&stamp.seq) => {
                seen = seen.max(stamp.seq);
                missing = missing.min(*all.get(at + 1).unwrap_or(&u64::MAX));
            }
            // A store that was under way, over the one before it.
            Some(at) if thread.kind == Kind::Mmap && at > 0 => {
                seen = seen.max(stamp.seq);
                missing = missing.min(stamp.seq);
            }
            _ => wrong.push(format!(
                "block {block} holds no write to it (stamp of write {})",
                stamp.seq
            )),
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    Ok(Found {
        seen,
        whole: missing - 1,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Makes the file at `path` hold exactly the first `n` writes.
    pub(crate) fn rewind(path: &Path, config: &crate::config::Config, thread: usize, n: u64) {
        let mut buf = [0; BLOCK];
        let mut content = Vec::new();
        for (block, seq) in state(config.seed, thread, config.blocks(), n)
            .iter()
            .enumerate()
        {
            render(config.seed, thread, block as u64, *seq, &mut buf);
            content.extend_from_slice(&buf);
        }
        std::fs::write(path, content).unwrap();
    }

    /// Makes one block of the file at `path` what write `seq` made it, whole or in its first half.
    pub(crate) fn put(
        path: &Path,
        config: &crate::config::Config,
        thread: usize,
        seq: u64,
        len: usize,
    ) {
        let mut buf = [0; BLOCK];
        let block = block_of(config.seed, thread, seq, config.blocks());
        render(config.seed, thread, block, seq, &mut buf);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&buf[..len], block * BLOCK as u64)
            .unwrap();
    }
}
