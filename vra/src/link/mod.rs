//! The QUIC link between VRAs, and from the ZVM to a VRA: authenticated connections that carry bidirectional streams.
//!
//! A process has one UDP socket for both directions. The side that opens a stream sends a [`StreamKind`] first (`docs/security.md`);
//! what follows is the business of `wire` (data) or [`crate::control`] (control).

mod congestion;
mod endpoint;
mod error;
mod peer;
mod transport;

pub use endpoint::{Accepted, Link, LinkSettings, StreamKind, open_stream};
pub use error::LinkError;
pub use peer::Peer;
pub use transport::{bind_udp, resolve, transport_config};

/// ALPN of the link.
pub const ALPN: &[u8] = b"holdfast/1";

/// The name sent as TLS server name. Peers are known by the URI in their certificates, never by this.
pub const SERVER_NAME: &str = "holdfast";

/// QUIC application error codes with which a side closes a connection or resets a stream.
pub mod close_code {
    /// The process ends, or the connection isn't needed any more.
    pub const DONE: u32 = 0;
    /// The peer's certificate was revoked.
    pub const REVOKED: u32 = 1;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 2;
    /// The peer's role doesn't allow such a stream.
    pub const FORBIDDEN: u32 = 3;
}
