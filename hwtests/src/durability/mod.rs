//! Proves that what a target acknowledged as durable is there after its power was cut or its process killed.
//!
//! A [`load::Load`] is a stream of records that its seed determines, so the checker needs no copy of what was sent. A [`source::Source`]
//! ships it to a target with the product's own sender, [`target`] has the process that it ships to, and [`check`] reads what is left in a datastore
//! and compares. [`acks`] puts the acknowledged numbers onto the disk whose writes are logged, so that they stand in the log's order;
//! [`changes`] finds in such a log when the journal was promoted, grew and got shorter; [`run_on_disk`] is all of it inside of a machine.

pub mod acks;
pub mod changes;
pub mod check;
pub mod load;
mod rounds;
mod run;
mod short_slots;
pub mod source;
pub mod target;

pub use run::{RunOnDisk, run_on_disk, serve_without_sync};
