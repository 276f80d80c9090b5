//! Alerts, from what VRAs tell.

#[path = "common/group.rs"]
mod group;
#[path = "common/world.rs"]
mod world;

use group::{Group, NOW_US, SECOND_US};
use vra::api::*;
use zvm::model::test_run::TestState;

#[test]
fn a_test_is_lost_only_while_its_vra_cannot_serve_its_disks() {
    let mut group = Group::new();
    group.world.add_test(&[group.target]);
    let test = &mut group.world.desired.tests[0];
    (test.state, test.started_us) = (TestState::Running, TimeUs(NOW_US - 60 * SECOND_US));
    let view = test.details.views[0].view;
    let is_lost = |group: &Group| group.codes().iter().any(|code| code == "test-view-lost");
    assert!(is_lost(&group), "it is not there at all");
    group.target(|status| status.views.push(world::view(view, None)));
    assert!(!is_lost(&group));
    group.target(|status| status.views[0].problem = Some("its scratch is gone".to_owned()));
    assert!(is_lost(&group));
    group.target(|status| status.views[0].problem = None);
    assert!(!is_lost(&group), "it is served again");
}

#[test]
fn a_group_that_was_not_tested_for_long_is_a_reminder_until_it_is() {
    const DAY_US: u64 = 86_400 * SECOND_US;
    let mut group = Group::new();
    let now_us = group.world.now_us;
    let vpg = &mut group.world.desired.vpgs[0];
    (vpg.created_us, vpg.settings.test_reminder_days) = (TimeUs(now_us - 30 * DAY_US), Some(30));
    let code = ["vpg-test-reminder".to_owned()];
    assert!(group.codes().is_empty(), "a new group counts from its creation");
    group.world.desired.vpgs[0].created_us.0 -= 1;
    assert_eq!(group.codes(), code);
    let last_us = TimeUs(now_us - 30 * DAY_US);
    group.world.desired.vpgs[0].last_test_us = Some(last_us);
    assert!(group.codes().is_empty(), "it was tested");
    group.world.desired.vpgs[0].last_test_us = Some(TimeUs(last_us.0 - 1));
    let conditions = group.conditions();
    assert!(conditions[0].remedy.contains("zvm test start shop"), "{conditions:?}");
    assert!(conditions[0].description.contains("more than 30 days ago"), "{conditions:?}");
    group.world.add_test(&[]);
    assert_eq!(group.codes(), code, "its disks are not open yet");
    group.world.desired.tests[0].state = TestState::Running;
    assert!(group.codes().is_empty(), "it is being tested");
    group.world.desired.tests.clear();
    group.world.desired.vpgs[0].settings.test_reminder_days = None;
    assert!(group.codes().is_empty(), "nobody wants it");
}

#[test]
fn a_definition_that_is_newer_at_a_vra_than_in_the_database_is_an_alert() {
    let mut group = Group::new();
    assert!(!group.codes().iter().any(|code| code == "vpg-newer-elsewhere"));
    group.target(|status| status.vpgs[0].revision += 1);
    let found = group.conditions().into_iter().find(|condition| condition.code == "vpg-newer-elsewhere");
    let found = found.expect("an alert");
    assert!(found.description.contains("VRA b has another definition of VPG shop (revision 2)"), "{found:?}");
    assert!(found.remedy.contains("zvm vpg adopt shop"));
    // Two contents of one revision are told apart, if both managers gave stamps.
    let is_told = |group: &Group| group.codes().contains(&"vpg-newer-elsewhere".to_owned());
    let stamp = Some(uuid::Uuid::new_v4());
    group.target(|status| (status.vpgs[0].revision, status.vpgs[0].stamp) = (1, stamp));
    assert!(!is_told(&group));
    group.world.desired.vpgs[0].stamp = Some(uuid::Uuid::new_v4());
    assert!(is_told(&group));
    group.world.desired.vpgs[0].stamp = stamp;
    assert!(!is_told(&group));
}

#[test]
fn a_guest_agent_that_stayed_behind_when_its_vm_moved_is_an_alert() {
    let mut group = Group::new();
    let vm = group.world.desired.vpgs[0].settings.vms[0].vm;
    let former = group.world.add_vra("c");
    group.world.see(former, NOW_US, |status| status.guest_agents.push(vm));
    let found = group.conditions();
    let found = found.iter().find(|condition| condition.code == "guest-agent-elsewhere").unwrap();
    assert!(found.description.contains("known at VRA c, and the VM runs at VRA a"), "{found:?}");
    group.source(|status| status.guest_agents.push(vm));
    assert!(!group.codes().contains(&"guest-agent-elsewhere".to_owned()));
}

#[test]
fn silence_is_an_alert_after_a_while_and_names_one_condition_for_each_thing() {
    let mut group = Group::new();
    assert_eq!(group.codes(), Vec::<String>::new());
    let source = group.source;
    let now_us = group.world.now_us;
    let seen = group.world.observed.get_mut(&source).unwrap();
    (seen.reachable, seen.since_us) = (false, now_us);
    assert_eq!(group.codes(), ["vpg-not-protected"], "a restart is no alert yet");
    group.world.now_us += 10 * SECOND_US;
    assert_eq!(group.codes(), ["vra-unreachable", "vpg-not-protected"]);
}

#[test]
fn a_group_that_only_a_vra_knows_and_an_ending_certificate_are_alerts() {
    let mut group = Group::new();
    let (source, target) = (group.source, group.target);
    group.world.desired.vras.get_mut(&source).unwrap().certificate_ends_us =
        TimeUs(NOW_US + 86_400 * SECOND_US);
    let stranger = world::vpg_status(VpgId::random(), 1);
    let vpg = stranger.vpg;
    group.world.see(target, NOW_US, |status| status.vpgs.push(stranger));
    assert_eq!(group.codes(), ["vra-certificate-ends", "vpg-unknown"]);
    // It ended after the VRA was asked: that it was there then is nothing strange.
    group.ended.insert(vpg, NOW_US + 1);
    assert_eq!(group.codes(), ["vra-certificate-ends"]);
    group.ended.insert(vpg, NOW_US - 1);
    assert_eq!(group.codes(), ["vra-certificate-ends", "vpg-unknown"]);
}
