//! VPGs: takes definitions and makes sources and targets follow them.

use std::ops::Bound;

use super::Daemon;
use super::definition::check;
use super::growth::defined_bytes;
use super::state::{Change, LettingGo, State};
use crate::api::vpg::{VmDefinition, VpgApplied};
use crate::api::{
    ApiError, DefinitionPage, ErrorCode, ListDefinitions, MAX_PAGE_BYTES, MAX_VMS_PER_DEFINITION_PAGE,
    RemoveVpg, VolumeId, VpgDefinition, VpgId, message_bytes,
};
use crate::receive::Prepared;

/// What a definition that isn't in force yet brings about here.
struct Ready {
    /// VMs that leave.
    leaving: Vec<LettingGo>,
    /// What its VMs take, reserved.
    prepared: Vec<Prepared>,
}

impl Daemon {
    /// Takes a definition, new or changed, for all of the VPG's VMs here or for none.
    ///
    /// # Errors
    /// Why it is refused, with the VM that it is refused for: all go on as they were.
    pub(super) async fn apply_vpg(&self, definition: VpgDefinition) -> Result<VpgApplied, ApiError> {
        let mut change = self.state.change().await;
        if let Some(Ready { leaving, prepared }) = self.ready(change.get(), &definition).await? {
            let (vpg, name, revision) = (definition.id, &definition.name, definition.revision);
            change.update(|state| {
                state.vpgs.insert(vpg, definition.clone());
                state.letting_go.extend(leaving);
            })?;
            tracing::info!(%vpg, name, revision, "took a definition");
            self.let_go_of_former(&mut change).await;
            for prepared in prepared {
                self.take_target(&definition, prepared).await;
            }
        }
        // It is in force. What is in the way of targets is tried again by itself, and is an alert; sources are tried again with the next request.
        let sources = self.follow_sources(change.get());
        if let Err(error) = self.follow_targets(change.get()).await {
            tracing::warn!(name = definition.name, %error, "can't follow all definitions yet");
        }
        sources?;
        Ok(self.applied(change.get(), &definition))
    }

    /// Whether a definition would be taken now.
    ///
    /// # Errors
    /// Why it would be refused.
    pub(super) async fn check_vpg(&self, definition: &VpgDefinition) -> Result<(), ApiError> {
        let change = self.state.change().await;
        self.ready(change.get(), definition).await.map(drop)
    }

