//! The inventory, and what protecting its VMs would take: what is answered of them.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::TimeUs;

use crate::inventory::Inventory;
use crate::inventory::write_rates::{Demand, WriteRate};

/// The inventory in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryState {
    /// Where it comes from.
    pub sources: Vec<SourceState>,
    /// What was read.
    pub inventory: Inventory,
}

/// How the reading of one source goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceState {
    /// Its name; empty for the inventory file.
    pub name: String,
    /// What is read.
    pub from: String,
    /// When it was last read well.
    pub read_us: Option<TimeUs>,
    /// Why the newest reading failed; the one before stays in force.
    pub error: Option<String>,
}

/// What protecting a VM would take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVm {
    /// Its name.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its host's name.
    pub host: String,
    /// Its disks together, as far as their sizes are known: what a first sync sends, and the recovery disks take.
    pub disks_bytes: u64,
    /// How much it writes; none if its source doesn't count that, or it wasn't watched for long enough.
    pub rate: Option<WriteRate>,
    /// What the history would take.
    pub demand: Option<Demand>,
}
