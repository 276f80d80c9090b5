//! A small site on one machine: a ZVM, a source VRA and a target VRA as an operator sets them up.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::process::{Binaries, Daemon};

/// Which VRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Where the VMs run.
    Source,
    /// Where their journals are.
    Target,
}

impl Side {
    /// The VRA's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Source => "host-a",
            Self::Target => "host-b",
        }
    }
}

/// The running processes and their folders.
pub(super) struct Site {
    binaries: Binaries,
    folder: PathBuf,
    zvm: Daemon,
    source: Option<Daemon>,
    target: Daemon,
}

/// A VM of the demo with its disks.
pub(super) struct Vm {
    /// Its name.
    pub name: &'static str,
    /// Its UUID.
    pub uuid: String,
    /// The raw files that hold its disks.
    pub disks: Vec<PathBuf>,
}

impl Site {
    /// Writes configurations, starts the ZVM, enrols and starts both VRAs.
    ///
    /// # Errors
    /// When a process doesn't come up, with the end of its log.
    pub(super) fn start(binaries: Binaries, folder: &Path) -> Result<Self> {
        let ports = free_udp_ports::<3>()?;
        let zvm_folder = folder.join("zvm");
        create_private(&zvm_folder)?;
        fs::write(
            zvm_folder.join("zvm.toml"),
            format!(
                "state_dir = \"{0}/state\"\nsocket = \"{0}/zvm.sock\"\nlisten = \"127.0.0.1:{1}\"\n\
                 [inventory]\nfile = \"{0}/inventory.toml\"\nreread_interval_ms = 500\n",
                zvm_folder.display(),
                ports[0]
            ),
        )
        .context("write the ZVM's configuration")?;
        fs::write(zvm_folder.join("inventory.toml"), "").context("write the inventory")?;
        let config = zvm_folder.join("zvm.toml").display().to_string();
        binaries.run("zvm", &["--config", &config, "init", "--name", "demo"])?;
        let mut zvm = Daemon::start(
            "zvm",
            &binaries.path("zvm"),
            &["--config", &config, "serve"],
            &folder.join("zvm.log"),
        )?;
        zvm.wait_until(60, || binaries.run("zvm", &["--config", &config, "status"]).is_ok())?;
        let mut vras = Vec::new();
        for (side, port) in [(Side::Source, ports[1]), (Side::Target, ports[2])] {
            write_vra_config(folder, side, port)?;
            enrol(&binaries, &config, folder, side, ports[0])?;
            vras.push(start_vra(&binaries, folder, side)?);
        }
        let target = vras.pop().context("two VRAs were started")?;
        Ok(Self { binaries, folder: folder.to_path_buf(), zvm, source: vras.pop(), target })
    }

    /// Tells the ZVM what there is to protect.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn write_inventory(&self, vms: &[Vm]) -> Result<()> {
        let mut text = String::from("[[site]]\nname = \"production\"\n[[site]]\nname = \"recovery\"\n");
        for (side, site) in [(Side::Source, "production"), (Side::Target, "recovery")] {
            text += &format!("[[host]]\nname = \"{0}\"\nsite = \"{site}\"\nvra = \"{0}\"\n", side.name());
        }
        text += &format!(
            "[[datastore]]\nname = \"recovery-store\"\nhosts = [\"{}\"]\npath = \"{}\"\n",
            Side::Target.name(),
            self.datastore().display()
        );
        for vm in vms {
            text += &format!(
                "[[vm]]\nname = \"{}\"\nuuid = \"{}\"\nhost = \"{}\"\n",
                vm.name,
                vm.uuid,
                Side::Source.name()
            );
            for (number, disk) in vm.disks.iter().enumerate() {
                text += &format!("[[vm.disk]]\nname = \"disk{number}\"\npath = \"{}\"\n", disk.display());
            }
        }
        let path = self.folder.join("zvm/inventory.toml");
        let fresh = self.folder.join("zvm/inventory.toml.new");
        fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &path)).context("write the inventory")
    }

    /// Runs a `zvm` command.
    ///
    /// # Errors
    /// What it said.
    pub(super) fn zvm(&self, arguments: &[&str]) -> Result<String> {
        let config = self.folder.join("zvm/zvm.toml").display().to_string();
        self.binaries.run("zvm", &[&["--config", &config], arguments].concat())
    }

    /// Runs a `zvm` command and reads the JSON that it prints.
    ///
    /// # Errors
    /// What it said.
    pub(super) fn zvm_json(&self, arguments: &[&str]) -> Result<Value> {
        let config = self.folder.join("zvm/zvm.toml").display().to_string();
        self.binaries.json("zvm", &[&["--config", &config, "--json"], arguments].concat())
    }

    /// Runs a `vra` command against one side and reads the JSON that it prints.
    ///
    /// # Errors
    /// What it said.
    pub(super) fn vra_json(&self, side: Side, arguments: &[&str]) -> Result<Value> {
        let config = vra_config(&self.folder, side).display().to_string();
        self.binaries.json("vra", &[&["--config", &config, "--json"], arguments].concat())
    }

    /// Where the target keeps journals and recovery disks.
    pub(super) fn datastore(&self) -> PathBuf {
        datastore(&self.folder)
    }

    /// The disaster: `kill -9` of the source VRA.
    ///
    /// # Errors
    /// When it isn't running any more.
    pub(super) fn kill_source(&mut self) -> Result<()> {
        self.source.take().context("the source VRA was killed already")?.kill()
    }

    /// Ends all processes in order.
    ///
    /// # Errors
    /// When one doesn't end by itself.
    pub(super) fn stop(self) -> Result<()> {
        self.source.map_or(Ok(()), Daemon::stop)?;
        self.target.stop()?;
        self.zvm.stop()
    }
}

