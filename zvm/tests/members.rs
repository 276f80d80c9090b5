//! VMs that join a group and leave it: what the reconciler tells which VRA, and that nothing is lost of it.

#[path = "common/world.rs"]
mod world;

use std::collections::{BTreeMap, BTreeSet};

use vra::api::*;
use world::*;
use zvm::manager::spec::without;
use zvm::model::vpg::{Member, Vpg};
use zvm::reconcile::*;

/// Changes the members as the manager does.
fn change(world: &mut World, keep_files: bool, leaving: Option<VmId>, joining: Option<Member>) {
    let before = world.desired.vpgs[0].clone();
    let mut settings = match leaving {
        Some(vm) => without(&before, &[vm.to_string()], keep_files).expect("it can leave"),
        None => before.settings.clone(),
    };
    if let Some(member) = joining {
        settings.member_set_version += 1;
        settings.vms.push(Member { member_since: MemberSince(settings.member_set_version), ..member });
    }
    let mut after = Vpg { settings, ..before.clone() };
    let leaving = Leaving::of(&before, &mut after, &world.desired.leftovers, |_| true);
    let leftovers = &mut world.desired.leftovers;
    leftovers.retain(|left| !leaving.back.contains(&left.vra));
    leftovers.extend(leaving.left);
    after.revision += 1;
    world.desired.vpgs[0] = after;
}

/// A group of two VMs at one source, with a target for each.
fn two_targets() -> (World, VpgId, [VraId; 3]) {
    let mut world = World::new();
    let vras = ["a", "b", "c"].map(|name| world.add_vra(name));
    let vpg = world.add_vpg(vras[0], vras[1]);
    world.add_member(vras[0], vras[2]);
    world.settle();
    (world, vpg, vras)
}

fn last_member(world: &World) -> Member {
    world.desired.vpgs[0].settings.vms.last().expect("a member").clone()
}

/// Lets what is planned succeed, one round.
fn round(world: &mut World) -> Plan {
    world.now_us += 1;
    for vra in world.truth.keys().copied().collect::<Vec<_>>() {
        world.look_at(vra);
    }
    let plan = world.plan();
    plan.actions.iter().for_each(|action| world.land(action));
    world.now_us += 1;
    world.finish_all(&plan, ActionOutcome::Done);
    note(world, &plan);
    plan
}

fn note(world: &mut World, plan: &Plan) {
    for transition in &plan.transitions {
        match transition {
            Transition::VpgApplied { revision, .. } => world.desired.vpgs[0].applied_revision = *revision,
            Transition::LeftoverGone { vra, .. } => {
                world.desired.leftovers.retain(|left| left.vra != *vra);
            }
            _ => {}
        }
    }
}

#[test]
fn a_vra_whose_last_vm_left_hears_which_files_go_and_then_lets_go_of_the_group() {
    let (mut world, vpg, [source, stays, left]) = two_targets();
    for vra in [source, stays, left] {
        world.truth.get_mut(&vra).unwrap().insert(vpg, 1);
    }
    let leaving = last_member(&world);
    change(&mut world, false, Some(leaving.vm), None);
    assert_eq!(world.desired.leftovers, [Leftover { vpg, vra: left, keep_files: false }]);
    let first = round(&mut world);
    assert_eq!(BTreeSet::from_iter(applies(&first)), BTreeSet::from([stays, left]));
    let second = round(&mut world);
    assert_eq!((applies(&second), removes(&second)), (vec![source], vec![left]));
    let is_kept = pick(&second, |action| match action.kind {
        ActionKind::RemoveVpg { keep_files, .. } => Some(keep_files),
        _ => None,
    });
    assert_eq!(is_kept, [true], "what was to be removed is, VM by VM");
    let third = round(&mut world);
    assert!(third.transitions.contains(&Transition::LeftoverGone { vpg, vra: left }), "{third:?}");
    assert!(third.transitions.contains(&Transition::VpgApplied { vpg, revision: 2 }));
    assert!(round(&mut world).actions.is_empty());
    assert!(world.truth[&left].is_empty());
    // The next change forgets it.
    let joining = Member { vm: VmId::random(), journal: JournalId::random(), ..leaving };
    change(&mut world, false, None, Some(joining));
    assert!(world.desired.vpgs[0].settings.former.is_empty());
}

