//! The per-VM journal: batches, segments, recovery and views. Knows no network and no guest, and never reads the clock.

pub mod bad_ranges;
pub mod batch;
pub mod catalogue;
pub mod crypt;
pub mod format;
pub mod index;
pub mod planted;
pub mod promotion;
pub mod recovery;
pub mod scan;
pub mod storage;
pub mod view;
pub mod walk;
pub mod writer;
