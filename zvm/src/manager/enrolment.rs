//! The manager's side of enrolment (`holdfast-enroll/1`): a one-time token in, a certificate out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, EndpointConfig, Incoming};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use vra::api::enroll::{
    EnrollError, EnrollErrorCode, EnrollOutcome, EnrollReply, EnrollRequest, MAX_MESSAGE_BYTES, Token,
    unhex32,
};
use vra::api::{ApiError, ErrorCode, TimeUs};
use vra::control::{read_frame, write_frame};
use vra::link::{bind_udp, transport_config};
use vra::pki::enroll_server_tls;
use vra::report::chain;

use super::{Manager, StartError, check_name, internal};
use crate::api::NewToken;
use crate::authority::AuthorityError;
use crate::model::event::{Entity, EventKind};
use crate::model::vpg::Vpg;
use crate::model::vra::{EnrolToken, Vra, VraState};
use crate::reconcile::newer_at;
use crate::store::{self, StoreError};

/// Enrolments at once; more wait.
const MAX_EXCHANGES: usize = 32;

/// One enrolment must end within this time.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(20);

/// Tokens may be good for at most so long, seconds.
const MAX_TTL_S: u64 = 30 * 86_400;

/// Tokens that ended are remembered so long, so that late users learn why they are refused.
const REMEMBER_ENDED_US: u64 = 90 * 86_400_000_000;

/// UDP port of a VRA that does not say where it listens.
const DEFAULT_VRA_PORT: u16 = 9710;

