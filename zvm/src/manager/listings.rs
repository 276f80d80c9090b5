//! What can be looked at: status, inventory, tasks, events, alerts.

use uuid::Uuid;
use vra::api::{ApiError, ErrorCode};

use super::inventory_watch::SourceReading;
use super::spec::find_vm;
use super::{Manager, internal, vras};
use crate::api::{InventoryState, MAX_LIST, PlannedVm, SourceState, Status};
use crate::model::alert::Alert;
use crate::model::event::Event;
use crate::model::task::Task;
use crate::store;

impl Manager {
    /// The whole at a glance.
    pub async fn status(&self) -> Result<Status, ApiError> {
        let desired = self.desired().await.map_err(internal)?;
        let observed = self.observed();
        let alerts = self.list_alerts(false, MAX_LIST).await?;
        Ok(Status {
            site: self.site_name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            now_us: self.now_us(),
            vpgs: self.reports(&desired, &observed),
            vras: desired.vras.into_values().map(|vra| vras::shown(vra, &observed)).collect(),
            alerts,
            passes: self.passes(),
        })
    }

    /// The inventory in force.
    pub fn show_inventory(&self) -> InventoryState {
        let known = self.known();
        let state = |(name, reading): (&String, &SourceReading)| SourceState {
            name: name.clone(),
            from: reading.from.clone(),
            read_us: reading.read_us,
            error: reading.error.clone(),
        };
        InventoryState {
            sources: known.readings.iter().map(state).collect(),
            inventory: known.world.inventory().as_ref().clone(),
        }
    }

    /// What protecting VMs would take, by how much they write; none named: all.
    pub fn plan(&self, vms: &[String], history_s: u64) -> Result<Vec<PlannedVm>, ApiError> {
        let inventory = self.inventory();
        let named = vms.iter().map(|name| find_vm(&inventory, name)).collect::<Result<Vec<_>, _>>()?;
        let chosen = if named.is_empty() { inventory.vms.iter().collect() } else { named };
        let known = self.known();
        let planned = chosen.into_iter().map(|vm| {
            let rate = known.rates.of(vm.uuid);
            PlannedVm {
                vm: vm.name.clone(),
                uuid: vm.uuid,
                host: vm.host.clone(),
                disks_bytes: vm.disks.iter().filter_map(|disk| disk.size_bytes).fold(0, u64::saturating_add),
                demand: rate.map(|rate| rate.demand(history_s)),
                rate,
            }
        });
        Ok(planned.collect())
    }

    /// The newest tasks.
    pub async fn list_tasks(&self, limit: u32) -> Result<Vec<Task>, ApiError> {
        let mut db = self.store.read().await.map_err(internal)?;
        store::tasks::list(&mut db, limit.min(MAX_LIST)).await.map_err(internal)
    }

    /// One task.
    pub async fn show_task(&self, task: Uuid) -> Result<Task, ApiError> {
        let mut db = self.store.read().await.map_err(internal)?;
        store::tasks::get(&mut db, task).await.map_err(internal)?.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("there is no task {task}"))
                .remedy("`zvm task list` shows those that are remembered")
        })
    }

    /// The newest events.
    pub async fn list_events(&self, limit: u32) -> Result<Vec<Event>, ApiError> {
        let mut db = self.store.read().await.map_err(internal)?;
        store::events::list(&mut db, limit.min(MAX_LIST)).await.map_err(internal)
    }

    /// Alerts that last; with `all` the newest, over or not.
    pub async fn list_alerts(&self, all: bool, limit: u32) -> Result<Vec<Alert>, ApiError> {
        let mut db = self.store.read().await.map_err(internal)?;
        let alerts = if all {
            store::alerts::list(&mut db, limit.min(MAX_LIST)).await
        } else {
            store::alerts::open(&mut db).await
        };
        let mut alerts = alerts.map_err(internal)?;
        alerts.truncate(limit as usize);
        Ok(alerts)
    }
}
