//! Where an inventory is read from, beside the inventory file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::inventory::world::Scope;

/// A hypervisor, or a manager of hypervisors, that is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The name that its user gave it.
    pub name: String,
    /// What it is and how to get there.
    pub settings: SourceSettings,
}

/// What a source is and how to get there. Passwords are kept apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSettings {
    /// Name of the site that its hosts are at.
    pub site: String,
    /// Time between two whole readings, milliseconds: no source tells of every change.
    pub reread_interval_ms: u64,
    /// How it is spoken to.
    pub access: Access,
}

/// How a source is spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Access {
    /// One libvirt host.
    Libvirt {
        /// Its URI, as virsh takes it.
        address: String,
        /// Name under which its VRA is enrolled; none if that is the host's name.
        vra: Option<String>,
        /// For TLS: files at the manager; none for those that libvirt's own tools take.
        tls: Option<TlsFiles>,
    },
    /// A vCenter, or one vSphere host.
    Vcenter {
        /// `https://host[:port]`.
        url: String,
        /// Who logs in.
        user: String,
        /// How its certificate is known.
        trust: Trust,
    },
}

/// A client's certificate with its key, and who signs the server's: PEM files at the manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// Certificate of the authority.
    pub ca: PathBuf,
    /// The client's certificate.
    pub certificate: PathBuf,
    /// The client's key.
    pub key: PathBuf,
}

/// How a server's certificate is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Not yet: the connection is refused, and the error shows the fingerprint for the user to compare.
    Unknown,
    /// By its SHA-256, lower-case hex.
    Pin(String),
    /// By the authority that signed it: a PEM file at the manager.
    Ca(PathBuf),
}

impl Access {
    /// What its readings say of its hosts.
    pub fn scope(&self) -> Scope {
        match self {
            Self::Libvirt { .. } => Scope::Host,
            Self::Vcenter { .. } => Scope::Site,
        }
    }

    /// Where it is, for people.
    pub fn address(&self) -> &str {
        match self {
            Self::Libvirt { address, .. } => address,
            Self::Vcenter { url, .. } => url,
        }
    }

    /// What it is, for people.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Libvirt { .. } => "libvirt",
            Self::Vcenter { .. } => "vcenter",
        }
    }
}
