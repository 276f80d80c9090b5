//! What each command asks of the daemon.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde::Serialize;
use vra::api::enroll::Token;
use vra::api::view::ViewSubject;
use vra::api::{
    Attach, CheckpointId, CheckpointPage, CloseView, Detach, ListCheckpoints, LockCheckpoint, OpenView,
    Request, Response, SetGuestAgent, TagCheckpoint, ViewMode, VmId, VolumeId, VpgId,
};
use vra::config::Config;
use vra::control::{Client, ClientError};
use vra::pki::{PkiDir, enroll};

use crate::args::{AttachArgs, CheckpointCommand, Cli, Command, ViewCommand};
use crate::show;

const PROGRAM: &str = concat!("vra ", env!("CARGO_PKG_VERSION"));

/// Longest token file that is read, in bytes.
const TOKEN_FILE_MAX: u64 = 4096;

pub(crate) async fn run(cli: &Cli, config: &Config) -> anyhow::Result<ExitCode> {
    let daemon = Daemon { cli, config };
    match &cli.command {
        Command::Serve | Command::Completion { .. } => unreachable!("main does that itself"),
        Command::Doctor => return daemon.doctor().await,
        Command::Enroll { zvm, token_file } => daemon.enroll(zvm, token_file).await?,
        Command::Attach(args) => daemon.attach(args).await?,
        Command::Detach { volume, force } => daemon.detach(volume, *force).await?,
        Command::List => {
            let Response::Volumes(volumes) = daemon.ask(Request::List).await? else {
                bail!(ClientError::Unexpected)
            };
            daemon.show(&volumes, |volumes| show::volumes(volumes))?;
        }
        Command::Status => {
            let Response::Status(status) = daemon.ask(Request::Status).await? else {
                bail!(ClientError::Unexpected)
            };
            daemon.show(&*status, show::status)?;
        }
        Command::GuestAgent { vm, agent_socket, none: _ } => {
            daemon.guest_agent(vm, agent_socket.clone()).await?;
        }
        Command::GuestGuard { .. } => unreachable!("main runs the guard itself"),
        Command::Checkpoint(command) => daemon.checkpoint(command).await?,
        Command::View(command) => daemon.view(command).await?,
    }
    Ok(ExitCode::SUCCESS)
}

struct Daemon<'a> {
    cli: &'a Cli,
    config: &'a Config,
}

