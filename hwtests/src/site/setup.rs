//! A site's processes: set up, asked, killed and started again.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::answers::find;
use super::configure::{
    create_secret, free_udp_ports, vra_config, write_inventory, write_vra_config, write_zvm_config,
};
use super::process::{Binaries, Daemon};
use super::{Side, SiteSettings, Vm};
use crate::relay::Relay;

/// The running processes and their folders. What still runs when it is dropped is killed.
pub struct Site {
    binaries: Binaries,
    folder: PathBuf,
    datastore: PathBuf,
    zvm: Option<Daemon>,
    vras: [Option<Daemon>; 2],
    relay: Option<Relay>,
}

impl Site {
    /// Writes configurations below `folder`, starts the ZVM, enrols and starts both VRAs.
    ///
    /// # Errors
    /// When a process doesn't come up, with the end of its log.
    pub fn start(binaries: Binaries, folder: &Path, settings: &SiteSettings) -> Result<Self> {
        let ports = free_udp_ports::<3>()?;
        let zvm_config = write_zvm_config(folder, ports[0])?.display().to_string();
        binaries.run("zvm", &["--config", &zvm_config, "init", "--name", "demo"])?;
        let datastore = settings.datastore.clone().unwrap_or_else(|| folder.join("recovery-store"));
        let relay = match settings.relayed {
            true => Some(Relay::start(SocketAddr::from((Ipv4Addr::LOCALHOST, ports[2])), 1)?),
            false => None,
        };
        let target_port = relay.as_ref().map_or(ports[2], |relay| relay.address().port());
        let mut site =
            Self { binaries, folder: folder.to_path_buf(), datastore, zvm: None, vras: [None, None], relay };
        site.start_zvm()?;
        for (side, port, advertised_port) in
            [(Side::Source, ports[1], ports[1]), (Side::Target, ports[2], target_port)]
        {
            write_vra_config(folder, side, port, advertised_port, &site.datastore, settings)?;
            site.enrol(side, ports[0])?;
            site.start_vra(side)?;
        }
        Ok(site)
    }

    /// Tells the ZVM what there is to protect, and waits until it knows.
    ///
    /// # Errors
    /// When the file cannot be written, or the ZVM has not read it within 30 s.
    pub fn write_inventory(&self, vms: &[Vm]) -> Result<()> {
        write_inventory(&self.folder, &self.datastore, vms)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let shown = self.zvm_json(&["inventory"])?.to_string();
            if vms.iter().all(|vm| shown.contains(&vm.uuid)) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the ZVM has not read the inventory within 30 s: {shown}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Runs a `zvm` command.
    ///
    /// # Errors
    /// What it said.
    pub fn zvm(&self, arguments: &[&str]) -> Result<String> {
        self.binaries.run("zvm", &[&["--config", &self.zvm_config()], arguments].concat())
    }

    /// Runs a `zvm` command and reads the JSON that it prints.
    ///
    /// # Errors
    /// What it said.
    pub fn zvm_json(&self, arguments: &[&str]) -> Result<Value> {
        self.binaries.json("zvm", &[&["--config", &self.zvm_config(), "--json"], arguments].concat())
    }

    /// Runs a `vra` command against one side.
    ///
    /// # Errors
    /// What it said.
    pub fn vra(&self, side: Side, arguments: &[&str]) -> Result<String> {
        let config = vra_config(&self.folder, side).display().to_string();
        self.binaries.run("vra", &[&["--config", &config], arguments].concat())
    }

    /// Runs a `vra` command against one side and reads the JSON that it prints.
    ///
    /// # Errors
    /// What it said.
    pub fn vra_json(&self, side: Side, arguments: &[&str]) -> Result<Value> {
        let config = vra_config(&self.folder, side).display().to_string();
        self.binaries.json("vra", &[&["--config", &config, "--json"], arguments].concat())
    }

    /// Where the target keeps journals and recovery disks.
    pub fn datastore(&self) -> &Path {
        &self.datastore
    }

    /// `kill -9` of a VRA.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn kill(&mut self, side: Side) -> Result<()> {
        self.running(side)?.kill()
    }

