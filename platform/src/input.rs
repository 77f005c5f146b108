//! Waiting for input that may never come, without being deaf to a request to stop.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits until `fd` can be read (its end counts) or `patience` is over. Returns whether it can.
///
/// # Errors
/// What `poll(2)` says.
pub fn wait_readable(fd: &impl AsFd, patience: Duration) -> std::io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(count) => Ok(count > 0),
        // A signal: the caller looks whether it asks to stop.
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn data_and_the_end_are_readable_and_silence_is_not() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let shortly = Duration::from_millis(1);
        assert!(!wait_readable(&reader, shortly).unwrap());
        writer.write_all(b"x").unwrap();
        assert!(wait_readable(&reader, shortly).unwrap());
        drop(writer);
        assert!(wait_readable(&reader, shortly).unwrap());
    }
}
