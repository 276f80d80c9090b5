//! NBD: a disk's second door, for hosts without ublk and for tools.

pub mod connection;
pub mod handshake;
mod inbox;
mod jobs;
mod reply;
pub mod request;
pub mod wire;

pub use inbox::Recv;
pub use reply::SendBatch;
