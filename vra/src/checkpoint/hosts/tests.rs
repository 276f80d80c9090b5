//! Machines of three hosts over real cores, with messages that the test carries.

use std::sync::Arc;

use journal::batch::{Checkpoint, CheckpointKind};
use uuid::Uuid;

use super::*;
use crate::api::{VpgId, VraId};
use crate::checkpoint::tests::Vm;
use crate::checkpoint::{CheckpointRefusal, HeldEpoch, LocalHold, Member};
use crate::clock::Now;
use crate::wire::{DeclineCode, GroupMessage};

const INTERVAL_US: u64 = 1_000_000;
const DEADLINE_US: u64 = 100_000;

struct Host {
    vra: VraId,
    vm: Vm,
    groups: SpanningGroups,
    watched: Vec<Arc<HeldEpoch>>,
}

struct Watching<'a>(&'a mut Vec<Arc<HeldEpoch>>);

impl Holder for Watching<'_> {
    fn hold(
        &mut self,
        members: &[Member],
        deadline_us: u64,
        now: Now,
    ) -> Result<LocalHold, CheckpointRefusal> {
        LocalHold::begin(members, now, deadline_us, &mut |held| self.0.push(held.clone()))
    }
}

type Ended = (Option<AskId>, Result<TakenByHosts, EpochFailure>);

struct World {
    vpg: VpgId,
    mono_us: u64,
    /// So far the wall clocks are ahead of the right time.
    ahead_us: u64,
    /// It isn't reached by what asks it to hold.
    deaf: Option<usize>,
    hosts: Vec<Host>,
    /// Sender, receiver, message.
    sent: Vec<(usize, usize, GroupMessage)>,
    ended: Vec<(usize, Ended)>,
}

impl World {
    /// Three hosts that know each other.
    fn new() -> Self {
        let host = |number: u128| Host {
            vra: VraId(Uuid::from_u128(number)),
            vm: Vm::new(100 + number),
            groups: SpanningGroups::new(VraId(Uuid::from_u128(number)), Uuid::from_u128(1000 + number)),
            watched: Vec::new(),
        };
        let hosts = (1..=3).map(host).collect();
        let mut world = Self {
            vpg: VpgId(Uuid::from_u128(7)),
            mono_us: 1,
            ahead_us: 0,
            deaf: None,
            hosts,
            sent: Vec::new(),
            ended: Vec::new(),
        };
        (0..3).for_each(|host| world.define(host, 1));
        world
    }

    fn now(&self) -> Now {
        Now { mono_us: self.mono_us, wall_us: 5_000_000 + self.ahead_us + self.mono_us }
    }

    fn define(&mut self, host: usize, member_set_version: u64) {
        self.define_with(host, member_set_version, DEADLINE_US);
    }

    fn define_with(&mut self, host: usize, member_set_version: u64, deadline_us: u64) {
        let hosts = self.hosts.iter();
        let hosts = hosts.map(|host| GroupHost { vra: host.vra, vms: [host.vm.member.vm].into() }).collect();
        let group = SpanningGroup {
            vpg: self.vpg,
            member_set_version,
            interval_us: INTERVAL_US,
            deadline_us,
            hosts,
            members: Some(vec![self.hosts[host].vm.member.clone()]),
        };
        let now = self.now();
        self.hosts[host].groups.set_group(group, now);
    }

    fn collect(&mut self, host: usize) {
        while let Some(output) = self.hosts[host].groups.poll_output() {
            match output {
                SpanningOutput::Send { to, message } => {
                    let to = self.hosts.iter().position(|host| host.vra == to).expect("a host");
                    self.sent.push((host, to, message));
                }
                SpanningOutput::Ended { asked, result, .. } => self.ended.push((host, (asked, result))),
            }
        }
    }

    fn tick(&mut self, host: usize) {
        let now = self.now();
        let Host { groups, watched, .. } = &mut self.hosts[host];
        watched.iter().for_each(|held| {
            held.expire_if_due(now);
        });
        groups.tick(now, &mut Watching(watched));
        self.collect(host);
    }

