//! Commands that ask the running manager.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use uuid::Uuid;
use vra::api::{DoorRequest, TimeUs};

use super::{Command, Failure, show};
use crate::api::{At, Client, DoorChoice, MAX_LIST, Request, Response};
use crate::config::Config;
use crate::model::status::VpgStatus;
use crate::model::task::{Task, TaskState};
use crate::units::parse_duration;

/// VRAs and the tokens that let them enrol.
#[derive(Debug, Subcommand)]
pub(super) enum VraCommand {
    /// One-time tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// All VRAs.
    List,
    /// One VRA with its disks, VMs and views.
    Show {
        /// Its name or id.
        vra: String,
    },
    /// Revoke a VRA's certificates; all other VRAs are told.
    Revoke {
        /// Its name or id.
        vra: String,
        /// Although groups still use it.
        #[arg(long)]
        force: bool,
    },
    /// Change where a VRA is reached.
    SetAddress {
        /// Its name or id.
        vra: String,
        /// `host:port` of its UDP port.
        address: String,
    },
}

/// One-time tokens.
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make a token for `vra enroll`. It is shown once and kept nowhere.
    Create {
        /// Name that the VRA will have; the inventory's hosts refer to it.
        #[arg(long)]
        name: String,
        /// How long it can be used.
        #[arg(long, default_value = "1h", value_parser = parse_duration)]
        ttl: Duration,
    },
}

/// Whether to wait for a task.
#[derive(Debug, Args)]
pub(super) struct Wait {
    /// Don't wait for the end.
    #[arg(long)]
    no_wait: bool,
    /// Longest wait for the end.
    #[arg(long, default_value = "2m", value_parser = parse_duration)]
    timeout: Duration,
}

/// Checkpoints of a group.
#[derive(Debug, Subcommand)]
pub(super) enum CheckpointCommand {
    /// The newest checkpoints.
    List {
        /// The group's name or id.
        vpg: String,
        /// Only named ones.
        #[arg(long)]
        tagged: bool,
        /// Only those at or after this time (RFC 3339, as 2026-11-22T16:00:05Z).
        #[arg(long)]
        from: Option<TimeUs>,
        /// Only those at or before this time.
        #[arg(long)]
        to: Option<TimeUs>,
        /// How many at most.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_LIST)))]
        limit: u32,
    },
    /// Make a checkpoint now and name it.
    Tag {
        /// The group's name or id.
        vpg: String,
        /// The name.
        tag: String,
        /// With the guests frozen by their agents, so that their filesystems are clean in it.
        #[arg(long)]
        application: bool,
    },
    /// Keep a checkpoint when it grows older than the history.
    Lock {
        /// The group's name or id.
        vpg: String,
        /// `latest`, a checkpoint's id or tag, or a time (RFC 3339).
        at: String,
    },
    /// Let a locked checkpoint go with the history again.
    Unlock {
        /// The group's name or id.
        vpg: String,
        /// Its id or tag, or its time.
        at: String,
    },
}

/// Tests of a group.
#[derive(Debug, Subcommand)]
pub(super) enum TestCommand {
    /// Open all disks of a group at a checkpoint, at its target; replication goes on.
    Start {
        /// The group's name or id.
        vpg: String,
        /// `latest`, a checkpoint's id or tag, or a time (RFC 3339).
        #[arg(long, default_value = "latest")]
        at: String,
        /// How the disks are offered at the target.
        #[arg(long, value_enum, default_value_t = Door::Ublk)]
        door: Door,
        #[command(flatten)]
        wait: Wait,
    },
    /// Close them and delete everything that was written to them.
    Stop {
        /// The group's name or id.
        vpg: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Where the disks are.
    Show {
        /// The group's name or id.
        vpg: String,
    },
}

/// How a disk is offered.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Door {
    /// A block device.
    Ublk,
    /// An NBD export on a unix socket.
    Nbd,
}

/// How a guest gets its disk.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum GuestDoor {
    /// A block device where the host has ublk, else NBD.
    Auto,
    /// A block device.
    Ublk,
    /// NBD on a unix socket.
    Nbd,
}

