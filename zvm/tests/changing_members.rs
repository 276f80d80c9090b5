//! VMs join a group that runs and leave it: three VRAs as processes, guests' writes meanwhile, and what can be recovered of which moment.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use common::recovered::reads;
use common::vra::{Vra, has_qemu_io, qemu_io};
use common::{Answer, Site, wait_for};
use serde_json::Value;
use uuid::Uuid;

const MIB: usize = 1 << 20;

/// A source with two VMs, a target, and one that is a target and has a VM, too.
struct Trio {
    // Dropped in this order: VRAs first.
    a: Vra,
    b: Vra,
    c: Vra,
    /// Where the guests' disks are: those of db and web at the source, and of app.
    disks: [String; 3],
    /// UUIDs of those VMs.
    vms: [String; 3],
    inventory: String,
    site: Site,
}

impl Trio {
    /// What the inventory has of the second disk of db.
    fn second_disk(&self) -> Value {
        self.site.json(&["inventory", "--vm", "db"])["inventory"]["vms"][0]["disks"][1].clone()
    }

    /// With a group of the first VM, whose journal the first target keeps.
    fn defined() -> Self {
        let site = Site::start();
        let [a, b, c] = ["vra-a", "vra-b", "vra-c"].map(|name| Vra::start(&site, name));
        let vms = [0; 3].map(|_| Uuid::new_v4().to_string());
        let disks = [("db", &a, 0x11), ("web", &a, 0x77), ("app", &c, 0x66)];
        let mut inventory = format!(
            "[[site]]\nname = \"s\"\n[[datastore]]\nname = \"ds1\"\nhosts = [\"kvm-b\"]\npath = \"{}/datastore\"\n",
            b.dir.display()
        );
        for vra in [&a, &b, &c] {
            let host = vra.name.replace("vra", "kvm");
            inventory += &format!("[[host]]\nname = \"{host}\"\nsite = \"s\"\nvra = \"{}\"\n", vra.name);
        }
        for ((name, vra, _), vm) in disks.iter().zip(&vms) {
            inventory += &format!(
                "[[vm]]\nname = \"{name}\"\nuuid = \"{vm}\"\nhost = \"{}\"\n\
                 [[vm.disk]]\nname = \"vda\"\npath = \"{}/{name}.img\"\n",
                vra.name.replace("vra", "kvm"),
                vra.dir.display()
            );
        }
        let disks = [0, 1, 2].map(|at| {
            let (name, vra, byte) = disks[at];
            vra.attach(name, &vms[at], &format!("{name}.img"), byte, 8 * MIB)
        });
        site.write_inventory(&inventory);
        let trio = Self { a, b, c, disks, vms, inventory, site };
        wait_for("the VRAs and the inventory", || {
            let vras = trio.site.json(&["vra", "list"]);
            let reachable = vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true);
            reachable.count() == 3 && !trio.site.json(&["inventory"])["inventory"]["vms"][2].is_null()
        });
        let group = ["vpg", "create", "shop", "--vm", "db", "--target", "vra-b", "--datastore", "ds1"];
        let options = ["--journal-limit", "256MiB", "--checkpoint-interval", "1s"];
        trio.done(&[&group[..], &options].concat());
        trio
    }

    fn done(&self, args: &[&str]) -> Answer {
        let answer = self.site.zvm(args);
        assert_eq!(answer.code, 0, "{args:?}: {answer:?}");
        answer
    }

    fn tag(&self, tag: &str) {
        self.site.tag("shop", tag);
    }

    fn complete(&self) -> Vec<String> {
        self.site.complete("shop")
    }

    fn tested(&self, at: &str, check: impl Fn(&[(String, String)])) {
        self.site.tested("shop", at, check);
    }

    fn vpgs_at(&self, vra: &Vra) -> usize {
        vra.json(&["status"])["vpgs"].as_array().map_or(0, Vec::len)
    }
}

