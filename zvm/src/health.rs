//! How groups do: status, RPO, history and problems, from what their VRAs tell.

use std::collections::{BTreeMap, BTreeSet};

use vra::api::status::{
    Severity, SourceMode, SourceVmStatus, TargetState, TargetVmStatus, VpgStatus as VpgAtVra,
};
use vra::api::{TimeUs, VraId, VraStatus};

use crate::model::status::{Problem, Stage, VmReport, VpgReport, VpgStatus, VpgSubstatus};
use crate::model::test_run::TestRun;
use crate::model::vpg::{Member, Vpg, VpgState};
use crate::model::vra::Vra;
use crate::reconcile::{Observed, Seen};

/// History may be this much shorter than wanted before it counts as too short, in percent.
const HISTORY_SLACK_PERCENT: u64 = 10;

/// A new group may take so long to connect, microseconds.
const FIRST_CONNECTION_US: u64 = 15_000_000;

/// A newest checkpoint may be so much in the future, microseconds: clocks of synchronised hosts differ, and statuses are of different moments.
const FUTURE_SLACK_US: u64 = 5_000_000;

/// How `vpg` does at `now_us`.
pub fn report(
    vpg: &Vpg,
    vras: &BTreeMap<VraId, Vra>,
    observed: &Observed,
    tests: &[TestRun],
    now_us: u64,
) -> VpgReport {
    Look { vpg, vras, observed, now_us }.report(tests)
}

struct Look<'a> {
    vpg: &'a Vpg,
    vras: &'a BTreeMap<VraId, Vra>,
    observed: &'a Observed,
    now_us: u64,
}

/// What is in a group's way, worst first: the order of the variants is the order of precedence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    NeedsConfiguration,
    Storage,
    PausedByUser,
    NotServed,
    Disconnected,
    Paused,
    FullSync,
    Other,
    /// Worth showing, not bad enough to say that the group isn't as wanted.
    Note,
}

impl<'a> Look<'a> {
    fn report(&self, tests: &[TestRun]) -> VpgReport {
        let vpg = self.vpg;
        let mut troubles: Vec<(Trouble, Problem)> = Vec::new();
        let vms: Vec<VmReport> =
            vpg.settings.vms.iter().map(|member| self.vm(member, &mut troubles)).collect();
        for vra in vpg.vras() {
            self.vra_troubles(vra, &mut troubles);
        }
        if vpg.settings.paused {
            let description = format!("replication of {} is paused: nothing new can be recovered", vpg.name);
            let remedy = format!("`zvm vpg resume {}` lets it go on", vpg.name);
            troubles.push((Trouble::PausedByUser, Problem { description, remedy }));
        }
        troubles.sort_by_key(|(trouble, _)| *trouble);
        let mut seen_problems = std::collections::HashSet::new();
        troubles.retain(|(_, problem)| seen_problems.insert(problem.description.clone()));

        // Those of VMs that came later may have no checkpoint yet: what is older is complete without them.
        let first: BTreeSet<VraId> = vpg.first_members().map(|member| member.target).collect();
        let targets = self.target_statuses();
        let newest_us = targets
            .iter()
            .filter(|(vra, at)| first.contains(vra) || at.held_checkpoint.is_some())
            .map(|(_, at)| at.held_checkpoint.as_ref().map(|held| held.time_us))
            .min()
            .flatten();
        let first_targets: Vec<_> = targets.iter().filter(|(vra, _)| first.contains(vra)).collect();
        let all_targets_tell = first_targets.len() == first.len();
        let checkpoint_count = if all_targets_tell {
            first_targets.iter().map(|(_, at)| at.checkpoint_count).min().unwrap_or(0)
        } else {
            0
        };
        let history_from_us = vpg
            .first_members()
            .map(|member| self.target_vm(member).and_then(|vm| vm.history_from_us))
            .try_fold(TimeUs(0), |oldest, from| from.map(|from| oldest.max(from)));
        let rpo_us = newest_us
            .filter(|_| all_targets_tell)
            .filter(|newest| !self.is_in_future(*newest))
            .map(|newest| self.coordinator_now_us().saturating_sub(newest.0));
        let (sync_percent, sync_remaining_us) = self.sync(&vms);
        let mut report = VpgReport {
            vpg: vpg.id,
            name: vpg.name.clone(),
            status: VpgStatus::Initializing,
            substatus: VpgSubstatus::None,
            rpo_us,
            rpo_target_s: vpg.settings.rpo_target_s,
            slowest_stage: slowest_stage(&vms),
            sync_percent,
            sync_remaining_us,
            history_from_us: history_from_us.filter(|from| from.0 > 0),
            history_to_us: newest_us,
            history_wanted_s: vpg.settings.history_s,
            checkpoint_count,
            test: tests.iter().find(|test| test.vpg == vpg.id).map(|test| test.state),
            problems: Vec::new(),
            vms,
        };
        let worst = troubles.first().map(|(trouble, _)| *trouble).filter(|worst| *worst != Trouble::Note);
        (report.status, report.substatus) = self.judge(&report, worst);
        report.problems = troubles.into_iter().map(|(_, problem)| problem).collect();
        self.add_sla_problems(&mut report);
        report
    }

