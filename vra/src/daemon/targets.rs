//! Target VMs: their journals, as the definitions say, and the streams that fill them.

use std::collections::BTreeSet;
use std::sync::Arc;

use journal::recovery::OpenError;

use super::definition::is_in_datastore;
use super::state::State;
use super::{Daemon, Finding, lock};
use crate::api::status::TargetVmStatus;
use crate::api::{Alert, ApiError, ErrorCode, FormerVm, Severity, VmId, VpgDefinition};
use crate::link::Accepted;
use crate::receive::{FolderError, FormerFiles, TargetError};
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

    /// Makes this VRA a VM's target, and notes what is in the way.
    pub(super) async fn ensure_target(&self, vpg: &VpgDefinition, vm: VmId) -> Result<(), ApiError> {
        let ensured = self.targets.ensure(vpg, vm).await.map(drop);
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
        if failed.is_empty() {
            return;
        }
        let change = self.state.change().await;
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

    /// Ends this VRA's part as target of the VMs that a definition takes out of the one that is in force. To be called before it is: a VRA that
    /// dies meanwhile is told again, and one that was told does nothing when it starts.
    ///
    /// # Errors
    /// Views of such a VM are open, or its files can't be removed.
    pub(super) async fn let_go_of_former(
        &self,
        in_force: Option<&VpgDefinition>,
        definition: &VpgDefinition,
    ) -> Result<(), ApiError> {
        let known = in_force.map_or(0, |in_force| in_force.revision);
        let is_new = |former: &&FormerVm| former.target == self.vra && former.revision > known;
        let news: Vec<&FormerVm> = definition.former.iter().filter(is_new).collect();
        let shown =
            |former: &&&FormerVm| self.targets.has_open(former) && self.seen().has_views_of(former.id);
        if let Some(former) = news.iter().find(shown) {
            let message = format!(
                "VM {} can't be taken out of VPG \"{}\": views of it are open",
                former.name, definition.name
            );
            return Err(ApiError::new(ErrorCode::Busy, message).remedy("close them first"));
        }
        for former in news {
            let datastore = former.datastore.display();
            if !self.targets.has_open(former) && !is_in_datastore(former, &self.config.datastores) {
                tracing::warn!(vm = former.name, %datastore, "not in a datastore of this VRA any more: the VM's files, if there are any, stay");
                continue;
            }
            let files = self.targets.let_go(definition, former).await?;
            let told = match files {
                FormerFiles::Removed => "its files are removed",
                FormerFiles::Kept => "its files are set aside",
                FormerFiles::None => "it has no files here",
            };
            tracing::info!(vm = %former.id, name = former.name, vpg = definition.name, %datastore, "no longer a member: {told}");
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
