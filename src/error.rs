//! One error type for the whole library: what failed, on what, and what to do next.
//!
//! Rules:
//! - The [`Kind`] is small and stable: it decides the exit code and is what programs match on.
//! - The message says what failed in plain words; [`Error::on`] and [`Error::at`] add the device and
//!   the byte offset where they are known, once, as close to the failure as possible.
//! - A [`Error::hint`] says what the user can do next. It is shown on a second line.
//! - Text that came from a disk, an image or a path is escaped by [`Display`](fmt::Display).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::units::Offset;

/// `Result` with the library's error.
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure it was. Closed list: programs may match on [`Kind::name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Reading or writing failed, or a device vanished.
    Io,
    /// What was named does not exist.
    NotFound,
    /// The system does not allow it to this user.
    Permission,
    /// The output, or the room of a snapshot, ran out of space or hit a size limit.
    NoSpace,
    /// Whoever read our output went away.
    BrokenPipe,
    /// A hook or a child tool failed.
    Tool,
    /// Something else went wrong; the message says what.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// A question would have to be answered first (`--yes`, `--volume`).
    Confirm,
    /// The result would not be consistent.
    Inconsistent,
    /// The target or the source is in use by somebody.
    InUse,
    /// The target is too small.
    TooSmall,
    /// The copy could not be used on the target: other sectors, or another end.
    Unusable,
    /// A filesystem would become visible twice that must not.
    Twin,
    /// The output exists already.
    Exists,
    /// The named way to make the source hold still does not apply.
    NotApplicable,
    /// The answer to the question was no.
    Declined,
    /// It is not an image at all.
    NotAnImage,
    /// The image is damaged.
    Damaged,
    /// The image ends before its trailer.
    Truncated,
    /// The image needs something this version does not have.
    Incompatible,
    /// The image is whole but not the expected one.
    UnexpectedImage,
    /// A comparison found a difference.
    Mismatch,
    /// Interrupted by SIGINT.
    Interrupted,
    /// Asked to end by SIGTERM or SIGHUP.
    Terminated,
}

impl Kind {
    /// The exit code that stands for this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Io
            | Self::NotFound
            | Self::Permission
            | Self::NoSpace
            | Self::BrokenPipe
            | Self::Tool
            | Self::Failed => 1,
            Self::Usage | Self::Confirm => 2,
            Self::Inconsistent
            | Self::InUse
            | Self::TooSmall
            | Self::Unusable
            | Self::Twin
            | Self::Exists
            | Self::NotApplicable
            | Self::Declined => 3,
            Self::NotAnImage
            | Self::Damaged
            | Self::Truncated
            | Self::Incompatible
            | Self::UnexpectedImage
            | Self::Mismatch => 4,
            Self::Interrupted => 130,
            Self::Terminated => 143,
        }
    }

    /// The stable name of this kind in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::NotFound => "not_found",
            Self::Permission => "permission",
            Self::NoSpace => "no_space",
            Self::BrokenPipe => "broken_pipe",
            Self::Tool => "tool",
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::Confirm => "confirm",
            Self::Inconsistent => "inconsistent",
            Self::InUse => "in_use",
            Self::TooSmall => "too_small",
            Self::Unusable => "unusable",
            Self::Twin => "twin",
            Self::Exists => "exists",
            Self::NotApplicable => "not_applicable",
            Self::Declined => "declined",
            Self::NotAnImage => "not_an_image",
            Self::Damaged => "damaged",
            Self::Truncated => "truncated",
            Self::Incompatible => "incompatible",
            Self::UnexpectedImage => "unexpected_image",
            Self::Mismatch => "mismatch",
            Self::Interrupted => "interrupted",
            Self::Terminated => "terminated",
        }
    }
}

/// What failed, on what, why, and what to do next.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<Offset>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    hint: Option<String>,
    is_undone: bool,
}

impl Error {
    /// An error of `kind`; `message` says what failed, without the path.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            offset: None,
            source: None,
            hint: None,
            is_undone: false,
        }))
    }

    /// A failed system call: the kind follows from the operating system's own.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => Kind::NotFound,
            io::ErrorKind::PermissionDenied => Kind::Permission,
            io::ErrorKind::BrokenPipe => Kind::BrokenPipe,
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Kind::NoSpace,
            // No fault of a disk: a block that was not read for it must not count as unreadable.
            io::ErrorKind::OutOfMemory => Kind::Failed,
            _ => Kind::Io,
        };
        Self::new(kind, message).because(source)
    }

    /// Names the device or file, unless one is named already.
    #[must_use]
    pub fn on(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Says where, unless that is known already.
    #[must_use]
    pub fn at(mut self, offset: Offset) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Says what to do next, unless that is said already.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Keeps the failure underneath.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// A snapshot could not be made, and nothing is left of it: another step may do.
    #[must_use]
    pub fn undone(mut self) -> Self {
        self.0.is_undone = true;
        self
    }

    /// Whether another step may do: see [`undone`](Self::undone).
    pub fn is_undone(&self) -> bool {
        self.0.is_undone
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What failed, without place and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Where it failed, in bytes, if that is known.
    pub fn offset(&self) -> Option<Offset> {
        self.0.offset
    }

    /// What to do next, if anything is known.
    pub fn get_hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl Error {
    /// What failed, where, and the first line of the cause; the further lines of the cause, such as a tool
    /// has printed. What is hidden is escaped.
    pub fn lines(&self) -> (String, Vec<String>) {
        let inner = &*self.0;
        let mut text = Escaped(&inner.message).to_string();
        if let Some(path) = &inner.path {
            text = format!("{text}: {}", Escaped(&path.to_string_lossy()));
        }
        if let Some(offset) = inner.offset {
            text = format!("{text}, at byte {offset}");
        }
        let cause = inner.source.as_ref().map(ToString::to_string);
        let mut lines = cause.iter().flat_map(|cause| cause.lines());
        if let Some(first) = lines.next() {
            text = format!("{text}: {}", Escaped(first));
        }
        (text, lines.map(|line| Escaped(line).to_string()).collect())
    }
}

/// One line, `what: where: cause`, without the hint; control characters are escaped.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, more) = self.lines();
        f.write_str(&first)?;
        match more.is_empty() {
            true => Ok(()),
            false => write!(f, ": {}", more.join("; ")),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.0.source.as_deref()?;
        Some(source)
    }
}

/// Adds context to a system call's error on the spot.
pub trait IoContext<T> {
    /// Turns the failure into an [`Error`] that says what was tried and on what.
    ///
    /// # Errors
    /// The one it was given, with its context.
    fn context(self, message: &str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, message: &str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::io(message, source).on(path))
    }
}

/// Whether a terminal would not show a character as it is: control characters, line and paragraph
/// separators, and those of Unicode's category Cf, which are invisible or change how others are shown
/// (zero-width and bidirectional ones, tags).
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
            | '\u{890}'..='\u{891}' | '\u{8e2}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e007f}')
}

/// Text from a disk, an image or a path, safe to show on a terminal: what is [hidden](is_hidden) there
/// appears as escapes.
#[derive(Debug)]
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            if is_hidden(c) {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_what_where_why_on_one_line() {
        let error = Error::io("cannot read", io::Error::from_raw_os_error(5))
            .on("/dev/a\nb")
            .at(Offset(512))
            .hint("check the cable");
        assert_eq!(
            error.to_string(),
            "cannot read: /dev/a\\nb, at byte 512: Input/output error (os error 5)"
        );
        let tool =
            Error::new(Kind::Tool, "no snapshot").because("exit code 5\nno room\n\u{1b}see --help");
        let (first, more) = tool.lines();
        assert_eq!(first, "no snapshot: exit code 5");
        assert_eq!(more, ["no room", "\\u{1b}see --help"]);
        assert_eq!(tool.to_string(), format!("{first}: {}", more.join("; ")));
        assert_eq!(error.get_hint(), Some("check the cable"));
        assert_eq!(error.kind().exit_code(), 1);
    }

    #[test]
    fn the_innermost_place_wins() {
        let error = Error::new(Kind::Damaged, "bad checksum")
            .on("inner")
            .on("outer");
        assert_eq!(error.to_string(), "bad checksum: inner");
    }
}
