//! Commands about sources of inventory.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use vra::config::read_secret;

use super::Failure;
use super::ask::Ask;
use crate::api::{Request, Secret, SettingsEdit, SourceEdit};
use crate::model::source::{Access, Source, SourceSettings, TlsFiles, Trust};
use crate::units::parse_duration;

/// Longest password on standard input, in bytes.
const MAX_PASSWORD_BYTES: u64 = 1_024;

/// Sources of inventory.
#[derive(Debug, Subcommand)]
pub(super) enum SourceCommand {
    /// All of them, with when they were last read and what is wrong.
    List,
    /// Add a hypervisor, or a manager of hypervisors. It is read at once.
    #[command(subcommand)]
    Add(AddCommand),
    /// Change settings; what isn't named stays.
    Edit(EditArgs),
    /// Forget a source.
    Remove {
        /// Its name.
        source: String,
        /// Although groups have VMs that only it tells of.
        #[arg(long)]
        force: bool,
    },
    /// Read sources whole, now.
    Read {
        /// Its name; without one all are read.
        source: Option<String>,
    },
}

/// What to add.
#[derive(Debug, Subcommand)]
pub(super) enum AddCommand {
    /// A libvirt host.
    Libvirt {
        #[command(flatten)]
        source: NewSource,
        /// Its URI as virsh takes it: qemu+tls://HOST/system, qemu+tcp://HOST/system, qemu:///system,
        /// qemu+unix:///system?socket=PATH.
        #[arg(long, value_name = "URI")]
        address: String,
        /// Name under which its VRA is enrolled [default: the host's name].
        #[arg(long)]
        vra: Option<String>,
        #[command(flatten)]
        tls: TlsArgs,
    },
    /// A vCenter, or one vSphere host.
    Vcenter {
        #[command(flatten)]
        source: NewSource,
        /// https://HOST[:PORT].
        #[arg(long)]
        url: String,
        /// Who logs in.
        #[arg(long)]
        user: String,
        /// File with the password, readable by its owner alone; `-` reads it from standard input.
        #[arg(long, value_name = "FILE")]
        password_file: PathBuf,
        #[command(flatten)]
        trust: TrustArgs,
    },
}

/// What every source has.
#[derive(Debug, Args)]
pub(super) struct NewSource {
    /// Its name.
    name: String,
    /// Name of the site that its hosts are at.
    #[arg(long)]
    site: String,
    /// Time between two whole readings: no source tells of every change.
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    reread: Duration,
    /// Add it even if it can't be read now.
    #[arg(long)]
    unchecked: bool,
}

/// What is to be different.
#[derive(Debug, Args)]
pub(super) struct EditArgs {
    /// Its name.
    source: String,
    /// Name of the site that its hosts are at.
    #[arg(long)]
    site: Option<String>,
    /// Time between two whole readings.
    #[arg(long, value_parser = parse_duration)]
    reread: Option<Duration>,
    /// Its URI or URL.
    #[arg(long, visible_alias = "url")]
    address: Option<String>,
    /// Of a libvirt host: name under which its VRA is enrolled.
    #[arg(long)]
    vra: Option<String>,
    /// Of a vCenter: who logs in.
    #[arg(long)]
    user: Option<String>,
    /// Of a vCenter: file with the password, readable by its owner alone; `-` reads it from standard input.
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    trust: TrustArgs,
    /// Change it even if it can't be read so.
    #[arg(long)]
    unchecked: bool,
}

/// Files for TLS with a libvirt host, at the manager; without them those that libvirt's own tools take.
#[derive(Debug, Args)]
pub(super) struct TlsArgs {
    /// Certificate of the authority, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    tls_ca: Option<PathBuf>,
    /// The client's certificate, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    tls_cert: Option<PathBuf>,
    /// The client's key, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    tls_key: Option<PathBuf>,
}

/// How a vCenter's certificate is known. Without either the fingerprint is shown and the connection refused.
#[derive(Debug, Args)]
pub(super) struct TrustArgs {
    /// SHA-256 of the certificate, hex.
    #[arg(long, value_name = "HEX", conflicts_with = "ca_file")]
    certificate_sha256: Option<String>,
    /// The authority that signed it: a PEM file at the manager.
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl Ask<'_> {
    pub(super) async fn source(&self, command: SourceCommand) -> Result<(), Failure> {
        let request = match command {
            SourceCommand::List => Request::SourceList,
            SourceCommand::Add(AddCommand::Libvirt { source, address, vra, tls }) => {
                add(source, Access::Libvirt { address, vra, tls: tls.files()? }, None)
            }
            SourceCommand::Add(AddCommand::Vcenter { source, url, user, password_file, trust }) => {
                let password = read_password(&password_file)?;
                let trust = trust.trust()?.unwrap_or(Trust::Unknown);
                add(source, Access::Vcenter { url, user, trust }, Some(password))
            }
            SourceCommand::Edit(edit) => {
                let settings = SettingsEdit {
                    site: edit.site,
                    reread_interval_ms: edit.reread.map(|reread| reread.as_millis() as u64),
                    address: edit.address,
                    vra: edit.vra,
                    tls: edit.tls.files()?,
                    user: edit.user,
                    trust: edit.trust.trust()?,
                };
                let password = edit.password_file.as_deref().map(read_password).transpose()?;
                let change = Box::new(SourceEdit { settings, password });
                Request::SourceEdit { source: edit.source, edit: change, unchecked: edit.unchecked }
            }
            SourceCommand::Remove { source, force } => Request::SourceRemove { source, force },
            SourceCommand::Read { source } => Request::SourceRead { source },
        };
        self.print(request).await
    }
}

fn add(new: NewSource, access: Access, password: Option<Secret>) -> Request {
    let settings =
        SourceSettings { site: new.site, reread_interval_ms: new.reread.as_millis() as u64, access };
    Request::SourceAdd { source: Source { name: new.name, settings }, password, unchecked: new.unchecked }
}

impl TlsArgs {
    fn files(self) -> Result<Option<TlsFiles>, Failure> {
        match (self.tls_ca, self.tls_cert, self.tls_key) {
            (Some(ca), Some(certificate), Some(key)) => {
                let files = TlsFiles {
                    ca: absolute(&ca)?,
                    certificate: absolute(&certificate)?,
                    key: absolute(&key)?,
                };
                Ok(Some(files))
            }
            _ => Ok(None),
        }
    }
}

impl TrustArgs {
    fn trust(self) -> Result<Option<Trust>, Failure> {
        Ok(match (self.certificate_sha256, self.ca_file) {
            (Some(pin), _) => Some(Trust::Pin(pin.replace(':', "").to_ascii_lowercase())),
            (None, Some(file)) => Some(Trust::Ca(absolute(&file)?)),
            (None, None) => None,
        })
    }
}

/// The manager doesn't run in this process's folder.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))
}

fn read_password(path: &Path) -> Result<Secret, Failure> {
    let usage = |error: &dyn std::fmt::Display| Failure::Usage(format!("cannot read the password: {error}"));
    if path == Path::new("-") {
        let mut text = String::new();
        let mut input = std::io::stdin().lock().take(MAX_PASSWORD_BYTES + 2);
        input.read_to_string(&mut text).map_err(|error| usage(&error))?;
        return Ok(Secret::new(text.trim_end_matches(['\r', '\n'])));
    }
    let text = read_secret(path).map_err(|error| usage(&vra::report::chain(&error)))?;
    Ok(Secret::new(text.trim_end_matches(['\r', '\n'])))
}
