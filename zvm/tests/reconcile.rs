//! The reconciler's core against a world of VRAs that does what it is told, late, twice or not at all.

#[path = "common/world.rs"]
mod world;

use uuid::Uuid;
use vra::api::*;
use world::*;
use zvm::model::test_run::TestState;
use zvm::reconcile::*;

#[test]
fn a_group_reaches_its_target_first_then_its_source_then_is_applied() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    let vpg = world.add_vpg(source, target);

    let first = world.plan();
    assert_eq!(applies(&first), [target], "a source must not stream to a target that doesn't know the group");
    assert_eq!(first.progress[0].percent, 0);
    world.finish_all(&first, ActionOutcome::Done);
    let second = world.plan();
    assert_eq!(applies(&second), [source]);
    assert_eq!(second.progress[0].percent, 50);
    world.finish_all(&second, ActionOutcome::Done);
    let third = world.plan();
    assert_eq!(third.transitions, [Transition::VpgApplied { vpg, revision: 1 }]);
    assert!(applies(&third).is_empty());
}

#[test]
fn every_source_of_a_group_gets_the_definition_with_the_others_in_the_order_of_coordination() {
    let mut world = World::new();
    let (one, other, target) = (world.add_vra("a"), world.add_vra("b"), world.add_vra("c"));
    world.add_vpg(one, target);
    world.add_member(other, target);
    let first = world.plan();
    assert_eq!(applies(&first), [target]);
    world.finish_all(&first, ActionOutcome::Done);
    let second = world.plan();
    let mut sources = [one, other];
    sources.sort_unstable();
    let mut told = applies(&second);
    told.sort_unstable();
    assert_eq!(told, sources);
    let orders = pick(&second, |action| match &action.kind {
        ActionKind::ApplyVpg(definition) => Some(definition.coordinators.clone()),
        _ => None,
    });
    assert_eq!(orders, [sources.to_vec(), sources.to_vec()]);
}

#[test]
fn an_encrypted_group_has_its_keys_at_the_target_alone_and_before_anything_else() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle_trust();
    world.desired.vpgs[0].settings.encrypt = true;
    let wish = |id: &str| SiteKeyWish {
        ids: vec![id.to_owned()],
        request: SetSiteKeys { keys: vec![SiteKeyLine(id.to_owned())] },
    };
    world.desired.site_keys = wish("first");
    let keys_to = |plan: &Plan| {
        pick(plan, |action| matches!(action.kind, ActionKind::SetSiteKeys(_)).then_some(action.vra))
    };
    let first = world.plan();
    assert_eq!(keys_to(&first), [target]);
    assert!(applies(&first).is_empty(), "without the keys it would be refused");
    world.finish_all(&first, ActionOutcome::Done);
    world.see(target, world.now_us, |status| status.site_keys = vec!["first".to_owned()]);
    let second = world.plan();
    assert_eq!((keys_to(&second), applies(&second)), (vec![], vec![target]));
    world.finish_all(&second, ActionOutcome::Done);
    world.settle();

    // A VRA that was restarted has none; other keys go out by themselves.
    world.see(target, world.now_us, |status| status.site_keys.clear());
    assert_eq!(keys_to(&world.plan()), [target]);
    let mut world = World { core: Reconciler::new(RETRY_MIN_US, RETRY_MAX_US), ..world };
    world.desired.site_keys = wish("second");
    world.see(target, world.now_us, |status| status.site_keys = vec!["first".to_owned()]);
    let turned = world.plan();
    assert_eq!(keys_to(&turned), [target]);

    // A group that is encrypted no more has segments that are, and a VRA that can't open them says so.
    let mut world = World { core: Reconciler::new(RETRY_MIN_US, RETRY_MAX_US), ..world };
    world.desired.vpgs[0].settings.encrypt = false;
    world.see(target, world.now_us, |status| status.site_keys.clear());
    assert!(keys_to(&world.plan()).is_empty());
    world.see(target, world.now_us, |status| status.awaits_site_key = true);
    assert_eq!(keys_to(&world.plan()), [target]);
}

#[test]
fn nothing_is_sent_twice_at_once_and_failures_wait_longer_each_time() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle_trust();

    let first = world.plan();
    assert_eq!(applies(&first), [target]);
    assert!(world.plan().actions.is_empty(), "one is in flight");
    let lost = ActionOutcome::Unreachable("lost".into());
    world.finish_all(&first, lost.clone());
    assert!(world.plan().actions.is_empty(), "it waits after a failure");
    let mut waits = Vec::new();
    for _ in 0..10 {
        let failed_us = world.now_us;
        let again = loop {
            world.now_us += 500;
            let plan = world.plan();
            if !plan.actions.is_empty() {
                break plan;
            }
        };
        waits.push(world.now_us - failed_us);
        world.finish_all(&again, lost.clone());
    }
    assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]), "{waits:?}");
    assert!(waits[0] <= 2 * RETRY_MIN_US && *waits.last().unwrap() >= RETRY_MAX_US - 500, "{waits:?}");
}

