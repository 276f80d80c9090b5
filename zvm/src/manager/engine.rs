//! The loop that brings the world to where it should be: look, plan, act, note.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use uuid::Uuid;
use vra::api::{RemoveVpg, Request, TimeUs, VpgId};
use vra::report::chain;

use super::Manager;
use crate::conditions::{self, Look};
use crate::model::alert::{Alert, Condition, Level};
use crate::model::event::{Entity, EventKind};
use crate::model::status::{VpgReport, VpgStatus, VpgSubstatus};
use crate::model::task::{TaskKind, TaskState};
use crate::model::test_run::TestState;
use crate::reconcile::{Action, ActionKind, ActionOutcome, Desired, Plan, Progress, Reconciler, Transition};
use crate::store::{self, StoreError};

/// Opening disks and taking definitions can take a VRA longer than answering a question.
pub(super) const SLOW_ACTION_LIMIT: Duration = Duration::from_secs(60);

/// Housekeeping of tasks, events and alerts happens every so many passes.
const TRIM_EVERY_PASSES: u32 = 1_000;
const KEEP_TASKS: u32 = 10_000;
const KEEP_EVENTS: u32 = 100_000;
const KEEP_ALERTS_US: u64 = 90 * 86_400_000_000;

#[derive(Debug)]
struct Engine {
    manager: Arc<Manager>,
    core: Reconciler,
    running: JoinSet<(Action, ActionOutcome)>,
    /// The last status of each group, to tell changes.
    statuses: HashMap<VpgId, (VpgStatus, VpgSubstatus)>,
    /// The last progress written for each group's task.
    progress: HashMap<(VpgId, TaskKind), Progress>,
    passes: u32,
}

impl Manager {
    /// Runs until cancelled. Actions that are under way then are done or not; the next start finds out.
    pub async fn run_engine(self: Arc<Self>) {
        let reconcile = &self.config.reconcile;
        let mut engine = Engine {
            core: Reconciler::new(reconcile.retry_min_ms * 1_000, reconcile.retry_max_ms * 1_000),
            running: JoinSet::new(),
            statuses: HashMap::new(),
            progress: HashMap::new(),
            passes: 0,
            manager: self.clone(),
        };
        let interval = Duration::from_millis(reconcile.interval_ms.max(50));
        loop {
            if let Err(error) = engine.pass().await {
                tracing::error!(error = chain(&error), "the database failed; the manager tries again");
                tokio::time::sleep(interval).await;
            }
            tokio::select! {
                () = self.wake.notified() => {}
                Some(finished) = engine.running.join_next() => engine.finished(finished).await,
                () = tokio::time::sleep(interval) => {}
            }
        }
    }
}

impl Engine {
    async fn pass(&mut self) -> Result<(), StoreError> {
        let manager = self.manager.clone();
        let began = Instant::now();
        let desired = manager.desired().await?;
        let observed = manager.observed();
        let now_us = manager.clock.now_us();
        let Plan { actions, transitions, progress } = self.core.plan(&desired, &observed, now_us);
        for action in actions {
            self.start(action, &desired);
        }
        for transition in transitions {
            self.apply(transition, &desired).await?;
        }
        self.show_progress(progress).await?;
        let reports = manager.reports(&desired, &observed);
        self.note_status_changes(&reports).await?;
        let inventory = manager.inventory();
        let look = Look {
            desired: &desired,
            observed: &observed,
            reports: &reports,
            failures: self.core.failures(),
            ended: self.core.ended(),
            inventory: &inventory,
            now_us,
        };
        let mut conditions = look.conditions();
        conditions.extend(self.own_conditions());
        self.update_alerts(conditions).await?;
        manager.passes.lock().expect("no code panics while it holds this lock").note(began.elapsed());
        self.passes = self.passes.wrapping_add(1);
        if self.passes % TRIM_EVERY_PASSES == 1 {
            self.trim().await?;
        }
        Ok(())
    }

