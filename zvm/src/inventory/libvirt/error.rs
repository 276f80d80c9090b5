//! What can go wrong with a libvirt daemon.

use std::io;
use std::path::PathBuf;

use super::message::MessageError;
use super::message::procedure::Procedure;
use super::message::remote_error::{RemoteError, code};
use crate::inventory::InventoryError;

/// Why a daemon couldn't be asked, or what was wrong with its answer. The address is told by whoever shows it.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// Nobody is there.
    #[error("it cannot be connected to")]
    Connect(#[source] io::Error),
    /// A file for TLS cannot be used.
    #[error("{} cannot be used for TLS: {reason}", path.display())]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One side doesn't accept the other's certificate.
    #[error("TLS: {reason}")]
    Certificate {
        /// Who and why.
        reason: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The daemon asks for an authentication that isn't spoken, or refused the one that is.
    #[error("{reason}")]
    Authentication {
        /// Its words, or what it asks for.
        reason: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// No answer in time.
    #[error("no answer to {what} within {timeout_ms} ms")]
    Timeout {
        /// What was asked.
        what: String,
        /// How long it was waited for.
        timeout_ms: u64,
    },
    /// The connection broke.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// The other side is no libvirt, or one that doesn't follow its protocol.
    #[error(transparent)]
    Protocol(#[from] MessageError),
    /// An XML document that can't be used.
    #[error("the definition of {what} cannot be used: {reason}")]
    Definition {
        /// Whose it is.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The daemon answered with an error.
    #[error("{procedure} failed: {error}")]
    Remote {
        /// What was called.
        procedure: Procedure,
        /// Its error.
        error: RemoteError,
    },
}

impl LibvirtError {
    /// The daemon's error, if that is what it is.
    pub fn remote(&self) -> Option<&RemoteError> {
        match self {
            Self::Remote { error, .. } => Some(error),
            _ => None,
        }
    }

    /// Whether the daemon says that a definition isn't what its schema allows.
    pub fn is_schema(&self) -> bool {
        self.remote().is_some_and(|error| error.code == code::XML_INVALID_SCHEMA)
    }

    /// That the definition of `what` can't be used.
    pub(super) fn definition(what: impl Into<String>, reason: &impl ToString) -> Self {
        Self::Definition { what: what.into(), reason: reason.to_string() }
    }

    /// As an inventory's error; `from` is the daemon's address.
    pub(super) fn into_inventory_error(self, from: String) -> InventoryError {
        let lost = |kind, error: Self| InventoryError::Read {
            from: from.clone(),
            source: io::Error::new(kind, error),
        };
        match self {
            Self::Connect(source) => InventoryError::Read { from, source },
            error @ Self::TlsFile { .. } => lost(io::ErrorKind::InvalidData, error),
            Self::Certificate { reason, remedy } | Self::Authentication { reason, remedy } => {
                InventoryError::Refused { from, reason, remedy }
            }
            Self::Remote { procedure, error } if error.is_refusal() => InventoryError::Refused {
                from,
                reason: format!("{procedure}: {error}"),
                remedy: "give this client the right to read domains, networks and storage pools (polkit's rules, \
                         access_drivers in libvirtd.conf)",
            },
            error @ Self::Timeout { .. } => lost(io::ErrorKind::TimedOut, error),
            error @ Self::Lost(_) => lost(io::ErrorKind::ConnectionReset, error),
            error @ Self::Remote { .. } => lost(io::ErrorKind::Other, error),
            error @ (Self::Protocol(_) | Self::Definition { .. }) => {
                InventoryError::Protocol { from, reason: error.to_string() }
            }
        }
    }
}
