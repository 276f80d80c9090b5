use std::collections::BTreeMap;

use crate::api::VraId;

/// A VRA says that it lives when it has said nothing to a peer for so long, in µs.
pub const ALIVE_EVERY_US: u64 = 500_000;

/// A VRA is live for so long after it was last heard, in µs: four such messages may be lost.
pub const LIVE_FOR_US: u64 = 2_400_000;

/// When each peer was last heard, and spoken to.
#[derive(Debug, Default)]
pub(super) struct Liveness {
    peers: BTreeMap<VraId, Times>,
}

#[derive(Clone, Copy, Debug)]
struct Times {
    heard_mono_us: u64,
    /// Whatever was said. A message that says only that the sender lives could delay one behind it on the same line.
    said_mono_us: Option<u64>,
}

impl Liveness {
    /// Follows the set of peers. New ones get the time of a live one to be heard.
    pub(super) fn set_peers(&mut self, peers: impl Iterator<Item = VraId>, now_us: u64) {
        let mut next = BTreeMap::new();
        for peer in peers {
            let new = Times { heard_mono_us: now_us, said_mono_us: None };
            next.insert(peer, self.peers.get(&peer).copied().unwrap_or(new));
        }
        self.peers = next;
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = VraId> {
        self.peers.keys().copied()
    }

    /// Notes that a peer was heard; says whether it is one.
    pub(super) fn heard(&mut self, peer: VraId, now_us: u64) -> bool {
        let Some(times) = self.peers.get_mut(&peer) else { return false };
        times.heard_mono_us = times.heard_mono_us.max(now_us);
        true
    }

    /// Notes that a peer was spoken to.
    pub(super) fn said(&mut self, peer: VraId, now_us: u64) {
        if let Some(times) = self.peers.get_mut(&peer) {
            times.said_mono_us = Some(now_us);
        }
    }

    pub(super) fn is_live(&self, peer: VraId, now_us: u64) -> bool {
        self.peers.get(&peer).is_some_and(|times| now_us < times.heard_mono_us + LIVE_FOR_US)
    }

    /// The peers that are to be told that this VRA lives.
    pub(super) fn due(&self, now_us: u64) -> Vec<VraId> {
        let is_due = |times: &Times| times.due_mono_us() <= now_us;
        self.peers.iter().filter(|(_, times)| is_due(times)).map(|(peer, _)| *peer).collect()
    }

    pub(super) fn next_wake_us(&self) -> Option<u64> {
        self.peers.values().map(Times::due_mono_us).min()
    }
}

impl Times {
    fn due_mono_us(&self) -> u64 {
        self.said_mono_us.map_or(0, |said_us| said_us + ALIVE_EVERY_US)
    }
}
