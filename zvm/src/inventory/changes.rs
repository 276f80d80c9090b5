//! What is different between two readings, as one change for each thing that happened. No I/O.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use uuid::Uuid;
use vra::api::VmId;

use super::{Datastore, Disk, Host, HostState, Inventory, Network, Nic, Origin, Power, Vm};
use crate::model::event::{Entity, EventKind};
use crate::units::format_bytes;

/// Something that happened between two readings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A host came.
    HostAdded(Host),
    /// A host is no longer told of.
    HostRemoved(Host),
    /// A host has another name.
    HostRenamed {
        /// The host now.
        host: Host,
        /// Its name before.
        from: String,
    },
    /// A host began or ceased to answer, or its maintenance did.
    HostStateChanged {
        /// The host now.
        host: Host,
        /// Its state before.
        from: HostState,
    },
    /// A network came.
    NetworkAdded(Network),
    /// A network is gone.
    NetworkRemoved(Network),
    /// Hosts have a network, or don't any more.
    NetworkHostsChanged {
        /// The network now.
        network: Network,
        /// Which.
        hosts: HostsChange,
    },
    /// A network has another name.
    NetworkRenamed {
        /// The network now.
        network: Network,
        /// Its name before.
        from: String,
    },
    /// A datastore came.
    DatastoreAdded(Datastore),
    /// A datastore is gone.
    DatastoreRemoved(Datastore),
    /// Hosts mount a datastore, or don't any more.
    DatastoreHostsChanged {
        /// The datastore now.
        datastore: Datastore,
        /// Which.
        hosts: HostsChange,
    },
    /// Something happened to a VM.
    Vm {
        /// What it is matched by.
        uuid: Uuid,
        /// Its name now; of one that is gone the last one.
        name: String,
        /// What happened.
        change: VmChange,
    },
}

/// Hosts that something came to and went from, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostsChange {
    /// They have it now.
    pub came: Vec<String>,
    /// They had it.
    pub went: Vec<String>,
}

/// Something that happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmChange {
    /// It came.
    Added {
        /// The host that it is on.
        host: String,
    },
    /// It is gone.
    Removed {
        /// The host that it was on.
        host: String,
    },
    /// It has another name.
    Renamed {
        /// The name before.
        from: String,
    },
    /// It is on another host.
    Moved {
        /// The host before.
        from: String,
        /// The host now.
        to: String,
    },
    /// It was started, stopped or paused.
    PowerChanged {
        /// Its power before.
        from: Power,
        /// Its power now.
        to: Power,
    },
    /// It got a disk.
    DiskAdded(Disk),
    /// It lost a disk.
    DiskRemoved(Disk),
    /// A disk has another size.
    DiskResized {
        /// The disk now.
        disk: Disk,
        /// Its size before, in bytes.
        from_bytes: u64,
    },
    /// A disk lies elsewhere, or is another kind of thing there.
    DiskReplaced {
        /// The disk now.
        disk: Disk,
        /// Its path before.
        from: PathBuf,
    },
    /// It got a network card.
    NicAdded(Nic),
    /// It lost a network card.
    NicRemoved(Nic),
    /// A network card is plugged into another network.
    NicMoved {
        /// The card now.
        nic: Nic,
        /// The network before.
        from: String,
    },
}

/// What happened between two readings: hosts, networks and datastores first, then VMs.
pub fn between(before: &Inventory, after: &Inventory) -> Vec<Change> {
    let mut found = Vec::new();
    hosts(before, after, &mut found);
    networks(before, after, &mut found);
    datastores(before, after, &mut found);
    vms(before, after, &mut found);
    found
}

fn hosts(before: &Inventory, after: &Inventory, found: &mut Vec<Change>) {
    for pair in pairs_of_named(&before.hosts, &after.hosts, |host| host.name.clone(), |host| &host.origin) {
        match pair {
            Pair::Came(host) => found.push(Change::HostAdded(host.clone())),
            Pair::Went(host) => found.push(Change::HostRemoved(host.clone())),
            Pair::Stayed(before, after) => {
                if before.name != after.name {
                    found.push(Change::HostRenamed { host: after.clone(), from: before.name.clone() });
                }
                if before.state != after.state {
                    found.push(Change::HostStateChanged { host: after.clone(), from: before.state });
                }
            }
        }
    }
}