    /// `kill -9` of the ZVM.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn kill_zvm(&mut self) -> Result<()> {
        self.zvm.take().context("the ZVM isn't running")?.kill()
    }

    /// Lets the ZVM do nothing any more, until it is killed.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn pause_zvm(&self) -> Result<()> {
        self.zvm.as_ref().context("the ZVM isn't running")?.pause()
    }

    /// Starts the ZVM, and waits until it answers.
    ///
    /// # Errors
    /// When it runs already, or doesn't come up, with the end of its log.
    pub fn start_zvm(&mut self) -> Result<()> {
        ensure!(self.zvm.is_none(), "the ZVM runs already");
        let (config, log) = (self.zvm_config(), self.folder.join("zvm.log"));
        let mut zvm =
            Daemon::start("zvm", &self.binaries.path("zvm"), &["--config", &config, "serve"], &log)?;
        zvm.wait_until(60, || self.zvm(&["status"]).is_ok())?;
        self.zvm = Some(zvm);
        Ok(())
    }

    /// Starts a `zvm` command whose end is the caller's to wait for.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn begin_zvm(&self, arguments: &[&str]) -> Result<Child> {
        self.binaries.start("zvm", &[&["--config", &self.zvm_config()], arguments].concat())
    }

    /// The folder that a VRA has for itself: its configuration, `run` and `state`.
    pub fn vra_folder(&self, side: Side) -> PathBuf {
        self.folder.join(side.name())
    }

    /// Starts a VRA that was killed or stopped, and waits until it answers.
    ///
    /// # Errors
    /// When it runs already, or doesn't come up, with the end of its log.
    pub fn start_vra(&mut self, side: Side) -> Result<()> {
        ensure!(self.vras[side as usize].is_none(), "{} runs already", side.name());
        let config = vra_config(&self.folder, side).display().to_string();
        let log = self.folder.join(format!("{}.log", side.name()));
        let program = self.binaries.path("vra");
        let mut vra = Daemon::start(side.name(), &program, &["--config", &config, "serve"], &log)?;
        vra.wait_until(60, || self.binaries.run("vra", &["--config", &config, "status"]).is_ok())?;
        self.vras[side as usize] = Some(vra);
        Ok(())
    }

    /// Asks a VRA to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it isn't running, or doesn't end by itself.
    pub fn stop_vra(&mut self, side: Side) -> Result<()> {
        self.running(side)?.stop()
    }

    /// Cuts (`true`) or joins the line over which everybody reaches the target.
    ///
    /// # Errors
    /// When the site has no relay.
    pub fn cut(&self, cut: bool) -> Result<()> {
        self.relay.as_ref().context("the site was set up without a relay")?.cut(cut);
        Ok(())
    }

    /// Ends all processes in order.
    ///
    /// # Errors
    /// When one doesn't end by itself.
    pub fn stop(&mut self) -> Result<()> {
        for vra in &mut self.vras {
            vra.take().map_or(Ok(()), Daemon::stop)?;
        }
        self.zvm.take().map_or(Ok(()), Daemon::stop)
    }

    fn running(&mut self, side: Side) -> Result<Daemon> {
        self.vras[side as usize].take().with_context(|| format!("{} isn't running", side.name()))
    }

    fn zvm_config(&self) -> String {
        self.folder.join("zvm/zvm.toml").display().to_string()
    }

    fn enrol(&self, side: Side, zvm_port: u16) -> Result<()> {
        let token = self.zvm_json(&["vra", "token", "create", "--name", side.name()])?;
        let token = find(&token, "token").and_then(Value::as_str).context("the ZVM printed no token")?;
        let path = self.folder.join(format!("{}.token", side.name()));
        create_secret(&path)?.write_all(token.as_bytes()).context("write the token")?;
        self.binaries.run(
            "vra",
            &[
                "--config",
                &vra_config(&self.folder, side).to_string_lossy(),
                "enroll",
                "--zvm",
                &format!("127.0.0.1:{zvm_port}"),
                "--token-file",
                &path.to_string_lossy(),
            ],
        )?;
        fs::remove_file(&path).context("remove the token")
    }
}
