//! VRAs: list, show, revoke, move.

use vra::api::{ApiError, ErrorCode};

use super::{Manager, internal};
use crate::api::{VraDetails, VraState as VraStateShown};
use crate::model::event::{Entity, EventKind};
use crate::model::task::{Task, TaskKind, TaskState};
use crate::model::vpg::Vpg;
use crate::model::vra::{Vra, VraState};
use crate::reconcile::{Observed, newer_at};
use crate::store::{self, StoreError};

impl Manager {
    /// All VRAs, enrolled ones first.
    pub async fn list_vras(&self) -> Result<Vec<VraStateShown>, ApiError> {
        let vras =
            store::vras::list(&mut *self.store.read().await.map_err(internal)?).await.map_err(internal)?;
        let observed = self.observed();
        Ok(vras.into_iter().map(|vra| shown(vra, &observed)).collect())
    }

    /// One VRA with its last answer.
    pub async fn show_vra(&self, name: &str) -> Result<VraDetails, ApiError> {
        let vra = self.find_vra(name).await?;
        let observed = self.observed();
        let status =
            observed.get(&vra.id).and_then(|seen| seen.last.as_ref()).map(|last| last.status.clone());
        Ok(VraDetails { state: shown(vra, &observed), status })
    }

    /// Revokes all certificates of a VRA; all other VRAs are told.
    pub async fn revoke_vra(&self, name: &str, force: bool) -> Result<Task, ApiError> {
        let vra = self.find_vra(name).await?;
        if vra.state == VraState::Revoked {
            return Err(ApiError::new(ErrorCode::Conflict, format!("VRA {name} is revoked already")));
        }
        let vpgs =
            store::vpgs::list(&mut *self.store.read().await.map_err(internal)?).await.map_err(internal)?;
        if let Some(vpg) = vpgs.iter().find(|vpg| vpg.vras().contains(&vra.id))
            && !force
        {
            let message = format!("VPG {} uses VRA {name}: its protection would end", vpg.name);
            return Err(ApiError::new(ErrorCode::Busy, message).remedy(
                "delete the group first, or revoke with --force if the VRA's key is in wrong hands",
            ));
        }
        let now_us = self.now_us();
        let mut task =
            self.new_task(TaskKind::UninstallVra, &vra.name, None, "revoked; other VRAs are being told");
        task.state = TaskState::Completed;
        task.progress_percent = 100;
        task.completed_us = Some(now_us);
        let save = async {
            let mut tx = self.store.begin().await?;
            store::vras::revoke(&mut tx, vra.id, now_us).await?;
            store::certificates::revoke_all(&mut tx, vra.id, now_us).await?;
            store::leftovers::delete_of_vra(&mut tx, vra.id).await?;
            store::site::raise_trust_version(&mut tx).await?;
            store::tasks::insert(&mut tx, &task).await?;
            let description = format!("VRA {} ({}) was revoked", vra.name, vra.id);
            self.note(
                &mut tx,
                EventKind::UninstallVra,
                true,
                Entity::vra(vra.id),
                description,
                Some(task.id),
            )
            .await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        tracing::warn!(vra = %vra.id, name = vra.name, "a VRA was revoked");
        self.remote.forget(vra.id);
        self.wake.notify_one();
        Ok(task)
    }

    /// Changes where a VRA is reached; definitions that name it go out again.
    pub async fn set_vra_address(&self, name: &str, address: &str) -> Result<VraDetails, ApiError> {
        let vra = self.find_vra(name).await?;
        let valid = address.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && host.len() <= 255 && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if !valid {
            return Err(ApiError::new(ErrorCode::BadRequest, format!("{address:?} is not host:port")));
        }
        let observed = self.observed();
        // One that is adopted gets the address then.
        let is_newest = |vpg: &Vpg| newer_at(vpg, &observed).is_empty();
        let save = async {
            let mut tx = self.store.begin().await?;
            store::vras::set_address(&mut tx, vra.id, address).await?;
            store::vpgs::raise_revisions_at(&mut tx, vra.id, is_newest).await?;
            let description = format!("VRA {} is reached at {address} from now on", vra.name);
            self.note(&mut tx, EventKind::AddressChanged, true, Entity::vra(vra.id), description, None)
                .await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        self.wake.notify_one();
        self.show_vra(name).await
    }
}

/// A VRA beside what was seen of it.
pub(super) fn shown(vra: Vra, observed: &Observed) -> VraStateShown {
    let seen = observed.get(&vra.id);
    let status = seen.and_then(|seen| seen.last.as_ref()).map(|last| &last.status);
    VraStateShown {
        reachable: seen.is_some_and(|seen| seen.reachable),
        error: seen.and_then(|seen| seen.error.clone()),
        source_vms: status.map_or(0, |status| status.source_vms.len()),
        target_vms: status.map_or(0, |status| status.target_vms.len()),
        vra,
    }
}
