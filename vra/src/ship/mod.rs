//! The source's end of a VM's stream: takes what capture retains, seals batches, sends them and frees what the target holds
//! durably.
//!
//! [`Sender`] decides everything and does no I/O; [`shell`] drives one over a QUIC stream.

mod backoff;
mod doorbell;
mod pipeline;
#[cfg(any(test, feature = "sim"))]
mod plain_ring;
mod retained;
mod sender;
pub mod shell;
#[cfg(test)]
mod tests;

pub use doorbell::Doorbell;
pub use pipeline::OutgoingBatch;
#[cfg(any(test, feature = "sim"))]
pub use plain_ring::PlainRing;
pub use retained::Retained;
pub use sender::{
    GenerationStart, Output, Phase, Sender, SenderEvent, SenderLimits, SenderStatus, StageTimes, StopReason,
    StreamIdentity, Wake,
};
