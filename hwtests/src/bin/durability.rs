//! `durability`: what cases of durability run inside of machines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hwtests::durability::target::TargetProgram;
use hwtests::durability::{RunOnDisk, run_on_disk, serve_without_sync};
use hwtests::site::Binaries;

#[derive(Debug, Parser)]
#[command(about = "Loads for tests of durability")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ship a load to a target, and note each acknowledged number on the disk that the target's datastore is on
    RunOnDisk {
        /// The disk
        #[arg(long)]
        device: PathBuf,
        /// The place for acknowledged numbers, outside of the disk's filesystem, in bytes
        #[arg(long, value_name = "BYTES")]
        acks_offset: u64,
        /// A folder on the disk's filesystem
        #[arg(long)]
        datastore: PathBuf,
        /// A folder for everything else
        #[arg(long)]
        scratch: PathBuf,
        /// What the load depends on
        #[arg(long)]
        seed: u64,
        /// How many records to ship at least
        #[arg(long)]
        records: u64,
        /// The target skips the fdatasync before an acknowledgement
        #[arg(long)]
        without_sync: bool,
    },
    /// The daemon of `vra serve`, but without the fdatasync before an acknowledgement
    ServeWithoutSync {
        /// Its configuration
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("durability: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::ServeWithoutSync { config } => serve_without_sync(&config),
        Command::RunOnDisk { device, acks_offset, datastore, scratch, seed, records, without_sync } => {
            let program = if without_sync {
                TargetProgram::WithoutSync(std::env::current_exe()?)
            } else {
                TargetProgram::Product(Binaries::beside_this_one()?.path("vra"))
            };
            let acks_offset_bytes = acks_offset;
            run_on_disk(&RunOnDisk { device, acks_offset_bytes, datastore, scratch, program, seed, records })
        }
    }
}
