//! Capture: a protected disk's writes get numbers and are retained until the target holds them durably.
//! `docs/capture.md` has the protocol and its invariants.

pub mod entry;
pub mod modes;
pub mod numbering;
pub mod payload;
mod primitives;
mod protected_disk;
mod protected_lane;
mod sequence_store;
mod source_vm;
mod write_gate;

pub use protected_disk::{Home, ProtectedDisk, WallClock};
pub use sequence_store::{
    FileSequenceStore, SEQUENCE_BLOCK, SequenceState, SequenceStore, SequenceStoreError, take_over,
};
pub use source_vm::{
    Brought, CaptureLimits, NewRange, ProtectError, RetainedEntries, SourceAction, SourceAlert,
    SourceSnapshot, SourceVm,
};
pub use write_gate::WriteGate;

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod numbering_tests;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod source_vm_tests;
