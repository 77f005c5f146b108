//! Records of odd lengths appended to a file, which is truncated to nothing at its limit.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::check::Found;
use crate::config::{Config, Thread};
use crate::content::{BLOCK, STAMP, Stamp, intact, mix};
use crate::journal::Timeline;
use crate::run::Task;

/// Where an appender's file stands after some writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    /// Writes done.
    n: u64,
    /// Bytes in the file.
    size: u64,
    /// The first record in the file, or the one that will be.
    first: u64,
}

/// The next write of an appender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Append(u32),
    Truncate,
}

impl State {
    fn next(&self, config: &Config, thread: usize) -> Next {
        let len = STAMP as u64 + mix(config.seed, thread as u64, self.n + 1) % 12_000;
        if self.size + len > config.append_limit() {
            Next::Truncate
        } else {
            Next::Append(len as u32)
        }
    }

    fn step(&mut self, next: Next) {
        self.n += 1;
        match next {
            Next::Append(len) => {
                self.size += u64::from(len);
                if self.first == 0 {
                    self.first = self.n;
                }
            }
            Next::Truncate => {
                self.size = 0;
                self.first = 0;
            }
        }
    }
}

fn record(config: &Config, thread: usize, seq: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    let stamp = Stamp {
        thread: thread as u32,
        place: 0,
        seq,
        len,
    };
    stamp.render(config.seed, &mut bytes);
    bytes
}

/// Makes the empty file.
pub(crate) fn prepare(task: &Task) -> io::Result<()> {
    File::create_new(&task.path)?.sync_all()
}

/// Appends until it is told to stop.
pub(crate) fn run(task: &Task) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(&task.path)?;
    let mut state = State::default();
    while !task.stopped() {
        let next = state.next(&task.config, task.index);
        let seq = state.n + 1;
        match next {
            Next::Append(len) => {
                let bytes = record(&task.config, task.index, seq, len);
                task.journal.begun(seq)?;
                // One call: a freeze waits for it, so a record is there whole or not at all.
                let written = file.write(&bytes)?;
                if written != bytes.len() {
                    return Err(io::Error::other("a record was written in part"));
                }
            }
            Next::Truncate => {
                task.journal.begun(seq)?;
                file.set_len(0)?;
            }
        }
        task.journal.returned(seq)?;
        state.step(next);
        if seq % 64 == 0 {
            file.sync_data()?;
            task.journal.acked(seq)?;
        }
        task.progressed();
        task.pause();
        std::thread::sleep(std::time::Duration::from_micros(500));
    }
    Ok(())
}

/// Which prefix of the writes the file at `path` holds. `begun` is the last write that can be in it.
pub(crate) fn check(
    path: &Path,
    config: &Config,
    thread: &Thread,
    timeline: &Timeline,
    begun: u64,
    after_crash: bool,
) -> Result<Found, Vec<String>> {
    let content = std::fs::read(path)
        .map_err(|error| vec![format!("cannot read {}: {error}", path.display())])?;
    let index = thread.index;
    let found = after_crash.then(|| after_a_crash(&content, config, index, begun));
    match found.flatten() {
        Some(found) => Ok(found),
        None => in_order(&content, config, index, timeline.begun_count(), begun)
            .map_err(|wrong| vec![wrong]),
    }
}