/// What QEMU sees of a disk's size, in bytes.
fn virtual_size(uri: &str) -> usize {
    let info = std::process::Command::new("qemu-img").args(["info", "--output=json", uri]).output();
    let info: Value = serde_json::from_slice(&info.expect("qemu-img").stdout).expect("JSON");
    info["virtual-size"].as_u64().expect("a size") as usize
}

/// Journals in a datastore, by their folders' names.
fn journals(datastore: &Path) -> Vec<PathBuf> {
    let folders = |path: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let vms = folders(datastore).iter().flat_map(|group| folders(group)).collect::<Vec<_>>();
    vms.into_iter().filter(|vm| vm.join("journal.hfj").exists()).collect()
}

#[test]
fn a_disk_that_has_grown_is_protected_in_its_new_size_without_anybody_asking() {
    if !has_qemu_io() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let trio = Trio::defined();
    trio.tag("before");
    let uri = &trio.disks[0];
    let image = std::fs::OpenOptions::new().write(true).open(trio.a.dir.join("db.img")).expect("disk");
    image.set_len(12 * MIB as u64).expect("longer");
    let size = || {
        trio.site.json(&["vpg", "show", "shop"])["vpg"]["settings"]["vms"][0]["volumes"][0]["size_bytes"]
            .clone()
    };
    wait_for("the new size in the definition", || size() == 12 * MIB);
    let served = || trio.a.json(&["list"])[0]["size_bytes"].clone();
    wait_for("the guest's new size", || served() == 12 * MIB);
    qemu_io(uri, &[&format!("write -P 0x44 {} {}", 7 * MIB, 3 * MIB)]);
    trio.tag("after");
    trio.tested("before", |disks| {
        let [(_, only)] = disks else { panic!("one disk: {disks:?}") };
        reads(only, 0x11, 0, 8 * MIB);
        assert_eq!(virtual_size(only), 8 * MIB, "it ends where it ended then");
    });
    trio.tested("after", |disks| {
        let [(_, only)] = disks else { panic!("one disk: {disks:?}") };
        reads(only, 0x11, 0, 7 * MIB);
        reads(only, 0x44, 7 * MIB, 3 * MIB);
        reads(only, 0, 10 * MIB, 2 * MIB);
        assert_eq!(virtual_size(only), 12 * MIB);
    });
    let told = trio.site.json(&["event", "list"]).to_string();
    assert!(told.contains("have grown") && told.contains("from 8 MiB to 12 MiB"), "{told}");
}

#[test]
fn a_disk_that_a_vm_has_got_joins_its_protection() {
    if !has_qemu_io() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let trio = Trio::defined();
    let add = ["vpg", "add-disks", "shop", "db"];
    trio.tag("one");
    let refused = trio.site.zvm(&add);
    assert!(refused.code == 2 && refused.stderr.contains("has no disk in the inventory"), "{refused:?}");

    let first = format!("path = \"{}/db.img\"\n", trio.a.dir.display());
    let second = format!("[[vm.disk]]\nname = \"vdb\"\npath = \"{}/db2.img\"\n", trio.a.dir.display());
    trio.site.write_inventory(&trio.inventory.replace(&first, &format!("{first}{second}")));
    wait_for("the disk in the inventory", || !trio.second_disk().is_null());
    let refused = trio.site.zvm(&add);
    assert!(refused.code == 4 && refused.stderr.contains("vra attach"), "{refused:?}");
    let uri = trio.a.attach("db", &trio.vms[0], "db2.img", 0x55, 4 * MIB);
    trio.done(&add);
    trio.tag("two");
    qemu_io(&uri, &[&format!("write -P 0x66 0 {MIB}")]);
    assert_eq!(trio.complete(), ["two", "one"]);
    let vpg = trio.site.json(&["vpg", "show", "shop"])["vpg"].take();
    assert_eq!((&vpg["settings"]["member_set_version"], &vpg["revision"]), (&2.into(), &2.into()));

    trio.tested("one", |disks| {
        let [(_, only)] = disks else { panic!("one disk: {disks:?}") };
        reads(only, 0x11, 0, 8 * MIB);
    });
    trio.tested("two", |disks| {
        let [(_, first), (_, second)] = disks else { panic!("two disks: {disks:?}") };
        reads(first, 0x11, 0, 8 * MIB);
        reads(second, 0x55, 0, 4 * MIB);
    });
}

