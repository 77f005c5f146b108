//! A bound on how fast bytes move: a listener that takes its time when it is told of progress.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::progress::{Event, Progress, Stop};
use crate::units::ByteLen;

/// Longest sleep between two looks at whether the run was asked to end.
const NAP: Duration = Duration::from_millis(100);

/// Passes everything on to another listener, and lets through so many bytes a second, of all threads
/// together. What is on its way already is bounded by the pipeline's buffers.
#[allow(
    missing_debug_implementations,
    reason = "a listener need not be printable"
)]
pub struct Throttled<'a> {
    inner: &'a dyn Progress,
    rate: ByteLen,
    /// When what was let through so far will have been worth its time.
    due: Mutex<Instant>,
}

impl<'a> Throttled<'a> {
    /// For `rate` bytes a second; at least one.
    pub fn new(inner: &'a dyn Progress, rate: ByteLen) -> Self {
        Self {
            inner,
            rate: rate.max(ByteLen(1)),
            due: Mutex::new(Instant::now()),
        }
    }
}

impl Progress for Throttled<'_> {
    fn event(&self, event: &Event<'_>) {
        self.inner.event(event);
    }

    fn total(&self, bytes: ByteLen) {
        self.inner.total(bytes);
    }

    fn advance(&self, bytes: ByteLen) {
        self.inner.advance(bytes);
        let cost = Duration::from_secs_f64(bytes.0 as f64 / self.rate.0 as f64);
        let until = {
            let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
            *due = (*due).max(Instant::now()) + cost;
            *due
        };
        while self.stop().is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }

    fn stop(&self) -> Option<Stop> {
        self.inner.stop()
    }

    fn while_frozen(&self) {
        self.inner.while_frozen();
    }

    fn hush(&self, is_frozen: bool) {
        self.inner.hush(is_frozen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn bytes_take_their_time() {
        let throttled = Throttled::new(&Silent, ByteLen(1000));
        let begin = Instant::now();
        for _ in 0..3 {
            throttled.advance(ByteLen(100));
        }
        assert!(begin.elapsed() >= Duration::from_millis(300));
    }
}
