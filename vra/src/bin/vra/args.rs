//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use vra::api::door::NbdListen;
use vra::api::volume::SharedRole;
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

impl Cli {
    /// Reads the command line; ends the process where it is wrong.
    pub(crate) fn read() -> Self {
        let cli = Self::parse();
        cli.check().unwrap_or_else(|error| error.exit());
        cli
    }

    fn check(&self) -> Result<(), clap::Error> {
        let door = match &self.command {
            Command::Attach(args) => &args.door,
            Command::View(ViewCommand::Open { door, .. }) => door,
            _ => return Ok(()),
        };
        if door.door == DoorKind::Ublk && (door.nbd_socket.is_some() || door.nbd_tcp.is_some()) {
            let message = "--nbd-socket and --nbd-tcp are for the NBD door: add --door nbd";
            return Err(Self::command().error(ErrorKind::ArgumentConflict, message));
        }
        Ok(())
    }
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
        #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
        zvm: String,
        /// File that holds the token, - for standard input
        #[arg(long, value_name = "FILE")]
        token_file: PathBuf,
    },
    /// List or tag checkpoints
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Name the socket of a VM's guest agent, so that its guest can be frozen for checkpoints
    GuestAgent {
        /// The VM's UUID, or the name that its disks were attached with
        vm: String,
        /// The unix socket of the channel org.qemu.guest_agent.0; it must be the VRA's alone
        #[arg(long, value_name = "SOCKET", value_parser = absolute, required_unless_present = "none")]
        agent_socket: Option<PathBuf>,
        /// Freeze it no more
        #[arg(long, conflicts_with = "agent_socket")]
        none: bool,
    },
    /// Freeze a guest and thaw it, whatever becomes of the VRA
    #[command(hide = true)]
    GuestGuard {
        /// The agent's socket
        #[arg(long = "agent")]
        agent_socket: PathBuf,
        /// How long it stays frozen at most, in milliseconds [default: it is only thawed]
        #[arg(long)]
        limit_ms: Option<u64>,
    },
    /// Open, close or list disks as they were
    #[command(subcommand)]
    View(ViewCommand),
    /// Write a shell's completion script to standard output
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
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
    /// The volume's UUID [default: that of the protected volume which isn't attached, else a new one]
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
    /// Several VRAs serve the disk, and this one is so to it (NBD door)
    #[arg(long, value_enum, value_name = "ROLE")]
    pub shared: Option<Role>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Its guest runs here
    Owner,
    /// Its guest may come here: attach it at the owner first, and give the same --volume and --number
    Standby,
}

impl From<Role> for SharedRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Owner => Self::Owner,
            Role::Standby => Self::Standby,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DoorArgs {
    /// How the disk is offered
    #[arg(long, value_enum, default_value_t = DoorKind::Ublk)]
    pub door: DoorKind,
    /// NBD: unix socket [default: one in the VRA's run_dir]
    #[arg(long, value_name = "SOCKET", conflicts_with = "nbd_tcp", value_parser = absolute)]
    pub nbd_socket: Option<PathBuf>,
    /// NBD: loopback address and port
    #[arg(long, value_name = "ADDR:PORT", value_parser = socket_address)]
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
    /// Keep a checkpoint when it grows older than the history (at the target)
    Lock {
        /// The VPG's id or name
        vpg: String,
        /// The checkpoint's id
        checkpoint: CheckpointId,
    },
    /// Let a locked checkpoint go with the history again (at the target)
    Unlock {
        /// The VPG's id or name
        vpg: String,
        /// The checkpoint's id
        checkpoint: CheckpointId,
    },
    /// Make a checkpoint now and name it (at the source)
    Tag {
        /// The VPG's id or name
        vpg: String,
        /// Its name
        tag: String,
        /// With the guests frozen by their agents, so that their filesystems are clean in it
        #[arg(long)]
        application: bool,
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

fn absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| error.to_string())
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "give an IP address and a port, as 127.0.0.1:10809".to_owned())
}

fn host_and_port(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => {
            Ok(text.to_owned())
        }
        _ => Err("give the ZVM's host and UDP port, as zvm.example:9443".to_owned()),
    }
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
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_malformed_is_answered_with_a_form() {
        let attach = ["vra", "attach", "/d", "--vm-name", "db"];
        let cases: [(&[&str], &str); 6] = [
            (&["--vm", "db"], "\"db\" is no UUID: write one as"),
            (&["--door", "nbd", "--nbd-tcp", "localhost:10809"], "as 127.0.0.1:10809"),
            (&["--door", "nbd", "--nbd-tcp", "127.0.0.1:99999"], "as 127.0.0.1:10809"),
            (&["--nbd-socket", "/s"], "add --door nbd"),
            (&["--nbd-tcp", "127.0.0.1:1"], "add --door nbd"),
            (&["--number", "99999"], "99999 is not in 0..=65535"),
        ];
        for (more, words) in cases {
            let read = Cli::try_parse_from(attach.iter().chain(more)).and_then(|cli| cli.check());
            let error = read.expect_err(words).to_string();
            assert!(error.contains(words), "{more:?}: {error}");
        }
        for zvm in ["zvm.example", ":9443", "zvm.example:0", "zvm.example:https"] {
            let read = Cli::try_parse_from(["vra", "enroll", "--zvm", zvm, "--token-file", "-"]);
            let error = read.expect_err(zvm).to_string();
            assert!(error.contains("as zvm.example:9443"), "{zvm}: {error}");
        }
    }
}