    fn judge(&self, report: &VpgReport, worst: Option<Trouble>) -> (VpgStatus, VpgSubstatus) {
        let recoverable = report.checkpoint_count > 0;
        if self.vpg.state == VpgState::Deleting {
            return (VpgStatus::Deleting, VpgSubstatus::Deleting);
        }
        let substatus = match worst {
            Some(Trouble::NeedsConfiguration) => VpgSubstatus::NeedsConfiguration,
            Some(Trouble::Storage) => VpgSubstatus::JournalStorageError,
            Some(Trouble::PausedByUser) => VpgSubstatus::ReplicationPausedUserInitiated,
            Some(Trouble::NotServed) => VpgSubstatus::VmNotProtectedError,
            Some(Trouble::Disconnected) if recoverable => VpgSubstatus::DisconnectedFromPeer,
            Some(Trouble::Disconnected) => VpgSubstatus::DisconnectedFromPeerNoRecoveryPoints,
            Some(Trouble::Paused) => VpgSubstatus::ReplicationPausedSystemInitiated,
            Some(Trouble::FullSync) if recoverable => VpgSubstatus::FullSync,
            Some(Trouble::FullSync) => VpgSubstatus::InitialSync,
            Some(Trouble::Other | Trouble::Note) => VpgSubstatus::Error,
            None if self.vpg.applied_revision == 0 => VpgSubstatus::Creating,
            None if !recoverable => VpgSubstatus::InitialSync,
            None => VpgSubstatus::None,
        };
        if !recoverable && matches!(worst, None | Some(Trouble::FullSync)) {
            return (VpgStatus::Initializing, substatus);
        }
        let broken = !matches!(worst, None | Some(Trouble::FullSync));
        let status = match (self.rpo_missed(report), self.history_missed(report)) {
            _ if broken => VpgStatus::NotMeetingSla,
            (true, true) => VpgStatus::NotMeetingSla,
            (true, false) => VpgStatus::RpoNotMeetingSla,
            (false, true) => VpgStatus::HistoryNotMeetingSla,
            (false, false) => VpgStatus::MeetingSla,
        };
        (status, substatus)
    }

    fn rpo_missed(&self, report: &VpgReport) -> bool {
        report.rpo_us.is_none_or(|rpo_us| rpo_us > report.rpo_target_s * 1_000_000)
    }

    fn history_missed(&self, report: &VpgReport) -> bool {
        let wanted_us = report.history_wanted_s * (100 - HISTORY_SLACK_PERCENT) * 10_000;
        let age_us = self.now_us.saturating_sub(self.vpg.created_us.0);
        let has_us = match (report.history_from_us, report.history_to_us) {
            (Some(from), Some(to)) => to.0.saturating_sub(from.0),
            _ => 0,
        };
        // A group younger than the history that is wanted cannot have it yet.
        age_us > report.history_wanted_s * 1_000_000 + 60_000_000 && has_us < wanted_us
    }

