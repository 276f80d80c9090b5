//! Whether a vCenter's certificate is the right one: the one that was pinned, or one of an authority.

use std::sync::{Arc, Mutex};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::settings::{Fingerprint, SettingsError, Trust};

/// The fingerprint of the certificate that was refused last.
#[derive(Debug, Clone, Default)]
pub(super) struct Refused(Arc<Mutex<Option<Fingerprint>>>);

#[derive(Debug)]
struct Verifier {
    trusted: Trusted,
    provider: Arc<CryptoProvider>,
    refused: Refused,
}

#[derive(Debug)]
enum Trusted {
    Nothing,
    Pin(Fingerprint),
    Authorities(Arc<WebPkiServerVerifier>),
}

impl Refused {
    /// Takes the fingerprint.
    pub(super) fn take(&self) -> Option<Fingerprint> {
        self.0.lock().expect("no code panics while it holds this lock").take()
    }

    fn set(&self, fingerprint: Fingerprint) {
        *self.0.lock().expect("no code panics while it holds this lock") = Some(fingerprint);
    }
}

/// TLS for connections to a vCenter (1.2 and 1.3: older ones have no other), and where refused certificates are noted.
///
/// # Errors
/// [`SettingsError::Authorities`].
pub(super) fn tls(trust: &Trust) -> Result<(ClientConfig, Refused), SettingsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let trusted = match trust {
        Trust::Nothing => Trusted::Nothing,
        Trust::Pin(pin) => Trusted::Pin(*pin),
        Trust::Authorities(path) => {
            let failed = |reason: String| SettingsError::Authorities { path: path.clone(), reason };
            let mut roots = RootCertStore::empty();
            let certificates =
                CertificateDer::pem_file_iter(path).map_err(|error| failed(error.to_string()))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| failed(error.to_string()))?;
                roots.add(certificate).map_err(|error| failed(error.to_string()))?;
            }
            let verifier =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
            Trusted::Authorities(verifier.map_err(|error| failed(error.to_string()))?)
        }
    };
    let refused = Refused::default();
    let verifier = Verifier { trusted, provider: provider.clone(), refused: refused.clone() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has the suites of both versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok((config, refused))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let seen = Fingerprint::of(end_entity);
        let result = match &self.trusted {
            Trusted::Pin(pin) if *pin == seen => Ok(ServerCertVerified::assertion()),
            Trusted::Pin(_) | Trusted::Nothing => {
                Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
            }
            Trusted::Authorities(verifier) => {
                verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
        };
        if result.is_err() {
            self.refused.set(seen);
        }
        result
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
