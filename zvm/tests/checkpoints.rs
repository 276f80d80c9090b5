//! What the manager makes of what VRAs answer about checkpoints: names, guests that weren't frozen, locks at all targets or at none.

mod common;
#[path = "common/simulated_vra.rs"]
mod simulated_vra;

use std::path::PathBuf;
use std::sync::Arc;

use ::vra::api::{CheckpointId, VmId, VraId};
use ::vra::pki::PkiDir;
use common::{Site, free_udp_port, wait_for};
use serde_json::Value;
use simulated_vra::SimulatedVra;

/// A group of two VMs at one source, each with a target of its own.
struct Trio {
    targets: [Arc<SimulatedVra>; 2],
    // They are served inside it.
    _runtime: tokio::runtime::Runtime,
    site: Site,
}

impl Trio {
    fn start() -> Self {
        let site = Site::start();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
        let vms =
            ["db", "web"].map(|name| (VmId::random(), name.to_owned(), PathBuf::from(format!("/{name}"))));
        let mut inventory = String::from("[[site]]\nname = \"here\"\n");
        for host in ["a", "b", "c"] {
            inventory += &format!("[[host]]\nname = \"{host}\"\nsite = \"here\"\nvra = \"{host}\"\n");
        }
        for (vm, name, path) in &vms {
            let disk = format!("[[vm.disk]]\nname = \"0\"\npath = \"{}\"\n", path.display());
            inventory += &format!("[[vm]]\nname = \"{name}\"\nuuid = \"{vm}\"\nhost = \"a\"\n{disk}");
        }
        site.write_inventory(&inventory);
        let [_, one, other] = ["a", "b", "c"].map(|name| {
            let (id, port) = (VraId::random(), free_udp_port());
            site.enrol(name, &site.token(name), id).expect("enrolled");
            let set = site.zvm(&["vra", "set-address", name, &format!("127.0.0.1:{port}")]);
            assert_eq!(set.code, 0, "{set:?}");
            let pki = PkiDir::open(&site.dir.join(name)).and_then(|pki| pki.load()).expect("credentials");
            let _in_runtime = runtime.enter();
            let vra = SimulatedVra::new(id, name, if name == "a" { &vms } else { &[] });
            vra.serve(port, pki);
            vra
        });
        wait_for("the inventory", || site.json(&["inventory"]).to_string().contains("\"web\""));
        let file = site.dir.join("shop.toml");
        let group = "name = \"shop\"\ntarget = \"b\"\ndatastore = \"/srv\"\nvms = [\"db\"]\n[[vm]]\nname = \"web\"\ntarget = \"c\"\n";
        std::fs::write(&file, group).expect("the file");
        let created = site.zvm(&["vpg", "create", "--file", &file.display().to_string()]);
        assert_eq!(created.code, 0, "{created:?}");
        Self { targets: [one, other], _runtime: runtime, site }
    }

    fn listed(&self) -> Vec<Value> {
        let list = self.site.json(&["checkpoint", "list", "shop", "--limit", "50"]);
        list.as_array().expect("a list").clone()
    }

    /// What is told of a checkpoint's lock.
    fn lock_of(&self, id: CheckpointId) -> (bool, bool) {
        let listed = self.listed();
        let found = listed.iter().find(|info| info["id"] == id.to_string()).expect("listed");
        (found["locked"] == true, found["partly_locked"] == true)
    }
}

#[test]
fn a_lock_that_one_target_doesnt_confirm_is_undone_at_all_that_hadnt_it_before() {
    let trio = Trio::start();
    let [one, other] = &trio.targets;
    let id: CheckpointId = trio.listed()[5]["id"].as_str().expect("id").parse().expect("id");
    let lock = || trio.site.zvm(&["checkpoint", "lock", "shop", &id.to_string()]);

    other.be_slow_to_lock(true);
    let failed = lock();
    assert!(failed.code == 4 && failed.stderr.contains("VRA c does not answer"), "{failed:?}");
    assert!(one.locked().is_empty(), "it is locked at one target alone");
    other.be_slow_to_lock(false);
    wait_for("the other's lock to be undone", || other.locked().is_empty());
    assert_eq!(trio.lock_of(id), (false, false));

    other.locked().insert(id);
    assert_eq!(trio.lock_of(id), (false, true), "one of them keeps it");
    assert_eq!(lock().code, 0);
    assert_eq!(trio.lock_of(id), (true, false));

    // What was locked before stays so.
    other.be_slow_to_lock(true);
    assert_eq!(lock().code, 4);
    other.be_slow_to_lock(false);
    assert_eq!(trio.lock_of(id), (true, false));
    let unlocked = trio.site.zvm(&["checkpoint", "unlock", "shop", &id.to_string()]);
    assert_eq!((unlocked.code, trio.lock_of(id)), (0, (false, false)), "{unlocked:?}");
}

#[test]
fn a_new_tag_is_not_complete_yet_and_names_the_vms_whose_guests_were_not_frozen() {
    let trio = Trio::start();
    let tagged = trio.site.json(&["checkpoint", "tag", "shop", "quiet", "--application"]);
    assert_eq!((&tagged["kind"], &tagged["complete"]), (&"application".into(), &false.into()));
    assert_eq!(tagged["without_agent"], serde_json::json!(["web"]));
    let told = trio.site.zvm(&["checkpoint", "tag", "shop", "quiet", "--application"]).stdout;
    assert!(told.contains("The guest of VM web wasn't frozen") && told.contains("on its way"), "{told}");
    let plain = trio.site.zvm(&["checkpoint", "tag", "shop", "plain"]).stdout;
    assert!(!plain.contains("wasn't frozen"), "{plain}");

    let id = CheckpointId { nonce: 1, counter: 2 }.to_string();
    for moment in ["latest", "2026-11-22T16:00:05Z", &id] {
        let refused = trio.site.zvm(&["checkpoint", "tag", "shop", moment]);
        assert!(refused.code == 2 && refused.stderr.contains("means a moment"), "{moment}: {refused:?}");
    }
}
