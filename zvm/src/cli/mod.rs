//! The `zvm` command: `init` and `serve` work on the state folder, everything else asks the running manager.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such thing, 4 refused in the present state, 5 the manager (or a VRA that is
//! needed) does not answer, 6 still under way when `--timeout` ended, 7 `status --check` found a group not as wanted.

mod ask;
mod inventory;
mod recovery;
mod shape;
mod show;
mod source;
mod table;
mod transfer;
mod vpg;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use vra::api::{ErrorCode, VpgId};
use vra::report::{chain, write_completion};

use crate::api::ClientError;
use crate::config::Config;
use crate::manager::{self, StartError};
use crate::rebuild::{self, RebuildError};
use crate::serve::Server;
use crate::site_key_file::LostSiteKeys;
use crate::units::parse_duration;

pub use shape::VpgFile;

/// The manager of Holdfast: inventory, protection groups, checkpoints and recovery tests.
#[derive(Debug, Parser)]
#[command(name = "zvm", version, propagate_version = true)]
struct Cli {
    /// Configuration file [default: /etc/holdfast/zvm.toml].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new site: its certificate authority, this manager's identity, its database.
    Init {
        /// Name of the site.
        #[arg(long, default_value = "site")]
        name: String,
    },
    /// Make a lost database again from what the VRAs know; this manager's keys must still be in its state folder.
    Rebuild {
        /// A VRA of the site, host:port; one is enough, its groups name the others. Can be repeated.
        #[arg(long = "vra", required = true, value_name = "HOST:PORT")]
        vras: Vec<String>,
        /// Name of the site.
        #[arg(long, default_value = "site")]
        name: String,
        /// Restore the VPG with this id even if a VRA that has been in it from the first doesn't know it. Can be repeated.
        #[arg(long, value_name = "ID")]
        restore: Vec<VpgId>,
    },
    /// Run the manager.
    Serve {
        /// Go on without site keys that the manager had and that are not in its file any more. What they encrypted can't be read again.
        #[arg(long)]
        forget_lost_site_keys: bool,
    },
    /// Groups with their RPO, what is wrong and what to do about it.
    Status {
        /// Show again every two seconds until interrupted.
        #[arg(long)]
        watch: bool,
        /// Exit with 7 unless every group meets its SLA.
        #[arg(long)]
        check: bool,
    },
    /// Hosts, datastores, networks and VMs that there are.
    Inventory(inventory::InventoryArgs),
    /// Hypervisors, and managers of hypervisors, that the inventory is read from.
    #[command(subcommand)]
    Source(Box<source::SourceCommand>),
    /// How much VMs write, and the space for journals and the link that their protection would take.
    Plan {
        /// Names or UUIDs; without any, all.
        vms: Vec<String>,
        /// How long history is wanted.
        #[arg(long, default_value = "24h", value_parser = parse_duration)]
        history: Duration,
    },
    /// Have a VM's disks served by the VRA of its host, from its next start on. The next step is a group, `zvm vpg create`.
    Protect {
        /// Its name or UUID.
        vm: String,
        /// Only this disk, such as vda. Can be repeated.
        #[arg(long = "disk", value_name = "DISK")]
        disks: Vec<String>,
        /// All but this disk. Can be repeated.
        #[arg(long, value_name = "DISK")]
        exclude: Vec<String>,
        /// How the guest gets them.
        #[arg(long, value_enum, default_value_t = ask::GuestDoor::Auto)]
        door: ask::GuestDoor,
        /// Another host whose VRA serves the disks, too, so that the guest can be migrated there live; the disks must be files there, too. Can be repeated.
        #[arg(long, value_name = "HOST")]
        also_on: Vec<String>,
    },
    /// Give a VM its own disks back, from its next start on, with all that was written to them.
    Unprotect {
        /// Its name or UUID.
        vm: String,
        /// Only this disk, such as vda. Can be repeated.
        #[arg(long = "disk", value_name = "DISK")]
        disks: Vec<String>,
    },
    /// VRAs and the tokens that let them enrol.
    #[command(subcommand)]
    Vra(ask::VraCommand),
    /// Virtual protection groups.
    #[command(subcommand)]
    Vpg(vpg::VpgCommand),
    /// Checkpoints of a group.
    #[command(subcommand)]
    Checkpoint(ask::CheckpointCommand),
    /// Open a group's disks as they were, for a test.
    #[command(subcommand)]
    Test(ask::TestCommand),
    /// What users asked for and how far it is.
    #[command(subcommand)]
    Task(ask::TaskCommand),
    /// What happened.
    #[command(subcommand)]
    Event(ask::EventCommand),
    /// What is wrong.
    #[command(subcommand)]
    Alert(ask::AlertCommand),
    /// Keys of encrypted journals.
    #[command(subcommand)]
    SiteKey(ask::SiteKeyCommand),
    /// Write a shell's completion script to standard output.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Rebuild(#[from] Box<RebuildError>),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    TaskFailed(String),
    #[error("still under way: {0}; `zvm task list` shows when it is done")]
    StillUnderWay(String),
    #[error("{refused} of {all} groups were refused")]
    NotImported { refused: usize, all: usize },
    #[error("not every group meets its SLA")]
    SlaMissed,
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
    #[error("the manager answered with something that wasn't asked for: is it of another version?")]
    Unexpected,
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::StillUnderWay(_) => 6,
            Self::SlaMissed => 7,
            Self::Client(ClientError::Refused(error)) => match error.code {
                ErrorCode::NotFound => 3,
                ErrorCode::Busy | ErrorCode::Conflict | ErrorCode::NotReady | ErrorCode::Stale => 4,
                ErrorCode::BadRequest => 2,
                _ => 1,
            },
            Self::Client(_) => 5,
            _ => 1,
        }
    }

    fn remedy(&self) -> Option<&str> {
        match self {
            Self::Client(ClientError::Refused(error)) => error.remedy.as_deref(),
            Self::Client(ClientError::Connect { .. }) => {
                Some("is `zvm serve` running, and does this user have the right to it?")
            }
            _ => None,
        }
    }
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(execute(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has enough of it.
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", chain(&failure));
            if let Some(remedy) = failure.remedy() {
                eprintln!("remedy: {remedy}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

async fn execute(cli: Cli) -> Result<(), Failure> {
    if let Command::Completion { shell } = cli.command {
        return Ok(write_completion(shell, Cli::command(), &mut std::io::stdout())?);
    }
    let config = Config::load(cli.config.as_deref())?;
    match cli.command {
        Command::Init { name } => init(&config, &name, cli.json).await,
        Command::Rebuild { vras, name, restore } => rebuild(&config, &name, &vras, &restore, cli.json).await,
        Command::Serve { forget_lost_site_keys } => {
            let lost = if forget_lost_site_keys { LostSiteKeys::Forget } else { LostSiteKeys::Refuse };
            serve(config, lost).await
        }
        command => ask::Ask::new(&config, cli.json).run(command).await,
    }
}

async fn init(config: &Config, name: &str, json: bool) -> Result<(), Failure> {
    let (zvm, fingerprint) = manager::initialise(config, name).await?;
    let fingerprint = vra::api::enroll::hex(&fingerprint);
    if json {
        println!("{}", serde_json::json!({ "site": name, "zvm": zvm, "ca_sha256": fingerprint }));
    } else {
        println!("Site {name} is ready in {}.", config.state_dir.display());
        println!("Manager        {zvm}");
        println!("CA (SHA-256)   {fingerprint}");
        println!("Keep a backup of {}: whoever has it is the manager.", config.pki_dir().display());
    }
    Ok(())
}

async fn rebuild(
    config: &Config,
    name: &str,
    vras: &[String],
    restore: &[VpgId],
    json: bool,
) -> Result<(), Failure> {
    let rebuilt = rebuild::rebuild(config, name, vras, restore).await.map_err(Box::new)?;
    if json {
        let silent: Vec<_> = rebuilt
            .silent
            .iter()
            .map(|(vra, reason)| serde_json::json!({ "vra": vra.id, "address": vra.address, "reason": reason }))
            .collect();
        let renamed = rebuilt.renamed.iter().map(|(from, to)| serde_json::json!({ "from": from, "to": to }));
        let unrestored = rebuilt
            .unrestored
            .iter()
            .map(|vpg| serde_json::json!({ "vpg": vpg.id, "name": vpg.name, "known_at": vpg.known_at }));
        let incomplete = rebuilt
            .incomplete
            .iter()
            .map(|(vpg, vras)| serde_json::json!({ "vpg": vpg, "not_known_at": vras }));
        let unread =
            rebuilt.unread.iter().map(|(vpg, reason)| serde_json::json!({ "vpg": vpg, "reason": reason }));
        let told = serde_json::json!({
            "vpgs": rebuilt.vpgs,
            "vras": rebuilt.vras,
            "silent": silent,
            "renamed": renamed.collect::<Vec<_>>(),
            "unrestored": unrestored.collect::<Vec<_>>(),
            "incomplete": incomplete.collect::<Vec<_>>(),
            "unread": unread.collect::<Vec<_>>(),
        });
        println!("{told}");
        return Ok(());
    }
    println!("VPGs   {}", rebuilt.vpgs.join(", "));
    println!("VRAs   {}", rebuilt.vras.join(", "));
    for (vra, reason) in &rebuilt.silent {
        println!("VRA {} at {} didn't answer: {reason}", vra.id, vra.address);
        println!(
            "  -> it is known by its id until it answers the manager; `zvm vra set-address` tells where else it is"
        );
    }
    for (from, to) in &rebuilt.renamed {
        println!("There are two VPGs {from}: the older one is {to} now");
    }
    for vpg in &rebuilt.unrestored {
        println!("VPG {} ({}) is known only at {}: not restored", vpg.name, vpg.id, vpg.known_at.join(", "));
        println!(
            "  -> it was deleted, or not all of its VRAs have it; what its VRAs keep of it stays there."
        );
        println!("     If it wasn't deleted: move zvm.db away and rebuild again with --restore {}", vpg.id);
    }
    for (vpg, vras) in &rebuilt.incomplete {
        println!("VPG {vpg} isn't known at {}: the manager tells them of it", vras.join(", "));
        println!("  -> if it had been deleted, `zvm vpg delete {vpg}` deletes it again");
    }
    for (vpg, reason) in &rebuilt.unread {
        println!("VPG {vpg} is without recovery settings, excluded disks and test reminder: {reason}");
        println!("  -> another release wrote them: set them again with `zvm vpg edit`");
    }
    println!("Tasks, events, tokens and running tests are lost; start the manager: `zvm serve`.");
    Ok(())
}

async fn serve(config: Config, lost: LostSiteKeys) -> Result<(), Failure> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,sqlx=warn"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    let socket = config.socket.clone();
    let server = Server::open(config, lost).await?;
    let address = server.enrolment_address()?;
    tracing::info!(socket = %socket.display(), enrolment = %address, "the manager runs");
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    server
        .run(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            tracing::info!("the manager ends");
        })
        .await;
    Ok(())
}
