//! Whether VMs could be recovered as their user wants it: hosts and networks are looked up, addresses and limits checked.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Component, Path};

use vra::api::{ApiError, ErrorCode, VmId};

use super::{bad, check_range};
use crate::inventory::{Inventory, Vm};
use crate::manager::check_name;
use crate::model::kept::{KeptSettings, MAX_KEPT_BYTES};
use crate::model::recovery::{
    GroupRecovery, IpChoice, MacChoice, NicRecovery, RecoveryPlace, Script, StaticIp, VmRecovery,
};
use crate::model::vpg::VpgSettings;
use crate::units::format_bytes;

const MAX_BOOT_GROUPS: usize = 32;
const BOOT_DELAY_S: std::ops::RangeInclusive<u32> = 0..=86_400;
const SCRIPT_TIMEOUT_S: std::ops::RangeInclusive<u32> = 1..=86_400;
const MAX_ARGUMENTS: usize = 64;
/// Longest path, argument or folder, bytes.
const MAX_TEXT_BYTES: usize = 1_024;
const MAX_NAME_SERVERS: usize = 3;

/// Where a VM would be recovered.
pub(super) struct Goal<'a> {
    pub(super) vm: &'a Vm,
    /// Name of the VRA that keeps its journal.
    pub(super) target: &'a str,
    /// The target's folder.
    pub(super) datastore: &'a Path,
    pub(super) inventory: &'a Inventory,
}

/// Checks what goes for a group, but where its VMs go: that is each VM's.
pub(super) fn check_group(recovery: &GroupRecovery) -> Result<(), ApiError> {
    let groups = &recovery.boot_groups;
    if groups.len() > MAX_BOOT_GROUPS {
        return Err(bad(format!("there are {} boot groups; {MAX_BOOT_GROUPS} are possible", groups.len())));
    }
    let mut names = HashSet::new();
    for group in groups {
        check_name("boot group", &group.name)?;
        check_range(
            &format!("the delay after boot group {:?}", group.name),
            group.delay_s,
            &BOOT_DELAY_S,
            "s",
        )?;
        if !names.insert(&group.name) {
            return Err(bad(format!("boot group {:?} is there twice", group.name))
                .remedy("give each boot group a name of its own"));
        }
    }
    let scripts = [("pre-recovery", &recovery.pre_script), ("post-recovery", &recovery.post_script)];
    scripts
        .into_iter()
        .try_for_each(|(what, script)| script.iter().try_for_each(|script| check_script(what, script)))
}

fn check_script(what: &str, script: &Script) -> Result<(), ApiError> {
    let command = script.command.to_string_lossy();
    if !script.command.is_absolute() || !is_text(&command) {
        return Err(bad(format!("the command of the {what} script, {command:?}, is not an absolute path"))
            .remedy("name the program by its absolute path at the manager, its arguments apart"));
    }
    if script.arguments.len() > MAX_ARGUMENTS {
        let count = script.arguments.len();
        return Err(bad(format!("the {what} script has {count} arguments; {MAX_ARGUMENTS} are possible")));
    }
    if let Some(argument) =
        script.arguments.iter().find(|argument| !argument.is_empty() && !is_text(argument))
    {
        let start: String = argument.chars().take(40).collect();
        return Err(bad(format!(
            "argument {start:?} of the {what} script has control characters or more than {MAX_TEXT_BYTES} bytes"
        )));
    }
    check_range(&format!("the timeout of the {what} script"), script.timeout_s, &SCRIPT_TIMEOUT_S, "s")
}

