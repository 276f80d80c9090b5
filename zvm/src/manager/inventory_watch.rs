//! Keeps the inventory up to date; a bad reading leaves the last good one in force and raises an alert.

use std::sync::Arc;
use std::time::Duration;

use vra::report::chain;

use super::Manager;
use crate::inventory::{Inventory, Provider, Reading};
use crate::model::event::{Entity, EventKind};
use crate::store::StoreError;

/// Code of the alert for an inventory that cannot be read.
pub(super) const UNREADABLE: &str = "inventory-unreadable";

impl Manager {
    /// Reads from `provider` now and whenever it has news, until cancelled.
    pub async fn watch_inventory(self: Arc<Self>, mut provider: Box<dyn Provider>) {
        let interval = Duration::from_millis(self.config.inventory.reread_interval_ms.max(50));
        loop {
            self.read_inventory(&mut *provider).await;
            tokio::time::sleep(interval).await;
        }
    }

    /// Reads from `provider` once.
    pub async fn read_inventory(&self, provider: &mut dyn Provider) {
        let from = provider.describe();
        match provider.read(Reading::Whole).await {
            Ok(None) => {}
            Ok(Some(inventory)) => {
                let description = format!(
                    "the inventory was read from {from}: {} VMs on {} hosts",
                    inventory.vms.len(),
                    inventory.hosts.len()
                );
                tracing::info!(
                    from,
                    vms = inventory.vms.len(),
                    hosts = inventory.hosts.len(),
                    "the inventory was read"
                );
                self.take_inventory(from, inventory);
                self.set_own_problem(UNREADABLE, None);
                if let Err(error) = self.note_inventory(description).await {
                    tracing::error!(error = chain(&error), "an event could not be written");
                }
            }
            Err(error) => {
                let reason = chain(&error);
                tracing::warn!(
                    from,
                    error = reason,
                    "the inventory could not be read; the last good one stays in force"
                );
                let mut reading = self.inventory.write().expect("no code panics while it holds this lock");
                reading.from = from;
                reading.error = Some(reason.clone());
                drop(reading);
                let remedy = error.remedy().to_owned();
                self.set_own_problem(UNREADABLE, Some((reason, remedy)));
            }
        }
    }

    fn take_inventory(&self, from: String, inventory: Inventory) {
        let mut reading = self.inventory.write().expect("no code panics while it holds this lock");
        reading.from = from;
        reading.error = None;
        reading.read_us = Some(self.now_us());
        reading.inventory = Arc::new(inventory);
    }

    async fn note_inventory(&self, description: String) -> Result<(), StoreError> {
        let mut tx = self.store.begin().await?;
        self.note(&mut tx, EventKind::InventoryRead, true, Entity::zvm(), description, None).await?;
        Ok(tx.commit().await?)
    }
}
