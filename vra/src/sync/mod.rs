//! Syncs: bringing a target's images to what the local disks hold, beside the guest's writes.

mod full_sync;
mod local_disk;
mod new_range;
mod sync_thread;
#[cfg(test)]
mod tests;

pub use full_sync::{
    CHUNK_BYTES, Extent, FullSync, HOLE_SPAN_BYTES, SyncCounts, SyncLimits, SyncStep, SyncVolume,
};
pub use new_range::bring_new;
pub use sync_thread::{SyncJob, SyncThread};
