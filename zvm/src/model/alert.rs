//! What is wrong, for as long as it is.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::TimeUs;

use super::event::Entity;
use super::named;

/// Something wrong, as found by one look at the world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// For programs: `vra-unreachable`, `vpg-rpo`, ...
    pub code: String,
    /// What it is about. At most one condition of a code for each entity.
    pub entity: Entity,
    /// How bad.
    pub level: Level,
    /// For people: what is wrong, naming the thing.
    pub description: String,
    /// What to do about it.
    pub remedy: String,
}

/// A condition with its history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    /// Its id.
    pub id: Uuid,
    /// What is, or was, wrong.
    #[serde(flatten)]
    pub condition: Condition,
    /// Since when.
    pub turned_on_us: TimeUs,
    /// Until when; none while it lasts.
    pub turned_off_us: Option<TimeUs>,
}

named! {
    /// How bad an alert is; names of AlertLevel.
    Level {
        /// Protection is reduced.
        Warning = "Warning",
        /// There is no protection.
        Error = "Error",
    }
}
