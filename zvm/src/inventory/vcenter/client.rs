//! Calls over HTTPS: one address, one session's cookie, bounds on what is answered and how long that takes.

use std::error::Error;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, COOKIE, HeaderMap, HeaderValue, SET_COOKIE};
use reqwest::redirect::Policy;
use reqwest::{Response, StatusCode};

use super::certificate::{self, Refused};
use super::settings::{Fingerprint, Settings, SettingsError};
use super::soap::{AnswerError, Call, Fault, MAX_ANSWER_BYTES, answer};
use crate::inventory::xml::Element;

/// Which version of the API is spoken: that of vSphere 6.5, which later ones know.
const SOAP_ACTION: HeaderValue = HeaderValue::from_static("\"urn:vim25/6.5\"");

/// The cookie that a session is known by.
const SESSION_COOKIE: &str = "vmware_soap_session=";

/// Longest cookie that is taken, bytes.
const MAX_COOKIE_BYTES: usize = 4096;

/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Speaks with one vCenter.
pub(super) struct Client {
    http: reqwest::Client,
    endpoint: String,
    cookie: Mutex<Option<HeaderValue>>,
    refused: Refused,
}

/// Why a call gave no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// No answer, or not all of it.
    #[error(transparent)]
    Unreachable(#[from] io::Error),
    /// The vCenter is there and not ready, or something before it is.
    #[error("it answered with HTTP status {0}")]
    Status(StatusCode),
    /// Its certificate is not the right one.
    #[error("its certificate is not trusted; its SHA-256 fingerprint is {0}")]
    Certificate(Fingerprint),
    /// It answered that it won't.
    #[error("{method}: {fault}")]
    Fault { method: &'static str, fault: Fault },
    /// There can't be a connection with these settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// It answered with something else than was asked, or with more than is taken.
    #[error("{0}")]
    Unusable(String),
}

impl Client {
    /// A client that has not connected yet.
    pub(super) fn new(settings: &Settings) -> Result<Self, SettingsError> {
        let endpoint = settings.endpoint()?;
        let (tls, refused) = certificate::tls(&settings.trust)?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(true)
            .http1_only()
            // A password goes to the vCenter, not to a proxy of the environment and not to where an answer points.
            .no_proxy()
            .redirect(Policy::none())
            .connect_timeout(CONNECT_LIMIT.min(settings.timing.call))
            .tcp_keepalive(Duration::from_secs(30))
            .user_agent(concat!("holdfast-zvm/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| SettingsError::Url { url: settings.url.clone(), reason: chain(&error) })?;
        Ok(Self { http, endpoint, cookie: Mutex::new(None), refused })
    }

    /// Makes a call and waits for the whole answer, `limit` at most.
    pub(super) async fn call(&self, call: Call, limit: Duration) -> Result<Element, CallError> {
        let method = call.method();
        match tokio::time::timeout(limit, self.exchange(call)).await {
            Ok(result) => result,
            Err(_) => {
                let reason = format!("{method}: no answer within {limit:?}");
                Err(io::Error::new(io::ErrorKind::TimedOut, reason).into())
            }
        }
    }

    async fn exchange(&self, call: Call) -> Result<Element, CallError> {
        let method = call.method();
        let mut request = self
            .http
            .post(&self.endpoint)
            .header(CONTENT_TYPE, "text/xml; charset=utf-8")
            .header("SOAPAction", SOAP_ACTION)
            .body(bytes::Bytes::from_owner(RequestBody(call.finish())));
        let cookie = self.cookie.lock().expect("no code panics while it holds this lock").clone();
        if let Some(cookie) = cookie {
            request = request.header(COOKIE, cookie);
        }
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        // Faults come with 500.
        if !matches!(status, StatusCode::OK | StatusCode::INTERNAL_SERVER_ERROR) {
            return Err(CallError::Status(status));
        }
        self.keep_cookie(response.headers());
        let body = self.body(method, response).await?;
        // A large answer takes a good part of a second, in which others are to go on.
        let answered = tokio::task::spawn_blocking(move || answer(method, &body)).await;
        let answered = answered.map_err(|error| CallError::Unusable(format!("{method}: {error}")))?;
        match (answered, status) {
            (Ok(response), StatusCode::OK) => Ok(response),
            (Err(AnswerError::Fault(fault)), _) => Err(CallError::Fault { method, fault }),
            (Err(AnswerError::Unusable(reason)), StatusCode::OK) => Err(CallError::Unusable(reason)),
            (Ok(_) | Err(AnswerError::Unusable(_)), _) => Err(CallError::Status(status)),
        }
    }

    /// Reads no more than [`MAX_ANSWER_BYTES`], whatever the length that is told.
    async fn body(&self, method: &str, mut response: Response) -> Result<Vec<u8>, CallError> {
        let too_long =
            || CallError::Unusable(format!("{method}: the answer is longer than {MAX_ANSWER_BYTES} bytes"));
        if response.content_length().is_some_and(|told| told > MAX_ANSWER_BYTES as u64) {
            return Err(too_long());
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(error))? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(too_long());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    fn keep_cookie(&self, headers: &HeaderMap) {
        for header in headers.get_all(SET_COOKIE) {
            let pair = header.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
            if pair.starts_with(SESSION_COOKIE)
                && pair.len() <= MAX_COOKIE_BYTES
                && let Ok(mut cookie) = HeaderValue::from_str(pair)
            {
                cookie.set_sensitive(true);
                *self.cookie.lock().expect("no code panics while it holds this lock") = Some(cookie);
            }
        }
    }

    fn unreachable(&self, error: reqwest::Error) -> CallError {
        match self.refused.take() {
            Some(fingerprint) => CallError::Certificate(fingerprint),
            None => CallError::Unreachable(io::Error::other(chain(&error.without_url()))),
        }
    }
}

/// A request with a secret in it, which is zeroed when it has been sent.
struct RequestBody(zeroize::Zeroizing<String>);

impl AsRef<[u8]> for RequestBody {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl CallError {
    /// Whether it says that nobody is logged in.
    pub(super) fn is_logged_out(&self) -> bool {
        matches!(self, Self::Fault { fault, .. } if fault.name == "NotAuthenticated")
    }

    /// Whether a new login may help: the session, its filter or the connection is gone.
    pub(super) fn is_loss(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Status(status) => status.is_server_error(),
            Self::Fault { fault, .. } => matches!(
                fault.name.as_str(),
                "NotAuthenticated" | "InvalidCollectorVersion" | "ManagedObjectNotFound" | "RequestCanceled"
            ),
            Self::Certificate(_) | Self::Settings(_) | Self::Unusable(_) => false,
        }
    }
}

/// An error with its causes, without the address, which whoever tells of it names.
fn chain(error: &dyn Error) -> String {
    let mut reasons = vec![error.to_string()];
    let mut source = error.source();
    while let Some(inner) = source {
        let text = inner.to_string();
        if reasons.last() != Some(&text) {
            reasons.push(text);
        }
        source = inner.source();
    }
    reasons.join(": ")
}
