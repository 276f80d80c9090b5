//! What goes wrong at start, and how errors of the parts become errors of the control protocol.

use std::io::ErrorKind;
use std::path::PathBuf;

use crate::api::{ApiError, ErrorCode};
use crate::config::StoreError;
use crate::pki::PkiError;
use crate::report::chain;

/// Why the daemon can't run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The process can't be set up for serving disks.
    #[error(transparent)]
    Process(#[from] ublk::process::ProcessError),
    /// State files.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Key or certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Threads that serve disks.
    #[error("cannot start the threads that serve disks")]
    Reactors(#[from] ublk::reactor::ReactorError),
    /// Memory for guest data.
    #[error(
        "cannot get {mib} MiB of memory for guest data: {source}; lower memory.arena_mib in the configuration, or give the host more"
    )]
    Arena {
        /// How much.
        mib: u32,
        /// Why.
        source: nix::errno::Errno,
    },
    /// Another daemon has the state folder.
    #[error("another `vra serve` uses {}; stop it, or set another state_dir", path.display())]
    Running {
        /// The state folder.
        path: PathBuf,
    },
    /// The file of the site's keys.
    #[error("cannot take the site's keys from `target.site_key_file`")]
    SiteKeys(#[from] crate::config::SiteKeyFileError),
    /// Threads that write journals.
    #[error("cannot start the threads that write journals")]
    Targets(#[from] crate::receive::TargetError),
    /// The common NBD socket.
    #[error("cannot open the NBD server")]
    Nbd(#[from] ublk::nbd::ListenError),
    /// The control socket.
    #[error("cannot listen at {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The tokio runtime, signals, threads.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::new(ErrorCode::Io, chain(&error))
    }
}

impl From<ublk::backing::BackingError> for ApiError {
    fn from(error: ublk::backing::BackingError) -> Self {
        use ublk::backing::BackingError as Backing;
        let code = match &error {
            Backing::Missing { .. } => ErrorCode::NotFound,
            Backing::Busy { .. } => ErrorCode::Busy,
            Backing::Denied { .. } | Backing::ReadOnly { .. } => ErrorCode::PermissionDenied,
            Backing::ImageFormat { .. } => ErrorCode::ImageFormat,
            Backing::NotADisk { .. } | Backing::Empty { .. } | Backing::Size { .. } => ErrorCode::BadRequest,
            Backing::NoDirectIo { .. } | Backing::Alignment { .. } | Backing::NotShareable { .. } => {
                ErrorCode::Unsupported
            }
            Backing::Io { .. } => ErrorCode::Io,
        };
        let api = Self::new(code, chain(&error));
        match code {
            ErrorCode::ImageFormat => api.remedy(
                "if it is a raw disk whose guest happens to have such bytes at its beginning, attach it with --force-raw",
            ),
            _ => api,
        }
    }
}

impl From<ublk::device::DeviceError> for ApiError {
    fn from(error: ublk::device::DeviceError) -> Self {
        use ublk::device::DeviceError as Device;
        let code = match &error {
            Device::InUse { .. } | Device::HeldOpen { .. } | Device::Served { .. } => ErrorCode::Busy,
            Device::Missing { .. } => ErrorCode::NotFound,
            Device::Arena { .. } => ErrorCode::Exhausted,
            Device::Changed { .. } => ErrorCode::Conflict,
            Device::Settings { .. } | Device::Geometry { .. } => ErrorCode::BadRequest,
            _ => ErrorCode::Io,
        };
        Self::new(code, chain(&error))
    }
}

impl From<ublk::nbd::ListenError> for ApiError {
    fn from(error: ublk::nbd::ListenError) -> Self {
        use ublk::nbd::ListenError as Listen;
        let code = match &error {
            Listen::InUse { .. } | Listen::NotASocket { .. } => ErrorCode::Busy,
            Listen::System { .. } => ErrorCode::Io,
        };
        let remedy = match &error {
            Listen::System { source, .. } => match source.kind() {
                ErrorKind::NotFound => Some("make the socket's folder first"),
                ErrorKind::PermissionDenied => {
                    Some("give the VRA's user the right to write to the socket's folder")
                }
                ErrorKind::AddrNotAvailable => Some("choose an address that this host has"),
                ErrorKind::InvalidFilename | ErrorKind::InvalidInput => {
                    Some("choose a path of at most 107 bytes")
                }
                _ => None,
            },
            Listen::InUse { .. } | Listen::NotASocket { .. } => None,
        };
        let api = Self::new(code, chain(&error));
        match remedy {
            Some(remedy) => api.remedy(remedy),
            None => api,
        }
    }
}

impl From<ublk::nbd::ExportError> for ApiError {
    fn from(error: ublk::nbd::ExportError) -> Self {
        let code = match &error {
            ublk::nbd::ExportError::Exists { .. } => ErrorCode::Conflict,
            ublk::nbd::ExportError::BadName { .. } => ErrorCode::BadRequest,
            ublk::nbd::ExportError::TooFewSlots => ErrorCode::Exhausted,
        };
        Self::new(code, chain(&error))
    }
}