    fn add_sla_problems(&self, report: &mut VpgReport) {
        if let Some(newest) = report.history_to_us.filter(|newest| self.is_in_future(*newest)) {
            report.problems.push(Problem {
                description: format!(
                    "RPO of {} is unknown: the time of its newest checkpoint, {newest}, is in the future",
                    self.vpg.name
                ),
                remedy: "synchronise the clocks of its source hosts: checkpoints are stamped by them".into(),
            });
        } else if !self.vpg.settings.paused && report.checkpoint_count > 0 && self.rpo_missed(report) {
            let stage = report.slowest_stage.map_or("between checkpoints", |(stage, _)| match stage {
                Stage::Capture => "for their capture, which has stopped, and a sync",
                Stage::Queue => "in the source's queue",
                Stage::Wire => "on the network",
                Stage::TargetMemory => "in the target's memory",
                Stage::JournalDisk => "for the journal's disk",
            });
            report.problems.push(Problem {
                description: format!(
                    "RPO of {} is beyond the target of {} s; writes wait {stage}",
                    self.vpg.name, report.rpo_target_s
                ),
                remedy: format!(
                    "give that stage more bandwidth, or the group a longer RPO target: `zvm vpg edit {} --rpo-target DURATION`",
                    self.vpg.name
                ),
            });
        }
        if report.checkpoint_count > 0 && self.history_missed(report) {
            report.problems.push(Problem {
                description: format!(
                    "history of {} is shorter than the wanted {} s",
                    self.vpg.name, report.history_wanted_s
                ),
                remedy: "raise the journal limit of its VMs, or want less history".into(),
            });
        }
    }

    fn vm(&self, member: &Member, troubles: &mut Vec<(Trouble, Problem)>) -> VmReport {
        let source = self.source_vm(member);
        let target = self.target_vm(member);
        // A target that can't take anything ends the stream.
        let takes_nothing =
            target.is_some_and(|vm| matches!(vm.state, TargetState::PausedFull | TargetState::Poisoned));
        let mut add = |trouble, description: String, remedy: &str| {
            troubles.push((trouble, Problem { description, remedy: remedy.into() }));
        };
        let (name, source_name, target_name) =
            (&member.name, self.vra_name(member.source), self.vra_name(member.target));
        match source.map(|vm| vm.mode) {
            Some(SourceMode::WaitingForVolumes) => {
                let paths: Vec<String> = self.missing_disks(member).collect();
                add(
                    Trouble::NotServed,
                    format!(
                        "VM {name}: {source_name} does not serve all of its disks ({})",
                        paths.join(", ")
                    ),
                    "attach them on that host with `vra attach`",
                );
            }
            Some(SourceMode::Refused) => add(
                Trouble::NeedsConfiguration,
                format!(
                    "VM {name}: {target_name} refuses its stream, for the journal belongs to another history"
                ),
                "decide which side is right; then delete the group and create it anew, or move the journal's folder away",
            ),
            Some(SourceMode::Overflowed) => add(
                Trouble::FullSync,
                format!("VM {name}: {source_name} had no memory left for unsent writes; a full sync follows"),
                "give the link more bandwidth or the VRA more memory if this happens often",
            ),
            Some(SourceMode::Syncing) => add(
                Trouble::FullSync,
                format!(
                    "VM {name}: a full sync runs; its newest recoverable state is the last checkpoint before it"
                ),
                "wait for it to end",
            ),
            Some(SourceMode::Connecting) if self.is_new() => {}
            Some(SourceMode::Connecting | SourceMode::Streaming)
                if source.is_some_and(|vm| !vm.connected) && !takes_nothing =>
            {
                add(
                    Trouble::Disconnected,
                    format!("VM {name}: {source_name} does not reach {target_name}"),
                    "check the network and that both VRAs run; `zvm vra show` tells the addresses",
                );
            }
            Some(SourceMode::Connecting | SourceMode::Streaming | SourceMode::Paused | SourceMode::Other)
            | None => {}
        }
        match target.map(|vm| vm.state) {
            Some(TargetState::PausedFull) => add(
                Trouble::Paused,
                format!("VM {name}: its journal at {target_name} is full"),
                "raise its journal limit or free space on the datastore",
            ),
            Some(TargetState::Poisoned) => add(
                Trouble::Storage,
                format!("VM {name}: writing its journal at {target_name} failed"),
                "check the datastore's disk and the VRA's log, then restart the VRA",
            ),
            _ => {}
        }
        VmReport {
            vm: member.vm,
            name: name.clone(),
            source: source_name,
            target: target_name,
            source_mode: source.map(|vm| vm.mode),
            target_state: target.map(|vm| vm.state),
            connected: source.map_or_else(|| target.is_some_and(|vm| vm.connected), |vm| vm.connected),
            rpo: source.map(|vm| vm.rpo),
            sync: source.and_then(|vm| vm.sync),
            journal_used_bytes: target.map(|vm| vm.journal_used_bytes),
            journal_limit_bytes: member.journal_limit_bytes(),
            reachable_history_s: target.and_then(|vm| vm.reachable_history_s),
            limit_reached_in_s: target.and_then(|vm| vm.limit_reached_in_s),
        }
    }