#[test]
fn a_disk_leaves_a_vms_protection() {
    if !has_qemu_io() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let trio = Trio::defined();
    let first = format!("path = \"{}/db.img\"\n", trio.a.dir.display());
    let second = format!("[[vm.disk]]\nname = \"vdb\"\npath = \"{}/db2.img\"\n", trio.a.dir.display());
    trio.site.write_inventory(&trio.inventory.replace(&first, &format!("{first}{second}")));
    wait_for("the disk in the inventory", || !trio.second_disk().is_null());
    let uri = trio.a.attach("db", &trio.vms[0], "db2.img", 0x55, 4 * MIB);
    trio.done(&["vpg", "add-disks", "shop", "db"]);
    trio.tag("both");

    let refused = trio.site.zvm(&["vpg", "remove-disks", "shop", "db:vdc"]);
    assert!(refused.code == 3 && refused.stderr.contains("name it as the inventory does"), "{refused:?}");
    let refused = trio.site.zvm(&["vpg", "edit", "shop", "--exclude", "db:vdb"]);
    assert!(refused.stderr.contains("zvm vpg remove-disks shop db:vdb"), "{refused:?}");
    let edit = |option: &str, disk: &str| trio.site.zvm(&["vpg", "edit", "shop", option, disk]);
    assert_eq!(edit("--swap", "db:vdb").code, 0);
    let refused = edit("--swap", &format!("db:{}/db.img", trio.a.dir.display()));
    assert!(refused.stderr.contains("leave at least one whose writes are captured"), "{refused:?}");
    let shown = trio.site.zvm(&["vpg", "show", "shop"]).stdout;
    assert!(shown.contains("Swap disk"), "{shown}");
    assert_eq!(edit("--no-swap", "db:vdb").code, 0);
    // By its path, since it is in the inventory no more.
    trio.site.write_inventory(&trio.inventory);
    wait_for("an inventory without the disk", || trio.second_disk().is_null());
    let path = format!("db:{}/db2.img", trio.a.dir.display());
    trio.done(&["vpg", "remove-disks", "shop", &path]);
    qemu_io(&uri, &[&format!("write -P 0x66 0 {MIB}")]);
    trio.tag("one");
    trio.tested("both", |disks| {
        let [(_, first), (_, second)] = disks else { panic!("two disks: {disks:?}") };
        reads(first, 0x11, 0, 8 * MIB);
        reads(second, 0x55, 0, 4 * MIB);
    });
    trio.tested("one", |disks| {
        let [(_, only)] = disks else { panic!("one disk: {disks:?}") };
        reads(only, 0x11, 0, 8 * MIB);
    });
    let shown = trio.site.zvm(&["vpg", "show", "shop"]).stdout;
    assert!(shown.contains("Left disk"), "{shown}");
    let tasks = trio.site.json(&["task", "list"]);
    let mut tasks = tasks.as_array().expect("a list").iter();
    let task = tasks.find(|task| task["kind"] == "UpdateProtectionGroup").expect("that of the removal");
    let step = task["step"].as_str().expect("a step");
    assert!(step.contains("has a full sync now") && step.contains("keep the disks that they have"), "{task}");
    let last =
        trio.site.zvm(&["vpg", "remove-disks", "shop", &format!("db:{}/db.img", trio.a.dir.display())]);
    assert!(last.stderr.contains("zvm vpg remove-vm shop db"), "{last:?}");
}