    fn carry(&mut self, (from, to, message): (usize, usize, GroupMessage)) {
        if self.deaf == Some(to) && matches!(message, GroupMessage::Hold(_)) {
            return;
        }
        let (now, from) = (self.now(), self.hosts[from].vra);
        let Host { groups, watched, .. } = &mut self.hosts[to];
        groups.receive(from, message, now, &mut Watching(watched));
        self.collect(to);
    }

    /// Takes the messages of a kind from the network.
    fn take(&mut self, is_meant: impl Fn(&GroupMessage) -> bool) -> Vec<(usize, usize, GroupMessage)> {
        self.sent.extract_if(.., |(_, _, message)| is_meant(message)).collect()
    }

    /// Carries what `is_up` lets through until all is quiet.
    fn settle(&mut self, is_up: impl Fn(usize) -> bool) {
        while !self.sent.is_empty() {
            for message in std::mem::take(&mut self.sent) {
                if is_up(message.0) && is_up(message.1) {
                    self.carry(message);
                }
            }
        }
    }

    /// Time goes on in small steps.
    fn pass(&mut self, us: u64, is_up: impl Fn(usize) -> bool) {
        let until_us = self.mono_us + us;
        while self.mono_us < until_us {
            self.mono_us += 5_000;
            for host in (0..3).filter(|host| is_up(*host)) {
                self.tick(host);
            }
            self.settle(&is_up);
        }
    }

    fn records(&mut self, host: usize) -> Vec<Checkpoint> {
        self.hosts[host].vm.checkpoints().into_iter().map(|(_, checkpoint)| checkpoint).collect()
    }

    /// The first host is due, and has asked the others to hold.
    fn begin(&mut self) -> Vec<(usize, usize, GroupMessage)> {
        self.mono_us += INTERVAL_US;
        self.tick(0);
        let holds = self.take(|message| matches!(message, GroupMessage::Hold(_)));
        assert_eq!(holds.iter().map(|hold| hold.1).collect::<Vec<_>>(), [1, 2]);
        holds
    }
}

fn all(_: usize) -> bool {
    true
}

#[test]
fn all_hosts_record_one_epoch_with_their_own_cuts_and_the_coordinator_is_held_last() {
    let mut world = World::new();
    world.hosts[1].vm.write();
    for hold in world.begin() {
        assert!(!world.hosts[0].vm.member.core.is_holding());
        world.carry(hold);
    }
    assert!(world.hosts[1].vm.member.core.is_holding());
    let above = world.hosts[1].vm.write();
    assert!(world.hosts[1].vm.lands_held(above));
    world.settle(all);
    assert_eq!(world.ended.len(), 1);
    let (0, (None, Ok(taken))) = world.ended.remove(0) else { panic!("{:?}", world.ended) };
    assert_eq!(taken.members.iter().map(|member| member.cut).collect::<Vec<_>>(), [0, 1, 0]);
    for host in 0..3 {
        let records = world.records(host);
        assert_eq!((records.len(), records[0].epoch, records[0].time_us), (1, taken.epoch, taken.time_us));
        assert_eq!(records[0].cut, u64::from(host == 1));
        assert!(!world.hosts[host].vm.member.core.is_holding());
    }
    let status = world.hosts[0].groups.status(world.vpg, world.now()).expect("known");
    assert_eq!((status.taken_epochs, status.aborted_epochs, status.hold.count), (1, 0, 1));
    assert_eq!(status.coordinator, Some(world.hosts[0].vra));
}

