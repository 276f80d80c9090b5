//! VRAs whose last VM leaves a group that goes on.

use vra::api::VraId;

use super::world::Leftover;
use crate::model::vpg::Vpg;

/// What follows from a change of a group's members for the parts of it that are left at VRAs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leaving {
    /// VRAs that have no part in it any more and are to let go of it.
    pub left: Vec<Leftover>,
    /// VRAs that have a part in it again.
    pub back: Vec<VraId>,
}

impl Leaving {
    /// Of a group that was `before` and is to be `after`, with the parts that are left already. Forgets former VMs that every VRA has heard
    /// of.
    pub fn of(before: &Vpg, after: &mut Vpg, left: &[Leftover], is_enrolled: impl Fn(VraId) -> bool) -> Self {
        let is_left = |vra| left.iter().any(|left| left.vpg == before.id && left.vra == vra);
        let (were, members) = (before.vras(), after.vras());
        let gone = were.difference(&members).filter(|vra| is_enrolled(**vra));
        let gone =
            gone.map(|vra| Leftover { vpg: before.id, vra: *vra, keep_files: after.keeps_files_at(*vra) });
        let leaving = Self { left: gone.collect(), back: members.difference(&were).copied().collect() };
        let former = &mut after.settings.former;
        // One that has a part again before it has let go hears of its former VMs with the new definition.
        for former in former.iter_mut().filter(|former| is_left(former.target)) {
            if members.contains(&former.target) {
                former.revision = before.revision + 1;
            }
        }
        former.retain(|former| former.revision > before.applied_revision || is_left(former.target));
        leaving
    }
}
