//! What reads a source as its user described it.

use vra::report::chain;
use zeroize::Zeroizing;

use super::Provider;
use super::libvirt::{Client, HostSettings, LibvirtError, LibvirtHost, Timeouts, TlsFiles};
use super::vcenter::{self, VCenter};
use crate::model::source::{Access, Source, Trust};

/// A description that no source can have.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadSource(String);

/// Why a libvirt host could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtAccessError {
    /// Its description is wrong.
    #[error(transparent)]
    Bad(#[from] BadSource),
    /// It isn't a libvirt host.
    #[error("it is not a libvirt host")]
    NotLibvirt,
    /// It could not be reached.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
}

/// What reads a source; `password` is empty for one that has none. Nothing is connected yet.
pub fn provider_of(source: &Source, password: Zeroizing<String>) -> Result<Box<dyn Provider>, BadSource> {
    match &source.settings.access {
        Access::Libvirt { address, vra, tls } => Ok(Box::new(LibvirtHost::new(HostSettings {
            source: source.name.clone(),
            address: parsed(address)?,
            site: source.settings.site.clone(),
            vra: vra.clone(),
            tls: tls.as_ref().map(files_of).unwrap_or_default(),
            timeouts: Timeouts::default(),
        }))),
        Access::Vcenter { url, user, trust } => {
            let settings = vcenter::Settings {
                name: source.name.clone(),
                url: url.clone(),
                site: source.settings.site.clone(),
                user: user.clone(),
                password,
                trust: trust_of(trust)?,
                timing: vcenter::Timing::default(),
            };
            let provider = VCenter::new(settings).map_err(|error| BadSource(chain(&error)))?;
            Ok(Box::new(provider))
        }
    }
}

/// A connection to a libvirt host, for changes there.
pub async fn libvirt_client(access: &Access) -> Result<Client, LibvirtAccessError> {
    let Access::Libvirt { address, tls, .. } = access else { return Err(LibvirtAccessError::NotLibvirt) };
    let tls = tls.as_ref().map(files_of).unwrap_or_default();
    let (client, _events) = Client::connect(&parsed(address)?, &tls, Timeouts::default()).await?;
    Ok(client)
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, BadSource> {
    text.parse().map_err(|error: T::Err| BadSource(error.to_string()))
}

fn trust_of(trust: &Trust) -> Result<vcenter::Trust, BadSource> {
    Ok(match trust {
        Trust::Unknown => vcenter::Trust::Nothing,
        Trust::Pin(fingerprint) => vcenter::Trust::Pin(parsed(fingerprint)?),
        Trust::Ca(file) => vcenter::Trust::Authorities(file.clone()),
    })
}

fn files_of(files: &crate::model::source::TlsFiles) -> TlsFiles {
    TlsFiles { ca: files.ca.clone(), certificate: files.certificate.clone(), key: files.key.clone() }
}
