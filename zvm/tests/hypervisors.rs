//! A manager that reads hypervisors: what happens there becomes events and alerts, also what happened while either was off.

mod common;
#[path = "common/vcsim.rs"]
mod vcsim;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::libvirt_host::{TestFolder, TestHost, has_libvirt};
use common::{Site, found_in_files, wait_for};
use serde_json::Value;
use vcsim::VCenterSim;

const MIB: u64 = 1 << 20;

/// A manager with two hosts as sources; hosts are read anew each second.
struct Lab {
    // Dropped in this order: the manager first.
    site: Site,
    a: TestHost,
    b: TestHost,
    folder: TestFolder,
}

impl Lab {
    fn new() -> Self {
        let folder = TestFolder::new();
        let [a, b] = ["kvm-a", "kvm-b"].map(|name| TestHost::start(&folder, name));
        let site = Site::start();
        for host in [&a, &b] {
            let added = add(&site, host);
            assert_eq!(added.code, 0, "{added:?}");
        }
        Self { site, a, b, folder }
    }

    fn define(&self, host: &TestHost, name: &str, devices: &str) {
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
             <devices>{devices}<memballoon model='none'/></devices></domain>"
        );
        host.virsh(&["define", &self.folder.file("vm.xml", &xml)]);
    }

    fn vm(&self, name: &str) -> Option<Value> {
        let state = self.site.json(&["inventory"]);
        state["inventory"]["vms"].as_array()?.iter().find(|vm| vm["name"] == name).cloned()
    }

    /// Kinds and descriptions of all events that aren't of readings, newest first.
    fn events(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let events = self.site.json(&["event", "list", "--limit", "1000"]);
        let told = events.as_array().expect("list").iter();
        told.map(|event| (text(&event["kind"]), text(&event["description"]))).collect()
    }

    /// Waits for an event, and gives how many of its kind there are.
    fn told(&self, kind: &str, description: &str) -> usize {
        self.told_of(kind, description, |told| told == description)
    }

    fn told_of(&self, kind: &str, what: &str, is_it: impl Fn(&str) -> bool) -> usize {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let events = self.events();
            if events.iter().any(|(other, told)| other == kind && is_it(told)) {
                return events.iter().filter(|(other, _)| other == kind).count();
            }
            assert!(Instant::now() < deadline, "waited in vain for {kind}: {what}; there are {events:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn alerts(&self) -> BTreeSet<String> {
        let alerts = self.site.json(&["alert", "list"]);
        alerts
            .as_array()
            .expect("list")
            .iter()
            .map(|alert| alert["code"].as_str().expect("code").to_owned())
            .collect()
    }
}

fn add(site: &Site, host: &TestHost) -> common::Answer {
    site.zvm(&[
        "source",
        "add",
        "libvirt",
        &host.name,
        "--site",
        "london",
        "--address",
        &host.uri(),
        "--reread",
        "1s",
    ])
}

fn disk(path: &std::path::Path, target: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='{target}' bus='virtio'/></disk>",
        path.display()
    )
}

