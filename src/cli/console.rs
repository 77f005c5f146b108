//! What is shown while a verb runs: text and a bar for people, JSON lines for programs.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use holdstill_platform::signals::{self, StopSignal};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::args::{Cli, ProgressKind};
use crate::error::{Error, Escaped, Kind, Result, is_hidden};
use crate::image::damage::{Damage, State};
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
    hushed: Mutex<Hushed>,
}

/// What must wait to be shown: what is written may end on a filesystem that is frozen (a log on the
/// source), and whoever writes there waits for the thaw.
#[derive(Default)]
struct Hushed {
    /// How many freezes are under way.
    freezes: usize,
    lines: Vec<Waiting>,
}

enum Waiting {
    /// For whoever reads results.
    Line(String),
    /// For people, on standard error.
    Note(String),
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
            hushed: Mutex::default(),
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
        // A run that failed while something was frozen has thawed it on its way out.
        let mut hushed = self.hushed();
        hushed.freezes = 0;
        self.show_waiting(&mut hushed);
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }

    /// Shows the result: `text` for people, `report` for programs. It is the last line.
    ///
    /// # Errors
    /// If it cannot be written: whoever waits for it must not believe that it was nothing.
    pub(super) fn result(&self, report: &impl Serialize, text: &str) -> Result<()> {
        self.end();
        let written = match &self.style {
            Style::Json => {
                let fields = serde_json::to_value(report).map_err(|error| {
                    Error::new(Kind::Failed, "cannot describe the result").because(error)
                })?;
                let line = json_line("result", &self.run_id, fields);
                write_line(self.is_stdout_taken, &line)
            }
            Style::Quiet => return Ok(()),
            _ => write_line(self.is_stdout_taken, text),
        };
        printed(written)
            .map_err(|error| error.hint("everything was done before: only the result is not shown"))
    }

    /// Shows an error: two lines at most. It is the last line.
    pub(super) fn error(&self, error: &Error) {
        self.end();
        match &self.style {
            Style::Json => error_line(self.is_stdout_taken, error, &self.run_id),
            _ => error_text(error),
        }
    }

    /// An event that cannot be written ends nothing: that the result cannot be will be seen.
    fn json(&self, event: &str, fields: Value) {
        self.write(Waiting::Line(json_line(event, &self.run_id, fields)));
    }

    /// Whether programs read our lines on standard error.
    pub(super) fn is_stderr_taken(&self) -> bool {
        self.is_stdout_taken && matches!(self.style, Style::Json)
    }

    /// A line on standard error, above the bar if there is one.
    fn note(&self, text: &str) {
        self.write(Waiting::Note(text.to_owned()));
    }

    /// Shows a line, now or after the thaw. The lock is held while it is shown: what begins to freeze
    /// waits for it.
    fn write(&self, line: Waiting) {
        let mut hushed = self.hushed();
        match hushed.freezes {
            0 => self.show(&line),
            _ => hushed.lines.push(line),
        }
    }

    fn show(&self, line: &Waiting) {
        match (line, &self.style) {
            (Waiting::Line(text), _) => {
                let _ = write_line(self.is_stdout_taken, text);
            }
            (Waiting::Note(text), Style::Bar(bar)) => bar.suspend(|| eprint_line(text)),
            (Waiting::Note(text), _) => eprint_line(text),
        }
    }

    fn hushed(&self) -> MutexGuard<'_, Hushed> {
        self.hushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows what had to wait.
    fn show_waiting(&self, hushed: &mut Hushed) {
        for line in hushed.lines.drain(..) {
            self.show(&line);
        }
    }

    fn show_progress(&self) {
        // The bar, too, is drawn only under the lock, and nothing is said of progress later.
        let hushed = self.hushed();
        if hushed.freezes > 0 {
            return;
        }
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed).max(done);
        let seconds = self.begun.elapsed().as_secs_f64().max(0.001);
        let rate = done as f64 / seconds;
        let eta = (done > 0).then(|| (total - done) as f64 / rate);
        if let Style::Bar(bar) = &self.style {
            bar.set_length(total);
            bar.set_position(done);
        }
        drop(hushed);
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
            // What hooks print is no line of ours: it is kept apart from them, unless there is only one
            // place for both.
            Style::Json if matches!(event, Event::Hook { .. }) && !self.is_stdout_taken => {
                self.note(&event_text(event));
            }
            Style::Json => {
                let (name, fields) = event_json(event);
                self.json(name, fields);
            }
            Style::Quiet if !matches!(event, Event::Hook { .. }) => {}
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

    fn hush(&self, is_frozen: bool) {
        let mut hushed = self.hushed();
        if is_frozen {
            hushed.freezes += 1;
            return;
        }
        hushed.freezes = hushed.freezes.saturating_sub(1);
        if hushed.freezes == 0 {
            self.show_waiting(&mut hushed);
        }
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
        Event::Hook { phase, output } => ("hook", json!({"phase": phase, "output": output})),
    }
}

