//! The site's certificate authority and the manager's own identity (X.509, RFC 5280).
//!
//! Every certificate carries its owner as a URI name: `urn:holdfast:zvm:<uuid>` or `urn:holdfast:vra:<uuid>`. The
//! authority decides the names; of a VRA's signing request it takes the public key alone.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use uuid::Uuid;
use vra::api::enroll::hex;
use vra::config::{SecretFileError, read_secret};
use vra::pki::{Credentials, Role};
use zeroize::Zeroizing;

const DAY: Duration = Duration::from_secs(86_400);
const AUTHORITY_DAYS: u32 = 20 * 365;
const ZVM_DAYS: u32 = 2 * 365;
/// A VRA's certificate lives a year; it asks for the next one when a third of that is left.
const VRA_DAYS: u32 = 365;
/// Certificates count from an hour ago, so that a VRA whose clock is a little behind accepts them.
const CLOCK_SLACK: Duration = Duration::from_secs(3_600);

/// The site's certificate authority. Its key never leaves the manager's state folder.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
}

/// A certificate that the authority gave out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate, PEM.
    pub pem: String,
    /// Serial number, lower-case hex without leading zeroes: what a revocation names.
    pub serial: String,
    /// End of validity, microseconds since the Unix epoch.
    pub not_after_us: u64,
}

/// What went wrong with keys or certificates.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// `zvm init` was run before.
    #[error(
        "{path} exists: this manager is initialised already. To begin a new site, move its state folder away; every VRA must then enrol again"
    )]
    Exists {
        /// The file found.
        path: PathBuf,
    },
    /// `zvm init` was not run.
    #[error(
        "{path} is missing: run `zvm init` first, or set state_dir to the folder of an initialised manager"
    )]
    NotInitialised {
        /// The file looked for.
        path: PathBuf,
    },
    /// A key file that others may read.
    #[error(
        "{path} can be read by others (mode {mode:03o}): run `chmod 600 {path}`, and consider the key lost if others use this host"
    )]
    KeyExposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file could not be read or written.
    #[error(
        "cannot access {path}: {source}; run this as root or as the manager's user, or set another state_dir"
    )]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} does not hold a valid {what}: restore it from a backup of the state folder")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        what: &'static str,
    },
    /// A signing request that cannot be signed.
    #[error("the certificate signing request is not valid: {0}")]
    Request(String),
    /// The library refused to make a certificate.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
}

