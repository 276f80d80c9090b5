//! The `vcenter` provider: reads the inventory of a vCenter (6.5 and newer) over its SOAP API, with the property collector.
//!
//! Bytes become values in `soap`, `answers`, `properties`, `objects`, `names`, `devices` and `inventory`, which do no I/O; `client` speaks HTTPS,
//! `session` is a login with its filter, `provider` joins them.

mod answers;
mod certificate;
mod client;
mod devices;
mod filter;
mod inventory;
mod names;
mod objects;
mod properties;
mod provider;
mod session;
mod settings;
mod soap;

pub use answers::{Change, ChangeKind, Operation, Page, PropertyChange, UpdateSet};
pub use inventory::{Source, inventory_of};
pub use objects::{ApplyError, Objects};
pub use provider::VCenter;
pub use settings::{Fingerprint, Settings, SettingsError, Timing, Trust};
pub use soap::{AnswerError, Fault, MAX_ANSWER_BYTES, Moref, answer};
