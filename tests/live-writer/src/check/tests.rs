//! The checker must find what is wrong: each of these makes a good copy bad in one way.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::*;
use crate::content::Stamp;
use crate::journal::{Recorder, monotonic, realtime_offset};
use crate::random::tests::{put, rewind};
use crate::sqlite::KEEP;

/// A short run that has ended, and its journal.
struct Case {
    root: tempfile::TempDir,
    journal: Journal,
}

/// The folders of a run.
fn dirs(root: &tempfile::TempDir) -> [PathBuf; 2] {
    ["dir", "dir-2"].map(|name| root.path().join(name))
}

impl Case {
    fn new(counts: [u8; 7]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let config = Config {
            seed: monotonic(),
            light: false,
            budget: 4 << 20,
            counts,
            realtime_offset: realtime_offset(),
        };
        println!("seed {}", config.seed);
        let path = root.path().join("journal");
        let dirs = dirs(&root);
        let stop = std::sync::Arc::default();
        let duration = Some(std::time::Duration::from_millis(700));
        crate::run::run(&dirs, &path, config, true, duration, &stop).unwrap();
        let journal = Journal::read(&path).unwrap();
        Self { root, journal }
    }

    fn path(&self, name: &str) -> PathBuf {
        dirs(&self.root)[0].join(name)
    }

    fn verdict(&self, window: Window) -> Verdict {
        check(&dirs(&self.root), &self.journal, window)
    }

    /// Everything was written before the freeze.
    fn after() -> Window {
        Window {
            begin: Some(monotonic()),
            end: None,
            exact: false,
            after_crash: false,
        }
    }

    #[track_caller]
    fn assert_right(&self, window: Window) {
        let verdict = self.verdict(window);
        assert!(verdict.wrong.is_empty(), "{verdict:#?}");
    }

    #[track_caller]
    fn assert_wrong(&self, window: Window, expected: &str) {
        let verdict = self.verdict(window);
        assert!(
            verdict.wrong.iter().any(|line| line.contains(expected)),
            "{expected:?} is not in {verdict:#?}"
        );
    }

