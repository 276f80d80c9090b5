//! One UDP socket, all connections.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;

use super::transport::{IDLE_TIMEOUT_MS, endpoint_config};
use super::{ALPN, LinkError, Peer, SERVER_NAME, bind_udp, close_code, resolve, transport_config};
use crate::api::vpg::VraEndpoint;
use crate::api::{SetTrust, VraId};
use crate::pki::{
    Credentials, Identity, PeerCertificate, PkiError, Role, Trust, link_client_tls, link_server_tls,
};

/// Streams that were accepted and not yet taken by their owner.
const ACCEPTED_QUEUE: usize = 256;

/// Connections in their handshake at once; more are refused.
const MAX_HANDSHAKES: usize = 256;

/// A peer must say what a stream is for within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// First bytes of a stream, then the kind.
const STREAM_MAGIC: [u8; 3] = *b"HF1";

/// What a stream is for: its first four bytes are `HF1` and this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StreamKind {
    /// Requests and responses of [`crate::api`]; from the ZVM only.
    Control = b'C',
    /// One VM's data; from a VRA only.
    Data = b'D',
    /// What a source VRA says to another one of checkpoints that they take together; from a VRA only.
    Group = b'G',
}

/// How the link is set up.
#[derive(Clone, Debug)]
pub struct LinkSettings {
    /// UDP address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
}

/// A stream that a peer opened.
#[derive(Debug)]
pub struct Accepted {
    /// Who opened it: a certificate that was good at the handshake.
    pub peer: PeerCertificate,
    /// From where.
    pub remote: SocketAddr,
    /// What for.
    pub kind: StreamKind,
    /// To the peer.
    pub send: SendStream,
    /// From the peer.
    pub recv: RecvStream,
}

/// The process's end of all links. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Link {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    endpoint: Endpoint,
    local: SocketAddr,
    credentials: Credentials,
    trust: Trust,
    /// Every connection that was made, with whom; closed ones are dropped when a new one comes.
    live: Mutex<Vec<(PeerCertificate, Connection)>>,
    peers: Mutex<Vec<Peer>>,
}

impl Link {
    /// Opens the socket and accepts connections; their streams come out of the receiver. Must run inside tokio.
    ///
    /// # Errors
    /// [`LinkError::Bind`], [`LinkError::Pki`].
    pub fn bind(
        settings: &LinkSettings,
        credentials: Credentials,
        trust: Trust,
    ) -> Result<(Self, mpsc::Receiver<Accepted>), LinkError> {
        let bind = |source| LinkError::Bind { address: settings.listen, source };
        let tls = link_server_tls(&credentials, &trust, ALPN)?;
        let crypto = QuicServerConfig::try_from(tls)
            .map_err(|error| PkiError::Tls(rustls::Error::General(error.to_string())))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(transport_config());
        server.max_incoming(MAX_HANDSHAKES);
        let socket = bind_udp(settings.listen).map_err(bind)?;
        let config = endpoint_config(&credentials.key);
        let endpoint =
            Endpoint::new(config, Some(server), socket, Arc::new(quinn::TokioRuntime)).map_err(bind)?;
        let local = endpoint.local_addr().map_err(bind)?;
        let inner = Inner {
            endpoint,
            local,
            credentials,
            trust,
            live: Mutex::new(Vec::new()),
            peers: Mutex::new(Vec::new()),
        };
        let link = Self { inner: Arc::new(inner) };
        let (accepted, receiver) = mpsc::channel(ACCEPTED_QUEUE);
        tokio::spawn(link.clone().accept_connections(accepted));
        Ok((link, receiver))
    }

    /// The address that the socket got.
    pub fn local_address(&self) -> SocketAddr {
        self.inner.local
    }

    /// The certificate that this side shows.
    pub fn own_certificate(&self) -> &PeerCertificate {
        &self.inner.credentials.own
    }