impl GuestDoor {
    fn choice(self) -> DoorChoice {
        match self {
            Self::Auto => DoorChoice::Auto,
            Self::Ublk => DoorChoice::Ublk,
            Self::Nbd => DoorChoice::Nbd,
        }
    }
}

/// Tasks.
#[derive(Debug, Subcommand)]
pub(super) enum TaskCommand {
    /// The newest tasks.
    List {
        /// How many at most.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_LIST)))]
        limit: u32,
    },
    /// One task.
    Show {
        /// Its id.
        #[arg(value_parser = task_id)]
        task: Uuid,
    },
}

/// Events.
#[derive(Debug, Subcommand)]
pub(super) enum EventCommand {
    /// The newest events.
    List {
        /// How many at most.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_LIST)))]
        limit: u32,
    },
}

/// Alerts.
#[derive(Debug, Subcommand)]
pub(super) enum AlertCommand {
    /// What is wrong now.
    List {
        /// Also what is over.
        #[arg(long)]
        all: bool,
        /// How many at most.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_LIST)))]
        limit: u32,
    },
}

/// Keys of encrypted journals.
#[derive(Debug, Subcommand)]
pub(super) enum SiteKeyCommand {
    /// Their names, the one in use first, and the file that has them.
    List,
    /// Make a new one. Encrypted journals use it from their next segment on; the former ones are still needed for older history.
    Rotate,
}

/// How to ask and how to show.
#[derive(Debug)]
pub(super) struct Ask<'a> {
    pub(super) config: &'a Config,
    pub(super) json: bool,
}

impl<'a> Ask<'a> {
    pub(super) fn new(config: &'a Config, json: bool) -> Self {
        Self { config, json }
    }

