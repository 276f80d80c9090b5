//! A domain's definition as a hostile libvirt daemon gives it.

use std::collections::{HashMap, HashSet};

use zvm::inventory::libvirt::domain::{Domain, DomainFacts, HostFacts};
use zvm::inventory::{DiskKind, Power};

pub fn run(data: &[u8]) {
    let Ok(xml) = std::str::from_utf8(data) else { return };
    let Ok(domain) = Domain::parse(xml) else { return };
    let volumes = domain.volumes().count();
    let bridges: HashSet<String> = domain.bridges().map(str::to_owned).collect();
    let networks = HashSet::from(["prod".to_owned()]);
    let facts = DomainFacts {
        state: Some(1),
        capacity_bytes: HashMap::from([("vda".to_owned(), 512)]),
        ..DomainFacts::default()
    };
    let host = HostFacts { source: "kvm", host: "kvm-a", networks: &networks, volumes: &HashMap::new() };
    let vm = domain.clone().into_vm(&facts, host);
    assert_eq!((vm.uuid, vm.origin.id.as_str()), (domain.uuid, domain.uuid.to_string().as_str()));
    assert!(!vm.name.is_empty() && vm.power == Power::On);
    assert_eq!((vm.disks.len(), vm.nics.len()), (domain.disks.len(), domain.nics.len()));
    for nic in &vm.nics {
        let is_known =
            nic.network.is_empty() || networks.contains(&nic.network) || bridges.contains(&nic.network);
        assert!(is_known, "a card in network {:?}, which the inventory hasn't", nic.network);
        assert_eq!(nic.mac, nic.mac.to_ascii_lowercase());
    }
    for disk in &vm.disks {
        assert!(!disk.path.as_os_str().is_empty());
        assert_eq!(disk.size_bytes, (disk.name == "vda").then_some(512));
    }
    let elsewhere = vm.disks.iter().filter(|disk| disk.kind == DiskKind::Network).count();
    assert!(elsewhere >= volumes, "a volume that can't be looked up is taken for a disk of the host");
}
