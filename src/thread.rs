//! Threads, which a machine may refuse to give.

use std::thread::{Builder, Scope, ScopedJoinHandle};

use crate::error::{Error, Result};

/// Starts a thread in `scope`. Whoever fails here has to let the threads end that were started before: the
/// scope waits for them.
///
/// # Errors
/// If there is none to be had.
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    Builder::new()
        .spawn_scoped(scope, work)
        .map_err(|error| Error::io("cannot start a thread", error).hint(FEWER))
}

/// What can be done where memory or threads are short.
pub(crate) const FEWER: &str = "--threads and --memory bound what a run takes of the machine";