impl Authority {
    /// Makes the site's authority and the manager's identity in `pki_dir` (created, mode 0700; keys 0600).
    pub fn create(pki_dir: &Path, site_name: &str, now_us: u64) -> Result<(Self, Uuid), AuthorityError> {
        let files = Files::new(pki_dir);
        if files.ca_key.exists() {
            return Err(AuthorityError::Exists { path: files.ca_key });
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(pki_dir)
            .map_err(|source| AuthorityError::File { path: pki_dir.into(), source })?;

        let key = KeyPair::generate()?;
        let mut params = base_params(&format!("Holdfast site {site_name}"), now_us, AUTHORITY_DAYS);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;

        let zvm_id = Uuid::new_v4();
        let authority = Self {
            certificate: certificate.der().clone(),
            certificate_pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        };
        // The authority's key is written last: it is what marks the manager as initialised.
        replace(&files.ca_cert, certificate.pem().as_bytes(), 0o644)?;
        authority.write_identity(&files, zvm_id, now_us)?;
        replace(&files.ca_key, authority.issuer.key().serialize_pem().as_bytes(), 0o600)?;
        Ok((authority, zvm_id))
    }

    /// Opens the authority that [`Authority::create`] made.
    pub fn open(pki_dir: &Path) -> Result<Self, AuthorityError> {
        let files = Files::new(pki_dir);
        let key_pem = read_key(&files.ca_key)?;
        let key = KeyPair::from_pem(&key_pem)
            .map_err(|_| AuthorityError::Damaged { path: files.ca_key.clone(), what: "private key" })?;
        let certificate_pem = read(&files.ca_cert)?;
        let damaged =
            || AuthorityError::Damaged { path: files.ca_cert.clone(), what: "certificate of that key" };
        let certificate =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|_| damaged())?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).map_err(|_| damaged())?;
        if parsed.public_key().subject_public_key.data != key.der_bytes() {
            return Err(damaged());
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| damaged())?;
        Ok(Self { issuer, certificate, certificate_pem })
    }

    /// Opens the manager's own identity; one with less than half of its life left is renewed first.
    pub fn open_identity(&self, pki_dir: &Path, now_us: u64) -> Result<Credentials, AuthorityError> {
        let files = Files::new(pki_dir);
        let identity = self.load_identity(&files)?;
        let half_life_us = u64::from(ZVM_DAYS / 2) * 86_400_000_000;
        if identity.own.ends_us.0 > now_us + half_life_us {
            return Ok(identity);
        }
        self.write_identity(&files, identity.own.identity.id, now_us)?;
        self.load_identity(&files)
    }

    /// The site's certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The site's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// SHA-256 of the site's certificate (DER): what an enrolment token carries.
    pub fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(&self.certificate).into()
    }

    /// Signs the public key of `request_pem` (PKCS #10) for VRA `vra_id`.
    ///
    /// A request for any other name is refused; usages and validity are the authority's.
    pub fn sign_vra(&self, request_pem: &str, vra_id: Uuid, now_us: u64) -> Result<Issued, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(request_pem)
            .map_err(|error| AuthorityError::Request(error.to_string()))?;
        let (params, serial, not_after_us) = leaf_params("vra", vra_id, now_us, VRA_DAYS)?;
        if let Some(name) =
            request.params.subject_alt_names.iter().find(|name| !params.subject_alt_names.contains(name))
        {
            return Err(AuthorityError::Request(format!(
                "it asks for the name {name:?}, not for VRA {vra_id} alone"
            )));
        }
        let certificate = params.signed_by(&request.public_key, &self.issuer)?;
        Ok(Issued { pem: certificate.pem(), serial, not_after_us })
    }

    /// Certificate and key go into one file, so that no crash leaves one without the other.
    fn write_identity(&self, files: &Files, zvm_id: Uuid, now_us: u64) -> Result<(), AuthorityError> {
        let key = KeyPair::generate()?;
        let (params, _, _) = leaf_params("zvm", zvm_id, now_us, ZVM_DAYS)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        replace(&files.identity, format!("{}{}", certificate.pem(), key.serialize_pem()).as_bytes(), 0o600)
    }

    fn load_identity(&self, files: &Files) -> Result<Credentials, AuthorityError> {
        let pem = read_key(&files.identity)?;
        let own = (pem.as_str(), files.identity.as_path());
        Credentials::from_pem(own, own, (&self.certificate_pem, &files.ca_cert))
            .ok()
            .filter(|credentials| credentials.own.identity.role == Role::Zvm)
            .ok_or_else(|| AuthorityError::Damaged {
                path: files.identity.clone(),
                what: "manager's certificate and key",
            })
    }
}

struct Files {
    ca_key: PathBuf,
    ca_cert: PathBuf,
    identity: PathBuf,
}

impl Files {
    fn new(pki_dir: &Path) -> Self {
        Self {
            ca_key: pki_dir.join("ca.key"),
            ca_cert: pki_dir.join("ca.pem"),
            identity: pki_dir.join("zvm.pem"),
        }
    }
}

