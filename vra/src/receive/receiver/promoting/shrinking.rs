//! What the journal's file gives back when the history doesn't need it.

use journal::writer::{Change, RESERVED_SLOTS};

use super::Stage;
use crate::clock::Now;
use crate::receive::receiver::Receiver;

/// Free slots that are kept besides those that the journal never fills.
const SPARE_SLOTS: u32 = 1;

/// Without a batch for so long, in microseconds, nothing is kept for a load that isn't there.
const QUIET_US: u64 = 60_000_000;

impl Receiver {
    /// Gives back what the history doesn't need if that is more than `least` slots, or anything when nothing has come for a while. As much as
    /// has just been promoted may be needed again soon: to keep it costs less than to give it back and reserve it again.
    pub(super) fn shrink(&mut self, least: usize, now: Now) {
        let is_quiet = now.mono_us.saturating_sub(self.last_append_us) > QUIET_US && self.writer.is_idle();
        let is_too_long = self.writer.superblock().slot_count > self.policy.limits.max_slots;
        let least = if is_quiet || is_too_long { 0 } else { least };
        let spare_slots = self.spare_slots();
        if self.writer.surplus_slot_count(spare_slots) > least
            && let Ok(ticket) = self.writer.change(Change::Shrink { spare_slots })
        {
            self.promoting.stage = Stage::Shrinking { ticket };
        }
    }

    /// Free slots that keep their space besides those that the journal never fills: as many as its minimum has.
    fn spare_slots(&self) -> u32 {
        let slot_count = self.writer.superblock().slot_count as usize;
        let kept = slot_count - self.writer.free_slot_count().min(slot_count) + RESERVED_SLOTS;
        let missing = (self.policy.limits.min_slots as usize).saturating_sub(kept);
        SPARE_SLOTS.max(u32::try_from(missing).unwrap_or(u32::MAX))
    }
}
