//! A site with two VRAs that protect a VM.

use serde_json::Value;
use uuid::Uuid;

use super::vra::Vra;
use super::{Answer, Site, wait_for};

const MIB: usize = 1 << 20;

/// A site with two VRAs; one protects a VM with two disks, the other keeps its journal.
pub(crate) struct Pair {
    // Dropped in this order: VRAs first.
    pub(crate) a: Vra,
    pub(crate) b: Vra,
    pub(crate) site: Site,
    /// Where the guest's disks are.
    pub(crate) disks: [String; 2],
}

impl Pair {
    /// Enrolled VRAs, served disks, an inventory; no group yet.
    pub(crate) fn enrolled() -> Self {
        let site = Site::start();
        let (a, b) = (Vra::start(&site, "vra-a"), Vra::start(&site, "vra-b"));
        wait_for("both VRAs", || {
            let vras = site.json(&["vra", "list"]);
            vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true).count() == 2
        });
        let vm = Uuid::new_v4().to_string();
        let disks = [("vda.img", 0x11, 8 * MIB), ("vdb.img", 0x22, 4 * MIB)]
            .map(|(file, byte, bytes)| a.attach("db", &vm, file, byte, bytes));
        site.write_inventory(&format!(
            "[[site]]\nname = \"s\"\n\
             [[host]]\nname = \"kvm-a\"\nsite = \"s\"\nvra = \"vra-a\"\n\
             [[host]]\nname = \"kvm-b\"\nsite = \"s\"\nvra = \"vra-b\"\n\
             [[datastore]]\nname = \"ds1\"\nhosts = [\"kvm-b\"]\npath = \"{b}/datastore\"\n\
             [[vm]]\nname = \"db\"\nuuid = \"{vm}\"\nhost = \"kvm-a\"\n\
             [[vm.disk]]\nname = \"vda\"\npath = \"{a}/vda.img\"\n\
             [[vm.disk]]\nname = \"vdb\"\npath = \"{a}/vdb.img\"\n\
             [[vm.nic]]\nmac = \"52:54:00:12:34:56\"\nnetwork = \"dr\"\n\
             [[network]]\nname = \"dr\"\nsite = \"s\"\n[[network]]\nname = \"lab\"\nsite = \"s\"\n",
            a = a.dir.display(),
            b = b.dir.display()
        ));
        wait_for("the inventory", || site.json(&["inventory"])["inventory"]["vms"][0]["name"] == "db");
        Self { a, b, site, disks }
    }

    /// The same with a group that is defined everywhere.
    pub(crate) fn defined() -> Self {
        let pair = Self::enrolled();
        let created = pair.create("ds1");
        assert_eq!(created.code, 0, "{created:?}");
        pair
    }

    pub(crate) fn create(&self, datastore: &str) -> Answer {
        let options = ["--journal-limit", "256MiB", "--checkpoint-interval", "1s"];
        let group = ["vpg", "create", "shop", "--vm", "db", "--target", "vra-b", "--datastore", datastore];
        self.site.zvm(&[&group[..], &options].concat())
    }

    /// Writes a group file of how its VMs are to be recovered, and gives its path.
    pub(crate) fn write_recovery(&self) -> String {
        let path = self.site.dir.join("recovery.toml");
        let text = "[recovery]\nhost = \"kvm-b\"\nnetwork = \"dr\"\ntest_network = \"lab\"\n\
                    [[recovery.boot_group]]\nname = \"databases\"\ndelay = \"2m\"\n\
                    [recovery.pre_script]\ncommand = \"/bin/true\"\n\
                    [[vm]]\nname = \"db\"\n[vm.recovery]\nboot_group = \"databases\"\n\
                    [[vm.recovery.nic]]\nmac = \"52:54:00:12:34:56\"\n\
                    failover.ip.static = { address = \"10.0.0.5\", prefix = 24 }\ntest.mac = \"new\"\n";
        std::fs::write(&path, text).expect("the file");
        path.display().to_string()
    }

    pub(crate) fn revisions(&self) -> [Value; 2] {
        [&self.a, &self.b].map(|vra| vra.json(&["status"])["vpgs"][0]["revision"].clone())
    }
}
