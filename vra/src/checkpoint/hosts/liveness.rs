use std::collections::BTreeMap;

use crate::api::VraId;

/// Time between two messages that say that a VRA lives, in µs.
pub const ALIVE_EVERY_US: u64 = 500_000;

/// A VRA is live for so long after it was last heard, in µs: four such messages may be lost.
pub const LIVE_FOR_US: u64 = 2_400_000;

/// When each peer was last heard.
#[derive(Debug, Default)]
pub(super) struct Liveness {
    heard_mono_us: BTreeMap<VraId, u64>,
    next_alive_mono_us: u64,
}

impl Liveness {
    /// Follows the set of peers. New ones get the time of a live one to be heard.
    pub(super) fn set_peers(&mut self, peers: impl Iterator<Item = VraId>, now_us: u64) {
        let mut heard = BTreeMap::new();
        for peer in peers {
            heard.insert(peer, self.heard_mono_us.get(&peer).copied().unwrap_or(now_us));
        }
        self.heard_mono_us = heard;
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = VraId> {
        self.heard_mono_us.keys().copied()
    }

    /// Notes that a peer was heard; says whether it is one.
    pub(super) fn heard(&mut self, peer: VraId, now_us: u64) -> bool {
        let Some(heard) = self.heard_mono_us.get_mut(&peer) else { return false };
        *heard = (*heard).max(now_us);
        true
    }

    pub(super) fn is_live(&self, peer: VraId, now_us: u64) -> bool {
        self.heard_mono_us.get(&peer).is_some_and(|heard| now_us < heard + LIVE_FOR_US)
    }

    /// Whether it is time to tell the peers that this VRA lives.
    pub(super) fn is_alive_due(&mut self, now_us: u64) -> bool {
        let is_due = now_us >= self.next_alive_mono_us && !self.heard_mono_us.is_empty();
        if is_due {
            self.next_alive_mono_us = now_us + ALIVE_EVERY_US;
        }
        is_due
    }

    pub(super) fn next_wake_us(&self) -> Option<u64> {
        (!self.heard_mono_us.is_empty()).then_some(self.next_alive_mono_us)
    }
}
