//! Keeps a filesystem busy in a way that a copy of it can be judged by, and judges the copy.
//!
//! `live-writer run` writes with many threads at once: random writes through the page cache, past
//! it and through a mapping, pairs of both, appends, changes of metadata, and `SQLite`
//! transactions. Everything it writes follows from a seed, and a journal on another filesystem says which write began and
//! returned when. `live-writer check` looks at a copy that was taken meanwhile: each thread's
//! files must hold exactly a prefix of its writes, and all prefixes together one instant, inside
//! the freeze. Exit status: 0 all is right; 1 the copy is wrong, or the run failed; 2 usage.

mod append;
mod check;
mod churn;
mod config;
mod content;
mod journal;
mod orphans;
mod pair;
mod random;
mod run;
mod sqlite;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use signal_hook::consts::{SIGINT, SIGTERM};

/// Keeps a filesystem busy, and judges a copy of it.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Writes into folders until SIGTERM, SIGINT or the end of `--duration`.
    Run(Run),
    /// Judges a copy of those folders.
    Check(Check),
    /// Prints CLOCK_MONOTONIC in nanoseconds.
    Clock,
}

#[derive(Args, Debug)]
struct Run {
    /// The folder to write into; of several, the threads take one after the other.
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// The journal to write, on another filesystem.
    #[arg(long)]
    journal: PathBuf,
    /// What all random choices follow from (default: the clock).
    #[arg(long)]
    seed: Option<u64>,
    /// Pause between writes: for slow machines.
    #[arg(long)]
    light: bool,
    /// Keep open files that have no name any more.
    #[arg(long)]
    orphans: bool,
    /// Seconds to write for.
    #[arg(long, value_name = "S")]
    duration: Option<f64>,
    /// MiB that the files may take up, roughly.
    #[arg(long, value_name = "MIB", default_value_t = 96)]
    budget: u64,
    /// Threads that write through the page cache.
    #[arg(long, default_value_t = 2)]
    buffered: u8,
    /// Threads that write past the page cache.
    #[arg(long, default_value_t = 1)]
    direct: u8,
    /// Threads that write through a mapping.
    #[arg(long, default_value_t = 1)]
    mmap: u8,
    /// Threads that append.
    #[arg(long, default_value_t = 2)]
    append: u8,
    /// Threads that change metadata.
    #[arg(long, default_value_t = 2)]
    churn: u8,
    /// Databases.
    #[arg(long, default_value_t = 1)]
    sqlite: u8,
    /// Threads that write in pairs, through the page cache and past it, and make nothing durable.
    #[arg(long, default_value_t = 0)]
    pair: u8,
}

#[derive(Args, Debug)]
struct Check {
    /// The copies of the folders that were written into, in the same order.
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// The journal of the run.
    #[arg(long)]
    journal: PathBuf,
    /// Nanoseconds of CLOCK_MONOTONIC when FIFREEZE had returned, or earlier.
    #[arg(long, value_name = "NS")]
    frozen_begin: Option<u64>,
    /// Nanoseconds of CLOCK_MONOTONIC when FITHAW had not been called, or later.
    #[arg(long, value_name = "NS")]
    frozen_end: Option<u64>,
    /// Both instants lie inside the freeze: nothing may have been written between them.
    #[arg(long, requires = "frozen_begin", requires = "frozen_end")]
    exact: bool,
    /// Nothing was frozen: only what was made durable must be there, and what the kernel keeps in
    /// order.
    #[arg(long, conflicts_with = "exact")]
    crash: bool,
    /// The instants are of CLOCK_REALTIME.
    #[arg(long)]
    realtime: bool,
}

/// An error with what it is about.
fn about(what: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("{what}: {}: {error}", path.display()))
}

fn run(args: &Run) -> io::Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(journal::monotonic);
    eprintln!("live-writer: seed {seed}");
    let config = config::Config {
        seed,
        light: args.light,
        budget: args.budget << 20,
        counts: [
            args.buffered,
            args.direct,
            args.mmap,
            args.append,
            args.churn,
            args.sqlite,
            args.pair,
        ],
        realtime_offset: journal::realtime_offset(),
    };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let duration = args.duration.map(Duration::from_secs_f64);
    run::run(
        &args.dirs,
        &args.journal,
        config,
        args.orphans,
        duration,
        &stop,
    )?;
    Ok(ExitCode::SUCCESS)
}

fn check(args: &Check) -> io::Result<ExitCode> {
    let journal = journal::Journal::read(&args.journal)?;
    let monotonic = |time: Option<u64>| {
        let offset = if args.realtime {
            journal.config.realtime_offset
        } else {
            0
        };
        time.map(|time| time.saturating_sub(offset))
    };
    let window = check::Window {
        begin: monotonic(args.frozen_begin),
        end: monotonic(args.frozen_end),
        exact: args.exact,
        after_crash: args.crash,
    };
    let verdict = check::check(&args.dirs, &journal, window);
    for line in &verdict.found {
        println!("{line}");
    }
    for line in &verdict.wrong {
        println!("WRONG {line}");
    }
    if verdict.wrong.is_empty() {
        println!("right: one instant, seed {}", journal.config.seed);
        Ok(ExitCode::SUCCESS)
    } else {
        println!(
            "wrong in {} ways, seed {}",
            verdict.wrong.len(),
            journal.config.seed
        );
        Ok(ExitCode::FAILURE)
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Run(args) => run(&args),
        Verb::Check(args) => check(&args),
        Verb::Clock => {
            println!("{}", journal::monotonic());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("live-writer: {error}");
        ExitCode::FAILURE
    })
}
