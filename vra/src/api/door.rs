//! How a disk is offered to its user.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A door to open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DoorRequest {
    /// A block device of this host.
    Ublk {
        /// Queues, by default 1.
        #[serde(default)]
        queues: Option<u16>,
        /// Requests in flight for each queue, by default 64.
        #[serde(default)]
        depth: Option<u16>,
    },
    /// An export of the VRA's NBD server.
    Nbd {
        /// Where to listen, by default a unix socket under the VRA's run directory.
        #[serde(default)]
        listen: Option<NbdListen>,
    },
}

/// Where an NBD export listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum NbdListen {
    /// A unix socket, made with mode 0600.
    Unix {
        /// Its absolute path.
        path: PathBuf,
    },
    /// A TCP port, without encryption: only loopback addresses are allowed.
    Tcp {
        /// Its address; port 0 takes a free one.
        address: SocketAddr,
    },
}

/// A door that is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DoorAddress {
    /// A block device.
    Ublk {
        /// The id that the kernel gave.
        device: u32,
        /// `/dev/ublkb<device>`.
        path: PathBuf,
    },
    /// An NBD export on a unix socket.
    NbdUnix {
        /// The socket.
        path: PathBuf,
        /// Export name.
        export: String,
    },
    /// An NBD export on a TCP port.
    NbdTcp {
        /// The port.
        address: SocketAddr,
        /// Export name.
        export: String,
    },
}

/// A path for `/dev`, a URI (as libnbd and qemu take it) for NBD.
impl fmt::Display for DoorAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ublk { path, .. } => write!(f, "{}", path.display()),
            Self::NbdUnix { path, export } => write!(f, "nbd+unix:///{export}?socket={}", path.display()),
            Self::NbdTcp { address, export } => write!(f, "nbd://{address}/{export}"),
        }
    }
}