/// Checks what goes for one VM of a group.
pub(super) fn check_vm(goal: &Goal<'_>, own: &VmRecovery, group: &GroupRecovery) -> Result<(), ApiError> {
    let name = &goal.vm.name;
    let place = own.place.or(&group.place);
    let site = check_host(goal, &place)?;
    let networks = [("recovery network", &place.network), ("test network", &place.test_network)];
    for (what, network) in networks {
        if let Some(network) = network {
            check_network(goal, &format!("the {what} of VM {name:?}"), network, site)?;
        }
    }
    if let Some(folder) = &place.folder
        && !is_folder(folder)
    {
        return Err(bad(format!(
            "the recovery folder of VM {name:?}, {folder:?}, is not the name of a folder"
        ))
        .remedy("write names with `/` between them, as in dr/shop"));
    }
    if let Some(boot_group) = &own.boot_group
        && group.boot_groups.iter().all(|known| known.name != *boot_group)
    {
        let known: Vec<&str> = group.boot_groups.iter().map(|group| group.name.as_str()).collect();
        let remedy = match known.is_empty() {
            true => "the group has no boot groups: define them, or leave that out".to_owned(),
            false => format!("there are: {}", known.join(", ")),
        };
        let message =
            format!("VM {name:?} is to be started with boot group {boot_group:?}, which there isn't");
        return Err(bad(message).remedy(remedy));
    }
    let mut seen = HashSet::new();
    for nic in &own.nics {
        if !seen.insert(nic.mac.to_ascii_lowercase()) {
            return Err(bad(format!("network card {} of VM {name:?} is there twice", nic.mac)));
        }
        check_nic(goal, nic, site)?;
    }
    Ok(())
}

/// Gives the site that the VM is recovered at, if that can be told.
fn check_host<'a>(goal: &Goal<'a>, place: &RecoveryPlace) -> Result<Option<&'a str>, ApiError> {
    let Goal { vm, target, datastore, inventory } = *goal;
    let mut hosts_of_target = inventory.hosts_of_vra(target);
    let Some(name) = &place.host else {
        return Ok(hosts_of_target
            .next()
            .and_then(|host| inventory.host(host))
            .map(|host| host.site.as_str()));
    };
    let host = inventory.host(name).ok_or_else(|| {
        let message =
            format!("VM {:?} is to be recovered on host {name:?}, which isn't in the inventory", vm.name);
        ApiError::new(ErrorCode::NotFound, message).remedy("`zvm inventory` shows the hosts that there are")
    })?;
    let hosts_of_target: Vec<&str> = hosts_of_target.collect();
    let is_meant = |hosts: &[String]| hosts.iter().any(|host| hosts_of_target.contains(&host.as_str()));
    let mut datastores = inventory.datastores.iter();
    let datastore = datastores.find(|known| known.path == datastore && is_meant(&known.hosts));
    if let Some(datastore) = datastore.filter(|datastore| !datastore.hosts.contains(name)) {
        return Err(bad(format!(
            "VM {:?} is to be recovered on host {name:?}, which doesn't mount its datastore, {:?}",
            vm.name, datastore.name
        ))
        .remedy(format!("choose one of {}", datastore.hosts.join(", "))));
    }
    Ok(Some(&host.site))
}

fn check_network(goal: &Goal<'_>, what: &str, name: &str, site: Option<&str>) -> Result<(), ApiError> {
    let remedy = "`zvm inventory` shows the networks of each site";
    let network = goal.inventory.networks.iter().find(|network| network.name == name).ok_or_else(|| {
        let message = format!("{what}, {name:?}, isn't in the inventory");
        ApiError::new(ErrorCode::NotFound, message).remedy(remedy)
    })?;
    match site.filter(|site| *site != network.site) {
        None => Ok(()),
        Some(site) => Err(bad(format!(
            "{what}, {name:?}, is at site {:?}, but the VM is recovered at site {site:?}",
            network.site
        ))
        .remedy(remedy)),
    }
}

fn check_nic(goal: &Goal<'_>, nic: &NicRecovery, site: Option<&str>) -> Result<(), ApiError> {
    let vm = goal.vm;
    if !vm.nics.iter().any(|known| known.mac.eq_ignore_ascii_case(&nic.mac)) {
        let known: Vec<&str> = vm.nics.iter().map(|nic| nic.mac.as_str()).collect();
        let message = format!("VM {:?} has no network card {:?} in the inventory", vm.name, nic.mac);
        return Err(ApiError::new(ErrorCode::NotFound, message).remedy(match known.is_empty() {
            true => "it has none: leave that out, or correct the inventory".to_owned(),
            false => format!("it has {}", known.join(", ")),
        }));
    }
    for (when, place) in nic.places() {
        let what = format!("of network card {} of VM {:?} in a {when}", nic.mac, vm.name);
        if let Some(network) = &place.network {
            check_network(goal, &format!("the network {what}"), network, site)?;
        }
        if let Some(IpChoice::Static(ip)) = &place.ip {
            check_ip(&what, ip)?;
        }
    }
    Ok(())
}

