//! A manager and two VRAs as processes: from enrolment to a test of a recovered disk, and what happens without each of them.

mod common;

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
