//! `zvm inventory`: what there is, as a tree or a table, whole or in part.

use std::fmt::Write;

use crate::api::{Client, InventoryState, Request, Response};
use crate::inventory::{HostState, Inventory, Vm};
use crate::units::format_bytes;

use super::ask::Ask;
use super::table::Table;
use super::{Failure, show};

/// What to show, and how.
#[derive(Debug, Default, clap::Args)]
pub(super) struct InventoryArgs {
    /// A line for each VM instead of a tree.
    #[arg(long)]
    table: bool,
    /// Only what is at this site.
    #[arg(long)]
    site: Option<String>,
    /// Only this host and what is on it.
    #[arg(long)]
    host: Option<String>,
    /// Only VMs whose name has this in it, or whose UUID this is.
    #[arg(long, value_name = "TEXT")]
    vm: Option<String>,
}

impl Ask<'_> {
    pub(super) async fn inventory(&self, args: InventoryArgs) -> Result<(), Failure> {
        let mut client = Client::connect(&self.config.socket).await?;
        let Response::Inventory(mut state) = client.call(Request::Inventory).await? else {
            return Err(Failure::Unexpected);
        };
        args.filter(&mut state.inventory);
        let text = if args.table { table } else { tree };
        Ok(show::out(&state, self.json, text)?)
    }
}

impl InventoryArgs {
    fn filter(&self, inventory: &mut Inventory) {
        let is_site = |site: &str| self.site.as_deref().is_none_or(|wanted| wanted == site);
        inventory.sites.retain(|site| is_site(&site.name));
        inventory.clusters.retain(|cluster| is_site(&cluster.site));
        inventory.networks.retain(|network| is_site(&network.site));
        inventory.hosts.retain(|host| {
            is_site(&host.site) && self.host.as_deref().is_none_or(|wanted| wanted == host.name)
        });
        let hosts: Vec<String> = inventory.hosts.iter().map(|host| host.name.clone()).collect();
        let is_on = |names: &[String]| names.iter().any(|name| hosts.contains(name));
        if self.host.is_some() {
            inventory.networks.retain(|network| is_on(&network.hosts));
        }
        if self.host.is_some() || self.site.is_some() {
            inventory.datastores.retain(|datastore| is_on(&datastore.hosts));
            inventory.vms.retain(|vm| hosts.contains(&vm.host));
        }
        if let Some(wanted) = &self.vm {
            inventory.vms.retain(|vm| vm.name.contains(wanted.as_str()) || vm.uuid.to_string() == *wanted);
        }
    }
}

fn table(state: &InventoryState) -> String {
    let mut table = Table::new(["VM", "HOST", "POWER", "DISKS", "SIZE", "NETWORKS", "UUID"]);
    for vm in &state.inventory.vms {
        let mut networks: Vec<&str> = vm.nics.iter().map(|nic| nic.network.as_str()).collect();
        networks.retain(|network| !network.is_empty());
        networks.dedup();
        let networks = if networks.is_empty() { "-".into() } else { networks.join(", ") };
        table.row([
            vm.name.clone(),
            vm.host.clone(),
            vm.power.to_string(),
            vm.disks.len().to_string(),
            size(vm),
            networks,
            vm.uuid.to_string(),
        ]);
    }
    let text = if table.is_empty() { "No VMs.\n".into() } else { table.render() };
    failures(state) + &text
}

/// The sum of a VM's disks, as far as their sizes are known.
fn size(vm: &Vm) -> String {
    let known: Vec<u64> = vm.disks.iter().filter_map(|disk| disk.size_bytes).collect();
    let sum = format_bytes(known.iter().fold(0, |sum, size| sum.saturating_add(*size)));
    if known.len() == vm.disks.len() { sum } else { format!("{sum} or more") }
}

fn failures(state: &InventoryState) -> String {
    let mut text = String::new();
    for source in &state.sources {
        if let Some(error) = &source.error {
            let _ = writeln!(text, "The newest reading of {} failed: {}", clean(&source.from), clean(error));
        }
    }
    text
}

pub(super) fn tree(state: &InventoryState) -> String {
    let inventory = &state.inventory;
    let mut text = String::new();
    for source in &state.sources {
        let read =
            source.read_us.map_or_else(|| "not read yet".to_owned(), |read_us| format!("read {read_us}"));
        let _ = writeln!(text, "From {}, {read}", clean(&source.from));
    }
    text += &failures(state);
    for site in &inventory.sites {
        let _ = writeln!(text, "\nSite {}", clean(&site.name));
        for host in inventory.hosts.iter().filter(|host| host.site == site.name) {
            let state =
                if host.state == HostState::Connected { String::new() } else { format!(", {}", host.state) };
            let cluster = host
                .cluster
                .as_ref()
                .map(|cluster| format!(", cluster {}", clean(cluster)))
                .unwrap_or_default();
            let _ = writeln!(text, "  Host {} (VRA {}{cluster}{state})", clean(&host.name), clean(&host.vra));
            for vm in inventory.vms.iter().filter(|vm| vm.host == host.name) {
                vm_lines(&mut text, vm);
            }
            for datastore in
                inventory.datastores.iter().filter(|datastore| datastore.hosts.contains(&host.name))
            {
                let space = match (datastore.free_bytes, datastore.capacity_bytes) {
                    (Some(free), Some(capacity)) => {
                        format!(", {} of {} free", format_bytes(free), format_bytes(capacity))
                    }
                    _ => String::new(),
                };
                let path = datastore.path.display().to_string();
                let _ = writeln!(text, "    Datastore {} {}{space}", clean(&datastore.name), clean(&path));
            }
        }
        for network in inventory.networks.iter().filter(|network| network.site == site.name) {
            let _ = writeln!(text, "  Network {}", clean(&network.name));
        }
    }
    text
}

fn vm_lines(text: &mut String, vm: &Vm) {
    let _ = writeln!(text, "    VM {} {} ({})", clean(&vm.name), vm.uuid, vm.power);
    for disk in &vm.disks {
        let size = disk.size_bytes.map(|size| format!(", {}", format_bytes(size))).unwrap_or_default();
        let kind = disk.kind.obstacle().map(|_| format!(", {}", disk.kind)).unwrap_or_default();
        let path = disk.path.display().to_string();
        let _ = writeln!(text, "      Disk {} {}{size}{kind}", clean(&disk.name), clean(&path));
    }
    for nic in &vm.nics {
        let network = if nic.network.is_empty() { "no network" } else { &nic.network };
        let _ = writeln!(text, "      NIC {} on {}", clean(&nic.mac), clean(network));
    }
}

/// A name from elsewhere must not break lines or drive the terminal.
fn clean(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