fn networks(before: &Inventory, after: &Inventory, found: &mut Vec<Change>) {
    let name = |network: &Network| [network.site.clone(), network.name.clone()];
    for pair in pairs_of_named(&before.networks, &after.networks, name, |network| &network.origin) {
        match pair {
            Pair::Came(network) => found.push(Change::NetworkAdded(network.clone())),
            Pair::Went(network) => found.push(Change::NetworkRemoved(network.clone())),
            Pair::Stayed(before, after) => {
                if before.name != after.name {
                    found.push(Change::NetworkRenamed { network: after.clone(), from: before.name.clone() });
                }
                if let Some(hosts) = HostsChange::between(&before.hosts, &after.hosts) {
                    found.push(Change::NetworkHostsChanged { network: after.clone(), hosts });
                }
            }
        }
    }
}

/// By name: that is what a VPG's definition and the user call a datastore, and a renamed one is another for both.
fn datastores(before: &Inventory, after: &Inventory, found: &mut Vec<Change>) {
    for pair in pairs(&before.datastores, &after.datastores, |datastore| datastore.name.clone()) {
        match pair {
            Pair::Came(datastore) => found.push(Change::DatastoreAdded(datastore.clone())),
            Pair::Went(datastore) => found.push(Change::DatastoreRemoved(datastore.clone())),
            Pair::Stayed(before, after) => {
                if let Some(hosts) = HostsChange::between(&before.hosts, &after.hosts) {
                    found.push(Change::DatastoreHostsChanged { datastore: after.clone(), hosts });
                }
            }
        }
    }
}

fn vms(before: &Inventory, after: &Inventory, found: &mut Vec<Change>) {
    for pair in pairs(&before.vms, &after.vms, |vm| vm.uuid) {
        let (vm, changes) = match pair {
            Pair::Came(vm) => (vm, vec![VmChange::Added { host: vm.host.clone() }]),
            Pair::Went(vm) => (vm, vec![VmChange::Removed { host: vm.host.clone() }]),
            Pair::Stayed(before, after) => (after, vm_changes(before, after)),
        };
        let named = |change| Change::Vm { uuid: vm.uuid, name: vm.name.clone(), change };
        found.extend(changes.into_iter().map(named));
    }
}

fn vm_changes(before: &Vm, after: &Vm) -> Vec<VmChange> {
    let mut found = Vec::new();
    if before.name != after.name {
        found.push(VmChange::Renamed { from: before.name.clone() });
    }
    if before.host != after.host {
        found.push(VmChange::Moved { from: before.host.clone(), to: after.host.clone() });
    }
    if before.power != after.power {
        found.push(VmChange::PowerChanged { from: before.power, to: after.power });
    }
    for pair in pairs(&before.disks, &after.disks, |disk| disk.name.clone()) {
        match pair {
            Pair::Came(disk) => found.push(VmChange::DiskAdded(disk.clone())),
            Pair::Went(disk) => found.push(VmChange::DiskRemoved(disk.clone())),
            Pair::Stayed(before, after) => {
                if (&before.path, before.kind) != (&after.path, after.kind) {
                    found.push(VmChange::DiskReplaced { disk: after.clone(), from: before.path.clone() });
                }
                // A size that could not be read for a while is no change.
                if let (Some(from_bytes), Some(to_bytes)) = (before.size_bytes, after.size_bytes)
                    && from_bytes != to_bytes
                {
                    found.push(VmChange::DiskResized { disk: after.clone(), from_bytes });
                }
            }
        }
    }
    for pair in pairs(&before.nics, &after.nics, |nic| nic.mac.clone()) {
        match pair {
            Pair::Came(nic) => found.push(VmChange::NicAdded(nic.clone())),
            Pair::Went(nic) => found.push(VmChange::NicRemoved(nic.clone())),
            Pair::Stayed(before, after) if before.network != after.network => {
                found.push(VmChange::NicMoved { nic: after.clone(), from: before.network.clone() });
            }
            Pair::Stayed(..) => {}
        }
    }
    found
}