#[test]
fn a_status_that_overtakes_the_answer_is_no_reason_to_begin_anew() {
    let (mut world, vpg, [_, _, left]) = two_targets();
    for vra in world.desired.vras.keys().copied().collect::<Vec<_>>() {
        world.truth.get_mut(&vra).unwrap().insert(vpg, 1);
    }
    let leaving = last_member(&world);
    change(&mut world, false, Some(leaving.vm), None);
    round(&mut world);
    world.now_us += 1;
    world.look_at(left);
    let plan = world.plan();
    assert_eq!(removes(&plan), [left]);
    // It has let go, and says so when it is asked for its status, but the answer to the request is still on its way.
    plan.actions.iter().for_each(|action| world.land(action));
    world.now_us += 1;
    world.look_at(left);
    assert!(!applies(&world.plan()).contains(&left), "it would have the group again");
    world.finish_all(&plan, ActionOutcome::Done);
    assert!(world.plan().transitions.contains(&Transition::LeftoverGone { vpg, vra: left }));
    assert!(world.truth[&left].is_empty());
}

#[test]
fn one_that_cant_be_reached_holds_nobody_up_and_is_told_when_it_comes_back() {
    let (mut world, vpg, [source, stays, left]) = two_targets();
    for vra in [source, stays, left] {
        world.truth.get_mut(&vra).unwrap().insert(vpg, 1);
    }
    world.observed.get_mut(&left).unwrap().reachable = false;
    let leaving = last_member(&world);
    change(&mut world, false, Some(leaving.vm), None);
    for _ in 0..4 {
        round(&mut world);
    }
    assert_eq!(world.desired.vpgs[0].applied_revision, 2);
    // It gets a VM again before it has heard of anything: it still hears which journal is to go.
    let joining = Member { journal: JournalId::random(), ..leaving.clone() };
    change(&mut world, false, None, Some(joining));
    assert!(world.desired.leftovers.is_empty());
    let former = &world.desired.vpgs[0].settings.former;
    assert_eq!((former[0].journal, former[0].revision), (leaving.journal, 3));
    let group = world.desired.vpgs[0].id;
    world.observed.get_mut(&left).unwrap().reachable = true;
    let asked = round(&mut world);
    assert_eq!((checks(&asked).contains(&left), removes(&asked)), (true, vec![]));
    let plan = round(&mut world);
    let told = pick(&plan, |action| match &action.kind {
        ActionKind::ApplyVpg(definition) if action.vra == left => Some(definition.clone()),
        _ => None,
    });
    assert_eq!(told[0].former.len(), 1);
    assert!(removes(&plan).is_empty());
    // A group that is deleted doesn't take files that were to stay.
    change(&mut world, true, Some(leaving.vm), None);
    world.delete(false);
    world.truth.get_mut(&left).unwrap().insert(group, 3);
    world.look_at(left);
    let kept = pick(&world.plan(), |action| match action.kind {
        ActionKind::RemoveVpg { keep_files, .. } if action.vra == left => Some(keep_files),
        _ => None,
    });
    assert_eq!(kept, [true]);
}

#[test]
fn a_vra_is_not_told_to_let_go_and_to_take_part_at_once() {
    let (mut world, vpg, [_, _, left]) = two_targets();
    for vra in world.desired.vras.keys().copied().collect::<Vec<_>>() {
        world.truth.get_mut(&vra).unwrap().insert(vpg, 1);
    }
    let leaving = last_member(&world);
    change(&mut world, true, Some(leaving.vm), None);
    round(&mut world);
    world.now_us += 1;
    world.look_at(left);
    let plan = world.plan();
    assert_eq!(removes(&plan), [left]);
    // Meanwhile it is to have a part again.
    change(&mut world, true, None, Some(Member { journal: JournalId::random(), ..leaving }));
    for _ in 0..2 {
        // First it is asked.
        let plan = world.plan();
        assert!(!applies(&plan).contains(&left));
        world.finish_all(&plan, ActionOutcome::Done);
    }
    world.land(plan.actions.iter().find(|action| action.vra == left).unwrap());
    world.finish_all(&plan, ActionOutcome::Done);
    world.now_us += 1;
    world.look_at(left);
    assert!(applies(&world.plan()).contains(&left));
}

/// What a VRA has of the group, as VRAs do it.
#[derive(Default)]
struct Held {
    definition: Option<VpgDefinition>,
    files: BTreeMap<JournalId, VmId>,
    /// All that it ever had.
    made: BTreeSet<JournalId>,
}

impl Held {
    fn land(&mut self, vra: VraId, action: &Action) {
        match &action.kind {
            ActionKind::ApplyVpg(definition) => {
                let known = self.definition.as_ref().map_or(0, |known| known.revision);
                if definition.revision < known {
                    return;
                }
                for former in definition.former.iter().filter(|former| former.target == vra) {
                    if former.revision > known && !former.keep_files {
                        self.files.remove(&former.journal);
                    }
                }
                let here = definition.vms.iter().filter(|vm| vm.target.id == vra);
                self.files.extend(here.map(|vm| (vm.journal, vm.id)));
                self.made.extend(self.files.keys());
                self.definition = Some(definition.clone());
            }
            ActionKind::RemoveVpg { keep_files, .. } => {
                let Some(definition) = self.definition.take() else { return };
                for vm in definition.vms.iter().filter(|vm| vm.target.id == vra && !keep_files) {
                    self.files.remove(&vm.journal);
                }
            }
            _ => {}
        }
    }
}

