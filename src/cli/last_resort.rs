//! What must never happen is an error like any other, on one line: a panic unwinds, which thaws and removes
//! what there is to, and ends with exit code 1.

use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Mutex;

use holdstill_platform::signals;

use crate::error::{Error, Kind, Result};

/// The first panic of any thread. Those after it follow from it.
static FIRST: Mutex<Option<String>> = Mutex::new(None);

/// Does `work`; a panic in it, or in a thread that it waits for, is an error.
///
/// # Errors
/// That one, or what `work` says.
pub(super) fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    signals::end_on_abort();
    std::panic::set_hook(Box::new(remember));
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let first = FIRST.try_lock().ok().and_then(|mut first| first.take());
        let what = first.unwrap_or_else(|| "a thread died".to_owned());
        Err(Error::new(Kind::Failed, format!("internal error: {what}"))
            .hint("memory may be short, see --threads and --memory; else please report it"))
    })
}

fn remember(panic: &PanicHookInfo<'_>) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let what = text.unwrap_or("something unknown");
    let place = panic.location().map(|place| format!(" ({place})"));
    if let Ok(mut first) = FIRST.try_lock() {
        first.get_or_insert_with(|| format!("{what}{}", place.unwrap_or_default()));
    }
}
