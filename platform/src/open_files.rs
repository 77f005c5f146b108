//! How many files this process may have open at once (getrlimit(2), RLIMIT_NOFILE).

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::error::{Context, Result};

/// Raises the limit as far as it goes without asking anybody, for whoever keeps thousands of files
/// open; how many that are.
///
/// # Errors
/// What the kernel says.
pub fn raise_limit() -> Result<u64> {
    let what = "the limit of open files";
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read", what)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise", what)?;
    }
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let limit = raise_limit().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (limit, limit));
        assert_eq!(raise_limit().unwrap(), limit);
    }
}