#[test]
fn a_disk_that_its_target_has_no_room_for_is_taken_back_without_a_trace() {
    let trio = Trio::defined();
    trio.tag("before");
    let first = format!("path = \"{}/db.img\"\n", trio.a.dir.display());
    let second = format!("[[vm.disk]]\nname = \"vdb\"\npath = \"{}/huge.img\"\n", trio.a.dir.display());
    trio.site.write_inventory(&trio.inventory.replace(&first, &format!("{first}{second}")));
    wait_for("the disk in the inventory", || !trio.second_disk().is_null());
    let huge = std::fs::File::create(trio.a.dir.join("huge.img")).expect("disk");
    huge.set_len(8 << 40).expect("a sparse disk");
    trio.a.attach_file("db", &trio.vms[0], "huge.img");
    let generation = || trio.b.json(&["status"])["target_vms"][0]["generation"].take();
    let before = generation();

    let refused = trio.site.zvm(&["vpg", "add-disks", "shop", "db", "--give-up-history"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    for text in ["VM db", "free space", "`zvm vpg remove-disks shop VM:DISK` takes added disks back"] {
        assert!(refused.stderr.contains(text), "{text}: {refused:?}");
    }
    trio.tag("meanwhile");
    // No sync follows, for which history would have to go.
    trio.done(&["vpg", "remove-disks", "shop", "db:vdb"]);
    trio.tag("after");
    let complete = trio.complete();
    assert_eq!(complete, ["after", "meanwhile", "before"]);
    assert_eq!(generation(), before, "no full sync");
    let shown = trio.site.zvm(&["vpg", "show", "shop"]).stdout;
    assert!(!shown.contains("Left disk"), "{shown}");
    let [journal] = &journals(&trio.b.dir.join("datastore"))[..] else { panic!("one journal") };
    assert!(!journal.join("disk-1.raw").exists());

    // It can be asked for again, with the same result as long as there is no room.
    let refused = trio.site.zvm(&["vpg", "add-disks", "shop", "db"]);
    assert!(refused.stderr.contains("zvm vpg edit shop --no-exclude db:DISK"), "{refused:?}");
    trio.done(&["vpg", "edit", "shop", "--no-exclude", "db:vdb"]);
    assert_eq!(trio.site.zvm(&["vpg", "edit", "shop", "--no-exclude", "db:vdb"]).code, 3);
    let refused = trio.site.zvm(&["vpg", "add-disks", "shop", "db", "--give-up-history"]);
    assert!(refused.code == 1 && refused.stderr.contains("free space"), "{refused:?}");
}

#[test]
fn vms_join_and_leave_a_group_while_guests_write() {
    if !has_qemu_io() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let trio = Trio::defined();
    let (site, [db, web, _]) = (&trio.site, &trio.disks);
    trio.tag("alone");
    qemu_io(db, &[&format!("write -P 0x33 0 {MIB}")]);
    qemu_io(web, &[&format!("write -P 0x44 0 {MIB}")]);

    // A guest writes all the time.
    let stopped = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(AtomicU32::new(0));
    let guest = std::thread::spawn({
        let (stopped, rounds, db) = (Arc::clone(&stopped), Arc::clone(&rounds), db.clone());
        move || {
            while !stopped.load(Ordering::Relaxed) {
                let byte = rounds.load(Ordering::Relaxed) % 200 + 1;
                qemu_io(&db, &[&format!("write -P {byte} {} 65536", 4 * MIB)]);
                rounds.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    let c_datastore = trio.c.dir.join("datastore");
    let elsewhere = c_datastore.display().to_string();
    trio.done(&["vpg", "add-vm", "shop", "web", "--target", "vra-c", "--datastore", &elsewhere]);
    assert_eq!(trio.complete(), ["alone"], "it can be opened while the new VM's first sync runs");
    trio.tag("together");
    wait_for("the guest's writes", || rounds.load(Ordering::Relaxed) > 5);
    stopped.store(true, Ordering::Relaxed);
    guest.join().expect("the guest");
    let vpg = site.json(&["vpg", "show", "shop"])["vpg"].take();
    assert_eq!((&vpg["settings"]["member_set_version"], &vpg["revision"]), (&2.into(), &2.into()));
    assert_eq!(trio.complete(), ["together", "alone"]);

    trio.tested("alone", |disks| {
        let [(vra, uri)] = disks else { panic!("one disk: {disks:?}") };
        assert_eq!(vra, "vra-b");
        reads(uri, 0x11, 0, 8 * MIB);
        for change in [&["add-vm", "shop", "web"][..], &["remove-vm", "shop", "web"]] {
            let refused = site.zvm(&[&["vpg"], change].concat());
            assert_eq!(refused.code, 4, "{refused:?}");
        }
        let refused = site.zvm(&["vpg", "remove-vm", "shop", "web"]);
        assert!(refused.stderr.contains("is being tested"), "{refused:?}");
    });
    trio.tested("together", |disks| {
        let [(b, db), (c, web)] = disks else { panic!("two disks: {disks:?}") };
        assert_eq!((b.as_str(), c.as_str()), ("vra-b", "vra-c"));
        reads(db, 0x33, 0, MIB);
        reads(db, 0x11, MIB, 3 * MIB);
        reads(web, 0x44, 0, MIB);
        reads(web, 0x77, MIB, 7 * MIB);
    });
    // A lock of an older one asks only those that have it; a lock of a newer one all.
    for (at, locked_at) in [("alone", 1), ("together", 2)] {
        trio.done(&["checkpoint", "lock", "shop", at]);
        let id = vpg["id"].as_str().expect("an id");
        let is_locked = |vra: &Vra| {
            let listed = vra.json(&["checkpoint", "list", id]);
            listed["checkpoints"]
                .as_array()
                .expect("a list")
                .iter()
                .any(|info| info["tag"] == at && info["locked"] == true)
        };
        assert_eq!([&trio.b, &trio.c].into_iter().filter(|vra| is_locked(vra)).count(), locked_at, "{at}");
    }
    let again = site.zvm(&["vpg", "add-vm", "shop", "web"]);
    assert!(again.code == 4 && again.stderr.contains("is in VPG \"shop\" already"), "{again:?}");

    // It leaves: its target has no part in the group any more, and what the others have stays. While somebody looks at its disks, it waits.
    assert_eq!(journals(&c_datastore).len(), 1);
    let view = trio.c.json(&["view", "open", "--vpg", "shop", "--door", "nbd", "--read-only"]);
    let view = view["view"].as_str().expect("a view").to_owned();
    let removed = site.zvm(&["vpg", "remove-vm", "shop", "web"]);
    wait_for("the refusal", || site.zvm(&["alert", "list"]).stdout.contains("views of it are open"));
    assert!(removed.code == 0 || removed.stderr.contains("views of it are open"), "{removed:?}");
    assert_eq!(journals(&c_datastore).len(), 1);
    assert_eq!(trio.c.run(&["view", "close", &view]).code, 0);
    wait_for("the target to let go", || trio.vpgs_at(&trio.c) == 0 && journals(&c_datastore).is_empty());
    assert_eq!(trio.complete(), ["together", "alone"]);
    qemu_io(web, &[&format!("write -P 0x55 0 {MIB}"), &format!("read -P 0x55 0 {MIB}")]);
    trio.tag("alone again");
    trio.tested("together", |disks| {
        let [(_, uri)] = disks else { panic!("one disk: {disks:?}") };
        reads(uri, 0x33, 0, MIB);
    });

    // It comes back, to where the group's first VM is, and leaves with its files kept: twice.
    let b_datastore = trio.b.dir.join("datastore");
    for (round, tag) in ["back", "back again"].into_iter().enumerate() {
        trio.done(&["vpg", "add-vm", "shop", "web"]);
        trio.tag(tag);
        trio.tested(tag, |disks| assert_eq!(disks.len(), 2, "{disks:?}"));
        trio.done(&["vpg", "remove-vm", "shop", "web", "--keep-disks"]);
        let is_kept = |path: &PathBuf| path.to_string_lossy().contains("-kept-");
        let kept = journals(&b_datastore).iter().filter(|path| is_kept(path)).count();
        assert_eq!((kept, journals(&b_datastore).len()), (round + 1, round + 2));
    }
    let last = site.zvm(&["vpg", "remove-vm", "shop", "db"]);
    assert!(last.code == 2 && last.stderr.contains("must keep at least one VM"), "{last:?}");

    // The one that was there first leaves: the other's checkpoints are the group's.
    trio.done(&["vpg", "add-vm", "shop", "web", "--target", "vra-c", "--datastore", &elsewhere]);
    trio.tag("both");
    trio.done(&["vpg", "remove-vm", "shop", "db"]);
    wait_for("the target to let go", || trio.vpgs_at(&trio.b) == 0);
    assert_eq!(trio.complete(), ["both"]);
    trio.tested("both", |disks| {
        let [(vra, uri)] = disks else { panic!("one disk: {disks:?}") };
        assert_eq!(vra, "vra-c");
        reads(uri, 0x55, 0, MIB);
    });
    let tasks: Vec<Value> =
        site.json(&["task", "list", "--limit", "1000"]).as_array().expect("a list").clone();
    let done =
        |kind: &str| tasks.iter().filter(|task| task["kind"] == kind && task["state"] == "Completed").count();
    // The one that was refused for a while counts as that, if the refusal came before all members had heard.
    let removals = done("RemoveVMFromProtectionGroup");
    assert_eq!((done("AddVMToProtectionGroup"), (3..=4).contains(&removals)), (4, true), "{removals}");
}

#[test]
fn a_vm_of_another_host_joins_a_group_and_leaves_it() {
    if !has_qemu_io() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let mut trio = Trio::defined();
    trio.tag("alone");
    let app = trio.disks[2].clone();
    // Without its VRA nobody knows its disks.
    trio.c.kill();
    let silent = trio.site.zvm(&["vpg", "add-vm", "shop", "app"]);
    assert!(silent.code == 4 && silent.stderr.contains("vra-c does not answer"), "{silent:?}");
    trio.c.serve();
    wait_for("the VM's VRA", || trio.site.zvm(&["vpg", "add-vm", "shop", "app"]).code == 0);
    qemu_io(&app, &[&format!("write -P 0x67 0 {MIB}")]);
    trio.tag("across hosts");
    trio.tested("across hosts", |disks| {
        let [(_, one), (_, other)] = disks else { panic!("two disks: {disks:?}") };
        let has = |uri: &str, byte: u8| {
            let output = std::process::Command::new("qemu-io")
                .args(["-f", "raw", uri, "-c", &format!("read -P {byte} 0 {MIB}")])
                .output()
                .expect("qemu-io");
            !String::from_utf8_lossy(&output.stdout).contains("Pattern verification failed")
        };
        assert!(has(one, 0x11) && has(other, 0x67) || has(one, 0x67) && has(other, 0x11), "{disks:?}");
    });
    assert_eq!(trio.complete(), ["across hosts", "alone"]);

    // Both VRAs have to hear that it leaves; the one that can't is told later, and nobody waits for it.
    trio.c.kill();
    trio.done(&["vpg", "remove-vm", "shop", "app"]);
    trio.tag("alone again");
    assert_eq!(journals(&trio.b.dir.join("datastore")).len(), 1);
    trio.c.serve();
    wait_for("the source to let go", || trio.vpgs_at(&trio.c) == 0);
    assert_eq!(trio.complete(), ["alone again", "across hosts", "alone"]);
}
