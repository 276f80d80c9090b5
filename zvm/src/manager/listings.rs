//! What can be looked at: status, inventory, tasks, events, alerts.

use uuid::Uuid;
use vra::api::{ApiError, ErrorCode};

use super::{Manager, internal, vras};
use crate::api::{InventoryState, MAX_LIST, Status};
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
        let reading = self.inventory();
        InventoryState {
            from: reading.from,
            read_us: reading.read_us,
            error: reading.error,
            inventory: reading.inventory.as_ref().clone(),
        }
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
