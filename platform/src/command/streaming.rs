//! A tool at the other end of a pipe: it writes a stream that we read, or reads one that we write.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdin, Stdio};

use super::{Output, Running, Tool, ending};
use crate::error::{Context, Error, Result};
use crate::os;
use crate::stream::Reader;

/// The most that is looked at of what a tool says on standard error, in bytes.
const MOST_SAID: u64 = 64 << 10;

/// A running tool. Dropped before its end, it is killed.
#[derive(Debug)]
pub struct Streaming {
    running: Running,
    program: PathBuf,
    /// Its standard error: a file in memory, so that it never waits for us to read.
    said: File,
}

/// A file without a name for what somebody prints who is not to wait for us to read it.
///
/// # Errors
/// If there is no room for it.
pub fn unnamed_file() -> Result<File> {
    os::streaming::file_in_memory().context("cannot make", "a file in memory")
}

/// What was written to such a file, its first 64 KiB.
///
/// # Errors
/// If it cannot be read.
pub fn said_in(file: &File) -> Result<Vec<u8>> {
    let mut said = Vec::new();
    let mut file = file;
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.take(MOST_SAID).read_to_end(&mut said))
        .context("cannot read", "a file in memory")?;
    Ok(said)
}

impl Tool {
    /// Starts a tool that writes a stream to its standard output. It has no deadline.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn write_stream(mut self) -> Result<(Streaming, Reader)> {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut streaming = self.start()?;
        let stdout = streaming.running.0.stdout.take().map(OwnedFd::from);
        let stdout =
            stdout.ok_or_else(|| Error::other("cannot run", &streaming.program, "no pipe"))?;
        Ok((streaming, Reader::of(File::from(stdout))))
    }

    /// Starts a tool that reads a stream from its standard input. It has no deadline.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn read_stream(mut self) -> Result<(Streaming, ChildStdin)> {
        self.command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut streaming = self.start()?;
        let stdin = streaming.running.0.stdin.take();
        let stdin =
            stdin.ok_or_else(|| Error::other("cannot run", &streaming.program, "no pipe"))?;
        Ok((streaming, stdin))
    }

    fn start(mut self) -> Result<Streaming> {
        let said = os::streaming::file_in_memory().context("cannot run", &self.program)?;
        let theirs = said.try_clone().context("cannot run", &self.program)?;
        self.command.stderr(Stdio::from(theirs)).process_group(0);
        let child = self.command.spawn().context("cannot run", &self.program)?;
        Ok(Streaming {
            running: Running(child),
            program: self.program,
            said,
        })
    }
}

impl Streaming {
    /// Waits for its end: our end of its pipe must be closed, or read to the end.
    ///
    /// # Errors
    /// If it failed: how it ended, and what it said.
    pub fn finish(mut self) -> Result<()> {
        let status = self
            .running
            .0
            .wait()
            .context("cannot watch", &self.program)?;
        let stderr = said_in(&self.said)?;
        let output = Output {
            program: self.program.clone(),
            ending: ending(status),
            stdout: Vec::new(),
            stderr,
            truncated: false,
        };
        output.checked().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    #[test]
    fn streams_go_both_ways() {
        let (tool, mut reader) = Tool::shell("printf abc; echo no >&2")
            .write_stream()
            .unwrap();
        let mut bytes = Vec::new();
        loop {
            let mut some = [0; 2];
            match reader
                .read_within(&mut some, Duration::from_secs(60))
                .unwrap()
            {
                Some(0) => break,
                Some(count) => bytes.extend_from_slice(&some[..count]),
                None => {}
            }
        }
        assert_eq!(bytes, b"abc");
        tool.finish().unwrap();

        let script = "test \"$(cat)\" = xyz || { echo not what it should be >&2; exit 3; }";
        let (tool, mut stdin) = Tool::shell(script).read_stream().unwrap();
        stdin.write_all(b"xyz").unwrap();
        drop(stdin);
        tool.finish().unwrap();
        let (tool, stdin) = Tool::shell(script).read_stream().unwrap();
        drop(stdin);
        let error = tool.finish().unwrap_err().to_string();
        assert!(
            error.contains("exit code 3\nnot what it should be"),
            "{error}"
        );
        // Killed, not waited for.
        drop(Tool::shell("sleep 1000").write_stream().unwrap());
    }
}
