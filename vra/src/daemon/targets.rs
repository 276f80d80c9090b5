//! Target VMs: their journals, as the definitions say, and the streams that fill them.

use std::collections::BTreeSet;
use std::sync::Arc;

use journal::recovery::OpenError;

use super::state::{LettingGo, State};
use super::{Daemon, Finding, lock};
use crate::api::status::TargetVmStatus;
use crate::api::{Alert, ApiError, ErrorCode, Severity, VmId, VpgDefinition};
use crate::link::Accepted;
use crate::receive::{FolderError, Prepared, TargetError};
use crate::report::chain;

impl Daemon {
    /// Opens, or makes, the journals of the VMs that this VRA is target of, and closes those of others. Does all that it can.
    ///
    /// # Errors
    /// The last of what failed; it is tried again by itself, and shows as an alert until then.
    pub(super) async fn follow_targets(&self, state: &State) -> Result<(), ApiError> {
        let mut wanted = BTreeSet::new();
        let mut result = Ok(());
        for vpg in state.vpgs.values() {
            for vm in vpg.vms.iter().filter(|vm| vm.target.id == self.vra) {
                wanted.insert(vm.id);
                if let Err(error) = self.ensure_target(vpg, vm.id).await {
                    result = Err(error);
                }
            }
        }
        for vm in self.targets.vms() {
            if !wanted.contains(&vm.id()) {
                self.targets.close(vm.id()).await?;
            }
        }
        lock(&self.target_problems).retain(|vm, _| wanted.contains(vm));
        lock(&self.awaiting_keys).retain(|vm| wanted.contains(vm));
        result
    }

    /// Reserves what a definition takes for all VMs that this VRA is target of, and leaves everything as it is. What isn't used is given back.
    ///
    /// # Errors
    /// What one VM can't have, with its name; then the definition must not come into force.
    pub(super) async fn prepare_targets(
        &self,
        state: &State,
        definition: &VpgDefinition,
        leaving: &[LettingGo],
    ) -> Result<Vec<Prepared>, ApiError> {
        let mut prepared = Vec::new();
        for vm in definition.vms.iter().filter(|vm| vm.target.id == self.vra) {
            let awaits_former =
                state.letting_go.iter().chain(leaving).any(|leaving| leaving.former.id == vm.id);
            let one = self.targets.prepare(definition, vm.id, awaits_former).await;
            prepared.push(one.map_err(|error| {
                let mut error = ApiError::from(error);
                error.message = format!("VM {}: {}", vm.name, error.message);
                error
            })?);
        }
        Ok(prepared)
    }

    /// Makes this VRA a VM's target with what was prepared, and notes what is in the way.
    pub(super) async fn take_target(&self, vpg: &VpgDefinition, prepared: Prepared) {
        let vm = prepared.vm();
        let taken = self.targets.take(vpg, prepared).await;
        // What is in the way was noted, and is tried again.
        let _ = self.note_ensured(vm, taken.map(drop));
    }

    /// Makes this VRA a VM's target, and notes what is in the way.
    async fn ensure_target(&self, vpg: &VpgDefinition, vm: VmId) -> Result<(), ApiError> {
        let ensured = self.targets.ensure(vpg, vm).await.map(drop);
        self.note_ensured(vm, ensured)
    }

    fn note_ensured(&self, vm: VmId, ensured: Result<(), TargetError>) -> Result<(), ApiError> {
        let awaits_key = matches!(
            &ensured,
            Err(TargetError::NoSiteKey | TargetError::Journal { source: OpenError::Key(_), .. })
        );
        {
            let mut awaiting = lock(&self.awaiting_keys);
            if awaits_key {
                awaiting.insert(vm)
            } else {
                awaiting.remove(&vm)
            };
        }
        let ensured = ensured.map_err(ApiError::from);
        let mut problems = lock(&self.target_problems);
        match &ensured {
            Ok(()) => {
                problems.remove(&vm);
            }
            Err(error) => {
                problems.insert(vm, error.clone());
            }
        }
        ensured
    }

    /// Tries again what failed.
    pub(super) async fn retry_targets(&self) {
        let failed: Vec<VmId> = lock(&self.target_problems).keys().copied().collect();
        if failed.is_empty() && self.seen().letting_go.is_empty() {
            return;
        }
        let mut change = self.state.change().await;
        self.let_go_of_former(&mut change).await;
        for vm in failed {
            if let Some(vpg) = change.get().vpg_of(vm) {
                // What is still in the way was noted.
                let _ = self.ensure_target(vpg, vm).await;
            }
        }
    }

