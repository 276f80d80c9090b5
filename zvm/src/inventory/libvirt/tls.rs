//! TLS to a libvirt daemon, with certificates of both sides.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use zeroize::Zeroizing;

use super::error::LibvirtError;

/// A PEM file larger than this is none.
const MAX_PEM_BYTES: usize = 64 << 10;
/// What a daemon sends inside TLS once it has accepted the client's certificate (`virnetserverclient.c`).
const ACCEPTED: u8 = 1;

/// Files that TLS takes. The private key is read when a connection is made, and not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that daemons' certificates may be of.
    pub ca: PathBuf,
    /// The client's certificate, with those between it and the authority.
    pub certificate: PathBuf,
    /// The client's private key.
    pub key: PathBuf,
}

impl Default for TlsFiles {
    /// Where libvirt's own clients have them.
    fn default() -> Self {
        Self {
            ca: "/etc/pki/CA/cacert.pem".into(),
            certificate: "/etc/pki/libvirt/clientcert.pem".into(),
            key: "/etc/pki/libvirt/private/clientkey.pem".into(),
        }
    }
}

impl TlsFiles {
    /// Those in one folder, as libvirt's `pkipath` has them.
    pub fn in_folder(folder: &Path) -> Self {
        Self {
            ca: folder.join("cacert.pem"),
            certificate: folder.join("clientcert.pem"),
            key: folder.join("clientkey.pem"),
        }
    }

    /// Reads them.
    fn config(&self) -> Result<ClientConfig, LibvirtError> {
        let unusable = |path: &Path, reason: String| LibvirtError::TlsFile { path: path.into(), reason };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            roots.add(certificate).map_err(|error| unusable(&self.ca, error.to_string()))?;
        }
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .map_err(|error| unusable(&self.key, error.to_string()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&self.ca, error.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|error| unusable(&self.certificate, error.to_string()))
    }

    /// Shakes hands with the daemon at the other end, which must show a certificate for `host`. `limit` is for the look at the client's
    /// certificate by the daemon alone; the caller limits the whole.
    pub(super) async fn connect(
        &self,
        host: &str,
        stream: TcpStream,
        limit: Duration,
    ) -> Result<TlsStream<TcpStream>, LibvirtError> {
        let config = self.config()?;
        let name = ServerName::try_from(host.to_owned()).map_err(|_| LibvirtError::Certificate {
            reason: format!("{host:?} can be in no certificate"),
            remedy: "give the name or IP address that the daemon's certificate has",
        })?;
        let connector = TlsConnector::from(Arc::new(config));
        let mut stream = connector.connect(name, stream).await.map_err(handshake_error)?;
        let mut accepted = [0];
        let told = tokio::time::timeout(limit, stream.read(&mut accepted)).await;
        match told {
            Ok(Ok(1)) if accepted == [ACCEPTED] => Ok(stream),
            Ok(Ok(0)) => Err(client_refused("it closed the connection after the handshake".into())),
            Ok(Ok(_)) => Err(LibvirtError::Lost("it speaks TLS, but not libvirt".into())),
            // A daemon that refuses a certificate may be gone before what it had to say about it was read.
            Ok(Err(error)) => Err(client_refused(error.to_string())),
            Err(_) => {
                let _ = stream.shutdown().await;
                Err(LibvirtError::Timeout {
                    what: "the client's certificate".into(),
                    timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
                })
            }
        }
    }
}

fn client_refused(reason: String) -> LibvirtError {
    LibvirtError::Certificate {
        reason: format!("the daemon doesn't accept the client's certificate: {reason}"),
        remedy: "use a client certificate of the authority that the daemon trusts, and list it in its tls_allowed_dn_list \
                 if it has one",
    }
}

/// Tells a certificate that one side doesn't accept from a handshake that broke off.
fn handshake_error(error: io::Error) -> LibvirtError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(refused @ rustls::Error::InvalidCertificate(_)) => LibvirtError::Certificate {
            reason: format!("the daemon's certificate is not accepted: {refused}"),
            remedy: "give the address by the name that is in the daemon's certificate (as subjectAltName), and the \
                     authority's certificate that it was made with",
        },
        Some(rustls::Error::AlertReceived(alert)) => client_refused(format!("alert {alert:?}")),
        _ => LibvirtError::Lost(format!("the TLS handshake broke off: {error}")),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, LibvirtError> {
    let pem = read(path)?;
    let unusable = |reason: String| LibvirtError::TlsFile { path: path.into(), reason };
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(error.to_string()))?;
    if certificates.is_empty() {
        return Err(unusable("there is no certificate in it".into()));
    }
    Ok(certificates)
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, LibvirtError> {
    let unusable = |reason: String| LibvirtError::TlsFile { path: path.into(), reason };
    // Room for all of it at once: a buffer that grows leaves pieces of a key behind.
    let mut pem = Zeroizing::new(Vec::with_capacity(MAX_PEM_BYTES + 1));
    File::open(path)
        .and_then(|file| file.take(MAX_PEM_BYTES as u64 + 1).read_to_end(&mut pem))
        .map_err(|error| unusable(error.to_string()))?;
    if pem.len() > MAX_PEM_BYTES {
        return Err(unusable(format!("it has more than {MAX_PEM_BYTES} bytes")));
    }
    Ok(pem)
}
