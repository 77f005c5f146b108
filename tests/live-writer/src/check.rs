//! The verdict on a copy: does it hold what the folder held at one instant, inside the freeze?

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::config::{Config, Kind, Thread};
use crate::journal::{Journal, Timeline};
use crate::{append, churn, pair, random, sqlite};

#[cfg(test)]
mod tests;

/// What a copy holds of one thread's writes: a prefix of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The last write of which something is there. Less than `whole` if the last ones left
    /// nothing to be seen.
    pub(crate) seen: u64,
    /// The last write that is there whole, with all before it. One less than `seen` if the last
    /// one is there in part.
    pub(crate) whole: u64,
}

impl Found {
    /// Writes 1 to `n`, nothing else.
    pub(crate) fn whole(n: u64) -> Self {
        Self { seen: n, whole: n }
    }
}

/// When the filesystem was frozen, in nanoseconds of `CLOCK_MONOTONIC`. What is not known is not
/// judged.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Window {
    /// An instant at which FIFREEZE had returned, or an earlier one.
    pub(crate) begin: Option<u64>,
    /// An instant at which FITHAW had not been called, or a later one.
    pub(crate) end: Option<u64>,
    /// Both instants lie inside the freeze: nothing can have been written between them.
    pub(crate) exact: bool,
    /// Nothing was frozen: what was never made durable may be missing, unless the kernel keeps it in
    /// order.
    pub(crate) after_crash: bool,
}

impl Window {
    /// Whether a thread's writes are in order. After a crash of btrfs, one commit holds what system
    /// calls had changed by then, but of writes through the page cache only what was written out.
    fn is_ordered(self, kind: Kind) -> bool {
        let keeps_order = matches!(kind, Kind::Direct | Kind::Churn | Kind::Sqlite | Kind::Pair);
        !self.after_crash || keeps_order
    }
}

/// What was found, for people, and what is wrong with it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict {
    /// One line a thread.
    pub(crate) found: Vec<String>,
    /// One line for everything that is wrong; empty if the copy is right.
    pub(crate) wrong: Vec<String>,
}

/// Judges the copies of a run's folders at `dirs`.
pub(crate) fn check(dirs: &[PathBuf], journal: &Journal, window: Window) -> Verdict {
    let mut verdict = Verdict::default();
    let mut cut = Vec::new();
    let threads = journal.config.threads();
    for (thread, timeline) in threads.iter().zip(&journal.threads) {
        let name = &thread.name;
        match contents(dirs, &journal.config, thread, timeline, window) {
            Ok(found) => {
                verdict.found.push(format!(
                    "{name}: {} of {} writes{}",
                    found.whole,
                    timeline.begun_count(),
                    if found.seen > found.whole {
                        " and a part"
                    } else {
                        ""
                    }
                ));
                let ordered = window.is_ordered(thread.kind);
                let wrong = outside(found, timeline, window, ordered);
                verdict
                    .wrong
                    .extend(wrong.into_iter().map(|what| format!("{name}: {what}")));
                cut.push(Cut {
                    name,
                    found,
                    timeline,
                    ordered,
                });
            }
            Err(wrong) => {
                // A damaged file may have many damaged blocks: the first ones say enough.
                let more = wrong.len().saturating_sub(8);
                let shown = wrong.into_iter().take(8);
                verdict
                    .wrong
                    .extend(shown.map(|what| format!("{name}: {what}")));
                if more > 0 {
                    verdict.wrong.push(format!("{name}: and {more} more"));
                }
            }
        }
    }
    verdict.wrong.extend(inconsistent(&cut));
    verdict.wrong.extend(forgotten(&cut));
    for dir in dirs {
        verdict.wrong.extend(unreadable(dir));
    }
    verdict
}

/// What was found of one thread.
struct Cut<'a> {
    name: &'a str,
    found: Found,
    timeline: &'a Timeline,
    ordered: bool,
}

