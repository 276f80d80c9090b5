//! Key and certificate files of one process, under `<state>/pki`.

use std::fmt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{Identity, PeerCertificate, PkiError};
use crate::api::enroll::Token;
use crate::config::{SecretFileError, read_secret, write_atomic};

/// What a process needs to prove who it is and to check others.
pub struct Credentials {
    /// Whom the certificate names.
    pub own: PeerCertificate,
    /// The certificate, with intermediates if there are any.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
    /// The site CA's certificate.
    pub ca: CertificateDer<'static>,
}

impl Credentials {
    /// From PEM texts.
    ///
    /// # Errors
    /// [`PkiError::Malformed`] naming the `origin` that isn't what it should be, and [`PkiError::NoIdentity`].
    pub fn from_pem(
        certificate: (&str, &Path),
        key: (&str, &Path),
        ca: (&str, &Path),
    ) -> Result<Self, PkiError> {
        let malformed = |path: &Path, expected| PkiError::Malformed { path: path.to_owned(), expected };
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate.0.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|_| malformed(certificate.1, "a certificate in PEM"))?;
        let first = chain.first().ok_or_else(|| malformed(certificate.1, "a certificate in PEM"))?;
        let own = PeerCertificate::from_der(first)?;
        let key = PrivateKeyDer::from_pem_slice(key.0.as_bytes())
            .map_err(|_| malformed(key.1, "a private key in PEM"))?;
        let ca = CertificateDer::from_pem_slice(ca.0.as_bytes())
            .map_err(|_| malformed(ca.1, "a CA certificate in PEM"))?;
        Ok(Self { own, chain, key, ca })
    }

    /// SHA-256 of the CA's certificate in DER.
    pub fn ca_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.ca).into()
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self {
            own: self.own.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            ca: self.ca.clone(),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("own", &self.own).finish_non_exhaustive()
    }
}

/// The folder of the key files: `key.pem`, `certificate.pem`, `ca.pem`, all of mode 0600, the folder 0700.
#[derive(Clone, Debug)]
pub struct PkiDir {
    folder: PathBuf,
}

impl PkiDir {
    /// The folder of that name, made if it isn't there.
    ///
    /// # Errors
    /// [`PkiError::File`].
    pub fn open(folder: &Path) -> Result<Self, PkiError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|source| PkiError::File { action: "create", path: folder.to_owned(), source })?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Whether a certificate was stored.
    pub fn is_enrolled(&self) -> bool {
        self.certificate_path().exists()
    }

    /// A signing request for `own`, with the key in the folder or, if there is none, a new one (ECDSA P-256). The key leaves the folder
    /// for nowhere.
    ///
    /// # Errors
    /// [`PkiError::File`], [`PkiError::KeyReadable`], [`PkiError::Malformed`], [`PkiError::Generate`].
    pub fn signing_request(&self, own: Identity) -> Result<String, PkiError> {
        let key = if self.key_path().exists() {
            KeyPair::from_pem(&self.read_key()?).map_err(|_| PkiError::Malformed {
                path: self.key_path(),
                expected: "a private key in PEM",
            })?
        } else {
            let key = KeyPair::generate().map_err(PkiError::Generate)?;
            self.write(&self.key_path(), &key.serialize_pem())?;
            key
        };
        let urn = own.to_string();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, own.id.hyphenated().to_string());
        let uri = urn.try_into().map_err(PkiError::Generate)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let request = params.serialize_request(&key).map_err(PkiError::Generate)?;
        request.pem().map_err(PkiError::Generate)
    }

    /// Stores an issued certificate, after checking that it names `own`, belongs to the key, and comes with the token's CA.
    ///
    /// # Errors
    /// As [`PkiDir::load`], [`PkiError::WrongIdentity`], [`PkiError::WrongCa`]; then nothing was stored.
    pub fn store(
        &self,
        own: Identity,
        token: &Token,
        certificate_pem: &str,
        ca_pem: &str,
    ) -> Result<Credentials, PkiError> {
        let key = self.read_key()?;
        let credentials = self.check(certificate_pem, &key, ca_pem)?;
        if credentials.own.identity != own {
            return Err(PkiError::WrongIdentity { expected: own, found: credentials.own.identity });
        }
        if credentials.ca_sha256() != token.ca_sha256 {
            return Err(PkiError::WrongCa);
        }
        self.write(&self.ca_path(), ca_pem)?;
        self.write(&self.certificate_path(), certificate_pem)?;
        Ok(credentials)
    }

    /// What was stored.
    ///
    /// # Errors
    /// [`PkiError::File`], [`PkiError::KeyReadable`], [`PkiError::Malformed`], [`PkiError::Tls`] for a key of another certificate.
    pub fn load(&self) -> Result<Credentials, PkiError> {
        let key = self.read_key()?;
        let certificate = read(&self.certificate_path())?;
        let ca = read(&self.ca_path())?;
        self.check(&certificate, &key, &ca)
    }

    fn check(&self, certificate: &str, key: &str, ca: &str) -> Result<Credentials, PkiError> {
        let credentials = Credentials::from_pem(
            (certificate, &self.certificate_path()),
            (key, &self.key_path()),
            (ca, &self.ca_path()),
        )?;
        rustls::sign::CertifiedKey::from_der(
            credentials.chain.clone(),
            credentials.key.clone_key(),
            &rustls::crypto::ring::default_provider(),
        )
        .map_err(PkiError::Tls)?;
        Ok(credentials)
    }

    fn read_key(&self) -> Result<Zeroizing<String>, PkiError> {
        read_secret(&self.key_path()).map_err(|error| match error {
            SecretFileError::Exposed { path, mode } => PkiError::KeyReadable { path, mode },
            SecretFileError::File { path, source } => PkiError::File { action: "read", path, source },
        })
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), PkiError> {
        write_atomic(path, text.as_bytes(), 0o600).map_err(|source| PkiError::File {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    fn key_path(&self) -> PathBuf {
        self.folder.join("key.pem")
    }

    fn certificate_path(&self) -> PathBuf {
        self.folder.join("certificate.pem")
    }

    fn ca_path(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::File {
        action: "read",
        path: path.to_owned(),
        source,
    })
}