/// What a file holds that was written in order, up to write `last`. An empty one does not say after which
/// of the truncations it is, at most after the last one up to write `begun`.
fn in_order(
    content: &[u8],
    config: &Config,
    index: usize,
    last: u64,
    begun: u64,
) -> Result<Found, String> {
    let mut state = State::default();
    if content.is_empty() {
        let mut found = 0;
        while state.n < begun {
            state.step(state.next(config, index));
            if state.size == 0 {
                found = state.n;
            }
        }
        // Nor does it show that any of them was made.
        return Ok(Found {
            seen: 0,
            whole: found,
        });
    }

    let first = Stamp::read(content).ok_or("does not begin with a record")?;
    if first.seq == 0 || first.seq > last {
        return Err(format!("begins with record {}", first.seq));
    }
    while state.n + 1 < first.seq {
        state.step(state.next(config, index));
    }
    if state.size != 0 {
        return Err(format!(
            "begins with record {} instead of {}",
            first.seq, state.first
        ));
    }
    let mut rest = content;
    while !rest.is_empty() {
        let seq = state.n + 1;
        let next = state.next(config, index);
        let Next::Append(len) = next else {
            return Err(format!(
                "goes on after record {}, where it was truncated",
                seq - 1
            ));
        };
        let len = len as usize;
        let expected = record(config, index, seq, len as u32);
        if rest.get(..len) != Some(&expected[..]) {
            let what = match (Stamp::read(rest), rest.get(..len)) {
                (_, None) => "is cut off".to_owned(),
                (Some(stamp), Some(have)) if intact(have) => format!("is record {}", stamp.seq),
                (Some(stamp), _) => format!("is torn (stamp of record {})", stamp.seq),
                (None, _) => "has no stamp".to_owned(),
            };
            return Err(format!("record {seq} at byte {} {what}", state.size));
        }
        rest = &rest[len..];
        state.step(next);
    }
    Ok(Found::whole(state.n))
}

/// Which writes a file can hold after a crash of btrfs, of which `begun` is the last that can be in it.
/// `None`: it cannot be so.
///
/// The file ends anywhere in what was appended. Each of its blocks holds what had been appended to it
/// when it was written out, then zeros; blocks that were not written out are holes (with the feature
/// `no-holes`, which is usual, the size on the disk does not wait for them). A truncation takes several
/// commits: once it was begun, any part of the file may be gone. Where this leaves several answers, all
/// are meant: the earliest last write, and the latest whole one.
fn after_a_crash(content: &[u8], config: &Config, index: usize, begun: u64) -> Option<Found> {
    let mut found: Option<Found> = None;
    let mut state = State::default();
    loop {
        let filling = Filling::next(&mut state, config, index, begun);
        if let Some(new) = filling.found(content) {
            found = Some(found.map_or(new, |found| Found {
                seen: found.seen.min(new.seen),
                whole: found.whole.max(new.whole),
            }));
        }
        if !filling.is_truncated {
            return found;
        }
    }
}

/// What is appended from one truncation to the next.
struct Filling {
    /// Writes done before.
    before: u64,
    content: Vec<u8>,
    /// Where each record ends in it.
    ends: Vec<usize>,
    /// Whether the truncation that ends it was begun.
    is_truncated: bool,
}

impl Filling {
    /// What is appended after `state`, up to write `begun`. `state` is moved behind the truncation.
    fn next(state: &mut State, config: &Config, index: usize, begun: u64) -> Self {
        let mut filling = Self {
            before: state.n,
            content: Vec::new(),
            ends: Vec::new(),
            is_truncated: false,
        };
        while state.n < begun && !filling.is_truncated {
            let next = state.next(config, index);
            match next {
                Next::Append(len) => {
                    let record = record(config, index, state.n + 1, len);
                    filling.content.extend(record);
                    filling.ends.push(filling.content.len());
                }
                Next::Truncate => filling.is_truncated = true,
            }
            state.step(next);
        }
        filling
    }

    /// What `content` holds of it after a crash, if it can be of it.
    fn found(&self, content: &[u8]) -> Option<Found> {
        let expected = self.content.get(..content.len())?;
        let is_possible =
            content
                .chunks(BLOCK)
                .zip(expected.chunks(BLOCK))
                .all(|(have, expected)| {
                    let len = have
                        .iter()
                        .rposition(|byte| *byte != 0)
                        .map_or(0, |at| at + 1);
                    have[..len] == expected[..len]
                });
        is_possible.then_some(())?;
        let intact = content
            .iter()
            .zip(expected)
            .position(|(have, expected)| have != expected)
            .unwrap_or(content.len());
        let ending = |bytes: usize| self.ends.partition_point(|end| *end <= bytes);
        let whole = match self.is_truncated {
            true => self.ends.len(),
            false => ending(intact),
        };
        // The record that the last byte is in.
        let seen = match content.len() {
            0 => 0,
            len => ending(len - 1) + 1,
        };
        Some(Found {
            seen: self.before + seen as u64,
            whole: self.before + whole as u64,
        })
    }
}