impl Manager {
    /// Makes a one-time token for a VRA that will be called `name`.
    pub async fn create_token(&self, name: &str, ttl_s: u64) -> Result<NewToken, ApiError> {
        check_name("VRA", name)?;
        if ttl_s == 0 || ttl_s > MAX_TTL_S {
            return Err(ApiError::new(ErrorCode::BadRequest, "a token lives between a second and 30 days"));
        }
        let token = Token { secret: rand::random(), ca_sha256: self.authority.fingerprint() };
        let now_us = self.now_us();
        let ends_us = TimeUs(now_us.0 + ttl_s * 1_000_000);
        let kept = EnrolToken {
            secret_sha256: Sha256::digest(token.secret).into(),
            vra_name: name.into(),
            created_us: now_us,
            ends_us,
            used: None,
        };
        let save = async {
            let mut tx = self.store.begin().await?;
            store::tokens::forget_ended(&mut tx, TimeUs(now_us.0.saturating_sub(REMEMBER_ENDED_US))).await?;
            store::tokens::insert(&mut tx, &kept).await?;
            let description = format!("a token for VRA {name} was made, good until {ends_us}");
            self.note(&mut tx, EventKind::TokenCreated, true, Entity::zvm(), description, None).await?;
            Ok(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        Ok(NewToken { token: token.reveal(), name: name.into(), ends_us })
    }

    /// Opens the enrolment port.
    pub fn listen_for_enrolment(&self) -> Result<Endpoint, StartError> {
        let address = self.config.listen;
        let listen = |source| StartError::Listen { address, source };
        let tls = enroll_server_tls(&self.credentials).map_err(vra::link::LinkError::from)?;
        let crypto = QuicServerConfig::try_from(tls).map_err(|error| listen(std::io::Error::other(error)))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(transport_config());
        server.max_incoming(MAX_EXCHANGES);
        let socket = bind_udp(address).map_err(listen)?;
        Endpoint::new(EndpointConfig::default(), Some(server), socket, Arc::new(quinn::TokioRuntime))
            .map_err(listen)
    }

    /// Serves enrolments until the endpoint is closed.
    pub async fn serve_enrolments(self: Arc<Self>, endpoint: Endpoint) {
        let places = Arc::new(Semaphore::new(MAX_EXCHANGES));
        while let Some(incoming) = endpoint.accept().await {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let manager = self.clone();
            tokio::spawn(async move {
                let remote = incoming.remote_address();
                if tokio::time::timeout(EXCHANGE_LIMIT, manager.exchange(incoming)).await.is_err() {
                    tracing::info!(%remote, "an enrolment was given up: it took too long");
                }
                drop(place);
            });
        }
    }

    async fn exchange(&self, incoming: Incoming) {
        let remote = incoming.remote_address();
        let talk = async {
            let connection = incoming.await?;
            let (mut send, mut recv) = connection.accept_bi().await?;
            let outcome = match read_frame::<EnrollRequest>(&mut recv, MAX_MESSAGE_BYTES).await? {
                Some(request) => self.enrol(request, remote).await,
                None => return Ok(()),
            };
            write_frame(&mut send, &outcome, MAX_MESSAGE_BYTES).await?;
            let _ = send.finish();
            // The VRA closes when it has read the answer.
            connection.closed().await;
            anyhow::Ok(())
        };
        if let Err(error) = talk.await {
            tracing::info!(%remote, error = format!("{error:#}"), "an enrolment broke off");
        }
    }

    async fn enrol(&self, request: EnrollRequest, remote: SocketAddr) -> EnrollOutcome {
        let outcome = match self.try_enrol(&request, remote).await {
            Ok(reply) => {
                self.wake.notify_one();
                return EnrollOutcome::Ok(reply);
            }
            Err(Refusal::Store(error)) => {
                tracing::error!(error = chain(&error), "the database failed during an enrolment");
                refusal(EnrollErrorCode::Internal, "the manager's database failed", "see the manager's log")
            }
            Err(Refusal::Told(error)) => error,
        };
        let description = format!("VRA {} at {remote} was refused: {}", request.vra, outcome.message);
        tracing::warn!(vra = %request.vra, %remote, reason = outcome.message, "an enrolment was refused");
        let note = async {
            let mut tx = self.store.begin().await?;
            self.note(&mut tx, EventKind::EnrolmentRefused, false, Entity::zvm(), description, None).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        if let Err(error) = note.await {
            tracing::error!(error = chain(&error), "an event could not be written");
        }
        EnrollOutcome::Error(outcome)
    }

    async fn try_enrol(&self, request: &EnrollRequest, remote: SocketAddr) -> Result<EnrollReply, Refusal> {
        let again = "make a new one with `zvm vra token create` at the manager";
        let secret = unhex32(&request.secret)
            .ok_or_else(|| refusal(EnrollErrorCode::UnknownToken, "this is no token of this site", again))?;
        let hash: [u8; 32] = Sha256::digest(secret).into();
        let now_us = self.now_us();
        // One transaction from the token's check to its use: of two VRAs with one token, one gets in.
        let mut tx = self.store.begin().await?;
        let token = store::tokens::get(&mut tx, &hash).await?.ok_or_else(|| {
            refusal(EnrollErrorCode::UnknownToken, "the manager does not know this token", again)
        })?;
        if let Some((used_us, by)) = token.used {
            let message = format!("this token was used already, by VRA {by} at {used_us}");
            return Err(refusal(EnrollErrorCode::TokenUsed, message, again).into());
        }
        if token.ends_us <= now_us {
            let message = format!("this token ended at {}", token.ends_us);
            return Err(refusal(EnrollErrorCode::TokenExpired, message, again).into());
        }
        let vras = store::vras::list(&mut tx).await?;
        if vras.iter().any(|vra| vra.id == request.vra && vra.state == VraState::Revoked) {
            let message = format!("VRA {} is revoked", request.vra);
            let remedy = "remove the VRA's state folder on that host, so that it enrols with a new id";
            return Err(refusal(EnrollErrorCode::Revoked, message, remedy).into());
        }
        let enrolled = || vras.iter().filter(|vra| vra.state == VraState::Enrolled);
        if let Some(other) = enrolled().find(|vra| vra.name == token.vra_name && vra.id != request.vra) {
            let message = format!("another VRA is enrolled as {} ({})", other.name, other.id);
            let remedy = format!(
                "`zvm vra revoke {}` first if this one replaces it, or make a token with another name",
                other.name
            );
            return Err(refusal(EnrollErrorCode::BadRequest, message, remedy).into());
        }
        let known = enrolled().find(|vra| vra.id == request.vra);
        if let Some(known) = known.filter(|vra| vra.name != token.vra_name && !vra.is_known_by_id_alone()) {
            let message =
                format!("this VRA is enrolled as {}, the token is for {}", known.name, token.vra_name);
            let remedy = format!("make a token with `zvm vra token create --name {}`", known.name);
            return Err(refusal(EnrollErrorCode::BadRequest, message, remedy).into());
        }
        let issued = self.authority.sign_vra(&request.csr_pem, request.vra.0, now_us.0).map_err(|error| {
            let code = match error {
                AuthorityError::Request(_) => EnrollErrorCode::BadRequest,
                _ => EnrollErrorCode::Internal,
            };
            refusal(code, chain(&error), "enrol with a `vra` of the manager's version")
        })?;
        store::tokens::mark_used(&mut tx, &hash, request.vra, now_us).await?;
        let vra = Vra {
            id: request.vra,
            name: token.vra_name,
            address: reachable_address(request.address.as_deref(), remote),
            version: request.version.chars().take(64).collect(),
            state: VraState::Enrolled,
            enrolled_us: now_us,
            revoked_us: None,
            certificate_serial: issued.serial.clone(),
            certificate_ends_us: TimeUs(issued.not_after_us),
        };
        store::vras::save_enrolled(&mut tx, &vra).await?;
        // The other VRAs have the former address in their definitions.
        if known.is_some_and(|known| known.address != vra.address) {
            let observed = self.observed();
            let is_newest = |vpg: &Vpg| newer_at(vpg, &observed).is_empty();
            store::vpgs::raise_revisions_at(&mut tx, vra.id, is_newest).await?;
        }
        // A former certificate of this VRA stays good until it ends: the VRA may still run on it.
        store::certificates::insert(&mut tx, vra.id, &issued, now_us).await?;
        let description =
            format!("VRA {} ({}) enrolled from {remote}, reached at {}", vra.name, vra.id, vra.address);
        self.note(&mut tx, EventKind::InstallVra, true, Entity::vra(vra.id), description, None).await?;
        tx.commit().await.map_err(StoreError::from)?;
        tracing::info!(vra = %vra.id, name = vra.name, %remote, address = vra.address, "a VRA enrolled");
        Ok(EnrollReply {
            certificate_pem: issued.pem,
            ca_pem: self.authority.certificate_pem().into(),
            zvm: self.zvm,
            name: Some(vra.name),
        })
    }
}

#[derive(Debug)]
enum Refusal {
    Told(EnrollError),
    Store(StoreError),
}

impl From<EnrollError> for Refusal {
    fn from(error: EnrollError) -> Self {
        Self::Told(error)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

fn refusal(code: EnrollErrorCode, message: impl Into<String>, remedy: impl Into<String>) -> EnrollError {
    EnrollError { code, message: message.into(), remedy: Some(remedy.into()) }
}

/// Where a VRA is reached: as it says, but for a wildcard address or none, which stand for where it came from.
fn reachable_address(said: Option<&str>, remote: SocketAddr) -> String {
    let from = remote.ip().to_canonical();
    match said.map(|said| (said, said.parse::<SocketAddr>())) {
        Some((_, Ok(address))) if address.ip().is_unspecified() => {
            SocketAddr::new(from, address.port()).to_string()
        }
        Some((said, _)) if !said.is_empty() => said.chars().take(256).collect(),
        _ => SocketAddr::new(from, DEFAULT_VRA_PORT).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_where_the_vra_came_from() {
        let v4 = "10.0.0.7:40000".parse().unwrap();
        let mapped = "[::ffff:10.0.0.7]:40000".parse().unwrap();
        assert_eq!(reachable_address(None, v4), "10.0.0.7:9710");
        assert_eq!(reachable_address(Some("0.0.0.0:9999"), v4), "10.0.0.7:9999");
        assert_eq!(reachable_address(Some("[::]:9999"), mapped), "10.0.0.7:9999");
        assert_eq!(reachable_address(Some("kvm-a.example:9710"), v4), "kvm-a.example:9710");
        assert_eq!(reachable_address(Some("192.0.2.1:9710"), v4), "192.0.2.1:9710");
    }
}
