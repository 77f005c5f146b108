//! Shell completions and man pages, made from the command line's own description.

use std::io::Write;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use super::args::Cli;
use crate::error::{Error, IoContext, Result};

/// Prints completions.
pub(super) fn completions(shell: Shell) {
    clap_complete::generate(
        shell,
        &mut Cli::command(),
        "holdstill",
        &mut std::io::stdout(),
    );
}

/// Prints the man page of the program, or writes it and one for each verb to a folder.
pub(super) fn man(folder: Option<&Path>) -> Result<()> {
    let command = Cli::command();
    match folder {
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command)
                .render(&mut page)
                .and_then(|()| std::io::stdout().write_all(&page))
                .map_err(|error| Error::io("cannot print the man page", error))
        }
        Some(folder) => {
            std::fs::create_dir_all(folder).context("cannot create", folder)?;
            clap_mangen::generate_to(command, folder).context("cannot write the man pages", folder)
        }
    }
}
