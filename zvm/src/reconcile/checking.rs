//! Targets are asked whether they would take a change before one of them has it.

use std::collections::BTreeSet;

use vra::api::VraId;

use super::Reconciler;
use super::site_keys::has_site_keys;
use super::world::Observed;
use crate::model::vpg::Vpg;

impl Reconciler {
    /// The targets that must say first whether they would take a change: where several keep the group's journals, none is to have a definition
    /// that another one refuses. Those that can't be reached hold nobody up.
    pub(super) fn unchecked(
        &self,
        vpg: &Vpg,
        missing: &[VraId],
        targets: &BTreeSet<VraId>,
        observed: &Observed,
    ) -> Vec<VraId> {
        let asks = |vra: &VraId| {
            let is_reachable = observed.get(vra).is_some_and(|seen| seen.reachable);
            let awaits_keys = vpg.settings.encrypt && !has_site_keys(vra, observed);
            targets.contains(vra) && is_reachable && !awaits_keys
        };
        let asked: Vec<VraId> = missing.iter().copied().filter(asks).collect();
        if vpg.applied_revision == 0 || asked.len() < 2 {
            return Vec::new();
        }
        let is_unchecked = |vra: &VraId| self.checked.get(&(*vra, vpg.id)) != Some(&vpg.revision);
        asked.into_iter().filter(is_unchecked).collect()
    }
}
