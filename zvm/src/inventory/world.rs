//! All sources' readings as one inventory, and what happened between them. No I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use uuid::Uuid;

use super::changes::{self, Change, VmChange};
use super::{Datastore, Host, HostState, Inventory, Network, Power, Vm};

/// Name of the source that is the inventory file.
pub const FILE: &str = "";

/// How a source stands to the hosts that it tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// It is one host: if it can't be read, the host doesn't answer. A VM that leaves it may be on its way to another one.
    Host,
    /// It tells of hosts: that it can't be read says nothing about them.
    Site,
}

/// What is known of all sources.
#[derive(Debug, Default)]
pub struct World {
    /// By name. The one of the inventory file is [`FILE`].
    sources: BTreeMap<String, Known>,
    /// VMs that left a host and are on none yet.
    leaving: BTreeMap<Uuid, Leaving>,
    inventory: Arc<Inventory>,
    conflicts: Vec<String>,
}

/// What a reading brought.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// What happened since the one before.
    pub changes: Vec<Change>,
    /// Whether the source itself tells anything else than before: another source may tell the same.
    pub differs: bool,
}

#[derive(Debug)]
struct Known {
    scope: Scope,
    /// The last good reading.
    inventory: Inventory,
    is_failing: bool,
}

/// A VM that was migrated away shows up at the other host only when that one is read again.
#[derive(Debug)]
struct Leaving {
    vm: Vm,
    /// Hosts that were not read since.
    unasked: BTreeSet<String>,
}

impl World {
    /// The inventory in force: the last good reading of each source.
    pub fn inventory(&self) -> Arc<Inventory> {
        self.inventory.clone()
    }

    /// What sources tell differently of the same thing, for people.
    pub fn conflicts(&self) -> &[String] {
        &self.conflicts
    }

    /// Sources that should be read at once, to learn where a VM went.
    pub fn to_read(&self) -> BTreeSet<&str> {
        self.leaving.values().flat_map(|leaving| &leaving.unasked).map(String::as_str).collect()
    }

    /// Takes a reading that an earlier run of the manager made.
    pub fn restore(&mut self, source: &str, scope: Scope, inventory: Inventory) {
        self.sources.insert(source.into(), Known { scope, inventory, is_failing: false });
        self.merge();
    }

    /// Takes a reading and says what happened since the one before. A source's first one only tells of what moved to it.
    pub fn take(&mut self, source: &str, scope: Scope, inventory: Inventory) -> Taken {
        let differs = self
            .sources
            .get(source)
            .is_none_or(|known| !changes::between(&known.inventory, &inventory).is_empty());
        let known = self.sources.insert(source.into(), Known { scope, inventory, is_failing: false });
        let is_first = known.is_none();
        if let Some(known) = known {
            self.note_leaving(source, known);
        }
        let mut changes = self.asked(source);
        if is_first {
            changes.retain(|change| !came(change));
        }
        Taken { changes, differs }
    }

    /// Names of the sources that something was read of.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.sources.keys().map(String::as_str)
    }

    /// Notes that a source was read and is as it was.
    pub fn confirm(&mut self, source: &str) -> Vec<Change> {
        self.asked(source)
    }

    /// Notes that a source could not be read. Its last good reading stays in force.
    pub fn fail(&mut self, source: &str) -> Vec<Change> {
        if let Some(known) = self.sources.get_mut(source) {
            known.is_failing = true;
        }
        self.asked(source)
    }

    /// Forgets a source that its user removed, and says what went with it.
    pub fn remove(&mut self, source: &str) -> Vec<Change> {
        self.sources.remove(source);
        self.asked(source)
    }

    fn note_leaving(&mut self, source: &str, before: Known) {
        if before.scope != Scope::Host {
            return;
        }
        let is_other_host = |(name, known): &(&String, &Known)| {
            *name != source && known.scope == Scope::Host && !known.is_failing
        };
        let others: BTreeSet<String> =
            self.sources.iter().filter(is_other_host).map(|(name, _)| name.clone()).collect();
        if others.is_empty() {
            return;
        }
        let there: HashSet<Uuid> =
            self.sources.values().flat_map(|known| &known.inventory.vms).map(|vm| vm.uuid).collect();
        for vm in before.inventory.vms.into_iter().filter(|vm| !there.contains(&vm.uuid)) {
            self.leaving.insert(vm.uuid, Leaving { vm, unasked: others.clone() });
        }
    }

    /// A source was read, or can't be: what it tells of VMs that left others is known now.
    fn asked(&mut self, source: &str) -> Vec<Change> {
        let there: HashSet<Uuid> =
            self.sources.values().flat_map(|known| &known.inventory.vms).map(|vm| vm.uuid).collect();
        self.leaving.retain(|uuid, leaving| {
            leaving.unasked.remove(source);
            !leaving.unasked.is_empty() && !there.contains(uuid)
        });
        let before = self.inventory();
        self.merge();
        changes::between(&before, &self.inventory)
    }

    fn merge(&mut self) {
        let mut merger = Merger::new(&self.inventory);
        // Live sources know better than a file.
        let live = self.sources.iter().filter(|(name, _)| *name != FILE);
        for (_, known) in live.chain(self.sources.get_key_value(FILE)) {
            merger.add(known);
        }
        for leaving in self.leaving.values() {
            merger.vms.entry(leaving.vm.uuid).or_insert_with(|| leaving.vm.clone());
        }
        (self.inventory, self.conflicts) = merger.finish();
    }
}

