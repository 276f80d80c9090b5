//! A world of VRAs for the cores' tests: what is wanted, what is seen, what is so.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;

use uuid::Uuid;
use vra::api::status::{HostInfo, VpgStatus};
use vra::api::view::ViewInfo;
use vra::api::vpg::{Priority, VolumeDefinition};
use vra::api::*;
use zvm::model::recovery::{GroupRecovery, VmRecovery};
use zvm::model::test_run::{TestDetails, TestRun, TestState, TestView};
use zvm::model::vpg::{JournalBounds, Member, Removal, Vpg, VpgSettings, VpgState};
use zvm::model::vra::{Vra, VraState};
use zvm::reconcile::*;

pub(crate) const RETRY_MIN_US: u64 = 1_000;
pub(crate) const RETRY_MAX_US: u64 = 64_000;

pub(crate) struct World {
    pub(crate) core: Reconciler,
    pub(crate) desired: Desired,
    pub(crate) observed: Observed,
    /// What each VRA really has.
    pub(crate) truth: BTreeMap<VraId, BTreeMap<VpgId, u64>>,
    pub(crate) now_us: u64,
}

impl World {
    pub(crate) fn new() -> Self {
        let desired = Desired { trust: SetTrust { version: 1, ..SetTrust::default() }, ..Desired::default() };
        let core = Reconciler::new(RETRY_MIN_US, RETRY_MAX_US);
        Self { core, desired, observed: Observed::new(), truth: BTreeMap::new(), now_us: 1_000_000 }
    }

    pub(crate) fn add_vra(&mut self, name: &str) -> VraId {
        let id = VraId::random();
        let vra = Vra {
            id,
            name: name.into(),
            address: format!("{name}:9710"),
            version: "1".into(),
            state: VraState::Enrolled,
            enrolled_us: TimeUs(1),
            revoked_us: None,
            certificate_serial: "1".into(),
            certificate_ends_us: TimeUs(u64::MAX),
        };
        self.desired.vras.insert(id, vra);
        let last = LastStatus { asked_us: self.now_us, status: status(id, name) };
        self.observed.insert(id, Seen { reachable: true, error: None, since_us: 0, last: Some(last) });
        self.truth.insert(id, BTreeMap::new());
        id
    }

    pub(crate) fn add_vpg(&mut self, source: VraId, target: VraId) -> VpgId {
        let id = VpgId::random();
        self.desired.vpgs.push(Vpg {
            id,
            name: "shop".into(),
            state: VpgState::Active,
            revision: 1,
            applied_revision: 0,
            created_us: TimeUs(self.now_us),
            last_test_us: None,
            stamp: None,
            settings: VpgSettings {
                description: String::new(),
                priority: Priority::Medium,
                member_set_version: 1,
                checkpoint_interval_ms: 1_000,
                hold_deadline_ms: 100,
                history_s: 3_600,
                rpo_target_s: 10,
                give_up_history: true,
                encrypt: false,
                paused: false,
                test_reminder_days: None,
                new_disks: Default::default(),
                recovery: GroupRecovery::default(),
                vms: Vec::new(),
                former: Vec::new(),
            },
            removal: None,
        });
        self.add_member(source, target);
        id
    }

    pub(crate) fn add_member(&mut self, source: VraId, target: VraId) {
        let since = MemberSince(self.desired.vpgs[0].settings.member_set_version);
        self.desired.vpgs[0].settings.vms.push(Member {
            vm: VmId::random(),
            name: "db".into(),
            journal: JournalId::random(),
            member_since: since,
            source,
            takeover: None,
            target,
            datastore: "/srv".into(),
            journal_size: JournalBounds {
                limit_bytes: 1 << 30,
                limit_percent: None,
                warning: None,
                minimum_bytes: 0,
            },
            volumes: vec![VolumeDefinition {
                id: VolumeId::random(),
                number: 0,
                size_bytes: 1 << 20,
                logical_block_bytes: 512,
                source_path: "/images/db".into(),
                left: false,
                swap: false,
            }],
            excluded: Vec::new(),
            recovery: VmRecovery::default(),
        });
    }

    pub(crate) fn add_test(&mut self, targets: &[VraId]) -> Uuid {
        let id = Uuid::new_v4();
        let views = targets.iter().map(|vra| TestView { vra: *vra, view: ViewId::random() }).collect();
        self.desired.tests.push(TestRun {
            id,
            vpg: self.desired.vpgs[0].id,
            state: TestState::Starting,
            started_us: TimeUs(self.now_us),
            details: TestDetails {
                checkpoint: CheckpointId { nonce: 1, counter: 1 },
                checkpoint_time_us: TimeUs(1),
                checkpoint_tag: None,
                door: DoorRequest::Nbd { listen: None },
                views,
                start_task: Uuid::new_v4(),
                stop_task: None,
            },
        });
        id
    }

    pub(crate) fn delete(&mut self, force: bool) {
        self.desired.vpgs[0].state = VpgState::Deleting;
        self.desired.vpgs[0].removal = Some(Removal { keep_disks: false, force });
    }

    pub(crate) fn plan(&mut self) -> Plan {
        self.core.plan(&self.desired, &self.observed, self.now_us)
    }