#[test]
fn a_vra_that_is_not_reachable_gets_nothing_and_is_named() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle_trust();
    world.observed.get_mut(&target).unwrap().reachable = false;
    let plan = world.plan();
    assert!(plan.actions.is_empty());
    assert!(plan.progress[0].step.contains("b (not reachable)"), "{}", plan.progress[0].step);
}

#[test]
fn a_refused_definition_is_told_once_for_each_try_and_tried_again() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    let vpg = world.add_vpg(source, target);
    world.settle_trust();
    let plan = world.plan();
    let error = ApiError::new(ErrorCode::Exhausted, "no space");
    let transitions = world.finish_all(&plan, ActionOutcome::Refused(error.clone()));
    assert_eq!(transitions, [Transition::VpgRefused { vpg, revision: 1, vra: target, error }]);
    assert_eq!(world.core.failures().len(), 1);
    world.now_us += RETRY_MAX_US;
    let plan = world.plan();
    assert!(plan.progress[0].step.contains("it answered: no space"));
    world.finish_all(&plan, ActionOutcome::Done);
    assert!(world.core.failures().is_empty());
}

#[test]
fn a_change_that_one_of_several_targets_refuses_is_sent_to_none() {
    let mut world = World::new();
    let (source, one, other) = (world.add_vra("a"), world.add_vra("b"), world.add_vra("c"));
    let vpg = world.add_vpg(source, one);
    world.add_member(source, other);
    world.settle();
    let sorted = |mut vras: Vec<VraId>| {
        vras.sort_unstable();
        vras
    };
    let both = sorted(vec![one, other]);

    world.desired.vpgs[0].revision = 2;
    let plan = world.plan();
    assert_eq!((sorted(checks(&plan)), applies(&plan)), (both.clone(), vec![]));
    let error = ApiError::new(ErrorCode::Exhausted, "no space");
    for action in &plan.actions {
        let outcome = match action.vra == other {
            true => ActionOutcome::Refused(error.clone()),
            false => ActionOutcome::Done,
        };
        let refused = Transition::VpgRefused { vpg, revision: 2, vra: other, error: error.clone() };
        let expected = if action.vra == other { vec![refused] } else { vec![] };
        assert_eq!(world.finish(action, outcome), expected);
    }
    let plan = world.plan();
    assert!(plan.actions.is_empty(), "{plan:?}");
    assert!(plan.progress[0].step.contains("c (it answered: no space)"), "{}", plan.progress[0].step);
    world.now_us += RETRY_MAX_US;
    let plan = world.plan();
    assert_eq!((checks(&plan), applies(&plan)), (vec![other], vec![]));
    world.finish_all(&plan, ActionOutcome::Done);
    assert!(world.core.failures().is_empty());
    let plan = world.plan();
    assert_eq!((checks(&plan), sorted(applies(&plan))), (vec![], both.clone()));
    world.finish_all(&plan, ActionOutcome::Done);
    world.settle();

    // One that can't be reached is told when it can be, and an older one takes no such question.
    world.desired.vpgs[0].revision = 3;
    world.observed.get_mut(&other).unwrap().reachable = false;
    assert_eq!(applies(&world.plan()), [one]);
    let mut world = World { core: Reconciler::new(RETRY_MIN_US, RETRY_MAX_US), ..world };
    world.observed.get_mut(&other).unwrap().reachable = true;
    world.settle_trust();
    let plan = world.plan();
    assert_eq!(sorted(checks(&plan)), both);
    let unknown = ApiError::new(ErrorCode::UnknownRequest, "no such operation");
    assert_eq!(world.finish_all(&plan, ActionOutcome::Refused(unknown)), []);
    assert_eq!(sorted(applies(&world.plan())), both);
}

#[test]
fn a_vra_that_lost_its_state_gets_the_definition_again_but_an_old_answer_does_not_count() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle();
    assert!(world.plan().actions.is_empty());
    // Asked before it took the definition, answered after: says nothing.
    let asked_us = world.observed[&target].last.as_ref().unwrap().asked_us;
    world.see(target, asked_us, |status| status.vpgs.clear());
    assert!(world.plan().actions.is_empty());
    world.see(target, world.now_us + 1, |status| status.vpgs.clear());
    assert_eq!(applies(&world.plan()), [target]);
}

#[test]
fn a_new_revision_goes_out_everywhere() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    let vpg = world.add_vpg(source, target);
    world.settle();
    world.desired.vpgs[0].revision = 2;
    assert_eq!(world.settle(), [Transition::VpgApplied { vpg, revision: 2 }]);
}

