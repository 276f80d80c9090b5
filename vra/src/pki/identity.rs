//! Who a certificate speaks for.

use std::fmt;

use uuid::Uuid;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::PkiError;
use crate::api::{TimeUs, VraId, ZvmId};

/// What a certificate's holder may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A VRA: may send data that a VPG's definition expects from it.
    Vra,
    /// The manager: may control.
    Zvm,
}

/// A role and an id. Shown as the URI that a certificate carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// Which one.
    pub id: Uuid,
}

impl Identity {
    /// That VRA.
    pub fn vra(id: VraId) -> Self {
        Self { role: Role::Vra, id: id.0 }
    }

    /// That ZVM.
    pub fn zvm(id: ZvmId) -> Self {
        Self { role: Role::Zvm, id: id.0 }
    }

    /// The VRA's id, if it is one.
    pub fn as_vra(&self) -> Option<VraId> {
        (self.role == Role::Vra).then_some(VraId(self.id))
    }

    /// The ZVM's id, if it is one.
    pub fn as_zvm(&self) -> Option<ZvmId> {
        (self.role == Role::Zvm).then_some(ZvmId(self.id))
    }

    /// Reads `urn:holdfast:<role>:<uuid>`.
    pub fn from_urn(urn: &str) -> Option<Self> {
        let (role, id) = urn.strip_prefix("urn:holdfast:")?.split_once(':')?;
        let role = match role {
            "vra" => Role::Vra,
            "zvm" => Role::Zvm,
            _ => return None,
        };
        Some(Self { role, id: Uuid::try_parse(id).ok()? })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Vra => "vra",
            Role::Zvm => "zvm",
        };
        write!(f, "urn:holdfast:{role}:{}", self.id.hyphenated())
    }
}

/// What matters of a certificate. Reading it says nothing of who signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Whom it names.
    pub identity: Identity,
    /// Serial number, lower-case hex without leading zeroes.
    pub serial: String,
    /// When it ends.
    pub ends_us: TimeUs,
}

impl PeerCertificate {
    /// Reads a certificate in DER.
    ///
    /// # Errors
    /// [`PkiError::NotX509`], and [`PkiError::NoIdentity`] when there isn't exactly one URI of ours in it.
    pub fn from_der(der: &[u8]) -> Result<Self, PkiError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|_| PkiError::NotX509)?;
        let names = certificate.subject_alternative_name().map_err(|_| PkiError::NotX509)?;
        let mut identities =
            names.iter().flat_map(|extension| &extension.value.general_names).filter_map(|name| match name {
                GeneralName::URI(uri) => Identity::from_urn(uri),
                _ => None,
            });
        let (Some(identity), None) = (identities.next(), identities.next()) else {
            return Err(PkiError::NoIdentity);
        };
        let ends_s = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self {
            identity,
            serial: certificate.serial.to_str_radix(16),
            ends_us: TimeUs(ends_s.saturating_mul(1_000_000)),
        })
    }
}
