//! Who is who: keys, certificates, roles and revocation.
//!
//! The site's CA (kept by the ZVM) signs every certificate. Who a certificate speaks for is a URI in its subject alternative names:
//! `urn:holdfast:vra:<uuid>` or `urn:holdfast:zvm:<uuid>`. All links are TLS 1.3 with certificates on both sides; sessions are never
//! resumed, so that a revoked certificate can't come back through a ticket. `docs/security.md` says the same for operators.

mod enroll;
mod files;
mod identity;
mod tls;
mod trust;

pub use enroll::{EnrollClientError, enroll};
pub use files::{Credentials, PkiDir};
pub use identity::{Identity, PeerCertificate, Role};
pub use tls::{enroll_client_tls, enroll_server_tls, link_client_tls, link_server_tls};
pub use trust::Trust;

use std::path::PathBuf;

/// Why keys or certificates can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file couldn't be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// `read`, `write`, ...
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the key store doesn't hold what it should.
    #[error("{} is not {expected}: move it away and enrol the VRA again with `vra enroll`", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// A private key that others can read.
    #[error("{} can be read by others (mode {mode:04o}): make it `chmod 600` and, if others had access to this host, enrol the VRA again", path.display())]
    KeyReadable {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A certificate that names no role of this product.
    #[error("the certificate names neither a VRA nor a ZVM: it has no URI urn:holdfast:<role>:<uuid>")]
    NoIdentity,
    /// A certificate that can't be parsed.
    #[error("the certificate is not valid X.509")]
    NotX509,
    /// A certificate issued for somebody else.
    #[error("the certificate is for {found}, not for {expected}")]
    WrongIdentity {
        /// Whom it should name.
        expected: Identity,
        /// Whom it names.
        found: Identity,
    },
    /// The CA's certificate that came with an issued one isn't the token's.
    #[error("the CA certificate is not the one that the token names; check that the token is of this site")]
    WrongCa,
    /// The key doesn't belong to the certificate, or TLS refuses one of them.
    #[error("the certificate and the private key don't work together")]
    Tls(#[source] rustls::Error),
    /// A key or request couldn't be made.
    #[error("cannot make a key or a signing request")]
    Generate(#[source] rcgen::Error),
}
