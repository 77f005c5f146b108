//! The command line: what was typed (`args`), how it is carried out, and what is shown of it
//! (`console`).

mod args;
mod ask;
mod console;
mod manual;
mod text;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use holdstill_platform::signals::Stop;

use self::args::{Cli, Verb};
use self::console::Console;
use crate::error::{Error, Kind, Result};
use crate::freeze::Step;
use crate::image::format;
use crate::pipeline::throttle::Throttled;
use crate::progress::Progress;
use crate::{backup, cleanup, clone, demo, dry_run, inspect, restore, verify};

/// Runs the command line `arguments` (the program's name first) and returns the exit code.
pub fn run(arguments: Vec<OsString>) -> ExitCode {
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
        .parse_default_env()
        .init();
    let console = Console::new(&cli, run_id.clone());
    let done = Stop::install().map_err(Error::from).and_then(|stop| {
        console.listen_to(stop);
        std::thread::scope(|scope| {
            let ticker = scope.spawn(|| console.tick());
            let _ends = EndTicking(&console, ticker.thread());
            carry_out(cli.verb, &run_id, &console)
        })
    });
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
    let names = |steps: &[Step]| steps.iter().map(|step| step.name()).collect::<Vec<_>>();
    console::version_line(
        run_id,
        &serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "steps": names(&Step::ALL),
            "auto_steps": names(Step::ladder()),
            "used_block_filesystems": ["ext2", "ext3", "ext4", "xfs", "btrfs", "apfs"],
            "format_versions": [format::VERSION],
        }),
    );
    ExitCode::SUCCESS
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
            let options = args.options(run_id)?;
            if args.dry_run {
                return dry(&dry_run::backup(&options)?, console);
            }
            let report = backup::run(&options, progress)?;
            console.result(&report, &text::backup(&report));
            Ok(if report.has_unreadable() { 5 } else { 0 })
        }
        Verb::Restore(args) => {
            let options = args.options()?;
            if args.dry_run {
                return dry(&dry_run::restore(&options)?, console);
            }
            let report = restore::run(&options, &mut ask::confirmation(args.yes), progress)?;
            console.result(&report, &text::restore(&report));
            Ok(0)
        }
        Verb::Clone(args) => {
            let options = args.options(run_id)?;
            if args.dry_run {
                return dry(&dry_run::clone(&options)?, console);
            }
            let report = clone::run(&options, &mut ask::confirmation(args.yes), progress)?;
            console.result(&report, &text::clone(&report));
            Ok(if report.unreadable.is_empty() { 0 } else { 5 })
        }
        Verb::Verify(args) => {
            let report = verify::run(&args.options()?, progress)?;
            console.result(&report, &text::verify(&report));
            Ok(0)
        }
        Verb::Inspect(args) => {
            let report = inspect::run(&args.what)?;
            console.result(&report, &text::inspect(&report));
            Ok(0)
        }
        Verb::Cleanup { run } => {
            let report = match run {
                Some(run_id) => cleanup::of_run(&run_id)?,
                None => cleanup::run(progress)?,
            };
            console.result(&report, &text::cleanup(&report));
            Ok(0)
        }
        Verb::Demo => {
            let report = demo::run(run_id, progress)?;
            console.result(&report, &text::demo(&report));
            Ok(0)
        }
        Verb::Completions { shell } => {
            manual::completions(shell);
            Ok(0)
        }
        Verb::Man { folder } => manual::man(folder.as_deref()).map(|()| 0),
    }
}

fn dry(report: &dry_run::Report, console: &Console) -> Result<u8> {
    console.result(report, &text::dry_run(report));
    Ok(0)
}
