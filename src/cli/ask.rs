//! The question before something that exists is overwritten.

use std::io::{BufRead, IsTerminal, Write};

use crate::destination::overwritten::{Overwritten, Question};
use crate::error::{Error, Escaped, IoContext, Kind, Result};

/// Asks on the terminal, unless `yes` answers for all; without a terminal `--yes` is needed.
pub(super) fn confirmation(yes: bool) -> impl FnMut(&Question<'_>) -> Result<()> {
    move |question| {
        if yes {
            return Ok(());
        }
        let target = question.target;
        let now = Overwritten::of(target);
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Err(Error::new(
                Kind::Confirm,
                format!("everything on the target would be overwritten ({now})"),
            )
            .on(target)
            .hint("--yes says that this is wanted"));
        }
        let name = target.display().to_string();
        let name = Escaped(&name);
        eprint!(
            "{name} now: {now}\n\
             Everything on {name} will be overwritten with {}. Type `yes` to go on: ",
            Escaped(question.with),
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