fn check_ip(what: &str, ip: &StaticIp) -> Result<(), ApiError> {
    let StaticIp { address, prefix, gateway, ref dns } = *ip;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    if !is_of_one(address) {
        return Err(bad(format!("the address {what}, {address}, is not one that a machine can have")));
    }
    check_range(&format!("the prefix {what}"), prefix, &(1..=bits), "bits")?;
    if let Some(gateway) = gateway {
        let is_beside = network_of(gateway, prefix) == network_of(address, prefix) || prefix == bits;
        if gateway.is_ipv4() != address.is_ipv4() || gateway == address || !is_of_one(gateway) || !is_beside {
            return Err(bad(format!("the gateway {what}, {gateway}, is not beside {address}/{prefix}"))
                .remedy("give a gateway in the address's network, another one than the address"));
        }
    }
    if dns.len() > MAX_NAME_SERVERS {
        return Err(bad(format!(
            "there are {} name servers {what}; {MAX_NAME_SERVERS} are possible",
            dns.len()
        )));
    }
    match dns.iter().find(|server| !is_of_one(**server)) {
        Some(server) => {
            Err(bad(format!("the name server {what}, {server}, is not one that a machine can have")))
        }
        None => Ok(()),
    }
}

/// Whether it can be the address of one machine on a network.
fn is_of_one(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !(address.is_unspecified() || address.is_multicast() || address.is_loopback() || is_broadcast)
}

fn network_of(address: IpAddr, prefix: u8) -> u128 {
    let (bits, address) = match address {
        IpAddr::V4(address) => (32, u128::from(address.to_bits())),
        IpAddr::V6(address) => (128, address.to_bits()),
    };
    address.checked_shr(bits - u32::from(prefix).min(bits)).unwrap_or(0)
}

/// Checks the VMs of a group against each other, and that all of it can be kept.
pub(super) fn check_together(vpg: &str, settings: &VpgSettings) -> Result<(), ApiError> {
    let mut macs: HashSet<(&str, &str)> = HashSet::new();
    let mut addresses: HashSet<(&str, Option<String>, IpAddr)> = HashSet::new();
    for member in &settings.vms {
        let group_place = member.recovery.place.or(&settings.recovery.place);
        for (when, nic) in member.recovery.nics.iter().flat_map(NicRecovery::places) {
            if let MacChoice::Given(mac) = &nic.mac
                && !macs.insert((when, mac))
            {
                return Err(twice(&member.name, member.vm, when, mac));
            }
            if let Some(IpChoice::Static(ip)) = &nic.ip {
                let of_place = if when == "test" { &group_place.test_network } else { &group_place.network };
                let network = nic.network.as_ref().or(of_place.as_ref()).cloned();
                if !addresses.insert((when, network, ip.address)) {
                    return Err(twice(&member.name, member.vm, when, &ip.address.to_string()));
                }
            }
        }
    }
    let kept_bytes = KeptSettings::of(settings).to_json().to_string().len();
    if kept_bytes > MAX_KEPT_BYTES {
        return Err(bad(format!(
            "the recovery settings of VPG {vpg:?} take {}; there is room for {} in its journals",
            format_bytes(kept_bytes as u64),
            format_bytes(MAX_KEPT_BYTES as u64)
        ))
        .remedy("say once for the group what goes for many VMs, or make several groups of it"));
    }
    Ok(())
}

fn twice(name: &str, vm: VmId, when: &str, what: &str) -> ApiError {
    bad(format!("{what} is given to two network cards in a {when}, one of them of VM {name:?} ({vm})"))
        .remedy("give each card an address of its own")
}

fn is_folder(folder: &str) -> bool {
    let mut parts = Path::new(folder).components();
    is_text(folder) && !folder.contains("//") && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn is_text(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_TEXT_BYTES && !text.contains(char::is_control)
}
