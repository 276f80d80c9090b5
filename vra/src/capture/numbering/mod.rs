//! The numbering core: one lock per VM, under which numbers are given, overlaps found, entries published, and mode and
//! hold decided. The files of this folder name their siblings only through `super`, so that the interleaving tests
//! can compile them a second time against shuttle's locks and atomics.

mod hold_order;
mod in_flight;
mod machine;
mod ring;
mod shared;
mod sync_order;
mod terms;

use super::primitives;

pub use in_flight::{ByteRange, Ticket};
pub use machine::{CONTROL_ENTRIES, Core, MAX_PAYLOAD_BYTES, MAX_WATCHES, MAX_ZEROES_BYTES};
pub use ring::{Consumer, ring};
pub use shared::VmCore;
pub use sync_order::{Confirmed, SyncContent, WatchId};
pub use terms::{CoreLimits, Drained, Landed, NewWrite, Offer, Received, Wakeups};
