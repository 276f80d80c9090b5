//! A manager whose database is lost and made again from what its VRAs know.

mod common;

use ::vra::api::TimeUs;
use common::pair::Pair;
use common::wait_for;
use serde_json::Value;

/// What must be the same before and after.
fn told(pair: &Pair) -> Value {
    let mut vpg = pair.site.json(&["vpg", "show", "shop"])["vpg"].take();
    // Whether all have taken it is found out anew.
    vpg["applied_revision"].take();
    let checkpoints = pair.site.json(&["checkpoint", "list", "shop", "--tagged"]);
    let vras = pair.site.json(&["vra", "list"]);
    let vras: Vec<Value> = vras
        .as_array()
        .expect("list")
        .iter()
        .map(|vra| serde_json::json!([vra["id"], vra["name"], vra["address"], vra["state"]]))
        .collect();
    serde_json::json!({ "vpg": vpg, "checkpoints": checkpoints, "vras": vras })
}

fn history(pair: &Pair) -> (u64, u64) {
    let report = pair.site.json(&["vpg", "show", "shop"])["report"].take();
    (
        report["checkpoint_count"].as_u64().unwrap_or_default(),
        report["history_from_us"].as_u64().unwrap_or_default(),
    )
}

#[test]
fn a_lost_database_is_made_again_from_the_vras() {
    let mut pair = Pair::defined();
    let file = pair.write_recovery();
    let edited = pair.site.zvm(&[
        "vpg",
        "edit",
        "shop",
        "--history",
        "2h",
        "--journal-warning",
        "75%",
        "--priority",
        "high",
        "--test-reminder",
        "90",
        "--recovery",
        &file,
    ]);
    assert_eq!(edited.code, 0, "{edited:?}");
    wait_for("the first sync", || pair.site.zvm(&["checkpoint", "tag", "shop", "kept"]).code == 0);
    let is_complete = || {
        let listed = pair.site.json(&["checkpoint", "list", "shop", "--tagged"]);
        listed.as_array().is_some_and(|all| all.iter().any(|info| info["complete"] == true))
    };
    wait_for("the checkpoint", is_complete);
    assert_eq!(pair.site.zvm(&["checkpoint", "lock", "shop", "kept"]).code, 0);
    wait_for("the new settings everywhere", || pair.revisions() == [2, 2]);
    assert!(pair.a.log().contains("another priority") && pair.a.log().contains("priority=High"));
    let before = told(&pair);
    wait_for("history", || history(&pair).0 > 3);
    let (count, from_us) = history(&pair);

    let address =
        pair.site.json(&["vra", "show", "vra-b"])["state"]["address"].as_str().expect("text").to_owned();
    let over = pair.site.zvm(&["rebuild", "--vra", &address]);
    assert!(over.code != 0 && over.stderr.contains("runs on this state folder"), "{over:?}");
    pair.site.kill();
    let over = pair.site.zvm(&["rebuild", "--vra", &address]);
    assert!(over.code != 0 && over.stderr.contains("nothing is rebuilt over it"), "{over:?}");

    for file in ["zvm.db", "zvm.db-wal", "zvm.db-shm"] {
        let _ = std::fs::remove_file(pair.site.dir.join("state").join(file));
    }
    let nobody = pair.site.zvm(&["rebuild", "--vra", "127.0.0.1:9"]);
    assert!(nobody.code != 0 && nobody.stderr.contains("127.0.0.1:9 doesn't answer"), "{nobody:?}");
    // One of them is enough: its groups name the others.
    let rebuilt = pair.site.zvm(&["rebuild", "--vra", &address, "--name", "london"]);
    assert!(rebuilt.code == 0 && rebuilt.stdout.contains("shop"), "{rebuilt:?}");
    pair.site.serve();
    wait_for("the VRAs", || {
        let vras = pair.site.json(&["vra", "list"]);
        vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true).count() == 2
    });
    assert_eq!(told(&pair), before);
    let alerts = pair.site.zvm(&["alert", "list", "--all"]).stdout;
    assert!(!alerts.contains("vm-moved"), "the host's VRA has the name that the inventory has: {alerts}");
    wait_for("the history", || history(&pair).0 >= count);
    assert!(history(&pair).1 >= from_us);
    // It is obeyed as before.
    assert_eq!(pair.site.zvm(&["checkpoint", "unlock", "shop", "kept"]).code, 0);
    let edited = pair.site.zvm(&["vpg", "edit", "shop", "--history", "3h"]);
    assert_eq!(edited.code, 0, "{edited:?}");
    wait_for("the next settings everywhere", || pair.revisions() == [3, 3]);
}