#[test]
fn what_vras_have_newer_than_a_restored_database_is_left_alone_until_it_is_adopted() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    let vpg = world.add_vpg(source, target);
    world.settle();
    world.core = Reconciler::new(RETRY_MIN_US, RETRY_MAX_US);
    world.settle_trust();
    world.desired.vpgs[0].revision = 4;
    for at_source in [5, 3] {
        for (vra, revision) in [(target, 5), (source, at_source)] {
            world.see(vra, world.now_us, |status| status.vpgs = vec![vpg_status(vpg, revision)]);
        }
        let plan = world.plan();
        assert!(plan.actions.is_empty() && plan.transitions.is_empty(), "{plan:?}");
    }
    world.desired.vpgs[0].revision = 5;
    assert_eq!(applies(&world.plan()), [source]);
}

#[test]
fn a_group_is_removed_at_the_source_first_and_gone_when_all_have_let_go() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    let vpg = world.add_vpg(source, target);
    world.settle();
    world.delete(false);
    let first = world.plan();
    assert_eq!(removes(&first), [source]);
    // One that doesn't know the group has let go of it.
    let unknown = ActionOutcome::Refused(ApiError::new(ErrorCode::NotFound, "no such group"));
    world.finish_all(&first, unknown);
    let second = world.plan();
    assert_eq!(removes(&second), [target]);
    world.finish_all(&second, ActionOutcome::Done);
    assert_eq!(world.plan().transitions, [Transition::VpgRemoved { vpg, leftovers: vec![] }]);
    assert_eq!(world.core.ended().get(&vpg), Some(&world.now_us));
}

#[test]
fn force_does_not_wait_for_the_dead() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    let vpg = world.add_vpg(source, target);
    world.settle();
    world.observed.get_mut(&source).unwrap().reachable = false;
    world.delete(false);
    let plan = world.plan();
    assert_eq!(removes(&plan), [target], "the reachable one need not wait");
    world.finish_all(&plan, ActionOutcome::Done);
    assert!(world.plan().transitions.is_empty());
    world.delete(true);
    let left = Leftover { vpg, vra: source, keep_files: false };
    assert_eq!(world.plan().transitions, [Transition::VpgRemoved { vpg, leftovers: vec![left] }]);
    // The dead one comes back and is told.
    world.desired.vpgs.clear();
    world.desired.leftovers.push(left);
    assert!(world.plan().actions.is_empty());
    world.observed.get_mut(&source).unwrap().reachable = true;
    let plan = world.plan();
    assert_eq!(removes(&plan), [source]);
    world.finish_all(&plan, ActionOutcome::Done);
    assert_eq!(world.plan().transitions, [Transition::LeftoverGone { vpg, vra: source }]);
}

#[test]
fn a_removal_waits_for_a_definition_that_is_under_way() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle_trust();
    let applying = world.plan();
    world.delete(false);
    assert!(world.plan().actions.is_empty(), "the definition would land after the removal");
    world.finish_all(&applying, ActionOutcome::Done);
    assert_eq!(removes(&world.plan()), [source]);
}

#[test]
fn a_test_opens_everywhere_or_nowhere() {
    let mut world = World::new();
    let (source, b, c) = (world.add_vra("a"), world.add_vra("b"), world.add_vra("c"));
    world.add_vpg(source, b);
    world.add_member(source, c);
    world.settle();
    let test = world.add_test(&[b, c]);
    let plan = world.plan();
    assert_eq!(opens(&plan).len(), 2);
    // b opens, c refuses.
    world.finish(&plan.actions[0], ActionOutcome::Done);
    let error = ApiError::new(ErrorCode::NotFound, "no such checkpoint");
    let transitions = world.finish(&plan.actions[1], ActionOutcome::Refused(error.clone()));
    let failed_at = plan.actions[1].vra;
    assert_eq!(transitions, [Transition::TestFailed { test, vra: failed_at, error }]);
    world.desired.tests[0].state = TestState::Stopping;
    let plan = world.plan();
    assert_eq!(closes(&plan).len(), 2, "also where it may not be open");
    world.finish(&plan.actions[0], ActionOutcome::Done);
    let gone = ActionOutcome::Refused(ApiError::new(ErrorCode::NotFound, "no view"));
    world.finish(&plan.actions[1], gone);
    assert_eq!(world.plan().transitions, [Transition::TestStopped { test }]);
}

#[test]
fn all_views_open_is_a_running_test() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle();
    let test = world.add_test(&[target]);
    let plan = world.plan();
    world.finish_all(&plan, ActionOutcome::Done);
    assert_eq!(world.plan().transitions, [Transition::TestRunning { test }]);
    // A restarted manager asks again: opening is idempotent by the view's id.
    world.core = Reconciler::new(RETRY_MIN_US, RETRY_MAX_US);
    assert_eq!(opens(&world.plan()).len(), 1);
}

