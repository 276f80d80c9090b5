//! A group as its definition tells it.

use vra::api::{TimeUs, VpgDefinition};

use crate::api::defaults;
use crate::model::kept::KeptSettings;
use crate::model::vpg::{JournalBounds, Member, Vpg, VpgSettings, VpgState};

/// A group, made of the definition that a VRA has of it and what was kept beside that; none if it has no VMs. `otherwise_created_us` is when it was
/// created, if the definition doesn't tell.
pub fn vpg_of(
    newest: &VpgDefinition,
    mut kept: KeptSettings,
    applied_revision: u64,
    otherwise_created_us: TimeUs,
) -> Option<Vpg> {
    let first = newest.vms.first()?;
    let notes = newest.notes.clone().unwrap_or_default();
    let vms = newest.vms.iter().map(|vm| (vm, kept.vms.remove(&vm.id).unwrap_or_default()));
    let vms = vms.map(|(vm, own)| Member {
        vm: vm.id,
        name: vm.name.clone(),
        journal: vm.journal,
        member_since: vm.member_since,
        source: vm.source.id,
        takeover: vm.takeover,
        target: vm.target.id,
        datastore: vm.datastore.clone(),
        journal_size: JournalBounds {
            limit_bytes: vm.journal_limit_bytes,
            limit_percent: vm.journal_limit_percent,
            warning: vm.journal_warning,
            minimum_bytes: vm.journal_minimum_bytes,
        },
        volumes: vm.volumes.clone(),
        excluded: own.excluded,
        recovery: own.recovery,
    });
    let vms = vms.collect();
    Some(Vpg {
        id: newest.id,
        name: newest.name.clone(),
        state: VpgState::Active,
        revision: newest.revision,
        applied_revision,
        created_us: notes.created_us.unwrap_or(otherwise_created_us),
        last_test_us: None,
        stamp: newest.stamp(),
        settings: VpgSettings {
            description: notes.description,
            priority: notes.priority,
            member_set_version: newest.member_set_version,
            checkpoint_interval_ms: newest.checkpoint_interval_ms,
            hold_deadline_ms: newest.hold_deadline_ms,
            history_s: first.history_s,
            rpo_target_s: notes.rpo_target_s.unwrap_or_else(defaults::rpo_target_s),
            give_up_history: first.give_up_history,
            encrypt: newest.encrypt,
            paused: newest.paused,
            test_reminder_days: kept.test_reminder_days,
            new_disks: kept.new_disks,
            recovery: kept.recovery,
            vms,
            former: newest.former.clone(),
        },
        removal: None,
    })
}
