//! What is shown while a verb runs: text and a bar for people, JSON lines for programs.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use holdstill_platform::signals::{self, StopSignal};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::args::{Cli, ProgressKind};
use crate::damage::{Damage, State};
use crate::error::{Error, Escaped};
use crate::progress::{Event, Progress, Stop};
use crate::units::ByteLen;

/// Version of the JSON lines.
const JSON_VERSION: u32 = 1;

/// How often a JSON progress line is written.
const JSON_INTERVAL: Duration = Duration::from_millis(500);

/// How often a plain line is written.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// The terminal, or the program that called us.
pub(super) struct Console {
    style: Style,
    run_id: String,
    /// Standard output belongs to an image: results go to standard error.
    is_stdout_taken: bool,
    signals: OnceLock<signals::Stop>,
    begun: Instant,
    done: AtomicU64,
    total: AtomicU64,
    /// When the last line of progress was written. Held while one is, so that the result is the last
    /// line of all.
    last_line: Mutex<Instant>,
    has_ended: AtomicBool,
}

enum Style {
    Json,
    Quiet,
    Text,
    Plain,
    Bar(ProgressBar),
}

impl Console {
    pub(super) fn new(cli: &Cli, run_id: String) -> Self {
        let kind = match cli.global.progress {
            ProgressKind::Auto if std::io::stderr().is_terminal() => ProgressKind::Bar,
            ProgressKind::Auto => ProgressKind::Plain,
            kind => kind,
        };
        let style = match kind {
            _ if cli.global.json => Style::Json,
            _ if cli.global.quiet => Style::Quiet,
            ProgressKind::Bar => Style::Bar(bar()),
            ProgressKind::Plain | ProgressKind::Auto => Style::Plain,
            ProgressKind::None => Style::Text,
        };
        Self {
            style,
            run_id,
            is_stdout_taken: cli.verb.streams_to_stdout(),
            signals: OnceLock::new(),
            begun: Instant::now(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            last_line: Mutex::new(Instant::now()),
            has_ended: AtomicBool::new(false),
        }
    }

    /// Ends runs when a signal asks for it.
    pub(super) fn listen_to(&self, signals: signals::Stop) {
        let _ = self.signals.set(signals);
    }

    /// Shows progress now and then, also while no byte moves, until [`end`](Self::end).
    pub(super) fn tick(&self) {
        while !self.has_ended.load(Ordering::Acquire) {
            std::thread::park_timeout(JSON_INTERVAL);
            if self.total.load(Ordering::Relaxed) > 0 {
                self.show_progress();
            }
        }
    }

    /// No more progress is shown from now on.
    pub(super) fn end(&self) {
        let _last_line = self
            .last_line
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.has_ended.store(true, Ordering::Release);
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }

    /// Shows the result: `text` for people, `report` for programs. It is the last line.
    pub(super) fn result(&self, report: &impl Serialize, text: &str) {
        self.end();
        match &self.style {
            Style::Json => {
                let fields = serde_json::to_value(report).unwrap_or(Value::Null);
                self.json("result", fields);
            }
            Style::Quiet => {}
            _ => self.line(text),
        }
    }

    /// Shows an error: two lines at most. It is the last line.
    pub(super) fn error(&self, error: &Error) {
        self.end();
        match &self.style {
            Style::Json => write_line(self.is_stdout_taken, &error_json(error, &self.run_id)),
            _ => error_text(error),
        }
    }

    fn json(&self, event: &str, fields: Value) {
        write_line(
            self.is_stdout_taken,
            &json_line(event, &self.run_id, fields),
        );
    }

    fn line(&self, text: &str) {
        write_line(self.is_stdout_taken, text);
    }

    /// A line on standard error, above the bar if there is one.
    fn note(&self, text: &str) {
        match &self.style {
            Style::Bar(bar) => bar.suspend(|| eprint_line(text)),
            _ => eprint_line(text),
        }
    }

    fn show_progress(&self) {
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed).max(done);
        let seconds = self.begun.elapsed().as_secs_f64().max(0.001);
        let rate = done as f64 / seconds;
        let eta = (done > 0).then(|| (total - done) as f64 / rate);
        if let Style::Bar(bar) = &self.style {
            bar.set_length(total);
            bar.set_position(done);
        }
        let interval = match &self.style {
            Style::Json => JSON_INTERVAL,
            Style::Plain => PLAIN_INTERVAL,
            _ => return,
        };
        let mut last_line = self
            .last_line
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if last_line.elapsed() < interval || self.has_ended.load(Ordering::Acquire) {
            return;
        }
        *last_line = Instant::now();
        match &self.style {
            Style::Json => self.json(
                "progress",
                json!({"done_bytes": done, "total_bytes": total, "rate": rate as u64, "eta_s": eta}),
            ),
            _ => {
                let eta = eta.map_or(String::new(), |eta| format!(", {eta:.0} s left"));
                let (done, total, rate) = (ByteLen(done), ByteLen(total), ByteLen(rate as u64));
                self.note(&format!("{done} of {total}, {rate}/s{eta}"));
            }
        }
    }
}