#[test]
fn what_happens_at_hosts_becomes_events_whoever_is_off_meanwhile() {
    if !has_libvirt() {
        eprintln!("skipped: it takes root, libvirtd, virsh, QEMU and dnsmasq");
        return;
    }
    let mut lab = Lab::new();
    let network = lab.folder.file("net.xml", "<network><name>prod</name><bridge name='virbr7'/></network>");
    lab.a.virsh(&["net-create", &network]);
    lab.told("NetworkAdded", "network prod of site london came");
    lab.b.virsh(&["net-create", &network]);
    lab.told("NetworkHostsChanged", "network prod came on host kvm-b");

    let (root, extra) = (lab.folder.disk("db.img", 16 * MIB), lab.folder.disk("extra.img", 8 * MIB));
    let nic =
        "<interface type='network'><mac address='52:54:00:00:00:0a'/><source network='prod'/></interface>";
    lab.define(&lab.a, "db", &(disk(&root, "vda") + nic));
    lab.told("VmAdded", "VM db came on host kvm-a");
    lab.a.virsh(&["start", "db"]);
    // QEMU is started standing still: a reading may meet it so.
    lab.told_of("VmPowerChanged", "db to on", |told| told.starts_with("VM db ") && told.ends_with(" to on"));
    let extra_xml = lab.folder.file("extra.xml", &disk(&extra, "vdb"));
    lab.a.virsh(&["attach-device", "db", &extra_xml, "--live", "--config"]);
    lab.told("DiskAdded", &format!("VM db got disk vdb ({}, 8 MiB)", extra.display()));
    // libvirt has no event for this one.
    lab.a.virsh(&["blockresize", "db", "vdb", "12M"]);
    lab.told("DiskResized", "VM db has disk vdb resized from 8 MiB to 12 MiB");

    let through = format!("unix://{}", lab.folder.path.join("migration").display());
    let flags = ["--live", "--persistent", "--undefinesource", "--unsafe"];
    lab.a.virsh(&[&["migrate"], &flags[..], &["db", &lab.b.uri(), "--migrateuri", &through]].concat());
    let moves = lab.told("VmMoved", "VM db moved from host kvm-a to kvm-b");
    assert_eq!(moves, 1, "a move is one event");
    let kinds = |lab: &Lab| lab.events().into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
    assert!(!kinds(&lab).contains(&"VmRemoved".to_owned()), "{:?}", lab.events());

    // The host's daemon dies; what happens meanwhile is told when it is back.
    lab.b.kill_daemon();
    lab.told("HostStateChanged", "host kvm-b went from connected to not-responding");
    wait_for("the alert", || lab.alerts().contains("inventory-unreadable"));
    assert_eq!(lab.vm("db").expect("the last good reading stays in force")["host"], "kvm-b");
    lab.b.kill_guest("db");
    lab.b.start_daemon();
    lab.told("HostStateChanged", "host kvm-b went from not-responding to connected");
    lab.told("VmPowerChanged", "VM db went from on to off");
    wait_for("the alert's end", || !lab.alerts().contains("inventory-unreadable"));

    // The manager is off; what happens meanwhile is told when it is back.
    lab.site.kill();
    lab.b.virsh(&["domrename", "db", "database"]);
    lab.b.virsh(&["detach-disk", "database", "vdb", "--config"]);
    lab.site.serve();
    lab.told("VmRenamed", "VM database was named db");
    lab.told("DiskRemoved", &format!("VM database lost disk vdb ({})", extra.display()));
    lab.b.virsh(&["undefine", "database"]);
    lab.told("VmRemoved", "VM database is gone from host kvm-b");
    lab.a.virsh(&["net-destroy", "prod"]);
    lab.told("NetworkHostsChanged", "network prod is gone from host kvm-a");
    assert_eq!(lab.told("VmAdded", "VM db came on host kvm-a"), 1, "{:?}", lab.events());
}

#[test]
fn sources_are_tried_when_they_are_added_and_shown_with_what_is_wrong() {
    if !has_libvirt() {
        eprintln!("skipped: it takes root, libvirtd, virsh, QEMU and dnsmasq");
        return;
    }
    let folder = TestFolder::new();
    let (host, site) = (TestHost::start(&folder, "kvm-a"), Site::start());
    let source = |args: &[&str]| site.zvm(&[&["source"], args].concat());
    let nowhere =
        ["add", "libvirt", "lost", "--site", "s", "--address", "qemu+unix:///system?socket=/nowhere"];
    let refused = source(&nowhere);
    assert!(refused.code == 4 && refused.stderr.contains("/nowhere"), "{refused:?}");
    assert!(refused.stderr.contains("--unchecked"), "{refused:?}");
    let ssh =
        source(&["add", "libvirt", "ssh", "--site", "s", "--address", "qemu+ssh://h/system", "--unchecked"]);
    assert!(ssh.code == 2 && ssh.stderr.contains("qemu+tls"), "{ssh:?}");
    assert_eq!(source(&[&nowhere[..], &["--unchecked"]].concat()).code, 0);
    assert_eq!(add(&site, &host).code, 0);
    let again = add(&site, &host);
    assert!(again.code == 4 && again.stderr.contains("source edit"), "{again:?}");
    wait_for("both states", || {
        let list = site.json(&["source", "list"]);
        list[0]["hosts"] == 1 && list[0]["error"].is_null() && list[1]["error"].as_str().is_some()
    });
    let shown = source(&["list"]);
    assert!(shown.stdout.contains("kvm-a") && shown.stdout.contains("/nowhere"), "{shown:?}");
    let moved = source(&["edit", "lost", "--address", &host.uri(), "--site", "other"]);
    assert_eq!(moved.code, 0, "{moved:?}");
    wait_for("two sources with one host", || {
        site.zvm(&["alert", "list"]).stdout.contains("inventory-conflict")
    });
    assert_eq!(source(&["remove", "lost"]).code, 0);
    wait_for("the conflict's end", || {
        !site.zvm(&["alert", "list"]).stdout.contains("inventory-")
            && site.json(&["inventory"])["inventory"]["hosts"]
                .as_array()
                .is_some_and(|hosts| hosts.len() == 1)
    });
    assert_eq!(source(&["remove", "lost"]).code, 3);
    let table = site.zvm(&["inventory", "--host", "kvm-a", "--table"]);
    assert!(table.code == 0 && table.stdout.contains("No VMs"), "{table:?}");
}

