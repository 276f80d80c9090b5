//! The connection to one other VRA, made again whenever it breaks.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::endpoint::open_stream;
use super::{Link, LinkError, StreamKind};
use crate::api::vpg::VraEndpoint;
use crate::pki::Identity;

/// Wait after a first failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);

/// Longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Another VRA. Cheap to clone; all clones share one connection.
#[derive(Clone, Debug)]
pub struct Peer {
    endpoint: Arc<VraEndpoint>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    connection: Option<Connection>,
    /// Not before this.
    next_try: Instant,
    backoff: Duration,
}

impl Peer {
    pub(super) fn new(endpoint: VraEndpoint) -> Self {
        let state = State { connection: None, next_try: Instant::now(), backoff: BACKOFF_FIRST };
        Self { endpoint: Arc::new(endpoint), state: Arc::new(Mutex::new(state)) }
    }

    /// Which VRA, and where.
    pub fn endpoint(&self) -> &VraEndpoint {
        &self.endpoint
    }

    pub(super) fn is_unused(&self) -> bool {
        Arc::strong_count(&self.endpoint) == 1
    }

    /// Opens a stream over the connection at hand, or connects first. After a failure it waits before it tries again (100 ms, doubled
    /// up to 5 s, less a random part of up to a half, shared by all streams to this peer), so a caller may simply call it again.
    ///
    /// # Errors
    /// [`LinkError`] of this one try.
    ///
    /// # Cancel safety
    /// Safe: a stream that was opened meanwhile is reset.
    pub async fn open(
        &self,
        link: &Link,
        kind: StreamKind,
    ) -> Result<(Connection, SendStream, RecvStream), LinkError> {
        let connection = self.connection(link).await?;
        let name = format!("{} at {}", self.endpoint.id, self.endpoint.address);
        match open_stream(&connection, kind, &name).await {
            Ok((send, recv)) => {
                self.state.lock().await.backoff = BACKOFF_FIRST;
                Ok((connection, send, recv))
            }
            Err(error) => {
                self.failed(&mut *self.state.lock().await);
                Err(error)
            }
        }
    }

    /// To be called when a stream ended in a way that trying again at once won't better (a refusal).
    pub async fn back_off(&self) {
        self.failed(&mut *self.state.lock().await);
    }

    async fn connection(&self, link: &Link) -> Result<Connection, LinkError> {
        let mut state = self.state.lock().await;
        if let Some(connection) = &state.connection
            && connection.close_reason().is_none()
        {
            return Ok(connection.clone());
        }
        state.connection = None;
        tokio::time::sleep_until(state.next_try).await;
        match link.connect(Identity::vra(self.endpoint.id), &self.endpoint.address).await {
            Ok(connection) => {
                // A peer that doesn't accept our certificate lets the handshake end and closes then: this spaces such tries too.
                self.failed(&mut state);
                state.connection = Some(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                self.failed(&mut state);
                Err(error)
            }
        }
    }

    fn failed(&self, state: &mut State) {
        let wait = state.backoff.mul_f64(1.0 - rand::random::<f64>() / 2.0);
        state.next_try = Instant::now() + wait;
        state.backoff = (state.backoff * 2).min(BACKOFF_MAX);
    }
}
