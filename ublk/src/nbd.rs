//! NBD: a disk's second door, for hosts without ublk and for tools. The protocol as spoken here is in `docs/nbd.md`.
//!
//! [`connection`] is the protocol as a machine without sockets; the door hosts it on a reactor thread beside a lane of the
//! disk; the session table decides who may write.

pub mod connection;
mod door;
pub mod handshake;
mod inbox;
mod jobs;
mod reply;
pub mod request;
mod server;
mod session;
mod socket;
pub mod wire;

pub use inbox::Recv;
pub use reply::SendBatch;
pub use server::{ExportError, ExportSettings, ExportStatus, NbdServer};
pub use socket::{Address, ListenError};