/// An object in one reading, the other, or both.
enum Pair<'a, T> {
    Came(&'a T),
    Went(&'a T),
    Stayed(&'a T, &'a T),
}

/// By name; those whose name is only in one of the readings, by their source's id. A network that several hosts have goes by the id
/// that the first of them gives it, which changes when that host no longer has it.
fn pairs_of_named<'a, T, K: Ord>(
    before: &'a [T],
    after: &'a [T],
    name: impl Fn(&T) -> K,
    origin: impl Fn(&T) -> &Origin,
) -> Vec<Pair<'a, T>> {
    let mut found = pairs(before, after, name);
    for at in (0..found.len()).rev() {
        let Pair::Went(went) = found[at] else { continue };
        let is_renamed = |pair: &Pair<'_, T>| matches!(pair, Pair::Came(came) if origin(came) == origin(went) && !origin(went).id.is_empty());
        if let Some(other) = found.iter().position(is_renamed)
            && let Pair::Came(came) = found[other]
        {
            found[other] = Pair::Stayed(went, came);
            found.remove(at);
        }
    }
    found
}

fn pairs<'a, T, K: Ord>(before: &'a [T], after: &'a [T], key: impl Fn(&T) -> K) -> Vec<Pair<'a, T>> {
    let mut by_key: BTreeMap<K, (Option<&T>, Option<&T>)> = BTreeMap::new();
    for object in before {
        by_key.entry(key(object)).or_default().0 = Some(object);
    }
    for object in after {
        by_key.entry(key(object)).or_default().1 = Some(object);
    }
    let pair = |both| match both {
        (Some(before), Some(after)) => Some(Pair::Stayed(before, after)),
        (Some(before), None) => Some(Pair::Went(before)),
        (None, Some(after)) => Some(Pair::Came(after)),
        (None, None) => None,
    };
    by_key.into_values().filter_map(pair).collect()
}

impl HostsChange {
    /// What is different between two lists; nothing if they hold the same.
    fn between(before: &[String], after: &[String]) -> Option<Self> {
        let missing = |from: &[String], of: &[String]| -> Vec<String> {
            of.iter().filter(|host| !from.contains(host)).cloned().collect()
        };
        let change = Self { came: missing(before, after), went: missing(after, before) };
        (change != Self::default()).then_some(change)
    }
}

impl Change {
    /// The kind of event that tells of it.
    pub fn event_kind(&self) -> EventKind {
        match self {
            Self::HostAdded(_) => EventKind::HostAdded,
            Self::HostRemoved(_) => EventKind::HostRemoved,
            Self::HostRenamed { .. } => EventKind::HostRenamed,
            Self::HostStateChanged { .. } => EventKind::HostStateChanged,
            Self::NetworkAdded(_) => EventKind::NetworkAdded,
            Self::NetworkRemoved(_) => EventKind::NetworkRemoved,
            Self::NetworkRenamed { .. } => EventKind::NetworkRenamed,
            Self::NetworkHostsChanged { .. } => EventKind::NetworkHostsChanged,
            Self::DatastoreAdded(_) => EventKind::DatastoreAdded,
            Self::DatastoreRemoved(_) => EventKind::DatastoreRemoved,
            Self::DatastoreHostsChanged { .. } => EventKind::DatastoreHostsChanged,
            Self::Vm { change, .. } => match change {
                VmChange::Added { .. } => EventKind::VmAdded,
                VmChange::Removed { .. } => EventKind::VmRemoved,
                VmChange::Renamed { .. } => EventKind::VmRenamed,
                VmChange::Moved { .. } => EventKind::VmMoved,
                VmChange::PowerChanged { .. } => EventKind::VmPowerChanged,
                VmChange::DiskAdded(_) => EventKind::DiskAdded,
                VmChange::DiskRemoved(_) => EventKind::DiskRemoved,
                VmChange::DiskResized { .. } => EventKind::DiskResized,
                VmChange::DiskReplaced { .. } => EventKind::DiskReplaced,
                VmChange::NicAdded(_) => EventKind::NicAdded,
                VmChange::NicRemoved(_) => EventKind::NicRemoved,
                VmChange::NicMoved { .. } => EventKind::NicMoved,
            },
        }
    }

