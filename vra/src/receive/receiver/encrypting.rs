//! Encryption at rest: whether the journal encrypts, and with which key.

use std::collections::BTreeSet;

use journal::crypt::{Encryption, NewKey, SiteKeyId, SiteKeys};
use journal::writer::{Change, ChangeError};

use super::Receiver;

impl Receiver {
    /// Follows what the VM's definition wants: from now on segments are encrypted, or not. A journal whose key an older site key wraps gets
    /// a new key. Does nothing without a site key.
    ///
    /// # Errors
    /// The journal has failed.
    pub fn follow_encryption(&mut self, wanted: bool, site: &SiteKeys) -> Result<(), ChangeError> {
        self.writer.keyring().set_site(site.clone());
        let now = self.encryption;
        match (wanted, site.current()) {
            (true, Some(site_key)) => {
                if matches!(now, Encryption::On(key) if key.site_key_id() == site_key.id()) {
                    return Ok(());
                }
                let new = NewKey::random()?;
                let journal_id = self.writer.superblock().journal_id;
                self.set_encryption(Encryption::On(new.wrap(journal_id, site_key)))
            }
            (false, _) if matches!(now, Encryption::On(_)) => self.set_encryption(Encryption::Off),
            _ => Ok(()),
        }
    }

    /// Names of the site keys that the journal needs.
    pub(in crate::receive) fn site_key_ids(&self) -> BTreeSet<SiteKeyId> {
        self.writer.site_key_ids()
    }

    /// Whether segments are encrypted from now on, and with which key.
    ///
    /// # Errors
    /// The journal has failed, or the key can't be opened.
    pub fn set_encryption(&mut self, encryption: Encryption) -> Result<(), ChangeError> {
        if self.encryption != encryption {
            self.writer.change(Change::SetEncryption(encryption))?;
            self.encryption = encryption;
        }
        Ok(())
    }
}