#[test]
fn a_vra_that_does_not_answer_is_named_and_known_again_when_it_does() {
    let mut pair = Pair::defined();
    pair.site.kill();
    let (port, name) = (pair.a.port, pair.a.name.clone());
    pair.a.kill();
    std::fs::remove_file(pair.site.dir.join("state/zvm.db")).expect("the database");
    for file in ["zvm.db-wal", "zvm.db-shm"] {
        let _ = std::fs::remove_file(pair.site.dir.join("state").join(file));
    }
    let rebuilt = pair.site.zvm(&["rebuild", "--vra", &format!("127.0.0.1:{}", pair.b.port)]);
    assert!(
        rebuilt.code == 0 && rebuilt.stdout.contains(&format!("127.0.0.1:{port}")),
        "{name}: {rebuilt:?}"
    );
    assert!(rebuilt.stdout.contains("didn't answer"), "{rebuilt:?}");
    pair.a.serve();
    pair.site.serve();
    wait_for("both VRAs under the names that they were enrolled with", || {
        let vras = pair.site.json(&["vra", "list"]);
        let reachable = vras.as_array().expect("list").iter().filter(|vra| vra["reachable"] == true);
        reachable.map(|vra| vra["name"].clone()).collect::<Vec<_>>() == ["vra-a", "vra-b"]
    });
    let ends = pair.site.json(&["vra", "show", "vra-a"])["state"]["certificate_ends_us"].as_u64();
    assert!(ends.is_some_and(|ends_us| ends_us > TimeUs::now().0), "{ends:?}");
    let alerts = pair.site.zvm(&["alert", "list", "--all"]).stdout;
    assert!(!alerts.contains("vra-certificate-ends") && !alerts.contains("vm-moved"), "{alerts}");
    wait_for("the group", || pair.site.zvm(&["checkpoint", "tag", "shop", "again"]).code == 0);
}

#[test]
fn one_that_is_revoked_stays_so_and_is_not_asked() {
    let mut pair = Pair::defined();
    assert_eq!(pair.site.zvm(&["vra", "revoke", "vra-a", "--force"]).code, 0);
    wait_for("the other VRA to be told", || pair.b.log().contains("revoked"));
    pair.site.kill();
    for file in ["zvm.db", "zvm.db-wal", "zvm.db-shm"] {
        let _ = std::fs::remove_file(pair.site.dir.join("state").join(file));
    }
    // It runs, its group names it, and it would answer.
    let rebuilt = pair.site.zvm(&["--json", "rebuild", "--vra", &format!("127.0.0.1:{}", pair.b.port)]);
    let told: Value = serde_json::from_str(&rebuilt.stdout).unwrap_or_default();
    assert_eq!((&told["vras"], &told["silent"]), (&serde_json::json!(["vra-b"]), &serde_json::json!([])));
    let both = [pair.b.port, pair.a.port].map(|port| format!("127.0.0.1:{port}"));
    for file in ["zvm.db", "zvm.db-wal", "zvm.db-shm"] {
        let _ = std::fs::remove_file(pair.site.dir.join("state").join(file));
    }
    let refused = pair.site.zvm(&["rebuild", "--vra", &both[0], "--vra", &both[1]]);
    assert!(refused.code != 0 && refused.stderr.contains("leave it out"), "{refused:?}");
    let rebuilt = pair.site.zvm(&["rebuild", "--vra", &both[0]]);
    assert_eq!(rebuilt.code, 0, "into a database that the refused one left: {rebuilt:?}");
    pair.site.serve();
    let vras = pair.site.json(&["vra", "list"]);
    let states: Vec<_> = vras.as_array().expect("list").iter().map(|vra| vra["state"].clone()).collect();
    assert_eq!(states, ["enrolled", "revoked"]);
}