    /// What it happened to.
    pub fn entity(&self) -> Entity {
        match self {
            Self::HostAdded(host)
            | Self::HostRemoved(host)
            | Self::HostRenamed { host, .. }
            | Self::HostStateChanged { host, .. } => Entity::host(&host.name),
            Self::NetworkAdded(network)
            | Self::NetworkRemoved(network)
            | Self::NetworkRenamed { network, .. }
            | Self::NetworkHostsChanged { network, .. } => Entity::network(&network.name),
            Self::DatastoreAdded(datastore)
            | Self::DatastoreRemoved(datastore)
            | Self::DatastoreHostsChanged { datastore, .. } => Entity::datastore(&datastore.name),
            Self::Vm { uuid, .. } => Entity::vm(VmId(*uuid)),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostAdded(host) => write!(f, "host {} of site {} came", host.name, host.site),
            Self::HostRemoved(host) => write!(f, "host {} of site {} is gone", host.name, host.site),
            Self::HostRenamed { host, from } => write!(f, "host {from} is now named {}", host.name),
            Self::HostStateChanged { host, from } => {
                write!(f, "host {} went from {from} to {}", host.name, host.state)
            }
            Self::NetworkAdded(network) => {
                write!(f, "network {} of site {} came", network.name, network.site)
            }
            Self::NetworkRemoved(network) => {
                write!(f, "network {} of site {} is gone", network.name, network.site)
            }
            Self::NetworkRenamed { network, from } => {
                write!(f, "network {from} is now named {}", network.name)
            }
            Self::NetworkHostsChanged { network, hosts } => write!(f, "network {} {hosts}", network.name),
            Self::DatastoreHostsChanged { datastore, hosts } => {
                write!(f, "datastore {} {hosts}", datastore.name)
            }
            Self::DatastoreAdded(datastore) => {
                write!(f, "datastore {} at {} came", datastore.name, datastore.path.display())
            }
            Self::DatastoreRemoved(datastore) => {
                write!(f, "datastore {} at {} is gone", datastore.name, datastore.path.display())
            }
            Self::Vm { name, change, .. } => write!(f, "VM {name} {change}"),
        }
    }
}

impl fmt::Display for HostsChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |hosts: &[String]| hosts.join(", ");
        match (self.came.is_empty(), self.went.is_empty()) {
            (false, true) => write!(f, "came on host {}", names(&self.came)),
            (true, _) => write!(f, "is gone from host {}", names(&self.went)),
            (false, false) => {
                write!(f, "came on host {} and is gone from host {}", names(&self.came), names(&self.went))
            }
        }
    }
}

impl fmt::Display for VmChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size =
            |disk: &Disk| disk.size_bytes.map(|size| format!(", {}", format_bytes(size))).unwrap_or_default();
        match self {
            Self::Added { host } => write!(f, "came on host {host}"),
            Self::Removed { host } => write!(f, "is gone from host {host}"),
            Self::Renamed { from } => write!(f, "was named {from}"),
            Self::Moved { from, to } => write!(f, "moved from host {from} to {to}"),
            Self::PowerChanged { from, to } => write!(f, "went from {from} to {to}"),
            Self::DiskAdded(disk) => {
                write!(f, "got disk {} ({}{})", disk.name, disk.path.display(), size(disk))
            }
            Self::DiskRemoved(disk) => write!(f, "lost disk {} ({})", disk.name, disk.path.display()),
            Self::DiskResized { disk, from_bytes } => {
                write!(f, "has disk {} resized from {}{}", disk.name, format_bytes(*from_bytes), to(disk))
            }
            Self::DiskReplaced { disk, from } => {
                write!(
                    f,
                    "has disk {} at {} now, before at {}",
                    disk.name,
                    disk.path.display(),
                    from.display()
                )
            }
            Self::NicAdded(nic) => write!(f, "got NIC {} on {}", nic.mac, plugged(&nic.network)),
            Self::NicRemoved(nic) => write!(f, "lost NIC {}", nic.mac),
            Self::NicMoved { nic, from } => {
                write!(f, "has NIC {} moved from {} to {}", nic.mac, plugged(from), plugged(&nic.network))
            }
        }
    }
}

fn to(disk: &Disk) -> String {
    disk.size_bytes.map(|size| format!(" to {}", format_bytes(size))).unwrap_or_default()
}

