//! A VRA's side of enrolment.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Endpoint, VarInt};

use super::{Credentials, Identity, PkiDir, PkiError, enroll_client_tls};
use crate::api::VraId;
use crate::api::enroll::{
    EnrollError, EnrollOutcome, EnrollReply, EnrollRequest, MAX_MESSAGE_BYTES, Token, hex,
};
use crate::control::{FrameError, read_frame, write_frame};
use crate::link::{LinkError, SERVER_NAME, close_code, resolve, transport_config};

/// The whole exchange must end within this time.
const LIMIT: Duration = Duration::from_secs(20);

/// Why enrolment failed. Nothing was changed but that a key may have been made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrollClientError {
    /// Key or certificate files.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// No connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The ZVM that answered has another CA than the token's.
    #[error(
        "the ZVM at {address} could not prove that it is the one that made the token; check the address, and the token for this site"
    )]
    NotTheTokensZvm {
        /// Where.
        address: String,
    },
    /// The ZVM said no.
    #[error("the ZVM refused: {}{}", .0.message, remedy_of(.0))]
    Refused(EnrollError),
    /// The ZVM's answer isn't what it should be.
    #[error("the ZVM at {address} gave no valid answer")]
    Answer {
        /// Where.
        address: String,
        /// How.
        source: FrameError,
    },
    /// The ZVM closed without an answer, or sent another CA than the token's.
    #[error("the ZVM at {address} {what}")]
    Broken {
        /// Where.
        address: String,
        /// What it did.
        what: &'static str,
    },
}

/// Makes a key if there is none, asks the ZVM at `address` (`host:port`, UDP) for a certificate, and stores it. Also gives what the ZVM answered.
///
/// # Errors
/// [`EnrollClientError`].
pub async fn enroll(
    folder: &PkiDir,
    address: &str,
    token: &Token,
    vra: VraId,
    name: &str,
    own_address: Option<String>,
) -> Result<(Credentials, EnrollReply), EnrollClientError> {
    let own = Identity::vra(vra);
    let request = EnrollRequest {
        secret: hex(&token.secret),
        vra,
        name: name.to_owned(),
        address: own_address,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        csr_pem: folder.signing_request(own)?,
    };
    let exchanged = tokio::time::timeout(LIMIT, exchange(address, token, &request)).await;
    let outcome = exchanged.map_err(|_| LinkError::NoAnswer { peer: format!("the ZVM at {address}") })??;
    let reply = match outcome {
        EnrollOutcome::Ok(reply) => reply,
        EnrollOutcome::Error(error) => return Err(EnrollClientError::Refused(error)),
    };
    let credentials = folder.store(own, token, &reply.certificate_pem, &reply.ca_pem)?;
    Ok((credentials, reply))
}

async fn exchange(
    address: &str,
    token: &Token,
    request: &EnrollRequest,
) -> Result<EnrollOutcome, EnrollClientError> {
    let crypto = QuicClientConfig::try_from(enroll_client_tls(token)?)
        .map_err(|error| PkiError::Tls(rustls::Error::General(error.to_string())))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport_config());
    let name = format!("the ZVM at {address}");
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let (local, remote) = match resolve(address, any_v4).await {
        Ok(remote) => (any_v4, remote),
        Err(_) => (any_v6, resolve(address, any_v6).await?),
    };
    let endpoint = Endpoint::client(local).map_err(|source| LinkError::Bind { address: local, source })?;
    let connection = endpoint
        .connect_with(config, remote, SERVER_NAME)
        .map_err(|_| LinkError::NoAnswer { peer: name.clone() })?
        .await
        .map_err(|error| match LinkError::from_connection(&name, error) {
            LinkError::PeerNotAccepted { .. } => {
                EnrollClientError::NotTheTokensZvm { address: address.to_owned() }
            }
            error => error.into(),
        })?;
    let (mut send, mut recv) =
        connection.open_bi().await.map_err(|error| LinkError::from_connection(&name, error))?;
    let answer = |source| EnrollClientError::Answer { address: address.to_owned(), source };
    write_frame(&mut send, request, MAX_MESSAGE_BYTES).await.map_err(answer)?;
    let _ = send.finish();
    let outcome = read_frame(&mut recv, MAX_MESSAGE_BYTES).await.map_err(answer)?;
    connection.close(VarInt::from_u32(close_code::DONE), b"enrolled");
    let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
    outcome.ok_or(EnrollClientError::Broken {
        address: address.to_owned(),
        what: "closed the connection without an answer",
    })
}

fn remedy_of(error: &EnrollError) -> String {
    error.remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default()
}
