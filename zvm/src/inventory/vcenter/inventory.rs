//! From a vCenter's objects to the inventory's nouns.

use std::collections::HashMap;
use std::path::PathBuf;

use uuid::Uuid;

use super::devices::{Plugged, cards, disks};
use super::filter::Kind;
use super::names::{distinct_names, plain_name};
use super::objects::Objects;
use super::properties::Properties;
use crate::inventory::{
    Cluster, Datastore, Host, HostState, Inventory, Network, Nic, Origin, Power, Site, Vm,
};

/// Tag of the port groups that hold a distributed switch's uplinks: no VM is plugged into them.
const UPLINK_TAG: &str = "SYSTEM/DVS.UPLINKPG";

/// Whose objects they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The source's name.
    pub name: String,
    /// The site's name.
    pub site: String,
    /// The vCenter's own UUID.
    pub instance: Uuid,
}

/// The inventory of a vCenter.
///
/// Clusters, hosts, networks and datastores are referred to by their names, which in a vCenter are unique only within a datacenter: of those
/// that share one, each is named `DATACENTER/NAME`, or `NAME (ID)` where that isn't enough. VMs keep their names.
pub fn inventory_of(objects: &Objects, source: &Source) -> Inventory {
    let mut networks = distinct_names(objects, Kind::Network);
    networks.retain(|id, _| objects.get(id).is_some_and(|network| !is_uplink(&network.properties)));
    Reader {
        objects,
        source,
        clusters: distinct_names(objects, Kind::Cluster),
        hosts: distinct_names(objects, Kind::Host),
        networks,
        datastores: distinct_names(objects, Kind::Datastore),
        port_groups: ids_by(objects, "key"),
        opaque_networks: ids_by(objects, "summary.opaqueNetworkId"),
    }
    .read()
}

struct Reader<'a> {
    objects: &'a Objects,
    source: &'a Source,
    /// Names in the inventory by ids.
    clusters: HashMap<&'a str, String>,
    hosts: HashMap<&'a str, String>,
    networks: HashMap<&'a str, String>,
    datastores: HashMap<&'a str, String>,
    /// Ids of networks by what network cards call them.
    port_groups: HashMap<&'a str, &'a str>,
    opaque_networks: HashMap<&'a str, &'a str>,
}

impl<'a> Reader<'a> {
    fn read(&self) -> Inventory {
        let of = |kind| self.objects.of_kind(kind);
        Inventory {
            sites: vec![Site { name: self.source.site.clone() }],
            clusters: of(Kind::Cluster).map(|(id, _)| self.cluster(id)).collect(),
            hosts: of(Kind::Host).map(|(id, host)| self.host(id, host)).collect(),
            networks: of(Kind::Network)
                .filter(|(_, network)| !is_uplink(network))
                .map(|(id, _)| self.network(id))
                .collect(),
            datastores: of(Kind::Datastore).map(|(id, datastore)| self.datastore(id, datastore)).collect(),
            vms: of(Kind::Vm)
                .filter(|(_, vm)| vm.get("config.template") != Some("true"))
                .map(|(id, vm)| self.vm(id, vm))
                .collect(),
        }
    }

    fn cluster(&self, id: &str) -> Cluster {
        Cluster { name: named(&self.clusters, id), site: self.source.site.clone(), origin: self.origin(id) }
    }

    fn host(&self, id: &str, host: &Properties) -> Host {
        let name = named(&self.hosts, id);
        Host {
            vra: name.clone(),
            name,
            site: self.source.site.clone(),
            // A host outside of clusters has a parent of its own that is none.
            cluster: host.get("parent").and_then(|parent| self.clusters.get(parent)).cloned(),
            state: match (host.get("runtime.connectionState"), host.get("runtime.inMaintenanceMode")) {
                (Some("connected"), Some("true")) => HostState::Maintenance,
                (Some("connected"), _) => HostState::Connected,
                _ => HostState::NotResponding,
            },
            origin: self.origin(id),
        }
    }

    fn network(&self, id: &str) -> Network {
        let (name, site) = (named(&self.networks, id), self.source.site.clone());
        Network { name, site, hosts: Vec::new(), origin: self.origin(id) }
    }

