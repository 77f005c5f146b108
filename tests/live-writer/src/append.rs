//! Records of odd lengths appended to a file, which is truncated to nothing at its limit.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::check::Found;
use crate::config::{Config, Thread};
use crate::content::{STAMP, Stamp, intact, mix};
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

/// Which prefix of the writes the file at `path` holds. `begun` is the last write that can be in
/// it: an empty file does not say after which of the truncations it is, at most after the last. After a crash the last record
/// may be cut off.
pub(crate) fn check(
    path: &Path,
    config: &Config,
    thread: &Thread,
    timeline: &Timeline,
    begun: u64,
    after_crash: bool,
) -> Result<Found, Vec<String>> {
    let one = |message: String| Err(vec![message]);
    let content = match std::fs::read(path) {
        Ok(content) => content,
        Err(error) => return one(format!("cannot read {}: {error}", path.display())),
    };

    let mut state = State::default();
    if content.is_empty() {
        let mut found = 0;
        while state.n < begun {
            state.step(state.next(config, thread.index));
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

    let Some(first) = Stamp::read(&content) else {
        return one("does not begin with a record".into());
    };
    if first.seq == 0 || first.seq > timeline.begun_count() {
        return one(format!("begins with record {}", first.seq));
    }
    while state.n + 1 < first.seq {
        state.step(state.next(config, thread.index));
    }
    if state.size != 0 {
        return one(format!(
            "begins with record {} instead of {}",
            first.seq, state.first
        ));
    }
    let mut rest = &content[..];
    while !rest.is_empty() {
        let seq = state.n + 1;
        let next = state.next(config, thread.index);
        let Next::Append(len) = next else {
            return one(format!(
                "goes on after record {}, where it was truncated",
                seq - 1
            ));
        };
        let len = len as usize;
        let expected = record(config, thread.index, seq, len as u32);
        if after_crash && rest.len() < len && expected.starts_with(rest) {
            return Ok(cut_off(state, config, thread.index, begun));
        }
        if rest.get(..len) != Some(&expected[..]) {
            let what = match (Stamp::read(rest), rest.get(..len)) {
                (_, None) => "is cut off".to_owned(),
                (Some(stamp), Some(have)) if intact(have) => format!("is record {}", stamp.seq),
                (Some(stamp), _) => format!("is torn (stamp of record {})", stamp.seq),
                (None, _) => "has no stamp".to_owned(),
            };
            return one(format!("record {seq} at byte {} {what}", state.size));
        }
        rest = &rest[len..];
        state.step(next);
    }
    Ok(Found::whole(state.n))
}

/// What a file holds that ends within the record behind `state`: a crash came while that was written, or
/// while the truncation that comes next was under way, which btrfs makes in several commits.
fn cut_off(mut state: State, config: &Config, index: usize, begun: u64) -> Found {
    let here = Found {
        seen: state.n + 1,
        whole: state.n,
    };
    while state.n < begun {
        let next = state.next(config, index);
        if let Next::Truncate = next {
            return Found {
                whole: state.n,
                ..here
            };
        }
        state.step(next);
    }
    here
}
