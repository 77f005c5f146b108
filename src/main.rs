//! The command `holdstill`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    holdstill::cli::run(std::env::args_os().collect())
}