    fn datastore(&self, id: &str, datastore: &Properties) -> Datastore {
        let mut hosts: Vec<String> = datastore
            .keys("host")
            .into_iter()
            .filter(|host| datastore.get(&format!("host[{host}].mountInfo.mounted")) != Some("false"))
            .filter_map(|host| self.hosts.get(host).cloned())
            .collect();
        hosts.sort();
        let name = named(&self.datastores, id);
        let path = datastore.get("summary.url").filter(|url| !url.is_empty());
        Datastore {
            hosts,
            path: path.map_or_else(|| PathBuf::from(format!("[{name}]")), PathBuf::from),
            name,
            capacity_bytes: datastore.get("summary.capacity").and_then(|text| text.parse().ok()),
            free_bytes: datastore.get("summary.freeSpace").and_then(|text| text.parse().ok()),
            origin: self.origin(id),
        }
    }

    fn vm(&self, id: &str, vm: &'a Properties) -> Vm {
        let host = vm.get("runtime.host").and_then(|host| self.hosts.get(host));
        Vm {
            uuid: Uuid::new_v5(&self.source.instance, id.as_bytes()),
            name: plain_name(id, vm),
            host: host.cloned().unwrap_or_default(),
            power: match vm.get("runtime.powerState") {
                Some("poweredOn") => Power::On,
                Some("poweredOff") => Power::Off,
                // Its guest goes on where it was, and its disks are not those of a guest that was shut down.
                Some("suspended") => Power::Paused,
                _ => Power::Unknown,
            },
            disks: disks(vm),
            nics: cards(vm)
                .into_iter()
                .map(|card| Nic {
                    mac: card.mac.to_lowercase(),
                    network: self.network_of(&card.plugged, vm).unwrap_or_default(),
                })
                .collect(),
            origin: self.origin(id),
        }
    }

    fn network_of(&self, plugged: &Plugged<'_>, vm: &'a Properties) -> Option<String> {
        let id = match plugged {
            Plugged::Network(id) => *id,
            Plugged::PortGroup(key) => self.port_groups.get(key).copied().unwrap_or(key),
            Plugged::Opaque(id) => self.opaque_networks.get(id)?,
            Plugged::Named(name) => vm.keys("network").into_iter().find(|id| {
                self.objects.get(id).is_some_and(|network| network.properties.get("name") == Some(*name))
            })?,
            Plugged::Nothing => return None,
        };
        self.networks.get(id).cloned()
    }

    fn origin(&self, id: &str) -> Origin {
        Origin { source: self.source.name.clone(), id: id.into() }
    }
}

fn is_uplink(network: &Properties) -> bool {
    network.keys("tag").contains(&UPLINK_TAG)
}

fn named(names: &HashMap<&str, String>, id: &str) -> String {
    names.get(id).cloned().unwrap_or_default()
}

