//! Capture: a protected disk's writes get numbers and are retained until the target holds them durably.

pub mod entry;
pub mod modes;
pub mod numbering;
pub mod payload;
mod primitives;

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod numbering_tests;