#[test]
fn a_view_is_not_closed_while_its_opening_is_under_way() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle();
    world.add_test(&[target]);
    let opening = world.plan();
    world.desired.tests[0].state = TestState::Stopping;
    let plan = world.plan();
    assert!(plan.actions.is_empty() && plan.transitions.is_empty());
    world.finish_all(&opening, ActionOutcome::Done);
    assert_eq!(closes(&world.plan()).len(), 1);
}

#[test]
fn a_test_that_cannot_open_in_time_fails() {
    let mut world = World::new();
    let (source, target) = (world.add_vra("a"), world.add_vra("b"));
    world.add_vpg(source, target);
    world.settle();
    world.add_test(&[target]);
    world.observed.get_mut(&target).unwrap().reachable = false;
    assert!(world.plan().transitions.is_empty());
    world.now_us += TEST_START_LIMIT_US + 1;
    assert!(matches!(world.plan().transitions[..], [Transition::TestFailed { vra, .. }] if vra == target));
}

#[test]
fn a_view_of_a_forgotten_test_is_closed_and_others_are_left_alone() {
    let mut world = World::new();
    let target = world.add_vra("b");
    world.settle_trust();
    let (ours, theirs) = (ViewId::random(), ViewId::random());
    world.see(target, world.now_us, |status| {
        status.views.push(view(ours, Some(format!("zvm test {}", Uuid::new_v4()))));
        status.views.push(view(theirs, Some("someone's own".into())));
    });
    assert_eq!(closes(&world.plan()), [ours]);
}

#[test]
fn revoked_certificates_are_told_to_every_run_of_every_vra_once() {
    let mut world = World::new();
    let (a, b) = (world.add_vra("a"), world.add_vra("b"));
    assert_eq!(trusts(&world.plan()).len(), 2);
    world.core = Reconciler::new(RETRY_MIN_US, RETRY_MAX_US);
    world.settle_trust();
    assert!(world.plan().actions.is_empty());
    world.desired.trust.version += 1;
    let plan = world.plan();
    assert_eq!(trusts(&plan).len(), 2);
    world.finish_all(&plan, ActionOutcome::Done);
    world.see(b, world.now_us, |status| status.started_us.0 += 1);
    assert_eq!(trusts(&world.plan()), [b], "a restarted VRA may have forgotten");
    world.desired.vras.remove(&a);
    world.desired.trust.version += 1;
    assert_eq!(trusts(&world.plan()), [b; 0], "one is in flight, a revoked one gets none");
}

/// Any order of outcomes, losses and restarts ends with every VRA as desired.
#[test]
fn whatever_happens_the_world_arrives() {
    for seed in 0..300_u64 {
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut dice = |sides: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % sides
        };
        let mut world = World::new();
        let vras: Vec<VraId> = ["a", "b", "c"].map(|name| world.add_vra(name)).to_vec();
        let vpg = world.add_vpg(vras[0], vras[1]);
        world.add_member(vras[0], vras[2]);
        let mut in_flight: Vec<Action> = Vec::new();
        let mut applied = false;
        for step in 0..400 {
            world.now_us += 1_000;
            let calm = step > 300;
            if dice(10) == 0 && !calm {
                // The manager restarts: what is in flight may land or not, nobody hears of it.
                for action in in_flight.drain(..) {
                    if dice(2) == 0 {
                        world.land(&action);
                    }
                }
                world.core = Reconciler::new(RETRY_MIN_US, RETRY_MAX_US);
            }
            if dice(8) == 0 && !calm {
                let vra = vras[dice(3) as usize];
                let seen = world.observed.get_mut(&vra).unwrap();
                seen.reachable = !seen.reachable;
            }
            if calm {
                world.observed.values_mut().for_each(|seen| seen.reachable = true);
            }
            for vra in &vras {
                if world.observed[vra].reachable {
                    world.look_at(*vra);
                }
            }
            let plan = world.plan();
            applied |= plan.transitions.contains(&Transition::VpgApplied { vpg, revision: 1 });
            in_flight.extend(plan.actions);
            while !in_flight.is_empty() && (calm || dice(2) == 0) {
                let action = in_flight.swap_remove(dice(in_flight.len() as u64) as usize);
                let landed = calm || dice(3) > 0;
                if landed {
                    world.land(&action);
                }
                let heard = landed && (calm || dice(3) > 0);
                let lost = ActionOutcome::Unreachable("lost".into());
                world.finish(&action, if heard { ActionOutcome::Done } else { lost });
            }
        }
        assert!(applied, "seed {seed}");
        for vra in &vras {
            assert_eq!(world.truth[vra].get(&vpg), Some(&1), "seed {seed}");
        }
    }
}
