//! A manager and two VRAs as processes: from enrolment to a test of a recovered disk, and what happens without each of them.

mod common;

use common::vra::Vra;
use common::{Answer, Site, wait_for};
use serde_json::Value;
use uuid::Uuid;

const MIB: usize = 1 << 20;

/// A site with two VRAs; one protects a VM with two disks, the other keeps its journal.
struct Pair {
    // Dropped in this order: VRAs first.
    a: Vra,
    b: Vra,
    site: Site,
}

impl Pair {
    /// Enrolled VRAs, served disks, an inventory; no group yet.
    fn enrolled() -> Self {
        let site = Site::start();
        let (a, b) = (Vra::start(&site, "vra-a"), Vra::start(&site, "vra-b"));
        wait_for("both VRAs", || {
            let vras = site.json(&["vra", "list"]);
            vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true).count() == 2
        });
        let vm = Uuid::new_v4().to_string();
        a.attach("db", &vm, "vda.img", 0x11, 8 * MIB);
        a.attach("db", &vm, "vdb.img", 0x22, 4 * MIB);
        site.write_inventory(&format!(
            "[[site]]\nname = \"s\"\n\
             [[host]]\nname = \"kvm-a\"\nsite = \"s\"\nvra = \"vra-a\"\n\
             [[host]]\nname = \"kvm-b\"\nsite = \"s\"\nvra = \"vra-b\"\n\
             [[datastore]]\nname = \"ds1\"\nhosts = [\"kvm-b\"]\npath = \"{b}/datastore\"\n\
             [[vm]]\nname = \"db\"\nuuid = \"{vm}\"\nhost = \"kvm-a\"\n\
             [[vm.disk]]\nname = \"vda\"\npath = \"{a}/vda.img\"\n\
             [[vm.disk]]\nname = \"vdb\"\npath = \"{a}/vdb.img\"\n",
            a = a.dir.display(),
            b = b.dir.display()
        ));
        wait_for("the inventory", || site.json(&["inventory"])["inventory"]["vms"][0]["name"] == "db");
        Self { a, b, site }
    }

    /// The same with a group that is defined everywhere.
    fn defined() -> Self {
        let pair = Self::enrolled();
        let created = pair.create("ds1");
        assert_eq!(created.code, 0, "{created:?}");
        pair
    }

    fn create(&self, datastore: &str) -> Answer {
        let options = ["--journal-limit", "256MiB", "--checkpoint-interval", "1s"];
        let group = ["vpg", "create", "shop", "--vm", "db", "--target", "vra-b", "--datastore", datastore];
        self.site.zvm(&[&group[..], &options].concat())
    }

    fn revisions(&self) -> [Value; 2] {
        [&self.a, &self.b].map(|vra| vra.json(&["status"])["vpgs"][0]["revision"].clone())
    }
}

#[test]
fn a_definition_reaches_both_vras_and_outlives_the_manager() {
    let mut pair = Pair::defined();
    assert_eq!(pair.revisions(), [1, 1]);
    pair.site.kill();
    assert_eq!(pair.revisions(), [1, 1]);
    pair.site.serve();
    // A new address is a new revision, for the other side's sake.
    let address =
        pair.site.json(&["vra", "show", "vra-b"])["state"]["address"].as_str().expect("address").to_owned();
    let changed = pair.site.zvm(&["vra", "set-address", "vra-b", &address.replace("127.0.0.1", "localhost")]);
    assert_eq!(changed.code, 0, "{changed:?}");
    wait_for("the new revision", || pair.revisions() == [2, 2]);
    assert_eq!(pair.site.zvm(&["vpg", "delete", "shop"]).code, 0);
    assert_eq!(pair.revisions(), [Value::Null, Value::Null]);
    assert_eq!(pair.site.zvm(&["vpg", "show", "shop"]).code, 3);
}

#[test]
fn what_a_vra_refuses_is_told_with_a_remedy_and_can_be_undone() {
    let pair = Pair::enrolled();
    let refused = pair.create("/nowhere");
    assert!(refused.code == 1 && refused.stderr.contains("vra-b refuses the definition"), "{refused:?}");
    assert!(refused.stderr.contains("`zvm vpg delete shop` ends it"), "{refused:?}");
    wait_for("the alert", || pair.site.zvm(&["alert", "list"]).stdout.contains("vra-refused"));
    assert_eq!(pair.site.zvm(&["vpg", "delete", "shop"]).code, 0);
    wait_for("the alert's end", || pair.site.zvm(&["alert", "list"]).stdout.contains("No alerts"));

    assert_eq!(pair.a.run(&["detach", "db:1"]).code, 0);
    let missing = pair.create("ds1");
    assert!(
        missing.code == 4 && missing.stderr.contains("vra attach") && missing.stderr.contains("vdb.img"),
        "{missing:?}"
    );
}

#[test]
fn a_checkpoint_is_locked_and_unlocked_by_its_tag_and_its_id() {
    let pair = Pair::defined();
    let tag = || pair.site.zvm(&["checkpoint", "tag", "shop", "kept"]).code == 0;
    wait_for("the first sync", tag);
    let listed = || {
        let listed = pair.site.json(&["checkpoint", "list", "shop", "--tagged"]);
        listed.as_array().and_then(|listed| listed.iter().find(|info| info["tag"] == "kept").cloned())
    };
    wait_for("the checkpoint", || listed().is_some_and(|info| info["complete"] == true));
    let id = listed().expect("listed")["id"].as_str().expect("id").to_owned();
    for (command, at, is_locked) in [
        ("lock", "kept", true),
        ("lock", id.as_str(), true),
        ("unlock", "kept", false),
        ("unlock", "kept", false),
        ("lock", id.as_str(), true),
        ("unlock", id.as_str(), false),
        ("unlock", id.as_str(), false),
    ] {
        let answer = pair.site.zvm(&["checkpoint", command, "shop", at]);
        assert_eq!(answer.code, 0, "{command} {at}: {answer:?}");
        assert_eq!(listed().expect("listed")["locked"], is_locked, "after {command} {at}");
    }
    for at in ["never", "00000000000000000000000000000001-7"] {
        let unknown = pair.site.zvm(&["checkpoint", "unlock", "shop", at]);
        assert!(unknown.code == 3 && unknown.stderr.contains("has no"), "{unknown:?}");
    }
}
