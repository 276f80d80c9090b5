//! TLS configurations: 1.3 only, ring, certificates on both sides, no resumption.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use sha2::{Digest, Sha256};

use super::{Credentials, Identity, PeerCertificate, PkiError, Role, Trust};
use crate::api::enroll::{self, Token};

/// For the side that connects to `peer`, which must show a certificate of the site's CA with exactly that identity; without one, whoever has
/// any of them will do, and the caller looks at who it is.
///
/// # Errors
/// [`PkiError::Tls`] when the own certificate and key don't fit.
pub fn link_client_tls(
    own: &Credentials,
    peer: Option<Identity>,
    trust: &Trust,
    alpn: &[u8],
) -> Result<ClientConfig, PkiError> {
    let verifier = Arc::new(PeerVerifier::new(own, peer, trust)?);
    let mut config = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(own.chain.clone(), own.key.clone_key())
        .map_err(PkiError::Tls)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// For the side that listens: the peer must show a certificate of the site's CA that names a VRA or a ZVM. What it may do is
/// decided for each stream.
///
/// # Errors
/// [`PkiError::Tls`] when the own certificate and key don't fit.
pub fn link_server_tls(own: &Credentials, trust: &Trust, alpn: &[u8]) -> Result<ServerConfig, PkiError> {
    let verifier = Arc::new(PeerVerifier::new(own, None, trust)?);
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(PkiError::Tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(own.chain.clone(), own.key.clone_key())
        .map_err(PkiError::Tls)?;
    Ok(without_resumption(config, alpn))
}

/// For a VRA that enrols: it has no certificate, and trusts the ZVM whose CA has the token's fingerprint.
///
/// # Errors
/// [`PkiError::Tls`] when TLS 1.3 isn't to be had.
pub fn enroll_client_tls(token: &Token) -> Result<ClientConfig, PkiError> {
    let verifier = Arc::new(TokenVerifier {
        ca_sha256: token.ca_sha256,
        algorithms: provider().signature_verification_algorithms,
    });
    let mut config =
        client_builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    config.alpn_protocols = vec![enroll::ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// For the ZVM's side of enrolment: shows its own certificate and the CA's, asks for none.
///
/// # Errors
/// [`PkiError::Tls`] when the own certificate and key don't fit.
pub fn enroll_server_tls(own: &Credentials) -> Result<ServerConfig, PkiError> {
    let mut chain = own.chain.clone();
    chain.push(own.ca.clone());
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(PkiError::Tls)?
        .with_no_client_auth()
        .with_single_cert(chain, own.key.clone_key())
        .map_err(PkiError::Tls)?;
    Ok(without_resumption(config, enroll::ALPN))
}

fn without_resumption(mut config: ServerConfig, alpn: &[u8]) -> ServerConfig {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

fn client_builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, PkiError> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(PkiError::Tls)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Checks chain, identity and revocation, on either side. The errors map to distinct TLS alerts, so that the refused side can say why
/// ([`crate::link::LinkError`]).
#[derive(Debug)]
struct PeerVerifier {
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
    expected: Option<Identity>,
    trust: Trust,
}

impl PeerVerifier {
    fn new(own: &Credentials, expected: Option<Identity>, trust: &Trust) -> Result<Self, PkiError> {
        let mut roots = RootCertStore::empty();
        roots.add(own.ca.clone()).map_err(PkiError::Tls)?;
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| PkiError::Tls(Error::General(error.to_string())))?;
        Ok(Self {
            roots,
            clients,
            algorithms: provider().signature_verification_algorithms,
            expected,
            trust: trust.clone(),
        })
    }

    fn check_identity(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let refused = || Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let peer = PeerCertificate::from_der(certificate).map_err(|_| refused())?;
        if self.trust.is_revoked(&peer) {
            return Err(Error::InvalidCertificate(CertificateError::Revoked));
        }
        if self.expected.is_some_and(|expected| expected != peer.identity) {
            return Err(refused());
        }
        Ok(())
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(other_ca)?;
        self.check_identity(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.clients.verify_client_cert(end_entity, intermediates, now).map_err(other_ca)?;
        self.check_identity(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Trusts a ZVM whose chain ends at the CA that a token names.
#[derive(Debug)]
struct TokenVerifier {
    ca_sha256: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for TokenVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = intermediates
            .iter()
            .find(|certificate| Sha256::digest(certificate).as_slice() == self.ca_sha256)
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &[], now, self.algorithms.all)?;
        match PeerCertificate::from_der(end_entity) {
            Ok(peer) if peer.identity.role == Role::Zvm => Ok(ServerCertVerified::assertion()),
            _ => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A signature by another key under our CA's name is another site's CA, not damage.
fn other_ca(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::BadSignature) => {
            Error::InvalidCertificate(CertificateError::UnknownIssuer)
        }
        error => error,
    }
}

fn only_tls13() -> Error {
    Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
}
