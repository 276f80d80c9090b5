//! The one error of the control protocol.

use serde::{Deserialize, Serialize};

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what happened, naming the thing.
    pub message: String,
    /// For people: what to do about it.
    pub remedy: Option<String>,
}

impl ApiError {
    /// An error without a remedy.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: None }
    }

    /// The same with a remedy.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The message is not valid, or a value in it is out of its limits.
    BadRequest,
    /// The VRA doesn't know this operation: it is older than the client.
    UnknownRequest,
    /// No protocol version in common.
    VersionMismatch,
    /// The peer's certificate doesn't allow this request.
    Forbidden,
    /// What the request names isn't there.
    NotFound,
    /// Something else holds it (a disk, a name, a port).
    Busy,
    /// It exists already and differs, or it contradicts what is there.
    Conflict,
    /// A newer definition is in force.
    Stale,
    /// The disk is a qcow2 or another image format, not raw.
    ImageFormat,
    /// The host lacks something (ublk, a kernel version, a limit).
    Unsupported,
    /// The operating system refused it for lack of rights.
    PermissionDenied,
    /// No space on the datastore, or no memory.
    Exhausted,
    /// It can't be done in the present state, and may be possible later (no checkpoint yet, syncing, not connected).
    NotReady,
    /// Data on disk doesn't match its checksum or its format.
    Corrupt,
    /// An operating system error with no better name.
    Io,
    /// A code of a newer VRA.
    #[serde(other)]
    Other,
}