/// Which prefix of a thread's writes the copy holds.
fn contents(
    dirs: &[PathBuf],
    config: &Config,
    thread: &Thread,
    timeline: &Timeline,
    window: Window,
) -> Result<Found, Vec<String>> {
    let path = thread.place(dirs);
    match thread.kind {
        Kind::Buffered | Kind::Direct | Kind::Mmap => {
            if window.is_ordered(thread.kind) {
                random::check(&path, config, thread, timeline)
            } else {
                random::check_after_crash(&path, config, thread, timeline)
            }
        }
        Kind::Append => {
            let begun = match window.end {
                Some(end) => timeline.begun_until(end),
                None => timeline.begun_count(),
            };
            append::check(&path, config, thread, timeline, begun, window.after_crash)
        }
        Kind::Churn => churn::check(&path, config, thread, timeline, window.after_crash),
        Kind::Sqlite => sqlite::check(&path, timeline),
        Kind::Pair => {
            let paths = [&*path, &*thread.second_place(dirs)];
            pair::check(paths, config, thread, timeline, window.after_crash)
        }
    }
}

/// What cannot be, given when the filesystem was frozen.
fn outside(found: Found, timeline: &Timeline, window: Window, ordered: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    if timeline.begun_count() == 0 {
        wrong.push("never wrote, so nothing is proven".into());
    }
    if let Some(begin) = window.begin {
        let acked = timeline.acked_before(begin);
        let returned = timeline.returned_before(begin);
        if found.whole < acked {
            wrong.push(format!(
                "holds {} writes, but {acked} were durable before the freeze",
                found.whole
            ));
        } else if found.whole < returned && ordered {
            wrong.push(format!(
                "holds {} writes, but {returned} had returned before the freeze",
                found.whole
            ));
        }
    }
    if let Some(end) = window.end {
        let begun = timeline.begun_until(end);
        if found.seen > begun {
            wrong.push(format!(
                "holds write {}, but only {begun} were begun before the thaw",
                found.seen
            ));
        }
    }
    if let (Some(begin), Some(end), true) = (window.begin, window.end, window.exact) {
        let first = timeline.begun_until(begin) + 1;
        if timeline.returned_at(first).is_some_and(|at| at < end) {
            wrong.push(format!(
                "write {first} was begun and returned while the filesystem was frozen"
            ));
        }
    }
    wrong
}

/// Where the copy is not one instant: a write that is there was begun after another thread's write
/// that is not there had returned.
fn inconsistent(cut: &[Cut<'_>]) -> Vec<String> {
    let mut wrong = Vec::new();
    let missing = cut
        .iter()
        .filter(|cut| cut.ordered)
        .filter_map(|cut| {
            let seq = cut.found.whole + 1;
            Some((cut.name, seq, cut.timeline.returned_at(seq)?))
        })
        .min_by_key(|(_, _, at)| *at);
    let Some((first, missing, returned)) = missing else {
        return wrong;
    };
    for cut in cut {
        let last = cut.found.seen;
        if let Some(begun) = cut.timeline.begun_at(last)
            && begun > returned
        {
            wrong.push(format!(
                "{}: write {last} is there, but was begun {} us after write {missing} of \
                 {first} had returned, which is not there",
                cut.name,
                (begun - returned) / 1000
            ));
        }
    }
    wrong
}

/// What is missing although it was durable before something began that is there.
fn forgotten(cut: &[Cut<'_>]) -> Vec<String> {
    let latest = cut
        .iter()
        .filter_map(|cut| Some((cut.timeline.begun_at(cut.found.seen)?, cut)))
        .max_by_key(|(begun, _)| *begun);
    let Some((begun, last)) = latest else {
        return Vec::new();
    };
    let durable = |cut: &Cut<'_>| cut.timeline.acked_before(begun);
    cut.iter()
        .filter(|cut| cut.found.whole < durable(cut))
        .map(|cut| {
            format!(
                "{}: holds {} writes, but {} were durable before write {} of {} began, which is there",
                cut.name,
                cut.found.whole,
                durable(cut),
                last.found.seen,
                last.name
            )
        })
        .collect()
}

/// The files and folders under `dir` that cannot be read to their ends.
fn unreadable(dir: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut folders: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) => {
                wrong.push(format!("cannot list {}: {error}", folder.display()));
                continue;
            }
        };
        for entry in entries {
            let result = entry.and_then(|entry| {
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() {
                    let mut file = std::fs::File::open(entry.path())?;
                    let mut buf = vec![0; 1 << 16];
                    while file.read(&mut buf)? > 0 {}
                }
                Ok(())
            });
            if let Err(error) = result {
                wrong.push(format!("cannot read all in {}: {error}", folder.display()));
            }
        }
    }
    wrong
}
