//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::moment::Moment;

/// Looks into a journal, checks it, and gets disks out of it, from the datastore's files alone. Only reads, and works beside a
/// VRA that uses the journal.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the VMs that have a journal in a datastore
    Ls {
        /// The datastore's folder
        datastore: PathBuf,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Say what a journal is: identity, state, history, segments, disks
    Inspect {
        /// The journal's file, its VM's folder, or a datastore with one VM
        journal: PathBuf,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// List the checkpoints that can be opened, oldest first
    Checkpoints {
        /// The journal's file, its VM's folder, or a datastore with one VM
        journal: PathBuf,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Check every header, record and payload; exit code 1 if anything is damaged
    Verify {
        /// The journal's file, its VM's folder, or a datastore with one VM
        journal: PathBuf,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write a disk as it was into a sparse image file
    Extract(Extract),
    /// Serve disks as they were over NBD, until interrupted
    Serve(Serve),
}

/// Arguments of `extract`.
#[derive(Debug, clap::Args)]
pub(super) struct Extract {
    /// The journal's file, its VM's folder, or a datastore with one VM
    pub(super) journal: PathBuf,
    /// `latest`, a tag, a sequence number, or a time (2026-11-22T17:30:00Z, or local 2026-11-22T17:30); tag:X, seq:N and time:T
    /// say which is meant
    #[arg(long)]
    pub(super) at: Moment,
    /// The disk's number in the VM
    #[arg(long, default_value_t = 0)]
    pub(super) disk: u16,
    /// The image; it gets its name when it is complete
    #[arg(long)]
    pub(super) out: PathBuf,
    /// Replace the image if it exists
    #[arg(long)]
    pub(super) force: bool,
    /// No progress bar
    #[arg(long)]
    pub(super) quiet: bool,
}

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    /// The journal's file, its VM's folder, or a datastore with one VM
    pub(super) journal: PathBuf,
    /// As for extract
    #[arg(long)]
    pub(super) at: Moment,
    /// Only this disk; by default all, as exports disk-0, disk-1, ...
    #[arg(long)]
    pub(super) disk: Option<u16>,
    /// The unix socket to serve at, made with mode 0600
    #[arg(long)]
    pub(super) socket: PathBuf,
    /// Let clients write; what they write goes to a file in this folder, and is gone at the end
    #[arg(long, value_name = "FOLDER")]
    pub(super) scratch: Option<PathBuf>,
    /// Space reserved for what is written to each disk, in GiB
    #[arg(long, default_value_t = 4, requires = "scratch", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(super) scratch_gib: u64,
}
