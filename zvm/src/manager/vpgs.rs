//! Groups: create, edit, show, delete.

use vra::api::{ApiError, ErrorCode};

use super::{Manager, changed_meanwhile, internal, spec};
use crate::api::{VpgDetails, VpgEdit, VpgSpec};
use crate::health;
use crate::model::event::{Entity, EventKind};
use crate::model::task::{Task, TaskKind};
use crate::model::vpg::{Removal, Vpg, VpgSettings, VpgState};
use crate::reconcile::Desired;
use crate::store::{self, StoreError};

impl Manager {
    /// Defines a group; the engine takes it to its VRAs.
    pub async fn create_vpg(&self, spec: VpgSpec) -> Result<Task, ApiError> {
        let desired = self.desired().await.map_err(internal)?;
        let vpg = self.prepare_vpg(&spec, &desired).await?;
        let task = self.new_task(TaskKind::CreateProtectionGroup, &vpg.name, Some(vpg.id), "defined");
        let save = async {
            let mut tx = self.store.begin().await?;
            store::vpgs::insert(&mut tx, &vpg).await?;
            store::tasks::insert(&mut tx, &task).await?;
            let description = format!("VPG {} was created with {} VMs", vpg.name, vpg.settings.vms.len());
            let kind = EventKind::CreateProtectionGroup;
            self.note(&mut tx, kind, true, Entity::vpg(vpg.id), description, Some(task.id)).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(|error| {
            if error.is_taken() {
                ApiError::new(ErrorCode::Conflict, format!("there is a VPG {:?} already", vpg.name))
            } else {
                internal(error)
            }
        })?;
        tracing::info!(vpg = %vpg.id, name = vpg.name, vms = vpg.settings.vms.len(), "a VPG was created");
        self.wake.notify_one();
        Ok(task)
    }

    /// A group as it would be created now.
    pub(super) async fn prepare_vpg(&self, spec: &VpgSpec, desired: &Desired) -> Result<Vpg, ApiError> {
        let inventory = self.inventory();
        let context = spec::Context { inventory: &inventory, vras: &desired.vras, vpgs: &desired.vpgs };
        let resolved = spec::resolve(spec, &context)?;
        let served = self.served_by(resolved.sources()).await?;
        resolved.into_vpg(&served, self.now_us())
    }

    /// Changes a group's settings; the engine takes them to its VRAs.
    pub async fn edit_vpg(&self, name: &str, edit: &VpgEdit) -> Result<VpgDetails, ApiError> {
        let vpg = self.find_vpg(name).await?;
        if vpg.state != VpgState::Active {
            return Err(ApiError::new(ErrorCode::Conflict, format!("VPG {name} is being deleted")));
        }
        let desired = self.desired().await.map_err(internal)?;
        let inventory = self.inventory();
        let context = spec::Context { inventory: &inventory, vras: &desired.vras, vpgs: &desired.vpgs };
        let settings = spec::edited(&vpg, edit, &context)?;
        spec::full_sync::check_change(&vpg.name, &vpg.settings, &settings, edit.give_up_history)?;
        let description = format!("VPG {} was changed", vpg.name);
        self.save_settings(&vpg, &settings, EventKind::EditProtectionGroup, description).await?;
        self.show_vpg(name).await
    }

    /// Notes other settings of a group, if they are others.
    pub(super) async fn save_settings(
        &self,
        vpg: &Vpg,
        settings: &VpgSettings,
        kind: EventKind,
        description: String,
    ) -> Result<(), ApiError> {
        if *settings == vpg.settings {
            return Ok(());
        }
        self.check_is_newest(vpg).await?;
        self.check_members_are_enrolled(vpg).await?;
        let save = async {
            let mut tx = self.store.begin().await?;
            let is_saved = store::vpgs::set_settings(&mut tx, vpg.id, vpg.revision, settings).await?;
            if is_saved {
                self.note(&mut tx, kind, true, Entity::vpg(vpg.id), description.clone(), None).await?;
                tx.commit().await?;
            }
            Ok::<_, StoreError>(is_saved)
        };
        if !save.await.map_err(internal)? {
            return Err(changed_meanwhile(vpg));
        }
        tracing::info!(vpg = %vpg.id, name = vpg.name, "{description}");
        self.wake.notify_one();
        Ok(())
    }

    /// A group, wanted and as it is.
    pub async fn show_vpg(&self, name: &str) -> Result<VpgDetails, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let desired = self.desired().await.map_err(internal)?;
        let report = health::report(&vpg, &desired.vras, &self.observed(), &desired.tests, self.now_us().0);
        Ok(VpgDetails { vpg, report: Some(report) })
    }

    /// Begins a group's deletion, or changes how one that was begun goes.
    pub async fn delete_vpg(&self, name: &str, keep_disks: bool, force: bool) -> Result<Task, ApiError> {
        let vpg = self.find_vpg(name).await?;
        if !force {
            self.check_is_newest(&vpg).await?;
        }
        let tests = self.desired().await.map_err(internal)?.tests;
        if tests.iter().any(|test| test.vpg == vpg.id) {
            return Err(ApiError::new(ErrorCode::Busy, format!("VPG {name} is being tested"))
                .remedy(format!("stop the test first: `zvm test stop {name}`")));
        }
        let removal = Removal { keep_disks, force };
        let task = self.new_task(TaskKind::RemoveProtectionGroup, &vpg.name, Some(vpg.id), "being removed");
        let save = async {
            let mut tx = self.store.begin().await?;
            let running =
                store::tasks::open_of(&mut tx, vpg.id, TaskKind::RemoveProtectionGroup).await?.pop();
            store::vpgs::set_removal(&mut tx, vpg.id, removal).await?;
            if let (Some(running), VpgState::Deleting) = (running, vpg.state) {
                tx.commit().await?;
                return Ok(running);
            }
            for kind in TaskKind::OF_DEFINITIONS {
                for open in store::tasks::open_of(&mut tx, vpg.id, kind).await? {
                    let (failed, now_us) = (crate::model::task::TaskState::Failed, self.now_us());
                    store::tasks::finish(&mut tx, open.id, failed, "the group was deleted meanwhile", now_us)
                        .await?;
                }
            }
            store::tasks::insert(&mut tx, &task).await?;
            let kind = EventKind::RemoveProtectionGroup;
            let description = format!("VPG {} is being deleted", vpg.name);
            self.note(&mut tx, kind, true, Entity::vpg(vpg.id), description, Some(task.id)).await?;
            tx.commit().await?;
            Ok::<_, StoreError>(task)
        };
        let task = save.await.map_err(internal)?;
        tracing::info!(vpg = %vpg.id, name = vpg.name, keep_disks, force, "a VPG is being deleted");
        self.wake.notify_one();
        Ok(task)
    }
}