impl Daemon<'_> {
    async fn connect(&self) -> Result<Client, ClientError> {
        let path = self.cli.socket.clone().unwrap_or_else(|| self.config.socket_path());
        Client::unix(&path, PROGRAM).await
    }

    async fn ask(&self, request: Request) -> anyhow::Result<Response> {
        Ok(self.connect().await?.call(request).await?)
    }

    fn show<T: Serialize>(&self, value: &T, people: impl FnOnce(&T)) -> anyhow::Result<()> {
        if self.cli.json {
            println!("{}", serde_json::to_string_pretty(value)?);
        } else {
            people(value);
        }
        Ok(())
    }

    async fn doctor(&self) -> anyhow::Result<ExitCode> {
        // The daemon's rights are what counts; without a daemon this process's have to do.
        let report = match self.connect().await {
            Ok(mut client) => match client.call(Request::Doctor).await? {
                Response::Doctor(report) => report,
                _ => bail!(ClientError::Unexpected),
            },
            Err(_) => {
                eprintln!("no running VRA answers: this is what this command itself sees");
                vra::doctor::examine(self.config)
            }
        };
        self.show(&report, show::doctor)?;
        Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn enroll(&self, zvm: &str, token_file: &Path) -> anyhow::Result<()> {
        let token = read_token(token_file)?;
        let folder = PkiDir::open(&self.config.pki_dir())?;
        let mut identity = vra::daemon::LocalIdentity::open(self.config)?;
        let advertise = self.config.advertise.clone();
        let (credentials, reply) =
            enroll(&folder, zvm, &token, identity.vra(), &self.config.name, advertise).await?;
        let zvm_id = reply.zvm;
        identity.set_zvm(zvm_id, reply.name)?;
        if self.cli.json {
            let ends = credentials.own.ends_us;
            println!(
                "{}",
                serde_json::json!({ "vra": identity.vra(), "zvm": zvm_id, "certificate_ends_us": ends })
            );
        } else {
            println!("enrolled as {} until {}", credentials.own.identity, credentials.own.ends_us);
            println!("may be controlled by zvm {zvm_id}");
        }
        Ok(())
    }

    async fn attach(&self, args: &AttachArgs) -> anyhow::Result<()> {
        let mut client = self.connect().await?;
        let vm = match args.vm {
            Some(vm) => vm,
            None => vm_of_name(&mut client, &args.vm_name).await?.unwrap_or_else(VmId::random),
        };
        let path = std::path::absolute(&args.path)?;
        let attach = Attach {
            vm,
            vm_name: args.vm_name.clone(),
            volume: args.volume,
            number: args.number,
            path,
            door: args.door.request(),
            force_raw: args.force_raw,
            shared: args.shared.map(Into::into),
        };
        let Response::Volume(volume) = client.call(Request::Attach(attach)).await? else {
            bail!(ClientError::Unexpected)
        };
        self.show(&volume, |volume| show::volumes(std::slice::from_ref(volume)))
    }

    async fn detach(&self, volume: &str, force: bool) -> anyhow::Result<()> {
        let mut client = self.connect().await?;
        let volume = match volume.parse::<VolumeId>() {
            Ok(id) => id,
            Err(_) => volume_of_number(&mut client, volume).await?,
        };
        client.call(Request::Detach(Detach { volume, force })).await?;
        if !self.cli.json {
            println!("detached {volume}");
        }
        Ok(())
    }

    async fn guest_agent(&self, vm: &str, socket: Option<PathBuf>) -> anyhow::Result<()> {
        let mut client = self.connect().await?;
        let vm = match vm.parse::<VmId>() {
            Ok(id) => id,
            Err(_) => match vm_of_name(&mut client, vm).await? {
                Some(id) => id,
                None => bail!("no volume of a VM called {vm:?} is attached"),
            },
        };
        client.call(Request::SetGuestAgent(SetGuestAgent { vm, socket })).await?;
        Ok(())
    }

    async fn checkpoint(&self, command: &CheckpointCommand) -> anyhow::Result<()> {
        let mut client = self.connect().await?;
        match command {
            CheckpointCommand::List { vpg, limit, tagged } => {
                let mut list = ListCheckpoints {
                    vpg: vpg_of(&mut client, vpg).await?,
                    vm: None,
                    from_us: None,
                    to_us: None,
                    tagged: *tagged,
                    newest_first: true,
                    by_cut: false,
                    after: None,
                    limit: *limit,
                };
                let mut page = page_of(&mut client, &list).await?;
                // With many VMs fewer than were asked for fit into one answer.
                while page.next.is_some() && page.checkpoints.len() < *limit as usize {
                    list.after = page.next;
                    list.limit = limit - u32::try_from(page.checkpoints.len())?;
                    let more = page_of(&mut client, &list).await?;
                    page.next = more.next;
                    page.checkpoints.extend(more.checkpoints);
                }
                self.show(&page, show::checkpoints)
            }
            CheckpointCommand::Lock { vpg, checkpoint } => {
                self.lock(&mut client, vpg, *checkpoint, true).await
            }
            CheckpointCommand::Unlock { vpg, checkpoint } => {
                self.lock(&mut client, vpg, *checkpoint, false).await
            }
            CheckpointCommand::Tag { vpg, tag, application } => {
                let vpg = vpg_of(&mut client, vpg).await?;
                let request = Request::TagCheckpoint(TagCheckpoint {
                    vpg,
                    tag: tag.clone(),
                    application: *application,
                });
                let Response::Checkpoint(checkpoint) = client.call(request).await? else {
                    bail!(ClientError::Unexpected)
                };
                self.show(&checkpoint, |checkpoint| println!("{}", checkpoint.id))
            }
        }
    }

    async fn lock(
        &self,
        client: &mut Client,
        vpg: &str,
        checkpoint: CheckpointId,
        locked: bool,
    ) -> anyhow::Result<()> {
        let vpg = vpg_of(client, vpg).await?;
        let request = Request::LockCheckpoint(LockCheckpoint { vpg, checkpoint, locked });
        let Response::Checkpoint(checkpoint) = client.call(request).await? else {
            bail!(ClientError::Unexpected)
        };
        self.show(&checkpoint, |checkpoint| println!("{}", checkpoint.id))
    }

    async fn view(&self, command: &ViewCommand) -> anyhow::Result<()> {
        let mut client = self.connect().await?;
        match command {
            ViewCommand::Open { vpg, vm, at, read_only, door, label } => {
                let subject = match (vpg, vm) {
                    (Some(vpg), _) => ViewSubject::Vpg { vpg: vpg_of(&mut client, vpg).await? },
                    (None, Some(vm)) => ViewSubject::Vm { vm: *vm },
                    (None, None) => bail!("name a VPG or a VM"),
                };
                let open = OpenView {
                    subject,
                    at: *at,
                    mode: if *read_only { ViewMode::ReadOnly } else { ViewMode::Scratch },
                    door: door.request(),
                    view: None,
                    label: label.clone(),
                };
                let Response::View(view) = client.call(Request::OpenView(open)).await? else {
                    bail!(ClientError::Unexpected)
                };
                self.show(&view, |view| show::views(std::slice::from_ref(view)))
            }
            ViewCommand::Close { view } => {
                // Closing what isn't open is no error to the protocol, but a mistyped id is one to whoever typed it.
                let Response::Views(views) = client.call(Request::ListViews).await? else {
                    bail!(ClientError::Unexpected)
                };
                if views.iter().all(|open| open.view != *view) {
                    bail!("no view {view} is open here: `vra view list` shows those that are");
                }
                client.call(Request::CloseView(CloseView { view: *view })).await?;
                if !self.cli.json {
                    println!("closed {view}");
                }
                Ok(())
            }
            ViewCommand::List => {
                let Response::Views(views) = client.call(Request::ListViews).await? else {
                    bail!(ClientError::Unexpected)
                };
                self.show(&views, |views| show::views(views))
            }
        }
    }
}

