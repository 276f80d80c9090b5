//! Tells the service manager that guests may be started: their disks are served (`sd_notify(3)`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Where the service manager listens: a path, or after `@` a name in the abstract namespace.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// Tells it, if there is one. A failure is only logged: the VRA works without.
pub(super) fn tell() {
    let Some(socket) = std::env::var_os(SOCKET_VARIABLE).filter(|socket| !socket.is_empty()) else { return };
    if let Err(error) = send(&socket, b"READY=1") {
        tracing::warn!(%error, "the service manager could not be told that disks are served: it may not start guests");
    }
}

fn send(socket: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let sent = UnixDatagram::unbound()?.send_to_addr(message, &address)?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_hears_it_at_a_path_and_at_a_name() {
        let name = format!("holdfast-readiness-{}", std::process::id());
        let path = std::env::temp_dir().join(&name);
        let at_name = SocketAddr::from_abstract_name(&name).unwrap();
        let hears = |listener: UnixDatagram, socket: &OsStr| {
            send(socket, b"READY=1").unwrap();
            let mut heard = [0; 16];
            let len = listener.recv(&mut heard).unwrap();
            assert_eq!(&heard[..len], b"READY=1");
        };
        hears(UnixDatagram::bind(&path).unwrap(), path.as_os_str());
        hears(UnixDatagram::bind_addr(&at_name).unwrap(), OsStr::new(&format!("@{name}")));
        std::fs::remove_file(&path).unwrap();
        assert!(send(path.as_os_str(), b"READY=1").is_err());
    }
}
