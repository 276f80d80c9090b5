//! The keys of encrypted journals go to the VRAs that keep some.

use vra::api::VraId;

use super::plan::{Action, ActionKind, Plan};
use super::world::{Desired, Observed};

/// The keys go to those VRAs alone that keep encrypted journals, or are to.
pub(super) fn plan_site_keys(desired: &Desired, observed: &Observed, plan: &mut Plan) {
    for vra in desired.vras.keys() {
        let Some(last) = observed.get(vra).and_then(|seen| seen.last.as_ref()) else { continue };
        let is_to_encrypt =
            desired.vpgs.iter().any(|vpg| vpg.settings.encrypt && vpg.targets().contains(vra));
        let encrypts = last.status.target_vms.iter().any(|vm| vm.site_key.is_some());
        if (is_to_encrypt || encrypts || last.status.awaits_site_key)
            // A VRA has those of its own file behind them.
            && !last.status.site_keys.starts_with(&desired.site_keys.ids)
        {
            let kind = ActionKind::SetSiteKeys(desired.site_keys.request.clone());
            plan.actions.push(Action { vra: *vra, kind });
        }
    }
}

/// Whether a VRA has any.
pub(super) fn has_site_keys(vra: &VraId, observed: &Observed) -> bool {
    let last = observed.get(vra).and_then(|seen| seen.last.as_ref());
    last.is_some_and(|last| !last.status.site_keys.is_empty())
}