fn read_token(path: &Path) -> anyhow::Result<Token> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin()
            .take(TOKEN_FILE_MAX)
            .read_to_string(&mut text)
            .context("cannot read standard input")?;
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(TOKEN_FILE_MAX).read_to_string(&mut text))
            .with_context(|| format!("cannot read the token file {}", path.display()))?;
    }
    Ok(text.parse::<Token>()?)
}

async fn vm_of_name(client: &mut Client, name: &str) -> anyhow::Result<Option<VmId>> {
    let Response::Volumes(volumes) = client.call(Request::List).await? else {
        bail!(ClientError::Unexpected)
    };
    let mut vms: Vec<VmId> =
        volumes.iter().filter(|volume| volume.vm_name == name).map(|volume| volume.vm).collect();
    vms.dedup();
    match vms[..] {
        [] => Ok(None),
        [vm] => Ok(Some(vm)),
        _ => bail!("several VMs are called \"{name}\" here: say which one with --vm UUID"),
    }
}

async fn volume_of_number(client: &mut Client, text: &str) -> anyhow::Result<VolumeId> {
    let Response::Volumes(volumes) = client.call(Request::List).await? else {
        bail!(ClientError::Unexpected)
    };
    let wanted = |volume: &&vra::api::VolumeInfo| {
        text == format!("{}:{}", volume.vm_name, volume.number)
            || text == format!("{}:{}", volume.vm, volume.number)
            || Path::new(text) == volume.path
    };
    match volumes.iter().filter(wanted).collect::<Vec<_>>()[..] {
        [volume] => Ok(volume.volume),
        [] => bail!(
            "no attached volume is \"{text}\": give its id, VM:NUMBER or its path, as `vra list` shows them"
        ),
        _ => bail!("\"{text}\" names several volumes: give the id"),
    }
}

async fn page_of(client: &mut Client, list: &ListCheckpoints) -> anyhow::Result<CheckpointPage> {
    match client.call(Request::ListCheckpoints(list.clone())).await? {
        Response::Checkpoints(page) => Ok(page),
        _ => bail!(ClientError::Unexpected),
    }
}

async fn vpg_of(client: &mut Client, text: &str) -> anyhow::Result<VpgId> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let Response::Status(status) = client.call(Request::Status).await? else {
        bail!(ClientError::Unexpected)
    };
    match status.vpgs.iter().filter(|vpg| vpg.name == text).collect::<Vec<_>>()[..] {
        [vpg] => Ok(vpg.vpg),
        [] => bail!("no VPG is called \"{text}\" here: `vra status` lists them"),
        _ => bail!("several VPGs are called \"{text}\" here: give the id"),
    }
}
