//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::moment::Moment;

/// Looks into a journal, checks it, and gets disks out of it, from the datastore's files alone. Only reads, and works beside a
/// VRA that uses the journal.
#[derive(Debug, Parser)]
#[command(name = "vra-journal", version, max_term_width = 100)]
pub(super) struct Args {
    /// The site's keys, for journals that are encrypted: a copy of the file that `zvm site-key list` names
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) key_file: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the VPGs and VMs that have journals in datastores, with their disks and checkpoints
    Ls {
        /// The datastores' folders
        #[arg(required = true, value_name = "DATASTORE")]
        datastores: Vec<PathBuf>,
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
        /// The journal's file, its VM's folder, or a datastore with one VM; with --vpg one datastore or several
        #[arg(required = true, value_name = "JOURNAL")]
        paths: Vec<PathBuf>,
        /// Those that the journals of all VMs of this VPG hold: its name or id
        #[arg(long, value_name = "VPG")]
        vpg: Option<String>,
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
    /// Print what the journal's file holds, as JSON, one object a line; exit code 1 if anything is damaged
    Dump {
        /// The journal's file, its VM's folder, or a datastore with one VM
        journal: PathBuf,
        /// Every record, too
        #[arg(long)]
        records: bool,
    },
    /// Write a disk, a VM's or a VPG's disks, as they were into sparse image files
    Extract(Extract),
    /// Serve disks as they were over NBD, until interrupted
    Serve(Serve),
    /// Write a shell's completion script to standard output
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Arguments of `extract`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["out", "out_dir"]))]
pub(super) struct Extract {
    /// The journal's file, its VM's folder, or a datastore with one VM; with --vpg or --vm one datastore or several
    #[arg(required = true, value_name = "JOURNAL")]
    pub(super) journals: Vec<PathBuf>,
    /// `latest`, a tag, a checkpoint's id, a sequence number, or a time (2026-11-22T17:30:00Z, or local 2026-11-22T17:30); tag:X,
    /// id:X, seq:N and time:T say which is meant
    #[arg(long)]
    pub(super) at: Moment,
    /// All disks of all VMs of this VPG, by name or id, at a checkpoint that all of them hold
    #[arg(long, value_name = "NAME|ID", requires = "out_dir", conflicts_with = "vm")]
    pub(super) vpg: Option<String>,
    /// Only this VM, by name or id
    #[arg(long, value_name = "NAME|ID")]
    pub(super) vm: Option<String>,
    /// The disk's number in the VM, by default 0
    #[arg(long, conflicts_with = "out_dir")]
    pub(super) disk: Option<u16>,
    /// The image of one disk; it gets its name when it is complete
    #[arg(long)]
    pub(super) out: Option<PathBuf>,
    /// A folder for images of all disks, VM-disk-N.raw or .qcow2; it is made if need be
    #[arg(long, value_name = "FOLDER")]
    pub(super) out_dir: Option<PathBuf>,
    /// What the images are; qcow2 is written by qemu-img
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub(super) format: Format,
    /// Replace images that exist
    #[arg(long)]
    pub(super) force: bool,
    /// Go on over what is damaged: there the image has zeroes, and IMAGE.damaged.json lists the places; exit code 1. Raw images only
    #[arg(long)]
    pub(super) skip_damaged: bool,
    /// Go on though it is not known which parts of the recovery disks are lost: they may read wrong
    #[arg(long)]
    pub(super) without_bad_list: bool,
    /// Begin even if the space seems too little
    #[arg(long)]
    pub(super) no_space_check: bool,
    /// No progress
    #[arg(long)]
    pub(super) quiet: bool,
}

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// The disk's bytes, with holes
    Raw,
    /// QEMU's, version 3
    Qcow2,
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
    /// Go on though it is not known which parts of the recovery disks are lost: they may read wrong
    #[arg(long)]
    pub(super) without_bad_list: bool,
    /// Let clients write; what they write goes to a file in this folder, and is gone at the end
    #[arg(long, value_name = "FOLDER")]
    pub(super) scratch: Option<PathBuf>,
    /// Space reserved for what is written to each disk, in GiB
    #[arg(long, default_value_t = 4, requires = "scratch", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(super) scratch_gib: u64,
}
