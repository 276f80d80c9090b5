//! Brings the link up once the VRA is enrolled, and hands its streams to those who serve them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;

use super::{Daemon, Finding, LocalIdentity, lock};
use crate::api::enroll::hex;
use crate::api::status::SiteInfo;
use crate::api::{Severity, TimeUs};
use crate::control::{Caller, serve_stream};
use crate::link::{Accepted, Link, LinkError, LinkSettings, StreamKind};
use crate::pki::{Credentials, Identity, PkiDir, PkiError};
use crate::report::chain;

/// Time between two tries to bring the link up, and two looks for a certificate.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// Before a certificate ends, this long an alert says so.
const ENDS_SOON_US: u64 = 14 * 86_400 * 1_000_000;

/// The link, as all share it who need it.
pub(super) type SharedLink = Arc<Mutex<LinkState>>;

/// The link, or why there is none.
#[derive(Default)]
pub(super) struct LinkState {
    up: Option<Link>,
    /// Whose certificate the VRA has, from when it was first read.
    site: Option<SiteInfo>,
    problem: Option<String>,
}

impl LinkState {
    /// The link, if it is up.
    pub(super) fn link(&self) -> Option<Link> {
        self.up.clone()
    }

    /// The site, if the VRA is enrolled: whether or not the link is up.
    pub(super) fn site(&self) -> Option<SiteInfo> {
        self.site.clone()
    }

    /// Takes the link away.
    pub(super) fn take(&mut self) -> Option<Link> {
        self.up.take()
    }

    /// What is wrong with the link.
    pub(super) fn findings(&self, found: &mut Vec<Finding>) {
        let mut add = |code, severity, message, remedy: &str| {
            let remedy = Some(remedy.to_owned());
            found.push(Finding { code, severity, vm: None, vpg: None, message, remedy });
        };
        if let Some(problem) = &self.problem {
            let message = format!("the link is down: {problem}");
            add("link-down", Severity::Critical, message, "repair it: the VRA tries again every second");
        }
        let Some(site) = &self.site else { return };
        let (ends, now) = (site.certificate_ends_us, TimeUs::now());
        if ends <= now {
            let message = format!("the VRA's certificate ended at {ends}");
            add(
                "certificate-ended",
                Severity::Critical,
                message,
                "enrol the VRA again (`vra enroll`) and restart it",
            );
        } else if ends.0 - now.0 < ENDS_SOON_US {
            let message = format!("the VRA's certificate ends at {ends}");
            add(
                "certificate-ends",
                Severity::Warning,
                message,
                "enrol the VRA again (`vra enroll`) and restart it",
            );
        }
    }
}

/// Waits for a certificate, brings the link up, serves its streams. Ends only when cancelled.
pub(super) async fn keep_linked(daemon: Arc<Daemon>) {
    loop {
        match bring_up(&daemon) {
            Ok(Some((link, accepted))) => {
                tracing::info!(listen = %link.local_address(), "the link is up");
                {
                    let mut state = lock(&daemon.link);
                    (state.up, state.problem) = (Some(link), None);
                }
                serve_accepted(&daemon, accepted).await;
            }
            Ok(None) => {}
            Err(error) => lock(&daemon.link).problem = Some(chain(&error)),
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

type Up = (Link, mpsc::Receiver<Accepted>);

fn bring_up(daemon: &Daemon) -> Result<Option<Up>, LinkError> {
    let folder = PkiDir::open(&daemon.config.pki_dir())?;
    // The ZVM's id is written last at enrolment.
    let zvm = LocalIdentity::open(&daemon.config).ok().and_then(|identity| identity.zvm());
    let (true, Some(zvm)) = (folder.is_enrolled(), zvm) else { return Ok(None) };
    let credentials = folder.load()?;
    let expected = Identity::vra(daemon.vra);
    if credentials.own.identity != expected {
        return Err(PkiError::WrongIdentity { expected, found: credentials.own.identity }.into());
    }
    lock(&daemon.link).site = Some(site_of(&credentials, zvm));
    let settings = LinkSettings { listen: daemon.config.listen };
    let (link, accepted) = Link::bind(&settings, credentials, daemon.trust.clone())?;
    Ok(Some((link, accepted)))
}

fn site_of(credentials: &Credentials, zvm: crate::api::ZvmId) -> SiteInfo {
    SiteInfo {
        zvm,
        ca_sha256: hex(&credentials.ca_sha256()),
        certificate_serial: credentials.own.serial.clone(),
        certificate_ends_us: credentials.own.ends_us,
    }
}

async fn serve_accepted(daemon: &Arc<Daemon>, mut accepted: mpsc::Receiver<Accepted>) {
    while let Some(stream) = accepted.recv().await {
        let daemon = Arc::clone(daemon);
        match stream.kind {
            StreamKind::Control => {
                tokio::spawn(serve_control(daemon, stream));
            }
            StreamKind::Data => daemon.take_data_stream(stream),
            StreamKind::Group => daemon.take_group_stream(stream),
        }
    }
}

async fn serve_control(daemon: Arc<Daemon>, mut stream: Accepted) {
    let Some(zvm) = stream.peer.identity.as_zvm() else { return };
    let served = serve_stream(&mut stream.recv, &mut stream.send, Caller::Zvm(zvm), &*daemon).await;
    if let Err(error) = served {
        tracing::debug!(%zvm, error = chain(&error), "a control stream ended");
    }
}