    /// The connection to another VRA, shared by all who ask for the same one, made when a stream is first opened.
    pub fn peer(&self, endpoint: &VraEndpoint) -> Peer {
        let mut peers = self.inner.peers.lock().expect("no code panics while it holds this lock");
        peers.retain(|peer| !peer.is_unused() || peer.endpoint() == endpoint);
        if let Some(peer) = peers.iter().find(|peer| peer.endpoint() == endpoint) {
            return peer.clone();
        }
        let peer = Peer::new(endpoint.clone());
        peers.push(peer.clone());
        peer
    }

    /// Connects once.
    ///
    /// # Errors
    /// [`LinkError`], with what is wrong with either side's certificate where that is the cause. Note that a peer that doesn't accept this
    /// side's certificate says so only after the handshake: the first use of the connection then fails with it.
    pub async fn connect(&self, peer: Identity, address: &str) -> Result<Connection, LinkError> {
        Ok(self.connect_as(Some(peer), &format!("{peer} at {address}"), address).await?.0)
    }

    /// Connects to a VRA of the site: that one, or whichever is at the address. Says by which certificate it proved itself.
    ///
    /// # Errors
    /// As for [`Link::connect`]; also if it is no VRA.
    pub async fn connect_vra(
        &self,
        expected: Option<VraId>,
        address: &str,
    ) -> Result<(Connection, PeerCertificate), LinkError> {
        let name = format!("the VRA at {address}");
        let (connection, certificate) = self.connect_as(expected.map(Identity::vra), &name, address).await?;
        match certificate.identity.as_vra() {
            Some(_) => Ok((connection, certificate)),
            None => Err(LinkError::Protocol { peer: name }),
        }
    }

    async fn connect_as(
        &self,
        peer: Option<Identity>,
        name: &str,
        address: &str,
    ) -> Result<(Connection, PeerCertificate), LinkError> {
        let name = name.to_owned();
        let remote = resolve(address, self.inner.local).await?;
        let tls = link_client_tls(&self.inner.credentials, peer, &self.inner.trust, ALPN)?;
        let crypto = QuicClientConfig::try_from(tls)
            .map_err(|error| PkiError::Tls(rustls::Error::General(error.to_string())))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport_config());
        let connecting = self
            .inner
            .endpoint
            .connect_with(config, remote, SERVER_NAME)
            .map_err(|_| LinkError::NoAnswer { peer: name.clone() })?;
        let limit = Duration::from_millis(IDLE_TIMEOUT_MS.into());
        let connection = tokio::time::timeout(limit, connecting)
            .await
            .map_err(|_| LinkError::NoAnswer { peer: name.clone() })?
            .map_err(|error| LinkError::from_connection(&name, error))?;
        let certificate = peer_certificate(&connection).ok_or(LinkError::Protocol { peer: name })?;
        self.remember(certificate.clone(), &connection);
        Ok((connection, certificate))
    }

    /// Puts a list of revoked certificates in force: connections of those on it are closed.
    pub fn set_trust(&self, list: SetTrust) {
        self.inner.trust.set(list);
        let live = self.inner.live.lock().expect("no code panics while it holds this lock");
        for (certificate, connection) in live.iter() {
            if self.inner.trust.is_revoked(certificate) && connection.close_reason().is_none() {
                tracing::warn!(peer = %certificate.identity, serial = certificate.serial, "closed a connection: its certificate is revoked");
                connection.close(VarInt::from_u32(close_code::REVOKED), b"the certificate is revoked");
            }
        }
    }

    /// Closes all connections and waits until the peers were told.
    pub async fn close(&self) {
        self.inner.endpoint.close(VarInt::from_u32(close_code::DONE), b"the VRA ends");
        let _ = tokio::time::timeout(Duration::from_secs(2), self.inner.endpoint.wait_idle()).await;
    }

    fn remember(&self, certificate: PeerCertificate, connection: &Connection) {
        let mut live = self.inner.live.lock().expect("no code panics while it holds this lock");
        live.retain(|(_, connection)| connection.close_reason().is_none());
        // The list may have changed between the handshake and here.
        if self.inner.trust.is_revoked(&certificate) {
            connection.close(VarInt::from_u32(close_code::REVOKED), b"the certificate is revoked");
        }
        live.push((certificate, connection.clone()));
    }

    async fn accept_connections(self, accepted: mpsc::Sender<Accepted>) {
        while let Some(incoming) = self.inner.endpoint.accept().await {
            let remote = incoming.remote_address();
            let link = self.clone();
            let accepted = accepted.clone();
            tokio::spawn(async move {
                let connection = match incoming.await {
                    Ok(connection) => connection,
                    Err(error) => {
                        let error = LinkError::from_connection(&remote.to_string(), error);
                        tracing::warn!(%remote, %error, "a connection was refused");
                        return;
                    }
                };
                let Some(certificate) = peer_certificate(&connection) else { return };
                link.remember(certificate.clone(), &connection);
                accept_streams(&certificate, &connection, &accepted).await;
            });
        }
    }
}

