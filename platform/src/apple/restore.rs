//! asr(8): copies a snapshot of a volume into a container of its own.
//!
//! What it is told is what its manual says of snapshots: `--toSnapshot` names one of the source, by name or
//! UUID, while the volume is in use; replication is the only way that can; the target is a partition, which is
//! erased (`--erase`, without which it copies nothing at all), and gets a new container with the
//! volume in it. Of a volume that belongs to a group (system and data), the whole group is copied. The
//! copy of the volume has the snapshot, too, under the same UUID: that proves what it is a copy of. What
//! asr verifies by itself is not left out (`--noverify`): its manual calls that dangerous.

use std::time::Duration;

use super::{System, checked_id, checked_uuid};
use crate::error::{Error, Result};

/// How often it is looked whether the run shall end.
const LOOK: Duration = Duration::from_millis(100);

/// How much of what it said last is kept, to tell why it failed, in bytes.
const KEPT: usize = 4096;

impl System {
    /// Copies the snapshot with this UUID of a volume to a partition, whose content is lost. `is_over` is asked
    /// all the time; `false` if it ended this. Should this process die, the tool dies when it next
    /// tells how far it is (`--puppetstrings`).
    ///
    /// # Errors
    /// If the tool is missing, or fails.
    pub fn restore(
        &self,
        volume: &str,
        uuid: &str,
        to: &str,
        is_over: &dyn Fn() -> bool,
    ) -> Result<bool> {
        let (source, target) = (self.node(checked_id(volume)?)?, self.node(to)?);
        let tool = self.tool("asr")?.arg("restore");
        let tool = tool.arg("--source").arg(source);
        let tool = tool.arg("--target").arg(target);
        let tool = tool.args(["--toSnapshot", checked_uuid(uuid)?]);
        let tool = tool.args([
            "--useReplication",
            "--erase",
            "--noprompt",
            "--puppetstrings",
        ]);
        let (running, mut said) = tool.write_stream()?;
        let mut last = Vec::new();
        loop {
            // Also while it talks without a pause.
            if is_over() {
                return Ok(false);
            }
            let mut some = [0; 1024];
            let read = said
                .read_within(&mut some, LOOK)
                .map_err(|error| Error::new("cannot watch", "asr", error))?;
            match read {
                Some(0) => break,
                Some(len) => {
                    last.extend_from_slice(some.get(..len).unwrap_or_default());
                    last.drain(..last.len().saturating_sub(KEPT));
                }
                None => {}
            }
        }
        running.finish().map_err(|error| why(error, &last))?;
        Ok(true)
    }
}

/// What went wrong it says on standard output, too.
fn why(error: Error, last: &[u8]) -> Error {
    let last = String::from_utf8_lossy(last);
    match last.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => Error::other(
            "failed",
            "asr",
            format!("{}; it said last: {}", error.source, line.trim()),
        ),
        None => error,
    }
}
