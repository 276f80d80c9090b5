//! The reconciler's core: what is wanted and what was seen go in, what to do comes out. No clock, no I/O.
//!
//! Every action can be repeated without harm, so the core may plan one again that was done already; it never has two
//! of the same in flight, and waits longer after each failure. What it remembers is only what saves work: a restarted
//! manager begins with an empty memory and arrives at the same place.

mod checking;
mod leaving;
mod plan;
mod site_keys;
mod world;

use std::collections::{BTreeMap, HashMap, HashSet};

use vra::api::view::ViewSubject;
use vra::api::{ApiError, ErrorCode, OpenView, PointInTime, ViewId, ViewMode, VpgId, VraId};

use crate::model::task::TaskKind;
use crate::model::test_run::{TestRun, TestState};
use crate::model::vpg::{Vpg, VpgState};

use site_keys::{has_site_keys, plan_site_keys};

pub use leaving::Leaving;
pub use plan::{Action, ActionKind, ActionOutcome, Failure, Plan, Progress, Subject, Transition};
pub use world::{Desired, LastStatus, Leftover, Observed, Seen, SiteKeyWish, newer_at};

/// How long a test may take to open before it is rolled back, microseconds.
pub const TEST_START_LIMIT_US: u64 = 120_000_000;

/// How long the end of a group is remembered, microseconds: by then every VRA that answers has been asked again.
const REMEMBER_ENDED_US: u64 = 600_000_000;

/// Views that tests open carry this before the test's id, so that a forgotten one is known for ours.
const TEST_LABEL: &str = "zvm test ";

/// The core and its memory.
#[derive(Debug)]
pub struct Reconciler {
    retry_min_us: u64,
    retry_max_us: u64,
    in_flight: HashSet<(VraId, Subject)>,
    failures: BTreeMap<(VraId, Subject), Failure>,
    /// Version of the trust list that each VRA's run has taken.
    trusted: HashMap<VraId, (u64, u64)>,
    /// Revision that a VRA would take, as it said.
    checked: HashMap<(VraId, VpgId), u64>,
    /// Revision that a VRA took, and when it said so.
    applied: HashMap<(VraId, VpgId), (u64, u64)>,
    removed: HashSet<(VraId, VpgId)>,
    /// When the last groups ended.
    ended: BTreeMap<VpgId, u64>,
    opened: HashSet<ViewId>,
    closed: HashSet<ViewId>,
}

impl Reconciler {
    /// A core without memory. It waits `retry_min_us` after a first failure, up to `retry_max_us` after many.
    pub fn new(retry_min_us: u64, retry_max_us: u64) -> Self {
        Self {
            retry_min_us: retry_min_us.max(1),
            retry_max_us,
            in_flight: HashSet::new(),
            failures: BTreeMap::new(),
            trusted: HashMap::new(),
            checked: HashMap::new(),
            applied: HashMap::new(),
            removed: HashSet::new(),
            ended: BTreeMap::new(),
            opened: HashSet::new(),
            closed: HashSet::new(),
        }
    }

    /// What to do now. The actions count as in flight until [`Reconciler::finished`] is told of them.
    pub fn plan(&mut self, desired: &Desired, observed: &Observed, now_us: u64) -> Plan {
        let mut plan = Plan::default();
        self.forget(desired);
        self.ended.retain(|_, ended_us| now_us.saturating_sub(*ended_us) < REMEMBER_ENDED_US);
        self.plan_trust(desired, observed, &mut plan);
        plan_site_keys(desired, observed, &mut plan);
        for vpg in &desired.vpgs {
            match vpg.state {
                VpgState::Active => self.plan_apply(vpg, desired, observed, &mut plan),
                VpgState::Deleting => self.plan_removal(vpg, desired, observed, &mut plan),
            }
        }
        for test in &desired.tests {
            self.plan_test(test, desired, observed, now_us, &mut plan);
        }
        self.plan_leftovers(desired, observed, &mut plan);
        for transition in &plan.transitions {
            if let Transition::VpgRemoved { vpg, .. } = transition {
                self.ended.insert(*vpg, now_us);
            }
        }
        self.plan_stray_views(desired, observed, &mut plan);
        plan.actions.retain(|action| {
            let key = (action.vra, action.kind.subject());
            let reachable = observed.get(&action.vra).is_some_and(|seen| seen.reachable);
            let waits = self.failures.get(&key).is_some_and(|failure| failure.next_us > now_us);
            reachable && !waits && self.in_flight.insert(key)
        });
        plan
    }