    fn start(&mut self, action: Action, desired: &Desired) {
        let Some(vra) = desired.vras.get(&action.vra) else { return };
        let endpoint = vra.endpoint();
        let (request, limit) = match &action.kind {
            ActionKind::SetTrust { trust, .. } => {
                (Request::SetTrust(trust.clone()), self.manager.request_timeout())
            }
            ActionKind::SetSiteKeys(keys) => (Request::SetSiteKeys(keys.clone()), SLOW_ACTION_LIMIT),
            ActionKind::CheckVpg(definition) => (Request::CheckVpg(definition.clone()), SLOW_ACTION_LIMIT),
            ActionKind::ApplyVpg(definition) => (Request::ApplyVpg(definition.clone()), SLOW_ACTION_LIMIT),
            ActionKind::RemoveVpg { vpg, keep_files } => {
                (Request::RemoveVpg(RemoveVpg { vpg: *vpg, keep_files: *keep_files }), SLOW_ACTION_LIMIT)
            }
            ActionKind::OpenView { open, .. } => (Request::OpenView(open.clone()), SLOW_ACTION_LIMIT),
            ActionKind::CloseView { view } => {
                (Request::CloseView(vra::api::CloseView { view: *view }), SLOW_ACTION_LIMIT)
            }
        };
        let manager = self.manager.clone();
        self.running.spawn(async move {
            let outcome = manager.remote.call(&endpoint, request, limit).await.into();
            (action, outcome)
        });
    }

    async fn finished(&mut self, finished: Result<(Action, ActionOutcome), tokio::task::JoinError>) {
        let (action, outcome) = match finished {
            Ok(finished) => finished,
            Err(error) => {
                tracing::error!(%error, "a request to a VRA ended abnormally");
                return;
            }
        };
        match &outcome {
            ActionOutcome::Done => {}
            ActionOutcome::Refused(error) => {
                tracing::warn!(vra = %action.vra, subject = ?action.kind.subject(), %error, "a VRA refused");
            }
            ActionOutcome::Unreachable(reason) => {
                tracing::info!(vra = %action.vra, subject = ?action.kind.subject(), reason, "a VRA did not answer");
            }
        }
        let transitions = self.core.finished(&action, outcome, self.manager.clock.now_us());
        if transitions.is_empty() {
            return;
        }
        let apply = async {
            let desired = self.manager.desired().await?;
            for transition in transitions {
                self.apply(transition, &desired).await?;
            }
            Ok::<_, StoreError>(())
        };
        if let Err(error) = apply.await {
            tracing::error!(error = chain(&error), "the database failed; the manager tries again");
        }
    }

