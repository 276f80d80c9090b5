//! Certificates that are no longer trusted.

use std::sync::{Arc, RwLock};

use super::PeerCertificate;
use crate::api::SetTrust;

/// The list of revoked certificates in force, shared by all who verify. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    list: Arc<RwLock<SetTrust>>,
}

impl Trust {
    /// Puts a list in force.
    pub fn set(&self, list: SetTrust) {
        *self.list.write().expect("no code panics while it holds this lock") = list;
    }

    /// The list in force.
    pub fn get(&self) -> SetTrust {
        self.list.read().expect("no code panics while it holds this lock").clone()
    }

    /// Whether a certificate is on the list, by its serial number or by its holder.
    pub fn is_revoked(&self, certificate: &PeerCertificate) -> bool {
        let list = self.list.read().expect("no code panics while it holds this lock");
        list.revoked_serials.contains(&certificate.serial)
            || certificate.identity.as_vra().is_some_and(|vra| list.revoked_vras.contains(&vra))
    }
}