#[test]
fn times_are_in_order_over_a_small_step_back_of_the_clock_and_follow_a_large_one() {
    let mut world = World::new();
    let take = |world: &mut World| {
        world.begin().into_iter().for_each(|hold| world.carry(hold));
        world.settle(all);
        let (_, (_, Ok(taken))) = world.ended.pop().expect("one") else { panic!("no checkpoint") };
        (taken.time_us, world.now().wall_us)
    };
    let day_us = 86_400_000_000;
    world.ahead_us = day_us;
    let (tomorrow_us, _) = take(&mut world);
    world.ahead_us = day_us - INTERVAL_US - 900_000;
    let (next_us, wall_us) = take(&mut world);
    assert!(wall_us < tomorrow_us);
    assert_eq!(next_us, tomorrow_us + 1);
    world.ahead_us = 0;
    for _ in 0..2 {
        let (time_us, wall_us) = take(&mut world);
        assert_eq!(time_us, wall_us, "the right time, though the last checkpoint is of tomorrow");
    }
}

#[test]
fn whoever_says_no_ends_the_attempt_at_once_on_all_hosts() {
    let mut world = World::new();
    let core = Arc::clone(&world.hosts[2].vm.member.core);
    core.with(|core, wakeups| core.begin_sync(3, &[(0, 512)], 0, wakeups)).expect("streaming");
    world.begin().into_iter().for_each(|hold| world.carry(hold));
    assert!(world.hosts[1].vm.member.core.is_holding());
    world.settle(all);
    assert!(!world.hosts[1].vm.member.core.is_holding(), "not held until the deadline");
    let vm = Some(world.hosts[2].vm.member.vm);
    let failure = EpochFailure::Declined { vra: world.hosts[2].vra, vm, code: DeclineCode::InSync };
    assert_eq!(world.ended, [(0, (None, Err(failure)))]);
    assert!((0..3).all(|host| world.records(host).is_empty()));
}

#[test]
fn nobody_is_asked_to_hold_while_the_coordinators_own_vms_cant_be() {
    let mut world = World::new();
    let core = Arc::clone(&world.hosts[0].vm.member.core);
    let in_sync =
        |vm| EpochFailure::Declined { vra: VraId(Uuid::from_u128(1)), vm, code: DeclineCode::InSync };
    core.with(|core, wakeups| core.begin_sync(3, &[(0, 512)], 0, wakeups)).expect("streaming");
    let not_asked = |world: &mut World, failure: EpochFailure| {
        world.mono_us += INTERVAL_US;
        world.tick(0);
        assert!(world.take(|message| !matches!(message, GroupMessage::Alive)).is_empty());
        assert_eq!(world.ended.pop(), Some((0, (None, Err(failure)))));
        world.settle(all);
    };
    let vm = Some(world.hosts[0].vm.member.vm);
    not_asked(&mut world, in_sync(vm));
    core.with(|core, wakeups| core.overflow(crate::capture::modes::OverflowReason::Requested, wakeups));
    let vra = world.hosts[0].vra;
    not_asked(&mut world, EpochFailure::Declined { vra, vm, code: DeclineCode::NotStreaming });
}

#[test]
fn attempts_back_off_while_a_host_is_heard_and_not_reached() {
    let mut world = World::new();
    let interval_us =
        |world: &World| world.hosts[0].groups.status(world.vpg, world.now()).expect("known").interval_us;
    world.deaf = Some(1);
    // Three in the rhythm, then 2, 4 and 8 intervals later.
    world.pass(18 * INTERVAL_US, all);
    assert!(world.ended.iter().all(|(_, (_, result))| matches!(result, Err(EpochFailure::Late { .. }))));
    assert_eq!((world.ended.len(), interval_us(&world)), (6, 16 * INTERVAL_US));
    world.pass(80 * INTERVAL_US, all);
    assert_eq!((world.ended.len(), interval_us(&world)), (8, 60_000_000));

    // Others are live now than before.
    world.pass(LIVE_FOR_US + INTERVAL_US, |host| host != 2);
    assert_eq!(interval_us(&world), INTERVAL_US);
    world.deaf = None;
    world.ended.clear();
    world.pass(3 * INTERVAL_US, all);
    let made = |world: &World| world.ended.iter().filter(|(_, (_, result))| result.is_ok()).count();
    assert!(made(&world) >= 2, "{:?}", world.ended);

    // A checkpoint that is asked for, and made, ends it too; so does another set of members.
    world.deaf = Some(1);
    world.pass(10 * INTERVAL_US, all);
    assert!(interval_us(&world) > INTERVAL_US);
    world.deaf = None;
    let until_us = world.mono_us + INTERVAL_US;
    world.hosts[0].groups.ask(world.vpg, CheckpointKind::Tagged, "x", until_us);
    world.pass(INTERVAL_US / 2, all);
    world.ended.clear();
    world.pass(3 * INTERVAL_US, all);
    assert!(made(&world) >= 2, "{:?}", world.ended);
    world.deaf = Some(1);
    world.pass(10 * INTERVAL_US, all);
    (0..3).for_each(|host| world.define(host, 2));
    assert_eq!(interval_us(&world), INTERVAL_US);
}