/// Makes one inventory of several.
struct Merger {
    /// Where VMs were before.
    hosts_before: HashMap<Uuid, String>,
    merged: Inventory,
    vms: BTreeMap<Uuid, Vm>,
    conflicts: Vec<String>,
}

impl Merger {
    fn new(before: &Inventory) -> Self {
        Self {
            hosts_before: before.vms.iter().map(|vm| (vm.uuid, vm.host.clone())).collect(),
            merged: Inventory::default(),
            vms: BTreeMap::new(),
            conflicts: Vec::new(),
        }
    }

    fn add(&mut self, known: &Known) {
        let inventory = &known.inventory;
        for site in &inventory.sites {
            if !self.merged.sites.contains(site) {
                self.merged.sites.push(site.clone());
            }
        }
        for cluster in &inventory.clusters {
            let is_same =
                |other: &super::Cluster| (&other.site, &other.name) == (&cluster.site, &cluster.name);
            if !self.merged.clusters.iter().any(is_same) {
                self.merged.clusters.push(cluster.clone());
            }
        }
        for host in &inventory.hosts {
            let is_silent = known.is_failing && known.scope == Scope::Host;
            let state = if is_silent { HostState::NotResponding } else { host.state };
            self.add_host(Host { state, ..host.clone() });
        }
        for network in &inventory.networks {
            self.add_network(network);
        }
        for datastore in &inventory.datastores {
            self.add_datastore(datastore);
        }
        for vm in &inventory.vms {
            self.add_vm(vm);
        }
    }

    fn add_host(&mut self, host: Host) {
        let Some(other) = self.merged.hosts.iter().find(|other| other.name == host.name) else {
            self.merged.hosts.push(host);
            return;
        };
        if host.origin.source != FILE {
            self.conflicts.push(format!(
                "sources {} and {} both have a host named {}: the first counts",
                other.origin.source, host.origin.source, host.name
            ));
        }
    }

    /// Networks of one name at one site are one: what is plugged into it can move between its hosts.
    fn add_network(&mut self, network: &Network) {
        let is_same = |other: &&mut Network| (&other.site, &other.name) == (&network.site, &network.name);
        match self.merged.networks.iter_mut().find(is_same) {
            Some(other) => add_missing(&mut other.hosts, &network.hosts),
            None => self.merged.networks.push(network.clone()),
        }
    }

    fn add_datastore(&mut self, datastore: &Datastore) {
        let Some(other) = self.merged.datastores.iter_mut().find(|other| other.name == datastore.name) else {
            self.merged.datastores.push(datastore.clone());
            return;
        };
        if other.path == datastore.path {
            add_missing(&mut other.hosts, &datastore.hosts);
        } else if datastore.origin.source != FILE {
            self.conflicts.push(format!(
                "datastore {} is at {} on host {} and at {} on host {}: the first counts",
                datastore.name,
                other.path.display(),
                other.hosts.join(", "),
                datastore.path.display(),
                datastore.hosts.join(", ")
            ));
        }
    }

