//! The manager's configuration: `/etc/holdfast/zvm.toml`, every key optional.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use vra::config::{MAX_CONFIG_BYTES, read_text};

/// Where `zvm` looks for its configuration unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/holdfast/zvm.toml";

/// Settings of a manager. Unknown keys are refused, so that a typing error does not pass as a default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder of the database and the certificates; only its owner may read it.
    pub state_dir: PathBuf,
    /// Unix socket that the command line speaks to; only its owner may connect.
    pub socket: PathBuf,
    /// UDP address that VRAs enrol at (QUIC).
    #[serde(deserialize_with = "vra::config::socket_address")]
    pub listen: SocketAddr,
    /// Where the inventory comes from.
    pub inventory: InventoryConfig,
    /// How often the manager looks at its VRAs and acts.
    pub reconcile: ReconcileConfig,
}

/// Where the inventory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InventoryConfig {
    /// The `static` provider's file.
    pub file: PathBuf,
    /// Time between two looks at the file, milliseconds.
    pub reread_interval_ms: u64,
}

/// Pace of the reconciler.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReconcileConfig {
    /// Time between two passes, milliseconds; a change by a user starts a pass at once.
    pub interval_ms: u64,
    /// How long one request to a VRA may take before the VRA counts as not reachable, milliseconds.
    pub request_timeout_ms: u64,
    /// First wait after a failed action, milliseconds; doubled for each further failure.
    pub retry_min_ms: u64,
    /// Longest wait between two tries of a failing action, milliseconds.
    pub retry_max_ms: u64,
}

/// Why the configuration could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file exists (or was named by the user) and could not be read.
    #[error("cannot read the configuration {path}: {source}; give another with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not what a configuration looks like.
    #[error("the configuration {path} is not valid: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and reason as the TOML reader tells them.
        reason: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/holdfast/zvm".into(),
            socket: "/run/holdfast/zvm.sock".into(),
            listen: SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 9443)),
            inventory: InventoryConfig::default(),
            reconcile: ReconcileConfig::default(),
        }
    }
}

impl Default for InventoryConfig {
    fn default() -> Self {
        Self { file: "/etc/holdfast/inventory.toml".into(), reread_interval_ms: 2_000 }
    }
}

impl Default for ReconcileConfig {
    fn default() -> Self {
        Self { interval_ms: 1_000, request_timeout_ms: 5_000, retry_min_ms: 500, retry_max_ms: 30_000 }
    }
}

impl Config {
    /// Reads `path`; without one the default path, which may be missing.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, may_be_missing) = match path {
            Some(path) => (path, false),
            None => (Path::new(DEFAULT_PATH), true),
        };
        match read_text(path, MAX_CONFIG_BYTES) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if may_be_missing && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    /// The database.
    pub fn database_path(&self) -> PathBuf {
        self.state_dir.join("zvm.db")
    }

    /// Folder of keys and certificates.
    pub fn pki_dir(&self) -> PathBuf {
        self.state_dir.join("pki")
    }

    /// Key of the sources' passwords.
    pub fn credential_key_path(&self) -> PathBuf {
        self.state_dir.join("credential-key")
    }

    /// Keys of encrypted journals.
    pub fn site_key_path(&self) -> PathBuf {
        self.state_dir.join("site-keys")
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            reason: error.to_string().trim_end().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::parse("", Path::new("x")).unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = Config::parse("state_dir = \"/s\"\nlissten = \"[::]:1\"\n", Path::new("/etc/zvm.toml"));
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("/etc/zvm.toml") && text.contains("lissten") && text.contains("line 2"),
            "{text}"
        );
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/nonexistent/zvm.toml"))).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }));
    }
}
