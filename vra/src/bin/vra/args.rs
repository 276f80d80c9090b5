//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vra::api::door::NbdListen;
use vra::api::{CheckpointId, DoorRequest, PointInTime, TimeUs, ViewId, VmId, VolumeId};

/// Holdfast's daemon on a host, and the command that talks to it.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 120)]
pub(crate) struct Cli {
    /// Configuration file [default: /etc/holdfast/vra.toml, or built-in defaults]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Control socket of the running VRA [default: vra.sock in the configured run_dir]
    #[arg(long, global = true, value_name = "SOCKET")]
    pub socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon in the foreground
    Serve,
    /// Serve a local disk as a protected volume
    Attach(AttachArgs),
    /// Stop serving a volume and forget it
    Detach {
        /// The volume's id, or its number as VM:NUMBER
        volume: String,
        /// Also when a VPG protects it
        #[arg(long)]
        force: bool,
    },
    /// List the attached volumes
    List,
    /// Show the whole VRA
    Status,
    /// Show what this host offers and lacks, with remedies
    Doctor,
    /// Get a certificate from the ZVM with a one-time token
    Enroll {
        /// The ZVM's host and UDP port
        #[arg(long, value_name = "HOST:PORT")]
        zvm: String,
        /// File that holds the token, - for standard input
        #[arg(long, value_name = "FILE")]
        token_file: PathBuf,
    },
    /// List or tag checkpoints
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Open, close or list disks as they were
    #[command(subcommand)]
    View(ViewCommand),
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Raw file or block device
    pub path: PathBuf,
    /// Name of the VM that it belongs to
    #[arg(long, value_name = "NAME")]
    pub vm_name: String,
    /// The VM's UUID [default: that of the VM with this name if it has a volume here, else a new one]
    #[arg(long, value_name = "UUID")]
    pub vm: Option<VmId>,
    /// The volume's UUID [default: a new one]
    #[arg(long, value_name = "UUID")]
    pub volume: Option<VolumeId>,
    /// The volume's number in its VM [default: the lowest free one]
    #[arg(long, value_name = "N")]
    pub number: Option<u16>,
    #[command(flatten)]
    pub door: DoorArgs,
    /// Take a disk whose first bytes look like an image format as raw
    #[arg(long)]
    pub force_raw: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoorArgs {
    /// How the disk is offered
    #[arg(long, value_enum, default_value_t = DoorKind::Ublk)]
    pub door: DoorKind,
    /// NBD: unix socket [default: one in the VRA's run_dir]
    #[arg(long, value_name = "SOCKET", conflicts_with = "nbd_tcp")]
    pub nbd_socket: Option<PathBuf>,
    /// NBD: loopback address and port
    #[arg(long, value_name = "ADDR:PORT")]
    pub nbd_tcp: Option<SocketAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DoorKind {
    /// A block device /dev/ublkbN
    Ublk,
    /// An NBD export
    Nbd,
}

impl DoorArgs {
    pub(crate) fn request(&self) -> DoorRequest {
        match self.door {
            DoorKind::Ublk => DoorRequest::Ublk { queues: None, depth: None },
            DoorKind::Nbd => {
                let unix = self.nbd_socket.clone().map(|path| NbdListen::Unix { path });
                let tcp = self.nbd_tcp.map(|address| NbdListen::Tcp { address });
                DoorRequest::Nbd { listen: unix.or(tcp) }
            }
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// List the checkpoints of a VPG, newest first
    List {
        /// The VPG's id or name
        vpg: String,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: u32,
        /// Only those with a tag
        #[arg(long)]
        tagged: bool,
    },
    /// Make a checkpoint now and name it (at the source)
    Tag {
        /// The VPG's id or name
        vpg: String,
        /// Its name
        tag: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ViewCommand {
    /// Open disks as they were
    Open {
        /// All disks of this VPG (id or name)
        #[arg(long, required_unless_present = "vm", conflicts_with = "vm")]
        vpg: Option<String>,
        /// The disks of this VM (UUID)
        #[arg(long)]
        vm: Option<VmId>,
        /// `latest`, a checkpoint's id, a time (2026-11-22T16:00:05Z), or for one VM seq:NUMBER
        #[arg(long, default_value = "latest", value_parser = point_in_time)]
        at: PointInTime,
        /// Refuse writes; else they go to scratch
        #[arg(long)]
        read_only: bool,
        #[command(flatten)]
        door: DoorArgs,
        /// What it is for
        #[arg(long)]
        label: Option<String>,
    },
    /// Close a view, with its scratch
    Close {
        /// The view's id
        view: ViewId,
    },
    /// List the open views
    List,
}

fn point_in_time(text: &str) -> Result<PointInTime, String> {
    if text == "latest" {
        return Ok(PointInTime::Latest);
    }
    if let Some(number) = text.strip_prefix("seq:") {
        let sequence = number.parse().map_err(|_| format!("\"{number}\" is no sequence number"))?;
        return Ok(PointInTime::Sequence { sequence });
    }
    if let Ok(checkpoint) = text.parse::<CheckpointId>() {
        return Ok(PointInTime::Checkpoint { checkpoint });
    }
    text.parse::<TimeUs>().map(|time_us| PointInTime::Time { time_us }).map_err(|_| {
        "give `latest`, a checkpoint's id, a time like 2026-11-22T16:00:05Z, or seq:NUMBER".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_apart() {
        assert_eq!(point_in_time("latest"), Ok(PointInTime::Latest));
        assert_eq!(point_in_time("seq:7"), Ok(PointInTime::Sequence { sequence: 7 }));
        assert!(matches!(
            point_in_time("000000000000000000000000000000ab-3"),
            Ok(PointInTime::Checkpoint { .. })
        ));
        assert!(matches!(point_in_time("2026-11-22T16:00:05Z"), Ok(PointInTime::Time { .. })));
        point_in_time("yesterday").expect_err("no time");
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
