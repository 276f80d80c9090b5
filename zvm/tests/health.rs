//! Status, RPO and problems of groups, from what VRAs tell.

#[path = "common/group.rs"]
mod group;
#[path = "common/world.rs"]
mod world;

use group::{Group, NOW_US, SECOND_US};
use vra::api::status::*;
use vra::api::*;
use zvm::model::status::{Stage, VpgReport, VpgStatus as Status, VpgSubstatus as Substatus};

#[test]
fn a_paused_group_says_so_and_nothing_else() {
    let mut group = Group::new();
    group.world.desired.vpgs[0].settings.paused = true;
    group.source_vm(|vm| (vm.mode, vm.connected) = (SourceMode::Paused, false));
    group.world.now_us += 600 * SECOND_US;
    let report = group.report();
    assert_eq!(
        (report.status, report.substatus),
        (Status::NotMeetingSla, Substatus::ReplicationPausedUserInitiated)
    );
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
    assert!(report.problems[0].remedy.contains("zvm vpg resume"));
    assert_eq!(group.codes(), ["vpg-paused"]);
}

#[test]
fn what_was_there_before_a_vm_joined_stays_what_it_is() {
    let mut group = Group::new();
    let before = group.report();
    let other = group.world.add_vra("c");
    group.world.desired.vpgs[0].settings.member_set_version = 2;
    group.world.add_member(group.source, other);
    // Its target has not even heard of the group.
    let told = |report: &VpgReport| (report.checkpoint_count, report.history_from_us, report.history_to_us);
    assert_eq!(told(&group.report()), told(&before));
    let vpg = group.world.desired.vpgs[0].id;
    group.world.see(other, NOW_US, |status| status.vpgs.push(world::vpg_status(vpg, 1)));
    assert_eq!(told(&group.report()), told(&before), "its first sync runs");
    assert_eq!(group.report().rpo_us, before.rpo_us);
    // From then on it is missed.
    let old = TimeUs(NOW_US - 600 * SECOND_US);
    let last = LastCheckpoint { id: CheckpointId { nonce: 1, counter: 1 }, time_us: old, tag: None };
    group.world.see(other, NOW_US, |status| status.vpgs[0].held_checkpoint = Some(last));
    assert_eq!(group.report().history_to_us, Some(old));
}