/// Ids of networks by one of their texts.
fn ids_by<'a>(objects: &'a Objects, path: &str) -> HashMap<&'a str, &'a str> {
    objects.of_kind(Kind::Network).filter_map(|(id, network)| Some((network.get(path)?, id))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::objects::Described;
    use super::*;

    fn read(all: &[Described<'_>]) -> Inventory {
        let source = Source { name: "vc".into(), site: "london".into(), instance: Uuid::from_u128(1) };
        inventory_of(&Objects::described(all), &source)
    }

    #[test]
    fn hosts_are_in_clusters_and_states() {
        let inventory = read(&[
            ("ClusterComputeResource", "c-1", &[("name", "prod")]),
            (
                "HostSystem",
                "h-1",
                &[("name", "a"), ("parent", "c-1"), ("runtime.connectionState", "connected")],
            ),
            (
                "HostSystem",
                "h-2",
                &[
                    ("name", "b"),
                    ("parent", "s-1"),
                    ("runtime.connectionState", "connected"),
                    ("runtime.inMaintenanceMode", "true"),
                ],
            ),
            (
                "HostSystem",
                "h-3",
                &[
                    ("name", "c"),
                    ("runtime.connectionState", "disconnected"),
                    ("runtime.inMaintenanceMode", "true"),
                ],
            ),
            ("HostSystem", "h-4", &[("name", "d"), ("runtime.connectionState", "notResponding")]),
        ]);
        let hosts: Vec<_> =
            inventory.hosts.iter().map(|host| (host.cluster.as_deref(), host.state)).collect();
        let expected = [
            (Some("prod"), HostState::Connected),
            (None, HostState::Maintenance),
            (None, HostState::NotResponding),
            (None, HostState::NotResponding),
        ];
        assert_eq!(hosts, expected);
    }

    #[test]
    fn vms_are_told_apart_by_vcenter_and_id_and_templates_are_none() {
        let all: &[Described<'_>] = &[
            ("HostSystem", "h-1", &[("name", "a")]),
            (
                "VirtualMachine",
                "vm-1",
                &[
                    ("name", "x%2fy%25%5C%z&#27;"),
                    ("runtime.host", "h-1"),
                    ("runtime.powerState", "suspended"),
                ],
            ),
            ("VirtualMachine", "vm-2", &[("name", "t"), ("config.template", "true")]),
            ("VirtualMachine", "vm-3", &[("runtime.host", "gone")]),
        ];
        let inventory = read(all);
        let [first, second] = &inventory.vms[..] else { panic!("{:?}", inventory.vms) };
        assert_eq!(
            (first.name.as_str(), first.host.as_str(), first.power),
            ("x/y%\\%z\u{fffd}", "a", Power::Paused)
        );
        assert_eq!((second.name.as_str(), second.host.as_str(), second.power), ("vm-3", "", Power::Unknown));
        let other = Source { name: "vc".into(), site: "london".into(), instance: Uuid::from_u128(2) };
        assert_ne!(inventory_of(&Objects::described(all), &other).vms[0].uuid, first.uuid);
    }

    #[test]
    fn networks_of_all_kinds_are_found_and_uplinks_are_none() {
        let card = |backing: &str| {
            format!(
                "<VirtualDevice type='VirtualVmxnet3'><key>4000</key><macAddress>00:50:56:AA:BB:CC</macAddress><backing>{backing}</backing></VirtualDevice>"
            )
        };
        for (backing, expected) in [
            ("<port><portgroupKey>p-1</portgroupKey></port>", "pg"),
            ("<port><portgroupKey>key-1</portgroupKey></port>", "pg"),
            ("<opaqueNetworkId>o-id</opaqueNetworkId>", "nsx"),
            ("<deviceName>plain</deviceName><network>n-1</network>", "plain"),
            ("<deviceName>plain</deviceName>", "plain"),
            ("<deviceName>elsewhere</deviceName>", ""),
        ] {
            let devices = card(backing);
            let inventory = read(&[
                ("DistributedVirtualPortgroup", "p-1", &[("name", "pg"), ("key", "key-1")]),
                (
                    "DistributedVirtualPortgroup",
                    "p-2",
                    &[("name", "up"), ("tag", "<Tag><key>SYSTEM/DVS.UPLINKPG</key></Tag>")],
                ),
                (
                    "OpaqueNetwork",
                    "o-1",
                    &[("name", "nsx"), ("summary", "<opaqueNetworkId>o-id</opaqueNetworkId>")],
                ),
                ("Network", "n-1", &[("name", "plain")]),
                ("Network", "n-2", &[("name", "elsewhere")]),
                (
                    "VirtualMachine",
                    "vm-1",
                    &[
                        ("name", "v"),
                        ("config.hardware.device", &devices),
                        ("network", "<r type='Network'>n-1</r>"),
                    ],
                ),
            ]);
            let nic = Nic { mac: "00:50:56:aa:bb:cc".into(), network: expected.into() };
            assert_eq!(inventory.vms[0].nics, [nic], "{backing}");
            assert_eq!(inventory.networks.len(), 4);
        }
    }

    #[test]
    fn datastores_have_those_hosts_that_mount_them() {
        let mounts = "<m><key type='HostSystem'>h-1</key><mountInfo><mounted>true</mounted></mountInfo></m>\
                      <m><key type='HostSystem'>h-2</key><mountInfo><mounted>false</mounted></mountInfo></m>\
                      <m><key type='HostSystem'>h-3</key><mountInfo/></m>";
        let inventory = read(&[
            ("HostSystem", "h-1", &[("name", "b")]),
            ("HostSystem", "h-2", &[("name", "c")]),
            ("HostSystem", "h-3", &[("name", "a")]),
            (
                "Datastore",
                "d-1",
                &[("name", "ds"), ("host", mounts), ("summary.capacity", "10"), ("summary.freeSpace", "-1")],
            ),
        ]);
        let datastore = &inventory.datastores[0];
        assert_eq!(datastore.hosts, ["a", "b"]);
        assert_eq!(
            (datastore.path.to_str(), datastore.capacity_bytes, datastore.free_bytes),
            (Some("[ds]"), Some(10), None)
        );
    }
}