    async fn apply(&self, transition: Transition, desired: &Desired) -> Result<(), StoreError> {
        let manager = &self.manager;
        let now_us = manager.now_us();
        let vpg_name = |id: VpgId| {
            desired
                .vpgs
                .iter()
                .find(|vpg| vpg.id == id)
                .map_or_else(|| id.to_string(), |vpg| vpg.name.clone())
        };
        let find_test = |id: Uuid| desired.tests.iter().find(|test| test.id == id);
        let mut tx = manager.store.begin().await?;
        match transition {
            Transition::VpgApplied { vpg, revision } => {
                store::vpgs::set_applied(&mut tx, vpg, revision).await?;
                // A user may have changed the group since this was found out: then the tasks go on.
                let is_newest = store::vpgs::revision(&mut tx, vpg).await? == Some(revision);
                for kind in TaskKind::OF_DEFINITIONS.into_iter().filter(|_| is_newest) {
                    for task in store::tasks::open_of(&mut tx, vpg, kind).await? {
                        let step = match kind {
                            TaskKind::RemoveVm => "all VRAs have the definition",
                            TaskKind::ChangeDisks => {
                                "all VRAs have the definition; a VM whose journal got or lost disks has a full sync now, and checkpoints before its end keep the disks that they have"
                            }
                            _ => "all VRAs have the definition; the first sync follows",
                        };
                        store::tasks::finish(&mut tx, task.id, TaskState::Completed, step, now_us).await?;
                    }
                }
                let description = format!("all VRAs of VPG {} have revision {revision}", vpg_name(vpg));
                let kind = EventKind::DefinitionApplied;
                manager.note(&mut tx, kind, true, Entity::vpg(vpg), description, None).await?;
            }
            Transition::VpgRefused { vpg, revision, vra, error } => {
                // What a user has changed since isn't refused by that.
                if store::vpgs::revision(&mut tx, vpg).await? != Some(revision) {
                    return Ok(());
                }
                let name = desired.vras.get(&vra).map_or_else(|| vra.to_string(), |vra| vra.name.clone());
                let remedy = error.remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
                for kind in TaskKind::OF_DEFINITIONS {
                    let vpg_name = vpg_name(vpg);
                    let (event, way_back) = match kind {
                        TaskKind::AddVm => {
                            (EventKind::ProtectVm, format!("`zvm vpg remove-vm {vpg_name} VM` takes it back"))
                        }
                        TaskKind::ChangeDisks => (
                            EventKind::EditProtectionGroup,
                            format!("`zvm vpg remove-disks {vpg_name} VM:DISK` takes added disks back"),
                        ),
                        TaskKind::RemoveVm => {
                            (EventKind::UnprotectVm, format!("`zvm vpg delete {vpg_name}` ends the group"))
                        }
                        _ => {
                            (EventKind::CreateProtectionGroup, format!("`zvm vpg delete {vpg_name}` ends it"))
                        }
                    };
                    let step = format!(
                        "VRA {name} refuses the definition: {}{remedy}. The manager tries again until that is mended, or until {way_back}",
                        error.message
                    );
                    for task in store::tasks::open_of(&mut tx, vpg, kind).await? {
                        store::tasks::finish(&mut tx, task.id, TaskState::Failed, &step, now_us).await?;
                        let entity = Entity::vpg(vpg);
                        manager.note(&mut tx, event, false, entity, step.clone(), Some(task.id)).await?;
                    }
                }
            }
            Transition::LeftoverGone { vpg, vra } => store::leftovers::delete(&mut tx, vpg, vra).await?,
            Transition::VpgRemoved { vpg, leftovers } => {
                store::vpgs::delete(&mut tx, vpg).await?;
                for leftover in &leftovers {
                    store::leftovers::insert(&mut tx, leftover).await?;
                }
                for task in store::tasks::open_of(&mut tx, vpg, TaskKind::RemoveProtectionGroup).await? {
                    store::tasks::finish(&mut tx, task.id, TaskState::Completed, "deleted", now_us).await?;
                }
                let description = format!("VPG {} was deleted", vpg_name(vpg));
                let kind = EventKind::RemoveProtectionGroup;
                manager.note(&mut tx, kind, true, Entity::vpg(vpg), description, None).await?;
            }
            Transition::TestRunning { test } => {
                let Some(test) = find_test(test) else { return Ok(()) };
                if store::test_runs::move_on(&mut tx, test, TestState::Starting, TestState::Running).await? {
                    store::vpgs::set_tested(&mut tx, test.vpg, now_us).await?;
                    let step = "all disks are open";
                    let task = test.details.start_task;
                    store::tasks::finish(&mut tx, task, TaskState::Completed, step, now_us).await?;
                    let description = format!("all disks of the test of VPG {} are open", vpg_name(test.vpg));
                    let entity = Entity::vpg(test.vpg);
                    manager
                        .note(&mut tx, EventKind::FailOverTest, true, entity, description, Some(task))
                        .await?;
                }
            }
            Transition::TestFailed { test, vra, error } => {
                let Some(test) = find_test(test) else { return Ok(()) };
                if store::test_runs::move_on(&mut tx, test, TestState::Starting, TestState::Stopping).await? {
                    let name = desired.vras.get(&vra).map_or_else(|| vra.to_string(), |vra| vra.name.clone());
                    let remedy = error.remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
                    let step = format!("VRA {name} did not open the disks: {}{remedy}", error.message);
                    let task = test.details.start_task;
                    store::tasks::finish(&mut tx, task, TaskState::Failed, &step, now_us).await?;
                    let description = format!("the test of VPG {} failed: {step}", vpg_name(test.vpg));
                    let entity = Entity::vpg(test.vpg);
                    manager
                        .note(&mut tx, EventKind::FailOverTest, false, entity, description, Some(task))
                        .await?;
                }
            }
            Transition::TestStopped { test } => {
                let Some(test) = find_test(test) else { return Ok(()) };
                store::test_runs::delete(&mut tx, test.id).await?;
                if let Some(task) = test.details.stop_task {
                    let step = "all disks are closed, scratch is deleted";
                    store::tasks::finish(&mut tx, task, TaskState::Completed, step, now_us).await?;
                }
                let description = format!("the test of VPG {} is over", vpg_name(test.vpg));
                let (kind, entity) = (EventKind::StopFailOverTest, Entity::vpg(test.vpg));
                manager.note(&mut tx, kind, true, entity, description, test.details.stop_task).await?;
            }
        }
        tx.commit().await?;
        // What follows from the new state should not wait for the next look.
        manager.wake.notify_one();
        Ok(())
    }