#[test]
fn a_group_goes_from_creating_over_its_first_sync_to_meeting_its_sla() {
    let mut group = Group::new();
    group.world.desired.vpgs[0].applied_revision = 0;
    group.source(|status| status.source_vms.clear());
    group.target(|status| {
        status.target_vms.clear();
        status.vpgs.clear();
    });
    assert_eq!(group.judged(), (Status::Initializing, Substatus::Creating));

    let mut group = Group::new();
    group.source_vm(|vm| {
        vm.mode = SourceMode::Syncing;
        vm.sync = Some(SyncProgress {
            done_bytes: 1 << 30,
            total_bytes: 4 << 30,
            started_us: TimeUs(NOW_US - 10 * SECOND_US),
        });
    });
    group.target_vm(|vm| {
        vm.state = TargetState::InitialSync;
        vm.history_from_us = None;
    });
    group.target(|status| {
        status.vpgs[0].checkpoint_count = 0;
        status.vpgs[0].held_checkpoint = None;
    });
    let report = group.report();
    assert_eq!((report.status, report.substatus), (Status::Initializing, Substatus::InitialSync));
    assert_eq!(report.sync_percent, Some(25));
    assert_eq!(report.sync_remaining_us, Some(30 * SECOND_US));
    assert_eq!(report.rpo_us, None, "nothing can be recovered yet");

    group.world.desired.vpgs[0].created_us = TimeUs(NOW_US - SECOND_US);
    group.source_vm(|vm| (vm.mode, vm.connected, vm.sync) = (SourceMode::Connecting, false, None));
    assert_eq!(
        group.judged(),
        (Status::Initializing, Substatus::InitialSync),
        "it may take a moment to connect"
    );
    group.world.now_us += 60 * SECOND_US;
    assert_eq!(group.judged(), (Status::NotMeetingSla, Substatus::DisconnectedFromPeerNoRecoveryPoints));

    let report = Group::new().report();
    assert_eq!((report.status, report.substatus), (Status::MeetingSla, Substatus::None));
    assert_eq!(report.rpo_us, Some(2 * SECOND_US));
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

#[test]
fn rpo_is_the_age_of_the_newest_checkpoint_at_all_targets_by_the_sources_clock() {
    let mut group = Group::new();
    // A source whose clock is an hour behind stamps its checkpoints an hour behind.
    group.source(|status| status.now_us.0 -= 3_600 * SECOND_US);
    group.target(|status| {
        status.vpgs[0].held_checkpoint.as_mut().unwrap().time_us.0 -= 3_600 * SECOND_US;
    });
    assert_eq!(group.report().rpo_us, Some(2 * SECOND_US));

    let mut group = Group::new();
    group.target(|status| status.vpgs[0].held_checkpoint.as_mut().unwrap().time_us.0 -= 60 * SECOND_US);
    group.source_vm(|vm| {
        vm.rpo = Rpo { total_us: 60_000_000, wire_us: 50_000_000, queue_us: 9, ..Rpo::default() }
    });
    let report = group.report();
    assert_eq!(report.status, Status::RpoNotMeetingSla);
    assert_eq!(report.slowest_stage, Some((Stage::Wire, 50_000_000)));
    assert!(report.problems[0].description.contains("on the network"), "{:?}", report.problems);
    group.source_vm(|vm| vm.rpo.capture_us = 60_000_000);
    assert_eq!(group.report().slowest_stage, Some((Stage::Capture, 60_000_000)));
}

#[test]
fn what_a_target_took_itself_as_a_source_is_not_what_it_holds() {
    let mut group = Group::new();
    let held_us = NOW_US - 3_600 * SECOND_US;
    group.target(|status| {
        let status = &mut status.vpgs[0];
        status.last_checkpoint.clone_from(&status.held_checkpoint);
        status.held_checkpoint.as_mut().unwrap().time_us = TimeUs(held_us);
    });
    let report = group.report();
    assert_eq!((report.rpo_us, report.history_to_us), (Some(3_600 * SECOND_US), Some(TimeUs(held_us))));
    assert_eq!(report.status, Status::RpoNotMeetingSla);
}

#[test]
fn checkpoints_are_as_old_as_their_coordinators_clock_says_not_another_sources() {
    let mut group = Group::new();
    let (source, target) = (group.source, group.target);
    let ahead = group.world.add_vra("c");
    group.world.add_member(ahead, target);
    let at_ahead = world::vpg_status(group.world.desired.vpgs[0].id, 1);
    group.world.see(ahead, NOW_US, |status| {
        status.now_us = TimeUs(NOW_US + 40 * SECOND_US);
        status.vpgs.push(at_ahead);
    });
    for vra in [source, ahead] {
        group.world.see(vra, NOW_US, |status| status.vpgs[0].coordinator = Some(source));
    }
    assert_eq!(group.report().rpo_us, Some(2 * SECOND_US));
}

#[test]
fn a_newest_checkpoint_in_the_future_says_nothing_of_the_rpo() {
    let mut group = Group::new();
    group.target(|status| status.vpgs[0].held_checkpoint.as_mut().unwrap().time_us.0 += 6 * SECOND_US);
    assert_eq!(group.report().rpo_us, Some(0), "clocks differ a little");
    group.target(|status| status.vpgs[0].held_checkpoint.as_mut().unwrap().time_us.0 += 86_400 * SECOND_US);
    let report = group.report();
    assert_eq!((report.status, report.rpo_us), (Status::RpoNotMeetingSla, None));
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
    assert!(report.problems[0].description.contains("is unknown"), "{:?}", report.problems);
    assert!(report.problems[0].remedy.contains("synchronise the clocks"), "{:?}", report.problems);
}

#[test]
fn a_dead_source_leaves_what_can_be_recovered_and_rpo_grows() {
    let mut group = Group::new();
    let source = group.source;
    let seen = group.world.observed.get_mut(&source).unwrap();
    seen.reachable = false;
    seen.error = Some("no route".into());
    group.world.now_us += 100 * SECOND_US;
    let report = group.report();
    assert_eq!((report.status, report.substatus), (Status::NotMeetingSla, Substatus::DisconnectedFromPeer));
    assert_eq!(report.rpo_us, Some(102 * SECOND_US));
    assert!(report.problems[0].description.contains("does not answer: no route"), "{:?}", report.problems);

    group.target(|status| status.vpgs[0].checkpoint_count = 0);
    assert_eq!(group.report().substatus, Substatus::DisconnectedFromPeerNoRecoveryPoints);
}

#[test]
fn each_trouble_has_its_substatus_and_a_remedy() {
    type Change = fn(&mut Group);
    let cases: [(Change, Status, Substatus, &str); 7] = [
        (
            |group| group.source_vm(|vm| vm.mode = SourceMode::WaitingForVolumes),
            Status::NotMeetingSla,
            Substatus::VmNotProtectedError,
            "/images/db",
        ),
        (
            |group| group.source_vm(|vm| vm.mode = SourceMode::Refused),
            Status::NotMeetingSla,
            Substatus::NeedsConfiguration,
            "another history",
        ),
        (
            |group| group.source_vm(|vm| vm.mode = SourceMode::Overflowed),
            Status::MeetingSla,
            Substatus::FullSync,
            "no memory left",
        ),
        (
            |group| group.source_vm(|vm| vm.connected = false),
            Status::NotMeetingSla,
            Substatus::DisconnectedFromPeer,
            "a does not reach b",
        ),
        (
            |group| {
                // It ends the stream.
                group.source_vm(|vm| vm.connected = false);
                group.target_vm(|vm| vm.state = TargetState::PausedFull);
            },
            Status::NotMeetingSla,
            Substatus::ReplicationPausedSystemInitiated,
            "is full",
        ),
        (
            |group| group.target_vm(|vm| vm.state = TargetState::Poisoned),
            Status::NotMeetingSla,
            Substatus::JournalStorageError,
            "failed",
        ),
        (
            |group| {
                let source = group.source;
                group.world.desired.vras.remove(&source);
            },
            Status::NotMeetingSla,
            Substatus::NeedsConfiguration,
            "revoked",
        ),
    ];
    for (change, status, substatus, words) in cases {
        let mut group = Group::new();
        change(&mut group);
        let report = group.report();
        assert_eq!((report.status, report.substatus), (status, substatus), "{words}");
        let problem = &report.problems[0];
        assert!(problem.description.contains(words), "{problem:?}");
        assert!(!problem.remedy.is_empty());
    }
}

#[test]
fn short_history_counts_only_when_the_group_is_old_enough_to_have_more() {
    let mut group = Group::new();
    group.target_vm(|vm| vm.history_from_us = Some(TimeUs(NOW_US - 600 * SECOND_US)));
    group.world.desired.vpgs[0].created_us = TimeUs(NOW_US - 700 * SECOND_US);
    assert_eq!(group.report().status, Status::MeetingSla);
    group.world.desired.vpgs[0].created_us = TimeUs(NOW_US - 7_200 * SECOND_US);
    assert_eq!(group.report().status, Status::HistoryNotMeetingSla);
}

#[test]
fn a_warning_of_a_vra_is_shown_but_does_not_break_the_sla_and_a_critical_alert_does() {
    let mut group = Group::new();
    let vpg = group.world.desired.vpgs[0].id;
    let alert = |severity| Alert {
        code: "clock-jump".into(),
        severity,
        vm: None,
        vpg: Some(vpg),
        message: "the clock jumped".into(),
        remedy: None,
        since_us: TimeUs(1),
    };
    group.target(|status| status.alerts = vec![alert(Severity::Warning)]);
    let report = group.report();
    assert_eq!((report.status, report.substatus), (Status::MeetingSla, Substatus::None));
    assert!(report.problems[0].description.contains("the clock jumped"));
    group.target(|status| status.alerts = vec![alert(Severity::Critical)]);
    assert_eq!(group.judged(), (Status::NotMeetingSla, Substatus::Error));
}
