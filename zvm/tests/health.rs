//! Status, RPO, problems and alerts of groups, from what VRAs tell.

#[path = "common/world.rs"]
mod world;

use std::collections::BTreeMap;

use vra::api::status::*;
use vra::api::*;
use world::World;
use zvm::conditions::Look;
use zvm::health;
use zvm::inventory::Inventory;
use zvm::model::alert::Condition;
use zvm::model::status::{Stage, VpgReport, VpgStatus as Status, VpgSubstatus as Substatus};
use zvm::model::test_run::TestState;

const NOW_US: u64 = 1_800_000_000_000_000;
const SECOND_US: u64 = 1_000_000;

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

/// A group of one VM that does well.
struct Group {
    world: World,
    ended: BTreeMap<VpgId, u64>,
    source: VraId,
    target: VraId,
}

impl Group {
    fn new() -> Self {
        let mut world = World::new();
        world.now_us = NOW_US;
        let (source, target) = (world.add_vra("a"), world.add_vra("b"));
        let vpg = world.add_vpg(source, target);
        world.desired.vpgs[0].applied_revision = 1;
        let member = world.desired.vpgs[0].settings.vms[0].clone();
        let newest = TimeUs(NOW_US - 2 * SECOND_US);
        let mut at_target = world::vpg_status(vpg, 1);
        at_target.checkpoint_count = 100;
        at_target.held_checkpoint =
            Some(LastCheckpoint { id: CheckpointId { nonce: 1, counter: 100 }, time_us: newest, tag: None });
        let source_vm = SourceVmStatus {
            vm: member.vm,
            name: "db".into(),
            vpg,
            target,
            mode: SourceMode::Streaming,
            connected: true,
            generation: GenerationId::random(),
            last_sequence: 10,
            durable_through: 10,
            rpo: Rpo::default(),
            sync: None,
            retained_bytes: 0,
            retained_limit_bytes: 1 << 20,
            sent_bytes: 0,
            hold: HoldTimes::default(),
            local_errors: 0,
        };
        let target_vm = TargetVmStatus {
            vm: member.vm,
            name: "db".into(),
            vpg,
            source,
            state: TargetState::Journaling,
            connected: true,
            journal: member.journal,
            generation: None,
            durable_through: 10,
            history_from_us: Some(TimeUs(NOW_US - 3_600 * SECOND_US)),
            history_to_us: Some(newest),
            checkpoint_count: 100,
            journal_used_bytes: 1 << 20,
            journal_limit_bytes: 1 << 30,
            write_rate_bytes_per_s: 0,
            reachable_history_s: None,
            limit_reached_in_s: None,
            site_key: None,
            scrub: None,
            received_bytes: 0,
            folder: "/srv/db".into(),
        };
        world.see(source, NOW_US, |status| {
            status.now_us = TimeUs(NOW_US);
            status.vpgs.push(world::vpg_status(vpg, 1));
            status.source_vms.push(source_vm);
        });
        world.see(target, NOW_US, |status| {
            status.now_us = TimeUs(NOW_US);
            status.vpgs.push(at_target);
            status.target_vms.push(target_vm);
        });
        Self { world, ended: BTreeMap::new(), source, target }
    }

    fn source(&mut self, change: impl FnOnce(&mut VraStatus)) {
        self.world.see(self.source, NOW_US, change);
    }

    fn target(&mut self, change: impl FnOnce(&mut VraStatus)) {
        self.world.see(self.target, NOW_US, change);
    }

    fn source_vm(&mut self, change: impl FnOnce(&mut SourceVmStatus)) {
        self.source(|status| change(&mut status.source_vms[0]));
    }

    fn target_vm(&mut self, change: impl FnOnce(&mut TargetVmStatus)) {
        self.target(|status| change(&mut status.target_vms[0]));
    }

    fn report(&self) -> VpgReport {
        let desired = &self.world.desired;
        health::report(
            &desired.vpgs[0],
            &desired.vras,
            &self.world.observed,
            &desired.tests,
            self.world.now_us,
        )
    }

    fn judged(&self) -> (Status, Substatus) {
        let report = self.report();
        (report.status, report.substatus)
    }

    fn codes(&self) -> Vec<String> {
        self.conditions().into_iter().map(|condition| condition.code).collect()
    }

    fn conditions(&self) -> Vec<Condition> {
        let look = Look {
            desired: &self.world.desired,
            observed: &self.world.observed,
            reports: &[self.report()],
            failures: &BTreeMap::new(),
            ended: &self.ended,
            inventory: &Inventory::default(),
            now_us: self.world.now_us,
        };
        look.conditions()
    }
}
