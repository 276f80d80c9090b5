//! Definitions of groups are exported and imported.

use std::collections::HashMap;

use vra::api::{ApiError, ErrorCode, VraId};

use super::{Manager, internal, spec};
use crate::api::{ImportOutcome, ImportedVpg, VPG_EXPORT_VERSION, VpgExport, VpgSpec};
use crate::model::vpg::{Vpg, VpgState};

impl Manager {
    /// The definitions of these groups, by name or id; without any, of all that are not being deleted.
    pub async fn export_vpgs(&self, names: &[String]) -> Result<VpgExport, ApiError> {
        let mut vpgs = Vec::new();
        for name in names {
            vpgs.push(self.find_vpg(name).await?);
        }
        let desired = self.desired().await.map_err(internal)?;
        if names.is_empty() {
            vpgs = desired.vpgs;
            vpgs.retain(|vpg| vpg.state == VpgState::Active);
        }
        let vras: HashMap<VraId, String> = self.vra_names().await?;
        let name_of = |vra: VraId| vras.get(&vra).cloned().unwrap_or_else(|| vra.to_string());
        Ok(VpgExport {
            version: VPG_EXPORT_VERSION,
            site: self.site_name.clone(),
            exported_us: self.now_us(),
            vpgs: vpgs.iter().map(|vpg| spec::described(vpg, name_of)).collect(),
        })
    }

    /// Creates the groups of an export, each for itself: one that there is already, or that needs what there isn't, is refused, and the others
    /// are created. With `dry_run` none is, and what is told is what would be.
    pub async fn import_vpgs(&self, export: VpgExport, dry_run: bool) -> Result<Vec<ImportedVpg>, ApiError> {
        if export.version != VPG_EXPORT_VERSION {
            let message =
                format!("the export has version {}, this manager reads {VPG_EXPORT_VERSION}", export.version);
            return Err(ApiError::new(ErrorCode::VersionMismatch, message)
                .remedy("export it again with a manager of this version"));
        }
        let (mut imported, mut before) = (Vec::with_capacity(export.vpgs.len()), Vec::new());
        for spec in export.vpgs {
            let (name, vms) = (spec.name.clone(), spec.vms.len());
            let outcome = match dry_run {
                true => self.would_create(&spec, &mut before).await.map(|()| ImportOutcome::WouldBeCreated),
                false => self.create_vpg(spec).await.map(|task| ImportOutcome::Created(task.id)),
            };
            imported.push(ImportedVpg { name, vms, outcome: outcome.unwrap_or_else(ImportOutcome::Refused) });
        }
        Ok(imported)
    }

    /// Whether a group could be created after those `before`, which it joins then.
    async fn would_create(&self, spec: &VpgSpec, before: &mut Vec<Vpg>) -> Result<(), ApiError> {
        let mut desired = self.desired().await.map_err(internal)?;
        desired.vpgs.extend(before.iter().cloned());
        before.push(self.prepare_vpg(spec, &desired).await?);
        Ok(())
    }
}