fn base_params(common_name: &str, now_us: u64, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_micros(now_us);
    params.not_before = now - CLOCK_SLACK;
    params.not_after = now + DAY * days;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn leaf_params(
    role: &str,
    id: Uuid,
    now_us: u64,
    days: u32,
) -> Result<(CertificateParams, String, u64), AuthorityError> {
    let mut params = base_params(&format!("{role} {id}"), now_us, days);
    params.subject_alt_names = vec![SanType::URI(format!("urn:holdfast:{role}:{id}").try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    // RFC 5280 4.1.2.2: positive and at most 20 octets; the leading octet keeps both true.
    let mut serial = [0_u8; 17];
    serial[0] = 0x01;
    serial[1..].copy_from_slice(Uuid::new_v4().as_bytes());
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    let not_after_us = (now_us / 1_000_000 + (DAY * days).as_secs()) * 1_000_000;
    Ok((params, hex(&serial).trim_start_matches('0').to_owned(), not_after_us))
}

fn read_key(path: &Path) -> Result<Zeroizing<String>, AuthorityError> {
    read_secret(path).map_err(|error| match error {
        SecretFileError::Exposed { path, mode } => AuthorityError::KeyExposed { path, mode },
        SecretFileError::File { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            AuthorityError::NotInitialised { path }
        }
        SecretFileError::File { path, source } => AuthorityError::File { path, source },
    })
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => AuthorityError::NotInitialised { path: path.into() },
        _ => AuthorityError::File { path: path.into(), source },
    })
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), AuthorityError> {
    vra::config::write_atomic(path, bytes, mode)
        .map_err(|source| AuthorityError::File { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use vra::pki::PeerCertificate;

    use super::*;

    const NOW_US: u64 = 1_790_000_000_000_000;

    fn scratch_dir() -> PathBuf {
        std::env::temp_dir().join(format!("zvm-authority-{}", Uuid::new_v4()))
    }

    #[test]
    fn what_was_created_opens_and_signs() {
        let dir = scratch_dir();
        let (created, zvm_id) = Authority::create(&dir, "london", NOW_US).unwrap();
        let authority = Authority::open(&dir).unwrap();
        assert_eq!(created.fingerprint(), authority.fingerprint());
        assert_eq!(authority.open_identity(&dir, NOW_US).unwrap().own.identity.id, zvm_id);

        let vra_id = Uuid::new_v4();
        let vra_key = KeyPair::generate().unwrap();
        let request_for = |urn: String| {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(urn.try_into().unwrap())];
            params.serialize_request(&vra_key).unwrap().pem().unwrap()
        };
        let greedy = request_for(format!("urn:holdfast:zvm:{zvm_id}"));
        assert!(matches!(authority.sign_vra(&greedy, vra_id, NOW_US), Err(AuthorityError::Request(_))));
        let request = request_for(format!("urn:holdfast:vra:{vra_id}"));
        let issued = authority.sign_vra(&request, vra_id, NOW_US).unwrap();

        let der = CertificateDer::from_pem_slice(issued.pem.as_bytes()).unwrap();
        let named = PeerCertificate::from_der(&der).unwrap();
        assert_eq!((named.identity.role, named.identity.id), (Role::Vra, vra_id));
        assert_eq!(named.serial, issued.serial);
        assert_eq!(named.ends_us.0, issued.not_after_us);
        let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
        let (_, site) = x509_parser::parse_x509_certificate(authority.certificate()).unwrap();
        assert!(site.is_ca() && !certificate.is_ca());
        assert_eq!(certificate.issuer(), site.subject());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_second_init_is_refused_and_keeps_the_first() {
        let dir = scratch_dir();
        let (first, _) = Authority::create(&dir, "a", NOW_US).unwrap();
        assert!(matches!(Authority::create(&dir, "b", NOW_US), Err(AuthorityError::Exists { .. })));
        assert_eq!(Authority::open(&dir).unwrap().fingerprint(), first.fingerprint());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_old_identity_is_renewed_under_the_same_id() {
        let dir = scratch_dir();
        let (authority, zvm_id) = Authority::create(&dir, "a", NOW_US).unwrap();
        let first = authority.open_identity(&dir, NOW_US).unwrap();
        let later_us = NOW_US + u64::from(ZVM_DAYS - 10) * 86_400_000_000;
        let second = authority.open_identity(&dir, later_us).unwrap();
        assert_eq!(second.own.identity.id, zvm_id);
        assert!(second.own.ends_us > first.own.ends_us);
        assert_ne!(second.chain, first.chain);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn keys_are_private_and_an_exposed_one_is_refused() {
        let dir = scratch_dir();
        Authority::create(&dir, "a", NOW_US).unwrap();
        let key = dir.join("ca.key");
        assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(dir.join("zvm.pem")).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Authority::open(&dir), Err(AuthorityError::KeyExposed { mode: 0o640, .. })));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn missing_and_foreign_files_are_told_apart() {
        let dir = scratch_dir();
        assert!(matches!(Authority::open(&dir), Err(AuthorityError::NotInitialised { .. })));
        Authority::create(&dir, "a", NOW_US).unwrap();
        let other_dir = scratch_dir();
        Authority::create(&other_dir, "b", NOW_US).unwrap();
        std::fs::copy(other_dir.join("ca.pem"), dir.join("ca.pem")).unwrap();
        assert!(matches!(Authority::open(&dir), Err(AuthorityError::Damaged { .. })));
        std::fs::remove_dir_all(dir).unwrap();
        std::fs::remove_dir_all(other_dir).unwrap();
    }
}