    /// Ends this VRA's part as a target of a VPG.
    pub(super) async fn remove_targets(&self, vpg: &VpgDefinition, keep_files: bool) -> Result<(), ApiError> {
        for vm in vpg.vms.iter().filter(|vm| vm.target.id == self.vra) {
            let removed = if keep_files {
                self.targets.close(vm.id).await.map(drop)
            } else {
                self.targets.delete(vm.id).await
            };
            match removed {
                Ok(()) => {}
                Err(TargetError::UnknownVm(_)) if keep_files => {}
                Err(TargetError::UnknownVm(_)) => {
                    tracing::warn!(vm = vm.name, datastore = %vm.datastore.display(), "the journal couldn't be opened: its files, if there are any, stay");
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes a stream that another VRA opened for a VM's data.
    pub(super) fn take_data_stream(&self, stream: Accepted) {
        let Some(source) = stream.peer.identity.as_vra() else { return };
        let targets = Arc::clone(&self.targets);
        tokio::spawn(async move { targets.serve(source, stream.send, stream.recv).await });
    }

    /// Target VMs, by name.
    pub(super) fn target_statuses(&self) -> Vec<TargetVmStatus> {
        let mut statuses: Vec<_> = self.targets.vms().iter().map(|vm| vm.status()).collect();
        statuses.sort_by(|a, b| (&a.name, a.vm).cmp(&(&b.name, b.vm)));
        statuses
    }

    /// What the targets say is wrong.
    pub(super) fn target_alerts(&self) -> Vec<Alert> {
        self.targets.vms().iter().flat_map(|vm| vm.alerts()).collect()
    }

    /// Journals that can't be opened.
    pub(super) fn target_findings(&self, found: &mut Vec<Finding>) {
        for (vm, error) in lock(&self.target_problems).iter() {
            found.push(Finding {
                code: "journal-not-open",
                severity: Severity::Critical,
                vm: Some(*vm),
                vpg: None,
                message: error.message.clone(),
                remedy: Some("the VRA tries again by itself once that is mended".to_owned()),
            });
        }
        self.former_findings(found);
    }
}

impl From<TargetError> for ApiError {
    fn from(error: TargetError) -> Self {
        let code = match &error {
            TargetError::Folder(folder) => match folder {
                FolderError::NoDatastore { .. } => ErrorCode::NotFound,
                FolderError::ReadOnly { .. } | FolderError::Permission { .. } => ErrorCode::PermissionDenied,
                FolderError::NoSpace { .. } | FolderError::Full { .. } => ErrorCode::Exhausted,
                FolderError::OrphanDisks { .. } => ErrorCode::Conflict,
                _ => ErrorCode::Io,
            },
            TargetError::NoSiteKey | TargetError::Journal { source: OpenError::Key(_), .. } => {
                ErrorCode::NotReady
            }
            TargetError::Journal { .. }
            | TargetError::Segment { .. }
            | TargetError::Manifest { .. }
            | TargetError::NoManifest { .. }
            | TargetError::DiskCut { .. } => ErrorCode::Corrupt,
            TargetError::JournalDiffers { .. }
            | TargetError::VolumesDiffer { .. }
            | TargetError::VolumeShrunk { .. }
            | TargetError::VolumeLacking { .. }
            | TargetError::SiteKeyMissing { .. } => ErrorCode::Conflict,
            TargetError::JournalLimit { .. } | TargetError::Definition(_) => ErrorCode::BadRequest,
            TargetError::NotOpen { .. } | TargetError::NoCheckpoint { .. } => ErrorCode::NotReady,
            TargetError::UnknownVm(_) | TargetError::NoSuchCheckpoint { .. } | TargetError::View(_) => {
                ErrorCode::NotFound
            }
            TargetError::InUse { .. } => ErrorCode::Busy,
            TargetError::TooManyLocks { .. } | TargetError::ViewMemory { .. } => ErrorCode::Exhausted,
            _ => ErrorCode::Io,
        };
        let api = Self::new(code, chain(&error));
        match error {
            TargetError::ViewMemory { .. } => {
                api.remedy("close views, or raise `target.views_memory_mib` in the VRA's configuration")
            }
            _ => api,
        }
    }
}
