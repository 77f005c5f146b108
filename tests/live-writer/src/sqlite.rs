//! `SQLite` transactions in WAL mode with synchronous=FULL, through the `sqlite3` program: a line
//! with the number of the transaction comes back once it is committed.

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::check::Found;
use crate::journal::Timeline;
use crate::run::Task;

/// Rows of the log that are kept.
pub(crate) const KEEP: u64 = 2000;

/// The database's file in the thread's folder.
const FILE: &str = "counter.db";

fn missing(error: &io::Error) -> io::Error {
    io::Error::other(format!(
        "cannot run sqlite3 (is the package installed?): {error}"
    ))
}

/// Runs `sql` on a database; what it printed.
fn query(database: &Path, sql: &str) -> io::Result<String> {
    let output = Command::new("sqlite3")
        .arg("-batch")
        .arg(database)
        .arg(sql)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| missing(&error))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(io::Error::other(format!("sqlite3: {message}")))
    }
}

/// Makes the database.
pub(crate) fn prepare(task: &Task) -> io::Result<()> {
    std::fs::create_dir(&task.path)?;
    query(
        &task.path.join(FILE),
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
         CREATE TABLE counter(id INTEGER PRIMARY KEY CHECK (id = 1), n INTEGER NOT NULL);
         CREATE TABLE log(n INTEGER PRIMARY KEY, payload TEXT NOT NULL);
         INSERT INTO counter VALUES(1, 0);",
    )
    .map(|_| ())
}

/// A child that is gone when the guard is.
struct Shell(Child);

impl Drop for Shell {
    fn drop(&mut self) {
        // The end of its input ends it; if it hangs, it is ended.
        drop(self.0.stdin.take());
        for _ in 0..200 {
            if matches!(self.0.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Commits until it is told to stop.
pub(crate) fn run(task: &Task) -> io::Result<()> {
    let child = Command::new("sqlite3")
        .arg("-batch")
        .arg("-bail")
        .arg(task.path.join(FILE))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| missing(&error))?;
    let mut shell = Shell(child);
    let gone = || io::Error::other("sqlite3 ended by itself");
    let mut input = shell.0.stdin.take().ok_or_else(gone)?;
    let mut output = BufReader::new(shell.0.stdout.take().ok_or_else(gone)?);
    writeln!(input, "PRAGMA synchronous=FULL;")?;
    let mut seq = 0_u64;
    let mut line = String::new();
    while !task.stopped() {
        seq += 1;
        let old = seq.saturating_sub(KEEP);
        task.journal.begun(seq)?;
        writeln!(
            input,
            "BEGIN IMMEDIATE; UPDATE counter SET n = {seq}; \
             INSERT INTO log VALUES({seq}, printf('%d-%d-%.300c', {seq}, {seq} * 7919, 'x')); \
             DELETE FROM log WHERE n <= {old}; COMMIT; SELECT n FROM counter;"
        )?;
        line.clear();
        output.read_line(&mut line)?;
        if line.trim() != seq.to_string() {
            return Err(io::Error::other(format!(
                "sqlite3 answered {line:?} to transaction {seq}"
            )));
        }
        task.journal.returned(seq)?;
        task.journal.acked(seq)?;
        task.progressed();
        task.pause();
    }
    drop(input);
    Ok(())
}

/// Which transactions the database in the folder at `path` holds. It is copied first, so that the
/// copy under test stays as it is and may be mounted read-only.
pub(crate) fn check(path: &Path, timeline: &Timeline) -> Result<Found, Vec<String>> {
    let result = (|| {
        let copy = Scratch::new()?;
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            let name = entry.file_name();
            // The shared-memory index is rebuilt from the log; a copy of it is stale.
            if !name.to_string_lossy().ends_with("-shm") {
                std::fs::copy(entry.path(), copy.0.join(name))?;
            }
        }
        let database = copy.0.join(FILE);
        if !database.exists() {
            return Err(io::Error::other("the database is missing"));
        }
        let sound = query(&database, "PRAGMA integrity_check;")?;
        if sound != "ok" {
            return Err(io::Error::other(format!("integrity_check: {sound}")));
        }
        let rows = query(
            &database,
            "SELECT (SELECT n FROM counter), ifnull(max(n), 0), count(*),
                    total(payload <> printf('%d-%d-%.300c', n, n * 7919, 'x')) FROM log;",
        )?;
        let n: u64 = query(&database, "SELECT n FROM counter;")?
            .parse()
            .map_err(|_| io::Error::other(format!("no counter: {rows}")))?;
        let expected = format!("{n}|{n}|{}|0.0", n.min(KEEP));
        if rows == expected {
            Ok(n)
        } else {
            Err(io::Error::other(format!(
                "counter, last row, rows, wrong rows are {rows} instead of {expected}"
            )))
        }
    })();
    match result {
        Ok(n) if n <= timeline.begun_count() => Ok(Found::whole(n)),
        Ok(n) => Err(vec![format!(
            "holds transaction {n}, which was never begun"
        )]),
        Err(error) => Err(vec![error.to_string()]),
    }
}

/// A folder that is removed at the end.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new() -> io::Result<Self> {
        let name = format!(
            "live-writer-{}-{}",
            std::process::id(),
            crate::journal::monotonic()
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
