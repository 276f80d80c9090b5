//! Folders, files and ports of a site.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Side, SiteSettings, Vm};

/// Where the configuration of a VRA is.
pub(super) fn vra_config(folder: &Path, side: Side) -> PathBuf {
    folder.join(side.name()).join("vra.toml")
}

/// Writes the configuration of a ZVM that listens on `port`, with an empty inventory, and returns its path.
pub(super) fn write_zvm_config(folder: &Path, port: u16) -> Result<PathBuf> {
    let own = folder.join("zvm");
    create_private(&own)?;
    let path = own.join("zvm.toml");
    fs::write(
        &path,
        format!(
            "state_dir = \"{0}/state\"\nsocket = \"{0}/zvm.sock\"\nlisten = \"127.0.0.1:{port}\"\n\
             [inventory]\nfile = \"{0}/inventory.toml\"\nreread_interval_ms = 500\n",
            own.display()
        ),
    )
    .context("write the ZVM's configuration")?;
    fs::write(own.join("inventory.toml"), "").context("write the inventory")?;
    Ok(path)
}

/// Writes the configuration of a VRA that listens on `port` and is reached at `advertised_port`, both on loopback.
pub(super) fn write_vra_config(
    folder: &Path,
    side: Side,
    port: u16,
    advertised_port: u16,
    datastore: &Path,
    settings: &SiteSettings,
) -> Result<()> {
    let own = folder.join(side.name());
    create_private(&own)?;
    create_private(datastore)?;
    // Memory isn't locked: the site's disks carry no part of this machine's own system.
    let text = format!(
        "name = \"{}\"\nlisten = \"127.0.0.1:{port}\"\nadvertise = \"127.0.0.1:{advertised_port}\"\n\
         state_dir = \"{1}/state\"\nrun_dir = \"{1}/run\"\ndatastores = [\"{2}\"]\n\
         [memory]\nlock = false\narena_mib = {3}\nretained_per_vm_mib = {4}\n\
         [doors]\nqueues = {5}\ndepth = 32\n[target]\nscratch_mib = {6}\n",
        side.name(),
        own.display(),
        datastore.display(),
        settings.arena_mib,
        settings.retained_per_vm_mib,
        settings.queues,
        settings.scratch_mib,
    );
    fs::write(vra_config(folder, side), text)
        .with_context(|| format!("write the configuration of {}", side.name()))
}

/// Replaces the ZVM's inventory.
pub(super) fn write_inventory(folder: &Path, datastore: &Path, vms: &[Vm]) -> Result<()> {
    let mut text = String::from("[[site]]\nname = \"production\"\n[[site]]\nname = \"recovery\"\n");
    for (side, site) in [(Side::Source, "production"), (Side::Target, "recovery")] {
        text += &format!("[[host]]\nname = \"{0}\"\nsite = \"{site}\"\nvra = \"{0}\"\n", side.name());
    }
    text += &format!(
        "[[datastore]]\nname = \"recovery-store\"\nhosts = [\"{}\"]\npath = \"{}\"\n",
        Side::Target.name(),
        datastore.display()
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
    let path = folder.join("zvm/inventory.toml");
    let fresh = folder.join("zvm/inventory.toml.new");
    fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &path)).context("write the inventory")
}

/// Creates a file that only its owner may read.
pub(super) fn create_secret(path: &Path) -> Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("create {}", path.display()))
}

/// Ports of loopback that nothing uses now.
pub(super) fn free_udp_ports<const N: usize>() -> Result<[u16; N]> {
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

fn create_private(folder: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("create {}", folder.display()))
}
