//! The sockets of clients: listening for them, and what the kernel tells of them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, sockopt};

use super::session::{Peer, PeerSocket};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket, made with the given permissions of its file.
    Unix {
        /// The file.
        path: PathBuf,
        /// Its permission bits; 0600 unless there is a reason.
        mode: u32,
    },
    /// TCP, in the clear: for a network that nobody else uses.
    Tcp(SocketAddr),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix { path, .. } => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody listens there.
    #[error("{address} is in use by a running server; stop it or choose another address")]
    InUse {
        /// Where.
        address: Address,
    },
    /// Something else than a socket is in the way.
    #[error("{path} exists and is not a socket; choose another path")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The system's answer.
    #[error("cannot listen on {address}")]
    System {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening socket; a unix socket's file is removed with it.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    address: Address,
}

impl Listener {
    pub(super) fn bind(address: &Address) -> Result<Self, ListenError> {
        match address {
            Address::Unix { path, mode } => bind_unix(path, *mode, address),
            Address::Tcp(tcp) => {
                let listener = std::net::TcpListener::bind(tcp).map_err(|source| {
                    let address = address.clone();
                    match source.kind() {
                        io::ErrorKind::AddrInUse => ListenError::InUse { address },
                        _ => ListenError::System { address, source },
                    }
                })?;
                let bound = listener.local_addr().unwrap_or(*tcp);
                Ok(Self { fd: listener.into(), address: Address::Tcp(bound) })
            }
        }
    }

    /// Where it listens; a TCP port of zero has become the real one.
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a client, or for `stop` to become readable: then none.
    pub(super) fn accept(&self, stop: BorrowedFd<'_>) -> io::Result<Option<ClientSocket>> {
        loop {
            let mut fds =
                [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN), PollFd::new(stop, PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[1].any() == Some(true) => return Ok(None),
                Ok(_) => {}
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(error.into()),
            }
            // SAFETY: the listener is open, no address is asked for, and the result is checked.
            let raw = unsafe {
                libc::accept4(
                    self.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_CLOEXEC,
                )
            };
            if raw < 0 {
                let error = io::Error::last_os_error();
                if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED | libc::EAGAIN)) {
                    continue;
                }
                return Err(error);
            }
            // SAFETY: accept4 has just made this descriptor and nobody else has it.
            let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) };
            return Ok(Some(ClientSocket::new(fd, &self.address)));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix { path, .. } = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A client's socket.
#[derive(Debug)]
pub(super) struct ClientSocket {
    fd: OwnedFd,
    peer: Peer,
}

impl ClientSocket {
    fn new(fd: OwnedFd, address: &Address) -> Self {
        let peer = match address {
            Address::Unix { .. } => peer_process(&fd),
            Address::Tcp(_) => {
                // Both only make it better: without them replies wait for acknowledgements, and a peer that vanished is
                // noticed when it is written to.
                let _ = socket::setsockopt(&fd, sockopt::TcpNoDelay, &true);
                let _ = socket::setsockopt(&fd, sockopt::KeepAlive, &true);
                Peer::Unknown
            }
        };
        Self { fd, peer }
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    pub(super) fn raw(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }

    /// Ends receives, and with `both` sends too, that are in flight or to come.
    pub(super) fn shut(&self, both: bool) {
        let how = if both { socket::Shutdown::Both } else { socket::Shutdown::Read };
        // It fails when the peer is gone: then the same is true already.
        let _ = socket::shutdown(self.fd.as_raw_fd(), how);
    }
}

impl PeerSocket for ClientSocket {
    fn closed_by_peer(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one pollfd, on the stack, for a descriptor that is open.
        let result = unsafe { libc::poll(&raw mut poll, 1, 0) };
        // A poll that fails tells nothing: then assume the worst.
        result < 0 || poll.revents != 0
    }
}

/// The process that connected, unless it is in a pid namespace that this process does not see.
fn peer_process(fd: &OwnedFd) -> Peer {
    match socket::getsockopt(fd, sockopt::PeerCredentials) {
        Ok(credentials) if credentials.pid() > 0 => {
            Peer::Process { pid: credentials.pid(), uid: credentials.uid() }
        }
        _ => Peer::Unknown,
    }
}

fn bind_unix(path: &Path, mode: u32, address: &Address) -> Result<Listener, ListenError> {
    let system = |source: io::Error| ListenError::System { address: address.clone(), source };
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.to_owned() });
        }
        // A socket that nobody listens on was left by a server that is gone.
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(system)?;
            }
            Err(error) => return Err(system(error)),
            Ok(_) => return Err(ListenError::InUse { address: address.clone() }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(system(error)),
    }
    let nix = |error: nix::Error| system(error.into());
    let fd =
        socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(nix)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(nix)?).map_err(nix)?;
    let listener = Listener { fd, address: address.clone() };
    // Nobody can connect before `listen`, so nobody gets in with the permissions that the file was made with.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(system)?;
    socket::listen(&listener.fd, Backlog::new(128).map_err(nix)?).map_err(nix)?;
    Ok(listener)
}