async fn accept_streams(
    certificate: &PeerCertificate,
    connection: &Connection,
    accepted: &mpsc::Sender<Accepted>,
) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        let remote = connection.remote_address();
        let stream = Accepted { peer: certificate.clone(), remote, kind: StreamKind::Data, send, recv };
        let accepted = accepted.clone();
        tokio::spawn(async move {
            if let Some(stream) = read_header(stream).await {
                // Fails only when the process ends.
                let _ = accepted.send(stream).await;
            }
        });
    }
}

/// Reads what a stream is for, and resets it when that is nothing or not for this peer.
async fn read_header(mut stream: Accepted) -> Option<Accepted> {
    let mut header = [0; 4];
    let read = tokio::time::timeout(HEADER_TIMEOUT, stream.recv.read_exact(&mut header)).await;
    let kind = match (read, header) {
        (Ok(Ok(())), [a, b, c, b'C']) if [a, b, c] == STREAM_MAGIC => StreamKind::Control,
        (Ok(Ok(())), [a, b, c, b'D']) if [a, b, c] == STREAM_MAGIC => StreamKind::Data,
        (Ok(Ok(())), [a, b, c, b'G']) if [a, b, c] == STREAM_MAGIC => StreamKind::Group,
        (Ok(Err(quinn::ReadExactError::ReadError(_))), _) => return None,
        _ => {
            tracing::warn!(peer = %stream.peer.identity, "reset a stream that doesn't begin as holdfast/1 does");
            let _ = stream.send.reset(VarInt::from_u32(close_code::PROTOCOL));
            return None;
        }
    };
    let role = match kind {
        StreamKind::Control => Role::Zvm,
        StreamKind::Data | StreamKind::Group => Role::Vra,
    };
    if stream.peer.identity.role != role {
        tracing::warn!(peer = %stream.peer.identity, ?kind, "reset a stream that this peer's role doesn't allow");
        let _ = stream.send.reset(VarInt::from_u32(close_code::FORBIDDEN));
        let _ = stream.recv.stop(VarInt::from_u32(close_code::FORBIDDEN));
        return None;
    }
    stream.kind = kind;
    Some(stream)
}

/// Opens a stream of a kind on a connection; `peer` names the peer in errors.
///
/// # Errors
/// [`LinkError`].
pub async fn open_stream(
    connection: &Connection,
    kind: StreamKind,
    peer: &str,
) -> Result<(SendStream, RecvStream), LinkError> {
    let (mut send, recv) =
        connection.open_bi().await.map_err(|error| LinkError::from_connection(peer, error))?;
    let [a, b, c] = STREAM_MAGIC;
    send.write_all(&[a, b, c, kind as u8]).await.map_err(|error| match error {
        quinn::WriteError::ConnectionLost(error) => LinkError::from_connection(peer, error),
        _ => LinkError::Protocol { peer: peer.to_owned() },
    })?;
    Ok((send, recv))
}

fn peer_certificate(connection: &Connection) -> Option<PeerCertificate> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok()?;
    PeerCertificate::from_der(chain.first()?).ok()
}
