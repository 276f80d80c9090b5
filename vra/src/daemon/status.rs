//! What the VRA tells of itself.

use super::{Daemon, Finding, LocalIdentity, lock};
use crate::api::status::HostInfo;
use crate::api::{TimeUs, VraStatus};
use crate::config::hostname;

impl Daemon {
    /// The whole VRA now.
    pub(super) async fn status(&self) -> VraStatus {
        let vpgs = self.vpg_statuses().await;
        let site = lock(&self.link).site();
        VraStatus {
            vra: self.vra,
            name: self.name(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now_us: TimeUs::now(),
            started_us: self.started_us,
            host: self.host_info(),
            site,
            site_keys: self.targets.keys().ids().iter().map(ToString::to_string).collect(),
            awaits_site_key: !lock(&self.awaiting_keys).is_empty(),
            volumes: self.volume_infos(),
            vpgs,
            guest_agents: self.seen().guest_agents.keys().copied().collect(),
            source_vms: self.source_statuses(),
            target_vms: self.target_statuses(),
            views: self.view_infos(),
            alerts: lock(&self.alerts).list().into_iter().chain(self.target_alerts()).collect(),
        }
    }

    /// What the ZVM that enrolled this VRA calls it; until then, what the configuration says.
    pub(super) fn name(&self) -> String {
        let identity = LocalIdentity::open(&self.config).ok();
        let enrolled = identity.as_ref().and_then(LocalIdentity::name);
        enrolled.unwrap_or(&self.config.name).to_owned()
    }

    /// What is wrong now.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        self.volume_findings(&mut found);
        self.growth_findings(&mut found);
        self.share_findings(&mut found);
        self.source_findings(&mut found);
        self.spanning_findings(&mut found);
        self.guest_findings(&mut found);
        self.target_findings(&mut found);
        self.view_findings(&mut found);
        lock(&self.link).findings(&mut found);
        found
    }

    fn host_info(&self) -> HostInfo {
        let kernel = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let ublk_features = self.doors.ublk_features();
        HostInfo {
            hostname: hostname(),
            kernel,
            ublk_features: ublk_features.map(ublk::features::Features::names),
        }
    }
}
