//! The command line: what was typed (`args`), how it is carried out, and what is shown of it
//! (`console`).

mod args;
mod ask;
mod console;
mod last_resort;
mod manual;
mod text;

use std::ffi::OsString;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use holdstill_platform::signals::Stop;

use self::args::{Cli, Verb};
use self::console::Console;
use crate::error::{Error, Escaped, Kind, Result};
use crate::freeze::step::{AnyStep, STEPS, ladder};
use crate::image::format;
use crate::pipeline::throttle::Throttled;
use crate::progress::Progress;
use crate::thread;
use crate::verbs::{backup, cleanup, clone, demo, dry_run, inspect, restore, verify};

/// Runs the command line `arguments` (the program's name first) and returns the exit code.
pub fn run(arguments: Vec<OsString>) -> ExitCode {
    let code = last_resort::caught(|| Ok(parse_and_run(arguments)));
    code.unwrap_or_else(|error| {
        console::error_text(&error);
        ExitCode::from(error.kind().exit_code())
    })
}

fn parse_and_run(arguments: Vec<OsString>) -> ExitCode {
    let run_id = uuid::Uuid::new_v4().simple().to_string();
    if asks_for_version(&arguments) {
        return version(&run_id);
    }
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &arguments, &run_id),
    };
    let log_level = if cli.global.quiet {
        log::LevelFilter::Error
    } else {
        log::LevelFilter::Warn
    };
    env_logger::Builder::new()
        .filter_level(log_level)
        .format(|out, record| {
            let (time, level, target) = (out.timestamp(), record.level(), record.target());
            let text = record.args().to_string();
            writeln!(out, "[{time} {level} {target}] {}", Escaped(&text))
        })
        .parse_default_env()
        .init();
    let console = Console::new(&cli, run_id.clone());
    let work = || {
        console.listen_to(Stop::install()?);
        std::thread::scope(|scope| {
            let ticker = thread::spawn(scope, || console.tick())?;
            let _ends = EndTicking(&console, ticker.thread());
            carry_out(cli.verb, &run_id, &console)
        })
    };
    // Here once more: the error is then shown as this command line wants it.
    let done = last_resort::caught(work);
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            console.error(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// Ends the ticking when the work ends, even by a panic: else the scope would wait for ever.
struct EndTicking<'a>(&'a Console, &'a std::thread::Thread);

impl Drop for EndTicking<'_> {
    fn drop(&mut self) {
        self.0.end();
        self.1.unpark();
    }
}

/// `--version --json`: what this build can do, for programs.
fn asks_for_version(arguments: &[OsString]) -> bool {
    let has = |wanted: &str| arguments.iter().skip(1).any(|argument| argument == wanted);
    has("--version") && has("--json") && arguments.len() == 3
}

fn version(run_id: &str) -> ExitCode {
    let names = |steps: &[AnyStep]| steps.iter().map(|step| step.name()).collect::<Vec<_>>();
    let printed = console::version_line(
        run_id,
        &serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "steps": names(&STEPS),
            "auto_steps": names(&ladder()),
            "used_block_filesystems": ["ext2", "ext3", "ext4", "xfs", "btrfs", "apfs"],
            "format_versions": [format::VERSION],
        }),
    );
    shown(printed)
}

/// The exit code of what only had to be printed.
fn shown(printed: Result<()>) -> ExitCode {
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::error_text(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// What clap has to say: help and version on standard output, mistakes as our own errors.
fn usage(error: &clap::Error, arguments: &[OsString], run_id: &str) -> ExitCode {
    if !error.use_stderr() {
        return shown(console::printed(error.print()));
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
    } else {
        console::usage_error(&in_short(error), arguments, run_id);
    }
    ExitCode::from(Kind::Usage.exit_code())
}

/// The first paragraph of what clap would print, on one line, and its tip.
fn in_short(error: &clap::Error) -> Error {
    let text = error.to_string();
    let mut paragraphs = text.split("\n\n");
    let first: Vec<&str> = paragraphs
        .next()
        .unwrap_or_default()
        .lines()
        .map(str::trim)
        .collect();
    let first = first.join(" ");
    let message = first.strip_prefix("error: ").unwrap_or(&first);
    let tip = paragraphs.find_map(|paragraph| paragraph.trim().strip_prefix("tip: "));
    let hint = tip.and_then(|tip| tip.lines().next());
    Error::new(Kind::Usage, message).hint(hint.unwrap_or("--help tells how"))
}

fn carry_out(verb: Verb, run_id: &str, console: &Console) -> Result<u8> {
    let throttled = verb.rate().map(|rate| Throttled::new(console, rate));
    let progress: &dyn Progress = match &throttled {
        Some(throttled) => throttled,
        None => console,
    };
    if verb.streams_to_stdout() && std::io::stdout().is_terminal() {
        let what = "standard output is a terminal, and disks are not to be read there";
        return Err(Error::new(Kind::Usage, what).hint("send it to a file or a pipe"));
    }
    match verb {
        Verb::Backup(args) => {
            let mut options = args.options(run_id)?;
            options.hooks.is_stderr_taken = console.is_stderr_taken();
            if args.dry_run {
                return dry(&dry_run::backup(&options)?, console);
            }
            let report = backup::run(&options, progress)?;
            console.result(&report, &text::backup(&report))?;
            Ok(done(report.has_unreadable(), report.hook_failed))
        }
        Verb::Restore(args) => {
            let options = args.options()?;
            if args.dry_run {
                return dry(&dry_run::restore(&options)?, console);
            }
            let report = restore::run(&options, &mut ask::confirmation(args.yes), progress)?;
            console.result(&report, &text::restore(&report)).map(|()| 0)
        }
        Verb::Clone(args) => {
            let options = args.options(run_id)?;
            if args.dry_run {
                return dry(&dry_run::clone(&options)?, console);
            }
            let report = clone::run(&options, &mut ask::confirmation(args.yes), progress)?;
            console.result(&report, &text::clone(&report))?;
            Ok(done(!report.unreadable.is_empty(), report.hook_failed))
        }
        Verb::Verify(args) => {
            let report = verify::run(&args.options()?, progress)?;
            console.result(&report, &text::verify(&report)).map(|()| 0)
        }
        Verb::Inspect(args) => {
            let report = inspect::run(&args.what)?;
            console.result(&report, &text::inspect(&report)).map(|()| 0)
        }
        Verb::Cleanup { run, dry_run } => {
            let report = match run {
                Some(run_id) => cleanup::of_run(&run_id)?,
                None => cleanup::run(dry_run, progress)?,
            };
            console.result(&report, &text::cleanup(&report)).map(|()| 0)
        }
        Verb::Demo => {
            let report = demo::run(run_id, progress)?;
            console.result(&report, &text::demo(&report)).map(|()| 0)
        }
        Verb::Completions { shell } => manual::completions(shell).map(|()| 0),
        Verb::Man { folder } => manual::man(folder.as_deref()).map(|()| 0),
    }
}

fn dry(report: &dry_run::Report, console: &Console) -> Result<u8> {
    console.result(report, &text::dry_run(report)).map(|()| 0)
}

/// The exit code of what is done, but not without trouble.
fn done(has_unreadable: bool, hook_failed: bool) -> u8 {
    match (has_unreadable, hook_failed) {
        (true, _) => 5,
        (false, true) => 6,
        (false, false) => 0,
    }
}
