//! The target of a load: a VRA's process, enrolled, with a datastore.

use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tokio::runtime::Handle;
use vra::api::enroll::Token;
use vra::api::vpg::{VmDefinition, VpgDefinition, VraEndpoint};
use vra::api::{Request, Response, TimeUs, VraId, VraStatus, ZvmId};
use vra::config::Config;
use vra::control::{Client, ClientError};
use vra::daemon::LocalIdentity;
use vra::link::{Link, LinkSettings};
use vra::pki::{Identity, PkiDir, Trust};
use zvm::authority::Authority;

use super::load::Load;
use crate::site::Daemon;

/// How long a target may take to start, in seconds, under emulation on a busy host.
const START_LIMIT_S: u64 = 60;

/// A target with its state and, between starts, without a process.
pub struct Target {
    config: Config,
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    definition: VpgDefinition,
    process: Option<Daemon>,
}

/// What a target's process is.
#[derive(Clone, Debug)]
pub enum TargetProgram {
    /// `vra`, at this path.
    Product(PathBuf),
    /// `durability` at this path, which runs the same daemon without the fdatasync before an acknowledgement.
    WithoutSync(PathBuf),
}

impl Target {
    /// Makes a site CA, a target's configuration and identity below `folder`, and a source's end of the link to it. Must run inside tokio.
    ///
    /// # Errors
    /// What can't be made.
    pub fn create(
        load: Load,
        folder: &Path,
        datastore: &Path,
        program: &TargetProgram,
    ) -> Result<(Self, Link)> {
        let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr())?.port();
        let config_path = folder.join("vra.toml");
        // Memory isn't locked: the target serves no disk of this machine.
        let text = format!(
            "name = \"target\"\nlisten = \"127.0.0.1:{port}\"\nstate_dir = \"{0}/target\"\nrun_dir = \"{0}/run\"\n\
             datastores = [\"{1}\"]\n[memory]\nlock = false\narena_mib = 16\n[target]\nmemory_mib = 64\n",
            folder.display(),
            datastore.display()
        );
        std::fs::write(&config_path, text).context("write the target's configuration")?;
        let config = Config::load(Some(&config_path)).context("read the target's configuration")?;
        let (authority, zvm) = Authority::create(&folder.join("ca"), "durability", TimeUs::now().0)?;
        let mut identity = LocalIdentity::open(&config)?;
        let target = VraEndpoint { id: identity.vra(), address: config.listen.to_string() };
        enrol(&authority, target.id, &config.pki_dir())?;
        identity.set_zvm(ZvmId(zvm), None)?;
        let source = VraEndpoint { id: VraId::random(), address: "127.0.0.1:1".to_owned() };
        let source_pki = folder.join("source");
        let credentials = enrol(&authority, source.id, &source_pki)?;
        let settings = LinkSettings { listen: (Ipv4Addr::LOCALHOST, 0).into() };
        // Nobody opens streams to the source.
        let (link, _) = Link::bind(&settings, credentials, Trust::default())?;
        let config_path = config_path.display().to_string();
        let (program, arguments) = match program {
            TargetProgram::Product(path) => {
                (path, vec!["--config".to_owned(), config_path, "serve".to_owned()])
            }
            TargetProgram::WithoutSync(path) => (path, vec!["serve-without-sync".to_owned(), config_path]),
        };
        let definition = load.definition(source, target, datastore);
        let (program, log) = (program.clone(), folder.join("target.log"));
        Ok((Self { config, program, arguments, log, definition, process: None }, link))
    }

    /// The VM's group.
    pub fn definition(&self) -> &VpgDefinition {
        &self.definition
    }

    /// Starts the process and doesn't wait for it.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(&mut self) -> Result<()> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        self.process = Some(Daemon::start("target", &self.program, &arguments, &self.log)?);
        Ok(())
    }

    /// Waits until it listens. Must run inside a tokio runtime with several threads.
    ///
    /// # Errors
    /// It ends, or doesn't come up.
    pub fn wait_until_up(&mut self) -> Result<()> {
        let socket = self.config.socket_path();
        let is_up = || {
            Handle::current()
                .block_on(async { status(&socket).await.is_ok_and(|status| status.site.is_some()) })
        };
        let process = self.process.as_mut().context("the target doesn't run")?;
        tokio::task::block_in_place(|| process.wait_until(START_LIMIT_S, is_up))
    }

    /// Tells it of the VM; it remembers.
    ///
    /// # Errors
    /// It refuses.
    pub async fn define(&self) -> Result<()> {
        let mut client = Client::unix(&self.config.socket_path(), "durability").await?;
        match client.call(Request::ApplyVpg(self.definition.clone())).await? {
            Response::Vpg(_) => Ok(()),
            other => bail!("the target answered {other:?} to a definition"),
        }
    }

    /// Tells it of the VM anew, with something changed.
    ///
    /// # Errors
    /// It refuses.
    pub async fn redefine(&mut self, change: impl FnOnce(&mut VmDefinition)) -> Result<()> {
        change(&mut self.definition.vms[0]);
        self.definition.revision += 1;
        self.define().await
    }

    /// `kill -9`, and waits for the process to be gone.
    ///
    /// # Errors
    /// It has ended by itself.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the target doesn't run")?.kill()
    }

    /// Ends it as an operator does.
    ///
    /// # Errors
    /// It doesn't end.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().context("the target doesn't run")?.stop()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

fn enrol(authority: &Authority, vra: VraId, folder: &Path) -> Result<vra::pki::Credentials> {
    let pki = PkiDir::open(folder)?;
    let request = pki.signing_request(Identity::vra(vra))?;
    let issued = authority.sign_vra(&request, vra.0, TimeUs::now().0)?;
    let token = Token { secret: [0; 32], ca_sha256: authority.fingerprint() };
    Ok(pki.store(Identity::vra(vra), &token, &issued.pem, authority.certificate_pem())?)
}

async fn status(socket: &Path) -> Result<VraStatus, ClientError> {
    let mut client = Client::unix(socket, "durability").await?;
    match client.call(Request::Status).await? {
        Response::Status(status) => Ok(*status),
        _ => Err(ClientError::Unexpected),
    }
}
