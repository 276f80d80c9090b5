//! A VRA as the manager knows it, and the tokens that make one known.

use serde::{Deserialize, Serialize};
use vra::api::vpg::VraEndpoint;
use vra::api::{TimeUs, VraId};

use super::named;

/// A VRA that has been enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vra {
    /// Its id, as in its certificate.
    pub id: VraId,
    /// Its name, unique among those enrolled.
    pub name: String,
    /// `host:port` of its UDP port.
    pub address: String,
    /// Its version when it enrolled.
    pub version: String,
    /// Whether it may take part.
    pub state: VraState,
    /// When it enrolled.
    pub enrolled_us: TimeUs,
    /// When it was revoked.
    pub revoked_us: Option<TimeUs>,
    /// Serial number of its newest certificate, lower-case hex.
    pub certificate_serial: String,
    /// When that certificate ends.
    pub certificate_ends_us: TimeUs,
}

named! {
    /// Whether a VRA may take part.
    VraState {
        /// It may.
        Enrolled = "enrolled",
        /// Its certificates are revoked.
        Revoked = "revoked",
    }
}

/// A one-time token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolToken {
    /// SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// Name that the VRA will have.
    pub vra_name: String,
    /// When it was made.
    pub created_us: TimeUs,
    /// Until when it can be used.
    pub ends_us: TimeUs,
    /// When it was used, and by whom.
    pub used: Option<(TimeUs, VraId)>,
}

/// Stands for the serial number of a certificate that was never seen.
pub fn unknown_serial(vra: VraId) -> String {
    format!("unknown-{vra}")
}

impl Vra {
    /// Whether only other VRAs have told of it: its name is made of its id, and its certificate isn't known.
    pub fn is_known_by_id_alone(&self) -> bool {
        self.certificate_serial == unknown_serial(self.id)
    }

    /// The way to it, as definitions carry it.
    pub fn endpoint(&self) -> VraEndpoint {
        VraEndpoint { id: self.id, address: self.address.clone() }
    }
}