    /// Notes how an action ended and says what follows at once.
    pub fn finished(&mut self, action: &Action, outcome: ActionOutcome, now_us: u64) -> Vec<Transition> {
        let key = (action.vra, action.kind.subject());
        self.in_flight.remove(&key);
        let gone = matches!(&outcome, ActionOutcome::Refused(error) if error.code == ErrorCode::NotFound);
        let ends = matches!(action.kind, ActionKind::RemoveVpg { .. } | ActionKind::CloseView { .. });
        // An older VRA can't be asked.
        let is_unknown =
            matches!(&outcome, ActionOutcome::Refused(error) if error.code == ErrorCode::UnknownRequest);
        let is_check = matches!(action.kind, ActionKind::CheckVpg(_));
        if outcome == ActionOutcome::Done || gone && ends || is_unknown && is_check {
            self.failures.remove(&key);
            self.note_done(action, now_us);
            return Vec::new();
        }
        let count = self.failures.get(&key).map_or(0, |failure| failure.count) + 1;
        let wait_us = self.retry_min_us.saturating_mul(1 << (count - 1).min(20)).min(self.retry_max_us);
        let transitions = match (&action.kind, &outcome) {
            (
                ActionKind::CheckVpg(definition) | ActionKind::ApplyVpg(definition),
                ActionOutcome::Refused(error),
            ) => {
                let (vpg, revision) = (definition.id, definition.revision);
                vec![Transition::VpgRefused { vpg, revision, vra: action.vra, error: error.clone() }]
            }
            (ActionKind::OpenView { test, .. }, ActionOutcome::Refused(error)) => {
                vec![Transition::TestFailed { test: *test, vra: action.vra, error: error.clone() }]
            }
            _ => Vec::new(),
        };
        self.failures.insert(key, Failure { count, outcome, next_us: now_us.saturating_add(wait_us) });
        transitions
    }

    /// Groups that ended lately, and when, microseconds.
    pub fn ended(&self) -> &BTreeMap<VpgId, u64> {
        &self.ended
    }

    /// Actions that failed the last time, by VRA.
    pub fn failures(&self) -> &BTreeMap<(VraId, Subject), Failure> {
        &self.failures
    }

    fn note_done(&mut self, action: &Action, now_us: u64) {
        match &action.kind {
            ActionKind::SetTrust { trust, run_us } => {
                self.trusted.insert(action.vra, (trust.version, *run_us));
            }
            // The VRA's next status tells.
            ActionKind::SetSiteKeys(_) => {}
            ActionKind::CheckVpg(definition) => {
                self.checked.insert((action.vra, definition.id), definition.revision);
            }
            ActionKind::ApplyVpg(definition) => {
                self.failures.remove(&(action.vra, Subject::Check(definition.id)));
                self.applied.insert((action.vra, definition.id), (definition.revision, now_us));
            }
            ActionKind::RemoveVpg { vpg, .. } => {
                self.applied.remove(&(action.vra, *vpg));
                self.removed.insert((action.vra, *vpg));
            }
            ActionKind::OpenView { open, .. } => self.opened.extend(open.view),
            ActionKind::CloseView { view } => {
                self.closed.insert(*view);
            }
        }
    }

    /// Drops what is about things that are no more.
    fn forget(&mut self, desired: &Desired) {
        let vpgs: HashSet<VpgId> = desired.vpgs.iter().map(|vpg| vpg.id).collect();
        let views: HashSet<ViewId> =
            desired.tests.iter().flat_map(|test| &test.details.views).map(|view| view.view).collect();
        let known = |vra: &VraId| desired.vras.contains_key(vra);
        let is_left = |vra: &VraId, vpg: &VpgId| {
            desired.leftovers.iter().any(|left| left.vra == *vra && left.vpg == *vpg)
        };
        self.applied.retain(|(vra, vpg), _| known(vra) && vpgs.contains(vpg));
        self.checked.retain(|(vra, vpg), _| known(vra) && vpgs.contains(vpg));
        // A VRA that has let go may get a part in the group again.
        let is_ending = |vpg: &VpgId| {
            desired.vpgs.iter().any(|wanted| wanted.id == *vpg && wanted.state == VpgState::Deleting)
        };
        self.removed.retain(|(vra, vpg)| known(vra) && (is_ending(vpg) || is_left(vra, vpg)));
        self.trusted.retain(|vra, _| known(vra));
        self.opened.retain(|view| views.contains(view));
        self.closed.retain(|view| views.contains(view));
        self.failures.retain(|(vra, subject), _| {
            known(vra)
                && match subject {
                    Subject::Trust | Subject::SiteKeys => true,
                    Subject::Check(vpg) | Subject::Apply(vpg) => {
                        desired.vpgs.iter().any(|v| v.id == *vpg && v.state == VpgState::Active)
                    }
                    Subject::Remove(vpg) => vpgs.contains(vpg) || is_left(vra, vpg),
                    Subject::Open(view) => desired.tests.iter().any(|test| {
                        test.state == TestState::Starting
                            && test.details.views.iter().any(|v| v.view == *view)
                    }),
                    Subject::Close(view) => views.contains(view),
                }
        });
    }