    /// All that can be refused of a definition is, and what it takes is reserved, before anything of it is in force for any VM. None if it is in
    /// force.
    async fn ready(&self, state: &State, definition: &VpgDefinition) -> Result<Option<Ready>, ApiError> {
        check(definition, self.vra, &self.config.datastores)?;
        let has_left = definition.former.iter().any(|former| former.target == self.vra);
        if !definition.has_member_at(self.vra) && !has_left {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("VRA {} has no part in VPG \"{}\"", self.vra, definition.name),
            ));
        }
        check_against(state, definition)?;
        for vm in definition.vms.iter().filter(|vm| vm.source.id == self.vra) {
            self.check_volumes(state, vm)?;
        }
        if state.vpgs.get(&definition.id) == Some(definition) {
            return Ok(None);
        }
        let leaving = self.leaving_with(state, definition)?;
        let prepared = self.prepare_targets(state, definition, &leaving).await?;
        Ok(Some(Ready { leaving, prepared }))
    }

    /// What is attached must be what the definition says, or have grown to that.
    fn check_volumes(&self, state: &State, vm: &VmDefinition) -> Result<(), ApiError> {
        for defined in vm.volumes.iter().filter(|volume| !volume.left) {
            let Some(attached) = state.volumes.get(&defined.id) else { continue };
            let differs = if attached.vm != vm.id {
                Some(("VM", attached.vm.to_string(), vm.id.to_string()))
            } else if attached.number != defined.number {
                Some(("number", attached.number.to_string(), defined.number.to_string()))
            } else if attached.size_bytes != defined.size_bytes
                && defined_bytes(state, defined.id) != defined.size_bytes
                && (attached.size_bytes > defined.size_bytes
                    || self.grown_bytes(defined.id) < defined.size_bytes)
            {
                Some(("size in bytes", attached.size_bytes.to_string(), defined.size_bytes.to_string()))
            } else if attached.logical_block_bytes != defined.logical_block_bytes {
                let sizes =
                    (attached.logical_block_bytes.to_string(), defined.logical_block_bytes.to_string());
                Some(("block size", sizes.0, sizes.1))
            } else {
                None
            };
            if let Some((what, is, should_be)) = differs {
                return Err(ApiError::new(
                    ErrorCode::Conflict,
                    format!(
                        "volume {} ({}) of VM {} has another {what}: it is {is}, the definition says {should_be}",
                        defined.id,
                        attached.path.display(),
                        vm.name
                    ),
                )
                .remedy("make the definition from the VRA's list of volumes"));
            }
        }
        Ok(())
    }

    /// A page of the definitions in force.
    pub(super) fn list_definitions(&self, list: ListDefinitions) -> DefinitionPage {
        let seen = self.seen();
        let after = list.after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = seen.vpgs.range((after, Bound::Unbounded)).map(|(_, vpg)| vpg).peekable();
        let (mut vpgs, mut vms, mut bytes) = (Vec::<VpgDefinition>::new(), 0, 0);
        while let Some(vpg) = rest.next_if(|vpg| {
            vms += vpg.vms.len();
            bytes += message_bytes(*vpg);
            vms == vpg.vms.len() || vms <= MAX_VMS_PER_DEFINITION_PAGE && bytes <= MAX_PAGE_BYTES
        }) {
            vpgs.push(vpg.clone());
        }
        let next = rest.peek().and_then(|_| vpgs.last()).map(|last| last.id);
        DefinitionPage { vpgs, next, trust: seen.trust.clone() }
    }

    /// Ends a VPG here.
    pub(super) async fn remove_vpg(&self, remove: RemoveVpg) -> Result<(), ApiError> {
        let mut change = self.state.change().await;
        let Some(definition) = change.get().vpgs.get(&remove.vpg).cloned() else { return Ok(()) };
        if self.has_views_of(remove.vpg) {
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!("views of VPG \"{}\" are open", definition.name),
            )
            .remedy("close them first"));
        }
        self.remove_targets(&definition, remove.keep_files).await?;
        change.update(|state| state.vpgs.remove(&remove.vpg))?;
        self.follow_definitions(&mut change).await?;
        tracing::info!(vpg = %remove.vpg, name = definition.name, keep_files = remove.keep_files, "removed");
        Ok(())
    }

    /// Makes sources and targets follow the definitions.
    pub(super) async fn follow_definitions(&self, change: &mut Change<'_>) -> Result<(), ApiError> {
        self.let_go_of_former(change).await;
        let sources = self.follow_sources(change.get());
        self.follow_targets(change.get()).await.and(sources)
    }

    /// The VPG of that id.
    pub(super) fn vpg(&self, id: VpgId) -> Result<VpgDefinition, ApiError> {
        self.seen().vpgs.get(&id).cloned().ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("no VPG {id} here")).remedy("see `vra status`")
        })
    }

    fn applied(&self, state: &State, definition: &VpgDefinition) -> VpgApplied {
        let source = definition.vms.iter().filter(|vm| vm.source.id == self.vra);
        let target = definition.vms.iter().filter(|vm| vm.target.id == self.vra);
        VpgApplied {
            vpg: definition.id,
            revision: definition.revision,
            missing_volumes: source.clone().flat_map(|vm| missing_volumes(state, vm)).collect(),
            source_vms: source.map(|vm| vm.id).collect(),
            target_vms: target.map(|vm| vm.id).collect(),
        }
    }
}

/// Volumes of a source VM that are not attached.
pub(super) fn missing_volumes(state: &State, vm: &VmDefinition) -> Vec<VolumeId> {
    let ids = vm.volumes.iter().filter(|volume| !volume.left).map(|volume| volume.id);
    ids.filter(|id| !state.volumes.contains_key(id)).collect()
}

fn check_against(state: &State, definition: &VpgDefinition) -> Result<(), ApiError> {
    if let Some(present) = state.vpgs.get(&definition.id) {
        if definition.revision < present.revision {
            return Err(ApiError::new(
                ErrorCode::Stale,
                format!(
                    "revision {} of VPG \"{}\" is older than {}, which is in force",
                    definition.revision, definition.name, present.revision
                ),
            ));
        }
        if definition.revision == present.revision && definition != present {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "another definition of VPG \"{}\" has revision {}",
                    definition.name, definition.revision
                ),
            )
            .remedy("raise the revision with every change"));
        }
    }
    for vm in &definition.vms {
        if let Some(other) = state.vpg_of(vm.id).filter(|other| other.id != definition.id) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("VM {} is in VPG \"{}\" already", vm.name, other.name),
            )
            .remedy("take it out of that VPG first"));
        }
    }
    Ok(())
}