    /// A VM that several hosts have defined is where it runs; if it runs nowhere, where it was.
    fn add_vm(&mut self, vm: &Vm) {
        let rank = |vm: &Vm| {
            let host = self.merged.hosts.iter().find(|host| host.name == vm.host);
            let answers = host.is_some_and(|host| host.state != HostState::NotResponding);
            let power = match (vm.power, answers) {
                (Power::On, true) => 5,
                // A VM that is being received stands still until its source has stopped.
                (Power::Paused, true) => 4,
                // Where it ran when the host was last heard of: that another one has it defined says nothing.
                (Power::On | Power::Paused, false) => 3,
                (Power::Unknown, _) => 2,
                (Power::Off, true) => 1,
                (Power::Off, false) => 0,
            };
            (vm.origin.source != FILE, power, self.hosts_before.get(&vm.uuid) == Some(&vm.host))
        };
        match self.vms.get(&vm.uuid) {
            Some(other) if rank(other) >= rank(vm) => {}
            _ => drop(self.vms.insert(vm.uuid, vm.clone())),
        }
    }

    fn finish(mut self) -> (Arc<Inventory>, Vec<String>) {
        self.merged.vms = self.vms.into_values().collect();
        self.merged.vms.sort_by(|a, b| (&a.name, a.uuid).cmp(&(&b.name, b.uuid)));
        (Arc::new(self.merged), self.conflicts)
    }
}

fn add_missing(to: &mut Vec<String>, names: &[String]) {
    for name in names {
        if !to.contains(name) {
            to.push(name.clone());
        }
    }
}