impl Progress for Console {
    fn event(&self, event: &Event<'_>) {
        match &self.style {
            Style::Json => {
                let (name, fields) = event_json(event);
                self.json(name, fields);
            }
            Style::Quiet => {}
            _ => self.note(&event_text(event)),
        }
    }

    fn total(&self, bytes: ByteLen) {
        self.total.store(bytes.0, Ordering::Relaxed);
        self.show_progress();
    }

    fn advance(&self, bytes: ByteLen) {
        self.done.fetch_add(bytes.0, Ordering::Relaxed);
        self.show_progress();
    }

    fn stop(&self) -> Option<Stop> {
        let signal = self.signals.get().and_then(signals::Stop::asked);
        signal.map(|signal| match signal {
            StopSignal::Interrupt => Stop::Interrupt,
            StopSignal::Terminate | StopSignal::HangUp => Stop::Terminate,
        })
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let template = "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn event_json(event: &Event<'_>) -> (&'static str, Value) {
    match event {
        Event::Plan(what) => ("plan", json!({"plan": what})),
        Event::Frozen { instant } => ("frozen", json!({"instant": instant})),
        Event::Thawed(times) => ("thawed", json!(times)),
        Event::Warning(text) => ("warning", json!({"message": text})),
        Event::Damaged(damage) => ("damaged", json!(damage)),
    }
}

fn event_text(event: &Event<'_>) -> String {
    match event {
        Event::Plan(what) => Escaped(what).to_string(),
        Event::Frozen { instant } => format!("frozen at {instant}"),
        Event::Thawed(times) => format!("thawed after {:.0} ms; keep working", times.freeze_ms),
        Event::Warning(text) => format!("warning: {}", Escaped(text)),
        Event::Damaged(damage) => damage_text(damage),
    }
}

fn damage_text(damage: &Damage) -> String {
    let mut text = format!("damaged: {}", Escaped(&damage.message));
    if let Some(position) = damage.position {
        let _ = write!(text, ", at byte {position} of the image");
    }
    if let (Some(volume), Some((first, _))) = (damage.volume, damage.ranges.first()) {
        let what = match damage.state {
            State::Outdated => "some older than the instant",
            _ => "lost",
        };
        let bytes = damage.bytes();
        let _ = write!(
            text,
            "; {bytes} of volume {volume} from byte {first} on: {what}"
        );
    }
    text
}

/// One line: the fields every line has, and then its own.
fn json_line(event: &str, run_id: &str, fields: Value) -> String {
    let mut line = Map::new();
    line.insert("v".into(), json!(JSON_VERSION));
    line.insert("event".into(), json!(event));
    line.insert("time".into(), json!(jiff::Timestamp::now().to_string()));
    line.insert("run_id".into(), json!(run_id));
    if let Value::Object(fields) = fields {
        line.extend(fields);
    }
    Value::Object(line).to_string()
}

fn error_json(error: &Error, run_id: &str) -> String {
    let fields = json!({
        "kind": error.kind().name(),
        "message": error.to_string(),
        "hint": error.get_hint(),
        "exit_code": error.kind().exit_code(),
    });
    json_line("error", run_id, fields)
}

/// A usage error, before anything is known of the run but what was typed.
pub(super) fn usage_error(error: &Error, arguments: &[OsString], run_id: &str) {
    if arguments.iter().any(|argument| argument == "--json") {
        let is_stdout_taken = arguments
            .windows(2)
            .any(|pair| (pair[0] == "-o" || pair[0] == "--output") && pair[1] == "-")
            || arguments.iter().any(|argument| argument == "--output=-")
            || is_restore_to_stdout(arguments);
        write_line(is_stdout_taken, &error_json(error, run_id));
    } else {
        error_text(error);
    }
}

/// Whether a volume was to go to standard output: `-` stands somewhere behind the image.
fn is_restore_to_stdout(arguments: &[OsString]) -> bool {
    let mut rest = arguments
        .iter()
        .skip_while(|argument| *argument != "restore");
    rest.next();
    let mut places = rest.filter(|argument| {
        let argument = argument.to_string_lossy();
        argument == "-" || argument.ends_with("=-") || !argument.starts_with('-')
    });
    places.next();
    places.any(|argument| argument == "-" || argument.to_string_lossy().ends_with("=-"))
}

fn error_text(error: &Error) {
    eprint_line(&format!("holdstill: {error}"));
    if let Some(hint) = error.get_hint() {
        eprint_line(&format!("  {hint}"));
    }
}

/// Whoever reads our output may be gone; the exit code still tells.
fn write_line(to_stderr: bool, text: &str) {
    if to_stderr {
        eprint_line(text);
    } else {
        let _ = writeln!(std::io::stdout().lock(), "{text}");
    }
}

fn eprint_line(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// What `--version --json` prints.
pub(super) fn version_line(run_id: &str, fields: &Value) {
    write_line(false, &json_line("result", run_id, fields.clone()));
}
