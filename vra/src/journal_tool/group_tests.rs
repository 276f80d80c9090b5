//! A VPG of two VMs in one datastore.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::tests::{CleanUp, SIZE_BYTES, START_US, answer, call, failure};
use crate::view::test_journal::TestJournal;

const MINUTE_US: u64 = 60_000_000;

/// The VPG, its checkpoints 1 to 3 with the tags "", "before upgrade", "only db", of which web hasn't the last.
struct Shop {
    store: PathBuf,
    db: TestJournal,
    web: TestJournal,
    /// Of db, then of web.
    cuts: [Vec<u64>; 2],
}

impl Shop {
    fn new(name: &str) -> Self {
        let store = std::env::temp_dir().join(format!("holdfast-group-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&store);
        let journal = |vm: &str, number: u8| {
            let folder = store.join("shop-00000003").join(format!("{vm}-{number}"));
            TestJournal::in_folder(folder, SIZE_BYTES, &manifest(number, &["db", "web"]).to_string())
        };
        let (mut db, mut web) = (journal("db", 20), journal("web", 21));
        let mut cuts = [Vec::new(), Vec::new()];
        for (counter, tag) in [(1, ""), (2, "before upgrade"), (3, "only db")] {
            let time_us = START_US + counter * MINUTE_US;
            for (number, journal) in [&mut db, &mut web].into_iter().enumerate() {
                journal.random_changes(10 * counter + number as u64, 20 + 7 * number, 60);
                if counter < 3 || number == 0 {
                    cuts[number].push(journal.group_checkpoint(counter, tag, time_us));
                    journal.flush();
                }
            }
        }
        Self { store, db, web, cuts }
    }

    fn store(&self) -> String {
        self.store.to_string_lossy().into_owned()
    }
}

fn id(number: u8) -> String {
    format!("00000000-0000-0000-0000-0000000000{number:02}")
}

/// Of the VM with this number; VMs of the group are numbered from 20.
fn manifest(vm: u8, vms: &[&str]) -> Value {
    let end = json!({ "id": id(9), "address": "vra:9710" });
    let vms: Vec<Value> = (20..)
        .zip(vms)
        .map(|(number, name)| {
            json!({
                "id": id(number), "name": name, "journal": id(1), "source": end, "target": end,
                "datastore": "/elsewhere", "journal_limit_bytes": 1 << 30, "history_s": 3600, "give_up_history": true,
                "volumes": [{
                    "id": id(5), "number": 0, "size_bytes": SIZE_BYTES, "logical_block_bytes": 512,
                    "source_path": "/dev/vg/x"
                }],
            })
        })
        .collect();
    json!({
        "vm": id(vm),
        "vpg": {
            "id": id(3), "name": "shop", "revision": 1, "member_set_version": 1, "checkpoint_interval_ms": 5000,
            "hold_deadline_ms": 100, "vms": vms,
        },
    })
}

fn files(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn a_group_is_listed_with_what_all_its_vms_hold() {
    let shop = Shop::new("list");
    let _clean_up = CleanUp(&shop.store);
    let list = answer(&["ls", &shop.store(), "--json"]);
    let vpg = &list["vpgs"][0];
    assert_eq!((&vpg["name"], &vpg["checkpoints"]), (&json!("shop"), &json!(2)));
    assert_eq!(vpg["newest_time_us"], START_US + 2 * MINUTE_US);
    let counts: Vec<(&Value, &Value)> =
        vpg["vms"].as_array().expect("a list").iter().map(|vm| (&vm["name"], &vm["checkpoints"])).collect();
    assert_eq!(counts, [(&json!("db"), &json!(3)), (&json!("web"), &json!(2))]);
    let whole = answer(&["checkpoints", &shop.store(), "--vpg", "shop", "--json"]);
    let tags: Vec<&Value> =
        whole["checkpoints"].as_array().expect("a list").iter().map(|entry| &entry["tag"]).collect();
    assert_eq!(tags, [&json!(""), &json!("before upgrade")]);
    let (text, _) = call(&["checkpoints", &shop.store(), "--vpg", &id(3)]).expect("listed");
    assert_eq!(text.lines().count(), 3, "{text}");
    let error = call(&["checkpoints", &shop.store(), &shop.store()]).expect_err("one journal");
    assert!(error.to_string().contains("--vpg"), "{error}");
    std::fs::remove_dir_all(&shop.web.folder).expect("removed");
    let (text, _) = call(&["ls", &shop.store()]).expect("listed");
    assert!(text.contains("its journal is not here: its VRA has it in /elsewhere"), "{text}");
}

#[test]
fn a_group_is_extracted_at_one_moment() {
    let shop = Shop::new("extract");
    let _clean_up = CleanUp(&shop.store);
    let out = shop.store.join("out");
    let out_name = out.to_string_lossy().into_owned();
    let second = "0000000000000000000000000000004d-2";
    let between = "2026-11-22T17:31:30Z";
    // The newest of each VM is not the newest of the group (D3, D4).
    for (at, index) in
        [("latest", 1), ("before upgrade", 1), (second, 1), (between, 0), ("2027-01-01T00:00:00Z", 1)]
    {
        for vpg in ["shop", &id(3)] {
            let arguments =
                ["extract", &shop.store(), "--vpg", vpg, "--at", at, "--out-dir", &out_name, "--quiet"];
            let (text, _) = call(&arguments).expect("extracted");
            assert_eq!(text.lines().count(), 2, "{text}");
            assert_eq!(files(&out), ["db-disk-0.raw", "web-disk-0.raw"]);
            // The indexes of a large group don't fit into memory together.
            assert_eq!(super::disk::alive::most(), 1, "disks of several VMs are held at once");
            for (vm, journal, cuts) in [("db", &shop.db, &shop.cuts[0]), ("web", &shop.web, &shop.cuts[1])] {
                let image = std::fs::read(out.join(format!("{vm}-disk-0.raw"))).expect("image");
                assert!(image == journal.model(cuts[index]), "{vm} at {at}");
            }
            std::fs::remove_dir_all(&out).expect("removed");
        }
    }
    let arguments =
        ["extract", &shop.store(), "--vm", "web", "--at", "latest", "--out-dir", &out_name, "--quiet"];
    call(&arguments).expect("extracted");
    assert_eq!(files(&out), ["web-disk-0.raw"]);
    // A number is right within one VM.
    let seq = shop.cuts[0][0] + 3;
    let arguments = [
        "extract",
        &shop.store(),
        "--vm",
        &id(20),
        "--at",
        &seq.to_string(),
        "--out-dir",
        &out_name,
        "--quiet",
    ];
    call(&arguments).expect("extracted");
    assert!(std::fs::read(out.join("db-disk-0.raw")).expect("image") == shop.db.model(seq));
}

#[test]
fn what_a_group_has_not_got_is_named_with_who_lacks_it() {
    let shop = Shop::new("lacking");
    let _clean_up = CleanUp(&shop.store);
    let out = shop.store.join("out").to_string_lossy().into_owned();
    let refused = |vpg: &str, at: &str| {
        failure(&["extract", &shop.store(), "--vpg", vpg, "--at", at, "--out-dir", &out, "--quiet"])
    };
    let newest = "the newest that all hold is 0000000000000000000000000000004d-2";
    for at in ["only db", "0000000000000000000000000000004d-3"] {
        let text = refused("shop", at);
        assert!(text.contains("VM web lacks it") && text.contains(newest), "{at}: {text}");
    }
    let text = refused("shop", "befor upgrade");
    assert!(text.contains("no checkpoint with the tag") && text.contains("the nearest is"), "{text}");
    let text = refused("shop", "2026-11-22T17:30:30Z");
    assert!(text.contains("no checkpoint as old as") && text.contains("4d-1"), "{text}");
    for at in ["5", "seq:5"] {
        let text = refused("shop", at);
        assert!(text.contains("record 5") && text.contains("--vm"), "{text}");
    }
    let text = refused("chop", "latest");
    assert!(text.contains("no VPG \"chop\"") && text.contains("shop"), "{text}");
    std::fs::remove_dir_all(&shop.web.folder).expect("removed");
    let text = refused("shop", "latest");
    assert!(text.contains("the journal of VM web is not here") && text.contains("/elsewhere"), "{text}");
    assert!(!Path::new(&out).exists());
}

#[test]
fn all_of_a_group_is_extracted_or_nothing() {
    let mut shop = Shop::new("nothing");
    let store = shop.store.clone();
    let _clean_up = CleanUp(&store);
    let out = shop.store.join("out");
    let (store, out_name) = (shop.store(), out.to_string_lossy().into_owned());
    let extract = ["extract", &store, "--vpg", "shop", "--at", "latest", "--out-dir", &out_name, "--quiet"];
    // A file in the way of the second VM.
    std::fs::create_dir(&out).expect("folder");
    std::fs::write(out.join("web-disk-0.raw"), "precious").expect("file");
    let text = failure(&extract);
    assert!(text.contains("web-disk-0.raw exists") && text.contains("--force"), "{text}");
    assert_eq!(files(&out), ["web-disk-0.raw"]);
    assert_eq!(std::fs::read(out.join("web-disk-0.raw")).expect("file"), b"precious");
    std::fs::remove_dir_all(&out).expect("removed");

    // Damage in the second VM, found after the first was copied.
    shop.web.write(0, vec![0x6b; 16384]);
    for (number, journal) in [&mut shop.db, &mut shop.web].into_iter().enumerate() {
        shop.cuts[number].push(journal.group_checkpoint(4, "damaged", START_US + 4 * MINUTE_US));
        journal.flush();
        journal.change(journal::writer::Change::Seal);
    }
    TestJournal::flip_bit(&shop.web.path(), &[0x6b; 16384], 5000);
    let text = failure(&extract);
    assert!(text.contains("disk 0 of web cannot be read"), "{text}");
    assert!(!out.exists(), "{:?}", files(&out));
    // What is whole can be had.
    let alone = ["extract", &store, "--vm", "db", "--at", "latest", "--out-dir", &out_name, "--quiet"];
    call(&alone).expect("extracted");
    assert!(std::fs::read(out.join("db-disk-0.raw")).expect("image") == shop.db.model(shop.cuts[0][3]));
}

#[test]
fn a_group_is_extracted_without_superblocks() {
    let shop = Shop::new("lost");
    let _clean_up = CleanUp(&shop.store);
    for journal in [&shop.db, &shop.web] {
        let mut bytes = std::fs::read(journal.path()).expect("journal");
        for offset_bytes in journal::format::SUPERBLOCK_OFFSETS {
            bytes[offset_bytes as usize..][..journal::format::PAGE_BYTES].fill(0x5a);
        }
        std::fs::write(journal.path(), &bytes).expect("journal");
    }
    let out = shop.store.join("out");
    let out_name = out.to_string_lossy().into_owned();
    let arguments =
        ["extract", &shop.store(), "--vpg", "shop", "--at", "latest", "--out-dir", &out_name, "--quiet"];
    call(&arguments).expect("extracted");
    for (vm, journal, cuts) in [("db", &shop.db, &shop.cuts[0]), ("web", &shop.web, &shop.cuts[1])] {
        let image = std::fs::read(out.join(format!("{vm}-disk-0.raw"))).expect("image");
        assert!(image == journal.model(cuts[1]), "{vm}");
    }
}

#[test]
fn what_was_taken_before_a_vm_came_is_extracted_without_it() {
    let mut shop = Shop::new("joined");
    let store = shop.store.clone();
    let _clean_up = CleanUp(&store);
    // A third one comes with the member set 2, and was in the group before with another journal, which is kept.
    let mut now = manifest(20, &["db", "web", "app"]);
    (now["vpg"]["revision"], now["vpg"]["member_set_version"]) = (json!(2), json!(2));
    (now["vpg"]["vms"][2]["member_since"], now["vpg"]["vms"][2]["journal"]) = (json!(2), json!(id(8)));
    let of = |vm: u8| {
        let mut own = now.clone();
        own["vm"] = json!(id(vm));
        own.to_string()
    };
    let folder = |name: &str| store.join("shop-00000003").join(name);
    let mut app = TestJournal::in_folder(folder("app-22"), SIZE_BYTES, &of(22));
    let former = manifest(22, &["db", "web", "app"]).to_string();
    let _former = TestJournal::in_folder(folder("app-22-kept-1"), SIZE_BYTES, &former);
    let (out, store_name) = (store.join("out"), shop.store());
    let out_name = out.to_string_lossy().into_owned();
    let extract = |at: &str| {
        let arguments =
            ["extract", &store_name, "--vpg", "shop", "--at", at, "--out-dir", &out_name, "--quiet"];
        call(&arguments)
    };
    app.random_changes(7, 20, 60);
    let time_us = START_US + 5 * MINUTE_US;
    for journal in [&mut shop.db, &mut shop.web, &mut app] {
        journal.checkpoint_over(2, 5, "with app", time_us);
        journal.flush();
    }
    let list = answer(&["ls", &store_name, "--json"]);
    assert_eq!(list["vpgs"][0]["checkpoints"], json!(3), "{list}");
    let members: Vec<&Value> =
        list["vpgs"][0]["vms"].as_array().expect("a list").iter().map(|vm| &vm["member"]).collect();
    assert_eq!(members, [&json!(true), &json!(true), &json!(true), &json!(false)]);
    extract("before upgrade").expect("extracted");
    assert_eq!(files(&out), ["db-disk-0.raw", "web-disk-0.raw"]);
    for (vm, journal, cuts) in [("db", &shop.db, &shop.cuts[0]), ("web", &shop.web, &shop.cuts[1])] {
        let image = std::fs::read(out.join(format!("{vm}-disk-0.raw"))).expect("image");
        assert!(image == journal.model(cuts[1]), "{vm}");
    }
    std::fs::remove_dir_all(&out).expect("removed");
    extract("with app").expect("extracted");
    assert_eq!(files(&out), ["app-disk-0.raw", "db-disk-0.raw", "web-disk-0.raw"]);
    std::fs::remove_dir_all(&out).expect("removed");
    // One that it should have and lacks is not complete.
    for journal in [&mut shop.db, &mut shop.web] {
        journal.checkpoint_over(2, 6, "app lacks", time_us + MINUTE_US);
        journal.flush();
    }
    let error = extract("app lacks").expect_err("incomplete").to_string();
    assert!(error.contains("VM app lacks it"), "{error}");
}