/// Whether a change only tells that something is new.
fn came(change: &Change) -> bool {
    match change {
        Change::HostAdded(_) | Change::NetworkAdded(_) | Change::DatastoreAdded(_) => true,
        Change::NetworkHostsChanged { hosts, .. } | Change::DatastoreHostsChanged { hosts, .. } => {
            hosts.went.is_empty()
        }
        Change::Vm { change, .. } => matches!(change, VmChange::Added { .. }),
        Change::HostRemoved(_)
        | Change::HostRenamed { .. }
        | Change::HostStateChanged { .. }
        | Change::NetworkRemoved(_)
        | Change::NetworkRenamed { .. }
        | Change::DatastoreRemoved(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{Origin, Site};

    /// What a host tells: itself and these VMs.
    fn host(name: &str, vms: &[(u128, Power)]) -> Inventory {
        let origin = |id: &str| Origin { source: name.into(), id: id.into() };
        Inventory {
            sites: vec![Site { name: "A".into() }],
            hosts: vec![Host {
                name: name.into(),
                site: "A".into(),
                cluster: None,
                vra: name.into(),
                state: HostState::Connected,
                origin: origin(name),
            }],
            networks: vec![Network {
                name: "lan".into(),
                site: "A".into(),
                hosts: vec![name.into()],
                origin: origin("lan"),
            }],
            vms: vms
                .iter()
                .map(|(number, power)| Vm {
                    uuid: Uuid::from_u128(*number),
                    name: format!("vm{number}"),
                    host: name.into(),
                    power: *power,
                    disks: Vec::new(),
                    nics: Vec::new(),
                    origin: origin(&number.to_string()),
                })
                .collect(),
            ..Inventory::default()
        }
    }

    fn world(h1: &[(u128, Power)], h2: &[(u128, Power)]) -> World {
        let mut world = World::default();
        for (name, vms) in [("h1", h1), ("h2", h2)] {
            assert_eq!(
                world.take(name, Scope::Host, host(name, vms)).changes,
                [],
                "a first reading tells no news"
            );
        }
        world
    }

    fn read(world: &mut World, name: &str, vms: &[(u128, Power)]) -> Vec<String> {
        world.take(name, Scope::Host, host(name, vms)).changes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_migrated_vm_moves_whichever_host_is_read_first() {
        let mut left_first = world(&[(1, Power::On)], &[]);
        assert_eq!(read(&mut left_first, "h1", &[]), Vec::<String>::new(), "it is still looked for");
        assert_eq!(left_first.to_read(), BTreeSet::from(["h2"]));
        assert_eq!(left_first.inventory().vms.len(), 1);
        assert_eq!(read(&mut left_first, "h2", &[(1, Power::On)]), ["VM vm1 moved from host h1 to h2"]);
        assert!(left_first.to_read().is_empty());

        let mut came_first = world(&[(1, Power::On)], &[]);
        // Being received, running at both for a moment, and defined but off where it was.
        assert_eq!(read(&mut came_first, "h2", &[(1, Power::Paused)]), Vec::<String>::new());
        assert_eq!(read(&mut came_first, "h2", &[(1, Power::On)]), Vec::<String>::new());
        assert_eq!(read(&mut came_first, "h1", &[(1, Power::Off)]), ["VM vm1 moved from host h1 to h2"]);
        assert_eq!(read(&mut came_first, "h1", &[]), Vec::<String>::new());
    }

    #[test]
    fn a_vm_that_no_host_has_is_gone_once_all_were_asked() {
        let mut world = world(&[(1, Power::Off)], &[]);
        read(&mut world, "h1", &[]);
        assert_eq!(read(&mut world, "h2", &[]), ["VM vm1 is gone from host h1"]);
        read(&mut world, "h2", &[(2, Power::On)]);
        assert_eq!(read(&mut world, "h2", &[]), Vec::<String>::new());
        let told: Vec<String> = world.fail("h1").iter().map(ToString::to_string).collect();
        assert_eq!(told, ["host h1 went from connected to not-responding", "VM vm2 is gone from host h2"]);
        // Nobody else is left to ask.
        read(&mut world, "h2", &[(3, Power::On)]);
        assert_eq!(read(&mut world, "h2", &[]), ["VM vm3 is gone from host h2"]);
    }

    #[test]
    fn a_host_that_has_nothing_new_was_asked_too() {
        let mut world = world(&[(1, Power::Off)], &[(2, Power::On)]);
        assert_eq!(read(&mut world, "h1", &[]), Vec::<String>::new());
        assert_eq!(world.confirm("h1"), []);
        let told: Vec<String> = world.confirm("h2").iter().map(ToString::to_string).collect();
        assert_eq!(told, ["VM vm1 is gone from host h1"]);
    }

    #[test]
    fn a_vm_started_elsewhere_counts_there_when_its_host_is_silent() {
        let mut world = world(&[(1, Power::On)], &[]);
        world.fail("h1");
        assert_eq!(world.inventory().vms[0].host, "h1", "the last good reading stays in force");
        assert_eq!(
            read(&mut world, "h2", &[(1, Power::Off)]),
            Vec::<String>::new(),
            "it is only defined there"
        );
        assert_eq!(read(&mut world, "h2", &[(1, Power::On)]), ["VM vm1 moved from host h1 to h2"]);
        let back = read(&mut world, "h1", &[(1, Power::Off)]);
        assert_eq!(back, ["host h1 went from not-responding to connected"]);
    }

    #[test]
    fn a_restart_of_the_manager_tells_what_happened_meanwhile() {
        let mut world = World::default();
        world.restore("h1", Scope::Host, host("h1", &[(1, Power::On), (2, Power::On)]));
        let told = read(&mut world, "h1", &[(1, Power::Off), (3, Power::On)]);
        let expected =
            ["VM vm1 went from on to off", "VM vm2 is gone from host h1", "VM vm3 came on host h1"];
        assert_eq!(told, expected);
    }

    #[test]
    fn live_sources_count_before_the_file_and_networks_of_one_name_are_one() {
        let mut world = world(&[(1, Power::Off)], &[]);
        let mut file = host("h1", &[(1, Power::Unknown), (9, Power::Unknown)]);
        for vm in &mut file.vms {
            vm.origin = Origin::default();
        }
        file.hosts[0].origin = Origin::default();
        file.hosts[0].vra = "other".into();
        world.take(FILE, Scope::Site, file);
        let merged = world.inventory();
        assert_eq!(merged.hosts.iter().map(|host| host.vra.as_str()).collect::<Vec<_>>(), ["h1", "h2"]);
        assert_eq!(merged.vms.iter().map(|vm| vm.power).collect::<Vec<_>>(), [Power::Off, Power::Unknown]);
        assert_eq!(merged.networks.len(), 1);
        assert_eq!(merged.networks[0].hosts, ["h1", "h2"]);
        assert!(world.conflicts().is_empty());
        world.take("h3", Scope::Host, host("h1", &[]));
        assert_eq!(world.conflicts().len(), 1);
    }
}
