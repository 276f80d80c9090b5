//! A site's CA for VRAs that a benchmark starts by itself.

use std::path::{Path, PathBuf};

use anyhow::Result;
use vra::api::enroll::Token;
use vra::api::{TimeUs, VraId};
use vra::pki::{Credentials, Identity, PkiDir};
use zvm::authority::Authority;

/// The CA, and the folder that all keys are in.
pub(super) struct SiteCa {
    authority: Authority,
    folder: PathBuf,
}

impl SiteCa {
    /// A new one; its files go to `folder`.
    pub(super) fn create(folder: &Path) -> Result<Self> {
        let (authority, _zvm) = Authority::create(&folder.join("ca"), "bench", TimeUs::now().0)?;
        Ok(Self { authority, folder: folder.to_owned() })
    }

    /// A new VRA's identity.
    pub(super) fn enrol(&self) -> Result<(VraId, Credentials)> {
        let vra = VraId::random();
        let (pki, own) = (PkiDir::open(&self.folder.join(vra.to_string()))?, Identity::vra(vra));
        let request = pki.signing_request(own)?;
        let issued = self.authority.sign_vra(&request, vra.0, TimeUs::now().0)?;
        let token = Token { secret: rand::random(), ca_sha256: self.authority.fingerprint() };
        let credentials = pki.store(own, &token, &issued.pem, self.authority.certificate_pem())?;
        Ok((vra, credentials))
    }
}
