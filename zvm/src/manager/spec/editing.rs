//! What a user changes of a group that there is.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use vra::api::vpg::JournalSize;
use vra::api::{ApiError, ErrorCode};

use super::{
    CHECKPOINT_INTERVAL_MS, Context, HISTORY_S, HOLD_DEADLINE_MS, RPO_TARGET_S, bad, check_description,
    check_journal, check_range, check_sources, check_test_reminder, find_disk, find_member, is_named,
    recovery, set_swap,
};
use crate::api::{DiskName, RecoveryEdit, VpgEdit};
use crate::inventory::{Inventory, Vm};
use crate::model::vpg::{Member, Vpg, VpgSettings};

/// A group's settings with what an edit changes.
pub fn edited(vpg: &Vpg, edit: &VpgEdit, context: &Context<'_>) -> Result<VpgSettings, ApiError> {
    let mut settings = vpg.settings.clone();
    check_scope(vpg, edit)?;
    if let Some(description) = &edit.description {
        check_description(description)?;
        settings.description.clone_from(description);
    }
    settings.priority = edit.priority.unwrap_or(settings.priority);
    check_test_reminder(edit.test_reminder_days)?;
    if edit.test_reminder_days.is_some() || edit.no_test_reminder {
        settings.test_reminder_days = edit.test_reminder_days;
    }
    settings.new_disks = edit.new_disks.unwrap_or(settings.new_disks);
    set(&mut settings.history_s, edit.history_s, "history", &HISTORY_S, "s")?;
    set(&mut settings.rpo_target_s, edit.rpo_target_s, "the RPO target", &RPO_TARGET_S, "s")?;
    let interval_ms = &mut settings.checkpoint_interval_ms;
    set(interval_ms, edit.checkpoint_interval_ms, "the checkpoint interval", &CHECKPOINT_INTERVAL_MS, "ms")?;
    let deadline_ms = &mut settings.hold_deadline_ms;
    set(deadline_ms, edit.hold_deadline_ms, "the hold deadline", &HOLD_DEADLINE_MS, "ms")?;
    if edit.checkpoint_interval_ms.is_some() || edit.hold_deadline_ms.is_some() {
        let timing = (settings.checkpoint_interval_ms, settings.hold_deadline_ms);
        check_sources(&vpg.name, timing, &settings.vms.iter().map(|member| member.source).collect())?;
    }
    settings.give_up_history = edit.keep_history.map_or(settings.give_up_history, |keep| !keep);
    for name in &edit.vms {
        if !settings.vms.iter().any(|member| is_named(member, name)) {
            let message = format!("VPG {:?} has no VM {name:?}", vpg.name);
            return Err(ApiError::new(ErrorCode::NotFound, message).remedy("`zvm vpg show` lists its VMs"));
        }
    }
    let is_meant =
        |member: &&mut Member| edit.vms.is_empty() || edit.vms.iter().any(|name| is_named(member, name));
    for member in settings.vms.iter_mut().filter(is_meant) {
        let size = &mut member.journal_size;
        match edit.journal_limit {
            Some(JournalSize::Bytes(bytes)) => (size.limit_bytes, size.limit_percent) = (bytes, None),
            Some(JournalSize::Percent(percent)) => size.limit_percent = Some(percent),
            None => {}
        }
        if edit.journal_warning.is_some() || edit.no_journal_warning {
            size.warning = edit.journal_warning;
        }
        size.minimum_bytes = edit.journal_minimum_bytes.unwrap_or(size.minimum_bytes);
        check_journal(&member.name, size, Some(&member.volumes))?;
    }
    for disk in &edit.exclude {
        exclude(vpg, &mut settings, disk, context.inventory)?;
    }
    for disk in &edit.no_exclude {
        include(vpg, &mut settings, disk)?;
    }
    for (disks, swap) in [(&edit.swap, true), (&edit.no_swap, false)] {
        for DiskName { vm, disk } in disks {
            let id = find_member(vpg, vm)?.vm;
            let Some(member) = settings.vms.iter_mut().find(|member| member.vm == id) else { continue };
            let path = find_disk(find_vm(context.inventory, member)?, disk)?.path;
            set_swap(&mut member.volumes, &member.name, &path, swap)?;
        }
    }
    if let Some(recovery) = &edit.recovery {
        set_recovery(vpg, &mut settings, recovery, context)?;
    }
    Ok(settings)
}