    fn plan_trust(&self, desired: &Desired, observed: &Observed, plan: &mut Plan) {
        for vra in desired.vras.keys() {
            let Some(last) = observed.get(vra).and_then(|seen| seen.last.as_ref()) else { continue };
            let run_us = last.status.started_us.0;
            if self.trusted.get(vra) != Some(&(desired.trust.version, run_us)) {
                let trust = desired.trust.clone();
                plan.actions.push(Action { vra: *vra, kind: ActionKind::SetTrust { trust, run_us } });
            }
        }
    }

    fn plan_apply(&self, vpg: &Vpg, desired: &Desired, observed: &Observed, plan: &mut Plan) {
        let Some(definition) = vpg.definition(|vra| desired.vras.get(&vra)) else { return };
        // A restored older database: what it has must neither go out nor count as being in force.
        if !newer_at(vpg, observed).is_empty() {
            return;
        }
        let missing: Vec<VraId> = vpg
            .vras()
            .into_iter()
            .filter(|vra| self.revision_at(*vra, vpg.id, observed) < vpg.revision)
            .collect();
        let targets = vpg.targets();
        let a_target_is_missing = missing.iter().any(|vra| targets.contains(vra));
        let unchecked = self.unchecked(vpg, &missing, &targets, observed);
        for vra in &unchecked {
            plan.actions.push(Action { vra: *vra, kind: ActionKind::CheckVpg(definition.clone()) });
        }
        for vra in missing.iter().filter(|_| unchecked.is_empty()) {
            // The keys go first.
            if vpg.settings.encrypt && targets.contains(vra) && !has_site_keys(vra, observed) {
                continue;
            }
            // It was told to let go before it got a part in the group again.
            if self.in_flight.contains(&(*vra, Subject::Remove(vpg.id))) {
                continue;
            }
            // A source that streams to a target that doesn't know the group would be refused: targets go first.
            if targets.contains(vra) || !a_target_is_missing {
                plan.actions.push(Action { vra: *vra, kind: ActionKind::ApplyVpg(definition.clone()) });
            }
        }
        if vpg.applied_revision >= vpg.revision {
            return;
        }
        if missing.is_empty() {
            plan.transitions.push(Transition::VpgApplied { vpg: vpg.id, revision: vpg.revision });
        } else {
            let all = vpg.vras().len();
            let subject = if unchecked.is_empty() { Subject::Apply(vpg.id) } else { Subject::Check(vpg.id) };
            let step = self.waits_for(&missing, "to take the definition", subject, desired, observed);
            let percent = percent(all - missing.len(), all);
            for kind in TaskKind::OF_DEFINITIONS {
                // Before the first definition is everywhere there is nothing to change.
                if (kind == TaskKind::CreateProtectionGroup) == (vpg.applied_revision == 0) {
                    plan.progress.push(Progress { vpg: vpg.id, kind, percent, step: step.clone() });
                }
            }
        }
    }

