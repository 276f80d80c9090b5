//! The site's keys, shared by all target VMs.

use std::sync::{Arc, PoisonError, RwLock};

use journal::crypt::{Keys, SiteKeyId, SiteKeys};

/// The site's keys as they are now. Cheap to clone; empty at first.
#[derive(Clone, Debug, Default)]
pub struct SharedKeys(Arc<RwLock<SiteKeys>>);

impl SharedKeys {
    /// Puts keys in force. Those who have read the former ones keep them until they ask again.
    pub fn set(&self, keys: SiteKeys) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// The site's keys.
    pub fn site(&self) -> SiteKeys {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// For an opening.
    pub(super) fn keys(&self) -> Keys {
        Keys::new(self.site())
    }

    /// Their names, the one that wraps first.
    pub fn ids(&self) -> Vec<SiteKeyId> {
        self.site().iter().map(journal::crypt::SiteKey::id).collect()
    }
}
