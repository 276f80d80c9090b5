//! A manager and two VRAs as processes: from enrolment to a test of a recovered disk, and what happens without each of them.

mod common;

use std::path::PathBuf;

use common::pair::Pair;
use common::wait_for;
use serde_json::Value;

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
    // So it is when it comes with an enrolment; one that brings no news is none.
    for (advertised, revision) in [("127.0.0.1", 3), ("127.0.0.1", 3)] {
        pair.b.advertise(&format!("{advertised}:{}", pair.b.port));
        pair.b.enrol(&pair.site);
        wait_for("the revision after an enrolment", || pair.revisions() == [revision, revision]);
    }
    assert_eq!(pair.site.json(&["vpg", "show", "shop"])["vpg"]["revision"], 3);
    assert_eq!(pair.site.zvm(&["vpg", "delete", "shop"]).code, 0);
    assert_eq!(pair.revisions(), [Value::Null, Value::Null]);
    assert_eq!(pair.site.zvm(&["vpg", "show", "shop"]).code, 3);
}

#[test]
fn when_a_group_was_last_tested_outlives_the_manager() {
    let mut pair = Pair::defined();
    let last = |pair: &Pair| pair.site.json(&["vpg", "show", "shop"])["vpg"]["last_test_us"].clone();
    assert_eq!(last(&pair), Value::Null);
    pair.site.tag("shop", "now");
    pair.site.tested("shop", "now", |disks| assert_eq!(disks.len(), 2, "{disks:?}"));
    let tested = last(&pair);
    assert!(tested.as_u64().is_some(), "{tested}");
    pair.site.kill();
    pair.site.serve();
    assert_eq!(last(&pair), tested);
}

/// The manager's database as it was while the manager didn't run.
struct Backup(Vec<(PathBuf, Option<Vec<u8>>)>);

impl Backup {
    fn of(pair: &Pair) -> Self {
        let files = ["zvm.db", "zvm.db-wal", "zvm.db-shm"].map(|file| pair.site.dir.join("state").join(file));
        Self(files.into_iter().map(|file| (file.clone(), std::fs::read(file).ok())).collect())
    }

    fn restore(&self) {
        for (file, bytes) in &self.0 {
            let _ = std::fs::remove_file(file);
            if let Some(bytes) = bytes {
                std::fs::write(file, bytes).expect("restored");
            }
        }
    }
}

#[test]
fn a_vra_that_has_another_definition_of_the_same_revision_than_a_restored_database_is_not_overwritten() {
    let mut pair = Pair::defined();
    pair.site.kill();
    let backup = Backup::of(&pair);
    pair.site.serve();
    // The target has the change, and is away when the older database is changed otherwise.
    pair.a.kill();
    assert_eq!(pair.site.zvm(&["vpg", "edit", "shop", "--history", "2h"]).code, 0);
    let at_target = |pair: &Pair| pair.b.json(&["status"])["vpgs"][0]["revision"].clone();
    wait_for("the change at the target", || at_target(&pair) == 2);
    pair.site.kill();
    pair.b.kill();
    backup.restore();
    pair.site.serve();
    assert_eq!(pair.site.zvm(&["vpg", "edit", "shop", "--history", "3h"]).code, 0);
    pair.b.serve();
    wait_for("the alert", || pair.site.zvm(&["alert", "list"]).stdout.contains("vpg-newer-elsewhere"));
    assert_eq!(pair.site.zvm(&["vpg", "pause", "shop"]).code, 4);

    let adopted = pair.site.json(&["vpg", "adopt", "shop"])["vpg"].take();
    assert_eq!((&adopted["revision"], &adopted["settings"]["history_s"]), (&3.into(), &7_200.into()));
    pair.a.serve();
    wait_for("one definition everywhere", || pair.revisions() == [3, 3]);
}

#[test]
fn after_an_older_database_was_restored_nothing_is_changed_until_the_newer_definition_is_adopted() {
    let mut pair = Pair::defined();
    pair.site.kill();
    let backup = Backup::of(&pair);
    pair.site.serve();
    assert_eq!(pair.site.zvm(&["vpg", "edit", "shop", "--history", "2h"]).code, 0);
    wait_for("the change", || pair.revisions() == [2, 2]);
    pair.site.kill();
    backup.restore();
    pair.site.serve();
    let alerts = |pair: &Pair| pair.site.zvm(&["alert", "list"]).stdout;
    wait_for("the alert", || alerts(&pair).contains("vpg-newer-elsewhere"));
    for change in [&["edit", "shop", "--priority", "high"][..], &["pause", "shop"], &["delete", "shop"]] {
        let refused = pair.site.zvm(&[&["vpg"], change].concat());
        assert!(refused.code == 4 && refused.stderr.contains("zvm vpg adopt shop"), "{refused:?}");
    }
    assert_eq!(pair.revisions(), [2, 2]);

    let adopted = pair.site.json(&["vpg", "adopt", "shop"])["vpg"].take();
    assert_eq!((&adopted["revision"], &adopted["settings"]["history_s"]), (&2.into(), &7_200.into()));
    wait_for("the alert's end", || !alerts(&pair).contains("vpg-newer-elsewhere"));
    assert_eq!(pair.site.zvm(&["vpg", "edit", "shop", "--priority", "high"]).code, 0);
    wait_for("the next change", || pair.revisions() == [3, 3]);
    let again = pair.site.zvm(&["vpg", "adopt", "shop"]);
    assert!(again.code == 3 && again.stderr.contains("no VRA has a newer definition"), "{again:?}");
}

#[test]
fn a_group_with_a_revoked_vra_takes_no_change_but_losing_its_vms_there() {
    let pair = Pair::defined();
    assert_eq!(pair.site.zvm(&["vra", "revoke", "vra-a", "--force"]).code, 0);
    for change in [&["edit", "shop", "--priority", "high"][..], &["pause", "shop"]] {
        let refused = pair.site.zvm(&[&["vpg"], change].concat());
        assert!(
            refused.code == 4 && refused.stderr.contains("VRA vra-a of VPG shop is revoked"),
            "{refused:?}"
        );
        assert!(refused.stderr.contains("zvm vpg remove-vm shop db"), "{refused:?}");
    }
    assert_eq!(pair.site.zvm(&["vpg", "delete", "shop"]).code, 0);
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