fn event_text(event: &Event<'_>) -> String {
    match event {
        Event::Plan(what) => Escaped(what).to_string(),
        Event::Frozen { instant } => format!("frozen at {instant}"),
        Event::Thawed(times) => format!("thawed after {:.0} ms; keep working", times.freeze_ms),
        Event::Warning(text) => format!("warning: {}", Escaped(text)),
        Event::Damaged(damage) => damage_text(damage),
        Event::Hook { phase, output } => {
            let lines = output
                .lines()
                .map(|line| format!("{phase}-freeze: {}", Escaped(line)));
            lines.collect::<Vec<_>>().join("\n")
        }
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
            State::Unknown => "perhaps lost",
            State::Lost => "lost",
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
    ascii_where_hidden(&Value::Object(line).to_string())
}

/// The same JSON, with escapes for what a terminal would not show as it is. Outside of its strings all of
/// it is plain ASCII.
fn ascii_where_hidden(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if is_hidden(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        } else {
            text.push(c);
        }
    }
    text
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
        error_line(is_stdout_taken, error, run_id);
    } else {
        error_text(error);
    }
}

/// Whether a volume was to go to standard output: `-` stands somewhere after the image.
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

pub(super) fn error_text(error: &Error) {
    let (first, more) = error.lines();
    eprint_line(&format!("holdstill: {first}"));
    for line in more {
        eprint_line(&format!("    {line}"));
    }
    if let Some(hint) = error.get_hint() {
        eprint_line(&format!("  {}", Escaped(hint)));
    }
}

/// An error for programs; for people, where they cannot be told.
fn error_line(to_stderr: bool, error: &Error, run_id: &str) {
    if write_line(to_stderr, &error_json(error, run_id)).is_err() && !to_stderr {
        error_text(error);
    }
}

/// Whether it could be written is known when this returns: nothing stays in a buffer.
fn write_line(to_stderr: bool, text: &str) -> io::Result<()> {
    if to_stderr {
        writeln!(io::stderr().lock(), "{text}")
    } else {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{text}")?;
        stdout.flush()
    }
}

/// Whoever reads it may be gone; the exit code still tells.
fn eprint_line(text: &str) {
    let _ = write_line(true, text);
}

/// Prints all of something on standard output.
///
/// # Errors
/// If that is not possible.
pub(super) fn print(bytes: &[u8]) -> Result<()> {
    printed(io::stdout().lock().write_all(bytes))
}

/// Whether what was printed has also left us. A reader that has gone away wants no more of it: that is no
/// failure.
///
/// # Errors
/// What writing says.
pub(super) fn printed(written: io::Result<()>) -> Result<()> {
    match written.and_then(|()| io::stdout().lock().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::io("cannot print the result", error))
        }
        _ => Ok(()),
    }
}

/// What `--version --json` prints.
///
/// # Errors
/// If it cannot be printed.
pub(super) fn version_line(run_id: &str, fields: &Value) -> Result<()> {
    let line = json_line("result", run_id, fields.clone());
    printed(write_line(false, &line))
}