fn plugged(network: &str) -> &str {
    if network.is_empty() { "no network" } else { network }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{DiskKind, Site};

    fn origin(id: &str) -> Origin {
        Origin { source: "lab".into(), id: id.into() }
    }

    fn host(name: &str) -> Host {
        Host {
            name: name.into(),
            site: "A".into(),
            cluster: None,
            vra: name.into(),
            state: HostState::Connected,
            origin: origin(name),
        }
    }

    fn disk(name: &str, size_bytes: u64) -> Disk {
        Disk {
            name: name.into(),
            path: format!("/images/{name}").into(),
            size_bytes: Some(size_bytes),
            kind: DiskKind::Raw,
            served: None,
            written_bytes: None,
        }
    }

    fn vm(number: u128) -> Vm {
        Vm {
            uuid: Uuid::from_u128(number),
            name: format!("vm{number}"),
            host: "h1".into(),
            power: Power::On,
            disks: vec![disk("vda", 1 << 30)],
            nics: vec![Nic { mac: "52:54:00:00:00:01".into(), network: "lan".into() }],
            origin: origin("1"),
        }
    }

    fn inventory() -> Inventory {
        Inventory {
            sites: vec![Site { name: "A".into() }],
            hosts: vec![host("h1"), host("h2")],
            networks: vec![Network {
                name: "lan".into(),
                site: "A".into(),
                hosts: vec!["h1".into(), "h2".into()],
                origin: origin("n1"),
            }],
            vms: vec![vm(1), vm(2)],
            ..Inventory::default()
        }
    }

    #[track_caller]
    fn told(change: impl FnOnce(&mut Inventory)) -> Vec<(EventKind, String)> {
        let before = inventory();
        let mut after = inventory();
        change(&mut after);
        between(&before, &after).into_iter().map(|change| (change.event_kind(), change.to_string())).collect()
    }

    #[test]
    fn each_change_of_a_vm_is_one_event() {
        assert_eq!(told(|_| {}), []);
        type Case = (fn(&mut Inventory), EventKind, &'static str);
        let cases: [Case; 12] = [
            (|all| all.vms[0].name = "db".into(), EventKind::VmRenamed, "VM db was named vm1"),
            (|all| all.vms[0].host = "h2".into(), EventKind::VmMoved, "VM vm1 moved from host h1 to h2"),
            (|all| all.vms[0].power = Power::Off, EventKind::VmPowerChanged, "VM vm1 went from on to off"),
            (
                |all| all.vms[0].disks.push(disk("vdb", 4096)),
                EventKind::DiskAdded,
                "VM vm1 got disk vdb (/images/vdb, 4 KiB)",
            ),
            (|all| all.vms[0].disks.clear(), EventKind::DiskRemoved, "VM vm1 lost disk vda (/images/vda)"),
            (
                |all| all.vms[0].disks[0].size_bytes = Some(2 << 30),
                EventKind::DiskResized,
                "VM vm1 has disk vda resized from 1 GiB to 2 GiB",
            ),
            (
                |all| all.vms[0].disks[0].path = "/new/vda".into(),
                EventKind::DiskReplaced,
                "VM vm1 has disk vda at /new/vda now, before at /images/vda",
            ),
            (
                |all| all.vms[0].nics[0].network = String::new(),
                EventKind::NicMoved,
                "VM vm1 has NIC 52:54:00:00:00:01 moved from lan to no network",
            ),
            (|all| all.vms[0].nics.clear(), EventKind::NicRemoved, "VM vm1 lost NIC 52:54:00:00:00:01"),
            (|all| drop(all.vms.remove(0)), EventKind::VmRemoved, "VM vm1 is gone from host h1"),
            (|all| all.vms.push(vm(3)), EventKind::VmAdded, "VM vm3 came on host h1"),
            (
                |all| all.hosts[1].state = HostState::NotResponding,
                EventKind::HostStateChanged,
                "host h2 went from connected to not-responding",
            ),
        ];
        for (change, kind, text) in cases {
            assert_eq!(told(change), [(kind, text.to_owned())]);
        }
    }

    #[test]
    fn a_network_that_another_host_still_has_stays() {
        let told = told(|all| {
            all.networks[0].origin = origin("n2");
            all.networks[0].hosts = vec!["h2".into()];
        });
        assert_eq!(told, [(EventKind::NetworkHostsChanged, "network lan is gone from host h1".to_owned())]);
    }

    #[test]
    fn a_size_that_cannot_be_read_is_no_change_and_objects_are_known_by_their_ids() {
        assert_eq!(told(|all| all.vms[0].disks[0].size_bytes = None), []);
        let renamed = told(|all| {
            all.hosts[0].name = "h9".into();
            all.networks[0].name = "dmz".into();
        });
        let kinds: Vec<EventKind> = renamed.into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [EventKind::HostRenamed, EventKind::NetworkRenamed]);
    }
}
