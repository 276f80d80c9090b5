//! Full syncs that a change brings about: whether the journals have room for them beside the history.

use vra::api::vpg::full_sync_bytes;
use vra::api::{ApiError, ErrorCode};

use crate::model::vpg::{Member, VpgSettings};
use crate::units::format_bytes;

/// Refuses a change of disks after which a VM's full sync won't fit its journal, unless its history may be given up.
pub fn check_change(
    vpg: &str,
    before: &VpgSettings,
    after: &VpgSettings,
    give_up_history: bool,
) -> Result<(), ApiError> {
    let is_synced = |member: &&Member| {
        let former = before.vms.iter().find(|former| former.vm == member.vm);
        // Disks that are in no journal go without one.
        former.is_some_and(|former| !former.volumes.starts_with(&member.volumes))
    };
    let synced: Vec<&Member> = after.vms.iter().filter(is_synced).collect();
    check(vpg, &synced, after, give_up_history)
}

/// The same for full syncs of members.
pub fn check(
    vpg: &str,
    members: &[&Member],
    settings: &VpgSettings,
    give_up_history: bool,
) -> Result<(), ApiError> {
    if give_up_history {
        return Ok(());
    }
    for member in members {
        let data_bytes = member
            .volumes
            .iter()
            .filter(|volume| !volume.left)
            .fold(0_u64, |sum, volume| sum.saturating_add(volume.size_bytes));
        let (needed_bytes, limit_bytes) = (full_sync_bytes(data_bytes), member.journal_limit_bytes());
        if needed_bytes <= limit_bytes {
            continue;
        }
        let then = match settings.give_up_history {
            true => "its older checkpoints, locked ones too, would be given up for it",
            false => "its replication would wait until there is",
        };
        let message = format!(
            "a full sync of VM {:?} would follow, which needs {} of its journal, and the limit is {}: {then}",
            member.name,
            format_bytes(needed_bytes),
            format_bytes(limit_bytes)
        );
        return Err(ApiError::new(ErrorCode::Conflict, message).remedy(format!(
            "raise the limit before, `zvm vpg edit {vpg} --vm {} --journal-limit SIZE`, or say that this may be, with --give-up-history",
            member.name
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::vpg::JournalBounds;

    #[test]
    fn the_room_counts_what_is_still_protected() {
        let volume = |gib: u64, left| vra::api::vpg::VolumeDefinition {
            id: vra::api::VolumeId::random(),
            number: 0,
            size_bytes: gib << 30,
            logical_block_bytes: 512,
            source_path: format!("/{gib}").into(),
            left,
            swap: false,
        };
        let member = |volumes| Member {
            vm: vra::api::VmId::random(),
            name: "db".into(),
            journal: vra::api::JournalId::random(),
            member_since: vra::api::MemberSince::default(),
            source: vra::api::VraId::random(),
            takeover: None,
            target: vra::api::VraId::random(),
            datastore: "/d".into(),
            journal_size: JournalBounds {
                limit_bytes: 10 << 30,
                limit_percent: None,
                warning: None,
                minimum_bytes: 0,
            },
            volumes,
            excluded: Vec::new(),
            recovery: Default::default(),
        };
        let settings = |member: &Member| VpgSettings {
            description: String::new(),
            priority: Default::default(),
            member_set_version: 1,
            checkpoint_interval_ms: 5_000,
            hold_deadline_ms: 100,
            history_s: 3_600,
            rpo_target_s: 60,
            give_up_history: true,
            encrypt: false,
            paused: false,
            test_reminder_days: None,
            new_disks: Default::default(),
            recovery: Default::default(),
            vms: vec![member.clone()],
            former: Vec::new(),
        };
        let before = member(vec![volume(8, false), volume(100, false)]);
        let mut after = before.clone();
        let (was, unchanged) = (settings(&before), settings(&after));
        check_change("shop", &was, &unchanged, false).unwrap();
        after.volumes[1].left = true;
        check_change("shop", &was, &settings(&after), false).unwrap();
        after.volumes[0].swap = true;
        after.volumes[1].left = false;
        let synced = settings(&after);
        after.volumes.truncate(1);
        check_change("shop", &synced, &settings(&after), false).unwrap();
        after = synced.vms[0].clone();
        let refused = check_change("shop", &was, &settings(&after), false).unwrap_err();
        assert!(
            refused.message.contains("limit is 10 GiB")
                && refused.remedy.unwrap().contains("--give-up-history")
        );
        check_change("shop", &was, &settings(&after), true).unwrap();
    }
}