/// Members come and go while VRAs are away, answers are lost and the manager restarts: in the end each VRA has the files that it is to have,
/// no more, and none that was to stay is gone.
#[test]
fn whatever_happens_the_right_files_are_left() {
    for seed in 1..300_u64 {
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut dice = |sides: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % sides
        };
        let (mut world, vpg, vras) = two_targets();
        let model = last_member(&world);
        let mut held: BTreeMap<VraId, Held> = vras.map(|vra| (vra, Held::default())).into();
        let definition = world.desired.vpgs[0].definition(|vra| world.desired.vras.get(&vra)).unwrap();
        for (vra, held) in &mut held {
            let kind = ActionKind::ApplyVpg(definition.clone());
            held.land(*vra, &Action { vra: *vra, kind });
        }
        let (mut kept, mut in_flight) = (BTreeSet::new(), Vec::<Action>::new());
        for step in 0..500 {
            world.now_us += 1_000;
            let calm = step > 400;
            if !calm && dice(12) == 0 {
                let members = &world.desired.vpgs[0].settings.vms;
                let keep_files = dice(2) == 0;
                let leaving = members[dice(members.len() as u64) as usize].clone();
                if members.len() > 1 {
                    if keep_files {
                        kept.insert((leaving.target, leaving.journal));
                    }
                    change(&mut world, keep_files, Some(leaving.vm), None);
                } else {
                    let target = vras[1 + dice(2) as usize];
                    let joining = Member { journal: JournalId::random(), target, ..model.clone() };
                    if leaving.vm != model.vm {
                        change(&mut world, false, None, Some(joining));
                    } else {
                        change(&mut world, false, None, Some(Member { vm: VmId::random(), ..joining }));
                    }
                }
            }
            if !calm && dice(15) == 0 {
                // Requests that are under way may still land.
                in_flight.retain(|action| {
                    if dice(2) == 0 {
                        held.get_mut(&action.vra).unwrap().land(action.vra, action);
                    }
                    false
                });
                world.core = Reconciler::new(RETRY_MIN_US, RETRY_MAX_US);
            }
            for vra in vras {
                let seen = world.observed.get_mut(&vra).unwrap();
                seen.reachable = calm || (seen.reachable != (dice(10) == 0));
                if seen.reachable {
                    let revision = held[&vra].definition.as_ref().map(|known| known.revision);
                    let vpgs = revision.map(|revision| vpg_status(vpg, revision)).into_iter().collect();
                    world.see(vra, world.now_us, |status| status.vpgs = vpgs);
                }
            }
            let plan = world.plan();
            note(&mut world, &plan);
            in_flight.extend(plan.actions);
            while !in_flight.is_empty() && (calm || dice(2) == 0) {
                let action = in_flight.swap_remove(dice(in_flight.len() as u64) as usize);
                let landed = calm || dice(3) > 0;
                if landed {
                    held.get_mut(&action.vra).unwrap().land(action.vra, &action);
                }
                let heard = landed && (calm || dice(3) > 0);
                let lost = ActionOutcome::Unreachable("lost".into());
                world.now_us += 1;
                world.finish(&action, if heard { ActionOutcome::Done } else { lost });
            }
        }
        let wanted = &world.desired.vpgs[0];
        assert!(world.desired.leftovers.is_empty(), "seed {seed}: {:?}", world.desired.leftovers);
        assert_eq!(wanted.applied_revision, wanted.revision, "seed {seed}");
        for (vra, held) in &held {
            let known = held.definition.as_ref().map(|known| known.revision);
            let is_member = wanted.vras().contains(vra);
            assert_eq!(known, is_member.then_some(wanted.revision), "seed {seed}");
            let members = wanted.settings.vms.iter().filter(|vm| vm.target == *vra).map(|vm| vm.journal);
            let stay = kept.iter().filter(|(at, _)| at == vra).map(|(_, journal)| *journal);
            let (members, stay): (BTreeSet<_>, BTreeSet<_>) = (members.collect(), stay.collect());
            let files: BTreeSet<JournalId> = held.files.keys().copied().collect();
            assert!(files.is_superset(&members), "seed {seed}");
            // A journal that its target never heard of has no files to stay.
            let stay: BTreeSet<_> = stay.intersection(&held.made).copied().collect();
            let left: BTreeSet<_> = files.difference(&members).copied().collect();
            assert_eq!(left, stay, "seed {seed}");
        }
    }
}
