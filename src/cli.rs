//! The command line: what was typed ([`args`]), how it is carried out, and what is shown of it
//! ([`console`]).

mod args;
mod ask;
mod console;
mod text;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use holdstill_platform::signals::Stop;

use self::args::{Cli, Verb};
use self::console::Console;
use crate::error::{Error, Kind, Result};
use crate::{backup, clone, inspect, restore, verify};

/// Runs the command line `arguments` (the program's name first) and returns the exit code.
pub fn run(arguments: Vec<OsString>) -> ExitCode {
    let run_id = uuid::Uuid::new_v4().simple().to_string();
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
        .parse_default_env()
        .init();
    let console = Console::new(&cli, run_id.clone());
    let done = Stop::install().map_err(Error::from).and_then(|stop| {
        console.listen_to(stop);
        carry_out(cli.verb, &run_id, &console)
    });
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            console.error(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// What clap has to say: help and version on standard output, mistakes as our own errors.
fn usage(error: &clap::Error, arguments: &[OsString], run_id: &str) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
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
    match verb {
        Verb::Backup(args) => {
            let options = args.options(run_id)?;
            let report = backup::run(&options, console)?;
            let code = if report.has_unreadable() { 5 } else { 0 };
            console.result(&report, &text::backup(&report));
            Ok(code)
        }
        Verb::Restore(args) => {
            let mut confirm = ask::confirmation(args.yes);
            let report = restore::run(&args.options()?, &mut confirm, console)?;
            console.result(&report, &text::restore(&report));
            Ok(0)
        }
        Verb::Clone(args) => {
            let mut confirm = ask::confirmation(args.yes);
            let report = clone::run(&args.options(run_id)?, &mut confirm, console)?;
            let code = if report.unreadable.is_empty() { 0 } else { 5 };
            console.result(&report, &text::clone(&report));
            Ok(code)
        }
        Verb::Verify(args) => {
            let report = verify::run(&args.options(), console)?;
            console.result(&report, &text::verify(&report));
            Ok(0)
        }
        Verb::Inspect(args) => {
            let report = inspect::run(&args.what)?;
            console.result(&report, &text::inspect(&report));
            Ok(0)
        }
    }
}
