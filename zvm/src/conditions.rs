//! What is wrong, found anew at each look: the alerts are the difference to the look before. No I/O.

mod inventory;

use std::collections::{BTreeMap, HashSet};

use vra::api::status::Severity;
use vra::api::{ViewInfo, VpgId, VraId};

use crate::inventory::Inventory;
use crate::model::alert::{Condition, Level};
use crate::model::event::{Entity, EventKind};
use crate::model::status::{VpgReport, VpgStatus, VpgSubstatus};
use crate::model::test_run::TestState;
use crate::model::vpg::{Vpg, VpgState};
use crate::reconcile::{ActionOutcome, Desired, Failure, Observed, Seen, Subject, newer_at};

/// A VRA may be silent so long (a restart) before it is an alert, microseconds.
const SILENCE_GRACE_US: u64 = 3_000_000;

/// Microseconds of a day.
const DAY_US: u64 = 86_400_000_000;

/// A certificate that ends within so long is an alert, microseconds.
const CERTIFICATE_WARNING_US: u64 = 60 * DAY_US;

/// Everything that a look goes through.
#[derive(Debug)]
pub struct Look<'a> {
    /// What should be.
    pub desired: &'a Desired,
    /// What was seen.
    pub observed: &'a Observed,
    /// How the groups do.
    pub reports: &'a [VpgReport],
    /// Actions that failed.
    pub failures: &'a BTreeMap<(VraId, Subject), Failure>,
    /// Groups that ended lately, and when, microseconds.
    pub ended: &'a BTreeMap<VpgId, u64>,
    /// The inventory in force.
    pub inventory: &'a Inventory,
    /// The manager's clock, microseconds.
    pub now_us: u64,
}

/// What to do about a group of which VRAs have a newer definition.
pub fn newer_remedy(vpg: &str) -> String {
    format!(
        "restore the newest backup of the manager's state folder, or take over what the VRAs have: `zvm vpg adopt {vpg}`"
    )
}

