//! A guest whose disk a VRA serves because of `zvm protect`, from its first boot on it to the way back.

mod common;

use std::cell::Cell;

use common::guest::{bootable_disk, counted, counted_at};
use common::libvirt_host::{TestFolder, TestHost, has_libvirt};
use common::vra::Vra;
use common::{Site, wait_for};

const MIB: u64 = 1 << 20;

#[test]
fn a_protected_guest_boots_from_the_served_disk_is_recovered_and_gets_its_disk_back() {
    if !has_libvirt() {
        eprintln!("skipped: it takes root, libvirtd, virsh, QEMU and dnsmasq");
        return;
    }
    let folder = TestFolder::new();
    let host = TestHost::start(&folder, "kvm-a");
    let site = Site::start();
    let (_source, target) = (Vra::start(&site, "kvm-a"), Vra::start(&site, "kvm-b"));
    let disk = bootable_disk(&folder, "db.img", 16 * MIB);
    let image = folder.path.join("data.qcow2").display().to_string();
    let made =
        std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &image, "1M"]).status();
    assert!(made.expect("qemu-img").success());
    let xml = format!(
        "<domain type='qemu'><name>db</name><memory unit='MiB'>16</memory>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
         <devices><graphics type='vnc' passwd='secret'/>\
         <disk type='file' device='disk'><driver name='qemu' type='raw' cache='writeback'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/><boot order='1'/></disk>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>\
         <target dev='vdb' bus='virtio'/></disk></devices></domain>",
        disk.display()
    );
    host.virsh(&["define", &folder.file("vm.xml", &xml)]);
    let before = host.virsh(&["dumpxml", "db", "--inactive", "--security-info"]);
    let zvm = |args: &[&str]| {
        let answer = site.zvm(args);
        assert_eq!(answer.code, 0, "{args:?}: {answer:?}");
        answer
    };
    zvm(&["source", "add", "libvirt", "kvm-a", "--site", "s", "--address", &host.uri(), "--reread", "1s"]);
    wait_for("the VM and the VRAs", || {
        let vras = site.json(&["vra", "list"]);
        vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true).count() == 2
            && site.json(&["inventory"])["inventory"]["vms"][0]["name"] == "db"
    });

    // What can't be protected is named, with the way out; nothing is served by then.
    let refused = site.zvm(&["protect", "db"]);
    assert!(
        refused.code == 1 && refused.stderr.contains("vdb") && refused.stderr.contains("--exclude vdb"),
        "{refused:?}"
    );
    assert_eq!(site.json(&["vra", "show", "kvm-a"])["status"]["volumes"], serde_json::json!([]));

    // While the guest runs, it goes on with its disk; from its next start on it has the served one.
    host.virsh(&["start", "db"]);
    wait_for("the guest to count", || counted(&disk) > 0);
    let told = zvm(&["protect", "db", "--exclude", "vdb", "--door", "nbd"]);
    assert!(told.stdout.contains("nbd+unix://") && told.stdout.contains("start it again"), "{told:?}");
    let group = ["vpg", "create", "shop", "--vm", "db", "--exclude", "db:vdb", "--target", "kvm-b"];
    let datastore = target.dir.join("datastore").display().to_string();
    let options = ["--datastore", &datastore, "--journal-limit", "256MiB", "--checkpoint-interval", "1s"];
    let create = [&group[..], &options].concat();
    wait_for("the inventory to know that the guest writes past the VRA", || {
        let early = site.zvm(&create);
        assert_eq!(early.code, 4, "{early:?}");
        early.stderr.contains("shut it down and start it again")
    });
    host.virsh(&["destroy", "db"]);
    let so_far = counted(&disk);
    host.virsh(&["start", "db"]);
    wait_for("the guest to count on", || counted(&disk) > so_far);
    let served = |wanted: bool| {
        wait_for("the inventory to know who serves the guest", || {
            let vm = site.json(&["inventory"])["inventory"]["vms"][0].clone();
            vm["power"] == "on" && vm["disks"][0]["served"] == wanted
        });
    };
    served(true);
    let shown = site.json(&["inventory"])["inventory"]["vms"][0]["disks"][0]["path"].clone();
    assert_eq!(shown, disk.display().to_string(), "it is still that disk");

    zvm(&create);
    site.tag("shop", "now");
    let at_least = counted(&disk);
    wait_for("the guest to count on", || counted(&disk) > at_least + 20);
    site.tag("shop", "later");
    let recovered = |tag: &str| {
        let count = Cell::new(0);
        site.tested("shop", tag, |disks| count.set(counted_at(&disks[0].1, &folder)));
        count.get()
    };
    let (now, later) = (recovered("now"), recovered("later"));
    assert!(so_far < now && now <= at_least && at_least < later, "{so_far} {now} {at_least} {later}");

    // A member is not taken out of the way; after that the guest keeps the served disk until it is stopped.
    let member = site.zvm(&["unprotect", "db"]);
    assert!(member.code == 4 && member.stderr.contains("remove-vm"), "{member:?}");
    zvm(&["vpg", "delete", "shop"]);
    let told = zvm(&["unprotect", "db"]);
    assert!(told.stdout.contains("until then they are served"), "{told:?}");
    let volumes = || site.json(&["vra", "show", "kvm-a"])["status"]["volumes"].as_array().map(Vec::len);
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(volumes(), Some(1), "the guest still uses it");
    let so_far = counted(&disk);
    wait_for("the guest to count on", || counted(&disk) > so_far);
    host.virsh(&["destroy", "db"]);
    wait_for("the end of the serving", || volumes() == Some(0));
    let after = host.virsh(&["dumpxml", "db", "--inactive", "--security-info"]);
    assert_eq!(after, before, "the definition is as it was, password and all");
    let so_far = counted(&disk);
    host.virsh(&["start", "db"]);
    wait_for("the guest to count on, on its own disk", || counted(&disk) > so_far);
    served(false);
}
