//! A site CA for tests, daemons, and pairs of them.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "shared by several test binaries")]

pub mod guest_agent;
pub mod nbd;
pub mod network;
pub mod pair;
pub mod recovered;
pub mod spanning;
pub mod vra;

use std::path::Path;
use std::time::{Duration, SystemTime};

use ::vra::api::enroll::{EnrollReply, Token};
use ::vra::api::{VraId, ZvmId};
use ::vra::pki::{Credentials, Identity};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use sha2::{Digest, Sha256};

/// A CA as the ZVM keeps one.
pub struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
    pub der: Vec<u8>,
    pub zvm: ZvmId,
}

impl TestCa {
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).expect("CA");
        let (pem, der) = (certificate.pem(), certificate.der().to_vec());
        Self { issuer: Issuer::new(params, key), pem, der, zvm: ZvmId::random() }
    }

    pub fn token(&self) -> Token {
        Token { secret: rand::random(), ca_sha256: Sha256::digest(&self.der).into() }
    }

    /// A certificate for somebody, with a serial number, that ends in (or ended before) so many seconds.
    pub fn credentials_with(&self, who: Identity, serial: u64, ends_in_s: i64) -> Credentials {
        let key = KeyPair::generate().expect("key");
        let mut params = params_for(who);
        params.serial_number = Some(SerialNumber::from(serial));
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(1_000_000)).into();
        params.not_after = match u64::try_from(ends_in_s) {
            Ok(s) => now + Duration::from_secs(s),
            Err(_) => now - Duration::from_secs(ends_in_s.unsigned_abs()),
        }
        .into();
        let certificate = params.signed_by(&key, &self.issuer).expect("certificate");
        let here = Path::new("test");
        Credentials::from_pem((&certificate.pem(), here), (&key.serialize_pem(), here), (&self.pem, here))
            .expect("credentials")
    }

    pub fn credentials(&self, who: Identity) -> Credentials {
        self.credentials_with(who, rand::random::<u32>().into(), 100_000)
    }

    pub fn vra(&self) -> (VraId, Credentials) {
        let id = VraId::random();
        (id, self.credentials(Identity::vra(id)))
    }

    pub fn zvm(&self) -> Credentials {
        self.credentials(Identity::zvm(self.zvm))
    }

    /// Signs a request as the ZVM does.
    pub fn sign(&self, csr_pem: &str, vra: VraId) -> EnrollReply {
        let request = CertificateSigningRequestParams::from_pem(csr_pem).expect("request");
        let certificate =
            params_for(Identity::vra(vra)).signed_by(&request.public_key, &self.issuer).expect("signed");
        EnrollReply {
            certificate_pem: certificate.pem(),
            ca_pem: self.pem.clone(),
            zvm: self.zvm,
            name: None,
        }
    }
}

fn params_for(who: Identity) -> CertificateParams {
    let mut params = CertificateParams::default();
    let uri = who.to_string().try_into().expect("URI");
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// A temporary folder, removed when dropped.
pub struct Folder(pub std::path::PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        Self::within(&std::env::temp_dir(), name)
    }

    /// One in memory if there is such a place: what a disk that stalls does isn't asked there.
    pub fn in_memory(name: &str) -> Self {
        let memory = std::path::Path::new("/dev/shm");
        if memory.is_dir() { Self::within(memory, name) } else { Self::new(name) }
    }

    fn within(parent: &std::path::Path, name: &str) -> Self {
        let path = parent.join(format!("daemon-{name}-{:08x}", rand::random::<u32>()));
        std::fs::create_dir_all(&path).expect("temporary folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
