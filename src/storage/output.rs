//! Packs an image's small pieces into large aligned writes, and lets aligned payloads pass untouched.

use std::time::Duration;

use holdstill_platform::buffer::{ALIGN, Buffer};
use holdstill_platform::output::Output;

use crate::error::Result;
use crate::image::writer::Sink;
use crate::progress::Progress;
use crate::read_at::ReadAt;

/// Length of a packed write in bytes.
const PACK: usize = 1 << 20;

/// Pieces at least this long are worth a write of their own, in bytes.
const WORTH_A_WRITE: usize = 64 << 10;

/// How long room in a stream is waited for before we look whether the run was asked to stop.
const PATIENCE: Duration = Duration::from_millis(100);

/// An [`Output`] as the image writer's sink.
#[allow(
    missing_debug_implementations,
    reason = "a listener need not be printable"
)]
pub struct OutputSink<'a> {
    output: Output,
    progress: &'a dyn Progress,
    pack: Buffer,
    filled: usize,
}

impl<'a> OutputSink<'a> {
    /// Packs into `output`, to which nothing was written yet. Waiting for a stream ends when
    /// `progress` is asked to stop.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(output: Output, progress: &'a dyn Progress) -> Result<Self> {
        Ok(Self {
            output,
            progress,
            pack: Buffer::try_new(PACK)?,
            filled: 0,
        })
    }

    /// Writes what is packed.
    ///
    /// # Errors
    /// The output's.
    pub fn flush(&mut self) -> Result<()> {
        let filled = std::mem::take(&mut self.filled);
        append_all(&mut self.output, &self.pack[..filled], self.progress)
    }

    /// The output, with everything written to it.
    ///
    /// # Errors
    /// The output's.
    pub fn into_output(mut self) -> Result<Output> {
        self.flush()?;
        Ok(self.output)
    }

    /// The output itself; what is packed has not reached it yet.
    pub fn output(&self) -> &Output {
        &self.output
    }
}

fn append_all(output: &mut Output, bytes: &[u8], progress: &dyn Progress) -> Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match output.append_within(rest, PATIENCE)? {
            0 => progress.check()?,
            count => rest = &rest[count..],
        }
    }
    Ok(())
}

impl Sink for OutputSink<'_> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        // Everything before was packed from an aligned position, so the fill tells the alignment.
        let is_aligned =
            self.filled.is_multiple_of(ALIGN) && (rest.as_ptr() as usize).is_multiple_of(ALIGN);
        if is_aligned && rest.len() >= WORTH_A_WRITE {
            self.flush()?;
            let (front, behind) = rest.split_at(rest.len() - rest.len() % ALIGN);
            append_all(&mut self.output, front, self.progress)?;
            rest = behind;
        }
        while !rest.is_empty() {
            let piece = rest.len().min(PACK - self.filled);
            self.pack[self.filled..self.filled + piece].copy_from_slice(&rest[..piece]);
            self.filled += piece;
            rest = &rest[piece..];
            if self.filled == PACK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn written(&mut self) -> Result<Option<&dyn ReadAt>> {
        if self.output.is_stream() {
            return Ok(None);
        }
        self.flush()?;
        Ok(Some(&self.output))
    }
}
