//! The side that answers.

use std::future::Future;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::{FrameError, read_frame, write_frame};
use crate::api::{
    ApiError, ErrorCode, MAX_MESSAGE_BYTES, Outcome, Request, RequestFrame, Response, ResponseFrame, ZvmId,
};

/// Most connections to the unix socket at once; more wait.
const MAX_LOCAL_CONNECTIONS: usize = 64;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A process on this host with the VRA's own user id, or root.
    Local,
    /// A ZVM with a certificate of the site's CA.
    Zvm(ZvmId),
}

/// What answers requests.
pub trait Handler: Send + Sync + 'static {
    /// Does one request. Whether the caller may ask is the handler's to check.
    fn handle(
        &self,
        caller: Caller,
        request: Request,
    ) -> impl Future<Output = Result<Response, ApiError>> + Send;
}

/// Answers the requests of one stream, in order, until it ends.
///
/// # Errors
/// [`FrameError`] when the stream breaks or sends a frame longer than [`MAX_MESSAGE_BYTES`]. A frame that can't be understood is answered
/// with an error and the stream goes on, and so is one whose answer is longer than that.
pub async fn serve_stream(
    recv: &mut (impl AsyncRead + Unpin),
    send: &mut (impl AsyncWrite + Unpin),
    caller: Caller,
    handler: &impl Handler,
) -> Result<(), FrameError> {
    loop {
        let response = match read_frame::<serde_json::Value>(recv, MAX_MESSAGE_BYTES).await {
            Ok(None) => return Ok(()),
            Ok(Some(message)) => answer(message, caller, handler).await,
            Err(FrameError::Json(error)) => ResponseFrame {
                id: 0,
                outcome: Outcome::Error(ApiError::new(
                    ErrorCode::BadRequest,
                    format!("the message is not JSON: {error}"),
                )),
            },
            Err(error) => return Err(error),
        };
        match write_frame(send, &response, MAX_MESSAGE_BYTES).await {
            Err(FrameError::TooLong { len, .. }) => {
                let error = too_long(len);
                let refused = ResponseFrame { id: response.id, outcome: Outcome::Error(error) };
                write_frame(send, &refused, MAX_MESSAGE_BYTES).await?;
            }
            written => written?,
        }
    }
}

fn too_long(len_bytes: u64) -> ApiError {
    let message = format!("the answer has {len_bytes} bytes, more than the {MAX_MESSAGE_BYTES} of a message");
    ApiError::new(ErrorCode::Exhausted, message).remedy("ask for less at once")
}

async fn answer(message: serde_json::Value, caller: Caller, handler: &impl Handler) -> ResponseFrame {
    let frame = match RequestFrame::deserialize(&message) {
        Ok(frame) => frame,
        Err(error) => {
            let id = message.get("id").and_then(serde_json::Value::as_u64).unwrap_or(0);
            return ResponseFrame { id, outcome: Outcome::Error(not_understood(&error)) };
        }
    };
    let outcome = match handler.handle(caller, frame.request).await {
        Ok(response) => Outcome::Ok(response),
        Err(error) => Outcome::Error(error),
    };
    ResponseFrame { id: frame.id, outcome }
}

fn not_understood(error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    if text.starts_with("unknown variant") {
        ApiError::new(ErrorCode::UnknownRequest, format!("this VRA doesn't know the request: {text}"))
            .remedy("upgrade the VRA to the client's version")
    } else {
        ApiError::new(ErrorCode::BadRequest, format!("the request is not valid: {text}"))
    }
}

/// The local socket, mode 0600.
#[derive(Debug)]
pub struct UnixServer {
    listener: UnixListener,
    path: PathBuf,
}

impl UnixServer {
    /// Listens at `path`; its folder is made with mode 0700 if it isn't there. A socket that a dead process left is replaced.
    ///
    /// # Errors
    /// The operating system's; `AddrInUse` when a living process answers at it.
    pub async fn bind(path: &Path) -> std::io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        if path.exists() {
            if UnixStream::connect(path).await.is_ok() {
                return Err(std::io::ErrorKind::AddrInUse.into());
            }
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        // Until here the socket has the umask's mode; who connects is checked by user id as well.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers all who connect, until cancelled.
    pub async fn serve(&self, handler: Arc<impl Handler>) {
        let places = Arc::new(Semaphore::new(MAX_LOCAL_CONNECTIONS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors: others may free some.
                    tracing::warn!(%error, "cannot accept a local connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let own = nix::unistd::geteuid().as_raw();
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == 0 || peer.uid() == own => {}
                _ => continue,
            }
            let handler = handler.clone();
            tokio::spawn(async move {
                let (mut recv, mut send) = stream.into_split();
                // A client that goes away, or talks nonsense, is no event of the daemon's.
                let _ = serve_stream(&mut recv, &mut send, Caller::Local, &*handler).await;
                drop(place);
            });
        }
    }
}

impl Drop for UnixServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Hello, HelloReply, PROTOCOL_VERSION, VraId};

    /// Answers with a name of so many bytes.
    struct Named(usize);

    impl Handler for Named {
        async fn handle(&self, _: Caller, request: Request) -> Result<Response, ApiError> {
            let name_bytes = if matches!(request, Request::Status) { self.0 } else { 1 };
            Ok(Response::Hello(HelloReply {
                protocol: PROTOCOL_VERSION,
                vra: VraId::random(),
                name: "x".repeat(name_bytes),
                version: "1".to_owned(),
                features: Vec::new(),
            }))
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_too_long_is_an_error_and_the_stream_goes_on() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let (mut recv, mut send) = tokio::io::split(server);
        let served = tokio::spawn(async move {
            serve_stream(&mut recv, &mut send, Caller::Local, &Named(MAX_MESSAGE_BYTES as usize)).await
        });
        let hello = Hello { protocol: PROTOCOL_VERSION, client: "test".to_owned(), features: Vec::new() };
        let mut outcomes = Vec::new();
        for (id, request) in [(7, Request::Status), (8, Request::Hello(hello))] {
            write_frame(&mut client, &RequestFrame { id, request }, 1_000).await.expect("asks");
            let answered = read_frame::<ResponseFrame>(&mut client, MAX_MESSAGE_BYTES).await;
            let answered = answered.expect("a frame").expect("an answer");
            assert_eq!(answered.id, id);
            outcomes.push(answered.outcome);
        }
        let Outcome::Error(error) = &outcomes[0] else { panic!("{outcomes:?}") };
        assert_eq!((error.code, error.remedy.is_some()), (ErrorCode::Exhausted, true));
        assert!(matches!(outcomes[1], Outcome::Ok(_)));
        drop(client);
        served.await.expect("no panic").expect("it ended well");
    }
}
