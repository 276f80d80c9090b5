//! Syncs: bringing a target's images to what the local disks hold, beside the guest's writes.

mod full_sync;
mod sync_thread;
#[cfg(test)]
mod tests;

pub use full_sync::{
    CHUNK_BYTES, Extent, FullSync, HOLE_SPAN_BYTES, SyncCounts, SyncLimits, SyncStep, SyncVolume,
};
pub use sync_thread::{SyncJob, SyncThread};