    fn plan_removal(&self, vpg: &Vpg, desired: &Desired, observed: &Observed, plan: &mut Plan) {
        let Some(removal) = vpg.removal else { return };
        let reachable = |vra: &VraId| observed.get(vra).is_some_and(|seen| seen.reachable);
        let members: Vec<VraId> =
            vpg.vras().into_iter().filter(|vra| desired.vras.contains_key(vra)).collect();
        let missing: Vec<VraId> = members
            .iter()
            .copied()
            .filter(|vra| !self.removed.contains(&(*vra, vpg.id)) && (!removal.force || reachable(vra)))
            .collect();
        let applying = members.iter().any(|vra| self.in_flight.contains(&(*vra, Subject::Apply(vpg.id))));
        if applying {
            return;
        }
        // One that hasn't heard that a VM left, whose files stay, would remove them with those of the others.
        let keeps = |vra: VraId| {
            let kept = vpg.settings.former.iter().filter(|former| former.target == vra && former.keep_files);
            let newest = kept.map(|former| former.revision).max().unwrap_or_default();
            removal.keep_disks || self.revision_at(vra, vpg.id, observed) < newest
        };
        if missing.is_empty() {
            let leftovers = members
                .iter()
                .filter(|vra| !self.removed.contains(&(**vra, vpg.id)))
                .map(|vra| Leftover { vpg: vpg.id, vra: *vra, keep_files: keeps(*vra) })
                .collect();
            plan.transitions.push(Transition::VpgRemoved { vpg: vpg.id, leftovers });
            return;
        }
        // Sources stop sending before targets stop taking.
        let sources = vpg.sources();
        let a_source_is_missing = missing.iter().any(|vra| sources.contains(vra) && reachable(vra));
        for vra in &missing {
            if sources.contains(vra) || !a_source_is_missing {
                let kind = ActionKind::RemoveVpg { vpg: vpg.id, keep_files: keeps(*vra) };
                plan.actions.push(Action { vra: *vra, kind });
            }
        }
        plan.progress.push(Progress {
            vpg: vpg.id,
            kind: TaskKind::RemoveProtectionGroup,
            percent: percent(members.len() - missing.len(), members.len()),
            step: self.waits_for(
                &missing,
                "to let go of the group",
                Subject::Remove(vpg.id),
                desired,
                observed,
            ),
        });
    }

    fn plan_test(
        &self,
        test: &TestRun,
        desired: &Desired,
        observed: &Observed,
        now_us: u64,
        plan: &mut Plan,
    ) {
        let views = || test.details.views.iter().filter(|view| desired.vras.contains_key(&view.vra));
        match test.state {
            TestState::Starting => {
                let missing: Vec<_> = views().filter(|view| !self.opened.contains(&view.view)).collect();
                if missing.is_empty() && views().count() == test.details.views.len() {
                    plan.transitions.push(Transition::TestRunning { test: test.id });
                    return;
                }
                let waiting_since_us = now_us.saturating_sub(test.started_us.0);
                let late = missing.first().filter(|_| waiting_since_us > TEST_START_LIMIT_US);
                let revoked = test.details.views.iter().find(|view| !desired.vras.contains_key(&view.vra));
                if let Some(view) = late.copied().or(revoked) {
                    let error = ApiError::new(ErrorCode::NotReady, "the VRA did not open the disks in time")
                        .remedy("see `zvm vra list` for what keeps the VRA, then start the test again");
                    plan.transitions.push(Transition::TestFailed { test: test.id, vra: view.vra, error });
                    return;
                }
                for view in &missing {
                    let open = OpenView {
                        subject: ViewSubject::Vpg { vpg: test.vpg },
                        at: PointInTime::Checkpoint { checkpoint: test.details.checkpoint },
                        mode: ViewMode::Scratch,
                        door: test.details.door.clone(),
                        view: Some(view.view),
                        label: Some(format!("{TEST_LABEL}{}", test.id)),
                    };
                    plan.actions
                        .push(Action { vra: view.vra, kind: ActionKind::OpenView { test: test.id, open } });
                }
                let waiting: Vec<VraId> = missing.iter().map(|view| view.vra).collect();
                let all = test.details.views.len();
                plan.progress.push(Progress {
                    vpg: test.vpg,
                    kind: TaskKind::FailOverTest,
                    percent: percent(all - missing.len(), all),
                    step: self.waits_for(&waiting, "to open the disks", Subject::Trust, desired, observed),
                });
            }
            TestState::Running => {}
            TestState::Stopping => {
                let missing: Vec<_> = views().filter(|view| !self.closed.contains(&view.view)).collect();
                if missing.is_empty() {
                    plan.transitions.push(Transition::TestStopped { test: test.id });
                    return;
                }
                for view in &missing {
                    // An opening that is under way must land first, or it would land after the closing.
                    if !self.in_flight.contains(&(view.vra, Subject::Open(view.view))) {
                        plan.actions
                            .push(Action { vra: view.vra, kind: ActionKind::CloseView { view: view.view } });
                    }
                }
                let waiting: Vec<VraId> = missing.iter().map(|view| view.vra).collect();
                let all = test.details.views.len();
                plan.progress.push(Progress {
                    vpg: test.vpg,
                    kind: TaskKind::StopFailOverTest,
                    percent: percent(all - missing.len(), all),
                    step: self.waits_for(&waiting, "to close the disks", Subject::Trust, desired, observed),
                });
            }
        }
    }