#[test]
fn attempts_back_off_while_another_hosts_vm_is_in_a_sync_and_not_for_the_coordinators_own() {
    for (host, attempts) in [(2, 5), (0, 10)] {
        let mut world = World::new();
        let core = Arc::clone(&world.hosts[host].vm.member.core);
        core.with(|core, wakeups| core.begin_sync(3, &[(0, 512)], 0, wakeups)).expect("streaming");
        world.pass(10 * INTERVAL_US + INTERVAL_US / 2, all);
        assert_eq!(world.ended.len(), attempts, "{:?}", world.ended);
    }
    // It costs guests a round trip, and the first checkpoint after the sync doesn't come much later than that ends.
    let mut world = World::new();
    let core = Arc::clone(&world.hosts[2].vm.member.core);
    core.with(|core, wakeups| core.begin_sync(3, &[(0, 512)], 0, wakeups)).expect("streaming");
    world.pass(200 * INTERVAL_US, all);
    let interval_us = world.hosts[0].groups.status(world.vpg, world.now()).expect("known").interval_us;
    assert_eq!(interval_us, 10_000_000);
}

#[test]
fn other_sets_of_members_have_no_checkpoint_together() {
    let mut world = World::new();
    world.define(2, 2);
    world.begin().into_iter().for_each(|hold| world.carry(hold));
    world.settle(all);
    let (0, (None, Err(failure))) = &world.ended[0] else { panic!("{:?}", world.ended) };
    assert!(failure.to_string().contains("another set of members"), "{failure}");

    // The versions agree, what is held doesn't.
    let mut world = World::new();
    world.begin().into_iter().for_each(|hold| world.carry(hold));
    let mut held = world.take(|message| matches!(message, GroupMessage::Held(_)));
    if let GroupMessage::Held(held) = &mut held[0].2 {
        held.members[0].vm = crate::api::VmId::random();
    }
    held.into_iter().for_each(|held| world.carry(held));
    world.settle(all);
    let vra = world.hosts[1].vra;
    assert_eq!(world.ended, [(0, (None, Err(EpochFailure::OtherVms { vra })))]);
    assert!(
        (0..3).all(|host| world.records(host).is_empty() && !world.hosts[host].vm.member.core.is_holding())
    );
}

#[test]
fn a_dead_member_is_named_by_the_next_in_order_and_nothing_is_tried() {
    let mut world = World::new();
    world.pass(3 * INTERVAL_US, all);
    assert!(world.ended.iter().all(|(host, (_, result))| *host == 0 && result.is_ok()), "{:?}", world.ended);
    let before = world.ended.len();
    let up = |host| host != 0;
    world.pass(LIVE_FOR_US + 2 * INTERVAL_US, up);
    let dead = world.hosts[0].vra;
    let later: Vec<_> = world.ended[before..].to_vec();
    let missing = (1, (None, Err(EpochFailure::Missing { vra: dead })));
    assert!(later.contains(&missing) && later.iter().all(|ended| *ended == missing), "{later:?}");
    let status = world.hosts[1].groups.status(world.vpg, world.now()).expect("known");
    assert_eq!((status.coordinator, status.missing), (Some(world.hosts[1].vra), vec![dead]));
    assert!(!world.hosts[1].vm.member.core.is_holding());

    // It comes back as another incarnation, and coordinates again.
    let mut groups = SpanningGroups::new(dead, Uuid::from_u128(77));
    std::mem::swap(&mut world.hosts[0].groups, &mut groups);
    world.define(0, 1);
    let before = world.ended.len();
    world.pass(3 * INTERVAL_US, all);
    let (0, (None, Ok(taken))) = world.ended.last().expect("some") else { panic!("{:?}", world.ended) };
    assert_eq!((taken.epoch.nonce, taken.epoch.counter > 0), (Uuid::from_u128(77), true));
    assert!(world.ended[before..].iter().any(|(_, (_, result))| result.is_ok()));
}