impl Look<'_> {
    /// What is wrong now, at most one condition of a code for each thing.
    pub fn conditions(&self) -> Vec<Condition> {
        let mut found = Vec::new();
        self.vras(&mut found);
        self.vra_alerts(&mut found);
        self.vpgs(&mut found);
        self.unknown_vpgs(&mut found);
        self.newer_vpgs(&mut found);
        self.guest_agents(&mut found);
        self.tests(&mut found);
        self.test_reminders(&mut found);
        self.refused_actions(&mut found);
        self.inventory_conditions(&mut found);
        let mut seen = HashSet::new();
        found.retain(|condition| seen.insert((condition.code.clone(), condition.entity.clone())));
        found
    }

    fn vras(&self, found: &mut Vec<Condition>) {
        for vra in self.desired.vras.values() {
            if let Some(Seen { reachable: false, error, since_us, .. }) = self.observed.get(&vra.id)
                && self.now_us.saturating_sub(*since_us) > SILENCE_GRACE_US
            {
                let reason = error.as_deref().unwrap_or("no answer");
                found.push(condition(
                    "vra-unreachable",
                    Entity::vra(vra.id),
                    Level::Error,
                    format!("VRA {} does not answer: {reason}", vra.name),
                    "start it, or check the network and its address in `zvm vra list`; replication between VRAs goes on without the manager",
                ));
            }
            let left_us = vra.certificate_ends_us.0.saturating_sub(self.now_us);
            if left_us < CERTIFICATE_WARNING_US && !vra.is_known_by_id_alone() {
                found.push(condition(
                    "vra-certificate-ends",
                    Entity::vra(vra.id),
                    Level::Warning,
                    format!("the certificate of VRA {} ends at {}", vra.name, vra.certificate_ends_us),
                    &format!(
                        "make a token with `zvm vra token create --name {}`, run `vra enroll` on its host again, and restart it",
                        vra.name
                    ),
                ));
            }
        }
    }

    fn vra_alerts(&self, found: &mut Vec<Condition>) {
        for (id, seen) in self.observed {
            let Some(last) = seen.last.as_ref().filter(|_| seen.reachable) else { continue };
            let Some(vra) = self.desired.vras.get(id) else { continue };
            for alert in last.status.alerts.iter().filter(|alert| alert.severity > Severity::Info) {
                let entity = match (alert.vm, alert.vpg) {
                    (Some(vm), _) => Entity::vm(vm),
                    (None, Some(vpg)) => Entity::vpg(vpg),
                    (None, None) => Entity::vra(*id),
                };
                let level = if alert.severity == Severity::Critical { Level::Error } else { Level::Warning };
                found.push(condition(
                    &alert.code,
                    entity,
                    level,
                    format!("VRA {}: {}", vra.name, alert.message),
                    alert.remedy.as_deref().unwrap_or("see the VRA's log"),
                ));
            }
        }
    }

    fn vpgs(&self, found: &mut Vec<Condition>) {
        for report in self.reports {
            let (code, level) = match report.status {
                // Somebody wanted it, and may have forgotten.
                VpgStatus::NotMeetingSla
                    if report.substatus == VpgSubstatus::ReplicationPausedUserInitiated =>
                {
                    ("vpg-paused", Level::Warning)
                }
                VpgStatus::NotMeetingSla => ("vpg-not-protected", Level::Error),
                VpgStatus::RpoNotMeetingSla => ("vpg-rpo", Level::Warning),
                VpgStatus::HistoryNotMeetingSla => ("vpg-history", Level::Warning),
                VpgStatus::Initializing | VpgStatus::MeetingSla | VpgStatus::Deleting => continue,
            };
            let Some(problem) = report.problems.first() else { continue };
            let description = format!("VPG {} is {}: {}", report.name, report.status, problem.description);
            found.push(condition(code, Entity::vpg(report.vpg), level, description, &problem.remedy));
        }
    }

    /// A group that a VRA has and the manager doesn't: its database is older than the group.
    fn unknown_vpgs(&self, found: &mut Vec<Condition>) {
        let known: HashSet<_> = self.desired.vpgs.iter().map(|vpg| vpg.id).collect();
        for (id, seen) in self.observed {
            let Some(last) = seen.last.as_ref().filter(|_| seen.reachable) else { continue };
            let Some(vra) = self.desired.vras.get(id) else { continue };
            let is_left = |vpg| self.desired.leftovers.iter().any(|left| left.vra == *id && left.vpg == vpg);
            // What a VRA said before a group's end says nothing about the time after it.
            let is_old = |vpg| self.ended.get(&vpg).is_some_and(|ended_us| last.asked_us <= *ended_us);
            let unknown = |vpg: VpgId| !known.contains(&vpg) && !is_left(vpg) && !is_old(vpg);
            for vpg in last.status.vpgs.iter().filter(|vpg| unknown(vpg.vpg)) {
                found.push(condition(
                    "vpg-unknown",
                    Entity::vpg(vpg.vpg),
                    Level::Warning,
                    format!("VRA {} has a part in VPG {} ({}), which the manager does not know", vra.name, vpg.name, vpg.vpg),
                    "restore the newest backup of the manager's state folder; the group's protection goes on meanwhile",
                ));
            }
        }
    }

    /// A group of which VRAs have a newer definition: the manager's database is older than that.
    fn newer_vpgs(&self, found: &mut Vec<Condition>) {
        for vpg in &self.desired.vpgs {
            let newer = newer_at(vpg, self.observed);
            let Some(revision) = newer.values().max() else { continue };
            let names: Vec<&str> = newer
                .keys()
                .filter_map(|vra| self.desired.vras.get(vra))
                .map(|vra| vra.name.as_str())
                .collect();
            found.push(condition(
                "vpg-newer-elsewhere",
                Entity::vpg(vpg.id),
                Level::Error,
                format!(
                    "VRA {} has another definition of VPG {} (revision {revision}) than the manager's database (revision {}), which is an older one: changes of the group are refused",
                    names.join(", "),
                    vpg.name,
                    vpg.revision
                ),
                &newer_remedy(&vpg.name),
            ));
        }
    }

    /// A VM that has moved to a host whose VRA doesn't know its guest's agent, while the former one's does.
    fn guest_agents(&self, found: &mut Vec<Condition>) {
        let knows = |vra: &VraId, vm| {
            let last = self.observed.get(vra).and_then(|seen| seen.last.as_ref());
            last.is_some_and(|last| last.status.guest_agents.contains(&vm))
        };
        for vpg in self.desired.vpgs.iter().filter(|vpg| vpg.state == VpgState::Active) {
            for member in &vpg.settings.vms {
                let Some(source) = self.desired.vras.get(&member.source) else { continue };
                let is_seen = self.observed.get(&source.id).is_some_and(|seen| seen.last.is_some());
                let elsewhere = self.desired.vras.values().find(|vra| knows(&vra.id, member.vm));
                let Some(former) = elsewhere.filter(|_| is_seen && !knows(&source.id, member.vm)) else {
                    continue;
                };
                found.push(condition(
                    "guest-agent-elsewhere",
                    Entity::vm(member.vm),
                    Level::Warning,
                    format!(
                        "the guest agent of VM {} of VPG {} is known at VRA {}, and the VM runs at VRA {}: application-consistent checkpoints are made without freezing its guest",
                        member.name, vpg.name, former.name, source.name
                    ),
                    &format!(
                        "name the agent's socket at the host where the VM runs, `vra guest-agent {0} --agent-socket PATH`, or forget it at the former one, `vra guest-agent {0} --none`",
                        member.name
                    ),
                ));
            }
        }
    }

    fn tests(&self, found: &mut Vec<Condition>) {
        for test in self.desired.tests.iter().filter(|test| test.state == TestState::Running) {
            for view in &test.details.views {
                let Some(last) = self.observed.get(&view.vra).and_then(|seen| seen.last.as_ref()) else {
                    continue;
                };
                let is_there = |open: &ViewInfo| open.view == view.view && open.problem.is_none();
                if last.asked_us > test.started_us.0 + SILENCE_GRACE_US
                    && !last.status.views.iter().any(is_there)
                {
                    let name = self.vpg_name(test.vpg);
                    found.push(condition(
                        "test-view-lost",
                        Entity::vpg(test.vpg),
                        Level::Warning,
                        format!("disks of the test of VPG {name} are no longer open at their VRA"),
                        &format!("stop the test with `zvm test stop {name}` and start it again"),
                    ));
                }
            }
        }
    }

    /// Groups that were not tested for as long as their users wanted to be reminded after; a new one counts from its creation.
    fn test_reminders(&self, found: &mut Vec<Condition>) {
        let is_tested = |vpg: &Vpg| {
            self.desired.tests.iter().any(|test| test.vpg == vpg.id && test.state == TestState::Running)
        };
        for vpg in self.desired.vpgs.iter().filter(|vpg| vpg.state == VpgState::Active && !is_tested(vpg)) {
            let Some(days) = vpg.settings.test_reminder_days else { continue };
            let from_us = vpg.last_test_us.unwrap_or(vpg.created_us);
            if self.now_us.saturating_sub(from_us.0) <= u64::from(days) * DAY_US {
                continue;
            }
            let last = match vpg.last_test_us {
                Some(last_us) => format!("was last tested at {last_us}"),
                None => format!("was not tested since its creation at {}", vpg.created_us),
            };
            found.push(condition(
                "vpg-test-reminder",
                Entity::vpg(vpg.id),
                Level::Warning,
                format!("VPG {} {last}: that is more than {days} days ago", vpg.name),
                &format!("test it with `zvm test start {}`", vpg.name),
            ));
        }
    }

    fn refused_actions(&self, found: &mut Vec<Condition>) {
        for ((vra, subject), failure) in self.failures {
            let ActionOutcome::Refused(error) = &failure.outcome else { continue };
            let name = self.desired.vras.get(vra).map_or_else(|| vra.to_string(), |vra| vra.name.clone());
            let (entity, what) = match subject {
                Subject::Trust => (Entity::vra(*vra), "the list of revoked certificates".to_owned()),
                Subject::SiteKeys => (Entity::vra(*vra), "the keys of encrypted journals".to_owned()),
                Subject::Check(vpg) | Subject::Apply(vpg) => {
                    (Entity::vpg(*vpg), format!("the definition of VPG {}", self.vpg_name(*vpg)))
                }
                Subject::Remove(vpg) => {
                    (Entity::vpg(*vpg), format!("the end of VPG {}", self.vpg_name(*vpg)))
                }
                Subject::Open(_) => continue,
                Subject::Close(_) => (Entity::vra(*vra), "the closing of a test's disks".to_owned()),
            };
            found.push(condition(
                "vra-refused",
                entity,
                Level::Error,
                format!("VRA {name} refuses {what}: {error}"),
                error.remedy.as_deref().unwrap_or("see the VRA's log; the manager tries again by itself"),
            ));
        }
    }

    fn vpg_name(&self, id: VpgId) -> String {
        self.desired
            .vpgs
            .iter()
            .find(|vpg| vpg.id == id)
            .map_or_else(|| id.to_string(), |vpg| vpg.name.clone())
    }
}

/// Whether an alert went on or off.
pub fn event_kind(turned_on: bool) -> EventKind {
    if turned_on { EventKind::AlertTurnedOn } else { EventKind::AlertTurnedOff }
}

fn condition(code: &str, entity: Entity, level: Level, description: String, remedy: &str) -> Condition {
    Condition { code: code.into(), entity, level, description, remedy: remedy.into() }
}