    pub(super) async fn run(&self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Init { .. }
            | Command::Rebuild { .. }
            | Command::Serve { .. }
            | Command::Completion { .. } => Err(Failure::Unexpected),
            Command::Status { watch, check } => self.status(watch, check).await,
            Command::Inventory(args) => self.inventory(args).await,
            Command::Plan { vms, history } => {
                self.print(Request::Plan { vms, history_s: history.as_secs() }).await
            }
            Command::Protect { vm, disks, exclude, door, also_on } => {
                self.print(Request::VmProtect { vm, disks, exclude, door: door.choice(), also_on }).await
            }
            Command::Unprotect { vm, disks } => self.print(Request::VmUnprotect { vm, disks }).await,
            Command::Source(command) => self.source(*command).await,
            Command::Vra(command) => self.vra(command).await,
            Command::Vpg(command) => self.vpg(command).await,
            Command::Checkpoint(command) => self.checkpoint(command).await,
            Command::Test(command) => self.test(command).await,
            Command::Task(TaskCommand::List { limit }) => self.print(Request::TaskList { limit }).await,
            Command::Task(TaskCommand::Show { task }) => self.print(Request::TaskShow { task }).await,
            Command::Event(EventCommand::List { limit }) => self.print(Request::EventList { limit }).await,
            Command::SiteKey(SiteKeyCommand::List) => self.print(Request::SiteKeyList).await,
            Command::SiteKey(SiteKeyCommand::Rotate) => self.print(Request::SiteKeyRotate).await,
            Command::Alert(AlertCommand::List { all, limit }) => {
                self.print(Request::AlertList { all, limit }).await
            }
        }
    }

    async fn status(&self, watch: bool, check: bool) -> Result<(), Failure> {
        loop {
            let mut client = Client::connect(&self.config.socket).await?;
            let response = client.call(Request::Status).await?;
            if watch && !self.json {
                // ANSI: cursor to the top, clear what follows.
                print!("\x1b[H\x1b[2J");
            }
            self.show(&response)?;
            let Response::Status(status) = &response else { return Err(Failure::Unexpected) };
            if check && status.vpgs.iter().any(|vpg| vpg.status != VpgStatus::MeetingSla) {
                return Err(Failure::SlaMissed);
            }
            if !watch {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }

    async fn vra(&self, command: VraCommand) -> Result<(), Failure> {
        let request = match command {
            VraCommand::Token(TokenCommand::Create { name, ttl }) => {
                Request::VraTokenCreate { name, ttl_s: ttl.as_secs() }
            }
            VraCommand::List => Request::VraList,
            VraCommand::Show { vra } => Request::VraShow { vra },
            VraCommand::Revoke { vra, force } => Request::VraRevoke { vra, force },
            VraCommand::SetAddress { vra, address } => Request::VraSetAddress { vra, address },
        };
        self.print(request).await
    }

    async fn checkpoint(&self, command: CheckpointCommand) -> Result<(), Failure> {
        let request = match command {
            CheckpointCommand::List { vpg, tagged, from, to, limit } => {
                Request::CheckpointList { vpg, tagged, from_us: from, to_us: to, limit }
            }
            CheckpointCommand::Tag { vpg, tag, application } => {
                Request::CheckpointTag { vpg, tag, application }
            }
            CheckpointCommand::Lock { vpg, at } => {
                Request::CheckpointLock { vpg, at: parse_at(&at), locked: true }
            }
            CheckpointCommand::Unlock { vpg, at } => {
                Request::CheckpointLock { vpg, at: parse_at(&at), locked: false }
            }
        };
        self.print(request).await
    }

    async fn test(&self, command: TestCommand) -> Result<(), Failure> {
        match command {
            TestCommand::Start { vpg, at, door, wait } => {
                let door = match door {
                    Door::Ublk => DoorRequest::Ublk { queues: None, depth: None },
                    Door::Nbd => DoorRequest::Nbd { listen: None },
                };
                let request = Request::TestStart { vpg: vpg.clone(), at: parse_at(&at), door };
                if wait.no_wait {
                    return self.task(request, &wait).await;
                }
                let mut client = Client::connect(&self.config.socket).await?;
                self.follow(&mut client, request, &wait).await?;
                let response = client.call(Request::TestShow { vpg }).await?;
                self.show(&response)
            }
            TestCommand::Stop { vpg, wait } => self.task(Request::TestStop { vpg }, &wait).await,
            TestCommand::Show { vpg } => self.print(Request::TestShow { vpg }).await,
        }
    }

    pub(super) async fn print(&self, request: Request) -> Result<(), Failure> {
        let mut client = Client::connect(&self.config.socket).await?;
        let response = client.call(request).await?;
        self.show(&response)
    }

    pub(super) async fn task(&self, request: Request, wait: &Wait) -> Result<(), Failure> {
        let mut client = Client::connect(&self.config.socket).await?;
        let task = self.follow(&mut client, request, wait).await?;
        self.show(&Response::Task(task))
    }

    /// Sends a request that begins a task and waits for its end.
    async fn follow(&self, client: &mut Client, request: Request, wait: &Wait) -> Result<Task, Failure> {
        let Response::Task(mut task) = client.call(request).await? else { return Err(Failure::Unexpected) };
        let deadline = Instant::now() + wait.timeout;
        // Draws on stderr, and nothing where that is no terminal.
        let bar = ProgressBar::new(100).with_style(
            ProgressStyle::with_template("{bar:20} {pos:>3} %  {wide_msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        while !wait.no_wait && task.state == TaskState::InProgress {
            if Instant::now() >= deadline {
                bar.finish_and_clear();
                return Err(Failure::StillUnderWay(task.step));
            }
            bar.set_position(u64::from(task.progress_percent));
            bar.set_message(task.step.clone());
            tokio::time::sleep(Duration::from_millis(100)).await;
            let Response::Task(next) = client.call(Request::TaskShow { task: task.id }).await? else {
                return Err(Failure::Unexpected);
            };
            task = next;
        }
        bar.finish_and_clear();
        if task.state == TaskState::Failed {
            return Err(Failure::TaskFailed(task.step));
        }
        Ok(task)
    }

    fn show(&self, response: &Response) -> Result<(), Failure> {
        show::response(response, self.json)?;
        Ok(())
    }
}

fn task_id(text: &str) -> Result<Uuid, String> {
    text.parse().map_err(|_| "give an id as `zvm task list` shows it".to_owned())
}

/// `latest`, a checkpoint's id, a time, and everything else is a tag.
fn parse_at(text: &str) -> At {
    if text == "latest" {
        At::Latest
    } else if let Ok(checkpoint) = text.parse() {
        At::Checkpoint { checkpoint }
    } else if let Ok(time_us) = text.parse() {
        At::Time { time_us }
    } else {
        At::Tag { tag: text.into() }
    }
}