    fn vra_troubles(&self, vra: VraId, troubles: &mut Vec<(Trouble, Problem)>) {
        let name = self.vra_name(vra);
        if !self.vras.contains_key(&vra) {
            let description = format!("the certificate of VRA {name} is revoked");
            let remedy = "a revoked VRA is never let in again: take its VMs out of the group (`zvm vpg remove-vm`), and add them once their host has a new VRA".into();
            troubles.push((Trouble::NeedsConfiguration, Problem { description, remedy }));
            return;
        }
        match self.observed.get(&vra) {
            Some(Seen { reachable: true, .. }) | None => {}
            Some(seen) => {
                let reason = seen.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
                let description = format!("VRA {name} does not answer{reason}");
                let remedy = "start it, or check the network and its address in `zvm vra list`".into();
                troubles.push((Trouble::Disconnected, Problem { description, remedy }));
            }
        }
        for alert in self.status(vra).into_iter().flat_map(|status| &status.alerts) {
            let about_us = alert.vpg == Some(self.vpg.id)
                || alert.vm.is_some_and(|vm| self.vpg.settings.vms.iter().any(|member| member.vm == vm));
            if about_us && alert.severity > Severity::Info {
                let problem = Problem {
                    description: format!("VRA {name}: {}", alert.message),
                    remedy: alert.remedy.clone().unwrap_or_else(|| "see the VRA's log".into()),
                };
                let trouble =
                    if alert.severity == Severity::Critical { Trouble::Other } else { Trouble::Note };
                troubles.push((trouble, problem));
            }
        }
    }

