//! The question before something that exists is overwritten.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

use crate::error::{Error, Escaped, IoContext, Kind, Result};

/// Asks on the terminal, unless `yes` answers for all; without a terminal `--yes` is needed.
pub(super) fn confirmation(yes: bool) -> impl FnMut(&Path, &str) -> Result<()> {
    move |target, what| {
        if yes {
            return Ok(());
        }
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Err(Error::new(
                Kind::Confirm,
                "everything on the target would be overwritten",
            )
            .on(target)
            .hint("--yes says that this is wanted"));
        }
        eprint!(
            "Everything on {} will be overwritten with {}. Type `yes` to go on: ",
            Escaped(&target.display().to_string()),
            Escaped(what),
        );
        std::io::stderr()
            .flush()
            .context("cannot ask", "the terminal")?;
        let mut answer = String::new();
        stdin
            .lock()
            .read_line(&mut answer)
            .context("cannot ask", "the terminal")?;
        if answer.trim() != "yes" {
            return Err(
                Error::new(Kind::Declined, "nothing was changed: the answer was no").on(target),
            );
        }
        Ok(())
    }
}
