//! What status and alerts say of source VMs and of checkpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use journal::batch::CheckpointKind;

use super::sources::LiveSource;
use super::spanning_status::status_of;
use super::vpgs::missing_volumes;
use super::{Daemon, Finding, lock};
use crate::api::status::{HoldTimes, LastCheckpoint, Rpo, SourceMode, SourceVmStatus, VpgStatus};
use crate::api::vpg::{CheckpointPlace, VmDefinition, is_moment};
use crate::api::{
    ApiError, CheckpointId, CheckpointInfo, ErrorCode, FreezeGuests, GenerationId, Severity, TagCheckpoint,
    ThawGuests, TimeUs, VmId, VpgDefinition,
};
use crate::capture::SourceSnapshot;
use crate::capture::modes::{Mode, OverflowReason};
use crate::checkpoint::{CheckpointRefusal, TakenCheckpoint};
use crate::guest::LONGEST_FREEZE;
use crate::ship::Phase;

impl Daemon {
    /// Source VMs, those that wait for volumes too.
    pub(super) fn source_statuses(&self) -> Vec<SourceVmStatus> {
        let live: BTreeMap<VmId, Arc<LiveSource>> = lock(&self.sources).clone();
        let seen = self.seen();
        let mut statuses = Vec::new();
        for vpg in seen.vpgs.values() {
            for vm in vpg.vms.iter().filter(|vm| vm.source.id == self.vra) {
                statuses.push(match live.get(&vm.id) {
                    Some(source) => self.source_status(source),
                    None => waiting_status(vpg, vm),
                });
            }
        }
        statuses
    }

    /// What is wrong with source VMs.
    pub(super) fn source_findings(&self, found: &mut Vec<Finding>) {
        let seen = self.seen();
        for vpg in seen.vpgs.values() {
            for vm in vpg.vms.iter().filter(|vm| vm.source.id == self.vra) {
                let missing = missing_volumes(&seen, vm);
                if !missing.is_empty() {
                    let missing: Vec<_> = missing.iter().map(ToString::to_string).collect();
                    found.push(Finding {
                        code: "volumes-missing",
                        severity: Severity::Critical,
                        vm: Some(vm.id),
                        vpg: Some(vpg.id),
                        message: format!(
                            "VM {} is not protected: volume {} is not attached",
                            vm.name,
                            missing.join(", ")
                        ),
                        remedy: Some("attach it (`vra attach`)".to_owned()),
                    });
                }
            }
        }
        let live: Vec<Arc<LiveSource>> = lock(&self.sources).values().cloned().collect();
        for source in live {
            source_finding(&source, found);
        }
    }

