//! A protected guest that is migrated live from one host to another one, on storage that both have: its protection follows it.

mod common;

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use common::guest::{bootable_disk, counted, counted_at};
use common::libvirt_host::{HostOptions, TestFolder, TestHost, has_libvirt};
use common::vra::Vra;
use common::{Site, wait_for};

const MIB: u64 = 1 << 20;

/// Two hosts with VRAs, a third VRA that keeps journals, and the manager.
struct Lab {
    // Dropped in this order: who uses the others first.
    a: TestHost,
    b: TestHost,
    vra_a: Vra,
    vra_b: Vra,
    target: Vra,
    site: Site,
    folder: TestFolder,
    disk: PathBuf,
}

impl Lab {
    /// The guest is called db, boots from vda, and is defined at kvm-a.
    fn new() -> Self {
        let (folder, site) = (TestFolder::new(), Site::start());
        let run = folder.path.join("run-holdfast");
        let (vra_a, vra_b) = (Vra::start_at(&site, "kvm-a", &run), Vra::start_at(&site, "kvm-b", &run));
        let target = Vra::start(&site, "kvm-c");
        let host = |name: &str, vra: &Vra| {
            let mounts = vec![(vra.dir.join("run"), run.clone())];
            TestHost::start_with(&folder, name, &HostOptions { mounts, ..HostOptions::default() })
        };
        let (a, b) = (host("kvm-a", &vra_a), host("kvm-b", &vra_b));
        let disk = bootable_disk(&folder, "db.img", 16 * MIB);
        let xml = format!(
            "<domain type='qemu'><name>db</name><memory unit='MiB'>16</memory>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
             <devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/><boot order='1'/></disk></devices></domain>",
            disk.display()
        );
        a.virsh(&["define", &folder.file("vm.xml", &xml)]);
        let lab = Self { a, b, vra_a, vra_b, target, site, folder, disk };
        for host in [&lab.a, &lab.b] {
            let (name, address) = (host.name.clone(), host.uri());
            let source =
                ["source", "add", "libvirt", &name, "--site", "s", "--address", &address, "--reread", "1s"];
            lab.zvm(&source);
        }
        wait_for("the VM and the VRAs", || {
            let vras = lab.site.json(&["vra", "list"]);
            vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true).count() == 3
                && lab.vm()["name"] == "db"
        });
        lab
    }

    /// Runs a command that must succeed.
    fn zvm(&self, args: &[&str]) -> common::Answer {
        let answer = self.site.zvm(args);
        assert_eq!(answer.code, 0, "{args:?}: {answer:?}");
        answer
    }

    fn vm(&self) -> serde_json::Value {
        self.site.json(&["inventory"])["inventory"]["vms"][0].clone()
    }

    /// What the volumes of a VRA are to it.
    fn shared(&self, vra: &str) -> Vec<String> {
        let volumes = self.site.json(&["vra", "show", vra])["status"]["volumes"].clone();
        let volumes = volumes.as_array().expect("list").iter();
        volumes.map(|volume| volume["shared"].as_str().unwrap_or("alone").to_owned()).collect()
    }

    fn alerts(&self) -> String {
        self.site.zvm(&["alert", "list"]).stdout
    }

    /// Has db protected at kvm-a, ready to go to kvm-b, started, and in a group.
    fn protect(&self) {
        let told = self.zvm(&["protect", "db", "--also-on", "kvm-b"]);
        assert!(told.stdout.contains("Also served by VRA kvm-b"), "{told:?}");
        self.a.virsh(&["start", "db"]);
        self.counts_on(0);
        wait_for("the inventory to know who serves the guest", || {
            let vm = self.vm();
            vm["power"] == "on" && vm["disks"][0]["served"] == true
        });
        let datastore = self.target.dir.join("datastore").display().to_string();
        let group = ["vpg", "create", "shop", "--vm", "db", "--target", "kvm-c", "--datastore", &datastore];
        self.zvm(&[&group[..], &["--journal-limit", "256MiB", "--checkpoint-interval", "1s"]].concat());
    }

    fn migrate(&self, from: &TestHost, to: &TestHost) {
        let through = format!("unix://{}", self.folder.path.join("migration").display());
        let flags = ["--live", "--persistent", "--undefinesource", "--unsafe"];
        from.virsh(&[&["migrate"], &flags[..], &["db", &to.uri(), "--migrateuri", &through]].concat());
    }

    /// Waits until the guest has written so much more.
    fn counts_on(&self, more: u16) {
        let so_far = counted(&self.disk);
        wait_for("the guest to count on", || counted(&self.disk) > so_far + more);
    }

    /// Waits until a VRA protects db.
    fn protected_by(&self, vra: &str) {
        wait_for("the protection to be there", || {
            let vms = self.site.json(&["vra", "show", vra])["status"]["source_vms"].clone();
            vms.as_array().expect("list").iter().any(|vm| vm["mode"] == "streaming")
        });
    }

    /// A checkpoint outside of syncs, with this tag and a number.
    fn tag(&self, tag: &str) -> String {
        let attempts = (0..20).map(|attempt| format!("{tag}, {attempt}"));
        let counts = |tag: &String| {
            wait_for(tag, || self.site.zvm(&["checkpoint", "tag", "shop", tag]).code == 0);
            std::thread::sleep(Duration::from_secs(2));
            self.site.complete("shop").contains(tag)
        };
        attempts.into_iter().find(counts).expect("a checkpoint that counts")
    }

    /// How far the guest had counted at a checkpoint.
    fn counted_in(&self, tag: &str) -> u16 {
        let count = Cell::new(0);
        self.site.tested("shop", tag, |disks| count.set(counted_at(&disks[0].1, &self.folder)));
        count.get()
    }
}