#[test]
fn a_release_commits_the_hold_that_it_names_and_no_later_one() {
    let mut world = World::new();
    let holds = world.begin();
    holds.clone().into_iter().for_each(|hold| world.carry(hold));
    let held = world.take(|message| matches!(message, GroupMessage::Held(_)));
    held.into_iter().for_each(|held| world.carry(held));
    let releases = world.take(|message| matches!(message, GroupMessage::Release(_)));
    assert_eq!((releases.len(), world.records(0).len()), (2, 1));
    // The holds have expired, and the message that asked for one comes again: the guest's write in between belongs to no checkpoint.
    world.mono_us += DEADLINE_US;
    world.tick(1);
    world.tick(2);
    world.hosts[1].vm.write();
    world.carry(holds[0].clone());
    assert!(world.hosts[1].vm.member.core.is_holding());
    releases.into_iter().for_each(|release| world.carry(release));
    assert!((1..3).all(|host| world.records(host).is_empty()));
    world.settle(all);
    let (_, (_, Err(failure))) = &world.ended[0] else { panic!("{:?}", world.ended) };
    assert!(matches!(failure, EpochFailure::NotRecorded { code: DeclineCode::NoSuchHold, .. }), "{failure}");
}

#[test]
fn a_vra_that_was_restarted_has_no_hold_to_release() {
    let mut world = World::new();
    world.begin().into_iter().for_each(|hold| world.carry(hold));
    let held = world.take(|message| matches!(message, GroupMessage::Held(_)));
    held.into_iter().for_each(|held| world.carry(held));
    world.hosts[2].groups = SpanningGroups::new(world.hosts[2].vra, Uuid::from_u128(9));
    world.define(2, 1);
    world.settle(all);
    let failure = EpochFailure::NotRecorded { vra: world.hosts[2].vra, code: DeclineCode::NoSuchHold };
    assert_eq!(world.ended, [(0, (None, Err(failure)))]);
    assert!(world.records(2).is_empty());
}

#[test]
fn late_answers_fail_the_attempt_and_lengthen_the_next_deadline() {
    let mut world = World::new();
    for _ in 0..20 {
        world.begin().into_iter().for_each(|hold| world.carry(hold));
        world.settle(all);
    }
    assert!(world.ended.iter().all(|(_, (_, result))| result.is_ok()), "{:?}", world.ended);
    let deadline = |holds: &[(usize, usize, GroupMessage)]| match &holds[0].2 {
        GroupMessage::Hold(hold) => u64::from(hold.deadline_us),
        other => panic!("{other:?}"),
    };
    world.ended.clear();
    let holds = world.begin();
    assert_eq!(deadline(&holds), LEAST_DEADLINE_US);
    holds.into_iter().for_each(|hold| world.carry(hold));
    world.mono_us += LEAST_DEADLINE_US;
    world.tick(0);
    let late = EpochFailure::Late { vra: world.hosts[1].vra, deadline_us: LEAST_DEADLINE_US };
    assert_eq!(world.ended, [(0, (None, Err(late)))]);
    world.settle(all);
    let next = deadline(&world.begin());
    assert!(LEAST_DEADLINE_US < next && next <= DEADLINE_US, "{next}");
}

