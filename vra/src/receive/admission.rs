//! Where a new generation's full sync goes: decided before it begins (C5).

use journal::writer::{RESERVED_SLOTS, Writer};

use super::receiver_types::{Pins, ReceiverPolicy};
use crate::api::vpg::full_sync_bytes;
use crate::wire::VolumeShape;

/// Where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Where the journal's state says: onto the recovery disks while there is no history, else through the journal.
    AsIs,
    /// Onto the recovery disks, and the history is given up before.
    GiveUpHistory,
    /// Nowhere: why, for people.
    Refuse(String),
}

pub(super) fn of_full_sync(
    writer: &Writer,
    policy: &ReceiverPolicy,
    volumes: &[VolumeShape],
    checkpoints: usize,
    promotable_slots: usize,
    pins: Pins,
) -> Admission {
    let superblock = writer.superblock();
    if superblock.state.is_base_sync() {
        return Admission::AsIs;
    }
    let pinned = pins.has_views || pins.lowest().is_some() && !policy.give_up_history;
    if checkpoints == 0 && !pinned {
        return Admission::GiveUpHistory;
    }
    // One that has left takes next to nothing: it reads zeroes.
    let data_bytes: u64 = volumes.iter().filter(|volume| !volume.left).map(|volume| volume.size_bytes).sum();
    let needed_bytes = full_sync_bytes(data_bytes);
    let growth_slots = match writer.lacks_space() {
        true => 0,
        false => u64::from(policy.limits.max_slots.saturating_sub(superblock.slot_count)),
    };
    let kept_slots = (writer.free_slot_count() as u64).saturating_sub(RESERVED_SLOTS as u64);
    // What can be promoted makes room as the sync needs it: history is shortened before it is given up.
    let free_slots = kept_slots + growth_slots + promotable_slots as u64;
    if free_slots.saturating_mul(superblock.slot_len_bytes) >= needed_bytes {
        return Admission::AsIs;
    }
    if policy.give_up_history && !pinned {
        return Admission::GiveUpHistory;
    }
    let what_then = if pinned {
        "close the open views and unlock checkpoints, so that older ones can be given up"
    } else {
        "raise the journal limit, or let the VPG give up older checkpoints"
    };
    Admission::Refuse(format!(
        "a full sync needs {} MiB of the journal, {} MiB are free: {what_then}",
        needed_bytes >> 20,
        (free_slots * superblock.slot_len_bytes) >> 20,
    ))
}
