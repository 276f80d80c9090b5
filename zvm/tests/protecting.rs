//! A guest whose disk a VRA serves because of `zvm protect`, from its first boot on it to the way back.

mod common;

use std::cell::Cell;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use common::guest::{bootable_disk, counted, counted_at};
use common::libvirt_host::{TestFolder, TestHost, has_libvirt};
use common::vra::Vra;
use common::{Site, wait_for};

const MIB: u64 = 1 << 20;

/// A host with a guest, its VRA, another one that keeps journals, and the manager.
struct Lab {
    // Dropped in this order: who uses the others first.
    site: Site,
    _source: Vra,
    target: Vra,
    host: TestHost,
    folder: TestFolder,
    /// The guest's first disk.
    disk: PathBuf,
}

impl Lab {
    /// The guest is called db; it boots from vda, and has these devices, too.
    fn new(devices: impl Fn(&TestFolder) -> String) -> Self {
        let folder = TestFolder::new();
        let host = TestHost::start(&folder, "kvm-a");
        let site = Site::start();
        let (source, target) = (Vra::start(&site, "kvm-a"), Vra::start(&site, "kvm-b"));
        let disk = bootable_disk(&folder, "db.img", 16 * MIB);
        let xml = format!(
            "<domain type='qemu'><name>db</name><memory unit='MiB'>16</memory>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
             <devices><graphics type='vnc' passwd='secret'/>\
             <disk type='file' device='disk'><driver name='qemu' type='raw' cache='writeback'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/><boot order='1'/></disk>{}</devices></domain>",
            disk.display(),
            devices(&folder)
        );
        host.virsh(&["define", &folder.file("vm.xml", &xml)]);
        let lab = Self { site, _source: source, target, host, folder, disk };
        lab.zvm(&[
            "source",
            "add",
            "libvirt",
            "kvm-a",
            "--site",
            "s",
            "--address",
            &lab.host.uri(),
            "--reread",
            "1s",
        ]);
        wait_for("the VM and the VRAs", || {
            let vras = lab.site.json(&["vra", "list"]);
            vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true).count() == 2
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

    fn create(&self, options: &[&str]) -> common::Answer {
        let datastore = self.target.dir.join("datastore").display().to_string();
        let group = ["vpg", "create", "shop", "--vm", "db", "--target", "kvm-b", "--datastore", &datastore];
        let limits = ["--journal-limit", "256MiB", "--checkpoint-interval", "1s"];
        self.site.zvm(&[&group[..], &limits, options].concat())
    }

    fn vm(&self) -> serde_json::Value {
        self.site.json(&["inventory"])["inventory"]["vms"][0].clone()
    }

    /// How many volumes the guest's VRA serves.
    fn volumes(&self) -> usize {
        self.site.json(&["vra", "show", "kvm-a"])["status"]["volumes"].as_array().expect("list").len()
    }

    /// Waits until the inventory knows whether the guest's disk of that number is served.
    fn served(&self, disk: usize, wanted: bool) {
        wait_for("the inventory to know who serves the guest", || {
            let vm = self.vm();
            vm["power"] == "on" && vm["disks"][disk]["served"] == wanted
        });
    }

    /// Waits until the guest has written so much more.
    fn counts_on(&self, more: u16) {
        let so_far = counted(&self.disk);
        wait_for("the guest to count on", || counted(&self.disk) > so_far + more);
    }

    fn restart(&self) {
        self.host.virsh(&["destroy", "db"]);
        self.host.virsh(&["start", "db"]);
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
fn a_protected_guest_boots_from_the_served_disk_is_recovered_and_gets_its_disk_back() {
    need_libvirt!();
    let lab = Lab::new(|folder| {
        let image = folder.path.join("data.qcow2").display().to_string();
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &image, "1M"]).status();
        assert!(made.expect("qemu-img").success());
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>\
             <target dev='vdb' bus='virtio'/></disk>"
        )
    });
    let definition = || lab.host.virsh(&["dumpxml", "db", "--inactive", "--security-info"]);
    let before = definition();

    // What can't be protected is named, with the way out; nothing is served by then.
    let refused = lab.site.zvm(&["protect", "db"]);
    assert!(
        refused.code == 1 && refused.stderr.contains("vdb") && refused.stderr.contains("--exclude vdb"),
        "{refused:?}"
    );
    assert_eq!(lab.volumes(), 0);

    // While the guest runs, it goes on with its disk; from its next start on it has the served one.
    lab.host.virsh(&["start", "db"]);
    wait_for("the guest to count", || counted(&lab.disk) > 0);
    let told = lab.zvm(&["protect", "db", "--exclude", "vdb", "--door", "nbd"]);
    assert!(told.stdout.contains("nbd+unix://") && told.stdout.contains("start it again"), "{told:?}");
    wait_for("the inventory to know that the guest writes past the VRA", || {
        let early = lab.create(&["--exclude", "db:vdb"]);
        assert_eq!(early.code, 4, "{early:?}");
        early.stderr.contains("shut it down and start it again")
    });
    let so_far = counted(&lab.disk);
    lab.restart();
    lab.counts_on(0);
    lab.served(0, true);
    assert_eq!(lab.vm()["disks"][0]["path"], lab.disk.display().to_string(), "it is still that disk");

    let created = lab.create(&["--exclude", "db:vdb"]);
    assert_eq!(created.code, 0, "{created:?}");
    lab.site.tag("shop", "now");
    let at_least = counted(&lab.disk);
    lab.counts_on(20);
    lab.site.tag("shop", "later");
    let recovered = |tag: &str| {
        let count = Cell::new(0);
        lab.site.tested("shop", tag, |disks| count.set(counted_at(&disks[0].1, &lab.folder)));
        count.get()
    };
    let (now, later) = (recovered("now"), recovered("later"));
    assert!(so_far < now && now <= at_least && at_least < later, "{so_far} {now} {at_least} {later}");

    // A member is not taken out of the way; after that the guest keeps the served disk until it is stopped.
    let member = lab.site.zvm(&["unprotect", "db"]);
    assert!(member.code == 4 && member.stderr.contains("remove-vm"), "{member:?}");
    lab.zvm(&["vpg", "delete", "shop"]);
    let told = lab.zvm(&["unprotect", "db"]);
    assert!(told.stdout.contains("until then they are served"), "{told:?}");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(lab.volumes(), 1, "the guest still uses it");
    lab.counts_on(0);
    lab.host.virsh(&["destroy", "db"]);
    wait_for("the end of the serving", || lab.volumes() == 0);
    assert_eq!(definition(), before, "the definition is as it was, password and all");
    lab.host.virsh(&["start", "db"]);
    lab.counts_on(0);
    lab.served(0, false);
}

#[test]
fn a_new_disk_joins_its_group_by_itself_once_the_guest_can_use_the_served_device() {
    need_libvirt!();
    let lab = Lab::new(|_| String::new());
    lab.zvm(&["protect", "db"]);
    lab.host.virsh(&["start", "db"]);
    lab.served(0, true);
    let created = lab.create(&["--new-disks", "protect"]);
    assert_eq!(created.code, 0, "{created:?}");
    lab.site.tag("shop", "one disk");

    let extra = lab.folder.disk("extra.img", MIB);
    let xml = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='vdb' bus='virtio'/></disk>",
        extra.display()
    );
    lab.host.virsh(&["attach-device", "db", &lab.folder.file("extra.xml", &xml), "--live", "--config"]);
    let alerts = || lab.site.zvm(&["alert", "list"]).stdout;
    wait_for("the disk to be served", || lab.volumes() == 2);
    wait_for("the alert", || alerts().contains("disk-not-protected"));
    let members = || lab.site.json(&["vpg", "show", "shop"])["vpg"]["settings"]["vms"][0]["volumes"].clone();
    assert_eq!(members().as_array().map(Vec::len), Some(1), "the guest writes to it past the VRA");
    lab.restart();
    wait_for("the disk to join", || members().as_array().is_some_and(|volumes| volumes.len() == 2));
    wait_for("the alert's end", || !alerts().contains("disk-not-protected"));
    // One that falls into the full sync that follows never counts.
    let two_disks = (0..10).map(|attempt| format!("two disks, {attempt}")).find(|tag| {
        wait_for(tag, || lab.site.zvm(&["checkpoint", "tag", "shop", tag]).code == 0);
        std::thread::sleep(Duration::from_secs(2));
        lab.site.complete("shop").contains(tag)
    });
    let two_disks = two_disks.expect("a checkpoint after the sync");
    lab.site.tested("shop", &two_disks, |disks| assert_eq!(disks.len(), 2));
    lab.site.tested("shop", "one disk", |disks| assert_eq!(disks.len(), 1));
}
