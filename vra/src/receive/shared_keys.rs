//! The site's keys, shared by all target VMs.

use std::sync::{Arc, PoisonError, RwLock};

use journal::crypt::{Keys, SiteKey, SiteKeyId, SiteKeys};

/// The site's keys as they are now. Cheap to clone; empty at first.
#[derive(Clone, Debug, Default)]
pub struct SharedKeys(Arc<RwLock<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// Those of this host's own file.
    own: SiteKeys,
    all: SiteKeys,
}

impl SharedKeys {
    /// Puts the keys of this host's own file in force. They stay whatever others are set: what is written under others can't be read with
    /// the file, nor what the file's keys wrapped with the others.
    pub fn set_own(&self, own: SiteKeys) {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        (inner.all, inner.own) = (own.clone(), own);
    }

    /// Puts keys in force. Those who have read the former ones keep them until they ask again.
    pub fn set(&self, keys: &SiteKeys) {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        inner.all = merged(keys, &inner.own);
    }

    /// What these keys and those of the host's own file are together.
    pub fn with_own(&self, keys: &SiteKeys) -> SiteKeys {
        merged(keys, &self.0.read().unwrap_or_else(PoisonError::into_inner).own)
    }

    /// The site's keys.
    pub fn site(&self) -> SiteKeys {
        self.0.read().unwrap_or_else(PoisonError::into_inner).all.clone()
    }

    /// For an opening.
    pub(super) fn keys(&self) -> Keys {
        Keys::new(self.site())
    }

    /// Their names, the one that wraps first.
    pub fn ids(&self) -> Vec<SiteKeyId> {
        self.site().iter().map(SiteKey::id).collect()
    }
}

fn merged(first: &SiteKeys, then: &SiteKeys) -> SiteKeys {
    let rest = then.iter().filter(|key| first.find(key.id()).is_none());
    SiteKeys::new(first.iter().chain(rest).cloned().collect())
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;

    #[test]
    fn the_keys_of_the_hosts_own_file_stay() {
        let key = |byte| SiteKey::new(Zeroizing::new([byte; 32]));
        let [own, given, next] = [1, 2, 3].map(key);
        let keys = SharedKeys::default();
        keys.set_own(SiteKeys::new(vec![own.clone()]));
        keys.set(&SiteKeys::new(vec![given.clone()]));
        assert_eq!(keys.ids(), [given.id(), own.id()], "the given one wraps");
        keys.set(&SiteKeys::new(vec![next.clone(), own.clone()]));
        assert_eq!(keys.ids(), [next.id(), own.id()]);
        assert_eq!(keys.with_own(&SiteKeys::default()).iter().count(), 1);
    }
}
