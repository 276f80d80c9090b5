//! Why a link doesn't come up, in words that say what to do.

use std::net::SocketAddr;

use quinn::{ConnectionError, TransportErrorCode};

use crate::pki::PkiError;

/// Why a connection or stream couldn't be made, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The own socket couldn't be opened.
    #[error(
        "cannot listen on udp {address}: {source}; is another VRA running, or is the port taken? Set `listen` in the configuration"
    )]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A host name without a usable address.
    #[error("cannot resolve \"{address}\": {source}; check the peer's address")]
    Resolve {
        /// As configured.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Own key or certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Nobody answered.
    #[error("no answer from {peer}: is it running, and does a firewall let udp to it through?")]
    NoAnswer {
        /// Who.
        peer: String,
    },
    /// This side doesn't accept the peer's certificate.
    #[error("the certificate of {peer} is not accepted here: {reason}")]
    PeerNotAccepted {
        /// Who.
        peer: String,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// The peer doesn't accept this side's certificate.
    #[error("{peer} does not accept this side's certificate: {reason}")]
    NotAcceptedByPeer {
        /// Who.
        peer: String,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// The peer closed the connection on purpose.
    #[error("{peer} closed the connection: {reason}")]
    Closed {
        /// Who.
        peer: String,
        /// As it said.
        reason: String,
    },
    /// The connection broke.
    #[error("the connection to {peer} was lost")]
    Lost {
        /// Who.
        peer: String,
        /// How.
        #[source]
        source: ConnectionError,
    },
    /// The peer's first bytes on a stream aren't this protocol's.
    #[error("{peer} sent a stream that doesn't begin as holdfast/1 does")]
    Protocol {
        /// Who.
        peer: String,
    },
}

impl LinkError {
    /// What a QUIC error means.
    pub fn from_connection(peer: &str, error: ConnectionError) -> Self {
        let peer = peer.to_owned();
        match &error {
            ConnectionError::TransportError(inner) => match reason_of(inner.code, true) {
                Some(reason) => Self::PeerNotAccepted { peer, reason },
                None => Self::Lost { peer, source: error },
            },
            ConnectionError::ConnectionClosed(inner) => match reason_of(inner.error_code, false) {
                Some(reason) => Self::NotAcceptedByPeer { peer, reason },
                None => Self::Lost { peer, source: error },
            },
            ConnectionError::ApplicationClosed(inner) => {
                Self::Closed { peer, reason: String::from_utf8_lossy(&inner.reason).into_owned() }
            }
            ConnectionError::TimedOut => Self::NoAnswer { peer },
            _ => Self::Lost { peer, source: error },
        }
    }
}

/// What a TLS alert (RFC 8446, section 6.2) says of a certificate; `ours` when this side raised it against the peer's.
fn reason_of(code: TransportErrorCode, ours: bool) -> Option<&'static str> {
    const CRYPTO: u64 = 0x100;
    let alert = u64::from(code).checked_sub(CRYPTO)?;
    Some(match (alert, ours) {
        (44, true) => "it is revoked",
        (44, false) => "it is revoked; enrol this VRA again with a new token, `vra enroll`",
        (45, true) => {
            "it has expired or is not valid yet; compare the clocks of both hosts, then enrol the peer again"
        }
        (45, false) => {
            "it has expired or is not valid yet; compare the clocks of both hosts, then enrol this VRA again, `vra enroll`"
        }
        (48, _) => "it was not issued by this site's CA; both sides must be enrolled at the same ZVM",
        (49, true) => {
            "it names somebody else; check that the address belongs to the VRA that the definition names"
        }
        (49, false) => "its identity may not connect here",
        (42 | 43 | 46 | 51, true) => "it is damaged or of a wrong kind; enrol the peer again",
        (42 | 43 | 46 | 51, false) => "it is damaged or of a wrong kind; enrol this VRA again, `vra enroll`",
        (116, false) => "none was sent; enrol this VRA, `vra enroll`",
        (120, _) => "no protocol version in common: something else listens there, or one side is too old",
        _ => return None,
    })
}
