//! Answers of a hostile vCenter, one behind the other with a zero byte between: each as a fault, a page of objects or an update set, applied
//! to what came before.

use std::collections::HashSet;

use zvm::inventory::vcenter::{Objects, Page, Source, UpdateSet, answer, inventory_of};

pub fn run(data: &[u8]) {
    let mut objects = Objects::default();
    for body in data.split(|byte| *byte == 0) {
        let mut changes = Vec::new();
        for method in ["RetrievePropertiesEx", "ContinueRetrievePropertiesEx"] {
            if let Ok(page) = answer(method, body).map_err(|_| String::new()).and_then(Page::of) {
                changes = page.objects;
            }
        }
        if let Ok(Some(set)) =
            answer("WaitForUpdatesEx", body).map_err(|_| String::new()).and_then(UpdateSet::of)
        {
            assert!(!set.version.is_empty());
            changes = set.changes;
        }
        for change in &changes {
            if objects.apply(change).is_err() {
                return;
            }
        }
    }
    let source = Source { name: "v".into(), site: "s".into(), instance: uuid::Uuid::nil() };
    let inventory = inventory_of(&objects, &source);
    assert_eq!(inventory_of(&objects, &source), inventory, "one state has one inventory");

    let hosts: HashSet<&str> = inventory.hosts.iter().map(|host| host.name.as_str()).collect();
    let clusters: HashSet<&str> = inventory.clusters.iter().map(|cluster| cluster.name.as_str()).collect();
    let networks: HashSet<&str> = inventory.networks.iter().map(|network| network.name.as_str()).collect();
    assert!(
        inventory.hosts.iter().filter_map(|host| host.cluster.as_deref()).all(|name| clusters.contains(name))
    );
    assert!(
        inventory
            .datastores
            .iter()
            .flat_map(|datastore| &datastore.hosts)
            .all(|name| hosts.contains(name.as_str()))
    );
    for vm in &inventory.vms {
        assert!(vm.host.is_empty() || hosts.contains(vm.host.as_str()));
        assert!(vm.nics.iter().all(|nic| nic.network.is_empty() || networks.contains(nic.network.as_str())));
        let disks: HashSet<&str> = vm.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(disks.len(), vm.disks.len(), "no two disks of a VM have one name");
    }
}
