//! A group as a user could have described it.

use vra::api::VraId;

use crate::api::{VmSpec, VpgSpec};
use crate::model::vpg::{JournalBounds, Member, Vpg};

/// What the group's first VM has goes for all, and the others say what they have otherwise. `name_of` is what VRAs are called.
pub fn described(vpg: &Vpg, name_of: impl Fn(VraId) -> String) -> VpgSpec {
    let settings = &vpg.settings;
    let first = settings.vms.first();
    let place = |member: &Member| (name_of(member.target), member.datastore.display().to_string());
    let (target, datastore) = first.map(&place).unwrap_or_default();
    let size = first.map_or(NO_BOUNDS, |member| member.journal_size);
    // A VM can't say that it has none where the group has one.
    let warning = size.warning.filter(|_| settings.vms.iter().all(|vm| vm.journal_size.warning.is_some()));
    let vm = |member: &Member| {
        let (own_target, own_datastore) = place(member);
        let own = member.journal_size;
        let has_own_limit = (own.limit_bytes, own.limit_percent) != (size.limit_bytes, size.limit_percent);
        let own_limit = has_own_limit.then_some(own.limit_bytes).filter(|_| own.limit_percent.is_none());
        VmSpec {
            vm: member.vm.to_string(),
            target: Some(own_target).filter(|own| *own != target),
            datastore: Some(own_datastore).filter(|own| *own != datastore),
            journal_limit_bytes: own_limit,
            journal_limit_percent: own.limit_percent.filter(|_| has_own_limit),
            journal_warning: own.warning.filter(|own| Some(*own) != warning),
            journal_minimum_bytes: Some(own.minimum_bytes).filter(|own| *own != size.minimum_bytes),
            exclude: member.excluded.iter().map(|disk| disk.name.clone()).collect(),
            swap: swap_of(member),
            recovery: member.recovery.clone(),
        }
    };
    VpgSpec {
        name: vpg.name.clone(),
        description: settings.description.clone(),
        priority: settings.priority,
        journal_limit_bytes: size.limit_bytes,
        journal_limit_percent: size.limit_percent,
        journal_warning: warning,
        journal_minimum_bytes: size.minimum_bytes,
        history_s: settings.history_s,
        checkpoint_interval_ms: settings.checkpoint_interval_ms,
        hold_deadline_ms: settings.hold_deadline_ms,
        rpo_target_s: settings.rpo_target_s,
        give_up_history: settings.give_up_history,
        encrypt: settings.encrypt,
        test_reminder_days: settings.test_reminder_days,
        new_disks: settings.new_disks,
        recovery: settings.recovery.clone(),
        vms: settings.vms.iter().map(vm).collect(),
        target,
        datastore,
    }
}

/// Of a group without VMs, which there isn't.
const NO_BOUNDS: JournalBounds =
    JournalBounds { limit_bytes: 0, limit_percent: None, warning: None, minimum_bytes: 0 };

/// By their paths: a name may be another disk's by now.
fn swap_of(member: &Member) -> Vec<String> {
    let swap = member.volumes.iter().filter(|volume| volume.swap && !volume.left);
    swap.map(|volume| volume.source_path.display().to_string()).collect()
}