    /// Makes a checkpoint now and names it.
    pub(super) async fn tag_checkpoint(&self, tag: TagCheckpoint) -> Result<CheckpointInfo, ApiError> {
        super::definition::check_name("the tag's", &tag.tag)?;
        if is_moment(&tag.tag) {
            let message = format!("{:?} can't be a checkpoint's name: it means a moment by itself", tag.tag);
            return Err(ApiError::new(ErrorCode::BadRequest, message)
                .remedy("choose a name that is neither `latest`, nor a time or a checkpoint's id"));
        }
        let vpg = self.vpg(tag.vpg)?;
        if !vpg.vms.iter().any(|vm| vm.source.id == self.vra) {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!(
                    "this VRA is not a source of VPG \"{}\": its checkpoints are made at the source",
                    vpg.name
                ),
            ));
        }
        if vpg.paused {
            return Err(paused(&vpg));
        }
        let is_frozen = self.has_frozen(vpg.id);
        if self.spanning.status(vpg.id).is_some() {
            if tag.application && !is_frozen {
                let message = format!(
                    "the guests of VPG \"{}\" here are not frozen, and it has other source VRAs, too",
                    vpg.name
                );
                let remedy = "make it with `zvm checkpoint tag --application`, which freezes them all";
                return Err(ApiError::new(ErrorCode::NotReady, message).remedy(remedy));
            }
            return self.tag_spanning(&vpg, &tag).await;
        }
        let freezes = tag.application && !is_frozen;
        if freezes {
            let freeze = FreezeGuests { vpg: vpg.id, limit_ms: LONGEST_FREEZE.as_millis() as u32 };
            let told = self.freeze_guests(freeze).await?;
            if told.frozen.is_empty() {
                self.thaw_guests(ThawGuests { vpg: vpg.id }).await;
                let message = format!("no VM of VPG \"{}\" has a guest agent", vpg.name);
                return Err(ApiError::new(ErrorCode::BadRequest, message)
                    .remedy("name their sockets with `vra guest-agent`"));
            }
        }
        let kind = if tag.application { CheckpointKind::Application } else { CheckpointKind::Tagged };
        let taken = tokio::task::block_in_place(|| self.checkpointer.take(tag.vpg, kind, &tag.tag));
        if freezes {
            self.thaw_guests(ThawGuests { vpg: vpg.id }).await;
        }
        taken.map(|taken| info_of(&taken, &vpg)).map_err(|refusal| {
            let message = format!("no checkpoint of VPG \"{}\" could be made: {refusal}", vpg.name);
            let error = ApiError::new(ErrorCode::NotReady, message);
            match refusal {
                CheckpointRefusal::NoMembers => error.remedy("attach the volumes of all its VMs"),
                _ => error.remedy("wait until every VM streams (`vra status`) and try again"),
            }
        })
    }

    /// A VPG as its source sees it.
    pub(super) fn source_vpg_status(&self, vpg: &VpgDefinition) -> VpgStatus {
        if let Some(status) = self.spanning.status(vpg.id) {
            return status_of(vpg, status);
        }
        let status = self.checkpointer.status(vpg.id).unwrap_or_default();
        VpgStatus {
            vpg: vpg.id,
            name: vpg.name.clone(),
            revision: vpg.revision,
            stamp: vpg.stamp(),
            last_checkpoint: status.last.map(|last| LastCheckpoint {
                id: id_of(&last),
                time_us: TimeUs(last.time_us),
                tag: Some(last.tag).filter(|tag| !tag.is_empty()),
            }),
            held_checkpoint: None,
            checkpoint_count: 0,
            aborted_epochs: status.aborted_epochs,
            coordinator: vpg.vms.iter().any(|vm| vm.source.id == self.vra).then_some(self.vra),
            missing: Vec::new(),
            last_failure: status.last_refusal.map(|refusal| refusal.to_string()),
            hold: status.hold,
        }
    }

    fn source_status(&self, source: &LiveSource) -> SourceVmStatus {
        let snapshot = source.vm().snapshot();
        let sender = source.sender();
        let definition = source.definition();
        let mode = match (&sender.phase, snapshot.mode) {
            (Phase::Stopped(reason), _) if !reason.needs_new_generation() => SourceMode::Refused,
            _ if source.is_paused() => SourceMode::Paused,
            (_, Mode::Streaming { .. }) if snapshot.sync_id.is_none() => SourceMode::Streaming,
            (_, Mode::Streaming { .. }) => SourceMode::Syncing,
            (_, Mode::Overflow { .. } | Mode::Lost) => SourceMode::Overflowed,
            (_, Mode::Stopped) => SourceMode::Connecting,
        };
        let hold = match self.spanning.status(source.vpg()) {
            Some(status) => status.hold,
            None => self.checkpointer.status(source.vpg()).unwrap_or_default().hold,
        };
        SourceVmStatus {
            vm: definition.id,
            name: definition.name.clone(),
            vpg: source.vpg(),
            target: definition.target.id,
            mode,
            connected: sender.phase == Phase::Streaming,
            generation: snapshot.generation.generation,
            last_sequence: snapshot.last_seq,
            durable_through: snapshot.freed_through,
            rpo: rpo_of(source, &snapshot),
            sync: source.sync_progress(),
            retained_bytes: snapshot.retained_bytes,
            retained_limit_bytes: snapshot.retained_limit_bytes,
            sent_bytes: sender.sent_bytes,
            hold,
            local_errors: snapshot.local_errors,
        }
    }
}

/// Why nothing is done in a group.
pub(super) fn paused(vpg: &VpgDefinition) -> ApiError {
    ApiError::new(ErrorCode::NotReady, format!("VPG \"{}\" is paused", vpg.name))
        .remedy(format!("`zvm vpg resume {}` lets it go on", vpg.name))
}

