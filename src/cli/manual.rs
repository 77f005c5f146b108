//! Shell completions and man pages, made from the command line's own description.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use super::args::Cli;
use super::console;
use crate::error::{Error, IoContext, Result};

/// Prints completions.
///
/// # Errors
/// If they cannot be printed.
pub(super) fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "holdstill", &mut script);
    console::print(&script)
}

/// Prints the man page of the program, or writes it and one for each verb to a folder.
pub(super) fn man(folder: Option<&Path>) -> Result<()> {
    let command = Cli::command();
    match folder {
        None => {
            let mut page = Vec::new();
            let rendered = clap_mangen::Man::new(command).render(&mut page);
            rendered.map_err(|error| Error::io("cannot make the man page", error))?;
            console::print(&page)
        }
        Some(folder) => {
            std::fs::create_dir_all(folder).context("cannot create", folder)?;
            clap_mangen::generate_to(command, folder).context("cannot write the man pages", folder)
        }
    }
}