#[test]
fn nobody_holds_longer_than_its_own_definition_says() {
    let mut world = World::new();
    world.define_with(1, 1, 30_000);
    let holds = world.begin();
    assert!(holds.iter().all(|(_, _, message)| {
        matches!(message, GroupMessage::Hold(hold) if u64::from(hold.deadline_us) == DEADLINE_US)
    }));
    holds.into_iter().for_each(|hold| world.carry(hold));
    let are_held = |world: &mut World, after_us| {
        world.mono_us += after_us;
        (1..3).for_each(|host| world.tick(host));
        [1, 2].map(|host: usize| world.hosts[host].vm.member.core.is_holding())
    };
    assert_eq!(are_held(&mut world, 29_000), [true, true]);
    assert_eq!(are_held(&mut world, 2_000), [false, true]);
    assert_eq!(are_held(&mut world, 68_000), [false, true]);
    assert_eq!(are_held(&mut world, 2_000), [false, false]);
}

#[test]
fn any_host_makes_a_checkpoint_that_is_asked_for_and_tries_again_after_a_collision() {
    let mut world = World::new();
    let (vpg, mono_us) = (world.vpg, world.mono_us);
    let until_us = mono_us + 5 * INTERVAL_US;
    let unknown = world.hosts[2].groups.ask(VpgId::random(), CheckpointKind::Tagged, "x", until_us);
    let ask = world.hosts[2].groups.ask(vpg, CheckpointKind::Tagged, "before", until_us);
    // The first host has an attempt under way.
    world.begin().into_iter().for_each(|hold| world.carry(hold));
    world.tick(2);
    let from_third = world.take(|message| matches!(message, GroupMessage::Hold(_)));
    from_third.into_iter().for_each(|hold| world.carry(hold));
    world.settle(all);
    world.pass(200_000, all);
    let ended = |asked| {
        let found = world.ended.iter().find(|(_, (ended, _))| *ended == Some(asked));
        found.map(|(_, (_, result))| result.clone())
    };
    assert_eq!(ended(unknown), Some(Err(EpochFailure::Changed)));
    let taken = ended(ask).expect("it has ended").expect("it was made");
    assert_eq!((taken.tag.as_str(), taken.epoch.nonce), ("before", Uuid::from_u128(1003)));
    assert!((0..3).all(|host| world.records(host).iter().any(|record| record.tag == "before")));
    let most = (0..40).map(|_| world.hosts[1].groups.ask(vpg, CheckpointKind::Tagged, "y", until_us)).last();
    world.collect(1);
    let (_, (asked, result)) = world.ended.last().expect("one");
    assert_eq!((*asked, result.clone()), (most, Err(EpochFailure::TooMany)));
}

#[test]
fn strangers_are_not_heard_and_only_the_coordinator_of_a_hold_ends_it() {
    let mut world = World::new();
    let holds = world.begin();
    let now = world.now();
    let Host { groups, watched, .. } = &mut world.hosts[1];
    groups.receive(VraId::random(), holds[0].2.clone(), now, &mut Watching(watched));
    assert_eq!(groups.poll_output(), None);
    assert!(watched.is_empty());
    holds.into_iter().for_each(|hold| world.carry(hold));
    let held = world.take(|message| matches!(message, GroupMessage::Held(_)));
    let GroupMessage::Held(of_second) = held[0].2.clone() else { panic!("{held:?}") };
    world.carry((2, 1, GroupMessage::Abort(of_second.at)));
    let release = crate::wire::Release {
        at: of_second.at,
        hold: of_second.hold,
        time_us: 1,
        kind: CheckpointKind::Automatic,
        tag: String::new(),
    };
    world.carry((2, 1, GroupMessage::Release(release)));
    assert!(world.hosts[1].vm.member.core.is_holding() && world.records(1).is_empty());
    held.into_iter().for_each(|held| world.carry(held));
    world.settle(all);
    assert_eq!(world.records(1).len(), 1);
}