/// A VM that isn't protected because volumes are missing.
fn waiting_status(vpg: &VpgDefinition, vm: &VmDefinition) -> SourceVmStatus {
    SourceVmStatus {
        vm: vm.id,
        name: vm.name.clone(),
        vpg: vpg.id,
        target: vm.target.id,
        mode: SourceMode::WaitingForVolumes,
        connected: false,
        generation: GenerationId(uuid::Uuid::nil()),
        last_sequence: 0,
        durable_through: 0,
        rpo: Rpo::default(),
        sync: None,
        retained_bytes: 0,
        retained_limit_bytes: 0,
        sent_bytes: 0,
        hold: HoldTimes::default(),
        local_errors: 0,
    }
}

fn rpo_of(source: &LiveSource, snapshot: &SourceSnapshot) -> Rpo {
    let stages = source.sender().stages;
    let age_us = |since_us: Option<u64>| since_us.map_or(0, |since| TimeUs::now().0.saturating_sub(since));
    let capture_us = age_us(snapshot.uncaptured_since_us);
    Rpo {
        total_us: age_us(snapshot.oldest_time_us).max(capture_us),
        capture_us,
        queue_us: stages.queue_us,
        wire_us: stages.wire_us,
        target_memory_us: stages.memory_us,
        journal_disk_us: stages.disk_us,
    }
}

fn source_finding(source: &LiveSource, found: &mut Vec<Finding>) {
    let definition = source.definition();
    let snapshot = source.vm().snapshot();
    let sender = source.sender();
    let notes = source.notes();
    let mut add = |code, severity, message: String, remedy: &str| {
        found.push(Finding {
            code,
            severity,
            vm: Some(definition.id),
            vpg: Some(source.vpg()),
            message: format!("VM {}: {message}", definition.name),
            remedy: Some(remedy.to_owned()),
        });
    };
    match snapshot.mode {
        // It goes on when somebody wants it to.
        Mode::Overflow { .. } | Mode::Streaming { .. } if source.is_paused() => {}
        Mode::Overflow { reason: OverflowReason::Requested, .. } => {}
        Mode::Overflow { reason, .. } => add(
            "overflow",
            Severity::Critical,
            format!("writes are not captured: {reason}"),
            "let the target catch up: a full sync follows by itself; if it comes again, give memory.retained_per_vm_mib more",
        ),
        Mode::Lost => add(
            "capture-lost",
            Severity::Critical,
            "a thread of the VRA died while it captured".to_owned(),
            "restart the VRA",
        ),
        Mode::Streaming { .. } if snapshot.sync_id.is_some() => add(
            "full-sync",
            Severity::Warning,
            "a full sync runs: no checkpoint counts before its end".to_owned(),
            "wait for its end",
        ),
        Mode::Stopped | Mode::Streaming { .. } => {}
    }
    match (&sender.phase, &notes) {
        (Phase::Stopped(reason), _) if !reason.needs_new_generation() => add(
            "stream-refused",
            Severity::Critical,
            reason.to_string(),
            "decide which side is right; a new journal (another journal id in the definition) starts afresh",
        ),
        (Phase::Streaming, _) => {}
        _ if source.is_paused() => {}
        (_, notes) => {
            let refused = notes.refused.as_ref().map(|refuse| format!("the target refuses: {}", refuse.text));
            if let Some(reason) = refused.or_else(|| notes.disconnected.clone()) {
                add(
                    "not-connected",
                    Severity::Warning,
                    format!("no stream to the target: {reason}"),
                    "see to the target VRA and the network between: the VRA tries again by itself",
                );
            }
        }
    }
}

/// The protocol's form of a checkpoint just taken.
fn info_of(taken: &TakenCheckpoint, vpg: &VpgDefinition) -> CheckpointInfo {
    CheckpointInfo {
        id: id_of(taken),
        time_us: TimeUs(taken.time_us),
        kind: taken.kind.into(),
        tag: Some(taken.tag.clone()).filter(|tag| !tag.is_empty()),
        member_set_version: vpg.member_set_version,
        // The journals don't have it yet, and it is lost with this VRA's memory.
        complete: false,
        locked: false,
        partly_locked: false,
        vms: taken.members.iter().map(|member| CheckpointPlace { vm: member.vm, cut: member.cut }).collect(),
    }
}

fn id_of(taken: &TakenCheckpoint) -> CheckpointId {
    CheckpointId { nonce: taken.epoch.nonce.as_u128(), counter: taken.epoch.counter }
}