    async fn show_progress(&mut self, progress: Vec<Progress>) -> Result<(), StoreError> {
        let news: Vec<Progress> = progress
            .iter()
            .filter(|progress| self.progress.get(&(progress.vpg, progress.kind)) != Some(progress))
            .cloned()
            .collect();
        if !news.is_empty() {
            let mut tx = self.manager.store.begin().await?;
            for progress in news {
                for task in store::tasks::open_of(&mut tx, progress.vpg, progress.kind).await? {
                    store::tasks::progress(&mut tx, task.id, progress.percent, &progress.step).await?;
                }
            }
            tx.commit().await?;
        }
        self.progress =
            progress.into_iter().map(|progress| ((progress.vpg, progress.kind), progress)).collect();
        Ok(())
    }

    async fn note_status_changes(&mut self, reports: &[VpgReport]) -> Result<(), StoreError> {
        let now: HashMap<_, _> =
            reports.iter().map(|report| (report.vpg, (report.status, report.substatus))).collect();
        let changed: Vec<_> = reports
            .iter()
            .filter_map(|report| {
                let before = self.statuses.get(&report.vpg)?;
                (*before != now[&report.vpg]).then_some((report, *before))
            })
            .collect();
        if !changed.is_empty() {
            let mut tx = self.manager.store.begin().await?;
            for (report, (status, substatus)) in changed {
                let description = format!(
                    "VPG {} went from {status}/{substatus} to {}/{}",
                    report.name, report.status, report.substatus
                );
                let good = matches!(
                    report.status,
                    VpgStatus::MeetingSla | VpgStatus::Initializing | VpgStatus::Deleting
                );
                tracing::info!(vpg = %report.vpg, name = report.name, status = %report.status, substatus = %report.substatus, "a VPG's status changed");
                let entity = Entity::vpg(report.vpg);
                self.manager.note(&mut tx, EventKind::StatusChanged, good, entity, description, None).await?;
            }
            tx.commit().await?;
        }
        self.statuses = now;
        Ok(())
    }

    fn own_conditions(&self) -> Vec<Condition> {
        let problems = self.manager.own_problems.lock().expect("no code panics while it holds this lock");
        problems
            .iter()
            .map(|((code, entity), problem)| Condition {
                code: (*code).into(),
                entity: entity.clone(),
                level: Level::Warning,
                description: problem.description.clone(),
                remedy: problem.remedy.clone(),
            })
            .collect()
    }

    async fn update_alerts(&self, conditions: Vec<Condition>) -> Result<(), StoreError> {
        let open = store::alerts::open(&mut *self.manager.store.read().await?).await?;
        let key = |condition: &Condition| (condition.code.clone(), condition.entity.clone());
        let mut new: HashMap<_, Condition> =
            conditions.into_iter().map(|condition| (key(&condition), condition)).collect();
        let (mut over, mut reworded) = (Vec::new(), Vec::new());
        for alert in open {
            match new.remove(&key(&alert.condition)) {
                None => over.push(alert),
                Some(condition) if condition != alert.condition => reworded.push((alert.id, condition)),
                Some(_) => {}
            }
        }
        if new.is_empty() && over.is_empty() && reworded.is_empty() {
            return Ok(());
        }
        let manager = &self.manager;
        let mut tx = manager.store.begin().await?;
        for condition in new.into_values() {
            let alert =
                Alert { id: Uuid::new_v4(), condition, turned_on_us: manager.now_us(), turned_off_us: None };
            store::alerts::turn_on(&mut tx, &alert).await?;
            let condition = alert.condition;
            tracing::info!(code = condition.code, level = %condition.level, "alert on: {}", condition.description);
            let kind = conditions::event_kind(true);
            manager.note(&mut tx, kind, false, condition.entity, condition.description, None).await?;
        }
        for (id, condition) in reworded {
            store::alerts::reword(&mut tx, id, &condition).await?;
        }
        for alert in over {
            store::alerts::turn_off(&mut tx, alert.id, manager.now_us()).await?;
            let condition = alert.condition;
            tracing::info!(code = condition.code, "alert off: {}", condition.description);
            let (kind, description) =
                (conditions::event_kind(false), format!("over: {}", condition.description));
            manager.note(&mut tx, kind, true, condition.entity, description, None).await?;
        }
        Ok(tx.commit().await?)
    }

    async fn trim(&self) -> Result<(), StoreError> {
        let before_us = TimeUs(self.manager.now_us().0.saturating_sub(KEEP_ALERTS_US));
        let mut tx = self.manager.store.begin().await?;
        store::tasks::trim(&mut tx, KEEP_TASKS).await?;
        store::events::trim(&mut tx, KEEP_EVENTS).await?;
        store::alerts::forget_over(&mut tx, before_us).await?;
        Ok(tx.commit().await?)
    }
}