    fn sync(&self, vms: &[VmReport]) -> (Option<u8>, Option<u64>) {
        let syncs: Vec<_> = vms.iter().filter_map(|vm| vm.sync).collect();
        let total: u64 = syncs.iter().map(|sync| sync.total_bytes).sum();
        let done: u64 = syncs.iter().map(|sync| sync.done_bytes.min(sync.total_bytes)).sum();
        if syncs.is_empty() {
            return (None, None);
        }
        let percent = u8::try_from((u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(100))
            .unwrap_or(100);
        let coordinator_now_us = self.coordinator_now_us();
        let remaining = syncs
            .iter()
            .map(|sync| {
                let elapsed_us = coordinator_now_us.saturating_sub(sync.started_us.0);
                let left = sync.total_bytes.saturating_sub(sync.done_bytes);
                (u128::from(elapsed_us) * u128::from(left)).checked_div(u128::from(sync.done_bytes))
            })
            .try_fold(0, |longest, left_us| left_us.map(|left_us| longest.max(left_us)));
        (Some(percent), remaining.and_then(|us| u64::try_from(us).ok()))
    }

    /// The clock by which checkpoints are stamped: that of the source that takes them, by its last answer; else another source's, else the
    /// manager's.
    fn coordinator_now_us(&self) -> u64 {
        let clock = |vra: VraId| {
            let seen = self.observed.get(&vra)?;
            let last = seen.last.as_ref().filter(|_| seen.reachable)?;
            Some(last.status.now_us.0 + self.now_us.saturating_sub(last.asked_us))
        };
        let sources = self.vpg.sources();
        let told = |vra: &VraId| {
            let seen = self.observed.get(vra).filter(|seen| seen.reachable)?;
            let status = &seen.last.as_ref()?.status;
            status.vpgs.iter().find(|at| at.vpg == self.vpg.id)?.coordinator
        };
        let coordinators = sources.iter().filter_map(told).filter(|vra| sources.contains(vra));
        let coordinators: BTreeSet<VraId> = coordinators.collect();
        let by_them = coordinators.into_iter().filter_map(clock).max();
        by_them.or_else(|| sources.into_iter().filter_map(clock).max()).unwrap_or(self.now_us)
    }

    /// Whether a checkpoint has a time that says nothing of its age.
    fn is_in_future(&self, newest: TimeUs) -> bool {
        newest.0 > self.coordinator_now_us().saturating_add(FUTURE_SLACK_US)
    }

    fn missing_disks(&self, member: &Member) -> impl Iterator<Item = String> {
        let served: Vec<_> =
            self.status(member.source).into_iter().flat_map(|status| &status.volumes).cloned().collect();
        let volumes = member.volumes.clone();
        volumes
            .into_iter()
            .filter(|volume| !volume.left)
            .filter(move |volume| !served.iter().any(|at| at.volume == volume.id && at.door.is_some()))
            .map(|volume| volume.source_path.display().to_string())
    }

    fn target_statuses(&self) -> Vec<(VraId, &'a VpgAtVra)> {
        let targets = self.vpg.targets().into_iter();
        let at = |vra| self.status(vra)?.vpgs.iter().find(|at| at.vpg == self.vpg.id);
        targets.filter_map(|vra| Some((vra, at(vra)?))).collect()
    }

    fn source_vm(&self, member: &Member) -> Option<&'a SourceVmStatus> {
        let seen = self.observed.get(&member.source)?;
        let status = &seen.last.as_ref().filter(|_| seen.reachable)?.status;
        status.source_vms.iter().find(|vm| vm.vm == member.vm)
    }

    fn target_vm(&self, member: &Member) -> Option<&'a TargetVmStatus> {
        self.status(member.target)?.target_vms.iter().find(|vm| vm.vm == member.vm)
    }

    fn status(&self, vra: VraId) -> Option<&'a VraStatus> {
        Some(&self.observed.get(&vra)?.last.as_ref()?.status)
    }

    /// A group that was just made needs a moment to connect.
    fn is_new(&self) -> bool {
        self.now_us.saturating_sub(self.vpg.created_us.0) < FIRST_CONNECTION_US
    }

    fn vra_name(&self, vra: VraId) -> String {
        self.vras.get(&vra).map_or_else(|| vra.short(), |vra| vra.name.clone())
    }
}

fn slowest_stage(vms: &[VmReport]) -> Option<(Stage, u64)> {
    vms.iter()
        .filter_map(|vm| vm.rpo)
        .flat_map(|rpo| {
            [
                (Stage::Capture, rpo.capture_us),
                (Stage::Queue, rpo.queue_us),
                (Stage::Wire, rpo.wire_us),
                (Stage::TargetMemory, rpo.target_memory_us),
                (Stage::JournalDisk, rpo.journal_disk_us),
            ]
        })
        .filter(|(_, us)| *us > 0)
        .max_by_key(|(_, us)| *us)
}
