//! The way to a daemon: a unix socket, TCP, or TLS.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::address::Address;
use super::error::LibvirtError;
use super::tls::TlsFiles;

/// Where libvirt listens by itself: the hypervisor's own daemon, then the one for everything.
const LOCAL_SOCKETS: [&str; 2] = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];

/// Bytes to and from a daemon.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Connects. The caller limits how long it may take; `limit` is for single steps.
pub(super) async fn dial(
    address: &Address,
    tls: &TlsFiles,
    limit: Duration,
) -> Result<Box<dyn Stream>, LibvirtError> {
    match address {
        Address::Local => local().await,
        Address::Unix { socket } => unix(socket).await,
        Address::Tcp { host, port } => Ok(Box::new(tcp(host, *port).await?)),
        Address::Tls { host, port, pki_folder } => {
            let stream = tcp(host, *port).await?;
            let files = pki_folder.as_deref().map_or_else(|| tls.clone(), TlsFiles::in_folder);
            Ok(Box::new(files.connect(host, stream, limit).await?))
        }
    }
}

async fn local() -> Result<Box<dyn Stream>, LibvirtError> {
    let [hypervisor, everything] = LOCAL_SOCKETS;
    match unix(Path::new(hypervisor)).await {
        Ok(stream) => Ok(stream),
        Err(_) => unix(Path::new(everything)).await,
    }
}

async fn unix(socket: &Path) -> Result<Box<dyn Stream>, LibvirtError> {
    match UnixStream::connect(socket).await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(no_connection(&socket.display().to_string(), &error)),
    }
}

async fn tcp(host: &str, port: u16) -> Result<TcpStream, LibvirtError> {
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| no_connection(&format!("{host} port {port}"), &error))?;
    // Calls are small and waited for.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

fn no_connection(to: &str, error: &io::Error) -> LibvirtError {
    LibvirtError::Connect(io::Error::new(error.kind(), format!("{to}: {error}")))
}