#[test]
fn a_vcenter_is_known_by_its_certificate_and_its_password_is_nowhere_in_clear() {
    let sim = VCenterSim::start(&["-vms", "2"]);
    let mut site = Site::start();
    let secrets = TestFolder::new();
    let password_file = |name: &str, password: &str| {
        let path = secrets.file(name, &format!("{password}\n"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mode");
        path
    };
    let (good, bad) = (password_file("good", vcsim::PASSWORD), password_file("bad", "wrong"));
    let (url, pin) = (format!("https://{}", sim.address), sim.certificate.to_string());
    let add = |site: &Site, password: &str, more: &[&str]| {
        let source =
            ["source", "add", "vcenter", "vc", "--site", "paris", "--url", &url, "--user", vcsim::USER];
        site.zvm(&[&source[..], &["--password-file", password], more].concat())
    };
    let unknown = add(&site, &good, &[]);
    assert!(
        unknown.code == 4 && unknown.stderr.contains(&pin) && unknown.stderr.contains("compare"),
        "{unknown:?}"
    );
    let wrong = add(&site, &bad, &["--certificate-sha256", &pin]);
    assert!(wrong.code == 4 && wrong.stderr.contains("password"), "{wrong:?}");
    let other = add(&site, &good, &["--certificate-sha256", &"0".repeat(64)]);
    assert!(other.code == 4 && other.stderr.contains(&pin), "{other:?}");
    let added = add(&site, &good, &["--certificate-sha256", &pin]);
    assert_eq!(added.code, 0, "{added:?}");
    let name = || {
        let vms = site.json(&["inventory", "--site", "paris"])["inventory"]["vms"].clone();
        vms[0]["name"].as_str().map(str::to_owned)
    };
    wait_for("the inventory", || name().is_some());
    let before = name().expect("a VM");
    let id = site.json(&["inventory"])["inventory"]["vms"][0]["origin"]["id"].clone();
    sim.peer().ask("rename", serde_json::json!({ "id": id, "to": "renamed" }));
    wait_for("the event", || {
        site.zvm(&["event", "list"]).stdout.contains(&format!("VM renamed was named {before}"))
    });
    let plan = site.zvm(&["plan"]);
    assert!(plan.code == 0 && plan.stdout.contains("renamed"), "{plan:?}");
    let refused = site.zvm(&["protect", "renamed"]);
    assert!(refused.code == 1 && refused.stderr.contains("not a libvirt host"), "{refused:?}");

    // After a restart it is read on; without the key its password must be given again.
    let reads = |site: &Site| {
        let list = site.json(&["source", "list"]);
        list[0]["error"].is_null() && list[0]["read_us"].is_u64()
    };
    site.kill();
    site.serve();
    wait_for("a reading after the restart", || reads(&site));
    assert_eq!(found_in_files(&site.dir, vcsim::PASSWORD), None);
    assert!(!site.log().contains(vcsim::PASSWORD));
    site.kill();
    std::fs::remove_file(site.dir.join("state/credential-key")).expect("the key");
    site.serve();
    wait_for("the lost password", || {
        site.json(&["source", "list"])[0]["error"]
            .as_str()
            .is_some_and(|error| error.contains("--password-file"))
    });
    let edited = site.zvm(&["source", "edit", "vc", "--password-file", &good]);
    assert_eq!(edited.code, 0, "{edited:?}");
    wait_for("a reading with the password", || reads(&site));
    let exposed = secrets.file("exposed", "x");
    let refused = site.zvm(&["source", "edit", "vc", "--password-file", &exposed]);
    assert!(refused.code == 2 && refused.stderr.contains("chmod 600"), "{refused:?}");
}