    pub(crate) fn finish(&mut self, action: &Action, outcome: ActionOutcome) -> Vec<Transition> {
        self.core.finished(action, outcome, self.now_us)
    }

    pub(crate) fn finish_all(&mut self, plan: &Plan, outcome: ActionOutcome) -> Vec<Transition> {
        plan.actions
            .iter()
            .flat_map(|action| self.core.finished(action, outcome.clone(), self.now_us))
            .collect()
    }

    /// Gets the list of revoked certificates out of the way.
    pub(crate) fn settle_trust(&mut self) {
        let vpgs = std::mem::take(&mut self.desired.vpgs);
        let plan = self.plan();
        self.finish_all(&plan, ActionOutcome::Done);
        self.desired.vpgs = vpgs;
    }

    /// Lets every action succeed until there is none left, and notes what is applied; gives all transitions.
    pub(crate) fn settle(&mut self) -> Vec<Transition> {
        let mut transitions = Vec::new();
        loop {
            let plan = self.plan();
            for transition in &plan.transitions {
                if let Transition::VpgApplied { revision, .. } = transition {
                    self.desired.vpgs[0].applied_revision = *revision;
                }
            }
            transitions.extend(plan.transitions.iter().cloned());
            if plan.actions.is_empty() && plan.transitions.is_empty() {
                return transitions;
            }
            self.finish_all(&plan, ActionOutcome::Done);
        }
    }

    pub(crate) fn see(&mut self, vra: VraId, asked_us: u64, change: impl FnOnce(&mut VraStatus)) {
        let last = self.observed.get_mut(&vra).unwrap().last.as_mut().unwrap();
        last.asked_us = asked_us;
        change(&mut last.status);
    }

    pub(crate) fn look_at(&mut self, vra: VraId) {
        let vpgs = self.truth[&vra].iter().map(|(vpg, revision)| vpg_status(*vpg, *revision)).collect();
        self.see(vra, self.now_us, |status| status.vpgs = vpgs);
    }

    pub(crate) fn land(&mut self, action: &Action) {
        let truth = self.truth.get_mut(&action.vra).unwrap();
        match &action.kind {
            // As VRAs do it: an older one is refused.
            ActionKind::ApplyVpg(definition) => {
                let known = truth.entry(definition.id).or_default();
                *known = definition.revision.max(*known);
            }
            ActionKind::RemoveVpg { vpg, .. } => _ = truth.remove(vpg),
            _ => {}
        }
    }
}

pub(crate) fn pick<T>(plan: &Plan, of: impl Fn(&Action) -> Option<T>) -> Vec<T> {
    plan.actions.iter().filter_map(of).collect()
}

pub(crate) fn applies(plan: &Plan) -> Vec<VraId> {
    pick(plan, |action| matches!(action.kind, ActionKind::ApplyVpg(_)).then_some(action.vra))
}

pub(crate) fn checks(plan: &Plan) -> Vec<VraId> {
    pick(plan, |action| matches!(action.kind, ActionKind::CheckVpg(_)).then_some(action.vra))
}

pub(crate) fn removes(plan: &Plan) -> Vec<VraId> {
    pick(plan, |action| matches!(action.kind, ActionKind::RemoveVpg { .. }).then_some(action.vra))
}

pub(crate) fn trusts(plan: &Plan) -> Vec<VraId> {
    pick(plan, |action| matches!(action.kind, ActionKind::SetTrust { .. }).then_some(action.vra))
}

pub(crate) fn opens(plan: &Plan) -> Vec<VraId> {
    pick(plan, |action| matches!(action.kind, ActionKind::OpenView { .. }).then_some(action.vra))
}

pub(crate) fn closes(plan: &Plan) -> Vec<ViewId> {
    pick(plan, |action| match action.kind {
        ActionKind::CloseView { view } => Some(view),
        _ => None,
    })
}

pub(crate) fn status(vra: VraId, name: &str) -> VraStatus {
    VraStatus {
        vra,
        name: name.into(),
        version: "1".into(),
        now_us: TimeUs(1_000_000),
        started_us: TimeUs(1),
        host: HostInfo { hostname: name.into(), kernel: "6.12".into(), ublk_features: None },
        site: None,
        site_keys: Vec::new(),
        awaits_site_key: false,
        guest_agents: Vec::new(),
        volumes: Vec::new(),
        vpgs: Vec::new(),
        source_vms: Vec::new(),
        target_vms: Vec::new(),
        views: Vec::new(),
        alerts: Vec::new(),
    }
}

pub(crate) fn vpg_status(vpg: VpgId, revision: u64) -> VpgStatus {
    VpgStatus {
        vpg,
        name: "shop".into(),
        revision,
        stamp: None,
        last_checkpoint: None,
        held_checkpoint: None,
        checkpoint_count: 0,
        aborted_epochs: 0,
        coordinator: None,
        missing: Vec::new(),
        last_failure: None,
        hold: Default::default(),
    }
}

pub(crate) fn view(view: ViewId, label: Option<String>) -> ViewInfo {
    ViewInfo {
        view,
        vpg: VpgId::random(),
        label,
        checkpoint: None,
        mode: ViewMode::Scratch,
        opened_us: TimeUs(1),
        open_duration_us: 1,
        disks: Vec::new(),
        problem: None,
    }
}
