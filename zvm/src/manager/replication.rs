//! A group's replication: paused, resumed, begun anew.

use std::collections::BTreeSet;

use vra::api::{ApiError, ErrorCode, ForceSync, Request, VmId, VraId};

use super::spec::{find_member, full_sync};
use super::{Manager, internal};
use crate::api::VpgDetails;
use crate::model::event::{Entity, EventKind};
use crate::model::task::{Task, TaskKind, TaskState};
use crate::model::vpg::{Member, Vpg, VpgSettings, VpgState};
use crate::store::{self, StoreError};

impl Manager {
    /// Pauses a group's replication, or lets it go on; the engine tells its VRAs. Again is harmless.
    pub async fn pause_vpg(&self, name: &str, paused: bool) -> Result<VpgDetails, ApiError> {
        let vpg = self.find_vpg(name).await?;
        if vpg.state != VpgState::Active {
            return Err(ApiError::new(ErrorCode::Conflict, format!("VPG {name} is being deleted")));
        }
        let (kind, what) = match paused {
            true => (EventKind::PauseProtectionGroup, "was paused"),
            false => (EventKind::ResumeProtectionGroup, "goes on"),
        };
        let settings = VpgSettings { paused, ..vpg.settings.clone() };
        self.save_settings(&vpg, &settings, kind, format!("replication of VPG {} {what}", vpg.name)).await?;
        self.show_vpg(name).await
    }
    /// Begins full syncs of a group's VMs, or of one of them, at their sources. Those of several sources begin one after the other: if one
    /// refuses, the error says where they have begun.
    pub async fn force_sync(
        &self,
        name: &str,
        vm: Option<&str>,
        give_up_history: bool,
    ) -> Result<Task, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let meant = meant(&vpg, vm)?;
        full_sync::check(&vpg.name, &meant, &vpg.settings, give_up_history)?;
        let vras = self.desired().await.map_err(internal)?.vras;
        let mut begun: Vec<String> = Vec::new();
        let mut result = Ok(());
        for source in meant.iter().map(|member| member.source).collect::<BTreeSet<VraId>>() {
            let vm: Option<VmId> = vm.and_then(|_| meant.first()).map(|member| member.vm);
            let told = match vras.get(&source) {
                Some(vra) => {
                    let request = Request::ForceSync(ForceSync { vpg: vpg.id, vm });
                    let answer = self.remote.call(&vra.endpoint(), request, self.request_timeout()).await;
                    answer.map(|_| vra.name.clone()).map_err(|error| error.into_api_error(&vra.name))
                }
                None => {
                    let message = format!("source VRA {source} of VPG {} is revoked", vpg.name);
                    Err(ApiError::new(ErrorCode::NotReady, message))
                }
            };
            match told {
                Ok(vra) => begun.push(vra),
                Err(mut error) => {
                    if !begun.is_empty() {
                        error.message += &format!("; at VRA {} they have begun", begun.join(", "));
                    }
                    result = Err(error);
                    break;
                }
            }
        }
        let names: Vec<&str> = meant.iter().map(|member| member.name.as_str()).collect();
        let of = format!("of VM {} of VPG {}", names.join(", "), vpg.name);
        let description = match &result {
            Ok(()) => format!("a full sync {of} has begun"),
            Err(error) => format!("a full sync {of} could not begin: {error}"),
        };
        let mut task = self.new_task(TaskKind::InitFullSync, &vpg.name, Some(vpg.id), &description);
        task.completed_us = Some(task.started_us);
        (task.state, task.progress_percent) = match &result {
            Ok(()) => (TaskState::Completed, 100),
            Err(_) => (TaskState::Failed, 0),
        };
        let save = async {
            let mut tx = self.store.begin().await?;
            store::tasks::insert(&mut tx, &task).await?;
            let (kind, entity) = (EventKind::InitFullSync, Entity::vpg(vpg.id));
            self.note(&mut tx, kind, result.is_ok(), entity, description, Some(task.id)).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        result.map(|()| task)
    }
}

/// The VMs of a group that a full sync is for.
fn meant<'a>(vpg: &'a Vpg, vm: Option<&str>) -> Result<Vec<&'a Member>, ApiError> {
    if vpg.state != VpgState::Active {
        return Err(ApiError::new(ErrorCode::Conflict, format!("VPG {} is being deleted", vpg.name)));
    }
    if vpg.settings.paused {
        return Err(ApiError::new(ErrorCode::NotReady, format!("VPG {} is paused", vpg.name))
            .remedy(format!("`zvm vpg resume {}` lets it go on", vpg.name)));
    }
    match vm {
        Some(vm) => Ok(vec![find_member(vpg, vm)?]),
        None => Ok(vpg.settings.vms.iter().collect()),
    }
}
