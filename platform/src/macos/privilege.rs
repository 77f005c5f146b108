//! This system has no capabilities.

pub(crate) fn missing() -> Vec<&'static str> {
    Vec::new()
}