fn write_vra_config(folder: &Path, side: Side, port: u16) -> Result<()> {
    let own = folder.join(side.name());
    create_private(&own)?;
    create_private(&datastore(folder))?;
    // Memory isn't locked: the demo's disks carry no part of this machine's own system.
    let text = format!(
        "name = \"{0}\"\nlisten = \"127.0.0.1:{port}\"\nadvertise = \"127.0.0.1:{port}\"\n\
         state_dir = \"{1}/state\"\nrun_dir = \"{1}/run\"\ndatastores = [\"{2}\"]\n\
         [memory]\nlock = false\narena_mib = {3}\nretained_per_vm_mib = {4}\n[doors]\ndepth = 32\n",
        side.name(),
        own.display(),
        datastore(folder).display(),
        ARENA_MIB,
        RETAINED_MIB
    );
    fs::write(vra_config(folder, side), text)
        .with_context(|| format!("write the configuration of {}", side.name()))
}

fn enrol(binaries: &Binaries, zvm_config: &str, folder: &Path, side: Side, zvm_port: u16) -> Result<()> {
    let token = binaries
        .json("zvm", &["--config", zvm_config, "--json", "vra", "token", "create", "--name", side.name()])?;
    let token = find_string(&token, "token").context("the ZVM printed no token")?;
    let path = folder.join(format!("{}.token", side.name()));
    let mut file = create_secret(&path)?;
    file.write_all(token.as_bytes()).context("write the token")?;
    let (config, path_text) = (vra_config(folder, side).display().to_string(), path.display().to_string());
    binaries.run(
        "vra",
        &[
            "--config",
            &config,
            "enroll",
            "--zvm",
            &format!("127.0.0.1:{zvm_port}"),
            "--token-file",
            &path_text,
        ],
    )?;
    fs::remove_file(&path).context("remove the token")
}

fn start_vra(binaries: &Binaries, folder: &Path, side: Side) -> Result<Daemon> {
    let config = vra_config(folder, side).display().to_string();
    let log = folder.join(format!("{}.log", side.name()));
    let mut vra = Daemon::start(side.name(), &binaries.path("vra"), &["--config", &config, "serve"], &log)?;
    vra.wait_until(60, || binaries.run("vra", &["--config", &config, "status"]).is_ok())?;
    Ok(vra)
}

/// The value of the first `key` with a string, however deep.
fn find_string(value: &Value, key: &str) -> Option<String> {
    match value {
        Value::Object(fields) => fields
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_owned)
            .or_else(|| fields.values().find_map(|field| find_string(field, key))),
        Value::Array(items) => items.iter().find_map(|item| find_string(item, key)),
        _ => None,
    }
}

fn vra_config(folder: &Path, side: Side) -> PathBuf {
    folder.join(side.name()).join("vra.toml")
}

fn datastore(folder: &Path) -> PathBuf {
    folder.join("recovery-store")
}

fn create_private(folder: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("create {}", folder.display()))
}

fn create_secret(path: &Path) -> Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("create {}", path.display()))
}

fn free_udp_ports<const N: usize>() -> Result<[u16; N]> {
    let sockets = (0..N)
        .map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<Result<Vec<_>, _>>()
        .context("find free UDP ports on loopback")?;
    let mut ports = [0; N];
    for (port, socket) in ports.iter_mut().zip(&sockets) {
        *port = socket.local_addr().context("address of a socket")?.port();
    }
    ensure!(ports.iter().all(|port| *port != 0), "no free UDP port on loopback");
    Ok(ports)
}

/// Memory for guest data of each VRA, in MiB: enough for the demo's load, little enough for the emulator.
const ARENA_MIB: u32 = 96;
/// Retained writes of a VM at most, in MiB.
const RETAINED_MIB: u32 = 32;
