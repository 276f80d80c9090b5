//! An inventory as `virsh` prints it, to be compared with the provider's.

use std::collections::BTreeMap;

use zvm::inventory::Inventory;

use super::libvirt_host::TestHost;

/// What there is on a host.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct View {
    host: (String, String),
    /// UUIDs of networks by their names; bridges have none.
    networks: BTreeMap<String, String>,
    /// Folder, size and free bytes.
    pools: BTreeMap<String, (String, Option<u64>, Option<u64>)>,
    vms: BTreeMap<String, VmView>,
}

#[derive(Debug, PartialEq, Eq)]
struct VmView {
    name: String,
    host: String,
    power: &'static str,
    /// Target, path, size.
    disks: Vec<(String, String, Option<u64>)>,
    /// MAC address and network.
    nics: Vec<(String, String)>,
}

impl View {
    pub(crate) fn of_inventory(inventory: &Inventory) -> Self {
        let [host] = inventory.hosts.as_slice() else { panic!("{:?}", inventory.hosts) };
        let [site] = inventory.sites.as_slice() else { panic!("{:?}", inventory.sites) };
        let networks = &inventory.networks;
        assert!(networks.iter().all(|network| network.site == site.name) && host.site == site.name);
        Self {
            host: (host.name.clone(), host.origin.id.clone()),
            networks: networks
                .iter()
                .map(|network| (network.name.clone(), network.origin.id.clone()))
                .collect(),
            pools: inventory
                .datastores
                .iter()
                .map(|pool| {
                    assert_eq!(pool.hosts, [host.name.as_str()]);
                    let path = pool.path.display().to_string();
                    (pool.name.clone(), (path, pool.capacity_bytes, pool.free_bytes))
                })
                .collect(),
            vms: inventory
                .vms
                .iter()
                .map(|vm| {
                    assert_eq!((vm.origin.source.as_str(), &vm.origin.id), ("kvm", &vm.uuid.to_string()));
                    let view = VmView {
                        name: vm.name.clone(),
                        host: vm.host.clone(),
                        power: vm.power.as_str(),
                        disks: vm
                            .disks
                            .iter()
                            .map(|disk| (disk.name.clone(), disk.path.display().to_string(), disk.size_bytes))
                            .collect(),
                        nics: vm.nics.iter().map(|nic| (nic.mac.clone(), nic.network.clone())).collect(),
                    };
                    (vm.uuid.to_string(), view)
                })
                .collect(),
        }
    }

    /// Asks virsh, about VMs whose names and paths have no blanks.
    pub(crate) fn of_virsh(host: &TestHost) -> Self {
        let lists = [
            ("hostname", "hostname"),
            ("host", "capabilities"),
            ("vms", "list --all --uuid"),
            ("networks", "net-list --all --uuid"),
            ("pools", "pool-list --uuid"),
        ];
        let lists: String = lists.iter().map(|(section, command)| question(section, "", command)).collect();
        let lists = host.virsh(&[&lists]);
        let lists = sections(&lists);
        let of = |section: &str| lists.get(section).cloned().unwrap_or_default();
        let first = |section: &str| of(section).first().cloned().unwrap_or_default();
        let mut questions = String::new();
        for vm in of("vms") {
            questions += &question("name", &vm, "domname");
            questions += &question("state", &vm, "domstate");
            questions += &question("disks", &vm, "domblklist --details");
            questions += &question("sizes", &vm, "domblkinfo --all");
            questions += &question("nics", &vm, "domiflist");
        }
        for network in of("networks") {
            questions += &question("network", &network, "net-name");
        }
        for pool in of("pools") {
            questions += &question("pool", &pool, "pool-info --bytes");
            questions += &question("path", &pool, "pool-dumpxml --xpath //target/path/text()");
        }
        let answers = if questions.is_empty() { String::new() } else { host.virsh(&[&questions]) };
        let answers = sections(&answers);
        let lines =
            |section: &str, id: &str| answers.get(&format!("{section} {id}")).cloned().unwrap_or_default();
        let line = |section: &str, id: &str| lines(section, id).first().cloned().unwrap_or_default();

        let mut networks: BTreeMap<String, String> =
            of("networks").into_iter().map(|uuid| (line("network", &uuid), uuid)).collect();
        let mut vms = BTreeMap::new();
        for uuid in of("vms") {
            let sizes: BTreeMap<String, Option<u64>> = lines("sizes", &uuid)
                .iter()
                .map(|line| {
                    let columns = columns(line);
                    (columns[0].clone(), columns[1].parse().ok())
                })
                .collect();
            let disks = lines("disks", &uuid)
                .iter()
                .map(|line| columns(line))
                .filter(|columns| columns[1] == "disk")
                .map(|columns| {
                    let size = sizes.get(&columns[2]).copied().flatten();
                    (columns[2].clone(), columns[3].clone(), size)
                })
                .collect();
            let cards: Vec<Vec<String>> = lines("nics", &uuid).iter().map(|line| columns(line)).collect();
            for bridge in cards.iter().filter(|columns| columns[1] == "bridge") {
                networks.entry(bridge[2].clone()).or_default();
            }
            let nics = cards.into_iter().map(|columns| (columns[4].clone(), columns[2].clone())).collect();
            let power = match line("state", &uuid).as_str() {
                "running" => "on",
                "paused" => "paused",
                "shut off" => "off",
                other => panic!("state {other:?}"),
            };
            vms.insert(
                uuid.clone(),
                VmView { name: line("name", &uuid), host: host.name.clone(), power, disks, nics },
            );
        }
        let pools = of("pools")
            .into_iter()
            .map(|uuid| {
                let info: BTreeMap<String, String> = lines("pool", &uuid)
                    .iter()
                    .filter_map(|line| line.split_once(':'))
                    .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
                    .collect();
                let bytes = |key: &str| info[key].parse().ok();
                let name = format!("{}@{}", info["Name"], host.name);
                (name, (line("path", &uuid), bytes("Capacity"), bytes("Available")))
            })
            .collect();
        let host_uuid = of("host").iter().find_map(|line| {
            line.strip_prefix("<uuid>").and_then(|line| line.strip_suffix("</uuid>")).map(str::to_owned)
        });
        Self { host: (first("hostname"), host_uuid.expect("the host's UUID")), networks, pools, vms }
    }
}

/// A command of virsh about an object, with a line before its output that names both.
fn question(section: &str, object: &str, command: &str) -> String {
    format!("echo '\n@{section} {object}\n'; {command} {object};")
}

/// Lines behind each line that begins with `@`, without empty ones.
fn sections(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut sections = BTreeMap::<String, Vec<String>>::new();
    let mut current = String::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match line.strip_prefix('@') {
            Some(name) => name.trim().clone_into(&mut current),
            None => sections.entry(current.clone()).or_default().push(line.to_owned()),
        }
    }
    sections
}

fn columns(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}