/// A test of this file needs libvirtd.
macro_rules! need_libvirt {
    () => {
        if !has_libvirt() {
            eprintln!("skipped: it takes root, libvirtd, virsh, QEMU and dnsmasq");
            return;
        }
    };
}

#[test]
fn protection_follows_a_guest_that_is_migrated_live_and_its_history_stays() {
    need_libvirt!();
    let lab = Lab::new();
    let before = lab.a.virsh(&["dumpxml", "db", "--inactive"]);
    let refused = lab.site.zvm(&["protect", "db", "--also-on", "kvm-b", "--door", "ublk"]);
    assert!(refused.code != 0 && refused.stderr.contains("--door nbd"), "{refused:?}");
    let refused = lab.site.zvm(&["protect", "db", "--also-on", "kvm-a"]);
    assert!(refused.code != 0 && refused.stderr.contains("kvm-a"), "{refused:?}");
    lab.protect();
    assert_eq!(
        (lab.shared("kvm-a"), lab.shared("kvm-b")),
        (vec!["owner".to_owned()], vec!["standby".to_owned()])
    );
    lab.protected_by("kvm-a");
    let at_a = lab.tag("at a");
    let counted_at_a = counted(&lab.disk);

    lab.migrate(&lab.a, &lab.b);
    // The guest writes at once, whether the manager has seen it or not.
    lab.counts_on(20);
    wait_for("the event", || {
        lab.site.zvm(&["event", "list"]).stdout.contains("is protected by VRA kvm-b now")
    });
    lab.protected_by("kvm-b");
    wait_for("the disk to be at kvm-b", || {
        lab.shared("kvm-b") == ["owner"] && lab.shared("kvm-a") == ["standby"]
    });
    wait_for("the alerts' end", || !lab.alerts().contains("vm-moved"));
    let migrated_with = counted(&lab.disk);
    let at_b = lab.tag("at b");
    let (first, second) = (lab.counted_in(&at_a), lab.counted_in(&at_b));
    assert!(
        0 < first && first <= counted_at_a && migrated_with <= second,
        "{first} {counted_at_a} {migrated_with} {second}"
    );

    // Back again, where an older generation of that VRA is known.
    lab.migrate(&lab.b, &lab.a);
    lab.counts_on(20);
    lab.protected_by("kvm-a");
    let back_with = counted(&lab.disk);
    let back = lab.tag("back at a");
    assert!(
        lab.counted_in(&back) >= back_with
            && lab.counted_in(&at_b) == second
            && lab.counted_in(&at_a) == first
    );

    // And to kvm-b for good: there it gets its disk back.
    lab.migrate(&lab.a, &lab.b);
    lab.protected_by("kvm-b");
    lab.zvm(&["vpg", "delete", "shop"]);
    wait_for("the inventory to have it there", || lab.vm()["host"] == "kvm-b");
    lab.zvm(&["unprotect", "db"]);
    wait_for("kvm-a to serve nothing", || lab.shared("kvm-a").is_empty());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(lab.shared("kvm-b"), ["owner"], "the guest still uses it");
    lab.counts_on(0);
    lab.b.virsh(&["destroy", "db"]);
    wait_for("the end of the serving", || lab.shared("kvm-b").is_empty());
    let written = counted(&lab.disk);
    assert_eq!(lab.b.virsh(&["dumpxml", "db", "--inactive"]), before, "the definition is as it was");
    assert!(!lab.folder.path.join(".db.img.holdfast-shared").exists());
    lab.b.virsh(&["start", "db"]);
    wait_for("the guest to count on its own disk", || counted(&lab.disk) > written);
}

#[test]
fn a_guest_writes_on_at_the_other_host_while_the_manager_is_off_and_the_old_vra_is_killed() {
    need_libvirt!();
    let mut lab = Lab::new();
    lab.protect();
    lab.protected_by("kvm-a");
    let at_a = lab.tag("at a");
    lab.site.kill();
    lab.migrate(&lab.a, &lab.b);
    lab.counts_on(20);
    lab.vra_a.kill();
    lab.vra_b.kill();
    lab.vra_a.serve();
    lab.vra_b.serve();
    // QEMU connects again, and sends again what wasn't answered. Older versions of libvirt let the guest stand still first.
    let so_far = counted(&lab.disk);
    wait_for("the guest to count on", || {
        let _ = lab.b.try_virsh(&["resume", "db"]);
        counted(&lab.disk) > so_far + 20
    });
    lab.site.serve();
    lab.protected_by("kvm-b");
    let by_then = counted(&lab.disk);
    let at_b = lab.tag("at b");
    assert!(lab.counted_in(&at_a) < by_then && by_then <= lab.counted_in(&at_b));
}
