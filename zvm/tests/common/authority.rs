//! Certificates for both sides of a TLS connection to libvirt.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// A certificate authority.
pub(crate) struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).expect("certificate");
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// Writes its certificate, as whom the folder's owner trusts.
    pub(crate) fn write_certificate(&self, folder: &Path) {
        fs::write(folder.join("cacert.pem"), self.certificate.pem()).expect("file");
    }

    /// Writes what libvirt wants in its `pkipath`.
    pub(crate) fn issue(&self, folder: &Path, role: &str, names: &[&str]) {
        let key = KeyPair::generate().expect("key");
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names.clone()).expect("names");
        params.distinguished_name.push(DnType::CommonName, names[0].as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).expect("certificate");
        self.write_certificate(folder);
        fs::write(folder.join(format!("{role}cert.pem")), certificate.pem()).expect("file");
        fs::write(folder.join(format!("{role}key.pem")), key.serialize_pem()).expect("file");
    }
}
