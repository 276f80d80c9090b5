//! The `vra-journal` command: everything that can be done with a journal when there is nothing but the datastore's files.
//! It only reads, takes no lock, and works beside a VRA that uses the journal.

/// Writes a line to standard error. If nobody reads it there is nobody to tell.
macro_rules! told {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($words)*);
    }};
}

mod args;
mod checkpoints;
mod contents;
mod convert;
mod copy;
mod damage;
mod disk;
mod dump;
mod export;
mod extract;
mod group;
mod image;
mod inspect;
mod list;
mod locked;
mod moment;
mod overlays;
mod place;
mod progress;
mod serve;
mod signals;
mod storage;
mod text;
mod verify;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use self::args::{Args, Command};
use crate::config::read_site_keys;
use crate::report::{chain, write_completion};

/// Exit code when `verify` or `dump` found damage, or `extract` went on over it.
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
            told!("error: {}", chain(error.as_ref()));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let keys = args.key_file.as_deref().map(read_site_keys).transpose()?.unwrap_or_default();
    match &args.command {
        Command::Ls { datastores, json } => list::run(datastores, &keys, *json, out)?,
        Command::Inspect { journal, json } => inspect::run(journal, &keys, *json, out)?,
        Command::Checkpoints { paths, vpg, json } => {
            checkpoints::run(paths, vpg.as_deref(), &keys, *json, out)?;
        }
        Command::Verify { journal, json } => {
            if verify::run(journal, &keys, *json, out)? {
                return Ok(ExitCode::from(EXIT_DAMAGED));
            }
        }
        Command::Dump { journal, records } => {
            if dump::run(journal, &keys, *records, out)? {
                return Ok(ExitCode::from(EXIT_DAMAGED));
            }
        }
        Command::Extract(extract) => {
            if extract::run(extract, &keys, out)? {
                return Ok(ExitCode::from(EXIT_DAMAGED));
            }
        }
        Command::Serve(serve) => serve::run(serve, &keys, out)?,
        Command::Completion { shell } => write_completion(*shell, Args::command(), out)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod broken_tests;
#[cfg(test)]
mod dump_tests;
#[cfg(test)]
mod encrypted_tests;
#[cfg(test)]
mod group_tests;
#[cfg(test)]
mod moved_tests;
#[cfg(test)]
mod promoted_tests;
#[cfg(test)]
mod tests;
