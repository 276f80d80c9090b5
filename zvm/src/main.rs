//! The `zvm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    zvm::cli::run()
}