/// Refuses what is the whole group's where VMs are named.
fn check_scope(vpg: &Vpg, edit: &VpgEdit) -> Result<(), ApiError> {
    let named = VpgEdit { vms: edit.vms.clone(), ..VpgEdit::default() };
    let of_journals = VpgEdit {
        journal_limit: edit.journal_limit,
        journal_warning: edit.journal_warning,
        no_journal_warning: edit.no_journal_warning,
        journal_minimum_bytes: edit.journal_minimum_bytes,
        ..named.clone()
    };
    if edit.vms.is_empty() || *edit == of_journals && of_journals != named {
        return Ok(());
    }
    let message = format!(
        "VMs of VPG {:?} are named, and only the sizes of their journals are a VM's own: history, priority and all else are the whole group's",
        vpg.name
    );
    Err(bad(message).remedy(
        "say --vm with --journal-limit, --journal-warning or --journal-minimum alone, and all else in an edit of its own without --vm",
    ))
}

/// Changes a value, if another is given that is within limits.
fn set<T: Copy + PartialOrd + std::fmt::Display>(
    value: &mut T,
    to: Option<T>,
    what: &str,
    range: &RangeInclusive<T>,
    unit: &str,
) -> Result<(), ApiError> {
    if let Some(to) = to {
        check_range(what, to, range, unit)?;
        *value = to;
    }
    Ok(())
}

/// Notes that a disk which isn't protected isn't meant to be.
fn exclude(
    vpg: &Vpg,
    settings: &mut VpgSettings,
    name: &DiskName,
    inventory: &Inventory,
) -> Result<(), ApiError> {
    let id = find_member(vpg, &name.vm)?.vm;
    let Some(member) = settings.vms.iter_mut().find(|member| member.vm == id) else { return Ok(()) };
    let disk = find_disk(find_vm(inventory, member)?, &name.disk)?;
    if member.volumes.iter().any(|volume| volume.source_path == disk.path && !volume.left) {
        let message = format!("disk {} of VM {:?} is protected", disk.name, member.name);
        return Err(ApiError::new(ErrorCode::Unsupported, message).remedy(format!(
            "take it out of its protection: `zvm vpg remove-disks {} {}:{}`",
            vpg.name, member.name, disk.name
        )));
    }
    member.excluded.retain(|excluded| excluded.name != disk.name);
    member.excluded.push(disk);
    Ok(())
}

/// Forgets that a disk isn't meant to be protected. It needn't be in the inventory any more.
fn include(vpg: &Vpg, settings: &mut VpgSettings, name: &DiskName) -> Result<(), ApiError> {
    let id = find_member(vpg, &name.vm)?.vm;
    let Some(member) = settings.vms.iter_mut().find(|member| member.vm == id) else { return Ok(()) };
    let before = member.excluded.len();
    member
        .excluded
        .retain(|excluded| excluded.name != name.disk && excluded.path.as_os_str() != name.disk.as_str());
    if member.excluded.len() == before {
        let message = format!("VM {:?} has no excluded disk {:?}", member.name, name.disk);
        return Err(ApiError::new(ErrorCode::NotFound, message)
            .remedy(format!("`zvm vpg show {}` lists what isn't protected", vpg.name)));
    }
    Ok(())
}

/// Replaces how the group's VMs are to be recovered.
fn set_recovery(
    vpg: &Vpg,
    settings: &mut VpgSettings,
    edit: &RecoveryEdit,
    context: &Context<'_>,
) -> Result<(), ApiError> {
    recovery::check_group(&edit.group)?;
    let mut own = BTreeMap::new();
    for (name, recovery) in &edit.vms {
        let member = find_member(vpg, name)?;
        if own.insert(member.vm, recovery).is_some() {
            return Err(bad(format!("VM {:?} is named twice", member.name)));
        }
    }
    for member in &mut settings.vms {
        let recovery = own.remove(&member.vm).cloned().unwrap_or_default();
        let goal = recovery::Goal {
            vm: find_vm(context.inventory, member)?,
            target: context.vras.get(&member.target).map_or("", |vra| vra.name.as_str()),
            datastore: &member.datastore,
            inventory: context.inventory,
        };
        recovery::check_vm(&goal, &recovery, &edit.group)?;
        member.recovery = recovery;
    }
    settings.recovery = edit.group.clone();
    recovery::check_together(&vpg.name, settings)
}

pub(super) fn find_vm<'a>(inventory: &'a Inventory, member: &Member) -> Result<&'a Vm, ApiError> {
    inventory.vms.iter().find(|vm| vm.uuid == member.vm.0).ok_or_else(|| {
        let message = format!("VM {:?} is no longer in the inventory", member.name);
        ApiError::new(ErrorCode::NotFound, message)
            .remedy("correct the inventory; `zvm inventory` shows what it has")
    })
}
