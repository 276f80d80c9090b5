//! Requests to VRAs: one QUIC connection to each, a few control streams on it, a time limit on every request.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vra::api::vpg::VraEndpoint;
use vra::api::{ApiError, ErrorCode, Request, Response, VraId};
use vra::control::{Client, ClientError};
use vra::link::{Link, LinkError, LinkSettings};
use vra::pki::{Credentials, PeerCertificate, Trust};
use vra::report::chain;

use crate::reconcile::ActionOutcome;

/// Idle control streams kept for each VRA.
const MAX_IDLE_CLIENTS: usize = 4;

/// What VRAs are told that this client is.
const PROGRAM: &str = concat!("zvm ", env!("CARGO_PKG_VERSION"));

/// The manager's connections to its VRAs.
#[derive(Debug)]
pub struct Remote {
    link: Link,
    peers: Mutex<HashMap<VraId, Arc<Peer>>>,
}

/// Why a request to a VRA was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The VRA answered that it won't.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// No answer: it may have been done or not.
    #[error("{0}")]
    Unreachable(String),
}

impl CallError {
    /// As an answer to the manager's own user; `vra` names the VRA.
    pub fn into_api_error(self, vra: &str) -> ApiError {
        match self {
            Self::Refused(mut error) => {
                error.message = format!("VRA {vra}: {}", error.message);
                error
            }
            Self::Unreachable(reason) => {
                ApiError::new(ErrorCode::NotReady, format!("VRA {vra} does not answer: {reason}"))
                    .remedy("start it, or check the network and its address in `zvm vra list`")
            }
        }
    }
}

impl From<Result<Response, CallError>> for ActionOutcome {
    fn from(result: Result<Response, CallError>) -> Self {
        match result {
            Ok(_) => Self::Done,
            Err(CallError::Refused(error)) => Self::Refused(error),
            Err(CallError::Unreachable(reason)) => Self::Unreachable(reason),
        }
    }
}

impl Remote {
    /// Opens a UDP socket on a free port of `ip` for requests to VRAs.
    pub fn new(ip: IpAddr, credentials: Credentials) -> Result<Self, LinkError> {
        let settings = LinkSettings { listen: SocketAddr::new(ip, 0) };
        // Nobody has a stream to open at the manager: what is accepted is dropped with the receiver.
        let (link, _) = Link::bind(&settings, credentials, Trust::default())?;
        Ok(Self { link, peers: Mutex::new(HashMap::new()) })
    }

    /// Sends `request` to `vra` and waits up to `limit` for its answer.
    pub async fn call(
        &self,
        vra: &VraEndpoint,
        request: Request,
        limit: Duration,
    ) -> Result<Response, CallError> {
        let peer = self.peer(vra);
        let answer = async {
            let mut client = match peer.take_idle() {
                Some(client) => client,
                None => peer.connect(&self.link).await?,
            };
            let result = client.call(request).await;
            if matches!(result, Ok(_) | Err(ClientError::Api(_))) {
                peer.put_idle(client);
            } else {
                peer.drop_idle();
            }
            result
        };
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(ClientError::Api(error))) => Err(CallError::Refused(error)),
            Ok(Err(error)) => Err(CallError::Unreachable(chain(&error))),
            Err(_) => Err(CallError::Unreachable(format!("no answer from {} within {limit:?}", vra.address))),
        }
    }

    /// The certificate that a VRA has shown on the connection that there is to it.
    pub async fn certificate(&self, vra: &VraEndpoint) -> Option<PeerCertificate> {
        let peer = self.peer(vra);
        let held = peer.connection.lock().await;
        held.as_ref().map(|(_, certificate)| certificate.clone())
    }

    /// Closes the connection to a VRA that is no longer one of ours.
    pub fn forget(&self, vra: VraId) {
        self.peers.lock().expect("no code panics while it holds this lock").remove(&vra);
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.link.close().await;
    }

    fn peer(&self, vra: &VraEndpoint) -> Arc<Peer> {
        let mut peers = self.peers.lock().expect("no code panics while it holds this lock");
        match peers.get(&vra.id) {
            Some(peer) if peer.endpoint == *vra => peer.clone(),
            _ => {
                let peer = Arc::new(Peer {
                    endpoint: vra.clone(),
                    connection: tokio::sync::Mutex::new(None),
                    idle: Mutex::new(Vec::new()),
                });
                peers.insert(vra.id, peer.clone());
                peer
            }
        }
    }
}

#[derive(Debug)]
struct Peer {
    endpoint: VraEndpoint,
    connection: tokio::sync::Mutex<Option<(quinn::Connection, PeerCertificate)>>,
    idle: Mutex<Vec<Client>>,
}

impl Peer {
    async fn connect(&self, link: &Link) -> Result<Client, ClientError> {
        let mut held = self.connection.lock().await;
        let connection = match held.as_ref() {
            Some((connection, _)) if connection.close_reason().is_none() => connection.clone(),
            _ => {
                let made = link.connect_vra(Some(self.endpoint.id), &self.endpoint.address).await?;
                held.insert(made).0.clone()
            }
        };
        drop(held);
        Client::quic(&connection, PROGRAM).await
    }

    fn take_idle(&self) -> Option<Client> {
        self.idle.lock().expect("no code panics while it holds this lock").pop()
    }

    fn put_idle(&self, client: Client) {
        let mut idle = self.idle.lock().expect("no code panics while it holds this lock");
        if idle.len() < MAX_IDLE_CLIENTS {
            idle.push(client);
        }
    }

    /// A broken stream is mostly a broken connection: the others on it are of no more use.
    fn drop_idle(&self) {
        self.idle.lock().expect("no code panics while it holds this lock").clear();
    }
}
