//! Sources of inventory: what is asked and answered of them.

use std::fmt;

use serde::{Deserialize, Serialize};
use vra::api::TimeUs;
use zeroize::Zeroizing;

use crate::model::source::{Access, Source, SourceSettings, TlsFiles, Trust};

/// A text that is shown nowhere.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

/// What is to be different about a source. What is none stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceEdit {
    /// Its settings.
    pub settings: SettingsEdit,
    /// Its password.
    pub password: Option<Secret>,
}

/// What is to be different about a source's settings. What is none stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SettingsEdit {
    /// Name of its hosts' site.
    pub site: Option<String>,
    /// Time between two whole readings, milliseconds.
    pub reread_interval_ms: Option<u64>,
    /// Its URI or URL.
    pub address: Option<String>,
    /// Of a libvirt host: name of its VRA.
    pub vra: Option<String>,
    /// Of a libvirt host: files for TLS.
    pub tls: Option<TlsFiles>,
    /// Of a vCenter: who logs in.
    pub user: Option<String>,
    /// Of a vCenter: how its certificate is known.
    pub trust: Option<Trust>,
}

/// A source and how its reading goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceShown {
    /// The source.
    #[serde(flatten)]
    pub source: Source,
    /// When it was last read well.
    pub read_us: Option<TimeUs>,
    /// Why the newest reading failed; the one before stays in force.
    pub error: Option<String>,
    /// How many hosts are known from it.
    pub hosts: usize,
    /// How many VMs are known from it.
    pub vms: usize,
}

impl Secret {
    /// Takes a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        drop(Zeroizing::new(std::mem::take(&mut self.0)));
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl SettingsEdit {
    /// Makes the settings so.
    ///
    /// # Errors
    /// What the source doesn't have, as the end of a sentence about it.
    pub fn apply(self, settings: &mut SourceSettings) -> Result<(), &'static str> {
        set(&mut settings.site, self.site);
        set(&mut settings.reread_interval_ms, self.reread_interval_ms);
        match &mut settings.access {
            Access::Libvirt { address, vra, tls } => {
                if self.user.is_some() || self.trust.is_some() {
                    return Err("is a libvirt host: it has no user or pinned certificate");
                }
                set(address, self.address);
                *vra = self.vra.or(vra.take());
                *tls = self.tls.or(tls.take());
            }
            Access::Vcenter { url, user, trust } => {
                if self.vra.is_some() || self.tls.is_some() {
                    return Err("is a vCenter: it has no VRA of its own or client certificate");
                }
                set(url, self.address);
                set(user, self.user);
                set(trust, self.trust);
            }
        }
        Ok(())
    }
}

fn set<T>(to: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *to = value;
    }
}
