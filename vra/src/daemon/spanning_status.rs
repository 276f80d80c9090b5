//! What status, alerts and requests say of checkpoints that span hosts.

use journal::batch::CheckpointKind;

use super::{Daemon, Finding};
use crate::api::status::{LastCheckpoint, VpgStatus};
use crate::api::vpg::CheckpointPlace;
use crate::api::{
    ApiError, CheckpointId, CheckpointInfo, ErrorCode, Severity, TagCheckpoint, TimeUs, VpgDefinition, VraId,
};
use crate::checkpoint::hosts::{EpochFailure, SpanningStatus, TakenByHosts};

/// So many attempts without a checkpoint in a row are an alert.
const ABORTED_IN_ROW: u64 = 3;

impl Daemon {
    /// Makes a checkpoint of a VPG that spans hosts and names it.
    pub(super) async fn tag_spanning(
        &self,
        vpg: &VpgDefinition,
        tag: &TagCheckpoint,
    ) -> Result<CheckpointInfo, ApiError> {
        let kind = if tag.application { CheckpointKind::Application } else { CheckpointKind::Tagged };
        let taken = self.spanning.take(vpg.id, kind, &tag.tag).await;
        taken.map(|taken| info_of(&taken, vpg)).map_err(|failure| {
            let message =
                format!("no checkpoint of VPG \"{}\" could be made: {}", vpg.name, told(&failure, vpg));
            ApiError::new(ErrorCode::NotReady, message).remedy(remedy_of(&failure))
        })
    }

    /// What is wrong with checkpoints that this VRA is to coordinate.
    pub(super) fn spanning_findings(&self, found: &mut Vec<Finding>) {
        let seen = self.seen();
        for vpg in seen.vpgs.values() {
            let Some(status) = self.spanning.status(vpg.id) else { continue };
            if status.coordinator == Some(self.vra) {
                found.extend(finding_of(vpg, &status));
            }
        }
    }
}

/// A VPG that spans hosts as this VRA sees it.
pub(super) fn status_of(vpg: &VpgDefinition, status: SpanningStatus) -> VpgStatus {
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
        coordinator: status.coordinator,
        missing: status.missing,
        last_failure: status.last_failure.map(|failure| told(&failure, vpg)),
        hold: status.hold,
    }
}

fn finding_of(vpg: &VpgDefinition, status: &SpanningStatus) -> Option<Finding> {
    let (code, severity, message, remedy) = if !status.missing.is_empty() {
        let missing: Vec<String> = status.missing.iter().map(|vra| name_of(*vra, vpg)).collect();
        let message =
            format!("VPG \"{}\" gets no checkpoints: no answer from {}", vpg.name, missing.join("; "));
        let remedy = "see to that VRA and the network between: checkpoints go on by themselves";
        ("group-member-missing", Severity::Critical, message, remedy)
    } else if status.aborted_in_row >= ABORTED_IN_ROW {
        let failure = status.last_failure.as_ref()?;
        let message = format!(
            "VPG \"{}\": the last {} attempts gave no checkpoint, it is tried every {} s: {}",
            vpg.name,
            status.aborted_in_row,
            status.interval_us.div_ceil(1_000_000),
            told(failure, vpg)
        );
        ("group-not-checkpointed", Severity::Warning, message, remedy_of(failure))
    } else {
        return None;
    };
    let remedy = Some(remedy.to_owned());
    Some(Finding { code, severity, vm: None, vpg: Some(vpg.id), message, remedy })
}

/// The VRA and its VMs by name.
fn name_of(vra: VraId, vpg: &VpgDefinition) -> String {
    let vms = vpg.vms.iter().filter(|vm| vm.source.id == vra);
    let names: Vec<&str> = vms.map(|vm| vm.name.as_str()).collect();
    format!("VRA {vra} with VM {}", names.join(", "))
}

/// A failure, with the names of the VMs that it is about.
fn told(failure: &EpochFailure, vpg: &VpgDefinition) -> String {
    let vra = match failure {
        EpochFailure::Missing { vra }
        | EpochFailure::Late { vra, .. }
        | EpochFailure::OtherVms { vra }
        | EpochFailure::NotRecorded { vra, .. }
        | EpochFailure::Unconfirmed { vra } => *vra,
        EpochFailure::Declined { vra, vm, .. } => {
            let named = vm.and_then(|vm| vpg.vms.iter().find(|defined| defined.id == vm));
            match named {
                Some(vm) => return format!("{failure} (VM {})", vm.name),
                None => *vra,
            }
        }
        EpochFailure::Changed | EpochFailure::TooMany => return failure.to_string(),
    };
    format!("{failure} ({})", name_of(vra, vpg))
}

fn remedy_of(failure: &EpochFailure) -> &'static str {
    match failure {
        EpochFailure::Missing { .. } | EpochFailure::Late { .. } | EpochFailure::Unconfirmed { .. } => {
            "see to that VRA and the network between; a longer hold deadline lets slower answers count (`zvm vpg edit --hold-deadline`)"
        }
        EpochFailure::NotRecorded { .. } => {
            "a longer hold deadline lets slower answers count (`zvm vpg edit --hold-deadline`)"
        }
        EpochFailure::Declined { .. } => "wait until every VM streams (`vra status` at that VRA)",
        EpochFailure::OtherVms { .. } | EpochFailure::Changed => {
            "wait until every VRA of the VPG has its newest definition"
        }
        EpochFailure::TooMany => "wait for those that were asked for",
    }
}

fn info_of(taken: &TakenByHosts, vpg: &VpgDefinition) -> CheckpointInfo {
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

fn id_of(taken: &TakenByHosts) -> CheckpointId {
    CheckpointId { nonce: taken.epoch.nonce.as_u128(), counter: taken.epoch.counter }
}
