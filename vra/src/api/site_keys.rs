//! The keys of the site, for journals that are encrypted.

use std::fmt;

pub use journal::crypt::{KeyFileError, NoRandom, SiteKey, SiteKeyId, SiteKeys};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// The keys that wrap the journals' keys. Replaces the former ones, but for those of the VRA's own file (`target.site_key_file`), which stay
/// behind them. A VRA keeps the others in memory alone: after a start it has none until the ZVM gives them again. Refused if a key is missing that
/// a journal uses which is open there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetSiteKeys {
    /// At most [`MAX_SITE_KEYS`], the one that wraps new keys first.
    pub keys: Vec<SiteKeyLine>,
}

/// Most keys of a site at one time.
pub const MAX_SITE_KEYS: usize = 64;

/// A site key as a key file has it, `holdfast-site-key-1 <64 hex digits>`. Not in its debug output, and zeroed in memory when it is dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SiteKeyLine(pub String);

impl Drop for SiteKeyLine {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for SiteKeyLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SiteKeyLine(hidden)")
    }
}
