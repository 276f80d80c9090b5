//! The `vra-journal` command: everything that can be done with a journal when there is nothing but the datastore's files.
//! It only reads, takes no lock, and works beside a VRA that uses the journal.

mod args;
mod checkpoints;
mod contents;
mod convert;
mod copy;
mod disk;
mod dump;
mod export;
mod extract;
mod group;
mod image;
mod inspect;
mod list;
mod moment;
mod place;
mod progress;
mod serve;
mod signals;
mod text;
mod verify;
mod walk;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use self::args::{Args, Command};
use crate::report::chain;

/// Exit code when `verify` or `dump` found damage.
const EXIT_DAMAGED: u8 = 1;
/// Exit code when a command failed.
const EXIT_FAILED: u8 = 2;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match run(&args, &mut std::io::stdout().lock()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Ls { datastores, json } => list::run(datastores, *json, out)?,
        Command::Inspect { journal, json } => inspect::run(journal, *json, out)?,
        Command::Checkpoints { journal, json } => checkpoints::run(journal, *json, out)?,
        Command::Verify { journal, json } => {
            if verify::run(journal, *json, out)? {
                return Ok(ExitCode::from(EXIT_DAMAGED));
            }
        }
        Command::Dump { journal, records } => {
            if dump::run(journal, *records, out)? {
                return Ok(ExitCode::from(EXIT_DAMAGED));
            }
        }
        Command::Extract(extract) => extract::run(extract, out)?,
        Command::Serve(serve) => serve::run(serve, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod dump_tests;
#[cfg(test)]
mod group_tests;
#[cfg(test)]
mod moved_tests;
#[cfg(test)]
mod tests;
