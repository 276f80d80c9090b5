//! The per-VM journal: batches, segments, recovery and views. Knows no network and no guest, and never reads the clock.

pub mod batch;
