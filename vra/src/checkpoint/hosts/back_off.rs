use super::failure::EpochFailure;
use crate::api::VraId;
use crate::wire::DeclineCode;

/// After so many attempts in a row that only held guests up, the next ones come later and later.
const PATIENCE: u32 = 3;

/// Longest time between attempts then, in µs, if the group's interval isn't longer.
const LONGEST_US: u64 = 60_000_000;

/// The same where VRAs answer in time that a VM isn't ready: guests are held for a round trip and no longer, and the first checkpoint after a
/// sync is waited for.
const LONGEST_DECLINED_US: u64 = 10_000_000;

/// The time between attempts by the clock. Where a VRA is live and yet can't be held in time, or has a VM that isn't ready for long, each
/// attempt holds all others' guests for nothing.
pub(super) struct BackOff {
    interval_us: u64,
    in_row: u32,
    /// The last of them was declined.
    is_declined: bool,
    /// The hosts that weren't live when it was looked last.
    missing: Vec<VraId>,
}

impl BackOff {
    pub(super) fn new(interval_us: u64) -> Self {
        Self { interval_us, in_row: 0, is_declined: false, missing: Vec::new() }
    }

    /// The group's own interval.
    pub(super) fn set_interval(&mut self, interval_us: u64) {
        self.interval_us = interval_us;
    }

    /// Time between attempts now, in µs.
    pub(super) fn interval_us(&self) -> u64 {
        let doublings = (self.in_row + 1).saturating_sub(PATIENCE).min(16);
        let longest_us = if self.is_declined { LONGEST_DECLINED_US } else { LONGEST_US };
        (self.interval_us << doublings).min(self.interval_us.max(longest_us))
    }

    /// When the next attempt may come after one that began then, in µs: 0 as long as it needn't come later.
    pub(super) fn due_after(&self, began_mono_us: u64) -> u64 {
        if self.in_row < PATIENCE { 0 } else { began_mono_us + self.interval_us() }
    }

    /// An attempt gave no checkpoint.
    pub(super) fn failed(&mut self, failure: &EpochFailure, own: VraId) {
        let is_for_nothing = match failure {
            EpochFailure::Late { .. } => true,
            // The coordinator's own VMs are looked at before anybody is held.
            EpochFailure::Declined { vra, code, .. } => {
                let is_unready = matches!(
                    code,
                    DeclineCode::NotStreaming | DeclineCode::InSync | DeclineCode::NotProtected
                );
                *vra != own && is_unready
            }
            _ => false,
        };
        if is_for_nothing {
            self.in_row = self.in_row.saturating_add(1);
            self.is_declined = matches!(failure, EpochFailure::Declined { .. });
        }
    }

    /// Says whether it was backing off.
    pub(super) fn reset(&mut self) -> bool {
        let was_backing_off = self.in_row >= PATIENCE;
        self.in_row = 0;
        was_backing_off
    }

    /// Looks who is live: where that has changed, what kept attempts up may have gone. Says whether it was backing off until now.
    pub(super) fn look(&mut self, missing: impl Iterator<Item = VraId> + Clone) -> bool {
        if missing.clone().eq(self.missing.iter().copied()) {
            return false;
        }
        self.missing = missing.collect();
        self.reset()
    }
}