    fn begun(&self, thread: usize) -> u64 {
        self.journal.threads[thread].begun_count()
    }
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

const ALL: [u8; 7] = [1, 1, 1, 1, 1, 1, 1];

#[test]
fn a_run_that_ended_is_right() {
    let case = Case::new([2, 1, 1, 2, 2, 1, 2]);
    case.assert_right(Window::default());
    case.assert_right(Case::after());
    assert_eq!(case.verdict(Window::default()).found.len(), 11);
    for thread in &case.journal.threads {
        assert!(thread.begun_count() > 0);
    }
}

#[test]
fn random_files_hold_exactly_a_prefix() {
    let case = Case::new([1, 0, 0, 0, 0, 0, 0]);
    let n = case.begun(0);
    assert!(n > 20, "only {n} writes");
    let (path, config) = (case.path("buffered-0"), &case.journal.config);

    // A shorter prefix is right by itself, but not if the writes had returned.
    rewind(&path, config, 0, n - 1);
    case.assert_right(Window::default());
    case.assert_wrong(Case::after(), "before the freeze");

    // A hole in the prefix: write n is there, n - 1 is not (unless both go to one block).
    rewind(&path, config, 0, n - 12);
    put(&path, config, 0, n, 4096);
    case.assert_wrong(Window::default(), "it should hold");

    // A torn block, a flipped bit, a block that is gone, a file cut short.
    rewind(&path, config, 0, n - 1);
    put(&path, config, 0, n, 2048);
    case.assert_wrong(Window::default(), "torn");
    rewind(&path, config, 0, n);
    patch(&path, 5 * 4096 + 1000, &[0x5a]);
    case.assert_wrong(Window::default(), "torn");
    rewind(&path, config, 0, n);
    patch(&path, 5 * 4096, &[0; 4096]);
    case.assert_wrong(Window::default(), "no stamp");
    rewind(&path, config, 0, n);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(4096).unwrap();
    case.assert_wrong(Window::default(), "bytes long");
}

#[test]
fn the_last_store_into_a_mapping_may_be_there_in_part() {
    let case = Case::new([0, 0, 1, 0, 0, 0, 0]);
    let (path, config, n) = (case.path("mmap-0"), &case.journal.config, case.begun(0));
    assert!(n > 20, "only {n} writes");
    rewind(&path, config, 0, n - 1);
    put(&path, config, 0, n, 2048);
    case.assert_right(Window::default());
    let found = case.verdict(Window::default()).found;
    assert!(found[0].ends_with("and a part"), "{found:?}");

    // But no other than the one after the prefix.
    rewind(&path, config, 0, n - 12);
    put(&path, config, 0, n, 2048);
    case.assert_wrong(Window::default(), "mmap-0: block");
    // And nothing but its bytes and the old ones.
    rewind(&path, config, 0, n - 1);
    put(&path, config, 0, n, 2048);
    let content = std::fs::read(&path).unwrap();
    rewind(&path, config, 0, n - 1);
    let before = std::fs::read(&path).unwrap();
    let at = content.iter().zip(&before).position(|(a, b)| a != b);
    std::fs::write(&path, &content).unwrap();
    patch(
        &path,
        at.unwrap() as u64 / 4096 * 4096 + 100,
        b"something else",
    );
    case.assert_wrong(Window::default(), "torn");
}

/// A run of an appender and its file, which holds some records; the first one is durable.
fn a_filled_appender() -> (Case, Vec<u8>) {
    // A run may end just after the file was truncated.
    (0..50)
        .map(|_| {
            let case = Case::new([0, 0, 0, 1, 0, 0, 0]);
            let content = std::fs::read(case.path("append-0")).unwrap();
            (case, content)
        })
        .find(|(case, content)| {
            let acked = case.journal.threads[0].acked_before(u64::MAX);
            content.len() > 20_000 && Stamp::read(content).is_some_and(|first| first.seq <= acked)
        })
        .expect("a file with some records")
}

#[test]
fn appended_records_are_whole_and_in_order() {
    let (case, content) = a_filled_appender();
    let path = case.path("append-0");
    case.assert_right(Case::after());

    std::fs::write(&path, &content[..content.len() - 1]).unwrap();
    case.assert_wrong(Window::default(), "cut off");
    let mut zeroed = content.clone();
    let at = content.len() - 500;
    zeroed[at..].fill(0);
    std::fs::write(&path, &zeroed).unwrap();
    case.assert_wrong(Window::default(), "torn");
    std::fs::write(&path, &content[4096..]).unwrap();
    case.assert_wrong(Window::default(), "append-0");
    std::fs::write(&path, b"").unwrap();
    case.assert_wrong(Case::after(), "before the freeze");
    // It may be so after any of the truncations, or before the first write.
    let threads = case.journal.config.threads();
    let timeline = &case.journal.threads[0];
    let (config, begun) = (&case.journal.config, case.begun(0));
    let found = append::check(&path, config, &threads[0], timeline, begun, false).unwrap();
    assert_eq!(found.seen, 0);
    assert!(found.whole <= begun, "{found:?}");
    std::fs::remove_file(&path).unwrap();
    case.assert_wrong(Window::default(), "cannot read");
}

#[test]
fn after_a_crash_appended_records_may_have_holes() {
    let (case, content) = a_filled_appender();
    let path = case.path("append-0");
    let crash = Window {
        after_crash: true,
        ..Window::default()
    };
    case.assert_right(crash);
    let threads = case.journal.config.threads();
    let (timeline, begun) = (&case.journal.threads[0], case.begun(0));
    let found = |content: &[u8]| {
        std::fs::write(&path, content).unwrap();
        append::check(
            &path,
            &case.journal.config,
            &threads[0],
            timeline,
            begun,
            true,
        )
    };
    let all = found(&content).unwrap();

    // Cut off, a block that is a hole, one that was written out before it was full.
    let cut = found(&content[..content.len() - 1]).unwrap();
    assert_eq!((cut.seen, cut.whole), (all.seen, all.whole - 1));
    for from in [8192, 8192 + 100] {
        let mut holes = content.clone();
        holes[from..12_288].fill(0);
        let holes = found(&holes).unwrap();
        assert_eq!(holes.seen, all.seen);
        assert!(holes.whole < all.whole, "{holes:?} of {all:?}");
    }
    // What was made durable is not lost.
    let mut lost = content.clone();
    lost[..4096].fill(0);
    found(&lost).unwrap();
    let begin = Some(u64::MAX);
    case.assert_wrong(Window { begin, ..crash }, "were durable before the freeze");

    // What nobody wrote.
    let mut flipped = content.clone();
    flipped[5000] ^= 1;
    found(&flipped).unwrap_err();
    let mut shifted = content.clone();
    shifted.drain(4096..8192);
    found(&shifted).unwrap_err();
    let mut stale = content.clone();
    stale[9000..9010].fill(0);
    found(&stale).unwrap_err();
}

#[test]
fn churned_folders_are_as_the_model_says() {
    let case = Case::new([0, 0, 0, 0, 1, 0, 0]);
    assert!(case.begun(0) > 200, "only {} changes", case.begun(0));
    case.assert_right(Case::after());
    let mut files: Vec<_> = std::fs::read_dir(case.path("churn-0"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.metadata().unwrap().len() > 4096)
        .collect();
    files.sort();
    let file = &files[0];
    let content = std::fs::read(file).unwrap();

    patch(file, 4095, &[!content[4095]]);
    case.assert_wrong(Window::default(), "differs at byte 4095");
    patch(file, 4095, &content[4095..4096]);
    case.assert_right(Window::default());

    std::fs::write(case.path("churn-0/file-99"), b"").unwrap();
    case.assert_wrong(Window::default(), "file-99 is there");
    std::fs::remove_file(case.path("churn-0/file-99")).unwrap();

    let size = content.len() as u64;
    let open = OpenOptions::new().write(true).open(file).unwrap();
    open.set_len(size + 1).unwrap();
    case.assert_wrong(Window::default(), "bytes long instead of");
    open.set_len(size).unwrap();

    std::fs::hard_link(file, case.root.path().join("twin")).unwrap();
    case.assert_wrong(Window::default(), "links");
    std::fs::remove_file(case.root.path().join("twin")).unwrap();
    case.assert_right(Window::default());

    std::fs::remove_file(file).unwrap();
    case.assert_wrong(Window::default(), "is not there");
}

#[test]
fn committed_transactions_are_there() {
    let case = Case::new([0, 0, 0, 0, 0, 1, 0]);
    case.assert_right(Case::after());
    let folder = case.path("sqlite-0");
    let database = folder.join("counter.db");
    let change = |sql: &str| {
        let status = std::process::Command::new("sqlite3")
            .arg(&database)
            .arg(sql)
            .output()
            .expect("sqlite3 (is the package installed?)")
            .status;
        assert!(status.success());
    };
    // Without the last transaction, with the row that it removed.
    change(&format!(
        "UPDATE counter SET n = n - 1; DELETE FROM log WHERE n = (SELECT max(n) FROM log);
         INSERT INTO log SELECT n, printf('%d-%d-%.300c', n, n * 7919, 'x')
             FROM (SELECT n + 1 - {KEEP} AS n FROM counter) WHERE n > 0;"
    ));
    case.assert_right(Window::default());
    case.assert_wrong(Case::after(), "durable before the freeze");
    change("DELETE FROM log WHERE n = (SELECT max(n) FROM log) - 1;");
    case.assert_wrong(Window::default(), "instead of");
    change("PRAGMA wal_checkpoint(TRUNCATE);");
    let len = std::fs::metadata(&database).unwrap().len();
    patch(&database, len / 2, &[0x5a; 3000]);
    case.assert_wrong(Window::default(), "sqlite-0");
    std::fs::remove_file(&database).unwrap();
    case.assert_wrong(Window::default(), "missing");
}

#[test]
fn all_threads_stop_at_one_instant() {
    let case = Case::new([2, 0, 0, 0, 0, 0, 0]);
    // Two files that are each a good prefix, but one is older than the other.
    let n = case.begun(0);
    assert!(n > 40, "only {n} writes");
    rewind(&case.path("buffered-0"), &case.journal.config, 0, n / 2);
    case.assert_wrong(Window::default(), "which is not there");
}

#[test]
fn of_a_pair_the_second_is_not_there_without_the_first() {
    let case = Case::new([0, 0, 0, 0, 0, 0, 2]);
    let config = &case.journal.config;
    let [dir, other] = dirs(&case.root);
    for (thread, paths) in [
        [dir.join("pair-0"), other.join("pair-0.second")],
        [other.join("pair-1"), other.join("pair-1.second")],
    ]
    .iter()
    .enumerate()
    {
        let paths = [&*paths[0], &*paths[1]];
        let n = case.begun(thread) / 2 * 2;
        assert!(n > 40, "only {n} writes");
        let restore = |n| pair::tests::rewind(paths, config, thread, n);
        let second = |n| {
            let first = std::fs::read(paths[0]).unwrap();
            restore(n);
            std::fs::write(paths[0], first).unwrap();
        };
        restore(n - 4);
        second(n);
        case.assert_wrong(Window::default(), "of the first file holds write");
        case.assert_right(Window {
            after_crash: true,
            ..Window::default()
        });
        restore(n);
        second(n - 4);
        case.assert_wrong(Window::default(), "of the second file holds write");
        restore(n);
        case.assert_right(Window::default());
    }
}

#[test]
fn after_a_crash_what_was_durable_is_there() {
    let crash = Window {
        after_crash: true,
        ..Window::default()
    };
    let case = Case::new([1, 1, 1, 0, 0, 0, 0]);
    let config = &case.journal.config;
    case.assert_right(crash);
    let [dir, other] = dirs(&case.root);
    for (thread, path) in [
        dir.join("buffered-0"),
        other.join("direct-0"),
        dir.join("mmap-0"),
    ]
    .iter()
    .enumerate()
    {
        let n = case.begun(thread);
        assert!(n > 40, "only {n} writes");
        // Everything that is there began before the last of what was made durable here.
        rewind(path, config, thread, n - 24);
        case.assert_wrong(crash, "were durable before write");
        rewind(path, config, thread, n);
    }
    case.assert_right(crash);

    // A hole among what was never made durable, in order or not.
    let acked = |thread: usize| case.journal.threads[thread].acked_before(u64::MAX);
    for (path, thread) in [(dir.join("buffered-0"), 0), (other.join("direct-0"), 1)] {
        rewind(&path, config, thread, acked(thread) - 20);
        put(&path, config, thread, acked(thread), 4096);
        let verdict = case.verdict(crash);
        let about = ["were durable", "it should hold"][thread];
        assert!(
            verdict.wrong.iter().any(|line| line.contains(about)),
            "{verdict:#?}"
        );
        rewind(&path, config, thread, case.begun(thread));
    }
    // What nobody wrote.
    patch(&dir.join("buffered-0"), 5 * 4096 + 1000, &[0x5a]);
    case.assert_wrong(crash, "holds no write to it");
}

#[test]
fn the_freeze_is_where_it_was_said_to_be() {
    let case = Case::new(ALL);
    let first = &case.journal.threads[0];
    let early = first.begun_at(1).unwrap() + 1;
    let verdict = case.verdict(Window {
        begin: None,
        end: Some(early),
        exact: false,
        after_crash: false,
    });
    assert!(
        verdict
            .wrong
            .iter()
            .any(|line| line.contains("begun before the thaw")),
        "{verdict:#?}"
    );
    // Writes were done inside what is said to be a freeze.
    let exact = Window {
        begin: Some(first.begun_at(1).unwrap() - 1),
        end: Some(monotonic()),
        exact: true,
        after_crash: false,
    };
    case.assert_wrong(exact, "while the filesystem was frozen");
}

#[test]
fn a_thread_that_never_wrote_proves_nothing() {
    let case = Case::new([1, 0, 0, 0, 0, 0, 0]);
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    drop(Recorder::create(&path, &case.journal.config).unwrap());
    let journal = Journal::read(&path).unwrap();
    rewind(&case.path("buffered-0"), &journal.config, 0, 0);
    let verdict = check(&dirs(&case.root), &journal, Window::default());
    assert!(
        verdict
            .wrong
            .iter()
            .any(|line| line.contains("never wrote")),
        "{verdict:#?}"
    );
}

#[test]
fn a_journal_that_contradicts_itself_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let config = Case::new([1, 0, 0, 0, 0, 0, 0]).journal.config;
    for wrong in [
        |journal: &Recorder| journal.begun(2),
        |journal: &Recorder| journal.returned(1),
        |journal: &Recorder| journal.acked(1),
        |journal: &Recorder| journal.for_thread(7).begun(1),
    ] {
        let path = root.path().join("journal");
        let journal = Recorder::create(&path, &config).unwrap();
        assert!(Journal::read(&path).is_ok());
        wrong(&journal).unwrap();
        assert!(Journal::read(&path).is_err());
        std::fs::remove_file(&path).unwrap();
    }
    std::fs::write(root.path().join("other"), [0; 100]).unwrap();
    assert!(Journal::read(&root.path().join("other")).is_err());
}