    fn plan_leftovers(&self, desired: &Desired, observed: &Observed, plan: &mut Plan) {
        for left in &desired.leftovers {
            let Leftover { vpg, vra, keep_files } = *left;
            // A status may tell of what is under way before its answer does.
            let is_under_way = [Subject::Apply(vpg), Subject::Remove(vpg)]
                .iter()
                .any(|subject| self.in_flight.contains(&(vra, *subject)));
            if self.removed.contains(&(vra, vpg)) {
                plan.transitions.push(Transition::LeftoverGone { vpg, vra });
            } else if !is_under_way {
                let last_words = self.last_words(left, desired, observed);
                let kind = last_words.unwrap_or(ActionKind::RemoveVpg { vpg, keep_files });
                plan.actions.push(Action { vra, kind });
            }
        }
    }

    /// What a VRA is told that has no VM left in a group which goes on: first which files it is to remove, VM by VM; then to let go of
    /// the group, with what files there still are.
    fn last_words(&self, left: &Leftover, desired: &Desired, observed: &Observed) -> Option<ActionKind> {
        let is_meant = |vpg: &&Vpg| vpg.id == left.vpg && vpg.state == VpgState::Active;
        let vpg = desired.vpgs.iter().find(is_meant)?;
        let knows = |revision| self.revision_at(left.vra, left.vpg, observed) >= revision;
        if vpg.former_revision_at(left.vra).is_none_or(knows) {
            return Some(ActionKind::RemoveVpg { vpg: left.vpg, keep_files: true });
        }
        vpg.definition(|vra| desired.vras.get(&vra)).map(ActionKind::ApplyVpg)
    }

    /// An opening whose answer was lost can leave a view behind that no test knows.
    fn plan_stray_views(&self, desired: &Desired, observed: &Observed, plan: &mut Plan) {
        let known: HashSet<ViewId> =
            desired.tests.iter().flat_map(|test| &test.details.views).map(|view| view.view).collect();
        for (vra, seen) in observed {
            let Some(last) = seen.last.as_ref().filter(|_| desired.vras.contains_key(vra)) else { continue };
            for view in &last.status.views {
                let is_ours = view.label.as_ref().is_some_and(|label| label.starts_with(TEST_LABEL));
                if is_ours && !known.contains(&view.view) {
                    plan.actions.push(Action { vra: *vra, kind: ActionKind::CloseView { view: view.view } });
                }
            }
        }
    }

    /// The revision that a VRA has, by its last word on it; 0 without one.
    fn revision_at(&self, vra: VraId, vpg: VpgId, observed: &Observed) -> u64 {
        let last = observed.get(&vra).and_then(|seen| seen.last.as_ref());
        let seen_revision = last
            .and_then(|last| last.status.vpgs.iter().find(|status| status.vpg == vpg))
            .map_or(0, |status| status.revision);
        match self.applied.get(&(vra, vpg)) {
            Some((revision, at_us)) if last.is_none_or(|last| last.asked_us <= *at_us) => *revision,
            _ => seen_revision,
        }
    }

    fn waits_for(
        &self,
        vras: &[VraId],
        what: &str,
        subject: Subject,
        desired: &Desired,
        observed: &Observed,
    ) -> String {
        let reasons: Vec<String> = vras
            .iter()
            .map(|vra| {
                let name = desired.vras.get(vra).map_or_else(|| vra.to_string(), |vra| vra.name.clone());
                let seen = observed.get(vra);
                match (seen.is_some_and(|seen| seen.reachable), self.failures.get(&(*vra, subject))) {
                    (false, _) => format!("{name} (not reachable)"),
                    (true, Some(Failure { outcome: ActionOutcome::Refused(error), .. })) => {
                        format!("{name} (it answered: {error})")
                    }
                    (true, _) => name,
                }
            })
            .collect();
        format!("waiting for {} {what}", reasons.join(", "))
    }
}

fn percent(done: usize, all: usize) -> u8 {
    u8::try_from((done * 100).checked_div(all).unwrap_or(100)).unwrap_or(100)
}
