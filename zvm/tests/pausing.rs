//! A group whose replication is paused, and goes on: over restarts, without alarm, and with all that was written.

mod common;

use std::time::Duration;

use common::pair::Pair;
use common::recovered::reads;
use common::vra::{has_qemu_io, qemu_io};
use common::wait_for;
use serde_json::Value;

const MIB: usize = 1 << 20;

fn source(pair: &Pair) -> Value {
    pair.a.json(&["status"])["source_vms"][0].take()
}

fn report(pair: &Pair) -> Value {
    pair.site.json(&["vpg", "show", "shop"])["report"].take()
}

fn is_paused(pair: &Pair) -> bool {
    let source = source(pair);
    source["mode"] == "paused"
        && source["connected"] == false
        && report(pair)["substatus"] == "ReplicationPausedUserInitiated"
}

fn open_alerts(pair: &Pair) -> Vec<String> {
    let alerts = pair.site.json(&["alert", "list"]);
    let alerts = alerts.as_array().expect("a list").iter();
    alerts.map(|alert| alert["code"].as_str().expect("a code").to_owned()).collect()
}

#[test]
fn a_paused_group_keeps_what_is_written_and_goes_on_with_it() {
    if !has_qemu_io() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let mut pair = Pair::defined();
    pair.site.tag("shop", "before");
    for _ in 0..2 {
        let paused = pair.site.zvm(&["vpg", "pause", "shop"]);
        assert_eq!(paused.code, 0, "{paused:?}");
    }
    wait_for("the pause", || is_paused(&pair));
    assert_eq!(pair.revisions()[0], 2, "pausing again changes nothing");
    qemu_io(&pair.disks[0], &[&format!("write -P 0x33 0 {MIB}"), &format!("read -P 0x33 0 {MIB}")]);
    let refused = pair.site.zvm(&["checkpoint", "tag", "shop", "never"]);
    assert!(refused.code == 4 && refused.stderr.contains("is paused"), "{refused:?}");
    let refused = pair.site.zvm(&["vpg", "force-sync", "shop"]);
    assert!(refused.code == 4 && refused.stderr.contains("is paused"), "{refused:?}");
    let count = || {
        let listed = pair.site.json(&["checkpoint", "list", "shop", "--limit", "1000"]);
        listed.as_array().expect("a list").len()
    };
    // What was under way has arrived.
    std::thread::sleep(Duration::from_secs(1));
    let before = count();
    // Longer than VRAs take to look for what is wrong, and than a checkpoint's interval.
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(count(), before);
    assert_eq!(open_alerts(&pair), ["vpg-paused"]);
    for vra in [&pair.a, &pair.b] {
        assert_eq!(vra.json(&["status"])["alerts"], serde_json::json!([]), "{}", vra.name);
    }
    // What was there can be recovered.
    pair.site.tested("shop", "before", |disks| assert_eq!(disks.len(), 2, "{disks:?}"));
    assert_eq!(pair.site.zvm(&["vpg", "resume", "shop"]).code, 0);
    pair.site.tag("shop", "after");
    pair.site.tested("shop", "after", |disks| {
        let larger = disks.iter().find(|(_, uri)| uri.contains("-0?")).expect("disk 0");
        reads(&larger.1, 0x33, 0, MIB);
        reads(&larger.1, 0x11, MIB, 7 * MIB);
    });
    assert_eq!(pair.a.log().matches("a full sync has begun").count(), 1, "the first one is enough");
    wait_for("the alert's end", || open_alerts(&pair).is_empty());

    // It stays paused whoever starts anew, and goes on from where it has to.
    assert_eq!(pair.site.zvm(&["vpg", "pause", "shop"]).code, 0);
    wait_for("the pause", || is_paused(&pair));
    pair.site.kill();
    pair.a.kill();
    pair.a.serve();
    wait_for("the paused source", || source(&pair)["mode"] == "paused");
    pair.site.serve();
    wait_for("the pause", || is_paused(&pair));
    qemu_io(&pair.disks[1], &[&format!("write -P 0x44 0 {MIB}")]);
    std::thread::sleep(Duration::from_secs(2));
    assert!(is_paused(&pair), "it isn't connected after a while either");
    assert_eq!(pair.site.zvm(&["vpg", "resume", "shop"]).code, 0);
    pair.site.tag("shop", "anew");
    pair.site.tested("shop", "anew", |disks| {
        let other = disks.iter().find(|(_, uri)| uri.contains("-1?")).expect("disk 1");
        reads(&other.1, 0x44, 0, MIB);
        reads(&other.1, 0x22, MIB, 3 * MIB);
    });
    let events = pair.site.json(&["event", "list", "--limit", "1000"]);
    let of =
        |kind: &str| events.as_array().expect("a list").iter().filter(|event| event["kind"] == kind).count();
    assert_eq!((of("PauseProtectionGroup"), of("ResumeProtectionGroup")), (2, 2));
}

#[test]
fn a_full_sync_is_begun_once_and_older_checkpoints_stay() {
    let pair = Pair::defined();
    pair.site.tag("shop", "before");
    let syncs = || pair.a.log().matches("a full sync has begun").count();
    assert_eq!(syncs(), 1);
    let unknown = pair.site.zvm(&["vpg", "force-sync", "shop", "--vm", "nope"]);
    assert!(unknown.code == 3 && unknown.stderr.contains("has no VM"), "{unknown:?}");
    for (round, vm) in [(2, &[][..]), (3, &["--vm", "db"])] {
        let force = || pair.site.zvm(&[&["vpg", "force-sync", "shop"], vm].concat());
        let forced = force();
        assert_eq!(forced.code, 0, "{forced:?}");
        // At once again: it is about to run, runs, or is over by then.
        let again = force();
        let is_over = again.code == 0;
        assert!(is_over || again.code == 4 && again.stderr.contains("full sync of VM db"), "{again:?}");
        wait_for("the sync", || syncs() >= round && source(&pair)["mode"] == "streaming");
        pair.site.tag("shop", &format!("after {round}"));
    }
    assert_eq!(pair.site.complete("shop"), ["after 3", "after 2", "before"]);
    // Nobody is alarmed by what was asked for.
    let log = pair.a.log();
    let is_alarm = |line: &&str| line.contains("WARN") && line.contains("not captured");
    assert_eq!(log.lines().find(is_alarm), None, "{log}");
    let tasks = pair.site.json(&["task", "list", "--limit", "1000"]);
    let done = tasks.as_array().expect("a list").iter().filter(|task| task["kind"] == "InitFullSync");
    assert!(done.filter(|task| task["state"] == "Completed").count() >= 2);
}
