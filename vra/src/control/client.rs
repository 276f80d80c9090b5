//! The side that asks: the `vra` command and the ZVM.

use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use super::{FrameError, read_frame, write_frame};
use crate::api::{
    ApiError, Hello, HelloReply, MAX_MESSAGE_BYTES, Outcome, PROTOCOL_VERSION, Request, RequestFrame,
    Response, ResponseFrame,
};
use crate::link::{LinkError, StreamKind, open_stream};

/// A control connection. One request at a time; open several for requests side by side.
pub struct Client {
    recv: Box<dyn AsyncRead + Send + Unpin>,
    send: Box<dyn AsyncWrite + Send + Unpin>,
    next_id: u64,
    hello: HelloReply,
}

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nothing answers at the unix socket.
    #[error("cannot reach the VRA at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The link to the VRA failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The VRA said no.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The connection broke. The request may have been done or not; repeating it is harmless.
    #[error("the control connection broke")]
    Frame(#[from] FrameError),
    /// The VRA closed the connection before it answered.
    #[error("the VRA closed the control connection before it answered")]
    Closed,
    /// An answer to something else.
    #[error("the VRA answered with something that wasn't asked for")]
    Unexpected,
}

impl Client {
    /// Connects to a VRA of this host.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn unix(path: &Path, program: &str) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let (recv, send) = stream.into_split();
        Self::start(Box::new(recv), Box::new(send), program).await
    }

    /// Opens a control stream on a connection to a VRA (see [`crate::link::Link::connect`]).
    ///
    /// # Errors
    /// [`ClientError`]; a certificate that the VRA doesn't accept shows here, as [`ClientError::Link`].
    pub async fn quic(connection: &quinn::Connection, program: &str) -> Result<Self, ClientError> {
        let peer = connection.remote_address().to_string();
        let (send, recv) = open_stream(connection, StreamKind::Control, &peer).await?;
        let started = Self::start(Box::new(recv), Box::new(send), program).await;
        started.map_err(|error| match (error, connection.close_reason()) {
            (ClientError::Frame(_) | ClientError::Closed, Some(reason)) => {
                LinkError::from_connection(&peer, reason).into()
            }
            (error, _) => error,
        })
    }

    async fn start(
        recv: Box<dyn AsyncRead + Send + Unpin>,
        send: Box<dyn AsyncWrite + Send + Unpin>,
        program: &str,
    ) -> Result<Self, ClientError> {
        let nobody = HelloReply {
            protocol: PROTOCOL_VERSION,
            vra: crate::api::VraId(uuid::Uuid::nil()),
            name: String::new(),
            version: String::new(),
            features: Vec::new(),
        };
        let mut client = Self { recv, send, next_id: 1, hello: nobody };
        let hello = Hello { protocol: PROTOCOL_VERSION, client: program.to_owned(), features: Vec::new() };
        match client.call(Request::Hello(hello)).await? {
            Response::Hello(hello) => client.hello = hello,
            _ => return Err(ClientError::Unexpected),
        }
        Ok(client)
    }

    /// What the VRA said of itself.
    pub fn hello(&self) -> &HelloReply {
        &self.hello
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// [`ClientError`]. After any but [`ClientError::Api`] the client is of no more use.
    ///
    /// # Cancel safety
    /// None: after a cancelled call the client is of no more use.
    pub async fn call(&mut self, request: Request) -> Result<Response, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        write_frame(&mut self.send, &RequestFrame { id, request }, MAX_MESSAGE_BYTES).await?;
        let frame: ResponseFrame =
            read_frame(&mut self.recv, MAX_MESSAGE_BYTES).await?.ok_or(ClientError::Closed)?;
        match frame.outcome {
            Outcome::Error(error) => Err(error.into()),
            Outcome::Ok(_) if frame.id != id => Err(ClientError::Unexpected),
            Outcome::Ok(response) => Ok(response),
        }
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("hello", &self.hello).finish_non_exhaustive()
    }
}
